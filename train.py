"""Stage 2, the training loop: the connector learns to get from the frozen LLM the answers to speech that it gave to the transcript.

One loop for every recipe, on one GPU, several, or a CPU; interrupted or killed at any point, it goes on and ends with the very same weights.
"""

import json
import math
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import Speech
from files import UserError, claim, read_config, read_jsonl, whole_file, write_jsonl
from options import command_words
from parallel import MAIN, RANK, WORLD, add_up, add_up_gradients, wait

AS_BEFORE = ("encoder", "connector", "k", "hidden", "lora", "steps", "batch_size", "accumulate", "lr", "precision", "seed", "loss")      # what --resume keeps
SKIPS_ALLOWED = 20           # steps in a row without a finite gradient; after them the training stops


@dataclass
class Progress:
    """Where a training is. With the weights and the optimizer's moments this is all there is to save: the learning rate, the data and the random
    numbers are functions of (seed, step)."""
    step: int = 0            # steps done
    halvings: int = 0        # how often the micro-batch was halved for want of memory
    skipped: int = 0         # steps left out because their loss or gradient was not finite,
    in_a_row: int = 0        # of these the last ones in a row
    loss_scale: float = 2.0**14    # fp16 alone: what the loss is multiplied by, so that small gradients do not vanish,
    scale_steps: int = 0     # and for how many steps it has held


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, at most half of them, then a cosine to zero."""
    warmup = min(warmup, max(1, steps // 2))
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))


# ---- one step ----

def my_batches(examples, step, halvings=0):
    """This process's share of a step: [(seed, conversations, teacher's conversations or None)].

    Whole micro-batches, if every process can have as many; else a part of each. What does not fit the memory goes in smaller pieces. The step as a whole
    stays what it is.
    """
    whole, pieces = examples.accumulate % WORLD == 0, []
    for micro in range(RANK, examples.accumulate, WORLD) if whole else range(examples.accumulate):
        heard, read = examples.batch(step, micro)
        rows = list(range(len(heard)))[slice(None) if whole else slice(RANK, None, WORLD)]
        size = max(1, len(rows) >> halvings)
        for at in range(0, len(rows), size):
            piece = rows[at:at + size]
            name = f"dropout-{examples.seed}-{step}-{micro}" + ("" if whole else f"-{RANK}") + (f"-{at}" if at else "")
            pieces.append((random.Random(name).getrandbits(62), [heard[i] for i in piece], read and [read[i] for i in piece]))
    return pieces


def count_tokens(pieces):
    """Response tokens of this process's share."""
    return sum(len(parts[-1].ids) for _, heard, _ in pieces for parts in heard)


def count_frames(pieces):
    """Encoder frames of this process's share."""
    return sum(len(part.frames) for _, heard, _ in pieces for parts in heard for part in parts if isinstance(part, Speech))


def accumulate_gradients(model, pieces, tokens, scale=1.0):
    """Forward and backward of this process's share of a step of so many response tokens. The loss is a mean over them, however the step is divided."""
    loss = 0.0
    for seed, heard, read in pieces:
        torch.manual_seed(seed)                                    # dropout
        summed = model(heard, read)
        (summed * (scale / tokens)).backward()
        loss += summed.item() / tokens
    return loss


def step_gradients(model, examples, progress):
    """The gradients of a step, over all processes: (loss, response tokens, encoder frames). Where a GPU's memory does not suffice, once more in
    micro-batches of half the size, and so from then on."""
    pieces = my_batches(examples, progress.step, progress.halvings)
    tokens, frames = map(int, add_up([count_tokens(pieces), count_frames(pieces)]))
    while True:
        try:
            loss = accumulate_gradients(model, pieces, tokens, progress.loss_scale)
            break
        except torch.OutOfMemoryError as error:
            size, why = examples.batch_size >> progress.halvings, str(error).splitlines()[0]
        if size <= 1:
            raise UserError(f"one utterance at a time is still too much for this GPU ({why}); `plan` says what fits: a smaller LLM, --bits 4, "
                            "--gradient-checkpointing on, --cache-features disk")
        progress.halvings += 1
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        tqdm.write(f"out of memory with micro-batches of {size}: from step {progress.step} on {size // 2} at a time and twice the accumulation; "
                   "the step stays the same", file=sys.stderr)
        pieces = my_batches(examples, progress.step, progress.halvings)
    add_up_gradients(model.trainable().values())
    return add_up([loss])[0], tokens, frames


def update(optimizer, parameters, loss, progress, clip):
    """Clip the gradients and take the step, unless they or the loss are not finite: (gradient norm, was the step taken)."""
    for p in parameters:
        if p.grad is not None:
            p.grad /= progress.loss_scale
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
    if finite := math.isfinite(norm) and math.isfinite(loss):
        try:
            optimizer.step()
        except torch.OutOfMemoryError as error:                    # it may have changed some weights already, so the step cannot be taken again
            raise UserError(f"no memory for the optimizer's moments ({str(error).splitlines()[0]}); train again with --force, half the --batch-size and "
                            "twice the --accumulate; `plan` says what fits") from None
    optimizer.zero_grad(set_to_none=True)
    return norm, finite


def adjust_loss_scale(progress, finite):
    """fp16: halve the scale after a step that overflowed, double it after 2000 that did not."""
    progress.scale_steps = progress.scale_steps + 1 if finite else 0
    if not finite:
        progress.loss_scale = max(1.0, progress.loss_scale / 2)
    elif progress.scale_steps % 2000 == 0:
        progress.loss_scale *= 2


# ---- the loop ----

def train(model, examples, folder, *, lr, warmup=50, clip=1.0, save_every=100, key=""):
    """Train what is trainable of `model` on `examples` for examples.steps steps; resumes from the newest state in folder/state.

    key: names the settings, so that the state of another training is not taken for one of this.
    Writes folder/log.jsonl and, every `save_every` steps and when it is interrupted, a state. UserError if there is no finite gradient any more.
    """
    folder, parameters = Path(folder), model.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    progress, fp16 = load_state(folder, parameters, optimizer, key), next(model.llm.parameters()).dtype == torch.float16
    if not fp16:
        progress.loss_scale = 1.0
    log = earlier_log(folder / "log.jsonl", progress.step)
    start, smooth = time.perf_counter() - (log[-1]["seconds"] if log else 0), None

    def save():
        if MAIN:
            write_jsonl(folder / "log.jsonl", log)                 # the log first: what it is ahead of the state is dropped on resuming
            save_state(folder, parameters, optimizer, progress, key)
        wait()

    model.train()
    with stop_signals() as asked, tqdm(desc=f"train {folder.name}", initial=progress.step, total=examples.steps, unit="step", disable=not MAIN) as bar:
        while progress.step < examples.steps:
            rate = optimizer.param_groups[0]["lr"] = learning_rate(progress.step, examples.steps, lr, warmup)
            loss, tokens, frames = step_gradients(model, examples, progress)
            norm, finite = update(optimizer, list(parameters.values()), loss, progress, clip)
            row = {"step": progress.step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens": tokens,
                   "audio_seconds": round(frames / model.encoder.frame_rate, 2), "seconds": round(time.perf_counter() - start, 2)}
            log.append(row if finite else {**row, "loss": None, "grad_norm": None, "skipped": True})
            progress.step, progress.skipped, progress.in_a_row = progress.step + 1, progress.skipped + (not finite), 0 if finite else progress.in_a_row + 1
            if fp16:
                adjust_loss_scale(progress, finite)
            smooth = smooth if not finite else loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.set_postfix(loss=f"{smooth or math.nan:.3f}", **({"skipped": progress.skipped} if progress.skipped else {}), refresh=False)
            bar.update()
            stop = add_up([float(bool(asked))])[0] > 0
            if progress.step % save_every == 0 or progress.step == examples.steps or stop or progress.in_a_row == SKIPS_ALLOWED:
                save()
            if progress.in_a_row == SKIPS_ALLOWED:
                raise UserError(explain_skips(folder, progress))
            if stop:
                print(f"\ninterrupted; {progress.step} of {examples.steps} steps are saved in {folder / 'state'}")
                raise KeyboardInterrupt
    if progress.skipped:
        print(f"{progress.skipped} of {progress.step} steps were skipped, because their loss or gradient was not finite")
    return model.train(False)


def earlier_log(path, step):
    """The rows of the log before this step. It is for the reader, not for the training: one that is lost or damaged is begun anew."""
    try:
        return [row for row in read_log(path) if row["step"] < step] if step else []
    except UserError as error:
        print(f"{error}; the training goes on without its earlier rows")
        return []


def explain_skips(folder, progress):
    if progress.skipped == progress.step:
        return f"{folder}: no step gave a finite loss and gradient, so the weights of the LLM or of the encoder must be damaged, or --precision too small"
    return (f"{folder}: the last {SKIPS_ALLOWED} steps gave no finite loss and gradient; the weights from before them are saved; lower --lr and train again "
            "with --force")


@contextmanager
def stop_signals():
    """Yields a list that is no longer empty when Ctrl-C or SIGTERM asked to stop: the step is finished and saved first. A second Ctrl-C stops at once."""
    asked, here = [], threading.current_thread() is threading.main_thread()

    def ask(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)} if here else {}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what is saved: settings, a log, and the last two states ----

def as_before(folder):
    """The options that the training in `folder` was begun with, as words of the command line."""
    chosen, _ = read_config(folder, "train", recipe=dict)
    if not saved_states(folder):
        raise UserError(f"{folder}: there is no saved state to resume from; train without --resume")
    chosen = {**chosen, "loss": chosen["recipe"].get("loss")}
    return command_words(chosen, *AS_BEFORE) + ["--pad-whisper"] * bool(chosen.get("pad_whisper"))


def begin(folder, chosen, anew):
    """Claim a training's folder, and clear it of another training's results; with `anew`, of its states too."""
    wait()
    if MAIN:
        for name in ("model.json", "connector.safetensors", *(["log.jsonl"] if anew else [])):
            (folder / name).unlink(missing_ok=True)
        for name in ("adapter", *(["state"] if anew else [])):
            shutil.rmtree(folder / name, ignore_errors=True)
        claim(folder, chosen)
    wait()


def read_log(path):
    """The rows of a training log; the loss of a skipped step is None."""
    rows = [row for _, row in read_jsonl(path)]
    if not rows or not all(isinstance(row, dict) and all(isinstance(row.get(key), (int, float)) for key in ("step", "seconds"))
                           and ("skipped" in row or isinstance(row.get("loss"), (int, float))) for row in rows):
        raise UserError(f"{path}: is no whole training log; train again with --force")
    return rows


def saved_states(folder):
    """The saved states of a training, newest first."""
    return sorted((Path(folder) / "state").glob("[0-9]*.safetensors"), reverse=True)


def save_state(folder, parameters, optimizer, progress, key=""):
    """One safetensors file: trainable weights, both Adam moments, and the progress. The last two are kept."""
    tensors = {f"weight.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in optimizer.state[p].items()}
    with whole_file(Path(folder) / "state" / f"{progress.step:08d}.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"progress": json.dumps(asdict(progress)), "key": key})
    for old in saved_states(folder)[2:]:
        old.unlink(missing_ok=True)


def load_state(folder, parameters, optimizer, key=""):
    """Put the newest whole state back; returns the progress, at step 0 if there is no state."""
    for half_written in (Path(folder) / "state").glob(".*"):       # its process was killed
        if MAIN:
            half_written.unlink(missing_ok=True)
    states = saved_states(folder)
    for path in states:
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}
                progress = Progress(**json.loads(file.metadata()["progress"]))
                if file.metadata()["key"] != key:
                    raise ValueError("it was saved by a training with other settings")
            progress.in_a_row = 0                                  # after a stop for want of finite gradients it may try as often again
            moments = {name: {key: tensors[f"{key}.{name}"].to(p.device if key != "step" else "cpu") for key in ("step", "exp_avg", "exp_avg_sq")
                              if f"{key}.{name}" in tensors} for name, p in parameters.items()}
            for name, p in parameters.items():
                p.data.copy_(tensors[f"weight.{name}"])
                if moments[name]:                                  # none, if every step so far was skipped
                    optimizer.state[p] = moments[name]
            print(f"resuming at step {progress.step}")
            return progress
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
            print(f"{path}: is no state of this training ({str(error).splitlines()[0]})")
    if states:
        raise UserError(f"{folder / 'state'}: holds no state that can be read; --force starts again")
    return Progress()
