"""The training engine: killed, interrupted, out of memory, without finite gradients, on several processes: what it ends with stays the same."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import train as engine
from data import Speech, ask, chat_parts
from examples import Examples, read_behaviors
from files import UserError, read_json
from model import SpeechLLM, load_llm
from mtbi import RECIPES, main
from train import Progress, adjust_loss_scale, my_batches, read_log, saved_states, train

SMALL = ["--steps", "12", "--batch-size", "8", "--hidden", "32"]


@pytest.fixture
def examples(model, utterances, run, frames):
    return Examples(model, [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl"), frames, RECIPES["mtbi"], 6, 8, 0)


def weights(model):
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def python(code, *argv, env=None, wait=True):
    """A program of its own in the project's folder."""
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, argv)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if wait:
        process.said = process.communicate()[0]
    return process


def begun_anew(run, tmp_path):
    """A copy of a run folder with its behaviors and nothing trained."""
    import shutil
    new = tmp_path / "run"
    new.mkdir()
    shutil.copy(run / "behaviors.jsonl", new)
    config = read_json(run / "config.json")
    config["settings"]["data"] = str((run / config["settings"]["data"]).resolve())
    (new / "config.json").write_text(json.dumps(config))
    return new


def cut_off_at_a_state(monkeypatch, argv):
    """Run a training that is interrupted as soon as its first state is saved."""
    real = engine.save_state
    with monkeypatch.context() as patch:
        patch.setattr(engine, "save_state", lambda *a: (real(*a), (_ for _ in ()).throw(KeyboardInterrupt)))
        assert main(argv) == 130


# ---- killed ----

def test_killed_at_random_points_and_inside_a_checkpoint_it_ends_with_the_weights_of_a_run_never_killed(run, tmp_path):
    """SIGKILL, four times: after a random time in a step, and with half of a state written."""
    killed = begun_anew(run, tmp_path)
    argv = ["train", str(killed), *SMALL, "--steps", "60", "--save-every", "3"]
    code = """
import os, random, signal, sys, threading, time
import mtbi, train
how, seconds = sys.argv[1], float(sys.argv[2])
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
real_train, real_save, calls = mtbi.train, train.save_file, []
def half(tensors, path, metadata=None):
    calls.append(path)
    if how == "write" and len(calls) == 2:
        real_save(tensors, path, metadata)
        os.truncate(path, os.path.getsize(path) // 2)
        kill()
    real_save(tensors, path, metadata)
def later(*args, **options):
    if how == "time":
        threading.Timer(seconds, kill).start()
    return real_train(*args, **options)
mtbi.train, train.save_file = later, half
sys.exit(mtbi.main(sys.argv[3:]))
"""
    rng, deaths, steps = random.Random(time.time_ns()), [], []
    for how in ("time", "write", "time", "write"):
        process = python(code, how, rng.uniform(0.1, 1.2), *argv)
        deaths.append(process.returncode)
        steps.append([path.name for path in saved_states(killed / "mtbi")])
    assert deaths.count(-signal.SIGKILL) >= 3, (deaths, steps, process.said)
    assert all(len(names) <= 2 for names in steps) and steps[-1], steps
    assert python(code, "never", 0, *argv).returncode == 0
    whole = begun_anew(run, tmp_path / "whole") if (tmp_path / "whole").mkdir() is None else None
    assert python(code, "never", 0, *[str(whole) if a == str(killed) else a for a in argv]).returncode == 0
    one, other = (load_file(r / "mtbi" / "connector.safetensors") for r in (whole, killed))
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert [row["loss"] for row in read_log(whole / "mtbi" / "log.jsonl")] == [row["loss"] for row in read_log(killed / "mtbi" / "log.jsonl")]
    assert not list((killed / "mtbi" / "state").glob(".*")), "what was half written is cleared away"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_saves_and_resumes(model, examples, tmp_path, number):
    whole = weights(train(copy.deepcopy(model), examples, tmp_path / "whole", lr=1e-3))
    start = weights(model)
    cut, real = copy.copy(examples), examples.batch
    cut.batch = lambda step, micro: (os.kill(os.getpid(), number) if step == 2 else None, real(step, micro))[1]
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        train(model, cut, tmp_path / "cut", lr=1e-3)
    assert [path.stem for path in saved_states(tmp_path / "cut")] == ["00000003"] and signal.getsignal(number) == before
    for name, p in model.trainable().items():
        p.data.copy_(start[name])
    after = weights(train(model, examples, tmp_path / "cut", lr=1e-3))
    assert all(torch.equal(after[name], whole[name]) for name in whole) or pytest.fail("other weights")


def test_resume_takes_the_options_the_training_was_begun_with(run, tmp_path, capsys, monkeypatch):
    new = begun_anew(run, tmp_path)
    assert main(["train", str(new), "--resume"]) == 2 and "no run folder made by `train`" in capsys.readouterr().err
    cut_off_at_a_state(monkeypatch, ["train", str(new), *SMALL, "--lr", "0.004", "--save-every", "5", "--loss", "kl"])
    capsys.readouterr()
    assert main(["train", str(new), "--resume"]) == 0
    assert "resuming at step 5" in capsys.readouterr().out
    log = read_log(new / "mtbi" / "log.jsonl")
    assert len(log) == 12 and max(row["lr"] for row in log) == pytest.approx(0.004)
    assert read_json(new / "mtbi" / "config.json")["settings"]["recipe"]["loss"] == "kl"


def test_a_damaged_state_is_passed_over_for_the_one_before(model, examples, tmp_path, capsys):
    whole = weights(train(model, examples, tmp_path, lr=1e-3, save_every=2))
    newest = saved_states(tmp_path)[0]
    assert [path.stem for path in saved_states(tmp_path)] == ["00000006", "00000004"]
    newest.write_bytes(newest.read_bytes()[:2000])
    again = weights(train(model, examples, tmp_path, lr=1e-3, save_every=2))
    said = capsys.readouterr().out
    assert "is no state of this training" in said and "resuming at step 4" in said
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    for path in saved_states(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no state that can be read; --force starts again"):
        train(model, examples, tmp_path, lr=1e-3)


# ---- steps without a finite gradient ----

def test_a_step_without_a_finite_gradient_is_skipped_counted_and_changes_nothing(model, examples, tmp_path, monkeypatch, capsys):
    real, seen = SpeechLLM.forward, []

    def breaks(self, batch, teacher=None):
        seen.append(weights(self))
        loss = real(self, batch, teacher)
        return loss * float("nan") if len(seen) == 3 else loss
    monkeypatch.setattr(SpeechLLM, "forward", breaks)
    train(model, examples, tmp_path, lr=1e-3)
    assert "1 of 6 steps were skipped" in capsys.readouterr().out
    assert all(torch.equal(seen[2][name], seen[3][name]) for name in seen[2]) and any(not torch.equal(seen[3][n], seen[4][n]) for n in seen[3])
    log = read_log(tmp_path / "log.jsonl")
    assert [row["loss"] is None for row in log] == [False, False, True, False, False, False] and log[2]["skipped"]
    json.loads((tmp_path / "log.jsonl").read_text().splitlines()[2], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_after_twenty_skips_in_a_row_it_stops_with_the_last_good_state_saved(model, examples, tmp_path, monkeypatch):
    examples.steps = 100
    real, calls = SpeechLLM.forward, []
    monkeypatch.setattr(SpeechLLM, "forward", lambda *a: (calls.append(1), real(*a) * (float("inf") if len(calls) > 4 else 1.0))[1])
    with pytest.raises(UserError, match="the last 20 steps gave no finite loss"):
        train(model, examples, tmp_path, lr=1e-3)
    assert len(calls) == 24
    saved = load_file(saved_states(tmp_path)[0])
    assert all(torch.isfinite(t).all() for t in saved.values()) and saved["step.connector.scale"] == 4
    assert all(torch.equal(saved[f"weight.{name}"], p) for name, p in model.trainable().items())


def test_a_model_that_never_gives_a_finite_loss_is_called_damaged(model, examples, tmp_path):
    model.connector.scale.data[:] = float("nan")
    examples.steps = 30
    with pytest.raises(UserError, match="no step gave a finite loss and gradient, so the weights of the LLM or of the encoder must be damaged"):
        train(model, examples, tmp_path, lr=1e-3)


# ---- memory ----

def test_out_of_memory_halves_the_micro_batch_and_the_step_stays_the_same(model, examples, tmp_path, monkeypatch, capsys):
    from connectors import nn
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0                                         # dropout is drawn for each micro-batch
    start = weights(model)
    whole = weights(train(model, examples, tmp_path / "whole", lr=1e-3))
    for name, p in model.trainable().items():
        p.data.copy_(start[name])
    real, sizes = SpeechLLM.forward, []

    def small_gpu(self, batch, teacher=None):
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        sizes.append(len(batch))
        return real(self, batch, teacher)
    monkeypatch.setattr(SpeechLLM, "forward", small_gpu)
    halved = weights(train(model, examples, tmp_path / "halved", lr=1e-3, save_every=3))
    assert set(sizes) == {2} and len(sizes) == 6 * 4
    said = capsys.readouterr()
    assert (said.out + said.err).count("out of memory with micro-batches of") == 2, "8 -> 4 -> 2, one line each, and never again"
    for name in whole:
        torch.testing.assert_close(halved[name], whole[name], rtol=1e-3, atol=1e-5)
    assert [row["tokens"] for row in read_log(tmp_path / "halved" / "log.jsonl")] == [row["tokens"] for row in read_log(tmp_path / "whole" / "log.jsonl")]
    sizes.clear()
    saved_states(tmp_path / "halved")[0].unlink()                  # resumed, it does not run out of memory again
    train(model, examples, tmp_path / "halved", lr=1e-3)
    assert set(sizes) == {2} and "out of memory" not in "".join(capsys.readouterr())


def test_when_not_even_one_utterance_fits_it_says_what_to_do(model, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(SpeechLLM, "forward", lambda *a: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.")))
    with pytest.raises(UserError, match="one utterance at a time is still too much for this GPU .* `plan` says what fits"):
        train(model, examples, tmp_path, lr=1e-3)


def rows_of(model, utterances, frames, n=6):
    return [chat_parts(model.tokenizer, ask("Repeat this."), [[Speech(frames[u.id])]], model.response(u.text).ids) for u in utterances[:n]]


def test_gradient_checkpointing_changes_the_memory_and_not_the_gradients(spec, llm, encoder, utterances, frames):
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = SpeechLLM.build({**spec, "hidden": 64}, load_llm("tiny", 4), encoder)
        model = (model.checkpoint_gradients() if checkpointing else model).train()
        assert any(m.training for m in model.llm.modules()) == checkpointing and not any(
            m.training for m in model.llm.modules() if isinstance(m, torch.nn.Dropout) or "Attention" in type(m).__name__ or "MLP" in type(m).__name__)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel() * t.element_size()), t)[1], lambda t: t):
            torch.manual_seed(0)
            loss = model(rows_of(model, utterances, frames))
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({name: p.grad for name, p in model.trainable().items()})
        assert not any(m.training for m in model.train(False).modules())
    assert kept[1] < 0.5 * kept[0]
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_vocabulary_projection_runs_at_response_tokens_only(model, utterances, frames):
    rows, seen = rows_of(model, utterances, frames), []
    hook = model.llm.get_output_embeddings().register_forward_hook(lambda head, args, out: seen.append(tuple(out.shape)))
    logits, tokens = model.logits(rows)
    hook.remove()
    answers = [i for parts in rows for i in parts[-1].ids]
    assert tokens.tolist() == answers and seen == [(len(answers), model.llm.config.vocab_size)] and len(logits) == len(answers)
    embeds, mask, labels = model.embed(rows)                       # and gives what a whole forward pass gives there
    everywhere = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    torch.testing.assert_close(logits, everywhere[:, :-1][labels[:, 1:] != -100], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_the_connector_is_fp32_and_the_loss_falls(spec, encoder, utterances, run, frames, tmp_path, precision):
    model = SpeechLLM.build(spec, load_llm("tiny", 4, precision), encoder)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32} and next(model.llm.parameters()).dtype == {"fp16": torch.float16,
                                                                                                                        "bf16": torch.bfloat16}[precision]
    examples = Examples(model, [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl"), frames, RECIPES["asr"], 20, 8, 0)
    train(model, examples, tmp_path, lr=2e-3, warmup=5)
    losses = [row["loss"] for row in read_log(tmp_path / "log.jsonl") if row["loss"] is not None]
    assert len(losses) >= 15 and sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_loss_scale_falls_after_an_overflow_and_rises_again():
    progress = Progress(loss_scale=1024.0)
    adjust_loss_scale(progress, False)
    assert progress.loss_scale == 512 and progress.scale_steps == 0
    for _ in range(2000):
        adjust_loss_scale(progress, True)
    assert progress.loss_scale == 1024
    for _ in range(20):
        adjust_loss_scale(progress, False)
    assert progress.loss_scale == 1.0


# ---- several processes ----

def free_port():
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_any_number_of_processes_shares_the_same_step(examples, monkeypatch):
    def share(rank, world, accumulate):
        examples.accumulate = accumulate
        monkeypatch.setattr(engine, "RANK", rank)
        monkeypatch.setattr(engine, "WORLD", world)
        return [(seed, repr([[p.ids for p in parts if not isinstance(p, Speech)] for parts in heard])) for seed, heard, _ in my_batches(examples, 0)]
    examples.behaviors, examples.batch_size = examples.behaviors, 4
    assert sorted(share(0, 2, 4) + share(1, 2, 4)) == sorted(share(0, 1, 4)), "whole micro-batches, with their own dropout"
    divided = [row for rank in range(3) for _, rows in share(rank, 3, 1) for row in eval(rows)]
    assert sorted(map(str, divided)) == sorted(str(row) for _, rows in share(0, 1, 1) for row in eval(rows)), "or a part of each"


@pytest.mark.parametrize("launcher, accumulate", [(["torch.distributed.run", "--nproc_per_node", "2"], 2),
                                                  (["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"], 1)], ids=["torchrun", "accelerate"])
def test_two_processes_get_the_loss_and_the_weights_of_one(run, tmp_path, monkeypatch, launcher, accumulate):
    """With two micro-batches each process takes one, and even the dropout is the same; one micro-batch is divided, so dropout is off here."""
    import connectors
    program = "mtbi.py"
    if accumulate == 1:
        monkeypatch.setattr(connectors, "DROPOUT", 0.0)
        program = tmp_path / "without_dropout.py"
        program.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport connectors\nconnectors.DROPOUT = 0.0\nimport mtbi\nsys.exit(mtbi.main())\n")
    argv = [*SMALL, "--accumulate", str(accumulate), "--steps", "4", "--save-every", "2", "--lr", "0.001"]      # Adam blows rounding up to the rate's size
    one = begun_anew(run, tmp_path)
    (tmp_path / "two").mkdir()
    two = begun_anew(run, tmp_path / "two")
    assert main(["train", str(one), *argv]) == 0
    done = subprocess.run([sys.executable, "-m", *launcher, "--master_port" if "torch" in launcher[0] else "--main_process_port", free_port(), str(program),
                           "train", str(two), *argv], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes share the work" in done.stdout and done.stdout.count("device:") == 1
    alone, together = (load_file(r / "mtbi" / "connector.safetensors") for r in (one, two))
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-5)
    losses = [[row["loss"] for row in read_log(r / "mtbi" / "log.jsonl")] for r in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 4
