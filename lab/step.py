"""Time a training step on random weights of a real size, beside a plain baseline.

    python -m lab.step --llm Qwen/Qwen2.5-7B-Instruct --encoder openai/whisper-large-v3

Nothing is downloaded. Ours is the step of train.py: speech of its own length, encoder frames made
beforehand, the vocabulary projection at response tokens only. The baseline does what BLSP's
training loop does (arXiv 2309.00916): it pads speech to 30 s, runs the encoder in every step, and
computes logits at every position. Both use the same weights, conversations, precision and gradient
checkpointing, one after the other. Tokenization is in neither.
"""

import math
import os
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import Example, Recipe, Response, Speech, Text
from lab.memory import GB, TRANSCRIPT_RATE, LiveBytes, estimate
from lab.model_shapes import find_config, llm_shape
from lab.programs import run_program
from model import IGNORE, PRECISIONS, Connector, SpeechLLM, compute_precision, connector_class
from model import embedding_rms
from support.console import is_out_of_memory
from support.files import UserError, write_json
from support.hub import TINY, keep_embeddings_on_host, pack_head, pack_linear, parameters_of
from support.hub import stay_on_the_card
from support.options import Count, Rank, Size
from support.processes import DEVICE
from train import CHECKPOINT_FROM, Piece, Progress, accumulate_gradients, adam_w, update

FRAME_RATE = 50.0  # encoder frames a second, of Whisper
PADDED_MEL_FRAMES = 3000  # 30 s, as Whisper pads
SHORTER = 16  # frames by which every other clip is shorter
CONNECTOR = "stack-mlp"
PLAN_IS_CLOSE = 0.15  # plan's estimate of the peak should be within this share of the measured one


@dataclass
class StepOptions:
    llm: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """a name in the table of lab/model_shapes.py, or a local folder"""
    encoder: str = "openai/whisper-small"
    """a Whisper in the table of lab/model_shapes.py, or a local folder"""
    layers: Count | None = None
    """only so many layers of the LLM, where the whole is too much; default: all"""
    bits: Literal[4, 16] = 4
    """the LLM's weights in NF4, or not quantized"""
    head_bits: Literal[4, 16] = 16
    """and its vocabulary projection"""
    embeddings: Literal["gpu", "host"] = "gpu"
    """where its table of embeddings is"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """what the LLM computes in; auto: bf16 on a GPU that has it, fp16 on an older one; on a CPU
    fp32, or bf16 if it has AVX512-BF16 and the LLM is no tiny one"""
    seconds: Size = 15.0
    """length of the clips, seconds"""
    batch_size: Count = 4
    """conversations in a micro-batch"""
    prompt_tokens: Count = 48
    """tokens of the prompt and the chat template"""
    answer_tokens: Count = 64
    """tokens of an answer"""
    lora: Rank = 0
    """rank of a LoRA adapter on the LLM, 0 for none"""
    loss: Literal["ce", "kl"] = "ce"
    """the LLM's answer, or its whole distribution: one more forward pass, of the transcripts"""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """compute activations again in the backward pass instead of keeping them; auto: from 2.5
    billion parameters on"""
    steps: Count = 10
    """timed steps; the faster half counts"""
    ours_only: bool = False
    """without the baseline"""
    out: str | None = None
    """a JSON file for the numbers; default: they are printed only"""


# ---- random weights of a real size ----


def random_llm(config, bits, dtype, head_bits=16, embeddings="gpu"):
    """The LLM of a configuration with random weights, made on the device layer by layer.

    bits: 4 = all linear layers but the head in NF4, 16 = not quantized. head_bits, embeddings: as
    in model.load_llm.
    """
    stay_on_the_card()
    llm = llm_shape(config, dtype)
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if bits == 4 and isinstance(module, nn.Linear) and module is not head:
            module.weight = nn.Parameter(random_weight(module.weight.shape, dtype))
            if module.bias is not None:
                module.bias = nn.Parameter(torch.zeros_like(module.bias, device=DEVICE))
            llm.set_submodule(name, pack_linear(module, dtype, DEVICE))
            module.weight = None  # before the next one is made
    for module in llm.modules():
        begin_anew(llm, module)
    llm.tie_weights()
    if head_bits == 4:
        pack_head(llm, dtype, DEVICE)
    if embeddings == "host":
        keep_embeddings_on_host(llm, DEVICE)
    llm.is_loaded_in_4bit = bits == 4  # as a loaded one says, which an adapter asks
    return llm.eval().requires_grad_(False)


def begin_anew(llm, module):
    """Put a module's own tensors on the device, as they are where a training from scratch begins.

    Weights are random; what is no weight, like the frequencies of a rotary embedding or the factor
    on Gemma's embeddings, is computed. UserError where transformers does not say how.
    """
    missing = {}
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers("", False)):
        if tensor.is_meta:
            missing[name] = torch.full_like(tensor, math.nan, device=DEVICE)
    for name, tensor in missing.items():
        is_weight = isinstance(getattr(module, name), nn.Parameter)
        setattr(module, name, nn.Parameter(tensor, requires_grad=False) if is_weight else tensor)
    if missing:
        llm._init_weights(module)
    for name, tensor in missing.items():
        # the largest number is none if any is none, and needs no copy of the tensor
        if tensor.numel() and not torch.isfinite(tensor.amax()):
            what = f"{type(module).__name__}.{name}"
            raise UserError(
                f"--llm: {what} of a model of type {llm.config.model_type} cannot be made without "
                "its checkpoint; name another model"
            )


def random_weight(shape, dtype):
    return torch.randn(shape, dtype=dtype, device=DEVICE) * 0.02


def random_ids(n):
    return torch.randint(10, 200, (n,)).tolist()


def random_conversations(options, width, n_frames):
    """One micro-batch: [Example] of random speech, frames (n_frames, width), and random tokens.

    Every other clip is a little shorter: a batch of one length has no padding, needs no mask, and
    gets other kernels than those of a training.
    """
    before = options.prompt_tokens // 2
    after = options.prompt_tokens - before
    transcript = round(options.seconds * TRANSCRIPT_RATE)
    examples = []
    for i in range(options.batch_size):
        n = max(1, n_frames - SHORTER * (i % 2))
        parts = [
            Text(random_ids(before)),
            Speech(torch.randn(n, width).half()),
            Text(random_ids(after)),
            Response(random_ids(options.answer_tokens)),
        ]
        teacher = [parts[0], Text(random_ids(transcript)), *parts[2:]]
        examples.append(Example(parts, teacher))
    return examples


def build_random(options, llm, encoder_config):
    """(SpeechLLM of an LLM and a connector of random weights; is gradient checkpointing on)."""
    dim = llm.config.hidden_size
    kind = connector_class(CONNECTOR)
    connector = Connector(
        CONNECTOR,
        encoder_config.d_model,
        dim,
        kind.frames_per_token(FRAME_RATE, Recipe.tokens_per_second),
        kind.hidden_width(dim)[0],
        embedding_rms(llm),
    ).to(DEVICE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "llm")  # what it says is not read
    model = SpeechLLM(llm, tokenizer, None, connector, options.lora)

    checkpointing = options.gradient_checkpointing == "on"
    if options.gradient_checkpointing == "auto":
        checkpointing = parameters_of(llm.config) >= CHECKPOINT_FROM
    if checkpointing:
        model.checkpoint_gradients()
    return model.train(), checkpointing


def random_whisper(config):
    """A Whisper encoder in the precision in which model.py loads one."""
    stay_on_the_card()
    with torch.device(DEVICE):
        encoder = WhisperEncoder(config)
    encoder = encoder.to(torch.float32 if DEVICE == "cpu" else torch.float16)
    return encoder.eval().requires_grad_(False)


# ---- the two steps ----


def our_step(model, optimizer, examples, _, loss):
    """The step of train.py."""
    piece = Piece(examples, "step")
    loss = accumulate_gradients(model, [piece], piece.tokens(), loss)
    update(optimizer, list(model.trainable().values()), loss, Progress(loss_scale=1.0))


def plain_step(model, optimizer, examples, encoder, loss):
    """The encoder on 30 s of padded speech in every step, logits and loss at every position."""
    size, weight = len(examples), encoder.conv1.weight
    mels = torch.randn(
        size, encoder.config.num_mel_bins, PADDED_MEL_FRAMES, device=DEVICE, dtype=weight.dtype
    )
    with torch.no_grad():
        frames = encoder(mels).last_hidden_state  # (B, 1500, D_encoder)
    speech = model.connector(list(frames))  # [(N, D)]
    heard = [example.parts for example in examples]
    logits = logits_everywhere(model, embed_plainly(model, heard, speech))  # (B, L, V)

    answers = torch.tensor([parts[-1].ids for parts in heard], device=DEVICE)  # (B, answer)
    unanswered = logits.shape[1] - answers.shape[1]
    if loss == "ce":
        labels = F.pad(answers, (unanswered, 0), value=IGNORE)  # (B, L)
        F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    else:
        read = [example.teacher for example in examples]
        with torch.no_grad(), model.without_adapter():
            target = logits_everywhere(model, embed_plainly(model, read))  # (B, L', V)
        last = -1 - answers.shape[1]
        found = logits[:, last:-1].log_softmax(-1)  # (B, answer, V)
        target = target[:, last:-1].log_softmax(-1)  # (B, answer, V)
        F.kl_div(found, target, reduction="batchmean", log_target=True).backward()
    torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def logits_everywhere(model, embeds):
    """embeddings (B, L, D) -> logits (B, L, V)."""
    mask = torch.ones(embeds.shape[:2], device=DEVICE)  # (B, L)
    return model.llm(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits.float()


def embed_plainly(model, batch, speech=()):
    """Embeddings (B, L, D) of conversations of one length, part by part."""
    table = model.llm.get_input_embeddings()
    rows = []
    for i, parts in enumerate(batch):
        row = []
        for part in parts:
            if isinstance(part, Speech):
                row.append(speech[i].to(table.weight.dtype))  # (N, D)
            else:
                row.append(table(torch.tensor(part.ids, device=DEVICE)))  # (ids of the part, D)
        rows.append(torch.cat(row))  # (L, D)
    return torch.stack(rows)


# ---- measuring ----


def wait_for_device():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def seconds_of(action):
    """What a call takes, until the device is done with it."""
    wait_for_device()
    start = time.perf_counter()
    action()
    wait_for_device()
    return time.perf_counter() - start


def seconds_a_step(step, model, optimizer, examples, encoder, steps):
    """The fastest half of the steps, on average.

    Other work on the machine makes steps slower, never faster.
    """

    def once():
        step(model, optimizer, examples, encoder)

    seconds_of(once)  # the first one warms up
    times = sorted(seconds_of(once) for _ in range(steps))
    best = times[: max(1, len(times) // 2)]
    return sum(best) / len(best)


def flop_limit(dtype):
    """Floating point operations a second of a large matrix product: this device at its best."""
    n = 8192 if DEVICE != "cpu" else 1536
    a = torch.randn(n, n, dtype=dtype, device=DEVICE)
    b = torch.randn(n, n, dtype=dtype, device=DEVICE)
    times = [seconds_of(lambda: a @ b) for _ in range(12)]
    return 2 * n**3 / min(times)


def peak_bytes(step, model, optimizer, examples, encoder):
    """{name: bytes} of the most memory a step holds.

    On a GPU what torch allocated, what it reserved for that, and what the card says is taken, CUDA
    itself and other programs included; on a CPU the tensors alive, weights and optimizer included.
    """
    if DEVICE != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step(model, optimizer, examples, encoder)
        wait_for_device()
        free, total = torch.cuda.mem_get_info()
        return {
            "peak_gb": torch.cuda.max_memory_allocated() / GB,
            "reserved_gb": torch.cuda.max_memory_reserved() / GB,
            "card_gb": (total - free) / GB,
            "card_gb_is_of": "all programs on the card, CUDA itself included",
        }
    modules = [model, encoder] if encoder else [model]
    there = [*tensors_of(*modules)]
    for state in optimizer.state.values():
        there += state.values()  # the moments
    storages = [t.untyped_storage() for t in there]
    static = sum({storage._cdata: storage.nbytes() for storage in storages}.values())
    with LiveBytes(there) as live:
        step(model, optimizer, examples, encoder)
    return {"peak_gb": (static + live.peak) / GB}


def tensors_of(*modules):
    """Every tensor of the modules, the statistics of packed weights included."""
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            yield tensor.data
            state = getattr(tensor, "quant_state", None)
            while state is not None:  # of a packed weight, then of its scales
                for statistic in (state.absmax, state.code, getattr(state, "offset", None)):
                    if isinstance(statistic, torch.Tensor):
                        yield statistic
                state = getattr(state, "state2", None)


# ---- the comparison ----


def compare_steps(options, llm=None):
    """{name: value}: what was measured with which settings; "ours" and "plain" are the two steps.

    llm: of random weights, if there is one already. A step that finds no memory has
    {"out_of_memory": True}. UserError if the encoder is no Whisper.
    """
    torch.manual_seed(0)
    config, encoder_config = configs_of(options)
    precision = compute_precision(options.precision, config)
    dtype = PRECISIONS[precision]
    if llm is None:
        llm = random_llm(config, options.bits, dtype, options.head_bits, options.embeddings)
    parameters = parameters_of(config)
    model, checkpointing = build_random(options, llm, encoder_config)
    frames = round(options.seconds * FRAME_RATE)
    examples = random_conversations(options, encoder_config.d_model, frames)
    planned = plan_of_step(options, config, encoder_config, dtype, checkpointing)
    length = planned["positions"]
    useful, limit = useful_flops(config, parameters, options, length), flop_limit(dtype)
    result = {
        **describe_device(),
        "llm": options.llm,
        "layers": config.num_hidden_layers,
        "llm_parameters": parameters,
        "bits": options.bits,
        "head_bits": options.head_bits,
        "embeddings": options.embeddings,
        "precision": precision,
        "encoder": options.encoder,
        "seconds": options.seconds,
        "batch_size": options.batch_size,
        "lora": options.lora,
        "loss": options.loss,
        "positions": length,
        "gradient_checkpointing": checkpointing,
        "matrix_product_tflops": limit / 1e12,
        "planned_peak_gb": planned["peak"] / GB,
    }
    measured = partial(measure_step, options, model, examples, length, useful / limit)
    result["ours"] = measured(partial(our_step, loss=options.loss), None)
    if not options.ours_only:
        step = partial(plain_step, loss=options.loss)
        try:
            encoder = random_whisper(encoder_config)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # what ours measured stays
            result["plain"] = {"out_of_memory": True}
            return result
        result["plain"] = measured(step, encoder)
    return result


def configs_of(options):
    """The configurations of the LLM, of so many layers as asked for, and of the encoder."""
    config = find_config(options.llm, "llm").get_text_config()
    encoder_config = find_config(options.encoder, "encoder")
    if encoder_config.model_type != "whisper":
        raise UserError(
            f"--encoder {options.encoder}: the baseline pads to 30 s as Whisper does; name a "
            "Whisper"
        )
    if options.layers:
        fewer = {"num_hidden_layers": options.layers, "layer_types": None}
        config = type(config)(**{**config.to_dict(), **fewer})
    return config, encoder_config


def plan_of_step(options, config, encoder_config, dtype, checkpointing):
    """What `plan` expects of our step, as lab.memory.estimate says it."""
    return estimate(
        config,
        encoder_config.d_model,
        FRAME_RATE,
        bits=options.bits,
        dtype=dtype,
        seconds=options.seconds,
        prompt=options.prompt_tokens,
        answer=options.answer_tokens,
        connector=CONNECTOR,
        lora=options.lora,
        head_bits=options.head_bits,
        embeddings=options.embeddings,
        loss=options.loss,
        batch=options.batch_size,
        checkpointing=checkpointing,
    )


def useful_flops(config, parameters, options, length):
    """Of a step: forward and activation gradient, 2 + 2 a weight and position.

    The vocabulary projection counts at response tokens only, the table of embeddings not at all;
    an adapter's own weights are not counted, and a teacher's forward pass is.
    """
    head = config.vocab_size * config.hidden_size
    layers = parameters - head * (1 if config.tie_word_embeddings else 2)
    flops = 4 * (layers * length + head * options.answer_tokens)
    if options.loss == "kl":
        read = options.prompt_tokens + options.answer_tokens
        read += round(options.seconds * TRANSCRIPT_RATE)
        flops += 2 * (layers * read + head * options.answer_tokens)
    return flops * options.batch_size


def describe_device():
    """{name: value} of the day, the device and the libraries."""
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if DEVICE != "cpu":
        device = torch.cuda.get_device_name()
    return {
        "date": date.today().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "bitsandbytes": version_of("bitsandbytes"),
    }


def version_of(package):
    """Its version, whether or not it can be imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def measure_step(options, model, examples, length, best_seconds, step, encoder):
    """{name: value} of one of the two steps.

    length: LLM positions of one of our conversations; best_seconds: what a step would take at the
    FLOP limit.
    """
    optimizer = adam_w(model.trainable(), lr=1e-4)
    try:
        optimizer.prepare()
        seconds = seconds_a_step(step, model, optimizer, examples, encoder, options.steps)
        peak = peak_bytes(step, model, optimizer, examples, encoder)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return {"out_of_memory": True}
    return {
        "seconds_a_step": seconds,
        "samples_s": options.batch_size / seconds,
        "audio_s_s": options.batch_size * options.seconds / seconds,
        "tokens_s": options.batch_size * length / seconds,
        "share_of_flop_limit": best_seconds / seconds,
        "moments_on_host": optimizer.on_host,
        **peak,
    }


# ---- what is printed ----

ROWS = [
    ("samples/s", "samples_s", "{:.2f}"),
    ("audio seconds/s", "audio_s_s", "{:.1f}"),
    ("tokens/s (LLM positions of ours)", "tokens_s", "{:.0f}"),
    ("share of the FLOP limit", "share_of_flop_limit", "{:.1%}"),
    ("peak memory, GB", "peak_gb", "{:.2f}"),
]


def show_steps(result):
    """The settings, a table of the two steps, and how they compare."""
    r = result
    checkpointing = "on" if r["gradient_checkpointing"] else "off"
    print(
        f"{r['llm']} ({r['layers']} layers, {r['bits']} bits, projection {r['head_bits']} bits, "
        f"embeddings on the {r['embeddings']}, {r['precision']}) + {r['encoder']}, "
        f"{r['seconds']:g} s clips, micro-batch {r['batch_size']}, LoRA rank {r['lora']}, loss "
        f"{r['loss']}, gradient checkpointing {checkpointing}"
    )
    print(
        f"{r['device']}; {r['date']}, torch {r['torch']}, transformers {r['transformers']}, "
        f"bitsandbytes {r['bitsandbytes']}\n"
    )
    systems = [name for name in ("ours", "plain") if name in r]
    print("| | " + " | ".join(systems) + " |\n|---|" + "---|" * len(systems))
    for label, key, form in ROWS:
        cells = []
        for name in systems:
            is_there = "out_of_memory" not in r[name]
            cells.append(form.format(r[name][key]) if is_there else "out of memory")
        print(f"| {label} | {' | '.join(cells)} |")
    print(
        f"\nFLOP limit: {r['matrix_product_tflops']:.2f} TFLOP/s, a large {r['precision']} matrix "
        "product on this device. Useful work is 4 per weight and position, with the vocabulary "
        "projection at response tokens only."
    )
    ours, plain = r["ours"], r.get("plain", {})
    for name in systems:
        if r[name].get("moments_on_host"):
            print(f"{name}: the optimizer's moments found no room and are in host memory")
    if "samples_s" in ours and "samples_s" in plain:
        print(f"ours / plain: {ours['samples_s'] / plain['samples_s']:.2f} x the samples/s")
    if "peak_gb" in ours:
        off = r["planned_peak_gb"] / ours["peak_gb"] - 1
        within = "within" if abs(off) <= PLAN_IS_CLOSE else "NOT within"
        print(
            f"`plan` says {r['planned_peak_gb']:.2f} GB for ours: {off:+.0%} ({within} "
            f"{PLAN_IS_CLOSE:.0%})"
        )


def time_a_step(options):
    """Time a training step on random weights of a real size, beside a plain baseline."""
    if options.out and os.path.lexists(options.out):
        raise UserError(f"{options.out}: is there already; name another --out")
    result = compare_steps(options)
    show_steps(result)
    if options.out:
        write_json(options.out, result)


def main():
    return run_program("step", StepOptions, time_a_step)


if __name__ == "__main__":
    sys.exit(main())
