"""The frozen speech encoder: audio in, frames out.

Shapes:  T encoder frames, D_encoder the encoder's width.
"""

import hashlib
import math
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCTC, AutoTokenizer

from data import SAMPLE_RATE
from files import UserError
from hub import TINY, load_or_explain
from parallel import DEVICE


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
