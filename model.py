"""Frozen speech encoder + trainable connector + frozen 4-bit LLM = SpeechLLM.

Shapes, in the whole file:

    B conversations     L positions      T encoder frames     N = ceil(T / k) speech tokens
    V vocabulary        R response tokens of a batch (in docs/method.md: of a step)
    D_encoder and D, the widths of the encoder and of the LLM

In encoders and connectors B counts recordings and spans of speech, of which a conversation may have
several, and W the windows of k frames that speech tokens are made of.
"""

import math
import sys
from contextlib import nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import support  # noqa: F401  first: torch reads what it sets
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoFeatureExtractor, AutoTokenizer, GenerationConfig

from data import FULL, SAMPLE_RATE, Response, Speech, chat_parts, dialogue, load_audio
from data import user_turn
from support.chat_template import control_tokens, end_of_turn
from support.checks import check_messages
from support.console import is_out_of_memory, timed
from support.files import UserError, ceil_div, explained, first_line
from support.files import whole_file, write_json
from support.frames import keep_frames
from support.hub import COMPUTE_AGAIN, PackedHead, absolute_if_local, check_frames, check_row_widths
from support.hub import check_reads_embeddings, check_tokenizer, check_vocabulary, checkpoint_path
from support.hub import checkpointed_layers
from support.hub import fingerprint_of_llm, fingerprint_of_tensors, fingerprint_of_weights
from support.hub import free_memory, has_packed_head, keep_embeddings_on_host, load_adapter
from support.hub import load_in_places, load_or_explain, load_speech_model, load_tensors
from support.hub import local_or_fetched, modules_with_weights, pack_head, pinned, save_adapter
from support.hub import stay_on_the_card
from support.processes import DEVICE, first_process
from support.recognizer import Recognizer, encoder_behind, fingerprint_of_recognizer
from support.recognizer import is_recognizer, open_recognizer
from support.runs import fingerprint_of_training, read_spec
from support.states import TRAINED

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WIDE = 512  # an LLM of this width computes in bf16 on a CPU that has it; the tiny one has 192
IGNORE = -100  # label of a position without loss
DROPOUT = 0.1  # of connectors: little speech is soon learned by heart


# ---- the frozen speech encoder: audio in, frames out ----


class SpeechEncoder(Protocol):
    """What a speech encoder must be; ENCODERS names those that are no Hugging Face checkpoint.

    One that has clip(), hear_together() and `seconds_at_once` as well, like HuggingFaceEncoder,
    hears clips of the same `shape` together where there is a GPU; any other, one at a time.
    """

    name: str
    width: int  # D_encoder
    frame_rate: float  # frames a second
    fingerprint: str  # names what determines the frames
    can_transcribe: bool  # has it a CTC head? then it is a CTCEncoder, too

    def __call__(self, samples, name="the audio"):
        """float32 samples at SAMPLE_RATE -> frames (T, D_encoder), half precision, on the CPU.

        `name` is for error messages.
        """

    def to(self, device):
        """Move the weights to a device."""


class CTCEncoder(SpeechEncoder, Protocol):
    """What the cascade and `word-times` ask of an encoder in addition."""

    ctc_fingerprint: str  # names what determines the transcripts
    ctc_tokenizer: object  # of the head's vocabulary, with a pad token, which is the blank
    ctc_delay: float  # seconds from when a letter was said to when the head names it; 0: not known

    def ctc(self, frames):
        """frames (T, D_encoder) -> log-probabilities (T, V_ctc)."""

    def transcribe(self, frames):
        """frames (T, D_encoder) -> text."""


ENCODERS = {}  # name -> a class whose objects are SpeechEncoders; docs/extend.md adds one


def load_encoder(name, pad_whisper=False):
    """The encoder of this name; it is frozen, so the commands of one process share it."""
    return shared_encoder(name, pad_whisper)


@lru_cache(maxsize=2)  # it takes f(name) and f(name, False) for two: load_encoder always gives both
def shared_encoder(name, pad_whisper):
    if name in ENCODERS:
        return ENCODERS[name]()
    if is_recognizer(name):  # its encoder, with a head of our own
        spec = encoder_behind(name)
        return open_recognizer(name, load_encoder(spec["encoder"], spec["pad_whisper"]))
    return HuggingFaceEncoder(name, pad_whisper)


def pinned_encoder(name, before=""):
    """The name by which an encoder is the same tomorrow; before: see hub.pinned."""
    name = absolute_if_local(name)
    return name if name in ENCODERS or is_recognizer(name) else pinned(name, "encoder", before)


def fingerprint_of_encoder(name):
    """Names the weights of an encoder, without loading them where they are a checkpoint."""
    if name in ENCODERS:
        return load_encoder(name).fingerprint
    if is_recognizer(name):
        return fingerprint_of_recognizer(name, encoder_behind(name)["encoder_fingerprint"])
    return fingerprint_of_weights(name, "encoder")


def encode_all(encoder, utterances, folder, keep="disk"):
    """{utterance id: frames (T, D_encoder)} of all utterances, made once; see support/frames.py."""

    def load(utterance):
        return load_audio(utterance.audio, utterance.duration)

    if isinstance(encoder, Recognizer):
        encoder = encoder.encoder  # whose frames they are
    return keep_frames(encoder, load, utterances, folder, keep)


class Features(NamedTuple):
    """What the model is given of a piece of sound, on the CPU."""

    inputs: dict  # {name: tensor (1, ...)}, as the feature extractor makes them
    samples: int  # how many they were made of


class Clip(NamedTuple):
    """What an encoder hears of one recording."""

    name: str  # for error messages
    pieces: list  # Features; more than one where the recording is longer than Whisper hears at once

    @property
    def shape(self):
        """Clips of the same shape can be heard together: none of them has to be padded or cut."""
        shapes = []
        for piece in self.pieces:
            shapes.append({name: tensor.shape for name, tensor in piece.inputs.items()})
        return shapes


class HuggingFaceEncoder(nn.Module):
    """Whisper, WavLM, HuBERT, wav2vec 2.0, Parakeet, … with its own feature extractor, frozen.

    Nothing is padded: only clips of the same shape are heard together, so the frames are, but for
    rounding, those of each alone. What its extractor pads by itself is masked and cut off. `width`
    and `frame_rate` are read from the model by letting it hear noise. A CTC model keeps its head:
    `transcribe` is what the cascade hears. A Whisper encoder runs on the audio's own length
    (`pad_whisper`: on 30 s of padding, as it was trained; only the audio's frames are kept). Where
    a GPU's memory does not suffice, for its weights or for what it hears, it hears on the CPU, and
    stays there.
    """

    left_gpu = False  # did it have to?
    seconds_at_once = 120.0  # of sound: eight clips of 15 s

    def __init__(self, name, pad_whisper=False):
        super().__init__()
        stay_on_the_card()
        self.name = str(name)
        self.pad_whisper = pad_whisper
        where = checkpoint_path(name, "encoder")
        self.config = load_or_explain(AutoConfig, where, "speech encoder")
        self.extractor = load_or_explain(AutoFeatureExtractor, where, "speech encoder")
        if self.extractor.sampling_rate != SAMPLE_RATE:
            raise UserError(
                f"speech encoder {where}: hears {self.extractor.sampling_rate} Hz; encoders of "
                f"{SAMPLE_RATE} Hz are supported"
            )
        self.is_whisper = self.config.model_type == "whisper"
        self.model, self.head, self.ctc_tokenizer = load_speech_model(self.config, where)
        self.eval().requires_grad_(False).to(DEVICE)
        self.measure()

    def to(self, device):
        """Move the weights to a device; to no GPU any more once one had too little memory."""
        if self.left_gpu:
            return self
        try:
            return super().to(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        # outside the except, where the error's traceback would keep the tensors that found no room
        return self.leave_gpu(f"{self.name}: out of memory", why)

    def _apply(self, fn, recurse=True):
        """Move or cast, as to() and float() do, what a module remembers of the last clip, too.

        Such as rotary angles, which are neither parameters nor buffers.
        """
        super()._apply(fn, recurse)
        for module in self.modules():
            for key, value in vars(module).items():
                if isinstance(value, torch.Tensor):
                    setattr(module, key, fn(value))
        return self

    def leave_gpu(self, what, why):
        """To the CPU, for good; what, and why: what is said of it."""
        tqdm.write(
            f"{what} ({why}); from here on it hears on the CPU, slower, and to the same frames but "
            "for rounding",
            file=sys.stderr,
        )
        super().to("cpu")
        self.fingerprint  # noqa: B018  kept from now on: float() changes what it is taken of
        self.float()
        self.left_gpu, self.seconds_at_once = True, 0.0
        torch.cuda.empty_cache()
        return self

    def measure(self):
        """Read width and frame rate off what the model makes of noise."""
        noise = np.random.default_rng(0).normal(0, 0.1, 13 * SAMPLE_RATE).astype(np.float32)
        with explained(f"speech encoder {self.name}: its parts do not fit together", Exception):
            short, long = self(noise[:SAMPLE_RATE]), self(noise)  # of 1 s and of 13 s
            symbols = self.ctc(short).shape[1] if self.can_transcribe else 0
        check_frames(self.name, long, self.ctc_tokenizer, symbols)
        self.width = long.shape[1]
        self.frame_rate = (len(long) - len(short)) / 12

    def forward(self, samples, name="the audio"):
        """float32 samples at SAMPLE_RATE -> frames (T, D_encoder), half precision, on the CPU."""
        return self.hear_together([self.clip(samples, name)])[0]

    def clip(self, samples, name):
        """float32 samples at SAMPLE_RATE -> the Clip that hear_together() takes.

        It needs no GPU, and several threads may do it at once.
        """
        n_pieces, options = 1, {}
        if self.is_whisper:
            # it hears 30 s at a time: longer audio goes in as equal pieces
            seconds = len(samples) / SAMPLE_RATE
            n_pieces = math.ceil(seconds / self.extractor.chunk_length)
            options["padding"] = "max_length" if self.pad_whisper else "longest"
        pieces = []
        for piece in np.array_split(samples, n_pieces):
            inputs = self.extractor(
                piece, sampling_rate=SAMPLE_RATE, return_tensors="pt", **options
            )
            pieces.append(Features(dict(inputs), len(piece)))
        return Clip(name, pieces)

    def hear_together(self, clips):
        """Clips of one shape -> [frames (T, D_encoder), half precision, on the CPU].

        Where a GPU's memory does not suffice, half as many at once; for one alone, on the CPU.
        """
        try:
            return self.hear(clips)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        if len(clips) == 1:
            what = f"{clips[0].name}: out of memory for {self.name}"
            return self.leave_gpu(what, why).hear(clips)
        torch.cuda.empty_cache()
        self.seconds_at_once /= 2
        tqdm.write(
            f"out of memory with {len(clips)} clips at once ({why}): from here on at most "
            f"{self.seconds_at_once:g} s of sound together",
            file=sys.stderr,
        )
        half = len(clips) // 2
        return self.hear_together(clips[:half]) + self.hear_together(clips[half:])

    @torch.no_grad()
    def hear(self, clips):
        """What hear_together() returns, computed where the weights are."""
        through = self.whisper if self.is_whisper else self.any_other
        heard = [[] for _ in clips]
        for i in range(len(clips[0].pieces)):  # as many in each clip: they have one shape
            together = [clip.pieces[i] for clip in clips]
            for own, frames in zip(heard, through(together, clips[0].name)):
                own.append(frames)
        return [torch.cat(own) for own in heard]  # (T, D_encoder) each

    def any_other(self, pieces, name):
        """B Features of one shape -> [frames (T, D_encoder)]."""
        inputs = {}
        for key in pieces[0].inputs:
            inputs[key] = torch.cat([p.inputs[key] for p in pieces]).to(self.device)  # (B, ...)
        try:
            out = self.model(**inputs)
        except (RuntimeError, ValueError) as error:
            if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
                raise  # which says nothing of the clip
            # how convolutions say that the input is shorter than they are
            raise UserError(
                f"{name}: {pieces[0].samples / SAMPLE_RATE:.2f} s of audio, which {self.name} "
                f"cannot hear ({first_line(error)})"
            ) from None
        frames = out.last_hidden_state.half().cpu()  # (B, T, D_encoder)
        mask = out.get("attention_mask", inputs.get("attention_mask"))
        if mask is None or mask.shape[1] != frames.shape[1]:  # a mask of samples, not of frames
            return list(frames)
        return [row[kept] for row, kept in zip(frames, mask.bool().cpu())]

    def whisper(self, pieces, _):
        """B Features of one shape -> [frames (T, D_encoder)].

        WhisperEncoder.forward of transformers without its check that the input is 30 s long.
        """
        mel = torch.cat([piece.inputs["input_features"] for piece in pieces])  # (B, mel bins, 2T)
        x = F.gelu(self.model.conv1(mel.to(self.model.conv1.weight)))  # (B, D_encoder, 2T)
        x = F.gelu(self.model.conv2(x)).transpose(1, 2)  # (B, T, D_encoder)
        x = x + self.model.embed_positions.weight[: x.shape[1]]
        for layer in self.model.layers:
            x = layer(x, None)
        frames = self.model.layer_norm(x).half().cpu()  # (B, T, D_encoder)
        heard = []
        for row, piece in zip(frames, pieces):
            spoken = math.ceil(piece.samples / self.extractor.hop_length / 2)
            heard.append(row[:spoken])  # the frames of the audio
        return heard

    # -- what the cascade and word times need --

    @property
    def can_transcribe(self):
        return self.head is not None

    @property
    def ctc_delay(self):
        """As measured on espeak-ng's own word times and recorded in the tiny encoder's config."""
        return getattr(self.config, "ctc_delay", 0.0)

    @cached_property
    def ctc_fingerprint(self):
        """Of all that determines the transcripts: the head, too, and what its outputs stand for."""
        symbols = sorted(self.ctc_tokenizer.get_vocab().items())
        head = self.head.state_dict().values()
        return fingerprint_of_tensors(head, (self.fingerprint, symbols))

    @torch.no_grad()
    def ctc(self, frames):
        """frames (T, D_encoder) -> log-probabilities (T, V_ctc) of the CTC vocabulary."""
        scores = self.head(frames.float().to(self.device)[None])[0]  # (T, V_ctc)
        return scores.log_softmax(-1).cpu()

    def transcribe(self, frames):
        """Greedy CTC: frames (T, D_encoder) -> text."""
        return self.ctc_tokenizer.decode(self.ctc(frames).argmax(-1).tolist())

    @property
    def device(self):
        return next(self.model.parameters()).device

    @cached_property
    def fingerprint(self):
        """Of the weights, the feature extractor, and the padding option."""
        weights = self.model.state_dict().values()
        if self.is_whisper:  # whose weights are fp16 on a GPU and fp32 on a CPU
            weights = (w.half() for w in weights)
        return fingerprint_of_tensors(weights, (self.extractor.to_dict(), self.pad_whisper))


# ---- connectors: encoder frames in, speech tokens out; what stage 2 trains ----
#
# A connector is one class here and one entry of CONNECTORS.


class ConnectorBody(nn.Module):
    """What connectors have in common: their defaults for k, the hidden width, the learning rate.

    Each is made as kind(width_in, width_out, k, hidden): the frames' width D_encoder, the LLM's D,
    frames per speech token, and a width inside.
    """

    heads = 1  # attention heads, of which the hidden width is a multiple
    lr_share = 1.0  # times the usual peak learning rate, which train.py works out
    k_is_a_power_of_two = False
    # Is a token made of its own k frames, and of no others? Then forward() gets windows
    # (W, k, D_encoder), those of all spans of a batch, and gives (W, D); else it gets spans that
    # have equally many tokens, (B, N * k, D_encoder), and gives (B, N, D).
    windows_apart = False
    widening = 4  # the hidden width: so many times the LLM's width,
    multiple_of = 1  # rounded up to a multiple of this,
    widest = 2048  # and at most this

    @classmethod
    def check(cls, k=None, hidden=None):
        """UserError if it cannot be made with these; None: whatever is derived."""
        if cls.k_is_a_power_of_two and k and k & (k - 1):
            raise UserError(
                f"the connector halves the frame rate, so --k must be a power of two, not {k}"
            )
        if hidden and hidden % cls.heads:
            raise UserError(
                f"the connector has {cls.heads} attention heads, so --hidden must be a multiple of "
                f"{cls.heads}, not {hidden}"
            )

    @classmethod
    def frames_per_token(cls, frame_rate, tokens_per_second):
        """k, for about so many speech tokens a second of speech."""
        k = max(1.0, frame_rate / tokens_per_second)
        return 2 ** round(math.log2(k)) if cls.k_is_a_power_of_two else round(k)

    @classmethod
    def hidden_width(cls, llm_width):
        """(hidden width, the reason)."""
        width = ceil_div(cls.widening * llm_width, cls.multiple_of) * cls.multiple_of
        why = f"{cls.widening} x the LLM's width of {llm_width}"
        if cls.multiple_of > 1:
            why += f", as a multiple of {cls.multiple_of}"
        return min(cls.widest, width), f"{why}, at most {cls.widest}"


class StackMLP(ConnectorBody):
    """The k frames of a window side by side, then a two-layer MLP (as in SLAM-ASR, 2402.08846).

    windows (W, k, D_encoder) -> (W, k * D_encoder) -> LayerNorm, MLP -> (W, D)
    """

    windows_apart = True

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(k * width_in)
        self.mlp = nn.Sequential(
            nn.Dropout(DROPOUT),
            nn.Linear(k * width_in, hidden),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, width_out),
        )

    def forward(self, windows):
        stacked = windows.flatten(1)  # (W, k * D_encoder)
        return self.mlp(self.norm(stacked))  # (W, D)


class Conv(ConnectorBody):
    """Strided 1-d convolutions, each halving the rate, then a two-layer MLP with a residual.

    After BLSP (arXiv 2309.00916); docs/papers.md says how it differs from the authors' code.

    frames (B, N * k, D_encoder) -> log2(k) convolutions of stride 2 -> (B, N, D_encoder)
    -> (B, N, D)
    """

    k_is_a_power_of_two = True

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.check(k, hidden)
        halvings = int(math.log2(k))
        self.convs = nn.ModuleList(
            nn.Conv1d(width_in, width_in, 5, stride=2, padding=2) for _ in range(halvings)
        )
        self.project = nn.Linear(width_in, width_out)
        self.norm = nn.LayerNorm(width_out)
        self.adapter = nn.Sequential(
            nn.Linear(width_out, hidden),
            nn.GELU(),
            nn.Dropout(DROPOUT),
            nn.Linear(hidden, width_out),
        )

    def forward(self, x):
        for conv in self.convs:
            x = F.gelu(conv(x.transpose(1, 2))).transpose(1, 2)  # (B, half as many, D_encoder)
        x = self.norm(self.project(x))  # (B, N, D)
        return x + self.adapter(x)  # (B, N, D)


class QFormer(ConnectorBody):
    """A learned query reads each window of k frames through two Transformer layers.

    After the window-level Q-Former of SALMONN (arXiv 2310.13289), as Self-Powered LSM has one
    (arXiv 2410.03798); docs/papers.md says what we know of it.

    windows (W, k, D_encoder) -> (W, k, hidden)
    -> one query each, cross-attention -> (W, 1, hidden) -> (W, D)
    """

    heads, n_layers = 8, 2
    lr_share = 0.25
    windows_apart = True
    widening, multiple_of, widest = 1, 64, 1024

    def __init__(self, width_in, width_out, k, hidden):
        super().__init__()
        self.check(k, hidden)
        self.norm = nn.LayerNorm(width_in)
        self.enter = nn.Linear(width_in, hidden)
        # of a frame in its window: attention alone knows no order
        self.position = nn.Parameter(0.02 * torch.randn(k, hidden))
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, hidden))
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                hidden, self.heads, 2 * hidden, DROPOUT, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(self.n_layers)
        )
        self.leave = nn.Linear(hidden, width_out)

    def forward(self, windows):
        frames = self.enter(self.norm(windows)) + self.position  # (W, k, hidden)
        queries = self.query.expand(len(windows), -1, -1)  # (W, 1, hidden)
        for layer in self.layers:
            queries = layer(queries, frames)  # (W, 1, hidden)
        return self.leave(queries).squeeze(1)  # (W, D)


CONNECTORS = {"stack-mlp": StackMLP, "conv": Conv, "qformer": QFormer}


def connector_class(kind):
    if kind not in CONNECTORS:
        raise UserError(f"there is no connector {kind!r}; there are {', '.join(CONNECTORS)}")
    return CONNECTORS[kind]


def check_size(kind, width_in, width_out, k, hidden, copies=1):
    """UserError if so many copies of a connector's weights do not fit the memory that is free."""
    with torch.device("meta"):  # weights that have a size and take no memory
        body = connector_class(kind)(width_in, width_out, k, hidden)
    weights = sum(p.numel() * p.element_size() for p in body.parameters())
    needed = copies * weights
    if torch.device(DEVICE).type == "cuda":
        kept = torch.cuda.memory_reserved(DEVICE) - torch.cuda.memory_allocated(DEVICE)
        free = torch.cuda.mem_get_info(DEVICE)[0] + kept  # what torch keeps for later use is free
    else:
        free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"a {kind} connector with --k {k} and --hidden {hidden} takes {needed / 1e9:.3g} GB, "
            f"and {free / 1e9:.3g} GB of memory are free: choose smaller ones"
        )


class Connector(nn.Module):
    """Encoder frames to speech tokens, at the scale of the LLM's own embeddings from the start."""

    def __init__(self, kind, width_in, width_out, k, hidden, embedding_rms=1.0):
        super().__init__()
        self.k = k
        self.body = connector_class(kind)(width_in, width_out, k, hidden)
        self.scale = nn.Parameter(torch.full((width_out,), float(embedding_rms)))  # (D,)

    def forward(self, spans):
        """[frames (T_i, D_encoder)] -> [speech tokens (N_i, D)], N_i = T_i / k rounded up.

        The last token's missing frames are zeros. Where each token is made of its own k frames, all
        windows of all spans go through at once; else spans that have equally many tokens go through
        together. Nothing is padded beyond that, so a span's tokens, but for dropout, do not depend
        on its batch.
        """
        counts = [ceil_div(len(frames), self.k) for frames in spans]  # N_i
        if self.body.windows_apart:
            filled = [self.filled(frames, n) for frames, n in zip(spans, counts)]
            windows = torch.cat(filled).unflatten(0, (-1, self.k))  # (W = sum of N_i, k, D_encoder)
            return self.speech_tokens(windows).split(counts)  # (W, D) -> [(N_i, D)]

        tokens = [self.scale.expand(0, -1) for _ in spans]  # (0, D), of one without frames
        for n in dict.fromkeys(counts):  # in order of appearance, in which dropout is drawn
            if n == 0:
                continue
            rows = [i for i, count in enumerate(counts) if count == n]
            x = torch.stack([self.filled(spans[i], n) for i in rows])  # (B, N * k, D_encoder)
            for i, row in zip(rows, self.speech_tokens(x)):  # (B, N, D)
                tokens[i] = row
        return tokens

    def filled(self, frames, n):
        """Frames (T, D_encoder) -> (n * k, D_encoder), filled up with zeros."""
        return F.pad(frames, (0, 0, 0, n * self.k - len(frames)))

    def speech_tokens(self, x):
        """What the body takes -> its speech tokens (..., D), as large as embeddings."""
        y = self.body(x.to(self.scale))  # (W, D) or (B, N, D)
        return F.rms_norm(y, y.shape[-1:]) * self.scale


# ---- the frozen LLM ----


def compute_precision(precision="auto", llm="tiny"):
    """What the LLM computes in, a key of PRECISIONS; llm: its name, or its config.

    "auto": bf16 on a GPU that has it, fp16 on an older one; on a CPU fp32, or bf16 where it has
    instructions for that and the LLM is wide enough to gain.
    """
    if precision != "auto":
        return precision
    if DEVICE != "cpu":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    # for which torch has no public name; without them little is gained
    if not torch.cpu._is_avx512_bf16_supported():
        return "fp32"
    config = llm
    if isinstance(llm, (str, Path)):
        config = load_or_explain(AutoConfig, checkpoint_path(llm, "llm"), "LLM")
    return "bf16" if config.get_text_config().hidden_size >= WIDE else "fp32"


def load_llm(name, bits=4, precision="auto", head_bits=16, embeddings="gpu"):
    """(LLM frozen and in eval mode, tokenizer).

    bits: of all linear layers but the vocabulary projection; 4 = NF4 with double quantization,
    8 = LLM.int8, 16 = not quantized. head_bits: of that projection, 4 or 16. embeddings: where
    their table is, "gpu" or "host", which changes no result.
    """
    free_memory()  # of an LLM that was there before
    stay_on_the_card()
    where = checkpoint_path(name, "llm")
    compute = PRECISIONS[compute_precision(precision, name)]
    tokenizer = load_or_explain(AutoTokenizer, where, "LLM")
    vocabulary = tokenizer.get_vocab()  # before marks_of adds its two
    check_tokenizer(tokenizer, where)
    with explained(f"LLM {where}: its chat template cannot be used", IndexError):
        used = {end_of_turn(tokenizer)}
        for part in chat_parts(tokenizer, dialogue([("Who?", "He.")], "And when?"), [[], []]):
            used.update(part.ids)
    llm = load_in_places(where, bits, compute, DEVICE, head_bits, embeddings)
    check_vocabulary(llm, vocabulary, used, control_tokens(tokenizer), where)
    check_row_widths(llm, where)
    for module in llm.modules():
        # On CPUs with AVX512-BF16 bitsandbytes repacks weights at the first call without gradients,
        # into a kernel that has no backward and other rounding. One set of weights for training
        # and generation:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if head_bits == 4:
        pack_head(llm, compute, DEVICE)
    if embeddings == "host":
        keep_embeddings_on_host(llm, DEVICE)
    # Greedy decoding and nothing else, whatever the checkpoint recommends; its end tokens are kept.
    llm.generation_config = GenerationConfig(eos_token_id=llm.generation_config.eos_token_id)
    llm.eval().requires_grad_(False)
    check_reads_embeddings(llm, sorted(used), where)
    return llm, tokenizer


@lru_cache(maxsize=1)
def shared_llm(*options):
    """load_llm once: a frozen LLM is shared by the commands of one process."""
    with timed("load the LLM"):
        return load_llm(*options)


def llm_of(made, precision):
    """The arguments of load_llm for the LLM of a RUN's options or of a trained recipe's spec."""
    head_bits, embeddings = made.get("head_bits", 16), made.get("embeddings", "gpu")
    return made["llm"], made["bits"], precision, head_bits, embeddings


def embedding_width(llm):
    """D, the width of its embeddings."""
    return llm.get_input_embeddings().weight.shape[1]


@torch.no_grad()
def embedding_rms(llm):
    """Root mean square of the LLM's input embeddings as its layers see them.

    Gemma scales them on the way. Over up to 4096 tokens.
    """
    table = llm.get_input_embeddings()
    size = len(table.weight)
    some = torch.arange(0, size, ceil_div(size, 4096), device=DEVICE)
    return table(some).float().pow(2).mean().sqrt()  # of (up to 4096, D), one number


FULL_WEIGHTS = "modules_to_save"  # peft's, in the name of each of the LLM's weights under FULL


def with_adapter(llm, lora):
    """The LLM with an adapter, which is the only part of it that is trained (peft).

    lora: rank of a LoRA adapter (arXiv 2106.09685) on its linear layers, all but the vocabulary
    projection; 0: the LLM itself. FULL: a second copy of all its weights is trained in their
    place; so it must not be quantized.
    """
    if not lora:
        return llm
    from peft import LoraConfig, get_peft_model

    if lora == FULL:
        if getattr(llm.config, "quantization_config", None) or has_packed_head(llm):
            raise UserError("an LLM whose weights are packed cannot be trained as a whole")
        config = LoraConfig(
            target_modules="dummy-target-modules",  # as peft calls none
            modules_to_save=modules_with_weights(llm),
            ensure_weight_tying=llm.config.get_text_config().tie_word_embeddings,
            task_type="CAUSAL_LM",
        )
        return get_peft_model(llm, config)
    config = LoraConfig(
        r=lora,
        lora_alpha=2 * lora,
        lora_dropout=0.0,
        target_modules="all-linear",  # but the vocabulary projection, whole or in slices
        exclude_modules=PackedHead.PARTS if has_packed_head(llm) else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(llm, config)


# ---- losses: how an answer to speech is held against the LLM's own ----
#
# A loss is one class here and one entry of LOSSES. It is called with logits in fp32 (R, V) and with
# what they are held against: the R response tokens, and, if it has a teacher, the logits (R, V) of
# the frozen LLM reading the transcripts. It is summed over the tokens; train.py divides by how many
# there are in the whole step.


class CrossEntropy:
    """-log p of the LLM's own answer, token by token (MTBI, arXiv 2505.18644, by its abstract)."""

    has_teacher = False

    def __call__(self, logits, answers, teacher):
        return F.cross_entropy(logits, answers, reduction="sum")


class DistributionKL:
    """KL(frozen LLM reading text || LLM hearing speech): the whole next-token distribution.

    Ours; the nearest that we know is BLSP-KD (arXiv 2405.19041).
    """

    has_teacher = True

    def __call__(self, logits, answers, teacher):
        found, target = logits.log_softmax(-1), teacher.log_softmax(-1)  # (R, V) each
        return F.kl_div(found, target, reduction="sum", log_target=True)


LOSSES = {"ce": CrossEntropy(), "kl": DistributionKL()}
AT_ONCE = 2**23  # logits that are in fp32 at once: 32 MB


def loss_in_slices(loss, logits, answers, teacher=None):
    """loss(logits (R, V), answers (R), teacher (R, V)), a slice of the R tokens after the other.

    One position of a vocabulary of 150,000 takes 0.6 MB in fp32, and a loss and its gradient hold
    it several times over. So the logits stay in the LLM's precision; a slice in fp32 is gone
    before the next one comes, and is made again in the backward pass. The gradient is the same.
    """

    def of_slice(logits, answers, teacher):
        return loss(logits.float(), answers, None if teacher is None else teacher.float())

    size = max(1, AT_ONCE // logits.shape[-1])
    slices = [logits.split(size), answers.split(size)]
    slices.append([None] * len(slices[0]) if teacher is None else teacher.split(size))
    total = 0.0
    for one in zip(*slices, strict=True):
        total = total + checkpoint(of_slice, *one, **COMPUTE_AGAIN)
    return total


# ---- the speech LLM ----


class SpeechLLM(nn.Module):
    """Text parts are embedded by the LLM's own table, speech parts by the connector, and both are
    spliced in order (`embed`); the LLM reads them (`logits`); a loss of LOSSES scores the response
    alone (`forward`)."""

    def __init__(self, llm, tokenizer, encoder=None, connector=None, lora=0):
        super().__init__()
        self.fingerprint = fingerprint_of_llm(llm, tokenizer)  # before it has an adapter
        self.llm = with_adapter(llm, lora)
        self.tokenizer = tokenizer
        self.encoder, self.connector = encoder, connector
        self.lora = lora
        self.checkpointed = []
        self.eot = end_of_turn(tokenizer)
        # the most positions it was trained to read; an LLM without such a limit does not say
        text = llm.config.get_text_config()
        self.context = getattr(text, "max_position_embeddings", None) or sys.maxsize

        # an answer is over where the chat template, the tokenizer or the checkpoint ends it
        ends = llm.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({self.eot, tokenizer.eos_token_id, *ends} - {None})

    def train(self, mode=True):
        """The LLM and the encoder stay in eval mode, but for the flag of checkpointed layers."""
        super().train(False)
        if self.connector is not None:
            self.connector.train(mode)
        for layer in self.checkpointed:
            layer.training = mode  # by which such a layer knows whether to compute again
        return self

    def checkpoint_gradients(self):
        """Less memory and a third more time for training."""
        self.checkpointed = checkpointed_layers(self.llm)

    def trainable(self):
        """{name: parameter} of what training changes: the connector, and an adapter's weights."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def without_adapter(self):
        """Within it, the LLM is the frozen one."""
        return self.llm.disable_adapter() if self.lora else nullcontext()

    def take_off_adapter(self):
        """For good: whoever shares the LLM has it as it was before."""
        if self.lora:
            self.llm.delete_adapter("default")  # or a copy that was trained would stay
            self.llm, self.lora = self.llm.unload(), 0

    def embed(self, batch):
        """Parts -> (embeddings (B, L, D), attention mask (B, L), labels (B, L)).

        The one place where text and speech are spliced. With k = 5

            [Text of 9 ids, Speech of 50 frames, Text of 4 ids, Response of 3 ids]

        becomes 9 + 10 + 4 + 3 = 26 rows of D, and the last 3 are labelled.

        Padded on the left, so that the answers of all rows end at the right edge, where generation
        goes on and the loss is read.
        """
        table = self.llm.get_input_embeddings()

        # Everything that is read goes through the LLM's own table at once, everything that is
        # spoken through the connector.
        ids, sizes, spans = [], [], []
        for parts in batch:
            for part in parts:
                if isinstance(part, Speech):
                    spans.append(part.frames.to(DEVICE, non_blocking=True))  # (T, D_encoder)
                else:
                    ids += part.ids
                    sizes.append(len(part.ids))
        text = table(torch.tensor(ids, device=DEVICE))  # (all ids, D)
        read = iter(text.split(sizes))  # (ids of a part, D) each
        heard = iter(self.connector(spans) if spans else [])  # (N, D) each

        # Part by part they take their places again.
        rows = []
        for parts in batch:
            row = []
            for part in parts:
                if isinstance(part, Speech):
                    row.append(next(heard).to(text.dtype))  # (N, D)
                else:
                    row.append(next(read))  # (ids of the part, D)
            rows.append(torch.cat(row))  # (L_row, D)

        # Padding on the left; masks and labels go by position, never by token id.
        length = max(len(row) for row in rows)
        self.check_context(length)
        embeds, mask, labels = [], [], []
        for row, parts in zip(rows, batch):
            missing = length - len(row)
            answer = parts[-1].ids if isinstance(parts[-1], Response) else []
            embeds.append(F.pad(row, (0, 0, missing, 0)))  # (L, D)
            mask.append([0] * missing + [1] * len(row))
            labels.append([IGNORE] * (length - len(answer)) + answer)
        mask, labels = torch.tensor(mask, device=DEVICE), torch.tensor(labels, device=DEVICE)
        return torch.stack(embeds), mask, labels  # (B, L, D), (B, L), (B, L)

    def check_context(self, length):
        """UserError if so many positions are more than the LLM can read."""
        if length > self.context:
            raise UserError(
                f"a conversation of {length} positions is longer than this LLM's context of "
                f"{self.context}; shorter prompts, transcripts, recordings or answers fit"
            )

    def logits(self, batch):
        """(logits (R, V) that predict the R response tokens of the batch, those tokens (R)).

        In the precision of the LLM.
        """
        embeds, mask, labels = self.embed(batch)

        # Positions are counted from a row's own first token, so that a row is the same however
        # much padding stands before it; the padding itself, masked, may have any: 0.
        positions = (mask.cumsum(1) - 1).clamp(min=0)  # (B, L)

        # The projection to the vocabulary makes 150,000 numbers of a position. They are needed only
        # where an answer is predicted, so all other hidden states are dropped before it: given a
        # mask (B, L) as logits_to_keep, transformers returns logits (R, V), row after row. One
        # position predicts the next.
        predicts = F.pad(labels[:, 1:] != IGNORE, (0, 1))  # (B, L), the last position never
        out = self.llm(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            logits_to_keep=predicts,
            use_cache=False,
        )
        return out.logits, labels[labels != IGNORE]  # (R, V), (R)

    def forward(self, batch, teacher=None, loss="ce"):
        """The loss of conversations that end in a Response, summed over response tokens.

        teacher: the same conversations with the transcripts as text, for a loss that has one.
        """
        criterion, target = LOSSES[loss], None
        if criterion.has_teacher:
            with torch.no_grad(), self.without_adapter():
                target, _ = self.logits(teacher)  # (R, V)
        logits, answers = self.logits(batch)  # (R, V), (R)
        return loss_in_slices(criterion, logits, answers, target)

    @torch.no_grad()
    def check_finite(self, parts):
        """UserError if what the LLM makes of an open conversation is no number.

        Greedy decoding would not notice: it would answer with the first token of the vocabulary.
        Known of fp16, whose largest number is 65504, with LLMs that were trained in bf16.
        """
        embeds, mask, _ = self.embed([parts])
        out = self.llm(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=1, use_cache=False)
        if not out.logits.isfinite().all():
            raise UserError(
                f"the LLM's numbers overflow in {self.llm.dtype} (its logits are not finite): "
                "say --precision fp32, or bf16 where the GPU has it"
            )

    @torch.no_grad()
    def generate_rows(self, batch, max_new_tokens=64, streamer=None):
        """Greedy answers to open conversations: parts -> [(text, did it end by itself)].

        An answer ends at the latest where the LLM's context does. streamer: of transformers, which
        gets the tokens of a single conversation as they come.
        """
        embeds, mask, _ = self.embed(batch)
        length = embeds.shape[1]
        self.check_context(length + 1)
        # `generate` counts positions from the mask by itself, as `logits` does
        rows = self.llm.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=min(max_new_tokens, self.context - length),
            do_sample=False,
            eos_token_id=self.ends,
            pad_token_id=self.eot,
            streamer=streamer,
        ).tolist()  # (B, up to max_new_tokens)
        answers = []
        for row in rows:
            end = None
            for i, token in enumerate(row):
                if token in self.ends:
                    end = i
                    break
            text = self.tokenizer.decode(row[:end], skip_special_tokens=True)
            if end is None:  # one that was cut off may end in half a character
                text = text.rstrip("\ufffd")
            answers.append((text.strip(), end is not None))
        return answers

    def generate(self, batch, max_new_tokens=64):
        """The texts of generate_rows."""
        return [text for text, _ in self.generate_rows(batch, max_new_tokens)]

    def answer(self, question, audio=None, max_new_tokens=64):
        """The answer to a question, about a sound file if there is one.

        Or to a whole conversation in the Hugging Face message format, whose audio entries hold a
        path.
        """
        messages = question
        if isinstance(question, str):
            messages = [{"role": "user", "content": question}]
            if audio is not None:
                messages = user_turn(question, audio)
        elif audio is not None:
            raise UserError(f"{audio}: name it in the conversation, as an entry of type audio")
        return self.generate([self.listen(messages)], max_new_tokens)[0]

    def listen(self, messages):
        """The parts of a conversation in the message format, what its audio entries hold heard."""
        check_messages(messages)
        speech = []
        for message in messages:
            entries = message["content"] if isinstance(message["content"], list) else []
            for entry in entries:
                if entry["type"] == "audio":
                    samples = load_audio(entry["audio"])
                    speech.append([Speech(self.encoder(samples, entry["audio"]))])
        return chat_parts(self.tokenizer, messages, speech)

    # -- RUN/RECIPE holds the connector (and the adapter), and names the LLM and the encoder --

    @first_process
    def save(self, folder, spec):
        """Write connector.safetensors (and adapter/) and what is needed to load them again."""
        folder = Path(folder)
        weights = {name: w.contiguous() for name, w in self.connector.state_dict().items()}
        with whole_file(folder / "connector.safetensors") as temporary:
            save_file(weights, temporary)
        if self.lora:
            save_adapter(self.llm, folder / "adapter")
        trained = sum(p.numel() for p in self.trainable().values())
        made_for = {
            "llm_fingerprint": self.fingerprint,
            "encoder_fingerprint": self.encoder.fingerprint,
            "weights_fingerprint": fingerprint_of_training(folder),
            "trained_parameters": trained,
        }
        write_json(folder / "model.json", {**spec, **made_for})

    @classmethod
    def build(cls, spec, llm=None, encoder=None, seed=0, precision="auto"):
        """A SpeechLLM from its spec.

        spec: {"llm", "bits", "encoder", "pad_whisper", "connector", "k", "hidden", "lora"}, and
        "head_bits" and "embeddings", which older ones lack. llm, encoder: loaded ones, to
        share them: (LLM, tokenizer) as load_llm returns them, and as load_encoder does.
        """
        llm, tokenizer = llm or load_llm(*llm_of(spec, precision))
        encoder = encoder or load_encoder(spec["encoder"], spec["pad_whisper"])
        size = (spec["connector"], encoder.width, embedding_width(llm), spec["k"], spec["hidden"])
        check_size(*size)
        torch.manual_seed(seed)  # after loading, which may draw random numbers itself
        connector = Connector(*size, embedding_rms(llm))
        return cls(llm, tokenizer, encoder, connector.to(DEVICE), spec["lora"])

    @classmethod
    def from_pretrained(cls, folder, llm=None, encoder=None, precision="auto"):
        """Load what save() wrote (RUN/RECIPE, or a hub name of such a folder).

        llm, encoder: loaded ones, to share them, as build() takes them; a recipe with an adapter
        has it on that LLM until take_off_adapter().
        UserError if it was trained for another LLM or another encoder.
        """
        folder = local_or_fetched(folder, TRAINED)
        spec = read_spec(folder)
        again = "train again with --force"
        if fingerprint_of_training(folder) != spec["weights_fingerprint"]:
            raise UserError(
                f"{folder}: its weights are damaged, or not those that were trained; {again}"
            )
        try:
            model = cls.build(spec, llm, encoder, precision=precision)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            if is_out_of_memory(error):
                raise  # which says nothing of the file
            raise UserError(
                f"{folder / 'model.json'}: is not what training writes there "
                f"({first_line(error)}); {again}"
            ) from None
        try:
            model.check_made_for(spec, folder)
            model.load_trained(folder)
        except (RuntimeError, ValueError, UserError) as error:
            model.take_off_adapter()  # from an LLM that others may share
            if isinstance(error, UserError) or is_out_of_memory(error):
                raise
            raise UserError(
                f"{folder}: the connector cannot be loaded ({first_line(error)}); {again}"
            ) from None
        return model.train(False)

    def check_made_for(self, spec, folder):
        """UserError if what save() wrote into a folder was trained for another LLM or encoder."""
        found = (self.fingerprint, self.encoder.fingerprint)
        for what, name, now in zip(("LLM", "speech encoder"), ("llm", "encoder"), found):
            if now != spec[f"{name}_fingerprint"]:
                raise UserError(
                    f"{folder}: its connector was trained for another {what} than the one that is "
                    f"now at {spec[name]}; train again with --force"
                )

    def load_trained(self, folder):
        """Put the weights of the connector, and of the adapter, in place.

        ValueError, RuntimeError or UserError if they are damaged.
        """
        again = "train again with --force"
        tensors = load_tensors(folder / "connector.safetensors", again)
        self.connector.load_state_dict(tensors)
        if self.lora:
            tensors |= load_adapter(self.llm, folder / "adapter", again)
        if not all(torch.isfinite(t).all() for t in tensors.values()):
            raise ValueError("it holds NaN or infinite weights")
