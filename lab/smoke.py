"""Every path that only a GPU takes, tried with the tiny world's models: works, or what failed.

Run by `python -m lab.gpu --smoke`. A check is a function here and a row of CHECKS; it returns what
it saw, in a few words, and raises AssertionError where the path does not give what it should.
"""

import copy
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple
from collections.abc import Callable

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from data import Example, Recipe, Response, Speech, Text, Utterance, load_audio, write_audio
from lab.step import version_of
from model import PRECISIONS, HuggingFaceEncoder, SpeechLLM, compute_precision, encode_all
from model import load_encoder, load_llm
from support.answers import answer_in_memory
from support.files import PROJECT, UserError, first_line, read_jsonl
from support.hub import free_memory
from support.processes import DEVICE, WHY_DEVICE
from support.states import read_state, saved_states
from train import FIRST_SCALE, Piece, Progress, accumulate_gradients, adam_w, pieces_of_step
from train import step_gradients, train, update

ON_GPU = DEVICE != "cpu"
SPEC = {
    "llm": "tiny",
    "encoder": "tiny",
    "pad_whisper": False,
    "connector": "stack-mlp",
    "k": 6,
    "hidden": 256,
    "lora": 0,
}
STEPS = 50  # of the demo's training, on the GPU and on the CPU
AT_MOST = 300  # seconds for a command
WEIGHTS = 5_000_000  # of a tensor: 20 MB, and twice that for the moments


# ---- what the checks have in common ----


def tiny_model(bits=16, precision="fp32", *more, lora=0):
    """The tiny LLM with an untrained connector, the same whenever it is made; dropout is off.

    bits, precision, more: as load_llm takes them. AssertionError if nothing is packed that should
    be: where bitsandbytes does not work, load_llm goes on without it.
    """
    llm = load_llm("tiny", bits, precision, *more)
    if bits != 16:
        assert packed_layers(llm[0], bits), f"no layer of the LLM is in {bits} bits"
    spec = {**SPEC, "bits": bits, "lora": lora}
    return SpeechLLM.build(spec, llm, load_encoder("tiny")).train(False)


def packed_layers(llm, bits):
    """[(name, module)] of what is packed into so many bits, slices of the projection included."""
    try:
        from bitsandbytes.nn import Linear4bit, Linear8bitLt
    except (ImportError, OSError, RuntimeError) as error:
        raise AssertionError(f"bitsandbytes does not work: {first_line(error)}") from None
    kind = Linear4bit if bits == 4 else Linear8bitLt
    return [(name, module) for name, module in llm.named_modules() if isinstance(module, kind)]


def conversations(model, n=6, frames=60, answer=8):
    """[Example] of random speech and tokens, each of another length; the same at every call."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = len(model.llm.get_input_embeddings().weight)  # the tokenizer may know more

    def ids(length):
        return torch.randint(3, vocabulary, (length,), generator=generator).tolist()

    examples = []
    for i in range(n):
        heard = torch.randn(frames + 7 * i, model.encoder.width, generator=generator)
        parts = [Text(ids(9)), Speech(heard.half()), Text(ids(4)), Response(ids(answer))]
        examples.append(Example(parts, None))
    return examples


def gradients(model, examples, scale=1.0):
    """(loss, the gradients of everything trained as one vector) of a step."""
    model.zero_grad(set_to_none=True)
    piece = Piece(examples, "smoke")
    loss = accumulate_gradients(model, [piece], piece.tokens(), scale=scale)
    found = [p.grad.flatten().float() / scale for p in model.trainable().values()]
    return loss, torch.cat(found)


def off_by(found, expected):
    """The relative error: the distance of two tensors, over the length of the second."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return ((found - expected).norm() / expected.norm()).item()


def within(found, expected, tolerance, what):
    """Says by how much they differ; AssertionError if it is more than the tolerance."""
    error = off_by(found, expected)
    assert error <= tolerance, f"{what} differ by {error:.2g}, and {tolerance:g} is allowed"
    return f"{what} differ by {error:.1g}"


@contextmanager
def allowed(n_bytes):
    """Within it torch may take so many bytes of the GPU, and is out of memory beyond that."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    before = torch.cuda.get_per_process_memory_fraction()
    torch.cuda.set_per_process_memory_fraction(min(before, n_bytes / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before)
        torch.cuda.empty_cache()


def peak_of(action):
    """(what an action returns, bytes that are there before it, its peak)."""
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = action()
    torch.cuda.synchronize()
    return result, before, torch.cuda.max_memory_reserved()


# ---- numbers: each precision against fp32 ----


def nf4_is_right(_):
    """NF4 gives what its unpacked weights give, forward and backward."""
    return against_unpacked(tiny_model(4))


@torch.no_grad()
def nf4_products_are_right(_):
    """Of a packed layer, in each precision, for few rows and for many: they have own kernels.

    Some of them only where the layer is as wide as those of a real LLM.
    """
    from bitsandbytes.nn import Linear4bit

    said = []
    for name, tolerance in (("fp32", 1e-3), ("bf16", 0.02), ("fp16", 0.02)):
        dtype = PRECISIONS[name]
        if ON_GPU and name == "bf16" and not torch.cuda.is_bf16_supported(False):
            continue
        generator = torch.Generator().manual_seed(0)
        for width in (2048, 32768) if ON_GPU else (2048,):
            layer = Linear4bit(2048, width, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight.data.copy_(0.02 * torch.randn(width, 2048, generator=generator))
            layer = layer.to(dtype).to(DEVICE)
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # see model.load_llm
                layer.support_avx512bf16_for_cpu = False
            whole = unpacked(layer).weight
            for rows in (1, 6, 16, 32, 64, 400):
                x = torch.randn(rows, 2048, generator=generator).to(DEVICE, dtype)
                what = f"products of {rows} rows with {width} columns, {name}"
                within(layer(x), x.float() @ whole.T, tolerance, what)
        said.append(name)
    return f"1 to 400 rows in {', '.join(said)}"


def against_unpacked(model):
    """The gradients of a model with packed layers, beside those with these layers unpacked."""
    examples = conversations(model)
    _, packed = gradients(model, examples)
    for name, module in packed_layers(model.llm, 4):
        model.llm.set_submodule(name, unpacked(module))
    assert not packed_layers(model.llm, 4), "some layer is packed still"
    _, whole = gradients(model, examples)
    return within(packed, whole, 1e-3, "gradients packed and unpacked")


def projection_in_nf4_is_right(_):
    """The vocabulary projection in NF4, in slices, is that of its unpacked weights, in order."""
    expected = tiny_model().llm.get_output_embeddings().weight  # (V, D)
    model = tiny_model(4, "fp32", 4)
    head = model.llm.get_output_embeddings()
    slices = packed_layers(head, 4)
    assert len(slices) == head.SLICES, f"{len(slices)} of {head.SLICES} slices are packed"
    whole = torch.cat([unpacked(part).weight for _, part in slices])  # (V, D)
    near = within(whole, expected, 0.15, "weights unpacked and as they were")
    states = torch.randn(50, whole.shape[1], generator=torch.Generator().manual_seed(0)).to(whole)
    said = within(head(states), states @ whole.T, 1e-3, "logits packed and unpacked")
    return f"{near}; {said}; {against_unpacked(model)}"


def adapter_leaves_the_projection_alone(_):
    """A LoRA adapter beside a projection in NF4: on no slice of it, and its gradients are right."""
    model = tiny_model(4, "fp32", 4, "host", lora=4)
    names = [name for name in model.trainable() if "lora_" in name]
    head = [name for name in names if "lm_head" in name]
    assert names, "nothing is adapted"
    assert not head, f"{len(head)} weights of the adapter are on the projection, like {head[:1]}"
    generator = torch.Generator().manual_seed(0)
    for name, p in model.trainable().items():
        if "lora_B" in name:  # of zeros it would hide the gradients of the other half
            p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return f"{len(names)} weights; {against_unpacked(model)}"


def unpacked(module):
    """A linear layer of the weights of a packed one."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
    linear = nn.Linear(*weight.shape[::-1], bias=module.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.float(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.float(), requires_grad=False)
    return linear


def against_fp32(bits, precision, tolerance):
    """The gradients with such weights in such a precision, beside those of fp32."""
    whole = tiny_model()
    _, expected = gradients(whole, conversations(whole))
    model = tiny_model(bits, precision)
    _, found = gradients(model, conversations(model))
    return within(found, expected, tolerance, "gradients")


def int8_is_close(_):
    """LLM.int8 is near fp32, forward and backward."""
    return against_fp32(8, compute_precision() if ON_GPU else "fp32", 0.3)


def bf16_is_close(_):
    """bf16 is near fp32."""
    if ON_GPU and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "this card has none, and --precision auto is fp16"
    return against_fp32(16, "bf16", 0.1)


def fp16_scales_its_loss(_):
    """A forced overflow is skipped and halves the scale; the first scale gives fp32's gradients."""
    said = against_fp16_scaled(FIRST_SCALE)
    model = tiny_model(16, "fp16")
    parameters = model.trainable()
    before = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
    progress = Progress(loss_scale=2.0**60)
    piece = Piece(conversations(model), "smoke")
    loss = accumulate_gradients(model, [piece], piece.tokens(), scale=progress.loss_scale)
    optimizer = adam_w(parameters, 1e-3)
    _, finite = update(optimizer, list(parameters.values()), loss, progress)
    progress.adjust_loss_scale(finite)
    after = torch.cat([p.detach().flatten() for p in parameters.values()])
    assert not finite and torch.equal(before, after), "a step that overflowed was taken"
    assert progress.loss_scale == 2.0**59, f"the scale became {progress.loss_scale:g}"
    return f"{said}; an overflow was skipped and halved the scale"


def against_fp16_scaled(scale):
    whole = tiny_model()
    _, expected = gradients(whole, conversations(whole))
    model = tiny_model(16, "fp16")
    _, found = gradients(model, conversations(model), scale)
    return within(found, expected, 0.03, "gradients")


def embeddings_may_be_on_the_host(_):
    """The table of embeddings in host memory changes no gradient and no answer, to the bit."""
    found = []
    for place in ("gpu", "host"):
        model = tiny_model(4, "fp32", 4, place)
        examples = conversations(model)
        vector = gradients(model, examples)[1]
        found.append((vector, model.generate([example.parts[:-1] for example in examples], 12)))
    (on_gpu, answers), (on_host, same_answers) = found
    assert torch.equal(on_gpu, on_host), "the gradients differ"
    assert answers == same_answers, "the answers differ"
    return "with the vocabulary projection in NF4"


def fp16_with_embeddings_on_the_host_scales_its_loss(folder):
    """A training in fp16 with the embeddings on the host scales its loss."""
    model = tiny_model(4, "fp16", 4, "host")
    train(model, OneStep(conversations(model)), folder, lr=1e-3)
    _, about = read_state(saved_states(folder)[0])
    progress = Progress(**json.loads(about["progress"]))
    assert progress.skipped < progress.step, "no step was taken"
    scale = FIRST_SCALE / 2**progress.skipped  # a step that overflows is skipped and halves it
    assert progress.loss_scale == scale > 1, f"the scale is {progress.loss_scale:g}, not {scale:g}"
    return f"the scale is {progress.loss_scale:g} after {progress.step} steps"


# ---- attention, checkpointing ----


@torch.no_grad()
def padding_changes_nothing(_):
    """Attention with padding on the left: a row is what it is alone, and what the CPU computes."""
    return same_alone_and_on_a_cpu(tiny_model())


def heads_may_share_keys(_):
    """The same of an LLM in which several heads share keys and values, as in most large ones."""
    return same_alone_and_on_a_cpu(with_shared_heads("fp32"))


def wide_heads_are_close(_):
    """Attention with the heads of large LLMs, in the precision of training, is near fp32.

    Padded and not, forward and backward: each has a kernel of its own.
    """
    precision = compute_precision() if ON_GPU else "bf16"
    models = [with_shared_heads(name, width=512, heads=4) for name in ("fp32", precision)]
    uneven = conversations(models[0])
    said = []
    for what, examples in (("padded", uneven), ("of one length", len(uneven) * uneven[:1])):
        expected, found = (gradients(model, examples)[1] for model in models)
        said.append(within(found, expected, 0.1, f"gradients {what} in {precision}"))
    return "; ".join(said)


def with_shared_heads(precision, width=256, heads=8):
    """A SpeechLLM of random weights, in which two heads and more share keys and values."""
    tiny = tiny_model()
    config = transformers.Qwen2Config(
        vocab_size=len(tiny.llm.get_input_embeddings().weight),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    llm = transformers.Qwen2ForCausalLM(config).to(DEVICE, PRECISIONS[precision])
    llm = llm.eval().requires_grad_(False)
    return SpeechLLM.build(SPEC, (llm, tiny.tokenizer), tiny.encoder).train(False)


def same_alone_and_on_a_cpu(model):
    batch = [example.parts for example in conversations(model)]
    together, _ = model.logits(batch)  # (R, V)
    alone = torch.cat([model.logits([parts])[0] for parts in batch])  # (R, V)
    said = within(together, alone, 1e-4, "rows padded and alone")

    embeds, mask, labels = model.embed(batch)  # (B, L, D), (B, L), (B, L)
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)
    answered = labels[:, 1:] != -100
    on_cpu = copy.deepcopy(model.llm).to("cpu")
    expected = on_cpu(
        inputs_embeds=embeds.cpu(), attention_mask=mask.cpu(), position_ids=positions.cpu()
    ).logits[:, :-1][answered.cpu()]  # (R, V)
    return f"{said}; {within(together, expected, 1e-3, 'GPU and CPU')}"


def checkpointing_changes_nothing(_):
    """Gradient checkpointing gives the gradients of none."""
    model = tiny_model(4)
    calls = []
    for layer in model.llm.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    _, expected = gradients(model, conversations(model))
    once = len(calls)
    calls.clear()
    model.checkpoint_gradients()
    assert len(model.checkpointed) == once, f"{len(model.checkpointed)} of {once} layers do so"
    for layer in model.checkpointed:
        layer.training = True
    _, found = gradients(model, conversations(model))
    assert len(calls) == 2 * once, f"{once} layers were run {len(calls)} times, not twice each"
    return within(found, expected, 1e-5, "gradients with and without")


# ---- the encoder and its frames ----


def some_speech(folder, seconds=(1.0, 2.5, 4.0)):
    """[Utterance] of noise, in folder."""
    generator = torch.Generator().manual_seed(0)
    utterances = []
    for i, length in enumerate(seconds):
        path = folder / f"noise-{i}.wav"
        samples = 0.1 * torch.randn(round(16000 * length), generator=generator)
        write_audio(path, samples.numpy())
        utterances.append(Utterance(path, "noise", length, id=path.name, split="train"))
    return utterances


def encoder_leaves_the_card(folder):
    """The encoder is on the card while it hears, and its memory is free afterwards."""
    gc.collect()
    start = torch.cuda.memory_allocated()
    encoder = HuggingFaceEncoder("tiny")
    loaded = torch.cuda.memory_allocated()
    encode_all(encoder, some_speech(folder), folder / "features")
    gc.collect()
    end = torch.cuda.memory_allocated()
    assert loaded > start, "the encoder was not on the card"
    assert end - start < 1e6, f"{(end - start) / 1e6:.1f} MB of it are still on the card"
    return f"{(loaded - start) / 1e6:.1f} MB came and went"


def frames_are_the_same_from_disk(folder):
    """Frames mapped from disk are those kept in memory, to the bit."""
    utterances = some_speech(folder)
    encoder = load_encoder("tiny")
    on_disk = encode_all(encoder, utterances, folder / "features", "disk")
    in_memory = encode_all(encoder, utterances, folder / "none", "ram")
    for u in utterances:
        assert torch.equal(on_disk[u.id], in_memory[u.id]), "they differ"
    return f"{len(utterances)} utterances"


def clips_heard_together(folder):
    """Clips of equal length go through the encoder together, with the frames of each alone."""
    encoder = load_encoder("tiny").to(DEVICE)  # where another check may have left it
    assert encoder.device.type == torch.device(DEVICE).type, "the encoder is not on the card"
    samples = [load_audio(u.audio) for u in some_speech(folder, (4.0, 4.0, 4.0))]
    alone = [encoder(own) for own in samples]
    calls = []
    hook = encoder.model.register_forward_pre_hook(lambda *_: calls.append(1))
    together = encoder.hear_together([encoder.clip(own, "noise") for own in samples])
    hook.remove()
    assert len(calls) == 1, f"the encoder was run {len(calls)} times, not once"
    found, expected = torch.cat(together), torch.cat(alone)
    return within(found.float(), expected.float(), 2e-3, "frames heard together and alone")


# ---- out of memory ----


class OneStep:
    """What a training asks of data.Examples, for one micro-batch, the same in both its steps."""

    accumulate, seed, recipe, steps, frames = 1, 0, Recipe("smoke"), 2, {}

    def __init__(self, examples):
        self.examples = examples

    def batch(self, step, micro):
        return self.examples


def micro_batch_is_halved(_):
    """Too little memory for a step: it is taken in halves, with the same gradients."""
    model = tiny_model(4)
    step = OneStep(conversations(model, 48, 400, 60))

    def once():
        model.zero_grad(set_to_none=True)
        progress = Progress()
        step_gradients(model, pieces_of_step(step, 0), progress)
        vector = torch.cat([p.grad.flatten().clone() for p in model.trainable().values()])
        return progress.halvings, vector

    (halvings, expected), before, peak = peak_of(once)
    assert halvings == 0
    model.zero_grad(set_to_none=True)
    with allowed(before + 0.6 * (peak - before)):
        halvings, found = once()
    assert halvings >= 1, "there was memory enough: nothing was tried"
    said = within(found, expected, 1e-4, "gradients whole and in pieces")
    return f"{halvings} halvings; {said}"


def benchmark_is_halved(_):
    """Too little memory for a batch of questions: they are answered in halves, with one result."""
    model = tiny_model(4)
    batch = [example.parts[:-1] for example in conversations(model, 64, 1200)]
    sizes = []  # how many were asked at once
    generate_rows = model.generate_rows

    def counted(rows, *more):
        sizes.append(len(rows))
        return generate_rows(rows, *more)

    model.generate_rows = counted
    once = partial(answer_in_memory, model, batch, len(batch), 12)
    (expected, _), before, peak = peak_of(once)
    assert sizes == [len(batch)], f"without a limit they were answered in pieces: {sizes}"
    for share in (0.6, 0.4, 0.25):  # of what it took, holes between the tensors included
        sizes.clear()
        with allowed(before + share * (peak - before)):
            found, _ = once()
        if len(sizes) > 1:
            break
    assert len(sizes) > 1, "there was memory enough: nothing was tried"
    same = sum(a == b for a, b in zip(found, expected))
    assert same >= 0.95 * len(batch), f"{len(batch) - same} of {len(batch)} answers differ"
    return f"{same} of {len(batch)} answers are the same, in {len(sizes) - 1} more attempts"


def optimizer_goes_on(_):
    """No memory for the optimizer's moments: they move to the host, with the same weights."""
    expected, stayed = two_steps(2**40)
    found, moved = two_steps(140 * 2**20)
    assert not stayed.on_host
    assert moved.on_host, "there was memory enough: nothing was tried"
    assert torch.equal(found, expected), f"weights differ by {off_by(found, expected):.2g}"
    return "the same to the bit"


def two_steps(room):
    """(weights, the optimizer) after two steps of eight tensors, with so many bytes to spare."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in "abcdefgh":
        weights[name] = nn.Parameter(torch.randn(WEIGHTS, generator=generator).to(DEVICE))
        weights[name].grad = torch.randn(WEIGHTS, generator=generator).to(DEVICE)
    optimizer = adam_w(weights, 1e-3)
    with allowed(torch.cuda.memory_allocated() + room):
        optimizer.step()
        optimizer.step()
    return torch.cat([p.detach().cpu() for p in weights.values()]), optimizer


def optimizer_says_what_to_do(_):
    """No memory for a piece of the optimizer's moments: one line says so, and what to do."""
    wide = nn.Parameter(torch.zeros(64 * 2**20, device=DEVICE))  # 256 MB; a piece takes 64
    wide.grad = torch.ones_like(wide)
    optimizer = adam_w({"wide": wide}, 1e-3)
    with allowed(torch.cuda.memory_allocated() + 8 * 2**20):
        try:
            update(optimizer, [wide], 1.0, Progress())
        except UserError as error:
            return first_line(error)[:60] + " …"
    raise AssertionError("there was memory enough: nothing was tried")


def encoder_goes_on(folder):
    """Too little memory for the encoder: it hears on the CPU, and the frames are the same."""
    utterances = some_speech(folder, (30.0, 30.0))
    encoder = HuggingFaceEncoder("tiny")
    expected = encode_all(encoder, utterances, folder / "a", "ram")
    encoder = HuggingFaceEncoder("tiny")
    with allowed(torch.cuda.memory_allocated() + 4 * 2**20):
        found = encode_all(encoder, utterances, folder / "b", "ram")
    assert encoder.left_gpu, "there was memory enough: nothing was tried"
    assert encoder.to(DEVICE).device.type == "cpu", "it went back to the GPU"
    here = utterances[0].id
    return within(found[here].float(), expected[here].float(), 2e-2, "frames of GPU and CPU")


def encoder_without_room_goes_on(folder):
    """Too little memory for the encoder's weights: it hears on the CPU from the start."""
    samples = load_audio(some_speech(folder)[0].audio)
    expected = HuggingFaceEncoder("tiny")(samples)
    gc.collect()
    with allowed(torch.cuda.memory_allocated()):
        encoder = HuggingFaceEncoder("tiny")
        found = encoder(samples)
    assert encoder.left_gpu, "there was memory enough: nothing was tried"
    return within(found.float(), expected.float(), 2e-2, "frames of GPU and CPU")


# ---- the whole pipeline: killed, resumed, and beside the CPU ----


def mtbi(*words, on_cpu=False, wait=True):
    """A command of mtbi.py as a program of its own: what it said, or, not waited for, itself."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if on_cpu:
        env["CUDA_VISIBLE_DEVICES"] = "-1"  # an empty one counts as none on Windows
    process = subprocess.Popen(
        [sys.executable, str(PROJECT / "mtbi.py"), *map(str, words)],
        cwd=PROJECT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return ended(process) if wait else process


def ended(process, seconds=None):
    """Waits for a program: what it said; AssertionError with its last line if it failed.

    After so many seconds, or AT_MOST, it is stopped, and a little later killed.
    """
    seconds = seconds or AT_MOST
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.terminate()  # which ends what it started, too
        with suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        raise AssertionError(f"a command was not done after {seconds} s") from None
    finally:
        process.kill()  # which has ended, if all is well
    last = said.strip().splitlines()[-1:] or ["nothing"]
    assert process.returncode == 0, f"a command ended with {process.returncode}: {last[0]}"
    return said


def resumed_at(said):
    """The step from which a training went on; AssertionError if it began anew."""
    found = re.search(r"resuming at step (\d+)", said)
    assert found and int(found[1]), "it began anew instead of going on"
    return int(found[1])


def small_run(folder):
    """(RUN of a little tiny speech, a copy of it, another); the same behaviors in each."""
    run, made = folder / "run", folder / "made"
    if not run.exists():
        shutil.rmtree(made, ignore_errors=True)  # of a check that failed on the way
        shutil.rmtree(folder / "data", ignore_errors=True)
        mtbi("prepare", "tiny", "--out", folder / "data", "--train", "200", "--test", "20")
        mtbi("behaviors", folder / "data", "--out", made)
        for name in ("killed", "cpu"):
            shutil.copytree(made, folder / name, dirs_exist_ok=True)
        made.rename(run)
    return run, folder / "killed", folder / "cpu"


def train_words(run):
    """The command that trains so few steps; in fp32, so that it can be held against a CPU's."""
    options = ["--steps", str(STEPS), "--save-every", "10", "--precision", "fp32"]
    return ["train", run, "--recipe", "mtbi", *options]


def resumes_where_it_was_killed(folder):
    """A training that is killed and goes on ends with the weights of one that was not."""
    run, killed, _ = small_run(folder)
    mtbi(*train_words(run))
    process = mtbi(*train_words(killed), wait=False)
    deadline = time.monotonic() + 120
    try:
        while not list((killed / "mtbi" / "state").glob("[0-9]*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline, "no state was saved in two minutes"
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate()
    was_whole = (killed / "mtbi" / "connector.safetensors").exists()
    assert not was_whole, "it had ended before it was killed"
    step = resumed_at(mtbi(*train_words(killed)))
    whole = load_file(run / "mtbi" / "connector.safetensors")
    resumed = load_file(killed / "mtbi" / "connector.safetensors")
    if all(torch.equal(whole[name], resumed[name]) for name in whole):
        return f"from step {step} on, the same to the bit"
    flat = [torch.cat([t.flatten() for t in weights.values()]) for weights in (resumed, whole)]
    said = within(*flat, 1e-3, "weights")
    return f"from step {step} on; {said} (some kernel is not deterministic)"


def loss_is_that_of_a_cpu(folder):
    """The demo's first steps: the loss comes down as on a CPU."""
    run, _, on_cpu = small_run(folder)
    if not (run / "mtbi" / "log.jsonl").exists():
        mtbi(*train_words(run))
    told = mtbi(*train_words(on_cpu), on_cpu=True)
    assert "device: cpu" in told, "the other training was not on the CPU"
    said = []
    for what, part, tolerance in (("at first", slice(1), 0.03), ("at last", slice(-10, None), 0.2)):
        means = []
        for folder in (run, on_cpu):
            losses = [row["loss"] for _, row in read_jsonl(folder / "mtbi" / "log.jsonl")][part]
            means.append(sum(losses) / len(losses))
        here, there = means
        said.append(f"{what} {here:.3f}, on the CPU {there:.3f}")
        assert abs(here / there - 1) <= tolerance, said[-1]
    return f"{'; '.join(said)}; dropout alone, drawn otherwise, changes the last by a tenth"


# ---- the list, and how it is run ----


class Check(NamedTuple):
    function: Callable  # takes a folder for its files
    advice: str  # what to do where it fails
    needs_gpu: bool = False
    runs_programs: bool = False  # commands, which share one folder


UPDATE = "update the driver, torch and bitsandbytes (pip install -r requirements.txt)"
BATCH = "choose a --batch-size that `plan` says fits, and twice the --accumulate"
CHECKS = [
    Check(nf4_is_right, f"{UPDATE}, or use --bits 16"),
    Check(nf4_products_are_right, f"{UPDATE}, or use --bits 16"),
    Check(projection_in_nf4_is_right, "leave --head-bits at 16"),
    Check(adapter_leaves_the_projection_alone, "use --lora 0, or leave --head-bits at 16"),
    Check(int8_is_close, f"{UPDATE}, or use --bits 4"),
    Check(bf16_is_close, "use --precision fp16"),
    Check(fp16_scales_its_loss, "use --precision fp32"),
    Check(embeddings_may_be_on_the_host, "leave --embeddings at gpu"),
    Check(fp16_with_embeddings_on_the_host_scales_its_loss, "leave --embeddings at gpu"),
    Check(padding_changes_nothing, UPDATE),
    Check(heads_may_share_keys, UPDATE),
    Check(wide_heads_are_close, f"{UPDATE}, or use --precision fp32"),
    Check(checkpointing_changes_nothing, "use --gradient-checkpointing off"),
    Check(frames_are_the_same_from_disk, "use --cache-features ram"),
    Check(clips_heard_together, UPDATE),
    Check(encoder_leaves_the_card, "use `encode` first, as a command of its own", True),
    Check(micro_batch_is_halved, BATCH, True),
    Check(benchmark_is_halved, BATCH, True),
    Check(optimizer_goes_on, BATCH, True),
    Check(optimizer_says_what_to_do, BATCH, True),
    Check(encoder_goes_on, "close what else uses the card while the frames are made", True),
    Check(encoder_without_room_goes_on, "close what else uses the card, or `encode` first", True),
    Check(resumes_where_it_was_killed, "do not rely on --resume; report it", False, True),
    Check(loss_is_that_of_a_cpu, "train with --precision fp32; report it", False, True),
]


def smoke():
    """Run every check and say what came of it; returns how many failed."""
    device = f"no GPU ({WHY_DEVICE}): what can be tried on a CPU"
    if ON_GPU:
        device = torch.cuda.get_device_name()
    print(f"{device}; torch {torch.__version__}, bitsandbytes {version_of('bitsandbytes')}\n")
    failed = 0
    start = time.monotonic()
    # Windows deletes no file that is mapped, as frames are: then the folder stays
    with TemporaryDirectory(prefix="mtbi-smoke-", ignore_cleanup_errors=True) as folder:
        for check in CHECKS:
            failed += not run_check(check, Path(folder))
    took = time.monotonic() - start
    print(f"\n{len(CHECKS)} checks, {failed} failed, {took:.0f} s")
    return failed


def run_check(check, folder):
    """Say whether a path works; False if it does not."""
    about = check.function.__doc__.strip().splitlines()[0]
    if check.needs_gpu and not ON_GPU:
        print(f"needs a GPU  {about}")
        return True
    if not check.runs_programs:
        folder = folder / check.function.__name__
        folder.mkdir()
    start = time.monotonic()
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            said = check.function(folder)
    except Exception as error:  # whatever it is, the next check is tried, too
        what = first_line(error) or type(error).__name__
        print(f"FAILED       {about} {what}. What to do: {check.advice}")
        return False
    print(f"works        {about} ({said}; {time.monotonic() - start:.0f} s)", flush=True)
    return True
