"""Checkpoints of Hugging Face: a local folder, a hub name, or "tiny" for the tiny world's.

Weights come from safetensors only, code comes from transformers only.
"""

import gc
import hashlib
import inspect
import logging
import os
import platform
import re
import shutil
import sys
from functools import lru_cache
from pathlib import Path

import torch
import transformers

from accelerate.hooks import remove_hook_from_module
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from support.console import is_out_of_memory
from support.files import HALF_WRITTEN, PROJECT, UserError, ceil_div, first_line, writing
from support.processes import DEVICE

# bitsandbytes warns of an optional kernel package that it would load from the network
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# and accelerate of weights that load_in_places takes back from it
logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()  # loading weights takes seconds,
enable_progress_bars()  # but a download is seen

TINY = PROJECT / "tiny"  # the tiny world's checkpoints, by the name "tiny"
AT_REVISION = re.compile(r"((?:[\w.-]+/)?[\w.-]+)@([\w./-]+)")  # a hub name and which version
KINDS = {"llm": "LLM", "encoder": "speech encoder"}  # a folder of TINY, and what people call it
# of torch's checkpointing: nothing draws random numbers, whose states need no keeping then
COMPUTE_AGAIN = {"use_reentrant": False, "preserve_rng_state": False}


def checkpoint_path(name, kind):
    """What from_pretrained is given for a name; kind: "llm" or "encoder"."""
    return TINY / kind if name == "tiny" else name


def absolute_if_local(name):
    """A local model folder as an absolute path; "tiny" and hub names as they are."""
    if name != "tiny" and Path(name).exists():
        return str(Path(name).resolve())
    return name


def split_revision(name):
    """(the name, {"revision": …}) of NAME@REVISION on the hub; of any other name (the name, {})."""
    found = AT_REVISION.fullmatch(str(name))
    if not found or Path(name).exists():
        return name, {}
    return found[1], {"revision": found[2]}


def pinned(name, kind, before=""):
    """A hub name with the commit that it stands for now, NAME@COMMIT; a local folder as it is.

    Whatever its owner adds later, the same weights are loaded by that. before: what the name was
    pinned to by an earlier call, and stays.
    """
    if Path(checkpoint_path(name, kind)).is_dir():
        return name
    if name == split_revision(before)[0]:
        return before
    return f"{split_revision(name)[0]}@{fingerprint_of_weights(name, kind)}"


def load_or_explain(auto_class, name, what, **options):
    """auto_class.from_pretrained with an error for people; weights (`dtype`) must be whole."""
    name, revision = split_revision(name)
    options |= revision
    # unset, transformers would ask on the terminal, and run what comes with the weights
    options["trust_remote_code"] = False
    try:
        if "dtype" not in options:
            return auto_class.from_pretrained(name, **options)
        options |= {"use_safetensors": True, "output_loading_info": True}
        model, found = auto_class.from_pretrained(name, **options)
        missing = [str(key) for key in (*found["missing_keys"], *found["mismatched_keys"])]
        lost = sorted(key for key in missing if "masked_spec_embed" not in key)  # pre-training's
        if lost:
            raise ValueError(
                f"its weights are not whole: {len(lost)} tensors are missing or of another shape, "
                f"like {lost[0]}"
            )
        return model
    except Exception as error:  # damaged files raise anything
        if is_out_of_memory(error):
            raise  # which says nothing of the files
        raise UserError(
            f"{what} {name}: cannot be loaded as a Hugging Face checkpoint, local folder or hub "
            f"name ({first_line(error)})"
        ) from None


def load_tensors(path, advice="delete it and run again"):
    """The tensors of a safetensors file; UserError if it is not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); {advice}") from None


# ---- speech encoders ----


def load_speech_model(config, where):
    """(layers of a speech encoder without a decoder, CTC head or None, CTC tokenizer or None)."""
    what = KINDS["encoder"]
    if config.model_type == "whisper":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        encoder = load_or_explain(
            WhisperEncoder,
            where,
            what,
            dtype=torch.float32 if DEVICE == "cpu" else torch.float16,
            key_mapping={r"^(model\.)?encoder\.": ""},  # the decoder is never read
        )
        return encoder, None, None
    if any(a.endswith("ForCTC") for a in config.architectures or []):
        model = load_or_explain(transformers.AutoModelForCTC, where, what, dtype=torch.float32)
        tokenizer = load_or_explain(transformers.AutoTokenizer, where, what)
        if hasattr(model, "ctc_head"):  # Parakeet
            return model.encoder, model.ctc_head, tokenizer
        return model.base_model, model.lm_head, tokenizer  # the wav2vec 2.0 family
    model = load_or_explain(transformers.AutoModel, where, what, dtype=torch.float32)
    if config.is_encoder_decoder:
        model = getattr(model, "encoder", model)
    return model, None, None


def check_frames(name, frames, ctc_tokenizer, symbols):
    """UserError if an encoder's frames, or the vocabulary of its CTC head, show damage."""
    if not torch.isfinite(frames).all():
        raise UserError(
            f"speech encoder {name}: gives NaN or infinite frames; its weights are damaged"
        )
    if ctc_tokenizer is None:
        return
    vocabulary = ctc_tokenizer.get_vocab().values()
    if ctc_tokenizer.pad_token_id is None or max(vocabulary) >= symbols:
        raise UserError(
            f"speech encoder {name}: its CTC vocabulary does not fit its CTC head of {symbols} "
            "symbols, or has no pad token"
        )


# ---- LLMs ----


def free_memory():
    """Have what nobody uses any more leave the memory.

    A packed layer and its weight know each other (bitsandbytes), so that Python finds them only
    when it looks for circles, and it does not look because a GPU is full.
    """
    gc.collect()
    if DEVICE != "cpu":
        torch.cuda.empty_cache()


def bytes_left_free():
    """Of a GPU that also draws a screen; on Windows, and in its Linux, WSL.

    There the driver lends a program host memory through PCIe, many times slower, and no error says
    that fewer conversations should go through at once.
    """
    is_windows = sys.platform == "win32" or "microsoft" in platform.release().lower()
    return 0.2e9 if is_windows else 0


@lru_cache(maxsize=1)
def stay_on_the_card():
    """Have torch be out of memory where the GPU's own ends, where it would get the host's."""
    if DEVICE == "cpu" or not bytes_left_free():
        return
    free, total = torch.cuda.mem_get_info(DEVICE)
    ours = max(0.0, free + torch.cuda.memory_reserved(DEVICE) - bytes_left_free())
    torch.cuda.set_per_process_memory_fraction(min(1.0, ours / total), DEVICE)
    print(
        f"GPU memory: up to {ours / 1e9:.1f} GB, what is free: beyond that Windows would lend "
        "host memory, which is many times slower",
        file=sys.stderr,
    )


def load_in_places(where, bits, compute, device, head_bits=16, embeddings="gpu"):
    """An LLM on the device, its linear layers packed.

    What pack_head and keep_embeddings_on_host are to take from a GPU is in host memory already: it
    never takes the GPU's, not even on the way.
    """
    what, parts = KINDS["llm"], {"": device}
    config = load_or_explain(transformers.AutoConfig, where, what)
    # weights that come packed are left where their own settings want them
    if device != "cpu" and not hasattr(config, "quantization_config"):
        parts = places_of_parts(config, device, head_bits, embeddings)
    llm = load_or_explain(
        transformers.AutoModelForCausalLM,
        where,
        what,
        dtype=compute,
        quantization_config=quantization(bits, compute, offload=len(parts) > 1),
        device_map=parts,
    )
    if len(parts) > 1:
        take_back(llm)
    return llm


def places_of_parts(config, device, head_bits, embeddings):
    """Where from_pretrained puts the parts of an LLM: its device_map, {module: device}."""
    try:
        with torch.device("meta"):
            llm = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError:  # no causal LLM: loading it says so
        return {"": device}
    table, head = llm.get_input_embeddings(), llm.get_output_embeddings()
    is_tied = getattr(head, "weight", None) is table.weight
    on_host = set()
    if embeddings == "host" and not (is_tied and head_bits == 16):  # which is refused
        on_host.add(table)
    if head_bits == 4 and not (is_tied and embeddings == "gpu"):  # the table is needed there
        on_host.add(head)
    if not on_host:
        return {"": device}
    return dict(spread(llm, "", on_host, device))


def spread(module, name, on_host, device):
    """Yields (name, device) of the largest parts of a module that are in one place alone.

    All are named: of a rest without a name accelerate would move all of the LLM to its place.
    """
    inside = set(module.modules())
    if module in on_host:
        yield name, "cpu"
    elif not inside & on_host:
        yield name, device
    else:
        prefix = f"{name}." if name else ""
        for own, _ in (*module.named_parameters(recurse=False), *module.named_buffers("", False)):
            yield prefix + own, device
        for child, part in module.named_children():
            yield from spread(part, prefix + child, on_host, device)


def take_back(llm):
    """Undo what accelerate does to an LLM in two places: to bring each part over when it is used.

    What was in host memory is there again, and stays.
    """
    for module in llm.modules():
        remove_hook_from_module(module)
        forward = vars(module).get("forward")  # which keeps the module in memory
        if getattr(forward, "__func__", None) is type(module).forward:
            del module.forward
    del llm.hf_device_map


def parameters_of(config):
    """How many parameters an LLM of a configuration has, each counted once.

    The LLM's own count goes by how they are packed, and leaves out a table in host memory.
    """
    with torch.device("meta"):
        llm = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in llm.parameters())


def quantization(bits, compute, offload=False):
    """How the linear layers are packed, or None where they are not.

    offload: may parts that are not packed be in host memory?
    """
    if bits == 16:
        return None
    try:
        import bitsandbytes  # noqa: F401

        if bits == 8:
            return transformers.BitsAndBytesConfig(
                load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=offload
            )
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_enable_fp32_cpu_offload=offload,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    except (ImportError, OSError, RuntimeError) as error:
        print(
            f"bitsandbytes does not work on this machine ({type(error).__name__}): the LLM runs "
            f"unquantized, in {compute}"
        )
        return None


def pack_linear(linear, compute, device):
    """A linear layer in NF4 with double quantization, as `quantization` packs those of an LLM.

    UserError if bitsandbytes does not work.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"bitsandbytes, which packs weights, does not work on this machine "
            f"({first_line(error)}); `doctor` says more, and --head-bits 16 does without it"
        ) from None

    rows, columns = linear.weight.shape
    has_bias = linear.bias is not None
    packed = bitsandbytes.nn.Linear4bit(
        columns, rows, has_bias, compute_dtype=compute, quant_type="nf4", device="meta"
    )
    packed.weight = bitsandbytes.nn.Params4bit(
        linear.weight.detach().to(device, compute).contiguous(),
        requires_grad=False,
        quant_type="nf4",
        compress_statistics=True,
    ).to(device)
    if has_bias:
        bias = linear.bias.detach().to(device, compute)
        packed.bias = nn.Parameter(bias, requires_grad=False)
    packed.support_avx512bf16_for_cpu = False  # see model.load_llm
    return packed


class PackedHead(nn.Module):
    """A vocabulary projection in NF4, in slices: one of them is unpacked at a time.

    states (…, D) -> logits (…, V)
    """

    SLICES = 8
    PARTS = r".*\.slices\.\d+"  # the names of the slices in an LLM

    def __init__(self, head, compute, device):
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features
        every = ceil_div(head.out_features, self.SLICES)
        self.slices = nn.ModuleList()
        for start in range(0, head.out_features, every):
            rows = head.weight[start : start + every]
            part = nn.Linear(head.in_features, len(rows), bias=False, device="meta")
            part.weight = nn.Parameter(rows.detach(), requires_grad=False)
            self.slices.append(pack_linear(part, compute, device))

    def forward(self, states):
        return torch.cat([part(states) for part in self.slices], dim=-1)  # (…, V)


def pack_head(llm, compute, device):
    """Put the LLM's vocabulary projection into NF4; UserError if that would be wrong."""
    head = llm.get_output_embeddings()
    if head.bias is not None:
        raise UserError("this LLM's vocabulary projection has a bias; leave --head-bits at 16")
    if device == "cpu" and head.in_features % 64:  # see check_row_widths
        raise UserError(
            f"this LLM's vocabulary projection has rows of {head.in_features} weights, no multiple "
            "of 64, which bitsandbytes unpacks wrongly on a CPU; leave --head-bits at 16"
        )
    llm.set_output_embeddings(PackedHead(head, compute, device))


def has_packed_head(llm):
    return isinstance(llm.get_output_embeddings(), PackedHead)


class HostEmbeddings(nn.Module):
    """A table of embeddings in host memory: only the rows that are looked up travel.

    ids (…) -> embeddings (…, D) on the device. The table is no parameter of this module: an LLM
    says of itself that it is where its parameters are, which is the GPU.
    """

    def __init__(self, table, device):
        super().__init__()
        self.hidden = [table.to("cpu").requires_grad_(False)]
        self.target = device

    @property
    def weight(self):
        return self.hidden[0].weight  # (V, D)

    def forward(self, ids):
        return self.hidden[0](ids.to("cpu")).to(self.target)


def keep_embeddings_on_host(llm, device):
    """Keep the LLM's table of embeddings in host memory.

    UserError if the table is the vocabulary projection, too.
    """
    table = llm.get_input_embeddings()
    if getattr(llm.get_output_embeddings(), "weight", None) is table.weight:
        raise UserError(
            "this LLM's table of embeddings is its vocabulary projection, too, which the GPU needs;"
            " --embeddings host goes with --head-bits 4"
        )
    llm.set_input_embeddings(HostEmbeddings(table, device))


def local_or_fetched(name, files):
    """The folder of a trained recipe: a local one, or these files of a hub name, OWNER/NAME."""
    folder = Path(name)
    is_hub_name = str(name).count("/") == 1 and not str(name).startswith((".", "/", "~"))
    if folder.exists() or not is_hub_name:
        return folder
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(
            f"{name}: is no local folder, and cannot be fetched from the hub ({first_line(error)})"
        ) from None


def save_adapter(llm, folder):
    """A folder that PEFT loads by itself; each of its files is there whole or not at all."""
    with writing(folder):
        written = folder / f"{HALF_WRITTEN}adapter"
        shutil.rmtree(written, ignore_errors=True)  # of a process that was killed
        llm.save_pretrained(written, save_embedding_layers=False)
        for path in written.iterdir():
            os.replace(path, folder / path.name)
        written.rmdir()


def load_adapter(llm, folder, advice):
    """Put the weights of an adapter into an LLM that has one; ValueError if they do not fit."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    tensors = load_tensors(folder / "adapter_model.safetensors", advice)
    if set(tensors) != set(get_peft_model_state_dict(llm)):
        raise ValueError("its adapter is not whole")
    set_peft_model_state_dict(llm, tensors)
    return tensors


def modules_with_weights(llm):
    """The names of modules that have all parameters of an LLM, each of them once."""
    names = []
    for name, module in llm.named_modules():  # what is around comes before what is in it
        is_inside = any(name.startswith(f"{around}.") for around in names)
        if not is_inside and next(module.parameters(recurse=False), None) is not None:
            names.append(name)
    return names


def checkpointed_layers(llm):
    """Let each layer keep only its input, and compute the rest again in the backward pass.

    Returns the layers that do so while their own flag `training` is set; what is inside them stays
    in eval mode.
    """
    try:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=COMPUTE_AGAIN)
    except ValueError as error:
        raise UserError(
            "this LLM has no gradient checkpointing; say --gradient-checkpointing off "
            f"({first_line(error)})"
        ) from None
    return [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]


def check_tokenizer(tokenizer, name):
    """UserError if an LLM's tokenizer lacks what every conversation needs."""
    if not tokenizer.chat_template:
        raise UserError(
            f"LLM {name}: its tokenizer has no chat template; choose an instruction-tuned model"
        )
    if not tokenizer("a b")["input_ids"]:
        raise UserError(f"LLM {name}: its tokenizer is empty; is tokenizer.json missing?")
    if not tokenizer.is_fast:
        raise UserError(
            f"LLM {name}: its tokenizer gives no character offsets, which interleaving needs; it "
            "must have a tokenizer.json"
        )


def check_vocabulary(llm, vocabulary, used, control, name):
    """UserError if the tokenizer has tokens that the LLM does not know, and that it may read.

    vocabulary: {token: id}; used: the ids that a conversation has; control: a pattern of control
    tokens. One of these that no conversation has may be unknown, like the one for pictures of
    Gemma 3's models for text.
    """
    known = len(llm.get_input_embeddings().weight)
    for token, i in vocabulary.items():
        if i >= known and (i in used or not control.fullmatch(token)):
            raise UserError(
                f"LLM {name}: its tokenizer has {len(vocabulary)} tokens, but its weights only "
                f"{known} embeddings"
            )


@torch.no_grad()
def check_reads_embeddings(llm, ids, name):
    """UserError if an LLM cannot be driven by embeddings alone, as speech tokens are put into it.

    Gemma 3n and 4 look up more about a token than its embedding, by its id; without ids they go
    without, or fail. ids: of some text.
    """
    known = inspect.signature(llm.prepare_inputs_for_generation).parameters
    tokens = torch.tensor([ids], device=llm.device)  # (1, L)
    embeds = llm.get_input_embeddings()(tokens)  # (1, L, D)
    try:
        read = llm(input_ids=tokens, use_cache=False).logits  # (1, L, V)
        heard = llm(inputs_embeds=embeds, use_cache=False).logits
        llm(inputs_embeds=1.01 * embeds, use_cache=False)  # of no token
        is_same = (read - heard).abs().max() <= 0.01 * read.abs().max()
        # numbers that are none are damage, or an overflow, which others tell
        reads_both = bool(is_same) or not read.isfinite().all()
    except (RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reads_both = False
    if "inputs_embeds" not in known or not reads_both:
        raise UserError(
            f"LLM {name}: {type(llm).__name__} cannot be driven by embeddings alone, so speech "
            "cannot be put into it; choose another one (docs/real.md names families)"
        )


def check_row_widths(llm, name):
    """UserError if bitsandbytes would unpack an LLM in 4 bits wrongly.

    Its kernel for CPUs (0.50.2) takes every row to begin a block of 64 weights; packed is without
    regard to rows. A GPU's is right.
    """
    if DEVICE != "cpu" or not getattr(llm, "is_loaded_in_4bit", False):
        return
    for module_name, module in llm.named_modules():
        width = getattr(module, "in_features", 64)
        if width % 64 and hasattr(module.weight, "quant_state"):
            raise UserError(
                f"LLM {name}: {module_name} has rows of {width} weights, no multiple of 64, which "
                "bitsandbytes unpacks wrongly on a CPU; use --bits 16, or a GPU"
            )


# ---- names of weights ----


def fingerprint_of_tensors(tensors, more, samples=1024):
    """Names loaded weights, of each about so many samples (None: all), and `more`."""
    content = b""
    for weight in tensors:
        every = max(1, weight.numel() // samples) if samples else 1
        content += weight.flatten()[::every].float().cpu().numpy().tobytes()
    return hashlib.sha256(content + repr(more).encode()).hexdigest()[:12]


def fingerprint_of_small_files(name, kind):
    """Names what a local model folder holds beside its weights: configuration, tokenizer, template.

    "" for a hub name, whose revision names them, too.
    """
    folder = Path(checkpoint_path(name, kind))
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if file.suffix in (".json", ".jinja", ".model", ".txt") and file.is_file():
            hashed.update(f"{file.name} {file.stat().st_size}".encode())
            hashed.update(file.read_bytes())
    return hashed.hexdigest()[:12] if folder.is_dir() else ""


def fingerprint_of_weights(name, kind):
    """Names the weights in a local model folder, or the revision of a hub name."""
    folder = Path(checkpoint_path(name, kind))
    if not folder.is_dir():
        load_or_explain(transformers.AutoConfig, name, KINDS[kind])
        name, revision = split_revision(name)
        cached = cached_file(name, "config.json", **revision)  # …/snapshots/COMMIT/config.json
        return Path(cached).parent.name
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}".encode())
        with open(file, "rb") as content:
            # a large file is not read whole: 256 samples from its beginning to its end
            for i in range(256):
                content.seek(max(0, size - 2**14) * i // 255)
                hashed.update(content.read(2**14))
    return hashed.hexdigest()[:12]


def fingerprint_of_beginnings(name, kind):
    """Names the first numbers of every tensor in a local model folder; the same for any hub name.

    What fingerprint_of_weights may overlook: a small part of large weights that was trained anew.
    UserError if the weights cannot be read.
    """
    names, first = [], []
    for file in sorted(Path(checkpoint_path(name, kind)).glob("*.safetensors")):
        for tensor, weight in sorted(load_tensors(file, "get the checkpoint again").items()):
            names.append(tensor)
            first.append(weight.flatten()[:1024])
    return fingerprint_of_tensors(first, names)


def fingerprint_of_llm(llm, tokenizer):
    """Names an LLM by what is the same in any precision (of one stored in fp32: in bf16 and fp32).

    Its shape, the size of its vocabulary, 64 rows of its embeddings and its norms; and whether its
    vocabulary projection is packed, which makes it another LLM. A fine-tune that left all of these
    alone has the same name.
    """
    text = llm.config.get_text_config()  # of a model that also sees, the part that reads
    weights = [llm.get_input_embeddings().weight[:64]]
    weights += [p for name, p in llm.named_parameters() if "norm" in name]
    # by what bf16 and fp16 both can hold, whatever precision it was loaded in; rounded to bf16
    # first, as loading in bf16 rounds weights that are stored in fp32
    weights = [w.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16) for w in weights]
    shape = (text.hidden_size, text.num_hidden_layers, tokenizer.vocab_size)
    if has_packed_head(llm):
        shape += ("projection in NF4",)
    return fingerprint_of_tensors(weights, shape, samples=None)
