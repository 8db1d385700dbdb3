"""`prepare` reads the common corpora as they are on disk; `word-times` times their words."""

import json
import os
import shutil
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
from checkpoints import SENTENCES, save_encoder
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import one_line

import corpora.prepare
import mtbi
from corpora.joining import lay_out, without_silence
from corpora.readers import download_librispeech
from corpora.word_times import pauses_in, spell, word_times
from data import SAMPLE_RATE, held_out, load_audio, normalize, read_manifest
from model import HuggingFaceEncoder
from support.files import UserError, read_json, read_jsonl, write_jsonl
from support.runs import lock_folder
from tiny import world

SAID = [
    "the farmer sold three red apples",
    "the baker bought two loaves",
    "a nurse found nine keys",
    "the pilot lost five maps",
    "one two three",
    "who did it",
    "the doctor saw seven birds",
    "the king ate four plums",
    "two five nine",
    "zero one",
    "every child has six toys",
    "ten green bottles",
]


def write_sound(path, seconds=1.0):
    """A tone of 440 Hz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    at = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * 440 * at), SAMPLE_RATE)


def prepare(*words):
    return mtbi.main(["prepare", *map(str, words)])


def prepared(folder, *words):
    """The utterances of the data folder FOLDER/data that `prepare` makes."""
    assert prepare(*words, "--out", folder / "data") == 0
    return read_manifest(folder / "data" / "manifest.jsonl", check_audio=True)


def splits(utterances):
    return {u.split for u in utterances}


# ---- corpora as they are on disk ----


def librispeech(root, part="dev-clean"):
    folder = root / "LibriSpeech" / part
    for n, text in enumerate(SAID):
        reader, chapter = 84 + n % 3, 121123
        beside = folder / f"{reader}/{chapter}"
        write_sound(beside / f"{reader}-{chapter}-{n:04d}.flac")
        with open(beside / f"{reader}-{chapter}.trans.txt", "a") as file:
            file.write(f"{reader}-{chapter}-{n:04d} {text.upper()}\n")
    return folder


def common_voice(root):
    lines = ["client_id\tpath\tsentence\tup_votes\tdown_votes\n"]
    for n, text in enumerate(SAID):
        write_sound(root / f"clips/clip{n}.mp3")
        lines.append(f"c{n % 4}\tclip{n}.mp3\t{text}.\t2\t0\n")
    (root / "train.tsv").write_text("".join(lines))
    return root / "train.tsv"


def ljspeech(root):
    lines = []
    for n, text in enumerate(SAID):
        write_sound(root / f"wavs/LJ001-{n:04d}.wav")
        lines.append(f'LJ001-{n:04d}|Dr. "{n}"|{text}\n')
    (root / "metadata.csv").write_text("".join(lines))
    return root


def kaldi(root):
    tables = {"wav.scp": [], "text": [], "utt2spk": []}
    for n, text in enumerate(SAID):
        audio = f"WAVE/S{n % 2}/{n:03d}.WAV"
        write_sound(root / audio)
        for table, value in zip(tables.values(), (audio, text.upper(), f"S{n % 2}")):
            table.append(f"{n:03d}\t{value}\n")
    (root / "train").mkdir()
    for name, lines in tables.items():
        (root / "train" / name).write_text("".join(lines))
    return root / "train"


def text_beside(root):
    for n, text in enumerate(SAID):
        write_sound(root / f"ann{n % 2}/{n}.ogg")
        (root / f"ann{n % 2}/{n}.txt").write_text(f"{text}\n")
    return root


def self_powered(root):
    """And BLSP: no durations, other names."""
    for n in range(len(SAID)):
        write_sound(root / f"{n}.wav")
    rows = [{"audio": f"{n}.wav", "text": text} for n, text in enumerate(SAID)]
    write_jsonl(root / "data.jsonl", rows)
    return root / "data.jsonl"


def nemo(root):
    path, rows = self_powered(root), []
    for n, text in enumerate(SAID):
        row = {"audio_filepath": str(root / f"{n}.wav"), "text": text, "speaker_id": n % 2}
        rows.append({**row, "duration": None if n else 1.0, "offset": 0.0})
    write_jsonl(path, rows)
    return path


@pytest.mark.parametrize(
    "corpus, speakers",
    [
        (librispeech, {"84", "85", "86"}),
        (common_voice, {"c0", "c1", "c2", "c3"}),
        (ljspeech, {""}),
        (kaldi, {"S0", "S1"}),
        (text_beside, {"ann0", "ann1"}),
        (self_powered, {""}),
        (nemo, {"0", "1"}),
    ],
)
def test_corpora_as_they_are_on_disk(tmp_path, corpus, speakers):
    (tmp_path / "corpus").mkdir()
    made = prepared(tmp_path, corpus(tmp_path / "corpus"))
    said = sorted(u.text.rstrip(".") for u in made)
    assert said == sorted(SAID), "every transcript, capitals in small letters"
    assert {u.speaker for u in made} == speakers and splits(made) == {"train", "test"}
    for u in made:
        assert u.duration == pytest.approx(1.0, abs=0.1) and u.audio.exists()
        assert (u.split == "test") == held_out(u.text)


def test_librispeech_is_unpacked_by_torchaudio_once_and_never_left_half_unpacked(tmp_path, capsys):
    """Without a network: torchaudio finds the archive already there."""
    root = tmp_path / "datasets"
    archive = root / ".arriving-dev-clean" / "dev-clean.tar.gz"
    # what an interrupted unpacking leaves
    (archive.parent / "LibriSpeech/dev-clean/half").mkdir(parents=True)
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(librispeech(tmp_path / "source").parent, "LibriSpeech")
    words = ["librispeech", "dev-clean", "--download-to", root]
    assert len(prepared(tmp_path, *words)) == len(SAID)
    assert sorted(path.name for path in root.iterdir()) == [".mtbi-lock", "LibriSpeech"]
    capsys.readouterr()
    assert len(prepared(tmp_path, *words)) == len(SAID)
    assert "is prepared already" in capsys.readouterr().out
    assert len(prepared(tmp_path / "again", root / "LibriSpeech" / "dev-clean")) == len(SAID)


def test_a_part_of_librispeech_that_two_commands_want_is_downloaded_once(tmp_path, monkeypatch):
    """Or one would delete what the other is unpacking."""
    unpacked = []

    def unpack(root, part, download):
        unpacked.append(part)
        (root / "LibriSpeech" / part).mkdir(parents=True)
        time.sleep(0.5)
        (root / "LibriSpeech" / part / "whole").touch()

    monkeypatch.setattr("torchaudio.datasets.LIBRISPEECH", unpack)
    with ThreadPoolExecutor() as pool:
        folders = list(pool.map(download_librispeech, ["dev-clean", "dev-clean"], [tmp_path] * 2))
    assert unpacked == ["dev-clean"]
    assert all((folder / "whole").exists() for folder in folders)


def test_librispeech_parts_are_checked_before_any_folder_is_touched(tmp_path, capsys):
    (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    for part in ("foo/..", "../../x", "/tmp", "DEV-CLEAN"):
        words = ["librispeech", part, "--download-to", tmp_path, "--out", tmp_path / "out"]
        for _ in range(2):
            assert prepare(*words) == 2
            one_line(capsys, "has no part")
    assert [path.name for path in tmp_path.rglob("*")] == ["LibriSpeech", "train-clean-100"]


def test_a_damaged_archive_is_deleted_so_that_the_same_command_works(tmp_path, capsys):
    archive = tmp_path / ".arriving-dev-clean" / "dev-clean.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"<html>not found</html>")
    words = ["librispeech", "dev-clean", "--download-to", tmp_path, "--out", tmp_path / "out"]
    assert prepare(*words) == 2
    one_line(capsys, "damaged", "run the same command again")
    assert not archive.exists()


def test_a_folder_with_a_manifest_is_that_manifest(tmp_path):
    self_powered(tmp_path).rename(tmp_path / "manifest.jsonl")
    assert len(prepared(tmp_path / "made", tmp_path)) == len(SAID)


# ---- what is not whole ----


def broken_corpora(root):
    """Of each kind one that cannot be read."""
    (root / "cv" / "clips").mkdir(parents=True)
    (root / "bad.tsv").write_text("a\tb\n1\t2\n")
    (root / "metadata.csv").write_text("no bars here\n")
    write_sound(root / "beside" / "a.wav")
    (root / "four.csv").write_text("a|three apples|three apples|ann\n")
    (root / "twice").mkdir()
    (root / "twice" / "wav.scp").write_text("u1 a.wav\nu1 b.wav\n")
    (root / "scp").mkdir()
    (root / "scp" / "wav.scp").write_text("u1 sph2pipe -f wav u1.sph |\n")
    (root / "segments").mkdir()
    (root / "segments" / "wav.scp").write_text("u1 u1.wav\n")
    (root / "segments" / "segments").write_text("u1-a u1 0.0 0.5\n")
    (root / "latin.tsv").write_bytes("path\tsentence\nmañana".encode("latin-1"))


@pytest.mark.parametrize(
    "words, reasons",
    [
        ("librispeech", ["name a part"]),
        ("librispeech dev-dirty", ["dev-dirty"]),
        ("{tmp} dev-clean", ["only librispeech has parts"]),
        ("{tmp}/cv", ["name one of its tables"]),
        ("{tmp}/bad.tsv", ["no columns path and sentence"]),
        ("{tmp}/metadata.csv", ["metadata.csv:1: is no line"]),
        ("{tmp}/beside", ["has no a.txt beside it"]),
        ("{tmp}/four.csv", ["four.csv:1: has 4 columns"]),
        ("{tmp}/twice", ["u1 stands in it twice"]),
        ("{tmp}/scp", ["made by a command"]),
        ("{tmp}/segments", ["segments", "cut them into files"]),
        ("{tmp}/latin.tsv", ["cannot be read"]),
        ("{tmp}/none", ["no such file"]),
    ],
)
def test_corpora_that_are_not_whole_are_explained_in_one_line(tmp_path, words, reasons, capsys):
    broken_corpora(tmp_path)
    before = [path for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    elsewhere = ["--out", tmp_path / "out", "--download-to", tmp_path / "none"]
    assert prepare(*words.format(tmp=tmp_path).split(), *elsewhere) == 2
    one_line(capsys, *reasons)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.is_file()] == before


def test_skip_bad_passes_over_what_a_reader_cannot_read(tmp_path):
    root = text_beside(tmp_path)
    write_sound(root / "ann0/latin.wav")
    (root / "ann0/latin.txt").write_bytes("mañana".encode("latin-1"))
    write_sound(root / "ann0/folder.wav")
    (root / "ann0/folder.txt").mkdir()
    assert len(prepared(tmp_path / "a", root, "--skip-bad")) == len(SAID)
    table = common_voice(tmp_path / "cv")
    table.write_text(table.read_text() + "abc\n" + "a\tb\tc\td\te\tf\n")
    assert len(prepared(tmp_path / "b", table, "--skip-bad")) == len(SAID)
    skipped = [row for _, row in read_jsonl(tmp_path / "b" / "data" / "skipped.jsonl")]
    assert [row["line"] for row in skipped] == [len(SAID) + 2, len(SAID) + 3]
    assert "has 1 columns, not 5" in skipped[0]["reason"]
    assert "has 6 columns, not 5" in skipped[1]["reason"]


def test_a_speakers_folder_that_is_a_link_is_read_once_wherever_links_lead(tmp_path):
    root = text_beside(tmp_path / "real")
    shutil.move(root / "ann1", tmp_path / "far")
    (root / "bob").symlink_to(tmp_path / "far")
    (root / "ann0" / "up").symlink_to(root)
    rows = prepared(tmp_path, root)
    assert len(rows) == len(SAID)
    assert {u.speaker for u in rows} == {"ann0", "bob"}


@pytest.mark.skipif(sys.platform != "linux", reason="others allow no such names")
def test_skip_bad_passes_over_a_file_whose_name_is_no_text(tmp_path):
    root = text_beside(tmp_path)
    write_sound(root / "ann0/plain.wav")
    os.rename(root / "ann0/plain.wav", os.fsencode(root / "ann0") + b"/caf\xe9.wav")
    (root / os.fsdecode(b"ann0/caf\xe9.txt")).write_text("a text")
    assert len(prepared(tmp_path / "a", root, "--skip-bad")) == len(SAID)
    [skipped] = [row for _, row in read_jsonl(tmp_path / "a" / "data" / "skipped.jsonl")]
    assert skipped["audio_filepath"].endswith("caf\\udce9.wav")


def test_a_speaker_whose_name_has_a_comma_can_be_held_out(tmp_path):
    rows = []
    for n, name in enumerate(["Smith, John", " bob ", "ann"]):
        write_sound(tmp_path / f"{n}.wav")
        rows.append({"audio_filepath": f"{n}.wav", "text": SAID[n], "speaker": name})
    write_jsonl(tmp_path / "m.jsonl", rows)
    made = prepared(tmp_path / "a", tmp_path / "m.jsonl", "--test-speakers", "Smith, John")
    assert [u.split for u in made] == ["test", "train", "train"]
    made = prepared(tmp_path / "b", tmp_path / "m.jsonl", "--test-speakers", "bob, ann")
    assert [u.split for u in made] == ["train", "test", "test"]


def test_no_speaker_at_all_can_not_be_held_out(tmp_path, capsys):
    path = self_powered(tmp_path)
    assert prepare(path, "--out", tmp_path / "out", "--test-speakers", " , ") == 2
    one_line(capsys, "--test-speakers ,: names no speaker")


def test_what_was_skipped_is_named_when_the_same_command_is_given_again(tmp_path, capsys):
    root = text_beside(tmp_path)
    (root / "ann0" / "0.txt").unlink()
    words = [root, "--out", tmp_path / "a", "--skip-bad", "--test-only"]
    assert prepare(*words) == 0 and "skipped" in capsys.readouterr().out
    assert prepare(*words) == 0
    assert "what --skip-bad left out is in" in capsys.readouterr().out


def test_one_recording_under_two_names_is_one_recording(tmp_path, capsys):
    path = self_powered(tmp_path)
    with open(path, "a") as file:
        file.write(json.dumps({"audio": "./0.wav", "text": "another text"}) + "\n")
    assert prepare(path, "--out", tmp_path / "out") == 2
    one_line(capsys, ":13", "same audio file as line 1")


# ---- the split ----


def test_a_sentence_is_not_new_because_of_its_capitals_or_its_full_stop(tmp_path):
    path = self_powered(tmp_path)
    rows = [row for _, row in read_jsonl(path)]
    for n, text in enumerate(SAID):
        write_sound(tmp_path / f"again{n}.wav")
        rows.append({"audio": f"again{n}.wav", "text": text.capitalize() + "."})
    write_jsonl(path, rows)
    made = prepared(tmp_path, path)
    trained = {normalize(u.text) for u in made if u.split == "train"}
    tested = {normalize(u.text) for u in made if u.split == "test"}
    assert trained and tested and not trained & tested


def test_test_only_holds_out_every_row_of_any_corpus(tmp_path, capsys):
    made = prepared(tmp_path, self_powered(tmp_path), "--test-only")
    assert len(made) == len(SAID) and splits(made) == {"test"}
    said = capsys.readouterr().out
    assert "{'test': 12} (--test-only: every row is held out)" in said and "left out" not in said
    rendered = prepared(tmp_path / "tiny", "tiny", "--test", 3, "--test-only")
    assert len(rendered) == 3 and splits(rendered) == {"test"} and all(u.words for u in rendered)
    assert {u.kind for u in rendered} <= set(world.KINDS)
    assert read_json(tmp_path / "tiny" / "data" / "config.json")["options"]["train"] == 0


def test_test_only_joins_words_to_a_test_set(tmp_path):
    rows = []
    for n in range(10):
        write_sound(tmp_path / f"{n}.wav", 0.3)
        rows.append({"audio": f"{n}.wav", "text": f"word{n}", "speaker": "ab"[n % 2]})
    write_jsonl(tmp_path / "words.jsonl", rows)
    join = ["--join", "2:4", "--count", 6]
    made = prepared(tmp_path, tmp_path / "words.jsonl", *join, "--test-only")
    assert len(made) == 6 and splits(made) == {"test"}
    assert all(held_out(u.text) and 2 <= len(u.words) <= 4 for u in made)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4000), st.floats(-0.06, 0.25)),
        min_size=1,
        max_size=6,
    )
)
def test_words_follow_each_other_with_pauses_or_cross_faded_and_their_times_never_overlap(words):
    said = [(f"word{n}", np.ones(length, dtype=np.float32)) for n, (length, _) in enumerate(words)]
    samples, times = lay_out(said, [pause for _, pause in words])
    assert [word for word, _, _ in times] == [word for word, _ in said]
    edges = [edge for _, *both in times for edge in both]
    assert edges == sorted(edges) and edges[0] >= 0
    assert edges[-1] == pytest.approx(len(samples) / SAMPLE_RATE)
    assert 0 <= samples.min() and samples.max() <= 1 + 1e-6, "cross-fading adds up to one"
    assert samples.sum() <= sum(length for length, _ in words) + 1e-3


def test_silence_around_a_word_goes_and_the_word_stays():
    quiet, word = np.zeros(8000, dtype=np.float32), np.full(4000, 0.5, dtype=np.float32)
    heard = without_silence(np.concatenate([quiet, word, quiet]))
    assert 4000 <= len(heard) <= 4000 + 4 * 160
    assert heard.sum() == pytest.approx(word.sum())
    assert len(without_silence(quiet)) == len(quiet), "of nothing but silence nothing goes"


def test_strings_said_in_one_go_are_tight_and_those_for_training_are_varied(tmp_path, capsys):
    rows = []
    for n in range(20):
        write_sound(tmp_path / f"{n}.wav", 0.3)
        rows.append({"audio": f"{n}.wav", "text": f"word{n}", "speaker": "ab"[n % 2]})
    write_jsonl(tmp_path / "words.jsonl", rows)
    join = ["--join", "4:4", "--count", 20, "--test-speakers", "b"]
    made = prepared(tmp_path / "one", tmp_path / "words.jsonl", *join, "--one-go")
    usual = prepared(tmp_path / "usual", tmp_path / "words.jsonl", *join)
    lengths = {"train": [], "test": []}
    for u in made:
        lengths[u.split].append(u.duration)
    tested = [u.duration for u in usual if u.split == "test"]
    assert max(lengths["test"]) < min(tested)
    assert np.std(lengths["train"]) > np.std(lengths["test"]), "faster and slower"
    for u in made:
        assert 0 <= u.words[0][1] and u.words[-1][2] <= u.duration + 1e-3
    assert prepare(tmp_path / "words.jsonl", "--one-go", "--out", tmp_path / "x") == 2
    one_line(capsys, "say --join")


def test_a_manifest_of_test_rows_alone_is_a_test_set(tmp_path, capsys):
    path = self_powered(tmp_path)
    rows = [row for _, row in read_jsonl(path)]
    write_jsonl(path, [{**row, "split": "test"} for row in rows])
    made = prepared(tmp_path, path)
    assert len(made) == len(SAID) and splits(made) == {"test"}
    assert mtbi.main(["behaviors", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 2
    one_line(capsys, "has no row with split train")

    write_jsonl(path, [{**row, "split": "train"} for row in rows])
    assert prepare(path, "--out", tmp_path / "other") == 2
    one_line(capsys, "all 12 utterances are for training", "--test-only")
    made = prepared(tmp_path / "held-out", path, "--test-only")
    assert splits(made) == {"test"}, "whatever the manifest says"
    assert prepare(path, "--out", tmp_path / "other", "--test-only", "--test-speakers", "a") == 2
    one_line(capsys, "--test-only holds out every speaker")
    assert not (tmp_path / "other").exists()


# ---- two at once ----


def test_of_two_that_prepare_the_same_folder_at_once_the_second_is_refused(tmp_path, capsys):
    words = [self_powered(tmp_path), "--out", tmp_path / "data"]
    with lock_folder(tmp_path / "data"):
        for source in (words, ["tiny", "--test", 1, "--train", 1, *words[1:]]):
            assert prepare(*source) == 2
            one_line(capsys, "another process is at work in this folder")
        assert [path.name for path in (tmp_path / "data").iterdir()] == [".mtbi-lock"]
    assert prepare(*words) == 0


def test_what_another_process_prepared_meanwhile_is_not_made_again(tmp_path, capsys, monkeypatch):
    words = [self_powered(tmp_path), "--out", tmp_path / "data"]

    def while_another_prepares(*others):
        """read_manifest of `prepare`, during which another one does all of its work."""

        def read(*args, **options):
            monkeypatch.setattr(corpora.prepare, "read_manifest", read_manifest)
            assert prepare(*others) == 0
            capsys.readouterr()
            return read_manifest(*args, **options)

        return read

    monkeypatch.setattr(corpora.prepare, "read_manifest", while_another_prepares(*words))
    assert prepare(*words) == 0
    assert "is prepared already" in capsys.readouterr().out
    (tmp_path / "data" / "manifest.jsonl").unlink()
    others = [*words, "--skip-bad"]
    monkeypatch.setattr(
        corpora.prepare, "read_manifest", while_another_prepares(*others, "--force")
    )
    assert prepare(*words) == 2
    one_line(capsys, "was made with other settings", "skip_bad was True, now False")


# ---- word times ----


def write_bare(path, utterances, **change):
    """A manifest without word times; returns its path."""
    rows = [u.row(path.parent) for u in utterances]
    for row in rows:
        row.pop("words", None)
    write_jsonl(path, [{**row, **change} for row in rows])
    return path


def find_word_times(*words):
    return mtbi.main(["word-times", *map(str, words)])


def in_order(words, duration):
    """Do word times lie within the audio, one after the other?"""
    inside = all(0 <= start <= end <= duration for _, start, end in words)
    return inside and all(a[2] <= b[1] + 1e-6 for a, b in zip(words, words[1:]))


def test_word_times_are_written_beside_a_manifest_that_is_not_ours(utterances, tmp_path, capsys):
    bare = write_bare(tmp_path / "mine.jsonl", utterances[:4])
    before = bare.read_text()
    assert find_word_times(bare, "--out", tmp_path / "timed.jsonl") == 0
    assert find_word_times(bare) == 0
    for name in ("timed.jsonl", "mine-aligned.jsonl"):
        for u in read_manifest(tmp_path / name, check_audio=True):
            assert [word for word, _, _ in u.words] == u.text.split()
            assert in_order(u.words, u.duration)
    assert find_word_times(bare, "--out", bare) == 2
    one_line(capsys, "would overwrite")
    # a config.json may be anybody's
    (tmp_path / "config.json").write_text("{}")
    bare.rename(tmp_path / "manifest.jsonl")
    assert find_word_times(tmp_path) == 0
    assert (tmp_path / "manifest.jsonl").read_text() == before
    assert all(u.words for u in read_manifest(tmp_path / "manifest-aligned.jsonl"))


def test_word_times_are_added_to_a_data_folder_in_place(utterances, tmp_path, capsys):
    both = [utterances[0], utterances[1], utterances[-1]]
    data, manifest = tmp_path / "data", tmp_path / "data" / "manifest.jsonl"
    made = prepared(tmp_path, write_bare(tmp_path / "mine.jsonl", both), "--test-only")
    assert not any(u.words for u in made)
    with lock_folder(data):
        assert find_word_times(data) == 2
        one_line(capsys, "another process is at work in this folder")
    assert find_word_times(data) == 0 and all(u.words for u in read_manifest(manifest))
    stamp = manifest.stat().st_mtime_ns
    capsys.readouterr()
    assert find_word_times(data) == 0 and manifest.stat().st_mtime_ns == stamp
    assert "have word times already" in capsys.readouterr().out
    assert find_word_times(data, "--force") == 0 and manifest.stat().st_mtime_ns != stamp


def test_only_rows_without_word_times_get_some(utterances, tmp_path):
    rows = [u.row(tmp_path) for u in utterances[:2]]
    del rows[1]["words"]
    write_jsonl(tmp_path / "half.jsonl", rows)
    assert find_word_times(tmp_path / "half.jsonl") == 0
    kept, found = read_manifest(tmp_path / "half-aligned.jsonl")
    assert kept.row(tmp_path) == rows[0] and found.words


def test_word_times_want_a_ctc_model(utterances, tmp_path, capsys):
    bare = write_bare(tmp_path / "mine.jsonl", utterances[:1])
    whisper = tmp_path / "whisper"
    whisper.mkdir()
    assert find_word_times(bare, "--asr", save_encoder(whisper, "whisper")) == 2
    one_line(capsys, "has no CTC head to align with; name a CTC model")


def test_a_transcript_that_does_not_fit_leaves_its_row_without_times_and_is_named(
    utterances, tmp_path, capsys
):
    write_bare(tmp_path / "fits.jsonl", utterances[:1])
    write_bare(tmp_path / "long.jsonl", utterances[1:2], text="seven " * 20)
    lines = (tmp_path / "fits.jsonl").read_text() + (tmp_path / "long.jsonl").read_text()
    (tmp_path / "both.jsonl").write_text(lines)
    assert find_word_times(tmp_path / "both.jsonl") == 0
    found = read_manifest(tmp_path / "both-aligned.jsonl")
    assert [bool(u.words) for u in found] == [True, False]
    said = capsys.readouterr().out
    assert "1 could not be aligned, and are never interleaved if they had no times" in said
    assert f"{utterances[1].audio.name}: the transcript does not fit the audio: " in said


def test_what_cannot_be_aligned_keeps_the_word_times_that_it_had(utterances, tmp_path):
    paths = [Path(shutil.copy(u.audio, tmp_path)) for u in utterances[:2]]
    given = [replace(u, audio=path) for u, path in zip(utterances, paths)]
    write_jsonl(tmp_path / "m.jsonl", [u.row(tmp_path) for u in given])
    samples = load_audio(paths[1])
    soundfile.write(paths[1], samples[: int(0.97 * len(samples))], SAMPLE_RATE)
    rows = [u.row(tmp_path) for u in given]
    text = "seven " * (2 * len(samples) // SAMPLE_RATE + 8)  # in what was made shorter
    end = rows[1]["duration"]
    words = [[word, end, end] for word in text.split()]
    rows[1] |= {"text": text.strip(), "words": words}
    write_jsonl(tmp_path / "m.jsonl", rows)
    assert find_word_times(tmp_path / "m.jsonl", "--out", tmp_path / "new.jsonl", "--force") == 0
    first, second = read_manifest(tmp_path / "new.jsonl")
    assert first.words != read_manifest(tmp_path / "m.jsonl")[0].words
    assert second.words == read_manifest(tmp_path / "m.jsonl")[1].words


def test_a_recording_that_cannot_be_read_leaves_the_others_their_word_times(utterances, tmp_path):
    paths = [shutil.copy(u.audio, tmp_path) for u in utterances[:2]]
    bare = write_bare(tmp_path / "mine.jsonl", [replace(utterances[0], audio=Path(paths[0]))])
    (tmp_path / "bad.wav").write_bytes(Path(paths[1]).read_bytes()[:300])
    row = {"audio_filepath": "bad.wav", "text": "two five", "duration": 2.0}
    with open(bare, "a") as file:
        file.write(json.dumps(row) + "\n")
    assert find_word_times(bare) == 0
    found = read_manifest(tmp_path / "mine-aligned.jsonl")
    assert [bool(u.words) for u in found] == [True, False]


def test_word_times_say_so_when_the_ctc_model_does_not_understand(utterances, tmp_path, capsys):
    rows = []
    for n in range(3):
        noise = np.random.default_rng(n).normal(0, 0.1, 2 * SAMPLE_RATE)
        soundfile.write(tmp_path / f"{n}.wav", noise, SAMPLE_RATE)
        rows.append({"audio_filepath": f"{n}.wav", "duration": 2.0, "text": "who did it"})
    write_jsonl(tmp_path / "noise.jsonl", rows)
    assert find_word_times(tmp_path / "noise.jsonl") == 0
    assert "hardly understands this speech" in capsys.readouterr().out
    assert find_word_times(write_bare(tmp_path / "speech.jsonl", utterances[:12])) == 0
    assert "hardly understands" not in capsys.readouterr().out


def test_word_times_are_close_to_espeaks_own_on_unseen_voices(encoder, utterances, frames):
    errors = []
    for u in utterances:
        if u.split == "test":
            pauses = pauses_in(load_audio(u.audio))
            words, _ = word_times(encoder, frames[u.id], u.text, u.duration, pauses)
            errors += [abs(a[1] - b[1]) for a, b in zip(words[1:], u.words[1:])]
    print(f"mean error of {len(errors)} boundaries: {1000 * np.mean(errors):.1f} ms")
    assert np.mean(errors) <= 0.03


def test_a_number_gets_the_time_in_which_it_was_said(encoder, utterances, frames):
    """ "three" written as 7: the CTC vocabulary has no letter of it, and still it has its time."""
    errors = []
    for u in utterances:
        if u.split == "train" or len(u.words) <= 3:
            continue
        at, text = len(u.words) // 2, u.text.split()
        text[at] = "7"
        pauses = pauses_in(load_audio(u.audio))
        words, _ = word_times(encoder, frames[u.id], " ".join(text), u.duration, pauses)
        assert [word for word, _, _ in words] == text
        errors += [abs(words[at][i] - u.words[at][i]) for i in (1, 2)]
    print(f"mean error of {len(errors)} such boundaries: {1000 * np.mean(errors):.1f} ms")
    assert np.mean(errors) <= 0.04


def test_words_that_cannot_be_spelled_keep_their_places(encoder, utterances, frames):
    u = utterances[0]
    text = f"— {u.text} 12 —"
    words, _ = word_times(encoder, frames[u.id], text, u.duration)
    assert [word for word, _, _ in words] == text.split() and in_order(words, u.duration)


@pytest.mark.parametrize(
    "text, reason",
    [
        ("seven " * 200, "the transcript does not fit the audio: "),
        ("— … !", "its transcript has no letters and no digits"),
    ],
)
def test_what_cannot_be_aligned_is_explained(encoder, utterances, frames, text, reason):
    with pytest.raises(UserError, match=reason):
        word_times(encoder, frames[utterances[0].id], text, utterances[0].duration)


@pytest.mark.parametrize("kind", ["wav2vec2-ctc", "hubert-ctc", "wavlm-ctc", "parakeet"])
def test_every_family_of_ctc_models_gives_every_word_a_time(kind, tmp_path):
    encoder = HuggingFaceEncoder(save_encoder(tmp_path, kind))
    audio = np.random.default_rng(0).standard_normal(12 * SAMPLE_RATE, dtype=np.float32) * 0.1
    text = "The farmer sold 12 red apples — naïvely, №5!"
    words, score = word_times(encoder, encoder(audio), text, 12.0)
    assert [word for word, _, _ in words] == text.split() and in_order(words, 12.0)
    assert 0 <= score <= 1


def test_numbers_are_any_sound_in_a_vocabulary_of_word_pieces_without_digits():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import ParakeetTokenizer

    pieces = Tokenizer(models.BPE(unk_token="<unk>"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>", "<pad>"], show_progress=False
    )
    pieces.train_from_iterator(SENTENCES[:2], trainer)
    tokenizer = ParakeetTokenizer(tokenizer_object=pieces, unk_token="<unk>", pad_token="<pad>")
    assert (
        spell(tokenizer, "12") == spell(tokenizer, "$5") == [None] and spell(tokenizer, "—") == []
    )
    hindi = spell(tokenizer, "नमस्ते")
    assert hindi and set(hindi) == {None}
    assert spell(tokenizer, "farmer,") == spell(tokenizer, "FARMER")
    assert None not in spell(tokenizer, "farmer,")
    *red, two = spell(tokenizer, "red2")
    assert red and None not in red and two is None


def test_on_human_speech_the_tiny_encoder_is_rough_and_says_so(tmp_path, capsys):
    recordings = []
    for u in read_manifest(shared("data/fsdd") / "manifest.jsonl"):
        _, speaker, take = u.audio.stem.split("_")
        if speaker in ("theo", "jackson") and int(take) < 6:
            recordings.append(u)
    words = write_bare(tmp_path / "words.jsonl", recordings)
    joined = ["--join", "3:5", "--count", 30, "--test-speakers", "theo"]
    known = prepared(tmp_path, words, *joined)
    assert find_word_times(write_bare(tmp_path / "bare.jsonl", known)) == 0
    assert "hardly understands this speech" in capsys.readouterr().out
    errors = []
    for u, v in zip(known, read_manifest(tmp_path / "bare-aligned.jsonl")):
        if v.words:
            errors += [abs(a[1] - b[1]) for a, b in zip(u.words[1:], v.words[1:])]
    print(f"mean error of {len(errors)} boundaries: {1000 * np.mean(errors):.1f} ms")
    assert len(errors) > 60
