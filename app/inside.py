"""What a model makes of speech: its sound, its speech tokens, the words nearest to them, and what
the answer attends to; in numbers for the page, and as one picture for `inspect`."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import torchaudio

from data import SAMPLE_RATE, Response, Speech, chat_parts, positions_of, user_turn
from lab.probes import attention_from, attention_weights
from support.processes import DEVICE

NEAREST = 3  # words of the vocabulary that are named for a speech token
ROWS = 8192  # of the table of embeddings that are looked at together


@dataclass
class Heard:
    """What a model made of a recording of T frames and N speech tokens."""

    samples: np.ndarray  # float32 at SAMPLE_RATE
    frames: torch.Tensor  # (T, D_encoder)
    tokens: torch.Tensor  # (N, D), what the LLM reads in place of words
    borders: list  # N + 1 times in seconds: where each speech token begins, and the last one ends
    nearest: list  # for each speech token [(word, cosine), ...], the nearest first


@torch.no_grad()
def hear(model, samples, name="the recording"):
    """The Heard of samples (float32, SAMPLE_RATE)."""
    frames = model.encoder(samples, name)  # (T, D_encoder)
    tokens = model.connector([frames.to(DEVICE)])[0]  # (N, D)
    seconds = len(samples) / SAMPLE_RATE
    k = model.connector.k
    borders = [min(seconds, i * k / model.encoder.frame_rate) for i in range(len(tokens))]
    return Heard(samples, frames, tokens, [*borders, seconds], nearest_words(model, tokens))


def nearest_words(model, tokens):
    """For each speech token (N, D) the NEAREST words of the LLM's vocabulary: [(word, cosine)]."""
    table = model.llm.get_input_embeddings().weight  # (V, D)
    spoken = F.normalize(tokens.float(), dim=-1)  # (N, D)
    parts = []
    for start in range(0, len(table), ROWS):
        words = F.normalize(table[start : start + ROWS].to(DEVICE).float(), dim=-1)  # (ROWS, D)
        parts.append(spoken @ words.T)  # (N, ROWS)
    cosines, ids = torch.cat(parts, dim=1).topk(NEAREST)  # (N, NEAREST)
    found = []
    for row_ids, row in zip(ids.tolist(), cosines.tolist()):
        texts = [model.tokenizer.decode([i]).strip() or "␣" for i in row_ids]
        found.append(list(zip(texts, row)))
    return found


@torch.no_grad()
def attention_on_speech(model, heard, prompt):
    """Shares of attention (layers, N) on each speech token, where the answer's first is predicted.

    Averaged over heads. Beside them the shares (layers,) on the instruction.
    """
    parts = chat_parts(
        model.tokenizer, user_turn(prompt), [[Speech(heard.frames)]], instruction=prompt
    )
    with attention_weights(model):
        shares = attention_from(model, parts, -1).cpu()  # (layers, L)
    on_speech, on_prompt = None, torch.zeros(len(shares))
    at = 0
    for part in parts:
        n = positions_of(part, model.connector.k)
        if isinstance(part, Speech):
            on_speech = shares[:, at : at + n]  # (layers, N)
        elif part.is_instruction:
            on_prompt = on_prompt + shares[:, at : at + n].sum(1)  # (layers,)
        at += n
    return on_speech, on_prompt


def mel_of(samples):
    """Log-mel (80, frames of 10 ms) of samples, for the eye."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLE_RATE, n_fft=400, hop_length=160, n_mels=80)
    return mel(torch.from_numpy(samples)).clamp(min=1e-6).log10().numpy()


# ---- the picture ----


def draw_heard(pyplot, model, heard, prompt, answer, words=None):
    """A figure of a recording from its sound to the attention; words: [[word, start, end], ...]."""
    n = len(heard.tokens)
    size = (max(8, 0.42 * n), 11)
    figure, axes = pyplot.subplots(5, 1, figsize=size, height_ratios=[1, 2, 2, 1.4, 2])
    figure.suptitle(f"{prompt}\n→ {answer}")
    seconds = heard.borders[-1]
    wave, mel, frames, names, attention = axes

    at = np.arange(len(heard.samples)) / SAMPLE_RATE
    wave.plot(at, heard.samples, linewidth=0.4)
    wave.set(title="the sound, and where each speech token begins", xlim=(0, seconds))
    mel.imshow(mel_of(heard.samples), origin="lower", aspect="auto", extent=(0, seconds, 0, 80))
    mel.set(title="mel bands", xlabel="seconds")
    for border in heard.borders:
        wave.axvline(border, color="tab:orange", linewidth=0.5)
        mel.axvline(border, color="white", linewidth=0.5)
    for word, start, end in words or []:
        middle = (start + end) / 2
        wave.text(middle, wave.get_ylim()[1], word, ha="center", va="top", fontsize=8)
        mel.text(middle, 78, word, ha="center", va="top", fontsize=8, color="white")

    standard = heard.frames.float().numpy()
    standard = (standard - standard.mean(0)) / (standard.std(0) + 1e-5)  # (T, D_encoder)
    frames.imshow(standard.T, aspect="auto", cmap="RdBu", vmin=-3, vmax=3)
    frames.set(title=f"{len(standard)} encoder frames of {standard.shape[1]} values")

    title = f"{n} speech tokens, and the words of the vocabulary nearest to them"
    names.set_title(title, pad=24)  # the words are slanted, and reach above their row
    names.set_xlim(-0.5, n - 0.5)
    names.set_ylim(-NEAREST, 0)
    names.axis("off")
    for i, found in enumerate(heard.nearest):
        for row, (word, cosine) in enumerate(found):
            shade = min(1.0, 0.25 + max(0.0, cosine))
            names.text(i, -row - 0.5, word, ha="center", fontsize=9, alpha=shade, rotation=30)

    on_speech, on_prompt = attention_on_speech(model, heard, prompt)
    attention.imshow(on_speech.numpy(), aspect="auto", cmap="Blues", vmin=0)
    attention.set(
        title="attention of the first answer token on each speech token, by layer",
        xlabel="speech token",
        ylabel="layer (and on the instruction)",
    )
    layers = [f"{i} ({share:.0%})" for i, share in enumerate(on_prompt.tolist())]
    attention.set_yticks(range(len(layers)), layers)
    figure.tight_layout()
    return figure


COLOURS = {"text": "tab:blue", "speech": "tab:orange", "answer": "tab:green"}


def draw_example(pyplot, model, example, title):
    """A figure of a training conversation: text blue, speech orange, what carries loss green."""
    pieces = []
    for part in example.parts:
        if isinstance(part, Speech):
            tokens = model.connector([part.frames.to(DEVICE)])[0]  # (N, D)
            words = [found[0][0] for found in nearest_words(model, tokens.detach())]
            pieces += [("speech", f"‹{word}›") for word in words]
        else:
            kind = "answer" if isinstance(part, Response) else "text"
            for i in part.ids:
                pieces.append((kind, model.tokenizer.decode([i]).replace("\n", "⏎")))
    figure, axes = pyplot.subplots(figsize=(11, 1.2 + 0.3 * (1 + len(pieces) // 12)))
    axes.axis("off")
    axes.set(xlim=(0, 110), title=title)
    x, y = 0.0, 0.0
    for kind, text in pieces:
        width = 1.0 + 0.95 * len(text)
        if x + width > 110:
            x, y = 0.0, y - 1.0
        axes.text(x, y, text, color=COLOURS[kind], family="monospace", fontsize=9)
        x += width
    axes.set_ylim(y - 1, 1)
    speech = sum(kind == "speech" for kind, _ in pieces)
    answer = sum(kind == "answer" for kind, _ in pieces)
    axes.text(
        0,
        y - 1,
        f"blue: {len(pieces) - speech - answer} text tokens; orange: {speech} speech tokens, each "
        f"with the word nearest to it; green: {answer} tokens that carry loss",
        fontsize=8,
    )
    return figure
