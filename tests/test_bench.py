"""The benchmark's arithmetic, and the whole pipeline end to end."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import eval as benchmark
import mtbi
from data import Utterance
from files import read_json
from examples import Task, load_tasks


def test_scores_by_hand():
    assert benchmark.score("exact", "The farmer.", "the farmer") == 1 and benchmark.score("exact", "red", "blue") == 0
    assert benchmark.score("wer", "three red apples", "three blue apples") == pytest.approx(2 / 3)
    assert benchmark.score("wer", "a", "b c d e") == 0 and benchmark.score("wer", "", "") == 1
    assert benchmark.score("chrf", "tres manzanas", "tres manzanas") == 1 and 0 < benchmark.score("chrf", "tres manzanas", "tres limones") < 1


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 9)), min_size=2, max_size=60))
def test_the_interval_holds_the_mean_and_lies_in_0_to_1(rows):
    cell = benchmark.cell([s for s, _ in rows], [str(u) for _, u in rows])
    assert 0 <= cell["ci95"][0] <= cell["ci95"][1] <= 1 + 1e-9 and cell["n"] == len(rows)
    assert cell["score"] == pytest.approx(np.mean([s for s, _ in rows])) and cell["share_of_text"] == pytest.approx(cell["score"])


def test_an_interval_of_many_like_scores_of_one_utterance_is_honest():
    """100 answers about one of two utterances are two observations, not 101."""
    many = benchmark.cell([1.0] * 100 + [0.0], ["a"] * 100 + ["b"])
    assert many["ci95"] == [0.0, 1.0]


def test_ignored_instructions_are_counted():
    task = Task("who", "train", "exact", ["Who?"], ["Who was it?"])
    case = benchmark.Case(Utterance("x", "the farmer sold three red apples", 1.0, id="x"), task, "Who?", benchmark.QUADRANTS[0])
    assert benchmark.repeats_instead(case, "the farmer", "the farmer sold three red apples")
    assert benchmark.repeats_instead(case, "the farmer", "the farmer sold five red apples") and not benchmark.repeats_instead(case, "the farmer", "the baker")


def test_every_prompt_gets_its_questions_and_every_quadrant_is_filled(utterances):
    tasks = load_tasks(ROOT / "tiny" / "tasks.toml")
    cases = benchmark.draw_cases(tasks, [u for u in utterances if u.split == "test"], 2, 0)
    assert {c.quadrant for c in cases} == set(benchmark.QUADRANTS)
    assert {(c.task.name, c.prompt) for c in cases} == {(t.name, p) for t in tasks.values() for p in t.prompts + t.unseen_prompts}
    assert all(c.task.applies(c.utterance.text) for c in cases)
    assert all((c.prompt in c.task.unseen_prompts) == c.quadrant.endswith("unseen_prompt") for c in cases)
    assert all((c.task.split == "unseen") == c.quadrant.startswith("unseen_task") for c in cases)


def test_the_demo_end_to_end_writes_everything_and_does_nothing_twice(tmp_path, capsys):
    out = tmp_path / "demo"
    assert mtbi.main(["demo", "--out", str(out), "--short", "--profile"]) == 0
    said = capsys.readouterr().out
    report = read_json(out / "report.json")
    assert list(report["recipes"]) == ["text", "cascade", "mtbi", "asr"] and set(report) >= {"recipes", "meta"}
    for name, entry in report["recipes"].items():
        assert list(entry["quadrants"]) == benchmark.QUADRANTS and entry["seconds"] > 0 and len(entry["tasks"]) == 27
        for cell in [*entry["quadrants"].values(), *entry["tasks"].values()]:
            assert set(cell) == {"score", "share_of_text", "n", "ci95"} and cell["n"] > 0 and 0 <= cell["score"] <= 1
            assert name != "text" or cell["score"] == 1
    for file in ("report.md", "loss.png", "quadrants.png", "tasks.png", "behaviors.jsonl", "answers.jsonl", "mtbi/connector.safetensors", "asr/log.jsonl"):
        assert (out / file).stat().st_size > 100, file
    assert "What to try next" in said and said.count("    mtbi ") == 5 and "| == imitate |" in said
    files = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    assert mtbi.main(["demo", "--out", str(out), "--short"]) == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == files
    assert mtbi.main(["generate", str(out), str(out / "data/audio/test-00000.wav"), "Who did it?", "--recipe", "asr"]) == 0

    shutil.move(out, tmp_path / "moved")                          # a run folder can be moved with its data
    assert mtbi.main(["bench", str(tmp_path / "moved"), "--per-prompt", "1"]) == 0


def test_help_explains_every_option_with_its_default():
    parser = mtbi.build_parser(mtbi.__doc__, mtbi.COMMANDS, mtbi.RECIPES)
    for sub in parser._subparsers._group_actions[0].choices.values():
        text = sub.format_help()
        assert all(action.help for action in sub._actions) and "default: None" not in text and "(default: )" not in text
        for action in sub._actions:
            if action.option_strings and action.default not in (None, "", False, "==SUPPRESS=="):
                assert f"(default: {action.default})" in " ".join(text.split()), action
    text = subprocess.run([sys.executable, "mtbi.py", "train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "mtbi-no-interleave" in text


def test_report_json_is_strict_json(tmp_path):
    cell = benchmark.cell([], [])
    assert json.loads(json.dumps(cell, allow_nan=False)) == {"score": None, "share_of_text": None, "n": 0, "ci95": [None, None]}


@pytest.fixture
def own_run(data, tmp_path):
    assert mtbi.main(["imitate", str(data), "--out", str(tmp_path / "own"), "--per-utterance", "1"]) == 0
    return tmp_path / "own"


def test_the_three_lines_of_python_in_the_readme_run(tmp_path, data, own_run, monkeypatch, capsys):
    """On a folder that `train` saved, from the README's own text."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert len(block.splitlines()) == 3 and "SpeechLLM.from_pretrained" in block
    assert mtbi.main(["train", str(own_run), "--steps", "2", "--batch-size", "8", "--hidden", "32"]) == 0
    shutil.copytree(own_run / "mtbi", tmp_path / "runs/demo/mtbi")
    (tmp_path / "runs/demo/data/audio").mkdir(parents=True)
    shutil.copy(next((data / "audio").glob("test-*.wav")), tmp_path / "runs/demo/data/audio/test-00000.wav")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) >= 1


def test_a_benchmark_is_done_again_where_speech_or_precision_changed_and_nowhere_else(data, own_run, tmp_path, capsys):
    copied = tmp_path / "data"
    shutil.copytree(data, copied)
    assert mtbi.main(["imitate", str(copied), "--out", str(own_run), "--per-utterance", "1", "--force"]) == 0
    assert mtbi.main(["train", str(own_run), "--recipe", "asr", "--steps", "2", "--batch-size", "8", "--hidden", "16"]) == 0
    bench = ["bench", str(own_run), "--per-prompt", "1", "--dialogues", "1", "--probes", "2", "--max-new-tokens", "4"]
    assert mtbi.main(bench) == 0
    capsys.readouterr()
    assert mtbi.main(bench) == 0 and "is written already" in capsys.readouterr().out
    wavs = sorted((copied / "audio").glob("test-*.wav"))
    shutil.copy(wavs[0], wavs[1])
    for more in ([], ["--precision", "bf16"]):
        assert mtbi.main([*bench, *more]) == 0
        said = capsys.readouterr().out
        assert "is written already" not in said and "bench text:" in said and "bench asr:" in said, more


def test_info_tells_what_a_run_folder_is(own_run, capsys, tmp_path):
    train = ["train", str(own_run), "--recipe", "asr", "--steps", "2", "--batch-size", "8", "--hidden", "16", "--connector", "qformer", "--lora", "2"]
    assert mtbi.main(train) == 0
    capsys.readouterr()
    assert mtbi.main(["info", str(own_run)]) == 0
    said = capsys.readouterr().out
    for words in ("tiny, 4 bits (NF4)", "48 utterances", "48 with word times", "behaviors", "asr", "connector qformer (k 6, hidden 16), LoRA of rank 2",
                  "steps 2 of 2, 8 utterances each", "not in the last report", "report     none yet"):
        assert words in said, (words, said)
    assert (own_run / "asr" / "adapter" / "adapter_config.json").exists()
    assert mtbi.main(["info", str(tmp_path)]) == 2
