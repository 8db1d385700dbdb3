"""Stage 1 and the benchmark keep every answer as it comes: interrupted, they go on; shared by processes, they are the same; of another LLM, refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT
from test_engine import begun_anew, free_port

from files import mend_jsonl, read_json, read_jsonl
from model import SpeechLLM
from mtbi import main


def imitate(data, out, *more):
    return main(["imitate", str(data), "--out", str(out), "--per-utterance", "2", "--batch-size", "32", *more])


@pytest.fixture
def asked(monkeypatch):
    """Counts the batches an LLM answers."""
    calls, real = [], SpeechLLM.generate_rows
    monkeypatch.setattr(SpeechLLM, "generate_rows", lambda self, rows, n=64: (calls.append(len(rows)), real(self, rows, n))[1])
    return calls


def stops_after(n, asked):
    """generate_rows that is interrupted after n batches."""
    real = SpeechLLM.generate_rows
    return lambda self, rows, tokens=64: real(self, rows, tokens) if len(asked) < n else (_ for _ in ()).throw(KeyboardInterrupt)


def test_imitate_interrupted_goes_on_from_the_last_batch_and_mends_a_half_written_line(data, tmp_path, asked, capsys, monkeypatch):
    assert imitate(data, tmp_path / "whole") == 0
    batches, real = len(asked), SpeechLLM.generate_rows
    asked.clear()
    monkeypatch.setattr(SpeechLLM, "generate_rows", stops_after(2, asked))
    assert imitate(data, tmp_path / "cut") == 130
    part = tmp_path / "cut" / "behaviors.part-0.jsonl"
    assert len(part.read_text().splitlines()) == 64 and not (tmp_path / "cut" / "behaviors.jsonl").exists()
    with open(part, "a") as file:                                  # killed while it wrote
        file.write('{"key": "' + "0" * 12 + '", "questi')
    monkeypatch.setattr(SpeechLLM, "generate_rows", real)
    asked.clear()
    capsys.readouterr()
    assert imitate(data, tmp_path / "cut") == 0
    assert "64 of 184 answers are there already" in capsys.readouterr().out and len(asked) == batches - 2
    assert (tmp_path / "cut" / "behaviors.jsonl").read_bytes() == (tmp_path / "whole" / "behaviors.jsonl").read_bytes()
    assert not list((tmp_path / "cut").glob("*.part-*"))


def test_half_done_behaviors_of_other_settings_are_refused_and_force_begins_anew(data, tmp_path, asked, capsys, monkeypatch):
    real = SpeechLLM.generate_rows
    monkeypatch.setattr(SpeechLLM, "generate_rows", stops_after(1, asked))
    assert imitate(data, tmp_path) == 130
    monkeypatch.setattr(SpeechLLM, "generate_rows", real)
    capsys.readouterr()
    assert imitate(data, tmp_path, "--max-new-tokens", "5") == 2 and "max_new_tokens was 64, now 5" in capsys.readouterr().err
    asked.clear()
    assert imitate(data, tmp_path, "--max-new-tokens", "5", "--force") == 0
    assert sum(asked) == 232 and "answers are there already" not in capsys.readouterr().out


@pytest.mark.parametrize("content, mended", [(b"", b""), (b"{}\n", b"{}\n"), (b'{}\n{"a', b"{}\n"), (b'{"a', b""), ('{}\n{"ñ'.encode()[:-1], b"{}\n")])
def test_only_a_half_written_last_line_is_cut_off(tmp_path, content, mended):
    (tmp_path / "a").write_bytes(content)
    mend_jsonl(tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == mended


def test_behaviors_record_who_gave_them_and_another_llm_is_noticed(run, tmp_path, capsys):
    settings = read_json(run / "config.json")["settings"]
    assert {"llm", "llm_weights", "bits", "precision", "decoding", "max_new_tokens", "task_table"} <= set(settings) and settings["decoding"] == "greedy"
    new = begun_anew(run, tmp_path)
    rows = [row for _, row in read_jsonl(new / "behaviors.jsonl")]
    assert len({row["llm"] for row in rows}) == 1 and all(len(row["llm"]) == 12 and row["prompt"] for row in rows)
    (new / "behaviors.jsonl").write_text("".join(json.dumps({**row, "llm": "0" * 12}) + "\n" for row in rows))
    assert main(["train", str(new), "--steps", "2", "--batch-size", "8", "--hidden", "16"]) == 2
    assert "was answered by another LLM (000000000000)" in capsys.readouterr().err


def test_the_revision_of_a_hub_model_is_recorded(data, tmp_path):
    """A model in the cache of the Hugging Face hub, as a download leaves it; offline."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--tiny-llm"
    shutil.copytree(ROOT / "tiny" / "llm", repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    done = subprocess.run([sys.executable, "mtbi.py", "imitate", str(data), "--out", str(tmp_path / "run"), "--llm", "someone/tiny-llm", "--per-utterance", "1",
                           "--tasks", "tiny/tasks.toml"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert read_json(tmp_path / "run" / "config.json")["settings"]["llm_weights"] == commit


def test_two_processes_write_the_behaviors_and_the_report_of_one(data, tmp_path):
    def both(*argv):
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), "mtbi.py", *map(str, argv)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    one, two = tmp_path / "one", tmp_path / "two"
    assert imitate(data, one) == 0
    said = both("imitate", data, "--out", two, "--per-utterance", 2, "--batch-size", 32)
    assert said.count("behaviors.jsonl: 232 behaviors") == 1
    rows = [{row["utterance"] + row["prompt"]: row["response"] for _, row in read_jsonl(r / "behaviors.jsonl")} for r in (one, two)]
    assert rows[0] == rows[1]
    shutil.copy(one / "behaviors.jsonl", two)
    assert main(["train", str(one), "--steps", "2", "--batch-size", "8", "--hidden", "16"]) == 0
    shutil.copytree(one / "mtbi", two / "mtbi")
    assert main(["bench", str(one), "--per-prompt", "1"]) == 0
    said = both("bench", two, "--per-prompt", 1)
    assert said.count("\nreport:") == 1 and not list(two.glob("*.part-*"))
    reports = [read_json(r / "report.json")["recipes"] for r in (one, two)]
    inside = [{name: entry.pop("attention") | {"gap": entry.pop("behavior_gap")["score"]} for name, entry in report.items()} for report in reports]
    for name in inside[0]:                                         # sums of floats, which round by the number of threads
        for kind, value in inside[0][name].items():
            assert inside[1][name][kind] == pytest.approx(value, abs=1e-4)
    for report in reports:
        for entry in report.values():
            entry.pop("seconds")
    assert reports[0] == reports[1]


def test_commands_that_cannot_be_shared_say_so(data):
    done = subprocess.run([sys.executable, "mtbi.py", "info", "runs/none"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"})
    assert done.returncode == 2 and "info runs in one process; imitate, train, bench are what torchrun and accelerate can start" in done.stderr
