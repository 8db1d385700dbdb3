"""The command `encode`: encoder frames made beforehand, as training and the benchmark need them."""

from dataclasses import dataclass
from pathlib import Path

from data import read_manifest
from model import encode_all, load_encoder
from support.console import say_device
from support.hub import absolute_if_local
from support.options import DataFolder


@dataclass
class EncodeOptions:
    data: DataFolder
    """a data folder made by `prepare`"""
    encoder: str = "tiny"
    """the speech encoder: `tiny`, a local folder, or a Hugging Face name"""
    pad_whisper: bool = False
    """run a Whisper encoder on 30 s of padding instead of the audio's own length"""


def encode_data(options):
    """Make the encoder frames of a data folder: what `train` and `bench` would do first.

    They are kept in DATA/features, for every run that uses this data and this encoder.
    """
    data = Path(options.data)
    utterances = read_manifest(data / "manifest.jsonl")
    say_device()
    encoder = load_encoder(absolute_if_local(options.encoder), options.pad_whisper)
    encode_all(encoder, utterances, data / "features")
    print(f"{data / 'features'}: holds the frames of {len(utterances)} utterances")
