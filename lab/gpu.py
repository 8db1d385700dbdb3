"""The first meeting with a GPU: proves every path that only a GPU has, and measures docs/gpu.md.

    python -m lab.gpu --smoke        does each path work? three minutes at most, from 4 GB on
    python -m lab.gpu --out FOLDER   how much memory, how fast? row by row; goes on where it stopped

Nothing is downloaded: weights are random and of real sizes. FOLDER gets rows/*.json, and of all of
them together gpu.json and gpu.md, the tables of docs/gpu.md. Without a GPU the same rows are
measured with the smallest shapes, so that the program itself can be tried.
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch import nn

from data import SAMPLE_RATE, Response
from lab.memory import CONTEXT, GB
from lab.model_shapes import find_config
from lab.plan import FRUGAL
from lab.programs import run_program
from lab.report import markdown_table
from lab.smoke import ended, mtbi, smoke
from lab.step import StepOptions, build_random, compare_steps, describe_device, random_conversations
from lab.step import random_llm, random_whisper, seconds_of, wait_for_device
from model import PRECISIONS, HuggingFaceEncoder, compute_precision
from support.ahead import READERS, ahead
from support.files import UserError, first_line, read_json, whole_file, write_json
from support.hub import free_memory
from support.options import Count
from support.processes import DEVICE

ON_GPU = DEVICE != "cpu"
ENCODERS = ("openai/whisper-small", "openai/whisper-large-v3")
LORA_RANK = 16
# LLM -> conversations in a micro-batch: what `plan` chooses for the smallest card that it fits
LLMS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 16,
    "Qwen/Qwen2.5-1.5B-Instruct": 8,
    "Qwen/Qwen2.5-3B-Instruct": 16,
    "Qwen/Qwen2.5-7B-Instruct": 4,
    "meta-llama/Llama-3.1-8B-Instruct": 4,
    "Qwen/Qwen2.5-14B-Instruct": 2,
}
# where the card is smaller or larger: (conversations in a micro-batch, gradient checkpointing)
OTHER_SIZES = {
    "Qwen/Qwen2.5-1.5B-Instruct": [(4, "on")],
    "Qwen/Qwen2.5-7B-Instruct": [(32, "on"), (16, "off"), (32, "off")],
}
# where it is smaller still, the projection in NF4 and the embeddings in host memory:
# conversations in a micro-batch
FRUGAL_SIZES = {
    "Qwen/Qwen2.5-1.5B-Instruct": [8],
    "Qwen/Qwen2.5-3B-Instruct": [16, 4],
    "Qwen/Qwen2.5-7B-Instruct": [4],
}
ANSWERED = ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen2.5-7B-Instruct")
ANSWERS_AT_ONCE = 32
SMALLEST = ("tiny", "openai/whisper-tiny")  # without a GPU
STEPS = 8  # timed ones
DEMO_AT_MOST = 1200  # seconds


@dataclass
class GpuOptions:
    smoke: bool = False
    """try every path that only a GPU takes, and measure nothing"""
    out: str | None = None
    """folder for what is measured, of one card; rows that are there are not measured again"""
    minutes: Count = 25
    """no row is begun after so many minutes; the same command goes on with those left"""
    only: str = ""
    """only rows whose name has one of these in it, like 7B, or lora,demo"""


# ---- the rows ----


class Row(NamedTuple):
    """One measurement; `name` is its file's, too."""

    name: str
    llm: str = ""
    frugal: bool = False  # is the projection in NF4, and the table of embeddings on the host?
    step: StepOptions | None = None  # of a training step
    encoder: str = ""  # whose speed is measured
    answers: bool = False  # stage 1 and the benchmark of the LLM
    demo: bool = False


def all_rows():
    """[Row], what takes little first, and those of one LLM together, so that it is made once."""
    rows = []
    for encoder in ENCODERS if ON_GPU else SMALLEST[1:]:
        rows.append(Row(f"encoder-{short(encoder)}", encoder=encoder))
    rows.append(Row("demo", demo=True))
    for llm in LLMS if ON_GPU else SMALLEST[:1]:
        if llm in ANSWERED or not ON_GPU:
            rows.append(Row(f"answers-{short(llm)}", llm, answers=True))
        rows += rows_of_steps(llm)
    return rows


def rows_of_steps(llm):
    """The training steps of one LLM; those with an adapter last, which stays on the LLM."""
    encoders = ENCODERS if ON_GPU else SMALLEST[1:]
    lengths = (15.0, 30.0) if ON_GPU else (1.0,)
    batch, encoder, seconds = LLMS.get(llm, 2), encoders[-1], lengths[0]

    rows = []
    for each in encoders:
        for length in lengths:
            rows.append(row_of_step(StepOptions(llm, each, seconds=length, batch_size=batch)))
    usual = StepOptions(llm, encoder, seconds=seconds, batch_size=batch)
    rows.append(row_of_step(replace(usual, loss="kl")))
    for size, checkpointing in OTHER_SIZES.get(llm, []):
        other = replace(usual, batch_size=size, gradient_checkpointing=checkpointing)
        rows.append(row_of_step(other))
    rows.append(row_of_step(replace(usual, lora=LORA_RANK)))
    for size in FRUGAL_SIZES.get(llm, []) if ON_GPU else [batch]:
        rows.append(row_of_step(replace(usual, batch_size=size, **FRUGAL)))
    return rows


def row_of_step(step):
    """The Row of a training step, by whose settings it is named."""
    parts = [
        "step",
        short(step.llm),
        short(step.encoder),
        f"{step.seconds:g}s",
        f"x{step.batch_size}",
        step.loss,
    ]
    if step.lora:
        parts.append(f"lora{step.lora}")
    if step.gradient_checkpointing == "off":
        parts.append("whole")
    frugal = step.embeddings == "host"
    if frugal:
        parts.append("frugal")
    return Row("-".join(parts), step.llm, frugal, replace(step, steps=STEPS))


def short(name):
    return name.split("/")[-1].removesuffix("-Instruct")


# ---- measuring them ----


def measure_rows(options):
    """Measure what is not there yet; afterwards write the page of all that is."""
    folder = Path(options.out)
    if folder.exists() and not (folder / "rows").is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder}: is there already, and not made by this; name another --out")
    refuse_other_card(folder)
    folder.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    which, llm = None, None  # the LLM that was made last, or what was wrong with it
    left = 0
    for row in all_rows():
        path = folder / "rows" / f"{row.name}.json"
        is_wanted = any(part in row.name for part in options.only.split(","))
        if not is_wanted or (path.exists() and not is_failed(read_json(path))):
            continue
        if time.monotonic() > until:
            left += 1
            continue
        start = time.monotonic()
        if (row.llm, row.frugal) != which:
            llm = None
            free_memory()
            which, llm = (row.llm, row.frugal), or_failed(make_llm, row.llm, row.frugal)
        found = llm
        if not is_failed(llm):
            found = or_failed(measure, row, llm, folder)
        write_json(path, {**describe_device(), **found, "row": row.name})
        said = found.get("failed", "measured")
        print(f"{row.name}: {said}, {time.monotonic() - start:.0f} s", flush=True)
        free_memory()
    write_page(folder)
    if left:
        print(f"{left} rows are left: run the same command again")


def or_failed(function, *arguments):
    """What a function returns; {"failed": why} if it cannot, too little memory being one reason."""
    try:
        return function(*arguments)
    except Exception as error:  # whatever it is, the next row is tried, too
        return {"failed": first_line(error)}


def is_failed(found):
    return isinstance(found, dict) and "failed" in found


def refuse_other_card(folder):
    """UserError if a row was measured on another card: a page is about one."""
    here = describe_device()["device"]
    for row in rows_in(folder).values():
        if row["device"] != here:
            raise UserError(
                f"{folder}: holds what was measured on {row['device']}, and this is {here}; name "
                "another --out"
            )


def rows_in(folder):
    """{name: what was measured} of the rows that are there."""
    found = {}
    for row in all_rows():
        path = folder / "rows" / f"{row.name}.json"
        if path.exists():
            found[row.name] = read_json(path, "device")
    return found


def make_llm(name, frugal):
    """The LLM with random weights in NF4; None where a row has none."""
    if not name:
        return None
    torch.manual_seed(0)
    config = find_config(name, "llm")
    dtype = PRECISIONS[compute_precision("auto", config)]
    return random_llm(config, 4, dtype, **(FRUGAL if frugal else {}))


def measure(row, llm, folder):
    """{name: value} of one row."""
    if row.step:
        return compare_steps(row.step, llm)
    if row.answers:
        return speed_of_answers(row.llm, llm)
    if row.encoder:
        return speed_of_encoder(row.encoder)
    return time_demo(folder)


def speed_of_answers(name, llm):
    """Answers a second, of 64 tokens: of stage 1 to transcripts, of the benchmark to speech."""
    options = StepOptions(llm=name, batch_size=ANSWERS_AT_ONCE if ON_GPU else 2)
    encoder_config = find_config(ENCODERS[0], "encoder")
    model, _ = build_random(options, llm, encoder_config)
    model.train(False)
    model.ends = []  # random weights would end some answers early
    examples = random_conversations(options, encoder_config.d_model, round(options.seconds * 50))
    read, heard = [], []
    for example in examples:
        read.append([part for part in example.teacher if not isinstance(part, Response)])
        heard.append([part for part in example.parts if not isinstance(part, Response)])
    result = {"llm": name, "answers_at_once": options.batch_size, "tokens": 64}
    for what, batch in (("stage_1", read), ("bench", heard)):
        answer = partial(model.generate_rows, batch, 64)
        answer()  # the first one warms up, at every length that the second one has
        seconds = seconds_of(answer)
        result[f"{what}_answers_s"] = options.batch_size / seconds
    return result


class RandomWhisper(HuggingFaceEncoder):
    """A Whisper encoder of a real size and random weights, which hears as a loaded one does."""

    def __init__(self, name):
        nn.Module.__init__(self)
        self.name, self.pad_whisper, self.is_whisper, self.head = name, False, True, None
        config = find_config(name, "encoder")
        self.model = random_whisper(config)
        self.extractor = transformers.WhisperFeatureExtractor(config.num_mel_bins)


def speed_of_encoder(name):
    """Hours of audio that an encoder hears in an hour, in clips of 15 s, features included.

    One after the other; and as `encode` does it, of equal length together and features ahead.
    """
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    encoder = RandomWhisper(name)
    rng = np.random.default_rng(0)
    clips, seconds = (40, 15) if ON_GPU else (2, 2)
    samples = rng.normal(0, 0.1, seconds * SAMPLE_RATE).astype(np.float32)
    encoder(samples)  # the first one warms up

    def hear_all():
        for _ in range(clips):
            encoder(samples)

    at_once = round(encoder.seconds_at_once / seconds) if ON_GPU else 1

    def hear_groups_of_them():
        copies, threads = [samples] * clips, READERS if ON_GPU else 0
        with ahead(partial(encoder.clip, name=name), copies, threads) as made:
            while group := list(islice(made, at_once)):
                encoder.hear_together(group)

    one_by_one, together = seconds_of(hear_all), seconds_of(hear_groups_of_them)
    if encoder.left_gpu:
        raise ValueError("out of memory: it heard on the CPU")
    if ON_GPU and encoder.seconds_at_once < at_once * seconds:
        raise ValueError(f"out of memory with {at_once} clips at once")
    return {
        "encoder": name,
        "audio_hours_an_hour": clips * seconds / one_by_one,
        "at_once": at_once,
        "together_audio_hours_an_hour": clips * seconds / together,
        "peak_gb": torch.cuda.max_memory_allocated() / GB if ON_GPU else None,
    }


def time_demo(folder):
    """Wall time of the tiny world's demo; its short form where there is no GPU."""
    # or it would go on where an earlier one stopped
    with TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as anew:
        words = ["demo", "--out", str(Path(anew).resolve() / "demo")]
        if not ON_GPU:
            words.append("--short")
        start = time.perf_counter()
        ended(mtbi(*words, wait=False), DEMO_AT_MOST)
        seconds = time.perf_counter() - start
    return {"short": not ON_GPU, "seconds": seconds}


# ---- the page ----


def write_page(folder):
    """gpu.json, all rows with card, driver and versions, and gpu.md, the tables."""
    found = rows_in(folder)
    write_json(folder / "gpu.json", {"card": describe_card(), "rows": found})
    lines = [describe_in_words(), *step_table(found), *other_lines(found)]
    with whole_file(folder / "gpu.md") as temporary:
        Path(temporary).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(["", *lines]))


def describe_card():
    """{name: value} of the card, its driver, and the versions of what ran."""
    card = {**describe_device(), "python": sys.version.split()[0]}
    if not ON_GPU:
        return card
    wait_for_device()
    card["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / GB
    card["cuda"] = torch.version.cuda
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
        card["driver"] = done.stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        card["driver"] = "not known"
    return card


def describe_in_words():
    card = describe_card()
    names = ("date", "device", "memory_gb", "driver", "cuda", "python", "torch", "transformers")
    words = []
    for name in (*names, "bitsandbytes"):
        if name == "memory_gb" and name in card:
            words.append(f"{card[name]:.0f} GB")
        elif name in ("date", "device"):
            words.append(card[name])
        elif name in card:
            words.append(f"{name} {card[name]}")
    return ", ".join(words) + "."


STEP_COLUMNS = [
    "LLM",
    "encoder",
    "clips",
    "trained",
    "at once",
    "samples/s",
    "audio s/s",
    "share of the FLOP limit",
    "peak, GB",
    "reserved",
    "the card's count",
    "`plan`",
    "plain: samples/s",
    "peak, GB",
    "ours / plain",
]


def step_table(found):
    """Lines of the table of training steps."""
    rows = [step_cells(row) for name, row in found.items() if name.startswith("step-")]
    return ["", markdown_table(STEP_COLUMNS, rows)]


def step_cells(row):
    """The cells of one training step."""
    if "failed" in row:
        return [row["row"], row["failed"], *[""] * (len(STEP_COLUMNS) - 2)]
    trained = f"connector, LoRA {row['lora']}" if row["lora"] else "connector"
    trained += ", KL" if row["loss"] == "kl" else ""
    if row["head_bits"] == 4:
        trained += "; projection in NF4, embeddings on the host"
    checkpointed = ", checkpointed" if row["gradient_checkpointing"] else ""
    first = [
        short(row["llm"]),
        short(row["encoder"]),
        f"{row['seconds']:g} s",
        trained,
        f"{row['batch_size']}{checkpointed}",
    ]
    ours, plain = row["ours"], row.get("plain", {"out_of_memory": True})
    if "out_of_memory" in ours:
        return [*first, "out of memory", *[""] * (len(STEP_COLUMNS) - 6)]
    if ours.get("moments_on_host"):
        first[-1] += ", moments on the host"
    limit = row["matrix_product_tflops"]
    cells = [
        f"{ours['samples_s']:.2f}",
        f"{ours['audio_s_s']:.0f}",
        f"{ours['share_of_flop_limit']:.0%} of {limit:.4g} TFLOP/s",
        f"{ours['peak_gb']:.2f}",
        f"{ours['reserved_gb']:.2f}" if "reserved_gb" in ours else "–",
        f"{ours['card_gb']:.2f}" if "card_gb" in ours else "–",
        f"{row['planned_peak_gb']:.2f} ({row['planned_peak_gb'] / ours['peak_gb'] - 1:+.0%})",
    ]
    if "out_of_memory" in plain:
        return [*first, *cells, "out of memory", "–", "–"]
    ratio = ours["samples_s"] / plain["samples_s"]
    return [*first, *cells, f"{plain['samples_s']:.2f}", f"{plain['peak_gb']:.2f}", f"{ratio:.2f}"]


def other_lines(found):
    """Lines of everything that is no training step."""
    lines = [""]
    contexts = []
    for name, row in found.items():
        if "failed" in row and not name.startswith("step-"):
            lines.append(f"- {name}: {row['failed']}")
        elif name.startswith("answers-"):
            lines.append(
                f"- {short(row['llm'])}, {row['answers_at_once']} answers of {row['tokens']} "
                f"tokens at once: {row['stage_1_answers_s']:.1f} a second in stage 1, "
                f"{row['bench_answers_s']:.1f} in the benchmark"
            )
        elif name.startswith("encoder-"):
            speed = f"{row['audio_hours_an_hour']:.0f} hours of audio an hour"
            if "at_once" in row:
                more = row["together_audio_hours_an_hour"]
                speed += f", {more:.0f} with up to {row['at_once']} clips at once"
            lines.append(f"- {short(row['encoder'])}: {speed}, features included")
        elif name == "demo":
            lines.append(f"- the tiny world's demo: {row['seconds']:.0f} s")
        if "card_gb" in row.get("ours", {}):
            contexts.append(row["ours"]["card_gb"] - row["ours"]["reserved_gb"])
    if contexts:
        lines.append(
            f"- CUDA itself, and other programs if there were any, beside what torch reserves: "
            f"{min(contexts):.2f} to {max(contexts):.2f} GB; `plan` assumes {CONTEXT / GB:.1f}"
        )
    return lines


def meet_gpu(options):
    """Prove every path that only a GPU takes, or measure memory and speed."""
    if options.smoke:
        if smoke():
            raise UserError("some paths do not work on this machine; see above")
        return
    if not options.out:
        raise UserError("say --smoke, or --out FOLDER for the measurements")
    measure_rows(options)


def main():
    return run_program("gpu", GpuOptions, meet_gpu)


if __name__ == "__main__":
    sys.exit(main())
