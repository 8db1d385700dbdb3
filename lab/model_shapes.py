"""What models look like, without their weights: published configurations, and shapes on the "meta"
device, where tensors have a shape and no content. Nothing is downloaded that stands in the table.
"""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from data import SAMPLE_RATE
from model import with_adapter
from support.files import UserError, first_line
from support.hub import KINDS, checkpoint_path, checkpointed_layers, load_or_explain

# ---- the table: as the published configurations say ----


def llm_config(kind, hidden, ffn, layers, heads, kv_heads, tied=True, *, vocab):
    return kind(
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=tied,
    )


qwen_config = partial(llm_config, transformers.Qwen2Config, vocab=151936)
llama_config = partial(llm_config, transformers.LlamaConfig, vocab=128256)


def whisper_config(width, layers, heads, mels=80):
    return transformers.WhisperConfig(
        d_model=width,
        encoder_layers=layers,
        encoder_attention_heads=heads,
        encoder_ffn_dim=4 * width,
        num_mel_bins=mels,
        decoder_layers=1,  # the decoder is never read
    )


# hidden width, width of the feed-forward layers, layers, heads, heads of keys and values
LLM_CONFIGS = {
    "Qwen/Qwen2.5-0.5B-Instruct": qwen_config(896, 4864, 24, 14, 2),
    "Qwen/Qwen2.5-1.5B-Instruct": qwen_config(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B-Instruct": qwen_config(2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B-Instruct": qwen_config(3584, 18944, 28, 28, 4, tied=False, vocab=152064),
    "Qwen/Qwen2.5-14B-Instruct": qwen_config(5120, 13824, 48, 40, 8, tied=False, vocab=152064),
    "meta-llama/Llama-3.2-1B-Instruct": llama_config(2048, 8192, 16, 32, 8),
    "meta-llama/Llama-3.2-3B-Instruct": llama_config(3072, 8192, 28, 24, 8),
    "meta-llama/Llama-3.1-8B-Instruct": llama_config(4096, 14336, 32, 32, 8, tied=False),
    "HuggingFaceTB/SmolLM2-360M-Instruct": llama_config(960, 2560, 32, 15, 5, vocab=49152),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": llama_config(2048, 8192, 24, 32, 32, vocab=49152),
}

# width, layers, heads, mel bins
ENCODER_CONFIGS = {
    "openai/whisper-tiny": whisper_config(384, 4, 6),
    "openai/whisper-base": whisper_config(512, 6, 8),
    "openai/whisper-small": whisper_config(768, 12, 12),
    "openai/whisper-medium": whisper_config(1024, 24, 16),
    "openai/whisper-large-v3": whisper_config(1280, 32, 20, mels=128),
}

CONFIGS = {"llm": LLM_CONFIGS, "encoder": ENCODER_CONFIGS}


# ---- finding a configuration; kind: "llm" or "encoder" ----


def find_config(name, kind):
    """The configuration of a model: of the table, or of "tiny", a local folder or a hub name."""
    entry = listed(name, kind)
    if entry and not Path(name).exists():
        return CONFIGS[kind][entry]
    return load_or_explain(transformers.AutoConfig, checkpoint_path(name, kind), KINDS[kind])


def full_name(name, kind):
    """A hub name for a model of the table named by its last part alone; others as they are."""
    if "/" in name:
        return name
    return listed(name, kind) or name


def listed(name, kind):
    """The table's entry that is meant by a hub name, or by the last part of one; None if none is.

    Small or capital letters, with or without -Instruct and .en.
    """
    owner, model = owner_and_model(name)
    for entry in CONFIGS[kind]:
        entry_owner, entry_model = owner_and_model(entry)
        if model == entry_model and owner in ([], entry_owner):
            return entry
    return None


def owner_and_model(name):
    """([owner], or [] where none is named, model) of a name, as `listed` compares them."""
    *owner, model = name.lower().removesuffix("-instruct").removesuffix(".en").split("/")
    return owner, model


# ---- from a configuration to shapes ----


def llm_shape(config, dtype):
    """The LLM on the meta device, before it has an adapter.

    UserError if the configuration is that of no causal LLM.
    """
    try:
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers"):
            if not hasattr(config, key):
                raise ValueError(f"its configuration has no {key}")
        with torch.device("meta"):
            llm = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UserError(
            f"--llm: a model of type {config.model_type} is no causal LLM ({first_line(error)})"
        ) from None
    return llm.eval().requires_grad_(False)


def adapted_shape(llm, lora, checkpointing):
    """The same LLM as training has it; lora: see model.with_adapter."""
    with torch.device("meta"):
        adapted = with_adapter(llm, lora)
    if checkpointing:
        for layer in checkpointed_layers(adapted):
            layer.training = True
    return adapted


class EncoderShape(NamedTuple):
    parameters: int
    width: int  # D_encoder
    frame_rate: float  # frames a second


def encoder_shape(config, name):
    """The EncoderShape of a configuration; `name` finds the feature extractor, where that counts.

    As model.HuggingFaceEncoder has the encoder, without a decoder.
    """
    with torch.device("meta"):
        if config.model_type == "whisper":
            from transformers.models.whisper.modeling_whisper import WhisperEncoder

            encoder = WhisperEncoder(config)
        else:
            encoder = transformers.AutoModel.from_config(config)
            if config.is_encoder_decoder:
                encoder = getattr(encoder, "encoder", encoder)
    parameters = sum(p.numel() for p in encoder.parameters())
    inner = inner_config(config)
    width = getattr(inner, "d_model", None) or inner.hidden_size
    return EncoderShape(parameters, width, rate_of_frames(config, name))


def rate_of_frames(config, name):
    """Frames a second that an encoder of this configuration gives."""
    inner = inner_config(config)
    if config.model_type == "whisper":
        return 50.0
    if config.model_type == "wav2vec2-bert":  # its feature extractor stacks frames of 10 ms
        where = checkpoint_path(name, "encoder")
        extractor = load_or_explain(transformers.AutoFeatureExtractor, where, KINDS["encoder"])
        return 100 / extractor.stride
    factor = getattr(inner, "subsampling_factor", None)
    if factor:  # Parakeet, of frames of 10 ms
        return 100 / factor
    return SAMPLE_RATE / math.prod(getattr(inner, "conv_stride", [320]))


def inner_config(config):
    """The encoder's part of a configuration that has parts (Parakeet with a CTC head)."""
    return getattr(config, "encoder_config", config)
