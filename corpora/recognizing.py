"""The command `recognizer`: a CTC head trained on the frames and transcripts of a data folder."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jiwer

from data import fingerprint_of_utterances, normalize, read_manifest
from model import encode_all, fingerprint_of_encoder, load_encoder, pinned_encoder
from support.console import say_device, timed
from support.files import UserError
from support.frames import fingerprint_of_audio
from support.options import Count, DataFolder, Seed
from support.recognizer import HEAD, SPEC, SYMBOLS, is_recognizer, make_recognizer
from support.runs import begin, finish, is_done, lock_folder, option_before


@dataclass
class RecognizerOptions:
    data: DataFolder
    """a data folder made by `prepare`; its training utterances are what is learned from"""
    encoder: str = "tiny"
    """the speech encoder: `tiny`, a local folder, or a Hugging Face name"""
    out: str | None = None
    """the folder to write, which --asr then names; default: DATA/recognizer"""
    pad_whisper: bool = False
    """run a Whisper encoder on 30 s of padding instead of the audio's own length"""
    steps: Count = 500
    """training steps"""
    batch_size: Count = 24
    """utterances in a step"""
    force: bool = False
    """do it again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""

    MAKES: ClassVar = (SPEC, HEAD, SYMBOLS)
    CHANGES_NOTHING: ClassVar = ("data", "out")  # what is in the data does


def train_recognizer(options):
    """Train a recognizer on an encoder's frames: for a fair cascade, and for word times.

    `bench --asr DATA/recognizer` transcribes with it, `word-times --asr DATA/recognizer` aligns.
    """
    data = Path(options.data)
    out = Path(options.out) if options.out else data / "recognizer"
    if is_recognizer(options.encoder):
        raise UserError(f"--encoder {options.encoder}: is a recognizer; name the encoder itself")
    utterances = read_manifest(data / "manifest.jsonl")
    heard = [u for u in utterances if u.split == "train"]
    if not heard:
        raise UserError(f"{data / 'manifest.jsonl'}: has no row with split train to learn from")
    if len(heard) < options.batch_size:  # before an earlier one is deleted
        raise UserError(
            f"{len(heard)} utterances to learn from, fewer than one batch of {options.batch_size}: "
            "prepare more speech, or lower --batch-size"
        )
    name = pinned_encoder(options.encoder, option_before(out, options, "encoder"))
    options = replace(options, encoder=name)
    content = {
        "utterances": fingerprint_of_utterances(heard),
        "audio": fingerprint_of_audio(heard, data / "features"),
        "encoder": fingerprint_of_encoder(name),
    }
    is_there = partial(is_done, out, "recognizer", options, content, HEAD, half_way=HEAD)
    if is_there():
        print(f"{out}: is trained already")
        return out
    say_device()
    encoder = load_encoder(name, options.pad_whisper)
    frames = encode_all(encoder, utterances, data / "features")
    with lock_folder(out), timed("train recognizer"):
        if is_there():  # by another process, while this one encoded
            return out
        begin(out, "recognizer", options, content)
        texts = {u.id: normalize(u.text) for u in heard}
        spec = {"encoder": name, "pad_whisper": options.pad_whisper}
        size = (options.steps, options.batch_size, options.seed)
        recognizer = make_recognizer(out, encoder, spec, frames, texts, *size)
        finish(out, "recognizer", options, content)
    for split in ("train", "test"):
        some = [u for u in utterances if u.split == split][:200]
        said = [normalize(u.text) for u in some if normalize(u.text)]
        found = [recognizer.transcribe(frames[u.id]) for u in some if normalize(u.text)]
        if said:
            print(f"{out}: word error rate {jiwer.wer(said, found):.1%} on {len(said)} of {split}")
    return out
