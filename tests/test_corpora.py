"""prepare reads the common corpora as they are on disk; align finds word times."""

import json
import tarfile

import numpy as np
import pytest
import soundfile
from conftest import shared
from test_data import one_line, tone

import mtbi
from corpora import word_times
from data import read_manifest
from files import read_jsonl

SAID = ["the farmer sold three red apples", "the baker bought two loaves", "a nurse found nine keys", "the pilot lost five maps", "one two three",
        "who did it", "the doctor saw seven birds", "the king ate four plums", "two five nine", "zero one", "every child has six toys", "ten green bottles"]


def sound(path, seconds=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(seconds), 16000)


def prepared(tmp_path, *source):
    assert mtbi.main(["prepare", *map(str, source), "--out", str(tmp_path / "data")]) == 0
    return read_manifest(tmp_path / "data" / "manifest.jsonl", check_audio=True)


def librispeech(root, part="dev-clean"):
    folder = root / "LibriSpeech" / part
    for n, text in enumerate(SAID):
        reader, chapter = 84 + n % 3, 121123
        sound(folder / f"{reader}/{chapter}/{reader}-{chapter}-{n:04d}.flac")
        with open(folder / f"{reader}/{chapter}/{reader}-{chapter}.trans.txt", "a") as file:
            file.write(f"{reader}-{chapter}-{n:04d} {text.upper()}\n")
    return folder


def common_voice(root):
    rows = [f"c{n % 4}\tclip{n}.mp3\t{text}.\t2\t0" for n, text in enumerate(SAID)]
    for n in range(len(SAID)):
        sound(root / f"clips/clip{n}.mp3")
    (root / "train.tsv").write_text("client_id\tpath\tsentence\tup_votes\tdown_votes\n" + "\n".join(rows) + "\n")
    return root / "train.tsv"


def ljspeech(root):
    for n in range(len(SAID)):
        sound(root / f"wavs/LJ001-{n:04d}.wav")
    (root / "metadata.csv").write_text("".join(f'LJ001-{n:04d}|Dr. "{n}"|{text}\n' for n, text in enumerate(SAID)))
    return root


def kaldi(root):
    for n in range(len(SAID)):
        sound(root / f"WAVE/S{n % 2}/{n:03d}.WAV")
    (root / "train").mkdir()
    (root / "train/wav.scp").write_text("".join(f"{n:03d}\tWAVE/S{n % 2}/{n:03d}.WAV\n" for n in range(len(SAID))))
    (root / "train/text").write_text("".join(f"{n:03d}\t{text.upper()}\n" for n, text in enumerate(SAID)))
    (root / "train/utt2spk").write_text("".join(f"{n:03d}\tS{n % 2}\n" for n in range(len(SAID))))
    return root / "train"


def text_beside(root):
    for n, text in enumerate(SAID):
        sound(root / f"ann{n % 2}/{n}.ogg")
        (root / f"ann{n % 2}/{n}.txt").write_text(f"{text}\n")
    return root


def self_powered(root):                                            # and BLSP: no durations, other names
    for n in range(len(SAID)):
        sound(root / f"{n}.wav")
    (root / "data.jsonl").write_text("".join(json.dumps({"audio": f"{n}.wav", "text": text}) + "\n" for n, text in enumerate(SAID)))
    return root / "data.jsonl"


def nemo(root):
    path = self_powered(root)
    path.write_text("".join(json.dumps({"audio_filepath": str(root / f"{n}.wav"), "duration": None if n else 1.0, "offset": 0.0, "text": text,
                                        "speaker_id": n % 2}) + "\n" for n, text in enumerate(SAID)))
    return path


@pytest.mark.parametrize("corpus, speakers", [(librispeech, {"84", "85", "86"}), (common_voice, {"c0", "c1", "c2", "c3"}), (ljspeech, {""}),
                                              (kaldi, {"S0", "S1"}), (text_beside, {"ann0", "ann1"}), (self_powered, {""}), (nemo, {"0", "1"})])
def test_corpora_as_they_are_on_disk(tmp_path, corpus, speakers):
    (tmp_path / "corpus").mkdir()
    made = prepared(tmp_path, corpus(tmp_path / "corpus"))
    assert sorted(u.text.rstrip(".") for u in made) == sorted(SAID), "every transcript, capitals in small letters"
    assert {u.speaker for u in made} == speakers and all(u.duration == pytest.approx(1.0, abs=0.1) and u.audio.exists() for u in made)
    assert {u.split for u in made} == {"train", "test"}


def test_librispeech_is_unpacked_by_torchaudio_once_and_never_left_half_unpacked(tmp_path, capsys):
    """Without a network: torchaudio finds the archive already there."""
    archive = tmp_path / "datasets" / ".arriving-dev-clean" / "dev-clean.tar.gz"
    archive.parent.mkdir(parents=True)
    (archive.parent / "LibriSpeech/dev-clean/half").mkdir(parents=True)      # what an interrupted unpacking leaves
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(librispeech(tmp_path / "source").parent, "LibriSpeech")
    argv = ["prepare", "librispeech", "dev-clean", "--download-to", str(tmp_path / "datasets"), "--out", str(tmp_path / "data")]
    assert mtbi.main(argv) == 0 and len(read_manifest(tmp_path / "data" / "manifest.jsonl", check_audio=True)) == len(SAID)
    assert [p.name for p in (tmp_path / "datasets").iterdir()] == ["LibriSpeech"]
    assert mtbi.main(argv) == 0 and "is prepared already" in capsys.readouterr().out
    assert mtbi.main(["prepare", str(tmp_path / "datasets" / "LibriSpeech" / "dev-clean"), "--out", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize("argv, reason", [
    (["librispeech"], "name a part"), (["librispeech", "dev-dirty"], "dev-dirty"), (["{tmp}", "dev-clean"], "only librispeech has parts"),
    (["{tmp}/cv"], "name one of its tables"), (["{tmp}/bad.tsv"], "no columns path and sentence"), (["{tmp}/metadata.csv"], "metadata.csv:1: is no line"),
    (["{tmp}/beside"], "has no a.txt beside it"), (["{tmp}/scp"], "made by a command"), (["{tmp}/latin.tsv"], "cannot be read"),
    (["{tmp}/none"], "no such file"),
])
def test_corpora_that_are_not_whole_are_explained_in_one_line(tmp_path, argv, reason, capsys):
    (tmp_path / "cv" / "clips").mkdir(parents=True)
    (tmp_path / "bad.tsv").write_text("a\tb\n1\t2\n")
    (tmp_path / "metadata.csv").write_text("no bars here\n")
    sound(tmp_path / "beside" / "a.wav")
    (tmp_path / "scp").mkdir()
    (tmp_path / "scp" / "wav.scp").write_text("u1 sph2pipe -f wav u1.sph |\n")
    (tmp_path / "latin.tsv").write_bytes("path\tsentence\nmañana".encode("latin-1"))
    files = sorted(tmp_path.rglob("*"))
    assert mtbi.main(["prepare", *(a.format(tmp=tmp_path) for a in argv), "--out", str(tmp_path / "out"), "--download-to", str(tmp_path / "none")]) == 2
    one_line(capsys, reason)
    assert [p for p in sorted(tmp_path.rglob("*")) if p.is_file()] == [p for p in files if p.is_file()]


def test_librispeech_parts_are_checked_before_any_folder_is_touched(tmp_path, capsys):
    (tmp_path / "LibriSpeech" / "train-clean-100").mkdir(parents=True)
    for _ in range(2):
        for part in ("foo/..", "../../x", "/tmp", "DEV-CLEAN"):
            assert mtbi.main(["prepare", "librispeech", part, "--download-to", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
            one_line(capsys, "has no part")
    assert [p.name for p in tmp_path.rglob("*")] == ["LibriSpeech", "train-clean-100"]


def test_a_damaged_archive_is_deleted_so_that_the_same_command_works(tmp_path, capsys):
    archive = tmp_path / ".arriving-dev-clean" / "dev-clean.tar.gz"
    archive.parent.mkdir()
    archive.write_bytes(b"<html>not found</html>")
    assert mtbi.main(["prepare", "librispeech", "dev-clean", "--download-to", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "damaged", "run the same command again")
    assert not archive.exists()


def test_skip_bad_passes_over_what_a_reader_cannot_read(tmp_path):
    root = text_beside(tmp_path)
    sound(root / "ann0/latin.wav")
    (root / "ann0/latin.txt").write_bytes("mañana".encode("latin-1"))
    sound(root / "ann0/folder.wav")
    (root / "ann0/folder.txt").mkdir()
    assert len(prepared(tmp_path / "a", root, "--skip-bad")) == len(SAID)
    table = common_voice(tmp_path / "cv")
    table.write_text(table.read_text() + "abc\n")
    assert len(prepared(tmp_path / "b", table, "--skip-bad")) == len(SAID)


def test_one_recording_under_two_names_is_one_recording(tmp_path, capsys):
    path = self_powered(tmp_path)
    path.write_text(path.read_text() + json.dumps({"audio": "./0.wav", "text": "another text"}) + "\n")
    assert mtbi.main(["prepare", str(path), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, ":13", "same audio file as line 1")


def test_a_sentence_is_not_new_because_of_its_capitals_or_its_full_stop(tmp_path):
    path = self_powered(tmp_path)
    more = []
    for n, text in enumerate(SAID):
        sound(tmp_path / f"again{n}.wav")
        more.append(json.dumps({"audio": f"again{n}.wav", "text": text.capitalize() + "."}) + "\n")
    path.write_text(path.read_text() + "".join(more))
    made = prepared(tmp_path, path)
    texts = {split: {u.text.lower().rstrip(".") for u in made if u.split == split} for split in ("train", "test")}
    assert texts["train"] and texts["test"] and not texts["train"] & texts["test"]


def test_a_kaldi_folder_with_segments_is_explained(tmp_path, capsys):
    folder = kaldi(tmp_path)
    (folder / "segments").write_text("000 000 0.0 0.5\n")
    assert mtbi.main(["prepare", str(folder), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "segments", "cut them into files")


def test_a_folder_with_a_manifest_is_that_manifest(tmp_path):
    self_powered(tmp_path).rename(tmp_path / "manifest.jsonl")
    assert len(prepared(tmp_path / "data", tmp_path)) == len(SAID)


# ---- word times ----

def bare(data, path, n=4, **change):
    rows = [{k: v for k, v in json.loads(line).items() if k != "words"} for line in (data / "manifest.jsonl").read_text().splitlines()[:n]]
    path.write_text("".join(json.dumps({**row, **change}) + "\n" for row in rows))


def test_align_adds_word_times_to_a_data_folder_in_place_and_beside_any_other_manifest(data, tmp_path, capsys):
    bare(data, data / "bare.jsonl")
    assert mtbi.main(["align", str(data / "bare.jsonl"), "--out", str(tmp_path / "aligned.jsonl")]) == 0
    assert all(len(u.words) == len(u.text.split()) for u in read_manifest(tmp_path / "aligned.jsonl", check_audio=True))
    own = tmp_path / "mine.jsonl"
    rows = [{**row, "split": ["train", "test"][n % 2]} for n, row in read_jsonl(tmp_path / "aligned.jsonl")]
    own.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "words"}) + "\n" for row in rows))
    assert mtbi.main(["align", str(own)]) == 0 and all(u.words for u in read_manifest(tmp_path / "mine-aligned.jsonl"))
    assert mtbi.main(["align", str(own), "--out", str(own)]) == 2
    one_line(capsys, "would overwrite")
    assert mtbi.main(["prepare", str(own), "--out", str(tmp_path / "data")]) == 0
    assert not any(u.words for u in read_manifest(tmp_path / "data" / "manifest.jsonl"))
    assert mtbi.main(["align", str(tmp_path / "data")]) == 0
    assert all(u.words for u in read_manifest(tmp_path / "data" / "manifest.jsonl"))
    assert mtbi.main(["align", str(tmp_path / "data")]) == 0 and "have word times already" in capsys.readouterr().out
    stamp = (tmp_path / "data" / "manifest.jsonl").stat().st_mtime_ns
    assert mtbi.main(["align", str(tmp_path / "data"), "--force"]) == 0 and (tmp_path / "data" / "manifest.jsonl").stat().st_mtime_ns != stamp
    (tmp_path / "config.json").write_text("{}")                    # anybody's: the manifest beside it is not ours to write to
    before = own.read_text()
    assert mtbi.main(["align", str(own)]) == 0 and own.read_text() == before


def test_a_transcript_that_does_not_fit_leaves_its_row_without_times_and_is_named(data, tmp_path, capsys):
    bare(data, data / "bare2.jsonl", 1)
    bare(data, data / "long.jsonl", 2, text="seven " * 200)
    (data / "both.jsonl").write_text((data / "bare2.jsonl").read_text() + (data / "long.jsonl").read_text().splitlines()[1] + "\n")
    assert mtbi.main(["align", str(data / "both.jsonl"), "--out", str(tmp_path / "aligned.jsonl")]) == 0
    assert [bool(u.words) for u in read_manifest(tmp_path / "aligned.jsonl")] == [True, False]
    assert "1 could not be aligned" in capsys.readouterr().out


def test_a_number_gets_the_time_in_which_it_was_said(encoder, utterances, frames):
    """"three" written as 3: no letter of it is in the CTC vocabulary, and still its time is about where the word was said."""
    errors = []
    for u in [u for u in utterances if u.split == "test" and len(u.words) > 3]:
        at = len(u.words) // 2
        text = " ".join("7" if i == at else word for i, (word, _, _) in enumerate(u.words))
        words, _ = word_times(encoder, frames[u.id], text, u.duration)
        assert [w for w, _, _ in words] == text.split()
        errors += [abs(words[at][1] - u.words[at][1]), abs(words[at][2] - u.words[at][2])]
    print(f"mean boundary error of words the vocabulary cannot spell: {1000 * np.mean(errors):.0f} ms over {len(errors)} boundaries")
    assert np.mean(errors) <= 0.06


def test_on_human_speech_the_tiny_encoder_is_rough_and_says_so(tmp_path, capsys):
    argv = ["prepare", str(shared("data/fsdd")), "--join", "3:5", "--count", "40", "--test-speakers", "theo", "--out", str(tmp_path / "data")]
    assert mtbi.main(argv) == 0
    known = read_manifest(tmp_path / "data" / "manifest.jsonl")
    (tmp_path / "data" / "bare.jsonl").write_text("".join(json.dumps({**u.row(tmp_path / "data"), "words": None}) + "\n" for u in known))
    assert mtbi.main(["align", str(tmp_path / "data" / "bare.jsonl"), "--out", str(tmp_path / "data" / "aligned.jsonl")]) == 0
    assert "hardly understands this speech" in capsys.readouterr().out
    found = read_manifest(tmp_path / "data" / "aligned.jsonl")
    errors = [abs(a[1] - b[1]) for u, v in zip(known, found) if v.words for a, b in zip(u.words[1:], v.words[1:])]
    print(f"mean boundary error of the tiny encoder on human digit strings: {1000 * np.mean(errors):.0f} ms over {len(errors)} boundaries")
    assert len(errors) > 60


def test_align_is_quiet_where_it_understands(data, tmp_path, capsys):
    bare(data, data / "understood.jsonl", 12)
    assert mtbi.main(["align", str(data / "understood.jsonl"), "--out", str(tmp_path / "aligned.jsonl")]) == 0
    assert "hardly understands" not in capsys.readouterr().out


def test_align_says_so_when_the_ctc_model_does_not_understand(tmp_path, capsys):
    for n in range(3):
        soundfile.write(tmp_path / f"{n}.wav", np.random.default_rng(n).normal(0, 0.1, 32000), 16000)
    (tmp_path / "noise.jsonl").write_text("".join(json.dumps({"audio_filepath": f"{n}.wav", "duration": 2.0, "text": "who did it"}) + "\n" for n in range(3)))
    assert mtbi.main(["align", str(tmp_path / "noise.jsonl")]) == 0
    assert "hardly understands this speech" in capsys.readouterr().out
