"""The tiny world's two models before training, and what stands before them.

A tokenizer and a Qwen2; a feature extractor, a character tokenizer and a Wav2Vec2-BERT.
transformers is imported where it is used: it takes seconds.
"""

import json
import random
import re
from collections import Counter

import torch

from . import world
from .pretrain_data import HESITATIONS, conversation

VOCABULARY = 640  # tokens, 256 of them bytes
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---- the LLM ----


def world_words(tasks):
    """{word or punctuation mark, with the space before it: how often 3000 conversations say it}."""
    rng = random.Random("tokenizer")
    stream = world.draws("tokenizer", held_out=False)
    said = Counter(["system", "user", "assistant"])
    for _ in range(3000):
        for message in conversation(rng, tasks, stream):
            said.update(re.findall(r" ?\w+|[^\w\s]", message["content"]))
    return said


def build_tokenizer(tasks):
    """Byte-level BPE of some hundred pieces: what is said often is one token, the rest up to three.

    So a word of speech cannot simply become the embedding of a word. Frequencies are flattened, or
    the prompts' rarer words would fall apart into letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    texts = []
    for word, count in sorted(world_words(tasks).items()):
        texts += [word] * max(1, round(count**0.3))
    for hesitation in HESITATIONS:  # one token each: blend_hesitations takes their places
        texts += [hesitation, " " + hesitation] * 100
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def build_llm(tokenizer):
    """A Qwen2 of 2.3 million random weights, 5 layers of width 192; its head is its own matrix.

    Every width is a multiple of 64: bitsandbytes unpacks others wrongly on a CPU.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=6,
        intermediate_size=448,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    llm = Qwen2ForCausalLM(config).to(DEVICE)
    llm.generation_config.do_sample = False
    return llm


class RoundToNF4(torch.nn.Module):
    """Straight-through rounding to NF4, the 4-bit grid the LLM is later loaded in.

    Trained with it, the LLM loses nothing by being loaded in 4 bits. NF4: arXiv 2305.14314, section
    3, as bitsandbytes has it, with double quantization; straight-through: arXiv 1308.3432.
    """

    def forward(self, weight):
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        with torch.no_grad():
            quantized, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            rounded = dequantize_4bit(quantized, state)
        return weight + (rounded - weight).detach()


# ---- the encoder ----


def build_processors(folder):
    """(feature extractor, character tokenizer) of the encoder, saved to `folder`.

    The extractor stacks 3 frames of 10 ms with 80 mel bins each: 240 features every 30 ms.
    """
    from transformers import SeamlessM4TFeatureExtractor, Wav2Vec2CTCTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    characters = ["<pad>", "<unk>", "|", "'", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {character: i for i, character in enumerate(characters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(folder / "vocab.json"),
        unk_token="<unk>",
        pad_token="<pad>",
        word_delimiter_token="|",
        bos_token=None,
        eos_token=None,
    )
    extractor = SeamlessM4TFeatureExtractor(feature_size=80, num_mel_bins=80, stride=3)
    tokenizer.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return extractor, tokenizer


def build_encoder(tokenizer):
    """A Wav2Vec2-BERT of 2 million random weights, 4 conformer layers of width 192, a CTC head."""
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertForCTC

    config = Wav2Vec2BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        feature_projection_input_dim=240,
        position_embeddings_type="rotary",
        conv_depthwise_kernel_size=15,
        max_source_positions=1000,
        add_adapter=False,
        apply_spec_augment=False,  # pretrain_data.mask_bands does it
        hidden_dropout=0.05,
        attention_dropout=0.05,
        activation_dropout=0.05,
        feat_proj_dropout=0.0,
        conformer_conv_dropout=0.05,
        final_dropout=0.0,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Wav2Vec2BertForCTC(config).to(DEVICE)
