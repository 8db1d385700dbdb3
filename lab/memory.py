"""How many bytes a training step takes: a step on the "meta" device, every allocation counted.

The weights are summed up. What a step keeps and computes on the way, the activations, is found by
running the forward and the backward pass of that very model on shapes, and following the bytes that
are alive. Nothing is loaded.
"""

import weakref
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from data import Recipe
from lab.model_shapes import adapted_shape, llm_shape
from model import LOSSES, Connector, connector_class, embedding_width, loss_in_slices
from support.files import ceil_div
from support.hub import PackedHead

GB = 1e9
TRANSCRIPT_RATE = 4  # tokens of a transcript a second of speech, about
# CUDA's context and its kernels, beside what torch reserves: 0.80 to 0.83 GB on an H200 (see
# docs/gpu.md); it differs from card to card
CONTEXT = 0.8 * GB
# bytes of a packed weight; NF4: 4 bits, and a share of an 8-bit scale for 64 and of a 32-bit one
# for 64 * 256 (QLoRA, arXiv 2305.14314, section 3)
PACKED_BYTES = {4: 0.5 + 1 / 64 + 4 / (64 * 256), 8: 1.0}


# ---- following what is alive ----


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that come to life within it and are still alive.

    `now`, and their `peak`. there: tensors from before, which do not count.
    """

    def __init__(self, there=()):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.comes(tensor.untyped_storage())
        return out

    def comes(self, storage):
        """Count a storage, unless it has been (a view's is that of its tensor)."""
        if storage._cdata in self.seen:
            return
        self.seen.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.goes, storage._cdata, storage.nbytes())

    def goes(self, name, size):
        self.seen.discard(name)
        self.now -= size


class FusedAttention(torch.autograd.Function):
    """What a GPU's attention kernel keeps (FlashAttention, arXiv 2205.14135): never the scores.

    Queries, keys, values, the result, and one number for each row.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)  # (B, heads, L, D_head)
        row_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)  # (B, heads, L)
        ctx.save_for_backward(q, k, v, out, row_sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@contextmanager
def fused_attention():
    """Within it attention is FusedAttention: on the meta device torch knows no fused kernel."""
    real = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = lambda q, k, v, *mask, **options: FusedAttention.apply(q, k, v)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = real


# ---- weights, activations, and all of it together ----


def weight_bytes(llm, bits, dtype, head_bits=16, embeddings="gpu"):
    """(bytes of the LLM's weights on the GPU, bytes of the largest matrix once it is unpacked).

    With 4 and 8 bits all linear layers but the head are packed; head_bits, embeddings: see
    model.load_llm.
    """
    head, table = llm.get_output_embeddings(), llm.get_input_embeddings()
    linear = {}  # id of a weight -> how many numbers it has
    for module in llm.modules():
        if isinstance(module, nn.Linear) and module is not head:
            linear[id(module.weight)] = module.weight.numel()
    elsewhere = {id(table.weight), id(head.weight), *linear}
    whole = sum(p.numel() for p in llm.parameters() if id(p) not in elsewhere)

    packed = PACKED_BYTES.get(bits, dtype.itemsize)
    weights = sum(linear.values()) * packed + whole * dtype.itemsize
    weights += head.weight.numel() * PACKED_BYTES.get(head_bits, dtype.itemsize)
    is_tied = table.weight is head.weight and head_bits == 16
    if embeddings == "gpu" and not is_tied:
        weights += table.weight.numel() * dtype.itemsize

    unpacked = [0]
    if bits != 16:
        unpacked += linear.values()
    if head_bits != 16:
        unpacked.append(ceil_div(len(head.weight), PackedHead.SLICES) * head.weight.shape[1])
    return weights, max(unpacked) * dtype.itemsize


@dataclass
class MicroBatch:
    """What goes through the model at once."""

    size: int  # conversations
    frames: int  # encoder frames of each
    prompt: int  # tokens of each that are read
    answer: int  # tokens of each that carry loss
    read: int = 0  # tokens of the same with its transcript as text, for a loss that has a teacher

    def positions(self, k):
        """Of each in the LLM, with k frames per speech token."""
        return ceil_div(self.frames, k) + self.prompt + self.answer


def activation_bytes(llm, adapted, connector, batch, width, loss):
    """The peak of what the forward and backward pass of a MicroBatch keeps.

    The pass of SpeechLLM.forward on shapes; width: D_encoder; loss: of LOSSES.
    """
    table = llm.get_input_embeddings().weight  # (V, D)
    length = batch.positions(connector.k)

    # What is there before does not count, nor do the gradients of the micro-batch before: they
    # belong to what is trained.
    there = [*adapted.buffers()]
    for p in (*adapted.parameters(), *connector.parameters()):
        there.append(p)
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
            there.append(p.grad)

    def responses_alone(head, args):
        states = args[0][:, -batch.answer - 1 : -1]  # (B, answer, D)
        return (states.reshape(-1, states.shape[-1]),)  # (R, D)

    hook = llm.get_output_embeddings().register_forward_pre_hook(responses_alone)
    with fused_attention(), LiveBytes(there) as live:
        answers = torch.zeros(batch.size * batch.answer, dtype=torch.long, device="meta")  # (R)
        target = None
        if loss.has_teacher:
            with torch.no_grad():
                embeds = torch.empty(
                    batch.size, batch.read, table.shape[1], device="meta", dtype=table.dtype
                )
                target = logits_on_shapes(adapted, embeds)  # (R, V)
                del embeds
        frames = []
        for _ in range(batch.size):
            frames.append(torch.empty(batch.frames, width, device="meta", dtype=torch.float16))
        embeds = embed_on_shapes(connector, frames, table, length)  # (B, L, D)
        loss_in_slices(loss, logits_on_shapes(adapted, embeds), answers, target).backward()
    hook.remove()
    return live.peak


def logits_on_shapes(llm, embeds):
    """embeddings (B, L, D) -> logits (R, V)."""
    size, length, _ = embeds.shape
    mask = torch.ones(size, 1, length, length, dtype=torch.bool, device="meta")
    positions = torch.arange(length, device="meta")[None].expand(size, length)  # (B, L)
    return llm(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False
    ).logits


def embed_on_shapes(connector, frames, table, length):
    """[frames (T, D_encoder)] -> embeddings (B, L, D): speech tokens, the rest of `length` text."""
    rows = []
    for speech in connector(frames):  # (N, D)
        text = torch.empty(length - len(speech), table.shape[1], device="meta", dtype=table.dtype)
        rows.append(torch.cat([speech.to(table.dtype), text]))  # (L, D)
    return torch.stack(rows)


def estimate(
    llm_config,
    width,
    rate,
    *,
    bits,
    dtype,
    seconds,
    prompt,
    answer,
    connector="stack-mlp",
    lora=0,
    head_bits=16,
    embeddings="gpu",
    loss="ce",
    batch,
    checkpointing,
):
    """{name: bytes} of a training step on the GPU, and their sum, "peak".

    Beside them "trained_parameters", "k", and "positions" of a conversation in the LLM. width,
    rate: D_encoder, and encoder frames a second; batch: conversations in a micro-batch, each of so
    many `seconds` of speech and tokens of `prompt` and `answer`.
    """
    llm = llm_shape(llm_config, dtype)
    weights, unpacked = weight_bytes(llm, bits, dtype, head_bits, embeddings)
    adapted = adapted_shape(llm, lora, checkpointing)

    kind, dim = connector_class(connector), embedding_width(llm)
    k, hidden = kind.frames_per_token(rate, Recipe.tokens_per_second), kind.hidden_width(dim)[0]
    with torch.device("meta"):
        body = Connector(connector, width, dim, k, hidden)
    parameters = (*body.parameters(), *adapted.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)

    read = prompt + round(seconds * TRANSCRIPT_RATE) + answer if LOSSES[loss].has_teacher else 0
    micro_batch = MicroBatch(batch, round(seconds * rate), prompt, answer, read)
    parts = {
        "weights": weights,
        "trained": trained * 4 * 4,  # fp32: weight, gradient, and AdamW's two moments
        "activations": activation_bytes(llm, adapted, body, micro_batch, width, LOSSES[loss]),
        "unpacked": unpacked,
    }
    if bits == 8:  # LLM.int8 keeps the inputs of its layers, with checkpointing, too
        text = llm_config.get_text_config()
        inputs = 3 * text.hidden_size + text.intermediate_size  # of queries, output, up, down
        positions = batch * micro_batch.positions(k)
        parts["activations"] += text.num_hidden_layers * inputs * positions * dtype.itemsize
    counts = {"trained_parameters": trained, "k": k, "positions": micro_batch.positions(k)}
    return {**parts, "peak": sum(parts.values()), **counts}


# ---- stage 1 ----


def behaviors_bytes(config, weights, dtype, batch, tokens):
    """The peak while stage 1 answers `batch` prompts of so many tokens, answers included.

    `weights` (bytes), the keys and values of every position, and what reading the prompts takes.
    """
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    keys_and_values = 2 * config.num_hidden_layers * kv_heads * head_dim * dtype.itemsize
    reading = (3 * config.intermediate_size + 6 * config.hidden_size) * dtype.itemsize
    logits = config.vocab_size * (dtype.itemsize + 4)  # as they come, and in fp32
    return weights + batch * (tokens * (keys_and_values + reading) + logits)
