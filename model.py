"""Frozen speech encoder + trainable connector + frozen 4-bit LLM = SpeechLLM.

Shapes:  B conversations, L positions, T encoder frames, N speech tokens, D the LLM's width, V its vocabulary.
"""

import hashlib
import logging
import math
import shutil
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.utils import enable_progress_bars
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoModelForCTC, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from connectors import Connector
from data import AUDIO_MARK, SAMPLE_RATE, Response, Speech, ask, chat_parts, check_messages, load_audio, render, tokenize_in_context
from files import UserError, read_json, timed, whole_file, write_json
from parallel import DEVICE

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)         # it warns of an optional kernel package it would load from the network
transformers_logging.disable_progress_bar()                        # loading weights takes seconds,
enable_progress_bars()                                             # but a download is seen
TINY = Path(__file__).with_name("tiny")                            # the tiny world's checkpoints, by the name "tiny"
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CHECKPOINT_FROM = 2.5e9      # parameters: from this size on gradient checkpointing is on unless told otherwise ("3B" models count 3.1e9)
IGNORE = -100                # label of a position without loss


def weights_id(name, kind):
    """Names the weights in a local model folder, or the revision of a hub name, so that other weights are noticed."""
    folder = TINY / kind if name == "tiny" else Path(name)
    if not folder.is_dir():
        load_or_explain(AutoConfig, name, {"llm": "LLM", "encoder": "speech encoder"}[kind])
        return Path(cached_file(name, "config.json")).parent.name          # …/snapshots/COMMIT/config.json
    hashed = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as content:                          # the end of a file holds weights, and a large file is not read whole
            content.seek(max(0, file.stat().st_size - 2**20))
            hashed.update(file.name.encode() + content.read())
    return hashed.hexdigest()[:12]


def named(name):
    """A local model folder as an absolute path; "tiny" and hub names as they are."""
    return str(Path(name).resolve()) if name != "tiny" and Path(name).exists() else name


# ---- the frozen speech encoder ----

class SpeechEncoder(nn.Module):
    """Any Hugging Face speech encoder (Whisper, WavLM, HuBERT, wav2vec 2.0, Parakeet, …) with its own feature extractor, frozen, in eval mode.

    One utterance at a time: nothing is padded, and what its extractor pads by itself is masked and cut off. `width` and `frame_rate` (frames a second)
    are read from the model by letting it hear noise. A CTC model keeps its head: `transcribe` is what the cascade hears.
    A Whisper encoder runs on the audio's own length (`pad_whisper`: on 30 s of padding, as it was trained; only the audio's frames are kept).
    """

    def __init__(self, name, pad_whisper=False):
        super().__init__()
        self.name, self.pad_whisper = str(name), pad_whisper
        name = TINY / "encoder" if name == "tiny" else name
        self.config = load_or_explain(AutoConfig, name, "speech encoder")
        self.extractor = load_or_explain(AutoFeatureExtractor, name, "speech encoder")
        if self.extractor.sampling_rate != SAMPLE_RATE:
            raise UserError(f"speech encoder {name}: hears {self.extractor.sampling_rate} Hz; encoders of {SAMPLE_RATE} Hz are supported")
        self.is_whisper = self.config.model_type == "whisper"
        self.head, self.ctc_tokenizer = None, None
        if self.is_whisper:
            from transformers.models.whisper.modeling_whisper import WhisperEncoder
            self.model = load_or_explain(WhisperEncoder, name, "speech encoder", dtype=torch.float32 if DEVICE == "cpu" else torch.float16,
                                         key_mapping={r"^(model\.)?encoder\.": ""})        # the decoder is never read
        elif any(a.endswith("ForCTC") for a in self.config.architectures or []):
            model = load_or_explain(AutoModelForCTC, name, "speech encoder", dtype=torch.float32)
            self.model = model.encoder if hasattr(model, "ctc_head") else model.base_model                     # Parakeet; the wav2vec 2.0 family
            self.head = model.ctc_head if hasattr(model, "ctc_head") else model.lm_head
            self.ctc_tokenizer = load_or_explain(AutoTokenizer, name, "speech encoder")
        else:
            model = load_or_explain(AutoModel, name, "speech encoder", dtype=torch.float32)
            self.model = getattr(model, "encoder", model) if self.config.is_encoder_decoder else model
        self.to(DEVICE).eval().requires_grad_(False)
        noise = np.random.default_rng(0).normal(0, 0.1, 13 * SAMPLE_RATE).astype(np.float32)
        try:
            short, long = self(noise[:SAMPLE_RATE]), self(noise)
            symbols = self.ctc(short).shape[1] if self.head else 0
        except Exception as error:                                 # parts that do not fit raise anything
            raise UserError(f"speech encoder {name}: its feature extractor and its model do not fit together "
                            f"({type(error).__name__}: {(str(error).splitlines() or [''])[0]})") from None
        if not torch.isfinite(long).all():
            raise UserError(f"speech encoder {name}: gives NaN or infinite frames; its weights are damaged")
        if self.head and (self.ctc_tokenizer.pad_token_id is None or max(self.ctc_tokenizer.get_vocab().values()) >= symbols):
            raise UserError(f"speech encoder {name}: its CTC vocabulary does not fit its CTC head of {symbols} symbols, or has no pad token")
        self.width, self.frame_rate = long.shape[1], (len(long) - len(short)) / 12

    @torch.no_grad()
    def forward(self, audio, name="the audio"):
        """float32 samples at SAMPLE_RATE -> frames (T, D_encoder) on the CPU, half precision. `name` is for error messages."""
        if self.is_whisper:                                        # it hears 30 s at a time: longer audio goes in as equal pieces
            pieces = np.array_split(audio, math.ceil(len(audio) / SAMPLE_RATE / self.extractor.chunk_length))
            return torch.cat([self.whisper(piece) for piece in pieces]).half().cpu()
        inputs = self.extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt").to(self.device)
        try:
            out = self.model(**inputs)
        except (RuntimeError, ValueError) as error:                # how convolutions say that the input is shorter than they are
            raise UserError(f"{name}: {len(audio) / SAMPLE_RATE:.2f} s of audio, which {self.name} cannot hear ({str(error).splitlines()[0]})") from None
        frames, mask = out.last_hidden_state[0], out.get("attention_mask", inputs.get("attention_mask"))       # (T, D_encoder)
        if mask is not None and mask.shape[1] == len(frames):      # a mask of frames, not of samples
            frames = frames[mask[0].bool()]
        return frames.half().cpu()

    def whisper(self, audio):
        """WhisperEncoder.forward of transformers without its check that the input is 30 s long: samples -> frames (T, D_encoder)."""
        mel = self.extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt",
                             padding="max_length" if self.pad_whisper else "longest")["input_features"].to(self.model.conv1.weight)    # (1, bins, 2T)
        x = F.gelu(self.model.conv1(mel))
        x = F.gelu(self.model.conv2(x)).transpose(1, 2)                                                                                # (1, T, D_encoder)
        x = x + self.model.embed_positions.weight[:x.shape[1]]
        for layer in self.model.layers:
            x = layer(x, None)
        return self.model.layer_norm(x)[0, :math.ceil(len(audio) / self.extractor.hop_length / 2)]

    @torch.no_grad()
    def ctc(self, frames):
        """frames (T, D_encoder) -> log-probabilities of the CTC vocabulary (T, V) on the CPU."""
        return self.head(frames.float().to(self.device)[None])[0].log_softmax(-1).cpu()

    def transcribe(self, frames):
        """Greedy CTC: frames (T, D_encoder) -> text."""
        return self.ctc_tokenizer.decode(self.ctc(frames).argmax(-1).tolist())

    @property
    def device(self):
        return next(self.model.parameters()).device

    @cached_property
    def key(self):
        """Names what determines the frames: samples of every weight, the feature extractor, and the padding option."""
        samples = [p.flatten()[::max(1, p.numel() // 1024)].float().cpu().numpy().tobytes() for p in self.model.state_dict().values()]
        return hashlib.sha256(b"".join(samples) + repr((self.extractor.to_dict(), self.pad_whisper)).encode()).hexdigest()[:12]


shared_encoder = lru_cache(maxsize=2)(SpeechEncoder)                # it is frozen, so the steps of one process share it; the LLM likewise


def load_tensors(path, advice="delete it and run again"):
    """The tensors of a safetensors file; UserError if it is not whole."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: is no readable safetensors file ({error}); {advice}") from None


# ---- the frozen LLM ----

def load_or_explain(auto_class, name, what, **options):
    """auto_class.from_pretrained with an error for people; weights come from safetensors only and must be whole, code comes from transformers only."""
    try:
        options["trust_remote_code"] = False                       # unset, transformers would ask on the terminal, and run what comes with the weights
        if "dtype" not in options:
            return auto_class.from_pretrained(name, **options)
        model, found = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
        lost = sorted(str(key) for key in [*found["missing_keys"], *found["mismatched_keys"]] if "masked_spec_embed" not in str(key))    # of pre-training only
        if lost:
            raise ValueError(f"its weights are not whole: {len(lost)} tensors are missing or of another shape, like {lost[0]}")
        return model
    except Exception as error:                                     # damaged files raise anything
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {name}: cannot be loaded as a Hugging Face checkpoint, local folder or hub name ({why})") from None


def compute_precision(precision="auto"):
    """What the LLM computes in, a key of PRECISIONS; "auto": bf16 on a GPU that has it, fp16 on an older one, fp32 on a CPU."""
    if precision != "auto":
        return precision
    return "fp32" if DEVICE == "cpu" else "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def load_llm(name, bits=4, precision="auto"):
    """(LLM frozen and in eval mode, tokenizer). bits: 4 = NF4 with double quantization, 8 = LLM.int8, 16 = not quantized."""
    name = TINY / "llm" if name == "tiny" else name
    compute = PRECISIONS[compute_precision(precision)]
    quantization = None
    if bits != 16:
        try:
            import bitsandbytes  # noqa: F401
            quantization = BitsAndBytesConfig(load_in_8bit=True) if bits == 8 else BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute)
        except (ImportError, OSError, RuntimeError) as error:
            print(f"bitsandbytes does not work on this machine ({type(error).__name__}): the LLM runs unquantized, in {compute}")
    tokenizer = load_or_explain(AutoTokenizer, name, "LLM")
    vocabulary = len(tokenizer)
    if not tokenizer.chat_template:
        raise UserError(f"LLM {name}: its tokenizer has no chat template; choose an instruction-tuned model")
    if not tokenizer("a b")["input_ids"]:
        raise UserError(f"LLM {name}: its tokenizer is empty; is tokenizer.json missing?")
    if not tokenizer.is_fast:
        raise UserError(f"LLM {name}: its tokenizer gives no character offsets, which interleaving needs; it must have a tokenizer.json")
    try:
        end_of_turn(tokenizer)
        chat_parts(tokenizer, ask("Who did it, and when?"), [[]])
    except (UserError, IndexError) as error:
        raise UserError(f"LLM {name}: its chat template cannot be used ({error})") from None
    llm = load_or_explain(AutoModelForCausalLM, name, "LLM", dtype=compute, quantization_config=quantization, device_map={"": DEVICE})
    for module in llm.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first call without gradients, into a kernel that has no backward
        # and other rounding. One set of weights for training and generation:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if vocabulary > len(llm.get_input_embeddings().weight):
        raise UserError(f"LLM {name}: its tokenizer has {vocabulary} tokens, but its weights only {len(llm.get_input_embeddings().weight)} embeddings")
    # Greedy decoding and nothing else, whatever sampling or penalties the checkpoint recommends; its end tokens are kept.
    llm.generation_config = GenerationConfig(eos_token_id=llm.generation_config.eos_token_id)
    return llm.eval().requires_grad_(False), tokenizer


@lru_cache(maxsize=1)
def shared_llm(name, bits, precision="auto"):
    with timed("load the LLM"):
        return load_llm(name, bits, precision)


def fingerprint(llm, tokenizer):
    """Tells one LLM from another by what is never quantized: its shape, its vocabulary, a slice of its embeddings, its norms."""
    text = llm.config.get_text_config()                            # of a model that also sees, the part that reads
    weights = [llm.get_input_embeddings().weight[:64], *(p for name, p in llm.named_parameters() if "norm" in name)]
    samples = b"".join(w.to(torch.bfloat16).float().cpu().numpy().tobytes() for w in weights)      # the same whatever precision it was loaded in
    return hashlib.sha256(samples + repr((text.hidden_size, text.num_hidden_layers, tokenizer.vocab_size)).encode()).hexdigest()[:12]


def end_of_turn(tokenizer):
    """The token the chat template puts after an answer: the first of its special tokens there."""
    after = render(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": AUDIO_MARK}], add_generation_prompt=False)
    ids = tokenize_in_context(tokenizer, after.rsplit(AUDIO_MARK, 1)[1])[0]
    return next((i for i in ids if i in tokenizer.added_tokens_decoder), ids[0] if ids else tokenizer.eos_token_id)


def embedding_rms(llm):
    """Root mean square of the LLM's input embeddings as its layers see them (Gemma scales them on the way), over up to 4096 tokens."""
    table = llm.get_input_embeddings()
    with torch.no_grad():
        return table(torch.arange(0, len(table.weight), -(-len(table.weight) // 4096), device=DEVICE)).float().pow(2).mean().sqrt()


def with_lora(llm, rank):
    """The LLM with a LoRA adapter of this rank on all its linear layers, the only part of it that is trained; the LLM itself for rank 0."""
    if not rank:
        return llm
    from peft import LoraConfig, get_peft_model
    return get_peft_model(llm, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"))


def checkpoint_gradients(llm):
    """Let the LLM keep only what goes into each of its layers, and compute the rest again in the backward pass; returns the layers that do so.

    They do it while their own flag `training` is set; what is inside them stays in eval mode.
    """
    try:
        llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    except ValueError as error:
        raise UserError(f"this LLM has no gradient checkpointing; say --gradient-checkpointing off ({str(error).splitlines()[0]})") from None
    return [m for m in llm.modules() if isinstance(m, GradientCheckpointingLayer)]


# ---- the speech LLM ----

class SpeechLLM(nn.Module):
    """forward() in five sentences: text parts are embedded by the LLM's own table; speech parts by the connector; both are spliced in order;
    the LLM reads them; only the response is scored."""

    def __init__(self, llm, tokenizer, encoder=None, connector=None, lora=0):
        super().__init__()
        self.llm, self.tokenizer, self.encoder, self.connector, self.checkpointed = llm, tokenizer, encoder, connector, []
        self.eot, self.fingerprint, self.lora = end_of_turn(tokenizer), fingerprint(llm, tokenizer), lora
        ends = llm.generation_config.eos_token_id
        self.ends = sorted({self.eot, tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None})
        self.llm = with_lora(llm, lora)

    def train(self, mode=True):
        """The LLM and the encoder stay in eval mode whatever happens."""
        super().train(False)
        if self.connector is not None:
            self.connector.train(mode)
        for layer in self.checkpointed:
            layer.training = mode
        return self

    def checkpoint_gradients(self):
        """Less memory and a third more time for training."""
        self.checkpointed = checkpoint_gradients(self.llm)
        return self

    def trainable(self):
        """{name: parameter} of what training changes: the connector, and the LoRA adapter if there is one."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def embed(self, batch):
        """Parts -> (embeddings (B, L, D), attention mask (B, L), labels (B, L)). The one place where text and speech are spliced.

        [Text of 9 ids, Speech of 60 frames, Text of 4 ids, Response of 3 ids], k = 6  ->  9 + 10 + 4 + 3 = 26 rows of D; the last 3 are labelled.

        Padded on the left, so that the answers of all rows end at the right edge, where generation goes on and the loss is read.
        """
        table = self.llm.get_input_embeddings()
        ids = [i for parts in batch for part in parts if not isinstance(part, Speech) for i in part.ids]
        text = iter(table(torch.tensor(ids, device=DEVICE)).split([len(p.ids) for parts in batch for p in parts if not isinstance(p, Speech)]))
        speech = iter(self.connector([p.frames.to(DEVICE) for parts in batch for p in parts if isinstance(p, Speech)]) if self.connector else [])
        rows = [torch.cat([(next(speech) if isinstance(p, Speech) else next(text)).to(table.weight.dtype) for p in parts]) for parts in batch]
        length = max(map(len, rows))
        embeds = torch.stack([F.pad(row, (0, 0, length - len(row), 0)) for row in rows])                                    # (B, L, D)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=DEVICE)                    # (B, L)
        answers = [parts[-1].ids if isinstance(parts[-1], Response) else [] for parts in batch]
        labels = torch.tensor([[IGNORE] * (length - len(a)) + a for a in answers], device=DEVICE)                           # (B, L)
        return embeds, mask, labels

    def logits(self, batch):
        """(logits (R, V) that predict the R response tokens of the batch, those tokens (R)): the vocabulary projection runs at no other position."""
        embeds, mask, labels = self.embed(batch)
        positions, answered = (mask.cumsum(1) - 1).clamp(min=0), labels[:, 1:] != IGNORE      # one position predicts the next
        hook = self.llm.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0][:, :-1][answered],))      # (B, L, D) -> (R, D)
        try:
            out = self.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False)
        finally:
            hook.remove()
        return out.logits.float(), labels[:, 1:][answered]

    def forward(self, batch, teacher=None):
        """The loss of conversations that end in a Response, summed over response tokens.

        teacher: the same conversations with the transcript as text; then the loss is KL(LLM reading text || LLM hearing speech).
        """
        logits, labels = self.logits(batch)
        if teacher is None:
            return F.cross_entropy(logits, labels, reduction="sum")
        with torch.no_grad():
            target = self.logits(teacher)[0].log_softmax(-1)
        return F.kl_div(logits.log_softmax(-1), target, reduction="sum", log_target=True)

    @torch.no_grad()
    def generate_rows(self, batch, max_new_tokens=64):
        """Greedy answers to open conversations: parts -> [(text, did it end by itself)]."""
        embeds, mask, _ = self.embed(batch)
        rows = self.llm.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False,
                                 eos_token_id=self.ends, pad_token_id=self.eot).tolist()
        lengths = [next((i for i, token in enumerate(row) if token in self.ends), None) for row in rows]
        texts = self.tokenizer.batch_decode([row[:n] for row, n in zip(rows, lengths)], skip_special_tokens=True)
        # an answer that was cut off may end in half a character
        return [(text.strip() if n is not None else text.rstrip("\ufffd").strip(), n is not None) for text, n in zip(texts, lengths)]

    def generate(self, batch, max_new_tokens=64):
        """The texts of generate_rows."""
        return [text for text, _ in self.generate_rows(batch, max_new_tokens)]

    def answer(self, question, audio=None, max_new_tokens=64):
        """The answer to a question about a sound file; or to a whole conversation in the Hugging Face message format (audio entries hold a path)."""
        messages = ask(question, audio) if isinstance(question, str) else question
        check_messages(messages)
        paths = [c["audio"] for m in messages if not isinstance(m["content"], str) for c in m["content"] if c["type"] == "audio"]
        heard = [[Speech(self.encoder(load_audio(path), path))] for path in paths]
        return self.generate([chat_parts(self.tokenizer, messages, heard)], max_new_tokens)[0]

    def response(self, text, ended=True):
        """The token ids to imitate: the answer and, unless it was cut off, the end of its turn."""
        return Response(tokenize_in_context(self.tokenizer, text)[0] + [self.eot] * ended)

    # -- a run folder holds the connector (and the adapter), and names the LLM and the encoder --

    def save(self, folder, spec):
        """Write connector.safetensors (and adapter/) and what is needed to load them again."""
        with whole_file(Path(folder) / "connector.safetensors") as temporary:
            save_file({k: v.contiguous() for k, v in self.connector.state_dict().items()}, temporary)
        if self.lora:                                              # a folder that PEFT loads by itself
            written, adapter = Path(folder) / ".adapter", Path(folder) / "adapter"
            self.llm.save_pretrained(written, save_embedding_layers=False)
            shutil.rmtree(adapter, ignore_errors=True)
            written.rename(adapter)
        write_json(Path(folder) / "model.json", {**spec, "llm_fingerprint": self.fingerprint, "encoder_key": self.encoder.key})

    @classmethod
    def build(cls, spec, llm=None, encoder=None, seed=0, precision="auto"):
        """A SpeechLLM from its spec: llm, bits, encoder, pad_whisper, connector, k, hidden, lora. Pass loaded models to share them."""
        llm, tokenizer = llm or load_llm(spec["llm"], spec["bits"], precision)
        encoder = encoder or SpeechEncoder(spec["encoder"], spec["pad_whisper"])
        torch.manual_seed(seed)                                    # after loading, which may draw random numbers itself
        connector = Connector(spec["connector"], encoder.width, llm.get_input_embeddings().weight.shape[1], spec["k"], spec["hidden"], embedding_rms(llm))
        return cls(llm, tokenizer, encoder, connector.to(DEVICE), spec["lora"])

    @classmethod
    def from_pretrained(cls, folder, llm=None, encoder=None, precision="auto"):
        """Load what save() wrote (RUN/<recipe>). UserError if it was trained for another LLM or another encoder."""
        folder = Path(folder)
        spec = read_json(folder / "model.json", "llm", "bits", "encoder", "pad_whisper", "connector", "k", "hidden", "lora", "llm_fingerprint",
                         "encoder_key")
        try:
            model = cls.build(spec, llm, encoder, precision=precision)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            raise UserError(f"{folder / 'model.json'}: is not what training writes there ({error}); train again with --force") from None
        for what, name, now, then in (("LLM", spec["llm"], model.fingerprint, spec["llm_fingerprint"]),
                                      ("speech encoder", spec["encoder"], model.encoder.key, spec["encoder_key"])):
            if now != then:
                raise UserError(f"{folder}: its connector was trained for another {what} than the one that is now at {name}; train again with --force")
        try:
            tensors = load_tensors(folder / "connector.safetensors", "train again with --force")
            model.connector.load_state_dict(tensors)
            if spec["lora"]:
                from peft import get_peft_model_state_dict, set_peft_model_state_dict
                adapter = load_tensors(folder / "adapter" / "adapter_model.safetensors", "train again with --force")
                if set(adapter) != set(get_peft_model_state_dict(model.llm)):
                    raise ValueError("its adapter is not whole")
                set_peft_model_state_dict(model.llm, adapter)
                tensors |= adapter
            if not all(torch.isfinite(t).all() for t in tensors.values()):
                raise ValueError("it holds NaN or infinite weights")
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{folder}: the connector cannot be loaded ({str(error).splitlines()[0]}); train again with --force") from None
        return model.train(False)
