"""Encoder frames are made once, kept by the content of the recording, and read where they lie."""

import os
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import features
from features import encode_all
from files import UserError
from model import SpeechEncoder


@pytest.fixture
def copies(utterances, tmp_path):
    rows = [replace(u, audio=tmp_path / f"{i}.wav", id=str(i)) for i, u in enumerate(utterances[:3])]
    for u, c in zip(utterances, rows):
        shutil.copy(u.audio, c.audio)
    return rows


@pytest.fixture
def heard(encoder, monkeypatch):
    """Counts what the encoder hears."""
    calls, real = [], SpeechEncoder.forward
    monkeypatch.setattr(SpeechEncoder, "forward", lambda self, audio, name="": (calls.append(str(name)), real(self, audio, name))[1])
    return calls


def test_a_recording_is_encoded_once_whatever_its_name_and_again_when_it_changes(encoder, copies, heard, tmp_path):
    first = encode_all(encoder, copies, tmp_path / "features")
    assert len(heard) == 3
    again = encode_all(encoder, copies, tmp_path / "features")
    assert len(heard) == 3 and all(torch.equal(first[u.id], again[u.id]) for u in copies)
    moved = replace(copies[0], audio=tmp_path / "elsewhere.wav", id="elsewhere")
    shutil.copy(copies[0].audio, moved.audio)
    assert torch.equal(encode_all(encoder, [moved], tmp_path / "features")["elsewhere"], first["0"]) and len(heard) == 3
    shutil.copy(copies[1].audio, copies[0].audio)
    os.utime(copies[0].audio, (1, 1))
    assert torch.equal(encode_all(encoder, copies, tmp_path / "features")["0"], first["1"]) and len(heard) == 3
    other = SpeechEncoder("tiny")
    with torch.no_grad():
        other.model.encoder.layers[0].ffn1.intermediate_dense.weight += 1.0
    assert other.key != encoder.key


@pytest.mark.parametrize("keep", features.KEEP)
def test_kept_on_disk_in_ram_or_not_at_all_the_frames_are_the_same(encoder, copies, heard, tmp_path, keep):
    frames = encode_all(encoder, copies, tmp_path / "features", keep)
    alone = {u.id: encoder(features.load_audio(u.audio), u.audio) for u in copies}
    heard.clear()
    for _ in range(2):
        assert all(torch.equal(frames[u.id], alone[u.id]) for u in copies)
    assert len(heard) == (6 if keep == "off" else 0)
    assert (tmp_path / "features" / encoder.key).exists() == (keep == "disk")


def test_interrupted_encoding_goes_on_from_the_last_whole_file(encoder, copies, heard, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "SHARD", 1)                      # a file for each recording
    real, calls = features.load_audio, []
    monkeypatch.setattr(features, "load_audio", lambda *a: (calls.append(a), (_ for _ in ()).throw(KeyboardInterrupt) if len(calls) == 3 else real(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        encode_all(encoder, copies, tmp_path / "features")
    assert len(heard) == 2 and len(list((tmp_path / "features" / encoder.key).iterdir())) == 2
    encode_all(encoder, copies, tmp_path / "features")
    assert len(heard) == 3


def test_a_command_waits_for_another_that_encodes_the_same_speech_and_takes_its_frames(encoder, copies, heard, tmp_path, capsys):
    real, begun = features.write_shards, threading.Event()

    def slowly(*args):
        begun.set()
        time.sleep(0.5)
        real(*args)

    with ThreadPoolExecutor(1) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "write_shards", slowly)
        first = pool.submit(encode_all, encoder, copies, tmp_path / "features")
        assert begun.wait(10)
        patch.setattr(features, "write_shards", real)
        second = encode_all(encoder, copies, tmp_path / "features")
        assert len(first.result()) == len(second)
    assert len(heard) == 3 and "waiting for another process" in capsys.readouterr().out


def test_frames_on_disk_are_mapped_not_read(encoder, tmp_path):
    """A data set larger than the memory: 400 MB of frames on disk, of which one utterance is used, cost no 400 MB."""
    import resource

    from safetensors.torch import save_file
    (tmp_path / "k").mkdir()
    save_file({f"{i}": torch.zeros(1000, 1000, dtype=torch.float16) for i in range(200)}, tmp_path / "k" / "a.safetensors")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    shards = features.kept_shards(tmp_path / "k")
    assert len(shards) == 200 and shards["7"].get_tensor("7").sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000      # KiB


def test_a_disk_without_room_is_noticed_before_the_work(encoder, copies, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(features.shutil, "disk_usage", lambda path: type("", (), {"free": 10}))
    with pytest.raises(UserError, match="make room, or say --cache-features ram"):
        encode_all(encoder, copies, tmp_path / "features")
    assert "values x 2 bytes" in capsys.readouterr().out


def test_a_damaged_file_of_frames_is_named(encoder, copies, tmp_path):
    encode_all(encoder, copies, tmp_path / "features")
    path = next((tmp_path / "features" / encoder.key).iterdir())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="delete it and run again"):
        encode_all(encoder, copies, tmp_path / "features")
