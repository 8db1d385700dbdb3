"""A recognizer made from a corpus: it learns, is found again, and times words."""

import shutil
from functools import partial

import numpy as np
import pytest
import torch
from checkpoints import save_in_hub_cache
from conftest import ROOT, shared
from programs import one_line

import corpora.word_times
from corpora.recognizing import RecognizerOptions
from corpora.word_times import meet_midway, pauses_in, spell
from data import SAMPLE_RATE, normalize, read_manifest
from model import encode_all, fingerprint_of_encoder, load_encoder
from mtbi import main
from support.files import UserError, read_json, write_json
from support.recognizer import ctc_tokenizer, is_recognizer, make_recognizer, write_vocabulary

SHORT = ["--steps", "60", "--batch-size", "8"]


@pytest.fixture(scope="module")
def with_recognizer(trained_world, tmp_path_factory):
    """A folder with data, a recognizer in it, and a trained run."""
    world = shutil.copytree(trained_world, tmp_path_factory.mktemp("recognizer") / "world")
    assert main(["recognizer", str(world / "data"), *SHORT]) == 0
    return world


@pytest.fixture
def own(with_recognizer, tmp_path):
    return shutil.copytree(with_recognizer, tmp_path / "world")


def test_it_learns_to_spell_what_it_is_trained_on(encoder, utterances, frames, tmp_path):
    """Of a dozen utterances, by heart."""
    few = {u.id: normalize(u.text) for u in utterances[:12]}
    spec = {"encoder": "tiny", "pad_whisper": False}
    made = make_recognizer(tmp_path, encoder, spec, frames, few, steps=150, batch_size=6, seed=0)
    found = [made.transcribe(frames[i]) for i in few]
    right = sum(a == b for a, b in zip(found, few.values()))
    assert right >= 6, found


def test_it_is_named_like_a_ctc_model_and_is_the_same_when_it_is_loaded(
    with_recognizer, utterances, frames
):
    folder = with_recognizer / "data" / "recognizer"
    assert is_recognizer(folder)
    one, again = load_encoder(str(folder)), load_encoder(str(folder))
    assert one is again and one.can_transcribe
    scores = one.ctc(frames[utterances[0].id])
    assert scores.shape == (len(frames[utterances[0].id]), len(one.ctc_tokenizer))
    torch.testing.assert_close(scores.exp().sum(1), torch.ones(len(scores)))
    assert fingerprint_of_encoder(str(folder)) == one.ctc_fingerprint != one.fingerprint


def test_it_is_not_trained_twice_and_other_options_are_refused(own, capsys):
    data = str(own / "data")
    assert main(["recognizer", data, *SHORT]) == 0
    assert "is trained already" in capsys.readouterr().out
    assert main(["recognizer", data, *SHORT, "--seed", "1"]) == 2
    one_line(capsys, "seed was 0, now 1")


def test_it_is_found_again_though_the_owner_of_its_encoder_changed_that(own, tmp_path, monkeypatch):
    """It keeps to the commit that it was made with, as behaviors and trainings do."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    source = ROOT / "tiny" / "encoder"
    repo = save_in_hub_cache(monkeypatch, tmp_path, source, "someone/ears", commit)
    folder = tmp_path / "recognizer"
    again = ["recognizer", str(own / "data"), "--encoder", "someone/ears", "--out", str(folder)]
    assert main([*again, "--steps", "2", "--batch-size", "8"]) == 0
    made = read_json(folder / "config.json")
    assert made["options"]["encoder"] == f"someone/ears@{commit}"
    shutil.copytree(repo / "snapshots" / commit, repo / "snapshots" / commit[::-1])
    (repo / "refs" / "main").write_text(commit[::-1])
    assert main([*again, "--steps", "2", "--batch-size", "8"]) == 0
    assert read_json(folder / "config.json") == made


def test_a_damaged_one_is_refused(own, capsys):
    folder = own / "data" / "recognizer"
    (folder / "head.safetensors").write_bytes(b"junk")
    assert main(["word-times", str(own / "data"), "--asr", str(folder), "--force"]) == 2
    one_line(capsys, "head.safetensors", "recognizer")


def test_one_that_was_interrupted_leaves_nothing_of_an_earlier_one(own, monkeypatch):
    """Or its head would stand beside another vocabulary."""

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("support.recognizer.train_head", stop)
    assert main(["recognizer", str(own / "data"), *SHORT, "--force"]) == 130
    folder = own / "data" / "recognizer"
    assert not is_recognizer(folder) and not (folder / "head.safetensors").exists()


def test_options_that_cannot_work_delete_no_earlier_one(own, capsys):
    data = str(own / "data")
    assert main(["recognizer", data, *SHORT, "--force", "--batch-size", "9999"]) == 2
    one_line(capsys, "fewer than one batch of 9999")
    assert is_recognizer(own / "data" / "recognizer")


def test_vowel_signs_are_letters_that_can_be_spelled(tmp_path):
    write_vocabulary(tmp_path / "vocab.json", [normalize("हिन्दी में")])
    ids = spell(ctc_tokenizer(tmp_path / "vocab.json"), "हिन्दी,")
    assert len(set(ids)) == len(set("हिन्दी")) and None not in ids


def test_one_made_for_another_encoder_is_refused(own):
    folder = own / "data" / "recognizer"
    spec = read_json(folder / "recognizer.json")
    write_json(folder / "recognizer.json", {**spec, "encoder_fingerprint": "another"})
    with pytest.raises(UserError, match="made for another encoder"):
        load_encoder(str(folder))


def test_a_recognizer_is_no_encoder_to_make_one_from(own, capsys):
    data = str(own / "data")
    assert main(["recognizer", data, "--encoder", f"{data}/recognizer", "--out", data + "2"]) == 2
    one_line(capsys, "name the encoder itself")


def test_the_cascade_transcribes_with_it(own, capsys):
    asked = ["--per-prompt", "1", "--dialogues", "2", "--probes", "2", "--recipes", "asr"]
    run, asr = str(own / "run"), str(own / "data" / "recognizer")
    assert main(["bench", run, *asked, "--asr", asr, "--max-new-tokens", "8"]) == 0
    assert "cascade" in read_json(own / "run" / "report.json")["recipes"]


def test_word_times_are_found_with_one_trained_on_the_corpus_itself(own, monkeypatch):
    few = partial(RecognizerOptions, steps=30, batch_size=8)
    monkeypatch.setattr(corpora.word_times, "RecognizerOptions", few)
    shutil.rmtree(own / "data" / "recognizer")
    words = ["word-times", str(own / "data"), "--encoder", "tiny", "--force"]
    assert main(words) == 0
    assert (own / "data" / "recognizer" / "head.safetensors").exists()
    assert all(u.words for u in read_manifest(own / "data" / "manifest.jsonl"))


def test_word_times_of_a_bare_manifest_cannot_train_one(own, tmp_path, capsys):
    bare = shutil.copy(own / "data" / "manifest.jsonl", tmp_path / "bare.jsonl")
    assert main(["word-times", str(bare), "--encoder", "tiny"]) == 2
    one_line(capsys, "prepare")


# ---- pauses ----


def test_words_meet_in_the_pause_between_them():
    times = [[0.0, 0.2], [0.8, 1.0], [1.1, 1.2]]
    meet_midway(times, [(0.25, 0.3), (0.6, 0.75), (1.15, 1.3)])
    assert times[0][1] == times[1][0] == pytest.approx(0.675), "the longest pause"
    assert times[1][1] == times[2][0] == pytest.approx(1.05), "no pause lies between them"


def test_a_pause_is_silence_of_some_length():
    rng = np.random.default_rng(0)
    samples = rng.normal(0, 0.1, SAMPLE_RATE).astype(np.float32)
    samples[3200:4800] *= 0.001  # 0.2 to 0.3 s
    samples[8000:8160] *= 0.001  # 10 ms
    assert pauses_in(samples) == [(pytest.approx(0.2), pytest.approx(0.3))]
    assert pauses_in(samples[:0]) == []


def test_on_digit_strings_of_human_voices_words_are_cut_within_50_ms(tmp_path):
    """Joined recordings of the Free Spoken Digit Dataset, whose times are known."""
    manifest = shared("data/fsdd/manifest.jsonl")
    whisper = str(shared("models/whisper-tiny.en"))
    data = tmp_path / "data"
    words = ["prepare", str(manifest), "--out", str(data), "--join", "3:6", "--count", "150"]
    assert main([*words, "--test-speakers", "theo"]) == 0
    true = {u.id: u.words for u in read_manifest(data / "manifest.jsonl")}
    sizes = ["--steps", "120", "--batch-size", "8"]
    assert main(["recognizer", str(data), "--encoder", whisper, *sizes]) == 0
    assert main(["word-times", str(data), "--asr", str(data / "recognizer"), "--force"]) == 0
    off = []
    for u in read_manifest(data / "manifest.jsonl"):
        for at, (before, after) in enumerate(zip(true[u.id], true[u.id][1:])):
            off.append(abs(u.words[at][2] - (before[2] + after[1]) / 2))
    print(f"mean error of {len(off)} cuts: {1000 * np.mean(off):.1f} ms")
    assert np.mean(off) < 0.05


def test_its_frames_are_the_encoders(with_recognizer):
    """They are kept once, whoever hears them."""
    utterances = read_manifest(with_recognizer / "data" / "manifest.jsonl")[:2]
    folder = with_recognizer / "data" / "features"
    own = load_encoder(str(with_recognizer / "data" / "recognizer"))
    frames = [encode_all(encoder, utterances, folder) for encoder in (own, load_encoder("tiny"))]
    for u in utterances:
        assert torch.equal(frames[0][u.id], frames[1][u.id])
