"""Stage 2: train the connector so that the frozen LLM answers speech as it answered the transcript. One loop for every recipe."""

import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import Speech, UserError, ask, chat_parts, epoch_batches, interleave, random_spans, read_jsonl, transcript_tokens, whole_file, write_jsonl


@dataclass(frozen=True)
class Recipe:
    """One row of the recipe table: what makes one paper's system differ from another's."""
    about: str
    tasks: str = "train"         # "train": all training tasks of the task table; or the name of one task
    connector: str = "stack-mlp"
    lora: int = 0                # rank of a LoRA adapter on the LLM; 0: the LLM is frozen
    interleave: float = 0.0      # share of examples in which spans of words enter as text
    text_words: float = 0.4      # share of words that are text in such an example
    span: float = 2.0            # mean length of a text span, words
    repeat: tuple = (0.0, 0.0)   # share of the task "repeat": at the start, and from half-way on
    loss: str = "ce"             # "ce": the LLM's answer; "kl": its whole next-token distribution


class Examples:
    """The training set of a run: batches of parts as a pure function of (seed, step), so that there is no data position to save."""

    def __init__(self, model, utterances, behaviors, frames, recipe, steps, batch_size, seed):
        self.model, self.frames, self.recipe = model, frames, recipe
        self.steps, self.batch_size, self.seed = steps, batch_size, seed
        by_id = {u.id: u for u in utterances}
        self.behaviors = {}      # utterance id -> {"repeat": [..], "other": [..]}
        for b in behaviors:
            if b.utterance in by_id and recipe.tasks in ("train", b.task):
                kinds = self.behaviors.setdefault(b.utterance, {"repeat": [], "other": []})
                kinds["repeat" if b.task == "repeat" else "other"].append(b)
        self.utterances = [by_id[i] for i in self.behaviors]
        self.lengths = [u.duration for u in self.utterances]
        if len(self.utterances) < batch_size:
            raise UserError(f"{len(self.utterances)} utterances have behaviors for this recipe, fewer than one batch of {batch_size}: "
                            "prepare more speech or lower --batch-size")
        if recipe.interleave and not any(u.words for u in self.utterances):
            print("interleaving is off: no utterance of this data has word times")

    def repeat_share(self, step):
        start, end = self.recipe.repeat
        return start + (end - start) * min(1.0, step / max(1, self.steps / 2))

    def choose(self, rng, utterance, step):
        kinds = self.behaviors[utterance.id]
        want = "repeat" if rng.random() < self.repeat_share(step) else "other"
        return rng.choice(kinds[want] or kinds["repeat"] or kinds["other"])

    def example(self, rng, utterance, behavior):
        """(parts heard, parts read): the same conversation with the speech, or speech and text interleaved, and with the transcript."""
        tokenizer, frames, recipe = self.model.tokenizer, self.frames[utterance.id], self.recipe
        heard = [Speech(frames)]
        if utterance.words and rng.random() < recipe.interleave:
            heard = interleave(tokenizer, utterance, frames, random_spans(rng, len(utterance.words), recipe.text_words, recipe.span))
        response = self.model.response(behavior.response).ids
        return [chat_parts(tokenizer, ask(behavior.prompt), [audio], response) for audio in (heard, [transcript_tokens(tokenizer, utterance.text)])]

    def batch(self, step, micro, accumulate):
        """(batch, teacher batch or None) of micro-batch `micro` of step `step`."""
        rng = random.Random(f"batch-{self.seed}-{step}-{micro}")
        rows = [self.utterances[i] for i in epoch_batches(self.lengths, self.batch_size, self.seed, step * accumulate + micro)]
        pairs = [self.example(rng, u, self.choose(rng, u, step)) for u in rows]
        return [heard for heard, _ in pairs], [read for _, read in pairs] if self.recipe.loss == "kl" else None


def learning_rate(step, steps, peak, warmup):
    """Linear warm-up over `warmup` steps, then a cosine to zero."""
    return peak * min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup))))


def accumulate_gradients(model, micro_batches):
    """Backward over the micro-batches of one step; the loss is the mean over all response tokens of the step, however they are divided."""
    total = sum(len(parts[-1].ids) for batch, _ in micro_batches for parts in batch)
    loss = 0.0
    for batch, teacher in micro_batches:
        summed, _ = model(batch, teacher)
        (summed / total).backward()
        loss += summed.item() / total
    return loss, total


def train(model, examples, folder, *, lr, accumulate=1, warmup=50, clip=1.0, save_every=100):
    """Train what is trainable of `model` on `examples` for examples.steps steps; resumes from folder/state.safetensors.

    Writes folder/log.jsonl. Killed or interrupted, it loses at most `save_every` steps and ends with the very same weights.
    UserError if the loss stops being finite.
    """
    folder, parameters = Path(folder), model.trainable()
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    state = folder / "state.safetensors"
    first = load_state(state, parameters, optimizer) if state.exists() else 0
    log = [row for _, row in read_jsonl(folder / "log.jsonl") if row["step"] < first] if first else []
    bar = tqdm(range(first, examples.steps), desc=f"train {folder.name}", initial=first, total=examples.steps, unit="step")
    model.train()
    step, start, smooth = first, time.perf_counter(), None
    try:
        for step in bar:
            rate = optimizer.param_groups[0]["lr"] = learning_rate(step, examples.steps, lr, warmup)
            loss, tokens = accumulate_gradients(model, [examples.batch(step, i, accumulate) for i in range(accumulate)])
            if not math.isfinite(loss):
                raise UserError(f"{folder}: the loss is {loss} at step {step}; lower --lr and train again")
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            smooth = loss if smooth is None else 0.95 * smooth + 0.05 * loss
            bar.set_postfix(loss=f"{smooth:.3f}", refresh=False)
            log.append({"step": step, "loss": loss, "lr": rate, "grad_norm": norm.item(), "tokens": tokens,
                        "seconds": round(time.perf_counter() - start, 2)})
            if (step + 1) % save_every == 0 or step + 1 == examples.steps:
                save_state(state, parameters, optimizer, step + 1)
                write_jsonl(folder / "log.jsonl", log)
    except KeyboardInterrupt:
        print(f"\ninterrupted in step {step}; the same command goes on from the last saved step ({state})")
        raise
    return model.train(False)


def save_state(path, parameters, optimizer, step):
    """One safetensors file: trainable weights, both Adam moments, and the number of steps done."""
    tensors = {f"weight.{name}": p.detach().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{key}.{name}": value.contiguous() for key, value in optimizer.state[p].items()}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"step": str(step)})


def load_state(path, parameters, optimizer):
    """Put a saved state back; returns the number of steps done."""
    try:
        with safe_open(path, "pt") as file:
            for name, p in parameters.items():
                p.data.copy_(file.get_tensor(f"weight.{name}"))
                optimizer.state[p] = {key: file.get_tensor(f"{key}.{name}").to(p.device if key != "step" else "cpu")
                                      for key in ("step", "exp_avg", "exp_avg_sq")}
            step = int(file.metadata()["step"])
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"{path}: is no state of this training ({error}); --force starts again") from None
    print(f"resuming at step {step}")
    return step
