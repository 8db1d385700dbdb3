"""Time a training step on random weights of a real size, beside a plain baseline; nothing is downloaded.

    python benchmarks/step.py --llm Qwen/Qwen2.5-7B-Instruct --encoder openai/whisper-large-v3

Ours is the step of train.py: speech of its own length, encoder frames made beforehand, the vocabulary projection at response tokens only. The baseline does
what BLSP's training loop does (arXiv 2309.00916): it pads speech to 30 s, runs the encoder in every step, and computes logits at every position. Both use the
same weights, conversations, precision and gradient checkpointing, one after the other. Tokenization is in neither.
"""

import argparse
import os
import platform
import sys
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging

import bitsandbytes
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from connectors import Connector, frames_a_token, hidden_width
from data import Response, Speech, Text
from examples import Recipe
from files import UserError, write_json
from hub import TINY
from model import CHECKPOINT_FROM, PRECISIONS, SpeechLLM, compute_precision, embedding_rms
from parallel import DEVICE
from plan import ENCODERS, GB, LLMS, LiveBytes, estimate, known
from train import Progress, accumulate_gradients, count_tokens, update

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)         # it warns of an optional kernel package
FRAME_RATE = 50.0            # encoder frames a second, of Whisper
PLAN_IS_CLOSE = 0.15         # plan's estimate of the peak should be within this share of the measured one


# ---- random weights of a real size ----

def random_llm(config, bits, dtype):
    """The LLM of a configuration with random weights, in NF4 or not quantized, made on the device layer by layer."""
    with torch.device("meta"):
        llm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    head = llm.get_output_embeddings()
    for name, module in list(llm.named_modules()):
        if bits == 4 and isinstance(module, nn.Linear) and module is not head:
            packed = bitsandbytes.nn.Linear4bit(module.in_features, module.out_features, module.bias is not None, compute_dtype=dtype,
                                                compress_statistics=True, quant_type="nf4", device="meta")
            weight = torch.randn(module.weight.shape, dtype=dtype, device=DEVICE) * 0.02
            packed.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True).to(DEVICE)
            if packed.bias is not None:
                packed.bias = nn.Parameter(torch.zeros(module.out_features, dtype=dtype, device=DEVICE))
            packed.support_avx512bf16_for_cpu = False              # as in model.load_llm
            llm.set_submodule(name, packed)
        elif hasattr(module, "inv_freq"):
            llm.set_submodule(name, type(module)(module.config).to(DEVICE))
    for module in llm.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                fill = torch.ones if "norm" in type(module).__name__.lower() else lambda *a, **k: torch.randn(*a, **k) * 0.02
                setattr(module, name, nn.Parameter(fill(p.shape, dtype=dtype, device=DEVICE)))
    llm.tie_weights()
    return llm.eval().requires_grad_(False)


def conversations(args, width, k_frames):
    """One micro-batch of random speech and random tokens."""
    ids = lambda n: torch.randint(10, 200, (n,)).tolist()
    return [[Text(ids(args.prompt_tokens // 2)), Speech(torch.randn(k_frames, width).half()), Text(ids(args.prompt_tokens - args.prompt_tokens // 2)),
             Response(ids(args.answer_tokens))] for _ in range(args.batch_size)]


# ---- the two steps ----

def our_step(model, optimizer, rows, _):
    loss = accumulate_gradients(model, [(0, rows, None)], count_tokens([(0, rows, None)]))
    update(optimizer, list(model.trainable().values()), loss, Progress(loss_scale=1.0), 1.0)


def plain_step(model, optimizer, rows, encoder):
    """The encoder on 30 s of padded speech in every step, right padding, logits and loss at every position."""
    mels = torch.randn(len(rows), encoder.config.num_mel_bins, 3000, device=DEVICE, dtype=encoder.conv1.weight.dtype)
    with torch.no_grad():
        frames = encoder(mels).last_hidden_state                                                  # (B, 1500, D_encoder)
    heard = iter(model.connector(list(frames)))
    table = model.llm.get_input_embeddings()
    embed = lambda ids: table(torch.tensor(ids, device=DEVICE))
    embeds = torch.stack([torch.cat([next(heard).to(table.weight.dtype) if isinstance(p, Speech) else embed(p.ids) for p in parts]) for parts in rows])
    answers = torch.tensor([parts[-1].ids for parts in rows], device=DEVICE)
    labels = torch.cat([torch.full((len(rows), embeds.shape[1] - answers.shape[1]), -100, device=DEVICE), answers], 1)            # (B, L)
    logits = model.llm(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], device=DEVICE), use_cache=False).logits.float()
    F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    torch.nn.utils.clip_grad_norm_(model.trainable().values(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def wait_for_device():
    if DEVICE != "cpu":
        torch.cuda.synchronize()


def tensors_of(*modules):
    """Every tensor of the modules, the statistics of packed weights included."""
    for module in modules:
        for t in (*module.parameters(), *module.buffers()):
            yield t.data
            state = getattr(t, "quant_state", None)
            for s in (state, getattr(state, "state2", None)) if state else ():
                yield from (v for v in (s.absmax, s.code, getattr(s, "offset", None)) if isinstance(v, torch.Tensor))


def peak_bytes(step, model, optimizer, rows, encoder):
    """The most memory a step holds: on a GPU what torch allocated; on a CPU the tensors alive, weights and optimizer included."""
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
        step(model, optimizer, rows, encoder)
        wait_for_device()
        return torch.cuda.max_memory_allocated()
    moments = [v for state in optimizer.state.values() for v in state.values()]
    there = [*tensors_of(model, *([encoder] if encoder else [])), *moments]
    static = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in there}.values())
    with LiveBytes(there) as live:
        step(model, optimizer, rows, encoder)
    return static + live.peak


def seconds_a_step(step, model, optimizer, rows, encoder, steps):
    """The fastest half of the steps, on average: other work on the machine makes steps slower, never faster."""
    times = []
    for i in range(steps + 1):
        wait_for_device()
        start = time.perf_counter()
        step(model, optimizer, rows, encoder)
        wait_for_device()
        times += [time.perf_counter() - start] if i else []        # the first one warms up
    best = sorted(times)[:max(1, len(times) // 2)]
    return sum(best) / len(best)


def flop_limit(dtype):
    """Floating point operations a second of a large matrix product: what this device can do at best."""
    n = 8192 if DEVICE != "cpu" else 1536
    a, b = (torch.randn(n, n, dtype=dtype, device=DEVICE) for _ in range(2))
    times = []
    for _ in range(12):
        wait_for_device()
        start = time.perf_counter()
        a @ b
        wait_for_device()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


# ---- the comparison ----

def build(args, dtype, config, encoder_config):
    """(SpeechLLM of random weights, ready to train; number of LLM parameters; is gradient checkpointing on)."""
    llm, dim = random_llm(config, args.bits, dtype), config.hidden_size
    k = frames_a_token("stack-mlp", FRAME_RATE, Recipe.tokens_per_second)
    connector = Connector("stack-mlp", encoder_config.d_model, dim, k, hidden_width("stack-mlp", dim)[0], embedding_rms(llm)).to(DEVICE)
    model, size = SpeechLLM(llm, transformers.AutoTokenizer.from_pretrained(TINY / "llm"), None, connector), llm.num_parameters()
    checkpointing = args.gradient_checkpointing == "on" or args.gradient_checkpointing == "auto" and size >= CHECKPOINT_FROM
    return (model.checkpoint_gradients() if checkpointing else model).train(), size, checkpointing


def compare(args):
    torch.manual_seed(0)
    precision = compute_precision(args.precision)
    dtype, config, encoder_config = PRECISIONS[precision], known(args.llm, LLMS, "llm"), known(args.encoder, ENCODERS, "encoder")
    if encoder_config.model_type != "whisper":
        raise UserError(f"--encoder {args.encoder}: the baseline pads to 30 s as Whisper does; name a Whisper")
    if args.layers:
        config = type(config)(**{**config.to_dict(), "num_hidden_layers": args.layers, "layer_types": None})
    model, size, checkpointing = build(args, dtype, config, encoder_config)
    frames = round(args.seconds * FRAME_RATE)
    rows, length = conversations(args, encoder_config.d_model, frames), -(-frames // model.connector.k) + args.prompt_tokens + args.answer_tokens
    planned = estimate(config, encoder_config.d_model, FRAME_RATE, bits=args.bits, dtype=dtype, seconds=args.seconds, prompt=args.prompt_tokens,
                       answer=args.answer_tokens, batch=args.batch_size, checkpointing=checkpointing)
    head = model.llm.get_output_embeddings().weight.numel()
    layers = size - head * (1 if config.tie_word_embeddings else 2)
    useful = 4 * (layers * length + head * args.answer_tokens) * args.batch_size      # forward and activation gradient: 2 + 2 a weight and token
    limit = flop_limit(dtype)
    result = {"date": date.today().isoformat(),
              "device": torch.cuda.get_device_name() if DEVICE != "cpu" else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
              "torch": torch.__version__, "transformers": transformers.__version__, "bitsandbytes": bitsandbytes.__version__, "llm": args.llm,
              "layers": config.num_hidden_layers, "llm_parameters": size, "bits": args.bits, "precision": precision, "encoder": args.encoder,
              "seconds": args.seconds, "batch_size": args.batch_size, "positions": length, "gradient_checkpointing": checkpointing,
              "matrix_product_tflops": limit / 1e12, "planned_peak_gb": planned["peak"] / GB}
    for name, step in (("ours", our_step), ("plain", plain_step)):
        if name == "plain" and args.ours_only:
            continue
        optimizer, encoder = torch.optim.AdamW(model.trainable().values(), lr=1e-4), None
        if name == "plain":
            encoder = WhisperEncoder(encoder_config).to(DEVICE, torch.float32 if DEVICE == "cpu" else torch.float16).eval().requires_grad_(False)
        try:
            seconds = seconds_a_step(step, model, optimizer, rows, encoder, args.steps)
            peak = peak_bytes(step, model, optimizer, rows, encoder)
        except torch.OutOfMemoryError:
            result[name] = {"out_of_memory": True}
            continue
        result[name] = {"seconds_a_step": seconds, "samples_s": args.batch_size / seconds, "audio_s_s": args.batch_size * args.seconds / seconds,
                        "tokens_s": args.batch_size * length / seconds, "share_of_flop_limit": useful / seconds / limit, "peak_gb": peak / GB}
    return result


ROWS = [("samples/s", "samples_s", "{:.2f}"), ("audio seconds/s", "audio_s_s", "{:.1f}"), ("tokens/s (LLM positions of ours)", "tokens_s", "{:.0f}"),
        ("share of the FLOP limit", "share_of_flop_limit", "{:.1%}"), ("peak memory, GB", "peak_gb", "{:.2f}")]


def show(result):
    r, systems = result, [name for name in ("ours", "plain") if name in result]
    print(f"{r['llm']} ({r['layers']} layers, {r['bits']} bits, {r['precision']}) + {r['encoder']}, {r['seconds']:g} s clips, micro-batch {r['batch_size']}, "
          f"gradient checkpointing {'on' if r['gradient_checkpointing'] else 'off'}\n{r['device']}; {r['date']}, torch {r['torch']}, "
          f"transformers {r['transformers']}, bitsandbytes {r['bitsandbytes']}\n")
    print("| | " + " | ".join(systems) + " |\n|---|" + "---|" * len(systems))
    for label, key, form in ROWS:
        print(f"| {label} | " + " | ".join("out of memory" if "out_of_memory" in r[s] else form.format(r[s][key]) for s in systems) + " |")
    print(f"\nFLOP limit: {r['matrix_product_tflops']:.2f} TFLOP/s, a large {r['precision']} matrix product on this device. Useful work is 4 per weight and "
          "position, with the vocabulary projection at response tokens only.")
    ours, plain = r["ours"], r.get("plain", {})
    if "samples_s" in ours and "samples_s" in plain:
        print(f"ours / plain: {ours['samples_s'] / plain['samples_s']:.2f} x the samples/s")
    if "peak_gb" in ours:
        off = r["planned_peak_gb"] / ours["peak_gb"] - 1
        print(f"`plan` says {r['planned_peak_gb']:.2f} GB for ours: {off:+.0%} ({'within' if abs(off) <= PLAN_IS_CLOSE else 'NOT within'} {PLAN_IS_CLOSE:.0%})")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--llm", default="Qwen/Qwen2.5-0.5B-Instruct", help="a name in the table of plan.py, or a local folder")
    parser.add_argument("--encoder", default="openai/whisper-small", help="a Whisper in the table of plan.py, or a local folder")
    parser.add_argument("--layers", type=int, help="only so many layers of the LLM, where the whole is too much")
    parser.add_argument("--bits", type=int, default=4, choices=[4, 16], help="NF4, or not quantized")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--seconds", type=float, default=15.0, help="length of the clips")
    parser.add_argument("--batch-size", type=int, default=4, help="conversations in a micro-batch")
    parser.add_argument("--prompt-tokens", type=int, default=48)
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--gradient-checkpointing", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps; the faster half counts")
    parser.add_argument("--ours-only", action="store_true", help="without the baseline")
    parser.add_argument("--out", help="a JSON file for the numbers")
    args = parser.parse_args()
    try:
        result = compare(args)
    except UserError as error:
        print(f"step: {error}", file=sys.stderr)
        return 2
    show(result)
    if args.out:
        write_json(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
