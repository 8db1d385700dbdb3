"""Small random-weight checkpoints of every supported family, saved in Hugging Face format.

Their tokenizers and chat templates behave as the families' do.

    python tests/checkpoints.py qwen2 FOLDER
"""

import json
import os
import shutil
from typing import NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

SENTENCES = [
    "the farmer sold three red apples in the market yesterday",
    "Translate this into German.",
    "Who did it? The doctor's café, 12,500 times!",
    "You are a helpful assistant. Today is 26 July.",
    "user\nassistant\nmodel\nsystem\n\n",
] * 3

# ---- chat templates ----

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
)
NO_THINKING = (
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\\n\\n</think>\\n\\n' }}"
    "{% endif %}"
)
LLAMA = (
    "{{ bos_token }}"
    "{% if date_string is not defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday is ' + date_string + ', ' "
    "+ strftime_now('%A') }}"
    "{% if messages[0]['role'] == 'system' %}{{ '\\n' + messages[0]['content'] }}{% endif %}"
    "{{ '<|eot_id|>' }}"
    "{% for m in messages if m['role'] != 'system' %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\\n' "
    "+ m['content'] | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}"
    "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {
    "qwen2": DEFAULT_SYSTEM + CHATML + "{% endif %}",
    "qwen3": CHATML + NO_THINKING + "{% endif %}",
    "smollm": DEFAULT_SYSTEM + CHATML + "{% endif %}",
    "llama": LLAMA,
    "gemma3": GEMMA,
    "phi3": PHI,
}
FAMILIES = list(TEMPLATES)

# ---- tokenizers ----


class Special(NamedTuple):
    tokens: list
    end_of_turn: str
    bos: str
    eos: str
    pad: str
    adds_bos: bool  # does the tokenizer itself put BOS before every text?


IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>"]
LLAMA_TOKENS += ["<|end_header_id|>", "<|eot_id|>"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
PHI_TOKENS = ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
END = "<|end_of_text|>"
SPECIAL = {
    "qwen2": Special(IM, "<|im_end|>", None, "<|im_end|>", "<|endoftext|>", False),
    "qwen3": Special(
        [*IM, "<think>", "</think>"], "<|im_end|>", None, "<|im_end|>", "<|endoftext|>", False
    ),
    "smollm": Special(IM, "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_end|>", False),
    "llama": Special(LLAMA_TOKENS, "<|eot_id|>", "<|begin_of_text|>", END, END, True),
    "gemma3": Special(GEMMA_TOKENS, "<end_of_turn>", "<bos>", "<eos>", "<pad>", True),
    "phi3": Special(PHI_TOKENS, "<|end|>", "<s>", "<|endoftext|>", "<|endoftext|>", False),
}


def tokenizer_of(family):
    """Byte-level BPE as Qwen and Llama 3 have it, or a SentencePiece-like one.

    The latter with a space before the first word (Phi-3) or without (Gemma).
    """
    special = SPECIAL[family]
    if family in ("gemma3", "phi3"):
        tokenizer = like_sentencepiece(family, special.tokens)
    else:
        tokenizer = byte_level(special.tokens)
    if special.adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{special.bos} $A",
            special_tokens=[(special.bos, tokenizer.token_to_id(special.bos))],
        )
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special.bos,
        eos_token=special.eos,
        pad_token=special.pad,
    )
    wrapped.chat_template = TEMPLATES[family]
    return wrapped


def byte_level(tokens):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def like_sentencepiece(family, tokens):
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if family == "gemma3":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokens = [*tokens, "<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = BpeTrainer(vocab_size=600, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


# ---- LLMs ----

LLM_CONFIGS = {
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "smollm": transformers.LlamaConfig,
    "llama": transformers.LlamaConfig,
    "gemma3": transformers.Gemma3TextConfig,
    "phi3": transformers.Phi3Config,
    "gemma4": transformers.Gemma4TextConfig,  # without a tokenizer of its own
}


def save_llm(folder, family, tokenizer=None, std=0.05, sure=1.0, brief=1.0, **shape):
    """A small random-weight LLM of the family with its tokenizer; returns the folder.

    sure: makes its answers surer, so that there is more to imitate; brief: makes it surer still
    where they end, so that they are short.
    """
    tokenizer = tokenizer or tokenizer_of(family)
    size = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": std,
        "tie_word_embeddings": False,
        **shape,
    }
    if family in ("qwen3", "gemma3", "gemma4"):
        size |= {"head_dim": 16}
    config = LLM_CONFIGS[family](
        vocab_size=(len(tokenizer) + 7) // 8 * 8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size,
    )
    torch.manual_seed(0)
    llm = transformers.AutoModelForCausalLM.from_config(config)
    llm.lm_head.weight.data *= sure
    llm.lm_head.weight.data[tokenizer.eos_token_id] *= brief
    # as many checkpoints recommend
    llm.generation_config.update(do_sample=True, temperature=0.7, top_k=5, repetition_penalty=1.3)
    llm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change_weights(folder, change):
    """Save a checkpoint's tensors, {name: tensor}, as change(tensors) gives them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def save_in_hub_cache(monkeypatch, folder, source, name, commit):
    """A copy of a checkpoint in a cache of the hub's in FOLDER, as a download leaves it; offline.

    Returns the folder of the model there, which has snapshots/COMMIT and refs/main.
    """
    repo = folder / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo


# ---- speech encoders ----


def save_encoder(folder, family):
    """A small random-weight speech encoder of the family; returns the folder.

    With its feature extractor, and its CTC tokenizer if it has a CTC head.
    """
    torch.manual_seed(0)
    if family == "whisper":
        model, extractor = whisper_model()
    elif family.startswith("parakeet"):
        model, extractor = parakeet_model(folder, family)
    else:
        model, extractor = wav2vec_model(folder, family)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def whisper_model():
    config = transformers.WhisperConfig(
        d_model=32,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=60,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config)
    return model, transformers.WhisperFeatureExtractor(feature_size=80)


def parakeet_model(folder, family):
    config = transformers.ParakeetEncoderConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        subsampling_conv_channels=16,
        num_mel_bins=80,
    )
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = BpeTrainer(vocab_size=90, special_tokens=["<unk>", "<pad>"], show_progress=False)
    words.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.ParakeetTokenizer(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    if family == "parakeet-encoder":
        model = transformers.ParakeetEncoder(config)
    else:
        with_head = transformers.ParakeetCTCConfig(
            vocab_size=words.get_vocab_size(),
            encoder_config=config.to_dict(),
            pad_token_id=words.token_to_id("<pad>"),
        )
        model = transformers.ParakeetForCTC(with_head)
    return model, transformers.ParakeetFeatureExtractor(feature_size=80)


def wav2vec_model(folder, family):
    kind, _, ctc = family.partition("-")
    name = {"wav2vec2": "Wav2Vec2", "hubert": "Hubert", "wavlm": "WavLM"}[kind]
    layer_norm = kind == "wavlm"  # the large models want an attention mask, the base models none
    config = getattr(transformers, f"{name}Config")(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(16,) * 7,
        vocab_size=32,
        pad_token_id=0,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer" if layer_norm else "group",
        do_stable_layer_norm=layer_norm,
    )
    model = getattr(transformers, f"{name}{'ForCTC' if ctc else 'Model'}")(config)
    if ctc:
        letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
        vocabulary = {letter: i for i, letter in enumerate(letters)}
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    extractor = transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=layer_norm, do_normalize=True
    )
    return model, extractor


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(
        description="Save a small random-weight LLM: to try commands before gigabytes of weights "
        "are downloaded."
    )
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder")
    parser.add_argument(
        "--tokenizer", help="a local folder or Hugging Face name; default: a toy tokenizer"
    )
    args = parser.parse_args()
    if os.path.lexists(args.folder):
        parser.error(f"{args.folder}: is there already; name a new folder")
    transformers.logging.disable_progress_bar()
    tokenizer = None
    if args.tokenizer:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
        except (OSError, ValueError) as error:
            parser.error(f"--tokenizer {args.tokenizer}: {str(error).splitlines()[0]}")
    print("saved", save_llm(args.folder, args.family, tokenizer))


def too_little_memory_at_first(function):
    """The function, but that the first call finds the GPU's memory too small; `.calls`: all."""
    calls = []

    def called(*args):
        calls.append(args)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")
        return function(*args)

    called.calls = calls
    return called
