"""What was found by attacking the training: two at once, other settings, other speech, another LLM, files that were edited or lost."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file
from test_engine import SMALL, begun_anew, cut_off_at_a_state, examples  # noqa: F401

from files import UserError
from model import SpeechLLM
from mtbi import main
from train import read_log, saved_states, train


def test_after_the_stop_for_want_of_finite_gradients_the_same_command_stops_again(model, examples, tmp_path, monkeypatch):  # noqa: F811
    many = copy.copy(examples)
    many.steps = 60
    monkeypatch.setattr(SpeechLLM, "forward", lambda self, heard, read=None: sum(p.sum() for p in self.connector.parameters()) * float("nan"))
    for steps in (20, 40):
        with pytest.raises(UserError, match="finite"):
            train(model, many, tmp_path, lr=1e-3)
        assert saved_states(tmp_path)[0].stem == f"{steps:08d}"


def test_the_state_of_a_training_with_other_settings_is_not_resumed(run, tmp_path, capsys, monkeypatch):
    new = begun_anew(run, tmp_path)
    cut_off_at_a_state(monkeypatch, ["train", str(new), *SMALL, "--save-every", "5"])
    (new / "mtbi" / "config.json").unlink()
    assert main(["train", str(new), *SMALL, "--seed", "5"]) == 2
    said = capsys.readouterr()
    assert "saved by a training with other settings" in said.out and "--force starts again" in said.err


def test_a_folder_is_for_one_process_at_a_time(run, data, tmp_path, capsys):
    new = begun_anew(run, tmp_path)
    holds = "import sys, time; from files import alone\nwith alone(sys.argv[1]): print('in', flush=True); time.sleep(60)"
    for folder, argv in ((new / "mtbi", ["train", str(new), *SMALL]), (tmp_path / "behaviors", ["imitate", str(data), "--out", str(tmp_path / "behaviors")])):
        other = subprocess.Popen([sys.executable, "-c", holds, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "in\n"
        assert main(argv) == 2 and "another process is at work in this folder" in capsys.readouterr().err
        other.kill()
        other.wait()
    assert main(["train", str(new), *SMALL]) == 0, "a lock dies with its process"


def test_without_its_log_a_training_resumes_all_the_same(run, tmp_path, capsys, monkeypatch):
    new = begun_anew(run, tmp_path)
    cut_off_at_a_state(monkeypatch, ["train", str(new), *SMALL, "--save-every", "5"])
    (new / "mtbi" / "log.jsonl").write_text("")
    assert main(["train", str(new), "--resume"]) == 0 and "goes on without its earlier rows" in capsys.readouterr().out
    assert [row["step"] for row in read_log(new / "mtbi" / "log.jsonl")] == list(range(5, 12))


@pytest.mark.parametrize("key, value, said", [("steps", -1, "--steps"), ("k", "six", "--k"), ("seed", "x", "--seed"), ("precision", "fp8", "--precision"),
                                              ("hidden", -3, "--hidden"), ("batch_size", 0, "--batch-size"), ("lr", -1.0, "--lr")])
def test_what_is_resumed_is_checked_like_any_other_options(run, tmp_path, capsys, key, value, said):
    new = begun_anew(run, tmp_path)
    (new / "mtbi" / "state").mkdir(parents=True)
    (new / "mtbi" / "state" / "00000001.safetensors").write_bytes(b"")
    chosen = {"encoder": "tiny", "recipe": {"loss": "ce"}, "steps": 12, "batch_size": 8, "seed": 0, key: value}
    (new / "mtbi" / "config.json").write_text(json.dumps({"settings": chosen, "done": False}))
    assert main(["train", str(new), "--resume"]) == 2
    assert said in capsys.readouterr().err


def test_no_memory_for_the_optimizer_is_said_in_one_line(model, examples, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried …")))
    with pytest.raises(UserError, match="optimizer"):
        train(model, examples, tmp_path, lr=1e-3)


def test_speech_that_changed_under_a_training_is_noticed(tmp_path, capsys):
    data, new = tmp_path / "data", tmp_path / "run"
    assert main(["prepare", "tiny", "--out", str(data), "--train", "10", "--test", "4"]) == 0
    assert main(["imitate", str(data), "--out", str(new), "--per-utterance", "1"]) == 0
    argv = ["train", str(new), "--recipe", "asr", "--steps", "2", "--batch-size", "4", "--hidden", "16"]
    assert main(argv) == 0
    shutil.copy(data / "audio" / "train-00001.wav", data / "audio" / "train-00000.wav")
    capsys.readouterr()
    assert main(argv) == 2 and "audio was" in capsys.readouterr().err


def test_an_llm_whose_layers_changed_since_it_answered_is_refused(data, tmp_path, capsys):
    """Its embeddings and norms are the same, which is all the fingerprint sees."""
    shutil.copytree(ROOT / "tiny" / "llm", tmp_path / "llm")
    argv = ["--llm", str(tmp_path / "llm"), "--tasks", str(ROOT / "tiny" / "tasks.toml"), "--per-utterance", "1"]
    assert main(["imitate", str(data), "--out", str(tmp_path / "run"), *argv]) == 0
    tensors = load_file(tmp_path / "llm" / "model.safetensors")
    tensors = {name: t + 0.01 if "proj.weight" in name else t for name, t in tensors.items()}
    save_file(tensors, tmp_path / "llm" / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run"), *SMALL]) == 2 and "is not the LLM any more" in capsys.readouterr().err


def test_no_command_overwrites_the_folder_of_another_not_even_by_force(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    before = (tmp_path / "data" / "config.json").read_bytes()
    for more in ([], ["--force"]):
        assert main(["imitate", str(tmp_path / "data"), "--out", str(tmp_path / "data"), *more]) == 2
        assert "was made by `prepare`" in capsys.readouterr().err
    assert (tmp_path / "data" / "config.json").read_bytes() == before
