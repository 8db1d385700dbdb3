"""Will it fit? What a training takes of a GPU, and with which settings, before anything is loaded.

    python mtbi.py plan --llm Qwen/Qwen2.5-7B-Instruct --vram 8

model_shapes.py says what the models look like, memory.py counts the bytes, here they are weighed.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from data import FULL
from lab.memory import CONTEXT, GB, TRANSCRIPT_RATE, behaviors_bytes, estimate
from lab.model_shapes import encoder_shape, find_config, full_name
from model import PRECISIONS
from support.files import UserError
from support.hub import bytes_left_free, parameters_of
from support.options import Count, RankOrFull, Size
from support.processes import DEVICE
from train import CHECKPOINT_FROM


@dataclass
class PlanOptions:
    llm: str = "Qwen/Qwen2.5-7B-Instruct"
    """a Hugging Face name or a local folder; the ones in the table of lab/model_shapes.py need no
    download"""
    encoder: str = "openai/whisper-large-v3"
    """likewise"""
    vram: Size | None = None
    """GPU memory, GB; default: what is free of this machine's, or 8 without one"""
    bits: Literal[4, 8, 16] = 4
    """the LLM's weights in 4 (NF4), 8 or 16 (not quantized) bits; the vocabulary projection and
    the table of embeddings stay in 16 on the GPU, unless it fits only otherwise"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what the LLM computes in; auto: bf16, or fp16 on a GPU without it"""
    seconds: Size = 15.0
    """length of the longest clips, seconds"""
    prompt_tokens: Count = 48
    """tokens of the prompt and the chat template"""
    answer_tokens: Count = 64
    """tokens of the longest answers"""
    connector: str = "stack-mlp"
    """stack-mlp, conv or qformer"""
    lora: RankOrFull = 0
    """rank of a LoRA adapter on the LLM, 0 for none; full: all of the LLM, which needs --bits 16"""
    loss: Literal["ce", "kl"] = "ce"
    """the LLM's answer, or its whole distribution, whose second pass needs more memory"""
    batch_size: Count = 32
    """conversations in a step; how many go through at once is what the plan finds"""
    hours: Size = 100.0
    """hours of speech, for the size of the features"""


def plan(options):
    """Say whether a training fits a GPU, and with which settings, before anything is loaded."""
    if options.lora == FULL:
        options = trained_as_a_whole(options)
    options = replace(
        options,
        llm=full_name(options.llm, "llm"),
        encoder=full_name(options.encoder, "encoder"),
        vram=options.vram or free_vram(),
    )
    llm_config = find_config(options.llm, "llm").get_text_config()
    encoder_config = find_config(options.encoder, "encoder")
    encoder = encoder_shape(encoder_config, options.encoder)
    room = options.vram * GB - CONTEXT

    best = best_fit(options, llm_config, encoder, room)
    print_table(options, llm_config, best, other_rows(options, encoder_config, encoder, best))
    weights = best.parts["weights"] + best.parts["unpacked"]
    answered = answers_at_once(options, llm_config, weights, room)
    if best.fits and answered:
        print_commands(options, best, answered)
        return
    needed = (best.parts["peak"] + CONTEXT) / GB
    packed = "" if options.bits == 4 else "--bits 4, "
    if options.lora == FULL:
        packed = "an adapter (--lora 16) and --bits 4, "
    print(
        f"\nIt does not fit {options.vram:g} GB, even with one utterance at a time and gradient "
        f"checkpointing: {needed:.1f} GB are needed. A smaller LLM, shorter clips, {packed}or a "
        "larger card."
    )


def trained_as_a_whole(options):
    """The options with the precision that train.py has for all of an LLM."""
    if options.bits != 16 or options.precision not in ("auto", "fp32"):
        raise UserError(
            f"--lora {FULL} trains all of the LLM, in fp32, and it must not be packed: say "
            "--bits 16, and no --precision"
        )
    return replace(options, precision="fp32")


def free_vram():
    """GB of this machine's GPU that a training can have, the share of CUDA itself included."""
    if DEVICE == "cpu":
        print("GPU memory: 8 GB are assumed; --vram says otherwise\n")
        return 8.0
    free, total = torch.cuda.mem_get_info(DEVICE)
    # CUDA has its share already, in this process
    found = math.floor(min(total, free + CONTEXT - bytes_left_free()) / GB * 10) / 10
    print(f"GPU memory: {found:g} GB, what is free of the {torch.cuda.get_device_name(DEVICE)}\n")
    return found


def type_for(precision):
    """The type in which the LLM computes; bf16 and fp16 have as many bytes."""
    return PRECISIONS["bf16" if precision == "auto" else precision]


# ---- the search ----


@dataclass
class Fit:
    """A way to train, and what it takes."""

    micro_batch: int  # conversations that go through at once
    checkpointing: bool
    frugal: bool  # is the projection in NF4, and the table of embeddings in host memory?
    parts: dict  # as `estimate` gives them
    fits: bool


# what that takes, for estimate() and for `behaviors`
FRUGAL = {"head_bits": 4, "embeddings": "host"}


def best_fit(options, llm_config, encoder, room):
    """The Fit with the largest micro-batch within `room` bytes, or one of a single conversation.

    Without checkpointing, where the whole step goes through at once, or where the LLM is small and
    that costs no more than half of the micro-batch. Only where nothing fits otherwise, with FRUGAL.
    """
    estimated = partial(
        estimate,
        llm_config,
        encoder.width,
        encoder.frame_rate,
        bits=options.bits,
        dtype=type_for(options.precision),
        seconds=options.seconds,
        prompt=options.prompt_tokens,
        answer=options.answer_tokens,
        connector=options.connector,
        lora=options.lora,
        loss=options.loss,
    )
    frugal = largest_fit(estimated, options.batch_size, True, room)
    if parameters_of(llm_config) < CHECKPOINT_FROM:
        fast = largest_fit(estimated, options.batch_size, False, room)
        if fast.fits and 2 * fast.micro_batch >= frugal.micro_batch:
            return fast
    elif frugal.micro_batch == options.batch_size:
        whole = estimated(batch=options.batch_size, checkpointing=False)
        if whole["peak"] <= room:
            return Fit(options.batch_size, False, False, whole, True)
    if frugal.fits or options.bits == 16:
        return frugal
    return largest_fit(estimated, options.batch_size, True, room, True)


def largest_fit(estimated, batch_size, checkpointing, room, frugal=False):
    """The Fit with the largest micro-batch that fits and divides the step, halved as need be."""
    sizes = [batch_size]
    while sizes[-1] > 1:
        size = sizes[-1] // 2
        while batch_size % size:
            size -= 1
        sizes.append(size)

    more = FRUGAL if frugal else {}
    parts = {}  # {micro-batch: as `estimate` gives them}

    def fits(size):
        parts[size] = estimated(batch=size, checkpointing=checkpointing, **more)
        return parts[size]["peak"] <= room

    # what fits stands behind what does not: an estimate takes seconds, and three find where
    first = min(bisect_left(sizes, True, key=fits), len(sizes) - 1)
    size = sizes[first]
    return Fit(size, checkpointing, frugal, parts[size], parts[size]["peak"] <= room)


def answers_at_once(options, llm_config, weights, room):
    """How many transcripts stage 1 can answer at once within `room` bytes; 0: not one."""
    transcript = round(options.seconds * TRANSCRIPT_RATE)  # tokens
    # a second turn is about another transcript, after the first one's answer
    tokens = options.prompt_tokens + 2 * (transcript + options.answer_tokens)
    dtype = type_for(options.precision)
    for batch in (512, 256, 128, 64, 32, 16, 8, 4, 2, 1):
        if behaviors_bytes(llm_config, weights, dtype, batch, tokens) <= room:
            return batch
    return 0


# ---- what is printed ----


def print_table(options, config, best, more):
    """What takes how much memory, and why; more: rows beside the step's own."""
    parts = best.parts
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}"
    packed = f"{options.bits} bits, the embeddings in {8 * type_for(options.precision).itemsize}"
    if best.frugal:
        packed = f"{options.bits} bits, the vocabulary projection in 4; the embeddings on the host"
    if options.bits == 16:
        packed = "not quantized"
    llm = f"{options.llm}: {shape}, vocabulary of {config.vocab_size}; {packed}"

    trained = f"{parts['trained_parameters'] / 1e6:.1f}M parameters x 16 bytes"
    also = ""
    if options.lora:
        also = ", of the second copy of the LLM, too" if options.lora == FULL else ", LoRA's, too"
    checkpointing = f"gradient checkpointing {'on' if best.checkpointing else 'off'}"
    step = f"{best.micro_batch} x {parts['positions']} positions at once, {checkpointing}"

    rows = [
        ("LLM weights", parts["weights"], llm),
        (
            "connector and optimizer",
            parts["trained"],
            f"{trained}: weight, gradient, two moments, all fp32{also}",
        ),
        ("activations", parts["activations"], step),
        (
            "one matrix unpacked",
            parts["unpacked"],
            "quantized weights are unpacked as they are used",
        ),
        ("CUDA itself", CONTEXT, "as measured on an H200"),
        ("peak", parts["peak"] + CONTEXT, f"of {options.vram:g} GB"),
        *more,
    ]
    print("| what | GB | why |\n|---|---|---|")
    for what, size, why in rows:
        print(f"| {what} | {size / GB:.2f} | {why} |")


def other_rows(options, config, encoder, best):
    """The rows of what is needed at another time than the step: loading, the encoder, the disk."""
    weight = 2 if config.model_type == "whisper" else 4  # bytes, as model.py loads them on a GPU
    frames = options.hours * 3600 * encoder.frame_rate
    when = (
        "on the GPU only while features are made, before the LLM is loaded; --cache-features off: "
        "all the time"
    )
    # less than the peak, whose activations come later: what can be trained can be loaded
    loading = best.parts["weights"] + best.parts["unpacked"] + CONTEXT
    return [
        ("loading the LLM", loading, "before the step: one matrix at a time is packed on the GPU"),
        ("speech encoder", encoder.parameters * weight, f"{options.encoder}: {when}"),
        ("features, on disk", frames * encoder.width * 2, f"{options.hours:g} hours of speech"),
    ]


def print_commands(options, best, answered):
    """The two stages, with the settings that fit."""
    behaviors = [
        f"python mtbi.py behaviors DATA --out RUN --llm {options.llm} --bits {options.bits}",
        f"--batch-size {answered}",
    ]
    if best.frugal:
        behaviors.append("--head-bits 4 --embeddings host")
    accumulate = options.batch_size // best.micro_batch
    train = [
        f"python mtbi.py train RUN --encoder {options.encoder}",
        f"--batch-size {best.micro_batch} --accumulate {accumulate}",
        f"--gradient-checkpointing {'on' if best.checkpointing else 'off'}",
        "--cache-features disk",
    ]
    if options.precision != "auto":
        behaviors.append(f"--precision {options.precision}")
        train.append(f"--precision {options.precision}")
    if options.connector != "stack-mlp":
        train.append(f"--connector {options.connector}")
    if options.loss != "ce":
        train.append(f"--loss {options.loss}")
    if options.lora:
        train.append(f"--lora {options.lora}")
    print(f"\nIt fits {options.vram:g} GB, with")
    print(f"  {' '.join(behaviors)}")
    print(f"  {' '.join(train)}")
    print("Estimated, on shapes alone; nothing was loaded.")
