"""Audio and manifests, and what happens when they are bad: one line on stderr, exit code 2, nothing half-written."""

import json
import math

import numpy as np
import pytest
import soundfile
from conftest import ROOT, shared

import mtbi
from data import SAMPLE_RATE, held_out, load_audio, read_manifest
from files import UserError, read_jsonl, whole_file
from examples import load_tasks


def tone(seconds=1.0, rate=16000, channels=1):
    wave = 0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)
    return np.repeat(wave[:, None], channels, axis=1).astype(np.float32)


def manifest(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def clip(tmp_path):
    soundfile.write(tmp_path / "clip.wav", tone(), 16000)
    return {"audio_filepath": "clip.wav", "duration": 1.0, "text": "three red apples"}


@pytest.mark.parametrize("suffix, rate, channels", [("wav", 8000, 1), ("flac", 44100, 2), ("ogg", 22050, 1), ("mp3", 48000, 2), ("wav", 16000, 2)])
def test_audio_of_any_rate_channels_and_format(tmp_path, suffix, rate, channels):
    soundfile.write(tmp_path / f"a.{suffix}", tone(1.0, rate, channels), rate)
    samples = load_audio(tmp_path / f"a.{suffix}")
    assert samples.dtype == np.float32 and samples.ndim == 1 and len(samples) == pytest.approx(SAMPLE_RATE, rel=0.1)
    spectrum = np.abs(np.fft.rfft(samples[2000:12000]))
    assert np.argmax(spectrum) * SAMPLE_RATE / 10000 == pytest.approx(440, abs=5)


def break_missing(folder):
    (folder / "clip.wav").unlink()


def break_empty(folder):
    (folder / "clip.wav").write_bytes(b"")


def break_truncated(folder):
    (folder / "clip.wav").write_bytes((folder / "clip.wav").read_bytes()[:9000])


def break_flac(folder):
    soundfile.write(folder / "clip.flac", np.random.default_rng(0).standard_normal(16000) * 0.1, 16000)
    (folder / "clip.wav").write_bytes((folder / "clip.flac").read_bytes()[:9000])


def break_short(folder):
    soundfile.write(folder / "clip.wav", tone(0.4), 16000)


def break_nan(folder):
    soundfile.write(folder / "clip.wav", np.full(16000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")


def break_silent(folder):
    soundfile.write(folder / "clip.wav", np.zeros(16000), 16000)


def break_no_audio(folder):
    (folder / "clip.wav").write_text("this is no sound")


BAD_AUDIO = [(break_missing, "no such audio"), (break_empty, "is empty"), (break_truncated, "truncated"), (break_flac, "truncated|cannot be read"),
             (break_short, "truncated"), (break_nan, "NaN"), (break_silent, "silent"), (break_no_audio, "cannot be read as audio")]
BAD_ROWS = [({"text": ""}, "transcript is empty"), ({"text": "  "}, "transcript is empty"), ({"text": 3}, "'text' is 3"),
            ({"duration": "long"}, "'duration' is 'long'"), ({"offset": 3.5}, "has the offset 3.5"),
            ({"duration": -1}, "duration is -1"), ({"duration": math.inf}, "duration is inf"), ({"duration": math.nan}, "duration is nan"),
            ({"words": [["three", 0.5, 0.4], ["red", 0.5, 0.6], ["apples", 0.6, 0.9]]}, "run backwards"),
            ({"words": [["three", 0.1, 0.4], ["red", 0.2, 0.6], ["apples", 0.6, 0.9]]}, "run backwards"),
            ({"words": [["three", 0.1, 0.4], ["red", 0.5, 0.6], ["apples", 0.6, 1.9]]}, "past the end"),
            ({}, "same audio file as line 1"), ({"audio_filepath": "b.wav", "split": "dev"}, "'split' is 'dev'"),
            ({"words": [["three", 0.1, 0.4]]}, "1 words"), ({"words": "three"}, "'words' must be"), ({"words": [["three", "x", 1]] * 3}, "'words' must be")]


def one_line(capsys, *needed):
    err = capsys.readouterr().err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("mtbi: ")]
    assert len(lines) == 1 and "Traceback" not in err, err
    assert all(n in lines[0] for n in needed), lines[0]
    return lines[0]


@pytest.mark.parametrize("break_it, reason", BAD_AUDIO)
def test_bad_audio_is_refused_in_one_line_that_names_file_and_line(tmp_path, clip, capsys, break_it, reason):
    path = manifest(tmp_path, clip)
    break_it(tmp_path)
    assert mtbi.main(["prepare", str(path), "--out", str(tmp_path / "out")]) == 2
    line = one_line(capsys, f"{path}:1", "clip.wav")
    assert any(r in line for r in reason.split("|")) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, reason", BAD_ROWS)
def test_bad_rows_are_refused_in_one_line_that_names_file_and_line(tmp_path, clip, capsys, change, reason):
    path = manifest(tmp_path, clip, {**clip, **change})
    assert mtbi.main(["prepare", str(path), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, f"{path}:2", reason)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("row, reason", [("{no json", "no JSON"), ("[1, 2]", "no JSON object"), ('"text"', "no JSON object"),
                                         ('{"text": "a", "duration": 1}', "audio_filepath")])
def test_lines_that_are_no_rows(tmp_path, clip, capsys, row, reason):
    assert mtbi.main(["prepare", str(manifest(tmp_path, row)), "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "manifest.jsonl:1", reason)


def test_skip_bad_leaves_bad_rows_out_and_lists_them(tmp_path, clip, capsys):
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 16000)
    others = [{**clip, "audio_filepath": f"{i}.wav", "text": f"number {i}"} for i in range(12)]
    for row in others:
        soundfile.write(tmp_path / row["audio_filepath"], tone(), 16000)
    path = manifest(tmp_path, "{no json", {**clip, "audio_filepath": "silent.wav"}, {**clip, "text": ""}, *others)
    assert mtbi.main(["prepare", str(path), "--out", str(tmp_path / "out"), "--skip-bad"]) == 0
    said = capsys.readouterr().out
    listed = [row for _, row in read_jsonl(tmp_path / "out" / "skipped.jsonl")]
    assert [row["line"] for row in listed] == [1, 2, 3] and len(read_manifest(tmp_path / "out" / "manifest.jsonl")) == 12
    assert "3 rows left out" in said and "1 x the audio is silent" in said and "1 x the transcript is empty" in said


def test_whole_files_are_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError):
        with whole_file(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("argv, reason", [
    (["train", "{run}", "--recipe", "nosuch"], "no recipe 'nosuch'"), (["train", "{run}", "--connector", "nosuch"], "no connector 'nosuch'"),
    (["train", "{tmp}"], "no config.json in it"), (["train", "{run}", "--nosuch", "1"], "unrecognized arguments"),
    (["nosuch"], "invalid choice"), ([], "required"), (["train", "{run}", "--steps", "x"], "no whole number"), (["train", "{run}", "--steps", "0"], "--steps"),
    (["train", "{run}", "--recipe", "blsp", "--k", "6"], "power of two"), (["train", "{run}", "--encoder", "{tmp}"], "speech encoder"),
    (["train", "{run}", "--recipe", "mtbi-kl", "--batch-size", "4000"], "lower --batch-size"),
    (["imitate", "{data}", "--out", "{tmp}/r", "--llm", "{tmp}"], "LLM"), (["imitate", "{tmp}", "--out", "{tmp}/r"], "manifest.jsonl"),
    (["imitate", "{data}", "--out", "{run}", "--bits", "16"], "bits was 4, now 16"),
    (["imitate", "{data}", "--out", "{tmp}/r", "--tasks", "{tmp}/no.toml"], "no.toml"),
    (["bench", "{tmp}"], "config.json"), (["generate", "{tmp}", "a.wav", "Who?"], "no trained recipe"),
    (["prepare", "{tmp}/none.jsonl", "--out", "{tmp}/d"], "none.jsonl"), (["prepare", "{tmp}", "--out", "{tmp}/d"], "no speech in a form that is known"),
    (["prepare", "tiny", "--out", "{data}", "--train", "7"], "made with other settings"),
    (["prepare", "x.jsonl", "--join", "6:3", "--out", "{tmp}/d"], "--join 6:3"),
    (["prepare", "tiny", "--out", "{tmp}/d", "--train", "-1"], "--train"), (["train", "{run}", "--lr", "nan"], "--lr"),
    (["train", "{run}", "--lr", "-1"], "--lr"), (["train", "{run}", "--seed", "9" * 30], "--seed"), (["train", "{run}", "--k", "9" * 13], "--k"),
    (["prepare", "x.jsonl", "--join", "²:3", "--out", "{tmp}/d"], "--join"),  (["prepare", "tiny", "--out", "{tmp}/d", "--join", "3:4"], "are for recordings"),
])
def test_bad_commands_end_with_one_line_and_code_2(argv, reason, run, data, tmp_path, capsys):
    assert mtbi.main([a.format(run=run, data=data, tmp=tmp_path) for a in argv]) == 2
    one_line(capsys, reason)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_generate_refuses_a_missing_file_in_one_line(run, tmp_path, capsys):
    assert mtbi.main(["train", str(run), "--recipe", "mtbi-no-interleave", "--steps", "2", "--batch-size", "8"]) == 0
    assert mtbi.main(["generate", str(run), str(tmp_path / "none.wav"), "Who?"]) == 2
    one_line(capsys, "none.wav")


def test_joined_words_have_exact_times_one_speaker_and_no_tested_text_in_training(tmp_path):
    rows = []
    for speaker in "abc":
        for i, digit in enumerate(["zero", "one", "two", "three"]):
            soundfile.write(tmp_path / f"{speaker}{i}.flac", tone(0.3 + 0.1 * i, 8000), 8000)
            rows.append({"audio_filepath": f"{speaker}{i}.flac", "duration": 0.3 + 0.1 * i, "text": digit, "speaker": speaker, "split": "train"})
    out = tmp_path / "out"
    assert mtbi.main(["prepare", str(manifest(tmp_path, *rows)), "--join", "3:5", "--count", "40", "--test-speakers", "c", "--out", str(out)]) == 0
    made = read_manifest(out / "manifest.jsonl", check_audio=True)
    assert len(made) == 40 and {u.speaker for u in made if u.split == "test"} == {"c"} and {u.speaker for u in made if u.split == "train"} == {"a", "b"}
    assert all(held_out(u.text) == (u.split == "test") and 3 <= len(u.words) <= 5 for u in made)
    for u in made:
        samples = load_audio(u.audio)
        for word, start, end in u.words:
            assert end - start == pytest.approx({"zero": 0.3, "one": 0.4, "two": 0.5, "three": 0.6}[word], abs=0.002)
            assert np.abs(samples[int(start * 16000):int(end * 16000)]).max() > 0.2
        assert np.abs(samples[:int(u.words[0][1] * 16000) - 50]).max() < 0.01


@pytest.mark.parametrize("path", ["tiny/tasks.toml", "tasks.toml"])
def test_task_tables_keep_prompts_and_tasks_apart(path):
    tasks = load_tasks(ROOT / path)
    assert sum(t.split == "train" for t in tasks.values()) >= 12 and sum(t.split == "unseen" for t in tasks.values()) >= 8
    prompts = [p for t in tasks.values() for p in t.prompts + t.unseen_prompts]
    assert len(prompts) == len(set(prompts)), "no prompt belongs to two tasks"
    assert all(len(t.prompts) >= 5 and len(t.unseen_prompts) >= 3 for t in tasks.values())


@pytest.mark.parametrize("text, reason", [("[a]\nsplit='x'\nmetric='exact'\nprompts=['p']\nunseen_prompts=['q']", "split must be"),
                                          ("[a]\nsplit='train'\nmetric='exact'\nprompts=['p']\nunseen_prompts=['p']", "no prompt may be in"),
                                          ("[a]\nsplit='train'", "missing"), ("[a]\nnosuch=1", "unexpected"), ("a = [", "cannot be read"),
                                          ("", "no training task [repeat]")])
def test_bad_task_tables_are_explained(tmp_path, text, reason):
    (tmp_path / "t.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load_tasks(tmp_path / "t.toml")
    assert reason in str(error.value) and "t.toml" in str(error.value)


def test_real_speech_of_three_corpora_reads(tmp_path):
    for name in ("fsdd", "speechocean", "ljspeech"):
        rows = read_manifest(shared(f"data/{name}") / "manifest.jsonl")
        for u in rows[::max(1, len(rows) // 10)]:
            assert len(load_audio(u.audio, u.duration)) / SAMPLE_RATE == pytest.approx(u.duration, abs=0.05)


def test_a_manifest_is_never_overwritten_by_what_is_made_from_it(tmp_path, clip, capsys):
    path = manifest(tmp_path, clip)
    before = path.read_text()
    assert mtbi.main(["prepare", str(path), "--out", str(tmp_path)]) == 2
    one_line(capsys, "would overwrite")
    assert path.read_text() == before


@pytest.mark.parametrize("rows, options, reason", [
    ([{"speaker": "a"}, {"speaker": "a", "split": "train"}], [], "'split' is given for 1 of 2 rows"),
    ([{"speaker": "a"}, {"speaker": "b"}], ["--test-speakers", "c"], "no speaker 'c'"),
    ([{"speaker": "a"}, {"speaker": "b"}], ["--test-speakers", "a"], "no training rows are left"),
    ([{"speaker": "a", "split": "train"}, {"speaker": "b", "split": "train"}], [], "all 2 utterances are for training"),
    ([{"speaker": "a"}, {"speaker": "b"}], ["--join", "3:4"], "--test-speakers"),
    ([{"text": "seven"}, {"text": "seven up"}], ["--join", "3:4", "--test-speakers", ""], "--test-speakers"),
])
def test_splits_that_cannot_be_are_refused(tmp_path, capsys, rows, options, reason):
    for i, row in enumerate(rows):
        soundfile.write(tmp_path / f"{i}.wav", tone(), 16000)
        rows[i] = {"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "three", **row}
    assert mtbi.main(["prepare", str(manifest(tmp_path, *rows)), "--out", str(tmp_path / "out"), *options]) == 2
    one_line(capsys, reason)
    assert not (tmp_path / "out").exists()


def test_after_a_mistake_the_corrected_command_works(tmp_path, clip, capsys):
    for i in range(6):
        soundfile.write(tmp_path / f"{i}.wav", tone(), 16000)
    rows = [{"audio_filepath": f"{i}.wav", "duration": 1.0, "text": "one", "speaker": "ab"[i % 2]} for i in range(6)]
    argv = ["prepare", str(manifest(tmp_path, *rows)), "--out", str(tmp_path / "out"), "--test-speakers", "b", "--count", "10"]
    assert mtbi.main([*argv, "--join", "1:1"]) == 2 and "too few words" in one_line(capsys)
    assert mtbi.main([*argv, "--join", "1:30"]) == 0


def test_when_every_row_is_bad_the_first_is_named(tmp_path, clip, capsys):
    assert mtbi.main(["prepare", str(manifest(tmp_path, "{no json")), "--skip-bad", "--out", str(tmp_path / "out")]) == 2
    one_line(capsys, "no usable utterance", "line 1: is no JSON")
