"""Will it fit? A training step on the "meta" device, where tensors have shapes and no content: every allocation is counted, and nothing is loaded.

The model is built from its configuration alone. The weights are summed up; what a step keeps and computes on the way, the activations, is found by running
the forward and the backward pass of that very model on shapes, and following the bytes that are alive.
"""

import math
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from connectors import Connector, frames_a_token, hidden_width
from examples import Recipe
from files import UserError
from hub import TINY, load_or_explain
from model import CHECKPOINT_FROM, PRECISIONS, checkpoint_gradients, with_lora

GB = 1e9
CONTEXT = 0.6 * GB           # CUDA's context, its kernels, workspaces and what the allocator cannot use; assumed, it differs from card to card
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)      # a weight: 4 bits, and a share of an 8-bit scale for 64 and of a 32-bit one for 64 * 256


# ---- shapes that need no download ----

def qwen(hidden, ffn, layers, heads, kv_heads, tied=True, vocab=151936):
    return transformers.Qwen2Config(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied)


def llama(hidden, ffn, layers, heads, kv_heads, tied=True, vocab=128256):
    return transformers.LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
                                    num_key_value_heads=kv_heads, vocab_size=vocab, tie_word_embeddings=tied)


def whisper(width, layers, heads, mels=80):
    return transformers.WhisperConfig(d_model=width, encoder_layers=layers, encoder_attention_heads=heads, encoder_ffn_dim=4 * width, num_mel_bins=mels,
                                      decoder_layers=1)


LLMS = {                     # as their published configurations say; known by the last part of the name, too, with or without -Instruct
    "Qwen/Qwen2.5-0.5B-Instruct": qwen(896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": qwen(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B-Instruct": qwen(2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B-Instruct": qwen(3584, 18944, 28, 28, 4, False, 152064),
    "Qwen/Qwen2.5-14B-Instruct": qwen(5120, 13824, 48, 40, 8, False, 152064),
    "meta-llama/Llama-3.2-1B-Instruct": llama(2048, 8192, 16, 32, 8),
    "meta-llama/Llama-3.2-3B-Instruct": llama(3072, 8192, 28, 24, 8),
    "meta-llama/Llama-3.1-8B-Instruct": llama(4096, 14336, 32, 32, 8, False),
    "HuggingFaceTB/SmolLM2-360M-Instruct": llama(960, 2560, 32, 15, 5, True, 49152),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": llama(2048, 8192, 24, 32, 32, True, 49152),
}
ENCODERS = {
    "openai/whisper-tiny": whisper(384, 4, 6),
    "openai/whisper-base": whisper(512, 6, 8),
    "openai/whisper-small": whisper(768, 12, 12),
    "openai/whisper-medium": whisper(1024, 24, 16),
    "openai/whisper-large-v3": whisper(1280, 32, 20, 128),
}


def listed(name, table):
    """The entry of the table that is meant by a hub name, or by the last part of one; None if there is none."""
    def parts(name):
        *owner, model = name.lower().removesuffix("-instruct").removesuffix(".en").split("/")
        return owner, model
    owner, model = parts(name)
    return next((entry for entry in table if parts(entry)[1] == model and (not owner or parts(entry)[0] == owner)), None)


def full_name(name, table):
    """A hub name for a model of the table that was named by its last part alone; other names as they are."""
    return name if "/" in name else listed(name, table) or name


def known(name, table, kind):
    """The configuration of a model: of the table, or of "tiny", a local folder or a hub name."""
    if name == "tiny":
        name = str(TINY / kind)
    if (entry := listed(name, table)) and not Path(name).exists():
        return table[entry]
    return load_or_explain(transformers.AutoConfig, name, {"llm": "LLM", "encoder": "speech encoder"}[kind])


def llm_shape(config, dtype, checkpointing=False, lora=0):
    """The LLM on the meta device, as training has it: (the LLM, the LLM with its adapter)."""
    try:
        if missing := [key for key in ("hidden_size", "intermediate_size", "num_hidden_layers") if not hasattr(config, key)]:
            raise ValueError(f"its configuration has no {missing[0]}")
        with torch.device("meta"):
            llm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
            adapted = with_lora(llm, lora)
    except ValueError as error:
        raise UserError(f"--llm: a model of type {config.model_type} is no causal LLM ({str(error).splitlines()[0]})") from None
    for layer in checkpoint_gradients(adapted) if checkpointing else []:
        layer.training = True
    return llm, adapted


def encoder_shape(config, name):
    """(parameters, width, frames a second) of a speech encoder."""
    with torch.device("meta"):
        if config.model_type == "whisper":
            from transformers.models.whisper.modeling_whisper import WhisperEncoder
            encoder, rate = WhisperEncoder(config), 50.0
        else:
            encoder = transformers.AutoModel.from_config(config)
            encoder = getattr(encoder, "encoder", encoder) if config.is_encoder_decoder else encoder
            inner = getattr(config, "encoder_config", config)
            factor = getattr(inner, "subsampling_factor", None)
            rate = 100 / factor if factor else 16000 / math.prod(getattr(inner, "conv_stride", [320]))
            if config.model_type == "wav2vec2-bert":               # whose feature extractor decides
                rate = 100 / load_or_explain(transformers.AutoFeatureExtractor, TINY / "encoder" if name == "tiny" else name, "speech encoder").stride
    inner = getattr(config, "encoder_config", config)
    return sum(p.numel() for p in encoder.parameters()), getattr(inner, "d_model", None) or inner.hidden_size, rate


# ---- counting ----

class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to life within it and are still alive: `now`, and their `peak`."""

    def __init__(self, there=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = {t.untyped_storage()._cdata for t in there}   # what was there before does not count

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
        return out

    def gone(self, name, size):
        self.known.discard(name)
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """What a GPU's attention kernel keeps: queries, keys, values, the result, and one number for each row; never the scores."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)                                  # (B, heads, L, D_head)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


@contextmanager
def fused_attention():
    """On the meta device torch knows no fused kernel."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *mask, **options: FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


def weight_bytes(llm, bits, dtype):
    """(bytes of the LLM's weights, bytes of the largest matrix once it is unpacked): with --bits 4 and 8 all linear layers but the head are packed."""
    head, linear = llm.get_output_embeddings(), {}
    for module in llm.modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear[id(module.weight)] = module.weight.numel()
    packed = {4: NF4_BYTES, 8: 1.0}.get(bits, dtype.itemsize)
    whole = sum(p.numel() for p in llm.parameters() if id(p) not in linear)
    return sum(linear.values()) * packed + whole * dtype.itemsize, max(linear.values()) * dtype.itemsize if bits != 16 else 0


@dataclass
class Step:
    """What a training step is made of: `batch` conversations of `frames` encoder frames, `prompt` and `answer` tokens."""
    batch: int
    frames: int
    prompt: int
    answer: int


def activation_bytes(llm, adapted, connector, step, width):
    """The peak of what one micro-batch's forward and backward pass keeps: the pass of SpeechLLM.forward on shapes."""
    table = llm.get_input_embeddings().weight
    length = -(-step.frames // connector.k) + step.prompt + step.answer
    parameters = [*adapted.parameters(), *connector.parameters()]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.requires_grad else None  # of the micro-batch before: they belong to what is trained
    there = [*parameters, *adapted.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    mask = torch.ones(step.batch, 1, length, length, dtype=torch.bool, device="meta")
    positions = torch.arange(length, device="meta")[None].expand(step.batch, length)
    hook = llm.get_output_embeddings().register_forward_pre_hook(
        lambda head, args: (args[0][:, -step.answer - 1:-1].reshape(-1, args[0].shape[-1]),))            # (B, L, D) -> (R, D)
    with fused_attention(), LiveBytes(there) as live:
        frames = [torch.empty(step.frames, width, device="meta", dtype=torch.float16) for _ in range(step.batch)]
        rows = [torch.cat([s.to(table.dtype), torch.empty(length - len(s), table.shape[1], device="meta", dtype=table.dtype)]) for s in connector(frames)]
        embeds = torch.stack(rows)                                                                         # (B, L, D)
        del rows
        logits = adapted(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits.float()
        loss = F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long, device="meta"), reduction="sum")
        del logits
        loss.backward()
    hook.remove()
    return live.peak


def estimate(llm_config, width, rate, *, bits, dtype, seconds, prompt, answer, connector="stack-mlp", lora=0, batch, checkpointing):
    """{name: bytes} of a training step on the GPU, and their sum, "peak"."""
    llm, adapted = llm_shape(llm_config, dtype, checkpointing, lora)
    weights, unpacked = weight_bytes(llm, bits, dtype)
    k, dim = frames_a_token(connector, rate, Recipe.tokens_per_second), llm.get_input_embeddings().weight.shape[1]
    with torch.device("meta"):
        body = Connector(connector, width, dim, k, hidden_width(connector, dim)[0])
    trained = sum(p.numel() for p in (*body.parameters(), *adapted.parameters()) if p.requires_grad)
    parts = {"weights": weights, "trained": trained * 4 * 4,       # fp32: weight, gradient, and AdamW's two moments
             "activations": activation_bytes(llm, adapted, body, Step(batch, round(seconds * rate), prompt, answer), width), "unpacked": unpacked}
    return {**parts, "peak": sum(parts.values()), "trained_parameters": trained, "k": k}


def imitate_bytes(config, weights, dtype, batch, tokens):
    """The peak while stage 1 answers: weights, the keys and values of every position, and what reading the prompts takes."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * getattr(config, "num_key_value_heads", config.num_attention_heads) * head * dtype.itemsize
    reading = (3 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize
    return weights + batch * (tokens * (keys + reading) + config.vocab_size * (dtype.itemsize + 4))


# ---- the command ----

def plan(args):
    """Say whether a training fits a GPU, and with which settings, before anything is loaded."""
    args.llm, args.encoder = full_name(args.llm, LLMS), full_name(args.encoder, ENCODERS)
    llm_config, encoder_config = known(args.llm, LLMS, "llm").get_text_config(), known(args.encoder, ENCODERS, "encoder")
    encoder, width, rate = encoder_shape(encoder_config, args.encoder)
    dtype, room = PRECISIONS[args.precision], args.vram * GB - CONTEXT
    asked = {"bits": args.bits, "dtype": dtype, "seconds": args.seconds, "prompt": args.prompt_tokens, "answer": args.answer_tokens,
             "connector": args.connector, "lora": args.lora}
    best = best_fit(llm_config, width, rate, args.batch_size, room, asked)
    micro, checkpointing, parts, fits = best
    heard = encoder * 2 if encoder_config.model_type == "whisper" else encoder * 4
    print_table(args, llm_config, best, heard, args.hours * 3600 * rate * width * 2)
    tokens = args.prompt_tokens + round(args.seconds * 4) + args.answer_tokens
    answered = next((n for n in (128, 64, 32, 16, 8, 4, 2, 1) if imitate_bytes(llm_config, parts["weights"], dtype, n, tokens) <= room), 0)
    if not fits or not answered:
        print(f"\nIt does not fit {args.vram:g} GB, even with one utterance at a time and gradient checkpointing: "
              f"{(parts['peak'] + CONTEXT) / GB:.1f} GB are needed. A smaller LLM, shorter clips, "
              + ("" if args.bits == 4 else "--bits 4, ") + "or a larger card.")
        return
    print(f"\nIt fits {args.vram:g} GB, with\n  python mtbi.py imitate DATA --out RUN --llm {args.llm} --bits {args.bits} --precision {args.precision} "
          f"--batch-size {answered}\n"
          f"  python mtbi.py train RUN --encoder {args.encoder} --batch-size {micro} --accumulate {args.batch_size // micro} "
          f"--gradient-checkpointing {'on' if checkpointing else 'off'} --precision {args.precision} --cache-features disk" +
          (f" --connector {args.connector}" if args.connector != "stack-mlp" else "") + (f" --lora {args.lora}" if args.lora else "") +
          "\nEstimated, on shapes alone; no GPU was asked.")


def best_fit(llm_config, width, rate, batch, room, asked):
    """(micro-batch, gradient checkpointing, estimate, does it fit): the largest micro-batch that fits; without checkpointing, where that costs no more than
    half of the micro-batch and the LLM is small."""
    found = {}
    for checkpointing in (False, True):
        micro = batch
        while True:
            parts = estimate(llm_config, width, rate, batch=micro, checkpointing=checkpointing, **asked)
            if parts["peak"] <= room or micro == 1:
                break
            micro = next(n for n in range(micro // 2, 0, -1) if batch % n == 0)
        found[checkpointing] = (micro, checkpointing, parts, parts["peak"] <= room)
    with torch.device("meta"):
        small = sum(p.numel() for p in llm_shape(llm_config, torch.float32)[0].parameters()) < CHECKPOINT_FROM
    return found[False] if found[False][3] and small and 2 * found[False][0] >= found[True][0] else found[True]


def print_table(args, config, best, heard, features):
    """What takes how much memory, and why."""
    micro, checkpointing, parts, _ = best
    vocabulary = f"{config.num_hidden_layers} layers of {config.hidden_size}, vocabulary of {config.vocab_size}"
    length = round(args.seconds * Recipe.tokens_per_second) + args.prompt_tokens + args.answer_tokens
    packed = "not quantized" if args.bits == 16 else f"{args.bits} bits, the embeddings in {args.precision}"
    trained = f"{parts['trained_parameters'] / 1e6:.1f}M parameters x 16 bytes"
    rows = [("LLM weights", parts["weights"], f"{args.llm}: {vocabulary}; {packed}"),
            ("connector and optimizer", parts["trained"], f"{trained}: weight, gradient, two moments, all fp32"),
            ("activations", parts["activations"], f"{micro} x {length} positions at once, gradient checkpointing {'on' if checkpointing else 'off'}"),
            ("one matrix unpacked", parts["unpacked"], "quantized weights are unpacked as they are used"),
            ("CUDA itself", CONTEXT, "assumed"),
            ("peak", parts["peak"] + CONTEXT, f"of {args.vram:g} GB"),
            ("speech encoder", heard, f"{args.encoder}: on the GPU only while features are made, before the LLM is loaded; --cache-features off: all the time"),
            ("features, on disk", features, f"{args.hours:g} hours of speech")]
    print("| what | GB | why |\n|---|---|---|\n" + "\n".join(f"| {what} | {size / GB:.2f} | {why} |" for what, size, why in rows))
