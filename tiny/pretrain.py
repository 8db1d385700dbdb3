"""Rebuild the two checkpoints of the tiny world from a seed, and measure them.

python -m tiny.pretrain --out FOLDER makes in it

    llm/       a Qwen2 that answers every task of tasks.toml about clean transcripts and
               transcripts with hesitations
    encoder/   a Wav2Vec2-BERT (conformer) with a character CTC head, 33 frames a second,
               trained on espeak-ng voices

Stopped by Ctrl-C or killed, the same command goes on where it was (a checkpoint that was finished
is made again: --only names the other).

The benchmark's sentences (world.is_held_out) and voices (speech.TEST_VARIANTS) appear in neither
training set. What the two are trained on is in pretrain_data.py, what they are in
pretrain_models.py, what is measured of them in measure.py.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils import parametrize
from tqdm import tqdm

from support.console import exit_codes, stop_signals
from support.files import HALF_WRITTEN, UserError, WriteError, fingerprint, write_text
from support.runs import delete_made
from support.states import load_state, save_state

from . import world
from .card import write_card
from .measure import measure_delay, measure_encoder, measure_llm, wer_on
from .pretrain_data import (
    BLENDED,
    HESITANT,
    HESITATIONS,
    IGNORED,
    blend_hesitations,
    conversation_batches,
    pad_conversations,
    render_utterances,
    speech_batches,
)
from .pretrain_models import (
    DEVICE,
    RoundToNF4,
    build_encoder,
    build_llm,
    build_processors,
    build_tokenizer,
)

HERE = Path(__file__).parent

# Phases of the LLM's pre-training: (steps of 64 conversations, peak learning rate, from which
# share on the weights are rounded to NF4, tasks that come more often). What comes more often is
# what was worst without.
HARD = {"reverse": 3, "numerals": 2, "sort_down": 2, "sort": 2, "repeat": 2}
HARDEST = {"reverse": 4, "sort": 4, "sort_down": 3, "numerals": 3, "translate": 3, "repeat": 2}
LLM_PHASES = [
    (4000, 3e-3, 0.6, HARD),
    (1200, 1e-3, 0.0, HARD),
    (1000, 1e-3, 0.0, HARDEST),
]
# Phases of the encoder's pre-training: (steps of 16 utterances, peak learning rate, utterances
# rendered, share of them with an echo).
ENCODER_PHASES = [
    (6000, 2e-3, 14000, 0.0),
    (2000, 1e-3, 6000, 0.5),
]


SAVE_EVERY = 200  # steps between two states to go on from
STARTED = f"{HALF_WRITTEN}pretraining"  # stands in OUT from the beginning to the end


# ---- a phase of either ----


@dataclass
class Phase:
    """What the steps of a phase have in common.

    With the weights and moments a state needs no more than its step: the learning rate, the
    batches and every random number are functions of (phase, step).
    """

    of: str  # "LLM" or "encoder"
    number: int  # 0, 1, ...
    seed: int
    steps: int
    lr: float  # at its peak, after linear warm-up; then a cosine to zero
    warmup: int  # steps
    weight_decay: float
    data: tuple  # what the batches are drawn with, beside the seed

    def folder(self, out):
        """Where its states are; a phase of other settings has another folder."""
        return out / f"pretraining-{self.of}-{self.number}-{fingerprint(self)}"


@dataclass
class PhaseProgress:
    step: int = 0  # steps done


def run_phase(model, phase, out, draw_batches, loss_of):
    """Train all of `model` for a phase's steps, from the newest state in its folder on.

    draw_batches(): an iterator of batches, one for each step. loss_of(batch, step): a step's loss.
    Interrupted, it saves a state and exits with 130.
    """
    from transformers import get_cosine_schedule_with_warmup

    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.lr, betas=(0.9, 0.98), weight_decay=phase.weight_decay
    )
    progress = load_state(phase.folder(out), parameters, optimizer, PhaseProgress())
    if progress.step == phase.steps:
        return
    for p, state in optimizer.state.items():  # a state is read to the CPU
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = state[moment].to(p.device)
    optimizer.param_groups[0]["initial_lr"] = phase.lr
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, phase.warmup, phase.steps, last_epoch=progress.step - 1
    )
    batches = draw_batches()
    for _ in range(progress.step):  # what came before is drawn again, and not learned again
        next(batches)

    name = f"pre-train {phase.of}, phase {phase.number + 1}"
    bar = tqdm(desc=name, initial=progress.step, total=phase.steps, unit="step")
    with stop_signals() as wants_to_stop, bar:
        while progress.step < phase.steps:
            torch.manual_seed(1_000_000 * phase.seed + progress.step)
            loss = loss_of(next(batches), progress.step)
            take_step(model, loss, optimizer, scheduler)
            progress.step += 1
            bar.update()
            if progress.step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
            if progress.step % SAVE_EVERY == 0 or progress.step == phase.steps or wants_to_stop:
                save_state(phase.folder(out), parameters, optimizer, progress, keep=1)
            if wants_to_stop:
                print(f"\ninterrupted; {progress.step} of {phase.steps} steps are saved in {out}")
                sys.exit(130)


def take_step(model, loss, optimizer, scheduler):
    """One step of the optimizer, gradients clipped to norm 1."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()


def forget_states(phases, out):
    """Delete the states of phases whose model is saved."""
    for phase in phases:
        delete_made(phase.folder(out), ["state/*.safetensors"])
        if phase.folder(out).exists():
            phase.folder(out).rmdir()


# ---- the LLM ----


def pretrain_llm(out, seed, shorten=1.0, hesitant=HESITANT, blended=BLENDED):
    """Build the tokenizer and the LLM, run the phases, save both to OUT/llm.

    shorten: scales the steps. hesitant: the share of conversations with hesitations; blended: the
    share of these that read like speech.
    """
    tasks = world.read_task_table()
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(tasks)
    llm = build_llm(tokenizer)
    phases = []
    for number, (steps, lr, round_from, weights) in enumerate(LLM_PHASES):
        steps = round(shorten * steps)
        data = (hesitant, blended, weights, round_from)
        phases.append(Phase("LLM", number, seed + number, steps, lr, 200, 0.05, data))
    for phase in phases:
        train_llm(llm, tokenizer, tasks, phase, out)
        llm.half().float()  # each phase ends as it is stored
    round_weights(llm)
    llm.half().save_pretrained(out / "llm")
    tokenizer.save_pretrained(out / "llm")
    forget_states(phases, out)


def round_weights(llm):
    """Put the weights on the NF4 grid for good, where loading in 4 bits finds them again.

    Unrounded, they answer worse than rounded: it is the rounded ones that were trained.
    """
    for linear in packed_linears(llm):
        linear.weight.data = RoundToNF4()(linear.weight.data)


def packed_linears(llm):
    """What is loaded in 4 bits: every linear layer but the output's."""
    linears = []
    for name, module in llm.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            linears.append(module)
    return linears


def train_llm(llm, tokenizer, tasks, phase, out):
    """Next-token training on the answers of conversation_batches().

    From the share `round_from` of the steps on, the weights are rounded to NF4 in the forward
    pass.
    """
    hesitant, blended, weights, round_from = phase.data
    spaced = [f" {word}" for word in HESITATIONS]
    hesitations = tokenizer(HESITATIONS + spaced)["input_ids"]  # one token each
    hesitations = torch.tensor(hesitations, device=llm.device).flatten()
    linears = packed_linears(llm)

    def draw_batches():
        return conversation_batches(tokenizer, tasks, phase.seed, 64, hesitant, weights)

    def loss_of(batch, step):
        if step >= int(round_from * phase.steps) and not parametrize.is_parametrized(linears[0]):
            for linear in linears:
                parametrize.register_parametrization(linear, "weight", RoundToNF4())
        ids, labels, mask = pad_conversations(batch, tokenizer.pad_token_id, llm.device)
        embeds = llm.get_input_embeddings()(ids)  # (B, T, D)
        if hesitant:
            embeds = blend_hesitations(embeds, ids, labels, hesitations, blended)
        return answer_loss(llm, embeds, labels, mask)

    run_phase(llm, phase, out, draw_batches, loss_of)

    # What the next phase goes on from are the unrounded weights.
    for linear in linears:
        if parametrize.is_parametrized(linear):
            parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)


def answer_loss(llm, embeds, labels, mask):
    """Mean cross-entropy of the answers' tokens; embeds (B, T, D), labels and mask (B, T)."""
    hidden = llm.model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state  # (B, T, D)

    # The vocabulary projection runs on answers only: N of the B * T tokens.
    targets = labels[:, 1:]  # (B, T - 1)
    answered = targets != IGNORED
    logits = llm.lm_head(hidden[:, :-1][answered])  # (N, vocabulary)
    return torch.nn.functional.cross_entropy(logits, targets[answered])


# ---- the encoder ----


def pretrain_encoder(out, seed, shorten=1.0):
    """Build feature extractor, tokenizer and encoder, run the phases, save all to OUT/encoder.

    `shorten` scales the steps and utterances.
    """
    torch.manual_seed(seed)
    extractor, tokenizer = build_processors(out / "encoder")
    model = build_encoder(tokenizer)
    phases = []
    for number, (steps, lr, utterances, echo) in enumerate(ENCODER_PHASES):
        steps = max(1, round(shorten * steps))
        data = (max(16, round(shorten * utterances)), echo)
        warmup = min(400, steps // 5)
        phases.append(Phase("encoder", number, seed + number, steps, lr, warmup, 0.02, data))
    for phase in phases:
        train_encoder(model, extractor, tokenizer, phase, out)
        model.half().float()  # each phase ends as it is stored
    model.half().save_pretrained(out / "encoder")
    forget_states(phases, out)


def train_encoder(model, extractor, tokenizer, phase, out):
    """CTC training with SpecAugment on rendered speech."""
    utterances, echo = phase.data
    some = []  # the rows it is measured on now and then

    def draw_batches():
        rows = render_utterances(
            extractor, tokenizer, "train", phase.seed, utterances, "render speech", echo
        )
        some.extend(rows[:: max(1, len(rows) // 150)])
        return speech_batches(rows, phase.seed, 16)

    def loss_of(batch, step):
        if step and step % 1000 == 0:
            wer = wer_on(model, tokenizer, some)
            tqdm.write(f"step {step}: WER {wer:.2%} on training speech")
        model.train()
        features, mask, labels = (tensor.to(model.device) for tensor in batch)
        return model(input_features=features, attention_mask=mask, labels=labels).loss

    run_phase(model, phase, out, draw_batches, loss_of)


# ---- the command ----


def main():
    args = parse_arguments()
    if not args.measure:
        refuse_others_files(args.out, (args.only,) if args.only else ("llm", "encoder"))
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / STARTED).touch()
    if not args.only and not args.measure and DEVICE == "cpu":
        sys.exit(build_side_by_side())
    print(f"device {DEVICE}, {torch.get_num_threads()} threads")

    figures = {}
    if not args.measure:
        figures["seed"] = args.seed
    if args.only != "encoder":
        figures |= llm_figures(args)
    if args.only != "llm":
        figures |= encoder_figures(args)

    # The other build may have written its own.
    measured = args.out / "measured.json"
    if measured.exists():
        figures = json.loads(measured.read_text()) | figures
    write_text(measured, json.dumps(figures, indent=1) + "\n")
    (args.out / STARTED).unlink(missing_ok=True)
    if {"llm_steps", "llm_4_bits", "encoder_steps", "encoder_wer"} <= set(figures):
        write_card(args.out, figures)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder that gets llm/, encoder/ and README.md ({HERE.name} replaces those that come "
        "with the project); with --measure by default these",
    )
    parser.add_argument("--only", choices=["llm", "encoder"], help="build one of the two")
    parser.add_argument(
        "--measure",
        action="store_true",
        help="measure the checkpoints that are there; train nothing",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of all steps to run, to try things"
    )
    parser.add_argument(
        "--hesitant",
        type=float,
        default=HESITANT,
        help="share of the LLM's conversations with hesitations",
    )
    parser.add_argument(
        "--blended",
        type=float,
        default=BLENDED,
        help="share of these that read like speech: blends of embeddings instead of tokens, noise",
    )
    args = parser.parse_args()
    if not 0 < args.share <= 1:  # nan, too, is none
        parser.error(f"--share {args.share}: must be more than 0, and at most 1")
    if args.measure:
        args.out = args.out or HERE
    elif not args.out:
        parser.error("name a folder with --out")
    return args


def refuse_others_files(out, names):
    """Stop if a folder that would be written holds what an earlier run of this did not make."""
    ours = out == HERE or (out / "measured.json").exists() or (out / STARTED).exists()
    for name in (*names, "README.md"):
        if (out / name).exists() and not ours:
            sys.exit(f"{out / name}: is there already, and not made by this; choose another --out")


def build_side_by_side():
    """Run this command once for each checkpoint, both at once; the worse of the two exit codes.

    Small models use two cores better apart than together.
    """
    threads = max(1, (os.cpu_count() or 2) // 2)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    builds = []
    for only in ("llm", "encoder"):
        command = [sys.executable, "-m", "tiny.pretrain", *sys.argv[1:], "--only", only]
        builds.append(subprocess.Popen(command, env=environment))
    return max(exit_codes(builds))  # stopped, each saves a state


def llm_figures(args):
    """Train the LLM unless it is only to be measured; its part of measured.json."""
    figures = {}
    if not args.measure:
        since = time.time(), time.process_time()
        pretrain_llm(args.out, args.seed, args.share, args.hesitant, args.blended)
        figures["llm_hesitant"] = args.hesitant
        figures["llm_blended"] = args.blended
        figures["llm_share"] = args.share
        figures["llm_steps"] = [round(args.share * steps) for steps, *_ in LLM_PHASES]
        figures["llm_time"] = elapsed(since)

    for bits in (16, 4):
        scores = measure_llm(args.out / "llm", bits)
        figures[f"llm_{bits}_bits"] = scores
        worst, task = min((min(cells.values()), name) for name, cells in scores.items())
        print(f"LLM, {bits} bits: exact on held-out utterances, worst {worst:.1%} ({task})")
        for name, cells in scores.items():
            columns = [f"{prompts} prompts {value:.1%}" for prompts, value in cells.items()]
            print("  ".join([f"  {name:<12}", *columns]))
    return figures


def encoder_figures(args):
    """Train the encoder unless it is only to be measured; its part of measured.json."""
    figures = {}
    if not args.measure:
        since = time.time(), time.process_time()
        pretrain_encoder(args.out, args.seed, args.share)
        figures["encoder_steps"] = [round(args.share * steps) for steps, *_ in ENCODER_PHASES]
        figures["utterances"] = [round(args.share * n) for _, _, n, _ in ENCODER_PHASES]
        figures["encoder_time"] = elapsed(since)

    figures["ctc_delay"] = measure_delay(args.out / "encoder")
    figures["n_measured"] = 600
    figures["encoder_wer"] = measure_encoder(args.out / "encoder", utterances=600)
    rates = [f"WER {value:.2%} on {name}" for name, value in figures["encoder_wer"].items()]
    print("encoder: " + ", ".join(rates))
    return figures


def elapsed(since):
    """What training took, for the card: 12 minutes (23 CPU minutes), 2 threads, cpu.

    since: (time.time(), time.process_time()) when it began. Wall time depends on who else uses the
    machine, CPU time hardly.
    """
    wall = (time.time() - since[0]) / 60
    cpu = (time.process_time() - since[1]) / 60
    threads = torch.get_num_threads()
    return f"{wall:.0f} minutes ({cpu:.0f} CPU minutes), {threads} threads, {DEVICE}"


if __name__ == "__main__":
    try:
        main()
    except (UserError, WriteError, OSError) as error:
        sys.exit(f"pretrain: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
