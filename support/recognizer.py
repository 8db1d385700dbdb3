"""A recognizer made from a corpus: a CTC head of our own on the frames of a frozen encoder.

It is trained on the very frames and transcripts that a connector is trained on. So it is the fair
rival of what imitates, for any encoder; and it tells when each word was said, in any language.

A recognizer is a folder that is named like a CTC model, as `--asr FOLDER`.
"""

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from support.console import progress_bar
from support.files import UserError, fingerprint, fingerprint_of_file, first_line, read_json
from support.files import whole_file, write_json, write_text
from support.hub import load_tensors
from support.processes import DEVICE

SPEC, HEAD, SYMBOLS = "recognizer.json", "head.safetensors", "vocab.json"
HIDDEN = 384
MOST_SYMBOLS = 2000  # of the corpus' letters and digits, the most frequent
PEAK, WARMUP = 2e-3, 50  # learning rate, and steps until it is reached
DROPOUT = 0.2  # of frames' values: the voices are few
HIDDEN_FRAMES = 5  # the longest stretch of frames that is hidden, three times an utterance


class Head(nn.Module):
    """One convolution over nine frames, a GELU, a linear layer.

    frames (B, T, D_encoder) -> (B, T, HIDDEN) -> log-probabilities (B, T, V_ctc)
    """

    def __init__(self, width, symbols):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.drop = nn.Dropout(DROPOUT)
        self.conv = nn.Conv1d(width, HIDDEN, 9, padding=4)
        self.out = nn.Linear(HIDDEN, symbols)

    def forward(self, frames):
        x = self.drop(self.norm(frames)).transpose(1, 2)  # (B, D_encoder, T)
        x = F.gelu(self.conv(x)).transpose(1, 2)  # (B, T, HIDDEN)
        return self.out(x).log_softmax(-1)  # (B, T, V_ctc)


class Recognizer:
    """An encoder, and a head that was trained on its frames: a CTCEncoder (model.py)."""

    can_transcribe = True
    ctc_delay = 0.0  # the convolution looks as far ahead as back

    def __init__(self, folder, encoder, head, tokenizer):
        self.name = str(folder)
        self.encoder, self.head, self.ctc_tokenizer = encoder, head.eval(), tokenizer
        self.width, self.frame_rate = encoder.width, encoder.frame_rate
        self.fingerprint = encoder.fingerprint  # the frames are the encoder's
        self.ctc_fingerprint = fingerprint_of_recognizer(folder, encoder.fingerprint)

    def __call__(self, samples, name="the audio"):
        return self.encoder(samples, name)

    def to(self, device):
        self.encoder.to(device)
        return self

    @torch.no_grad()
    def ctc(self, frames):
        """frames (T, D_encoder) -> log-probabilities (T, V_ctc)."""
        return self.head(frames.float()[None].to(DEVICE))[0].cpu()

    def transcribe(self, frames):
        """Greedy CTC: frames (T, D_encoder) -> text."""
        return self.ctc_tokenizer.decode(self.ctc(frames).argmax(-1).tolist())


def is_recognizer(name):
    return (Path(name) / SPEC).is_file()


def fingerprint_of_recognizer(folder, of_encoder):
    """Names what determines the transcripts."""
    files = [fingerprint_of_file(Path(folder) / name) for name in (HEAD, SYMBOLS)]
    return fingerprint([*files, of_encoder])


def encoder_behind(folder):
    """{"encoder", "pad_whisper", "encoder_fingerprint"} of a recognizer."""
    spec = read_json(Path(folder) / SPEC, "encoder", "pad_whisper", "encoder_fingerprint")
    if not isinstance(spec["encoder"], str) or not isinstance(spec["pad_whisper"], bool):
        raise UserError(f"{Path(folder) / SPEC}: is not what `recognizer` writes there")
    return spec


def open_recognizer(folder, encoder):
    """The recognizer in a folder; UserError if it is damaged, or made for another encoder."""
    again = "make it again with `recognizer … --force`"
    if encoder_behind(folder)["encoder_fingerprint"] != encoder.fingerprint:
        raise UserError(f"{folder}: was made for another encoder than {encoder.name} now; {again}")
    tensors = load_tensors(Path(folder) / HEAD, again)
    try:
        tokenizer = ctc_tokenizer(Path(folder) / SYMBOLS)
        head = Head(encoder.width, len(tokenizer))
        head.load_state_dict(tensors)
    except (RuntimeError, ValueError, OSError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: holds no whole recognizer ({first_line(error)}); {again}"
        ) from None
    return Recognizer(folder, encoder, head.to(DEVICE), tokenizer)


# ---- how it is made ----


def ctc_tokenizer(path):
    """The tokenizer of a vocab.json, by transformers: it collapses repeats and drops blanks."""
    from transformers import Wav2Vec2CTCTokenizer

    return Wav2Vec2CTCTokenizer(
        str(path),
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token=None,
        eos_token=None,
        word_delimiter_token="|",
    )


def write_vocabulary(path, texts):
    """The letters and digits of normalized texts, each a symbol; first the blank."""
    counts = {}
    for letter in "".join(texts).replace(" ", ""):
        counts[letter] = counts.get(letter, 0) + 1
    most = sorted(counts, key=lambda letter: (-counts[letter], letter))[:MOST_SYMBOLS]
    symbols = ["<pad>", "<unk>", "|", *sorted(most)]
    lines = ", ".join(f'"{symbol}": {i}' for i, symbol in enumerate(symbols))
    write_text(path, "{" + lines + "}\n")


def make_recognizer(folder, encoder, spec, frames, texts, steps, batch_size, seed):
    """Train a head, and write it to `folder`.

    frames: {utterance id: (T, D_encoder)}; texts: {utterance id: its transcript, normalized}.
    Texts that the frames are too few for are left out.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SPEC, HEAD):  # or an earlier head would stand beside the new vocabulary
        (folder / name).unlink(missing_ok=True)
    write_vocabulary(folder / SYMBOLS, texts.values())
    tokenizer = ctc_tokenizer(folder / SYMBOLS)
    torch.manual_seed(seed)
    head = Head(encoder.width, len(tokenizer)).to(DEVICE).train()
    targets = {}
    for i, text in texts.items():
        ids = tokenizer(text)["input_ids"]
        if ids and len(frames[i]) > len(ids) + sum(a == b for a, b in zip(ids, ids[1:])):
            targets[i] = ids
    if len(targets) < batch_size:
        raise UserError(
            f"{len(targets)} utterances can be spelled, fewer than one batch of {batch_size}: "
            "prepare more speech, or lower --batch-size"
        )
    train_head(head, frames, targets, steps, batch_size, seed)
    with whole_file(folder / HEAD) as temporary:
        save_file({name: w.contiguous() for name, w in head.state_dict().items()}, temporary)
    write_json(folder / SPEC, {**spec, "encoder_fingerprint": encoder.fingerprint})
    return Recognizer(folder, encoder, head, tokenizer)


def train_head(head, frames, targets, steps, batch_size, seed):
    """CTC (Graves et al. 2006) by AdamW, some frames hidden (SpecAugment, arXiv 1904.08779)."""
    rng = random.Random(f"recognizer-{seed}")
    optimizer = torch.optim.AdamW(head.parameters(), lr=PEAK, weight_decay=0.01)
    bar = progress_bar(range(steps), desc="train recognizer", unit="step")
    for step in bar:
        done = step / steps
        rate = PEAK * min((step + 1) / WARMUP, 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = rng.sample(sorted(targets), batch_size)
        rows = [hide_some(rng, frames[i].float()) for i in chosen]
        lengths = torch.tensor([len(row) for row in rows])
        batch = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)  # (B, T, D_encoder)
        scores = head(batch).transpose(0, 1).float().cpu()  # (T, B, V_ctc)
        ids = [torch.tensor(targets[i]) for i in chosen]
        sizes = torch.tensor([len(row) for row in ids])
        loss = F.ctc_loss(scores, torch.cat(ids), lengths, sizes, zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def hide_some(rng, frames):
    """Frames (T, D_encoder) of which three short stretches are zero."""
    frames = frames.clone()
    for _ in range(3):
        at = rng.randrange(len(frames))
        frames[at : at + rng.randint(0, HIDDEN_FRAMES)] = 0
    return frames
