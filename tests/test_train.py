"""The training: what it changes, what it must not, and that whatever stops it changes nothing."""

import copy
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from programs import begun_anew, free_port, one_line, program, python
from safetensors.torch import load_file, save_file

import model as model_module
import support.adam
import support.processes
import support.states
import train as train_module
from data import FULL, Example, Examples, Recipe, Speech, chat_parts, read_behaviors
from data import response_tokens, user_turn
from model import CONNECTORS, SpeechLLM, connector_class, load_llm
from mtbi import RECIPES, main
from support.files import UserError, read_json, write_json
from support.hub import fingerprint_of_weights
from support.logs import read_log
from support.states import ON_THE_WAY, saved_states
from train import Piece, Progress, TrainOptions, accumulate_gradients, halve_pieces, learning_rate
from train import peak_rate, pieces_of_step, split_to_fit, step_gradients, train, update
from train import with_options

SMALL = ["--steps", "6", "--batch-size", "8", "--hidden", "16"]


@pytest.fixture(scope="module")
def examples_of(llm, utterances, run, frames):
    """A function that makes the training set of a recipe: 6 steps of 8, if not told otherwise."""
    behaviors = read_behaviors(run / "behaviors.jsonl")
    spoken = [u for u in utterances if u.split == "train"]

    def make(recipe, **sizes):
        sizes = {"k": 6, "steps": 6, "batch_size": 8, **sizes}
        return Examples(llm[1], spoken, behaviors, frames, recipe, **sizes)

    return make


@pytest.fixture
def examples(examples_of):
    return examples_of(RECIPES["mtbi"])


def repeats(model, utterances, frames, n=8):
    """n conversations: the speech of an utterance, and its transcript as the answer."""
    rows = []
    for u in utterances[:n]:
        response = response_tokens(model.tokenizer, u.text)
        heard = [Speech(frames[u.id])]
        rows.append(chat_parts(model.tokenizer, user_turn("Repeat this."), [heard], response))
    return rows


def piece_of(rows):
    return Piece([Example(parts, teacher=None) for parts in rows], "dropout")


def weights(model):
    return {name: p.detach().clone() for name, p in model.trainable().items()}


def are_equal(one, other):
    assert set(one) == set(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def losses_in(folder):
    return [row["loss"] for row in read_log(folder / "log.jsonl")]


def without_times(folder):
    rows = read_log(folder / "log.jsonl")
    for row in rows:
        del row["seconds"]
    return rows


class Killed(Exception):
    """Ends a training as if its process were gone."""


# ---- one step ----


def test_accumulating_micro_batches_equals_one_big_batch(model, utterances, frames):
    rows, found = repeats(model, utterances, frames), []
    tokens = piece_of(rows).tokens()
    for micro_batches in ([rows], [rows[:1], rows[1:3], rows[3:]]):
        model.zero_grad()
        loss = accumulate_gradients(model, [piece_of(part) for part in micro_batches], tokens)
        found.append((loss, {name: p.grad.clone() for name, p in model.trainable().items()}))
    (loss, whole), (accumulated_loss, accumulated) = found
    assert accumulated_loss == pytest.approx(loss, rel=1e-5)
    for name in whole:
        torch.testing.assert_close(whole[name], accumulated[name], rtol=1e-3, atol=1e-6)


def test_every_example_alone_has_a_gradient_even_where_the_recipe_wants_all_words_as_text(
    model, examples_of
):
    examples = examples_of(Recipe("", interleave=1.0, text_words=1.0))
    for example in examples.batch(0)[:4]:
        model.zero_grad()
        accumulate_gradients(model, [Piece([example], "dropout")], 100)
        assert all(p.grad.isfinite().all() for p in model.trainable().values())
        assert model.connector.scale.grad.abs().sum() > 0


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, 100, 1.0, 10) for step in range(100)]
    assert rates[0] == 0.1
    assert rates[:10] == sorted(rates[:10])
    assert max(rates) == 1.0
    assert rates[-1] < 0.01


def test_the_loss_scale_falls_after_an_overflow_and_rises_again():
    progress = Progress(loss_scale=1024.0)
    progress.adjust_loss_scale(finite=False)
    assert progress.loss_scale == 512
    assert progress.scale_steps == 0
    for _ in range(2000):
        progress.adjust_loss_scale(finite=True)
    assert progress.loss_scale == 1024
    for _ in range(20):
        progress.adjust_loss_scale(finite=False)
    assert progress.loss_scale == 1.0


def test_the_vocabulary_projection_runs_at_response_tokens_only(model, utterances, frames):
    rows, seen = repeats(model, utterances, frames, n=6), []

    def see(head, args, out):
        seen.append(tuple(out.shape))

    hook = model.llm.get_output_embeddings().register_forward_hook(see)
    logits, tokens = model.logits(rows)
    hook.remove()
    answers = []
    for parts in rows:
        answers += parts[-1].ids
    assert tokens.tolist() == answers
    assert seen == [(len(answers), model.llm.config.vocab_size)]
    assert len(logits) == len(answers)

    # And it gives what a whole forward pass gives there.
    embeds, mask, labels = model.embed(rows)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    everywhere = model.llm(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    there = everywhere.logits[:, :-1][labels[:, 1:] != model_module.IGNORE]
    torch.testing.assert_close(logits, there, rtol=1e-4, atol=1e-4)


# ---- what training changes ----


def test_the_llm_and_the_encoder_never_change_by_a_bit(model, examples, tmp_path):
    frozen, before = {}, weights(model)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and not name.startswith("connector."):
            frozen[name] = tensor.clone()
    examples.steps = 3
    train(model, examples, tmp_path, lr=1e-3)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in frozen.items())
    assert not any(torch.equal(before[name], p) for name, p in model.trainable().items())
    model.train()
    assert model.connector.training
    assert not model.encoder.training
    assert not any(m.training for m in model.llm.modules())


PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize(
    "precision, steps, share", [("fp32", 40, 0.8), ("fp16", 20, 0.8), ("bf16", 20, 0.8)]
)
def test_in_every_precision_the_connector_is_fp32_and_training_lowers_the_loss(
    spec, encoder, examples_of, tmp_path, precision, steps, share
):
    model = SpeechLLM.build(spec, load_llm("tiny", 4, precision), encoder)
    assert {p.dtype for p in model.trainable().values()} == {torch.float32}
    assert next(model.llm.parameters()).dtype == PRECISIONS[precision]
    train(model, examples_of(RECIPES["asr"], steps=steps), tmp_path, lr=2e-3, warmup=5)
    losses = losses_in(tmp_path)
    assert len(losses) == steps
    finite = [loss for loss in losses if loss is not None]
    assert len(finite) >= 0.75 * steps
    assert sum(finite[-4:]) < share * sum(finite[:4])


# ---- killed, interrupted, damaged: what it ends with stays the same ----


@pytest.fixture(scope="module")
def fresh(spec, llm, encoder):
    """A function that builds the model of one and the same start."""

    def build():
        return SpeechLLM.build(spec, llm, encoder)

    return build


@pytest.fixture(scope="module")
def steps_of_two(examples_of):
    """6 steps of two micro-batches of 4."""
    return examples_of(RECIPES["mtbi"], batch_size=4, accumulate=2)


def go(model, examples, folder):
    return weights(train(model, examples, folder, lr=1e-3, save_every=2))


@pytest.fixture(scope="module")
def never_stopped(fresh, steps_of_two, tmp_path_factory):
    """(weights, folder) of a training from that start that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    return go(fresh(), steps_of_two, folder), folder


def stopping(examples, step, stop):
    """The same examples, but for `stop`, which is called when those of `step` are asked for."""
    stopped = copy.copy(examples)

    def batch(asked_for, micro):
        if asked_for == step and micro == 0:
            stop()
        return examples.batch(asked_for, micro)

    stopped.batch = batch
    return stopped


def kill():
    raise Killed


@pytest.mark.parametrize("step", [1, 2, 5])
def test_killed_and_resumed_gives_the_weights_of_a_run_never_killed(
    fresh, steps_of_two, never_stopped, tmp_path, step
):
    """In step 1 nothing is saved yet: the same seed on the same machine gives the same weights."""
    with pytest.raises(Killed):
        go(fresh(), stopping(steps_of_two, step, kill), tmp_path)
    whole, folder = never_stopped
    assert are_equal(go(fresh(), steps_of_two, tmp_path), whole)
    assert without_times(tmp_path) == without_times(folder)
    assert len(losses_in(tmp_path)) == 6


def test_killed_while_a_state_is_written_resumes_from_the_one_before(
    fresh, steps_of_two, never_stopped, tmp_path, monkeypatch
):
    written = []

    def half_written(tensors, path, metadata=None):
        written.append(path)
        if len(written) == 2:
            path.write_bytes(b"half")
            raise Killed
        save_file(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(support.states, "save_file", half_written)
        with pytest.raises(Killed):
            go(fresh(), steps_of_two, tmp_path)
    assert [path.stem for path in saved_states(tmp_path)] == ["00000002"]
    assert are_equal(go(fresh(), steps_of_two, tmp_path), never_stopped[0])
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_finishes_the_step_saves_and_resumes(
    fresh, steps_of_two, never_stopped, tmp_path, number
):
    def ask_to_stop():
        os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        go(fresh(), stopping(steps_of_two, 2, ask_to_stop), tmp_path)
    assert saved_states(tmp_path)[0].stem == "00000003"
    assert signal.getsignal(number) == before
    assert are_equal(go(fresh(), steps_of_two, tmp_path), never_stopped[0])


def test_nothing_of_a_state_file_stays_mapped_after_it_was_read(never_stopped):
    path = saved_states(never_stopped[1])[0]
    tensors, _ = support.states.read_state(path)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here, which tells what is mapped")
    assert tensors and str(path) not in maps.read_text()


@pytest.mark.parametrize("how", ["cut off", "a flipped bit"])
def test_a_damaged_state_is_passed_over_for_the_one_before(
    fresh, steps_of_two, never_stopped, tmp_path, capsys, how
):
    whole, folder = never_stopped
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    states = saved_states(tmp_path)
    assert [path.stem for path in states] == ["00000006", "00000004"], "the last two are kept"
    content = bytearray(states[0].read_bytes())
    if how == "cut off":
        del content[2000:]
    else:
        content[-1] ^= 1
    states[0].write_bytes(content)
    assert are_equal(go(fresh(), steps_of_two, tmp_path), whole)
    said = capsys.readouterr().out
    assert "is no state of this training" in said
    assert how == "cut off" or "its checksum does not fit" in said
    assert "resuming at step 4" in said


def test_where_every_state_is_damaged_it_does_not_begin_anew_by_itself(
    fresh, steps_of_two, tmp_path
):
    (tmp_path / "state").mkdir()
    for step in (4, 6):
        (tmp_path / "state" / f"{step:08d}.safetensors").write_bytes(b"")
    why = "holds no state that can be read; delete it, or --force starts again"
    with pytest.raises(UserError, match=why):
        go(fresh(), steps_of_two, tmp_path)


KILLS_ITSELF = """
import os, signal, sys, threading
import mtbi, train
from support import states

step, seconds = int(sys.argv[1]), float(sys.argv[2])
real_step, real_save, written = train.step_gradients, states.save_file, []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def killed_in_a_step(model, pieces, progress, loss):
    if progress.step == step:
        threading.Timer(seconds, kill).start()
    return real_step(model, pieces, progress, loss)

def killed_in_a_state(tensors, path, metadata=None):
    real_save(tensors, path, metadata)
    written.append(path)
    if len(written) == 2:
        os.truncate(path, os.path.getsize(path) // 2)
        kill()

def die(module, name, killed_there):
    child = os.fork()  # with everything imported
    if not child:
        setattr(module, name, killed_there)
        os._exit(mtbi.main(sys.argv[3:]))
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status

die(train, "step_gradients", killed_in_a_step)
die(states, "save_file", killed_in_a_state)
"""


def test_killed_at_a_random_point_and_inside_a_state_it_ends_with_the_weights_of_a_run_never_killed(
    run, tmp_path
):
    """SIGKILL, twice: after a random time, and with half of a state written."""
    killed, whole = begun_anew(run, tmp_path / "killed"), begun_anew(run, tmp_path / "whole")
    more = [*SMALL, "--steps", "20", "--save-every", "2"]
    rng = random.Random(time.time_ns())
    step, seconds = rng.randrange(10), rng.uniform(0, 0.1)
    no_cuda_before_the_fork = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    words = [step, seconds, "train", killed, *more]
    process = python(KILLS_ITSELF, *words, env=no_cuda_before_the_fork)
    assert process.returncode == 0, process.said
    states = killed / "mtbi" / "state"
    assert 1 <= len(saved_states(killed / "mtbi")) <= 2
    assert list(states.glob(".*")), "of the last one there is a half"
    for folder in (killed, whole):
        assert main(["train", str(folder), *more]) == 0
    one, other = (load_file(r / "mtbi" / "connector.safetensors") for r in (whole, killed))
    assert are_equal(one, other), words
    assert losses_in(whole / "mtbi") == losses_in(killed / "mtbi")
    assert not list(states.glob(".*")), "what was half written is cleared away"


# ---- the command: what is resumed, what is done, what is refused ----


def cut_off_at_a_state(monkeypatch, argv):
    """Run a training that is interrupted as soon as its first state is saved."""
    real = train_module.save_state

    def save_and_stop(*args):
        real(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save_state", save_and_stop)
        assert main(argv) == 130


def test_resume_takes_the_options_the_training_was_begun_with(run, tmp_path, capsys, monkeypatch):
    new = begun_anew(run, tmp_path)
    assert main(["train", str(new), "--resume"]) == 2
    one_line(capsys, "no folder made by `train`")
    more = [*SMALL, "--lr", "0.004", "--save-every", "2", "--loss", "kl"]
    cut_off_at_a_state(monkeypatch, ["train", str(new), *more])
    capsys.readouterr()
    assert main(["train", str(new), "--resume"]) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    log = read_log(new / "mtbi" / "log.jsonl")
    assert len(log) == 6
    assert max(row["lr"] for row in log) == pytest.approx(0.004)
    assert read_json(new / "mtbi" / "config.json")["content"]["recipe"]["loss"] == "kl"


def test_a_training_is_shown_in_tensorboard_as_its_log_has_it(run, tmp_path, capsys):
    reason = "tensorboard is not installed: pip install tensorboard"
    pytest.importorskip("tensorboard", reason=reason)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    new = begun_anew(run, tmp_path)
    words = ["train", str(new), "--steps", "3", "--batch-size", "2", "--track", "tensorboard"]
    assert main(words) == 0
    events = EventAccumulator(str(new / "tensorboard" / "mtbi"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("loss")]
    log = read_log(new / "mtbi" / "log.jsonl")
    assert shown == [(row["step"], pytest.approx(row["loss"])) for row in log]
    assert {"lr", "grad_norm", "tokens"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_there_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("support.tracking.find_spec", lambda name: None)
    new = begun_anew(run, tmp_path)
    assert main(["train", str(new), "--steps", "3", "--track", "wandb"]) == 2
    one_line(capsys, "pip install wandb")


def test_without_its_log_a_training_resumes_all_the_same(run, tmp_path, capsys, monkeypatch):
    new = begun_anew(run, tmp_path)
    cut_off_at_a_state(monkeypatch, ["train", str(new), *SMALL, "--save-every", "3"])
    (new / "mtbi" / "log.jsonl").write_text("")
    assert main(["train", str(new), "--resume"]) == 0
    assert "goes on without its earlier rows" in capsys.readouterr().out
    assert [row["step"] for row in read_log(new / "mtbi" / "log.jsonl")] == [3, 4, 5]


def test_the_state_of_a_training_with_other_settings_is_not_resumed(
    run, tmp_path, capsys, monkeypatch
):
    new = begun_anew(run, tmp_path)
    cut_off_at_a_state(monkeypatch, ["train", str(new), *SMALL, "--save-every", "1"])
    config = read_json(new / "mtbi" / "config.json")
    config["options"]["seed"] = 5  # as if the folders of two trainings were mixed
    write_json(new / "mtbi" / "config.json", config)
    assert main(["train", str(new), *SMALL, "--seed", "5"]) == 2
    said = capsys.readouterr()
    assert "saved by a training with other settings" in said.out
    assert "--force starts again" in said.err


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", -1),
        ("k", "six"),
        ("seed", "x"),
        ("precision", "fp8"),
        ("hidden", -3),
        ("batch_size", 0),
        ("lr", -1.0),
        ("steps", None),
        ("accumulate", 1.5),
        ("k", 2.5),
        ("loss", []),
        ("connector", 5),
        ("pad_whisper", "no"),
    ],
)
def test_what_is_resumed_is_checked_like_any_other_options(run, tmp_path, capsys, name, value):
    new = begun_anew(run, tmp_path)
    (new / "mtbi" / "state").mkdir(parents=True)
    (new / "mtbi" / "state" / "00000001.safetensors").write_bytes(b"")
    options = {"recipe": "mtbi", "encoder": "tiny", "steps": 6, "batch_size": 8, name: value}
    content = {"recipe": {}, "behaviors": ""}
    config = {"command": "train", "options": options, "content": content, "done": False}
    config["makes"] = list(ON_THE_WAY)
    write_json(new / "mtbi" / "config.json", config)
    assert main(["train", str(new), "--resume"]) == 2
    one_line(capsys, f"--{name.replace('_', '-')} {value}")


def test_a_finished_training_is_not_redone_and_other_settings_are_refused(run, tmp_path, capsys):
    new = begun_anew(run, tmp_path)
    argv = ["train", str(new), "--recipe", "asr", *SMALL]
    trained = new / "asr" / "connector.safetensors"
    assert main([*argv, "--steps", "2"]) == 0
    stamp = trained.stat().st_mtime_ns
    assert main([*argv, "--steps", "2"]) == 0
    assert "is trained already" in capsys.readouterr().out
    assert main([*argv, "--steps", "3"]) == 2
    one_line(capsys, "steps was 2, now 3")
    assert trained.stat().st_mtime_ns == stamp
    assert main([*argv, "--steps", "2", "--force"]) == 0
    assert trained.stat().st_mtime_ns != stamp


def test_speech_behaviors_or_transcripts_that_changed_under_a_run_are_noticed(
    data, run, tmp_path, capsys
):
    shutil.copytree(data, tmp_path / "data")
    new, data = begun_anew(run, tmp_path), tmp_path / "data"
    config = read_json(new / "config.json")
    config["options"]["data"] = str(data)
    write_json(new / "config.json", config)
    argv = ["train", str(new), "--recipe", "asr", *SMALL, "--steps", "1"]
    assert main(argv) == 0
    capsys.readouterr()

    first, second = data / "audio" / "train-00000.wav", data / "audio" / "train-00001.wav"
    recording = first.read_bytes()
    shutil.copy(second, first)
    assert main(argv) == 2
    one_line(capsys, "audio was")
    first.write_bytes(recording)

    behaviors = (new / "behaviors.jsonl").read_text().splitlines(keepends=True)
    (new / "behaviors.jsonl").write_text("".join(behaviors[:-1]))
    assert main(["bench", str(new)]) == 2
    one_line(capsys, "was trained on other behaviors")

    rows = (data / "manifest.jsonl").read_text().splitlines(keepends=True)
    (data / "manifest.jsonl").write_text("".join(rows[:-1]))
    assert main(["train", str(new), "--recipe", "mtbi", *SMALL]) == 2
    one_line(capsys, "has changed since")


def test_an_llm_whose_layers_changed_since_it_answered_is_refused(run, tmp_path, capsys):
    """Its embeddings and norms are the same, which is all the model's own fingerprint sees."""
    llm, new = tmp_path / "llm", begun_anew(run, tmp_path)
    shutil.copytree(ROOT / "tiny" / "llm", llm)
    config = read_json(new / "config.json")
    config["options"]["llm"] = str(llm)
    write_json(new / "config.json", config)
    assert config["content"]["llm"] == fingerprint_of_weights(str(llm), "llm")
    tensors = load_file(llm / "model.safetensors")
    for name in tensors:
        if "proj.weight" in name:
            tensors[name] = tensors[name] + 0.01
    save_file(tensors, llm / "model.safetensors", metadata={"format": "pt"})
    assert main(["train", str(new), *SMALL]) == 2
    one_line(capsys, "is not the LLM any more")
    assert main(["bench", str(new)]) == 2
    one_line(capsys, "is not the LLM any more")


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json", "config.json"])
def test_an_llm_whose_template_or_tokenizer_changed_since_it_answered_is_refused(
    run, tmp_path, capsys, file
):
    llm, new = tmp_path / "llm", begun_anew(run, tmp_path)
    shutil.copytree(ROOT / "tiny" / "llm", llm)
    config = read_json(new / "config.json")
    config["options"]["llm"] = str(llm)
    write_json(new / "config.json", config)
    with open(llm / file, "a") as changed:
        changed.write("\n")
    assert main(["train", str(new), *SMALL]) == 2
    one_line(capsys, "is not the LLM any more")


def test_of_two_trainings_that_begin_at_once_the_later_finds_what_the_first_has_made(
    run, tmp_path, monkeypatch, capsys
):
    """Both looked before either had begun; the second one loaded its models meanwhile."""
    new, build = begun_anew(run, tmp_path), train_module.build

    def slowly(*args):
        monkeypatch.setattr(train_module, "build", build)
        assert main(["train", str(new), *SMALL]) == 0
        return build(*args)

    monkeypatch.setattr(train_module, "build", slowly)
    assert main(["train", str(new), *SMALL, "--seed", "5"]) == 2
    one_line(capsys, "was made with other settings (seed was")
    monkeypatch.setattr(train_module, "build", slowly)
    assert main(["train", str(new), *SMALL]) == 0
    assert "is trained already" in capsys.readouterr().out


def test_a_sound_file_that_is_missing_is_named(run, tmp_path, capsys):
    new = begun_anew(run, tmp_path)
    assert main(["train", str(new), "--recipe", "asr", *SMALL, "--steps", "1"]) == 0
    assert main(["generate", str(new), str(tmp_path / "none.wav"), "Who?"]) == 2
    one_line(capsys, "none.wav")


# ---- steps without a finite gradient ----


def test_a_step_without_a_finite_gradient_is_skipped_counted_and_changes_nothing(
    model, examples, tmp_path, monkeypatch, capsys
):
    real, seen = SpeechLLM.forward, []

    def breaks_once(self, batch, teacher=None, loss="ce"):
        seen.append(weights(self))
        found = real(self, batch, teacher, loss)
        return found * float("nan") if len(seen) == 3 else found

    monkeypatch.setattr(SpeechLLM, "forward", breaks_once)
    examples.steps = 5
    train(model, examples, tmp_path, lr=1e-3)
    assert "1 of 5 steps were skipped" in capsys.readouterr().out
    assert are_equal(seen[2], seen[3])
    assert not are_equal(seen[3], seen[4])
    log = read_log(tmp_path / "log.jsonl")
    assert [row["loss"] is None for row in log] == [False, False, True, False, False]
    assert log[2]["skipped"]

    def no_json(name):
        pytest.fail(f"{name} is no JSON")

    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_json)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["features", "gradient"])
def test_a_number_that_is_none_in_features_or_gradients_costs_its_step_alone(
    model, examples, tmp_path, monkeypatch, where, number
):
    real, seen = SpeechLLM.forward, []

    def forward(self, batch, teacher=None, loss="ce"):
        seen.append(weights(self))
        if len(seen) == 3 and where == "features":
            spoken = next(part for row in batch for part in row if isinstance(part, Speech))
            spoken.frames = spoken.frames * number
        found = real(self, batch, teacher, loss)
        if len(seen) == 3 and where == "gradient":
            found.register_hook(lambda gradient: gradient * number)
        return found

    monkeypatch.setattr(SpeechLLM, "forward", forward)
    examples.steps = 5
    train(model, examples, tmp_path, lr=1e-3)
    assert are_equal(seen[2], seen[3])
    assert not are_equal(seen[3], seen[4])
    log = read_log(tmp_path / "log.jsonl")
    assert ["skipped" in row for row in log] == [False, False, True, False, False]


@pytest.mark.parametrize(
    "scale, gradient, norm, moved",
    [(1.0, 1e6, 1e6, 1.0), (2.0**14, 2.0**14 * 1e-3, 1e-3, 1e-3)],
    ids=["clipped", "fp16"],
)
def test_a_step_undoes_the_scale_of_the_loss_and_clips(scale, gradient, norm, moved):
    """By SGD, which goes as far as the gradient says."""
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.full((1,), gradient)
    optimizer = torch.optim.SGD([p], lr=1.0)
    found, finite = update(optimizer, [p], 0.0, Progress(loss_scale=scale))
    assert finite and found == pytest.approx(norm)
    assert -p.item() == pytest.approx(moved, rel=1e-3)


@pytest.mark.parametrize(
    "words",
    [
        {"recipe": "blsp", "k": 6},
        {"recipe": "mtbi", "connector": "qformer", "hidden": 20},
        {"recipe": "vtb", "lora": 0},
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_loaded(words):
    with pytest.raises(UserError):
        with_options(RECIPES[words["recipe"]], TrainOptions("run", **words))


def test_a_q_former_learns_at_a_quarter_of_the_rate_in_whatever_recipe():
    shares = {name: connector_class(name).lr_share for name in CONNECTORS}
    assert shares == {"stack-mlp": 1, "conv": 1, "qformer": 0.25}


@pytest.mark.parametrize("width, share", [(3584, 0.25), (64, 1.0)])
def test_the_peak_rate_follows_from_the_llms_width_and_the_connectors_share(width, share, capsys):
    table = SimpleNamespace(weight=torch.empty(9, width))
    model = SimpleNamespace(llm=SimpleNamespace(get_input_embeddings=lambda: table), lora=0)
    expected = share * 4e-3 * 192 / max(192, width)
    assert peak_rate(None, model, share) == pytest.approx(expected)
    assert peak_rate(1e-5, model, share) == 1e-5
    said = capsys.readouterr().out
    assert "as asked by --lr" in said and "for the LLM" not in said


def test_all_of_an_llm_learns_at_a_tenth_of_the_connectors_rate(
    spec, encoder, examples_of, tmp_path, capsys
):
    """Adam's first step is as long as the rate says, whatever the gradient."""
    tuned = SpeechLLM.build({**spec, "lora": FULL}, load_llm("tiny", 16), encoder)
    before = {name: p.detach().clone() for name, p in tuned.trainable().items()}
    lr = peak_rate(None, tuned, 1.0)
    assert "; 0.1 times that for the LLM" in capsys.readouterr().out
    train(tuned, examples_of(RECIPES["mtbi"], steps=1), tmp_path, lr=lr)
    moved = {True: 0.0, False: 0.0}  # the furthest that a weight of the LLM, or another, went
    for name, p in tuned.trainable().items():
        of_llm = name.startswith("llm.")
        moved[of_llm] = max(moved[of_llm], (p - before[name]).abs().max().item())
    assert moved[True] == pytest.approx(0.1 * moved[False], rel=0.1) and moved[False] > 0


def test_after_a_spike_of_the_loss_the_weights_move_no_further_than_otherwise(
    model, examples, tmp_path, monkeypatch
):
    real, seen = SpeechLLM.forward, []

    def spikes(self, batch, teacher=None, loss="ce"):
        seen.append(weights(self))
        found = real(self, batch, teacher, loss)
        return found * 1e6 if len(seen) == 3 else found

    monkeypatch.setattr(SpeechLLM, "forward", spikes)
    examples.steps = 5
    train(model, examples, tmp_path, lr=1e-3)
    log = read_log(tmp_path / "log.jsonl")
    assert log[2]["loss"] > 1e5 * log[1]["loss"] and "skipped" not in log[2]
    moved = []
    for before, after in zip(seen, seen[1:]):
        moved.append(max((after[name] - before[name]).abs().max() for name in before).item())
    assert moved[2] < 2 * max(moved[:2])


def times_all_weights(number):
    """A SpeechLLM.forward whose loss, and every gradient, is this number or none."""

    def forward(self, batch, teacher=None, loss="ce"):
        return sum(p.sum() for p in self.connector.parameters()) * number

    return forward


def test_after_twenty_skips_in_a_row_it_stops_with_the_last_good_state_saved(
    model, examples, tmp_path, monkeypatch
):
    real, calls = SpeechLLM.forward, []

    def breaks_for_good(self, *args):
        calls.append(args)
        return (
            real(self, *args) if len(calls) <= 4 else times_all_weights(float("inf"))(self, *args)
        )

    monkeypatch.setattr(SpeechLLM, "forward", breaks_for_good)
    examples.steps = 100
    with pytest.raises(UserError, match="the last 20 steps gave no finite loss"):
        train(model, examples, tmp_path, lr=1e-3)
    assert len(calls) == 24
    saved = load_file(saved_states(tmp_path)[0])
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert saved["step.connector.scale"] == 4
    for name, p in model.trainable().items():
        assert torch.equal(saved[f"weight.{name}"], p)


def test_after_the_stop_for_want_of_finite_gradients_the_same_command_stops_again(
    model, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(SpeechLLM, "forward", times_all_weights(float("nan")))
    examples.steps = 60
    for steps in (20, 40, 60, 60):
        with pytest.raises(UserError, match="finite"):
            train(model, examples, tmp_path, lr=1e-3)
        assert saved_states(tmp_path)[0].stem == f"{steps:08d}"


def test_a_training_whose_last_steps_were_all_skipped_is_not_done(
    model, examples, tmp_path, monkeypatch
):
    real, calls = SpeechLLM.forward, []

    def breaks_at_the_end(self, *args):
        calls.append(args)
        found = real(self, *args)
        return found * float("nan") if len(calls) > 4 else found

    monkeypatch.setattr(SpeechLLM, "forward", breaks_at_the_end)
    examples.steps = 24
    for _ in range(2):
        with pytest.raises(UserError, match="the last 20 steps gave no finite loss"):
            train(model, examples, tmp_path, lr=1e-3)
    examples.steps = 3
    monkeypatch.setattr(SpeechLLM, "forward", times_all_weights(float("nan")))
    with pytest.raises(UserError, match="no step gave a finite loss"):
        train(model, examples, tmp_path / "short", lr=1e-3)


def test_a_model_that_never_gives_a_finite_loss_is_called_damaged(model, examples_of, tmp_path):
    model.connector.scale.data[:] = float("nan")
    examples = examples_of(RECIPES["mtbi"], steps=30, batch_size=1)
    said = (
        "no step gave a finite loss and gradient, so the weights of the LLM or of the encoder must "
        "be damaged"
    )
    with pytest.raises(UserError, match=said):
        train(model, examples, tmp_path, lr=1e-3)


# ---- memory ----


def out_of_memory(*args, **options):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_out_of_memory_halves_the_micro_batch_and_the_step_stays_the_same(
    fresh, examples, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(model_module, "DROPOUT", 0.0)  # which is drawn for each micro-batch
    examples.steps = 4
    whole = weights(train(fresh(), examples, tmp_path / "whole", lr=1e-3))
    real, sizes = SpeechLLM.forward, []

    def small_gpu(self, batch, *more):
        if len(batch) > 2:
            out_of_memory()
        sizes.append(len(batch))
        return real(self, batch, *more)

    monkeypatch.setattr(SpeechLLM, "forward", small_gpu)
    folder = tmp_path / "halved"
    halved = weights(train(fresh(), examples, folder, lr=1e-3, save_every=2))
    assert sizes == [2] * 4 * 4
    said = "".join(capsys.readouterr())
    assert said.count("out of memory with micro-batches of") == 2, "8 to 4 to 2, and never again"
    for name in whole:
        torch.testing.assert_close(halved[name], whole[name], rtol=1e-3, atol=1e-5)
    tokens = [[row["tokens"] for row in without_times(f)] for f in (folder, tmp_path / "whole")]
    assert tokens[0] == tokens[1]

    # Resumed, it does not run out of memory again.
    sizes.clear()
    saved_states(folder)[0].unlink()
    train(fresh(), examples, folder, lr=1e-3)
    assert sizes == [2] * 2 * 4
    assert "out of memory" not in "".join(capsys.readouterr())


def test_of_a_step_that_runs_out_of_memory_half_way_no_gradient_counts_twice(
    fresh, examples_of, monkeypatch
):
    monkeypatch.setattr(model_module, "DROPOUT", 0.0)  # which is drawn for each micro-batch
    pieces = pieces_of_step(examples_of(RECIPES["asr"], batch_size=4, accumulate=2), 0)
    model, real, calls, found = fresh(), SpeechLLM.forward, [], []

    def second_fails(self, *more):
        calls.append(1)
        if len(calls) == 2:
            out_of_memory()
        return real(self, *more)

    for forward in (real, second_fails):
        monkeypatch.setattr(SpeechLLM, "forward", forward)
        model.zero_grad(set_to_none=True)
        step_gradients(model, pieces, Progress())
        found.append({name: p.grad.clone() for name, p in model.trainable().items()})
    assert len(calls) > 4, "in pieces of half the size"
    for name, whole in found[0].items():
        torch.testing.assert_close(found[1][name], whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("when", [1, 2, 4])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_at_any_call_gives_the_same_weights(
    fresh, examples, tmp_path, monkeypatch, when, where
):
    monkeypatch.setattr(model_module, "DROPOUT", 0.0)  # which is drawn for each micro-batch
    examples.steps, calls = 4, []
    whole = weights(train(fresh(), examples, tmp_path / "whole", lr=1e-4))
    owner = SpeechLLM if where == "forward" else torch.Tensor
    real = getattr(owner, where)

    def once_too_much(*args, **options):
        calls.append(where)
        if len(calls) == when:
            out_of_memory()
        return real(*args, **options)

    monkeypatch.setattr(owner, where, once_too_much)
    halved = weights(train(fresh(), examples, tmp_path / "halved", lr=1e-4))
    assert len(calls) > 4
    for name in whole:
        torch.testing.assert_close(halved[name], whole[name], rtol=0, atol=1e-5)


def test_a_clip_of_a_tenth_of_a_second_and_one_of_30_s_share_a_batch(model, encoder):
    rows = []
    for seconds in (0.1, 30.0):
        frames = torch.randn(max(1, round(seconds * encoder.frame_rate)), encoder.width).half()
        answer = response_tokens(model.tokenizer, "the farmer")
        rows.append(
            chat_parts(model.tokenizer, user_turn("Who did it?"), [[Speech(frames)]], answer)
        )
    with torch.no_grad():
        together, alone = model(rows), sum(model([row]) for row in rows)
    assert torch.isfinite(together)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_when_not_even_one_utterance_fits_it_says_what_to_do(
    model, examples, tmp_path, monkeypatch
):
    monkeypatch.setattr(SpeechLLM, "forward", out_of_memory)
    said = "one utterance at a time is still too much for this GPU .* `plan` says what fits"
    with pytest.raises(UserError, match=said):
        train(model, examples, tmp_path, lr=1e-3)


def test_no_memory_for_the_optimizer_is_said_in_one_line(model, examples, tmp_path, monkeypatch):
    monkeypatch.setattr(support.adam.RoomyAdamW, "step", out_of_memory)
    with pytest.raises(UserError, match="no memory for the optimizer's moments"):
        train(model, examples, tmp_path, lr=1e-3)


def test_gradient_checkpointing_changes_the_memory_and_not_the_gradients(
    spec, encoder, utterances, frames
):
    kept, gradients = [], []
    for checkpointing in (False, True):
        model = SpeechLLM.build(spec, load_llm("tiny", 4), encoder)
        if checkpointing:
            model.checkpoint_gradients()
        model.train()
        training = [m for m in model.llm.modules() if m.training]
        assert bool(training) == checkpointing
        for module in training:
            assert not isinstance(module, torch.nn.Dropout)
            assert "Attention" not in type(module).__name__
            assert "MLP" not in type(module).__name__
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            torch.manual_seed(0)
            loss = model(repeats(model, utterances, frames, n=6))
        loss.backward()
        kept.append(sum(sizes))
        gradients.append({name: p.grad for name, p in model.trainable().items()})
        assert not any(m.training for m in model.train(False).modules())
    assert kept[1] < 0.5 * kept[0]
    assert are_equal(*gradients)


# ---- several processes ----


def read_in(example):
    """The token ids of its parts, as a text."""
    return repr([part.ids for part in example.parts if not isinstance(part, Speech)])


def become(monkeypatch, rank, processes):
    """This process is one of several from here on."""
    for module in (train_module, support.processes):
        monkeypatch.setattr(module, "WORLD", processes)
        monkeypatch.setattr(module, "RANK", rank)


@pytest.mark.parametrize("processes, accumulate", [(2, 4), (3, 1)])
def test_any_number_of_processes_shares_the_same_step(
    examples_of, monkeypatch, processes, accumulate
):
    """Whole micro-batches, with their own dropout; or, where these do not suffice, a part each."""
    examples = examples_of(RECIPES["mtbi"], batch_size=4, accumulate=accumulate)

    def shares(processes):
        found = []
        for rank in range(processes):
            become(monkeypatch, rank, processes)
            found += pieces_of_step(examples, 0)
        return found

    def what(pieces):
        rows = []
        for piece in pieces:
            seed = piece.dropout_seed if accumulate > 1 else ""
            rows += [(seed, read_in(example)) for example in piece.examples]
        return sorted(rows)

    assert what(shares(processes)) == what(shares(1))


def test_a_process_without_a_row_of_a_small_step_has_nothing_to_do(examples_of, monkeypatch, fresh):
    become(monkeypatch, rank=2, processes=3)
    pieces = pieces_of_step(examples_of(RECIPES["asr"], batch_size=2), 0)
    assert pieces == []
    assert accumulate_gradients(fresh(), pieces, tokens=10) == 0.0


def test_out_of_memory_halves_what_a_process_really_had(examples_of, fresh, monkeypatch):
    """A third of a micro-batch of 12 is 4 conversations, whose half is 2."""
    become(monkeypatch, rank=0, processes=3)
    examples, progress, model = examples_of(RECIPES["asr"], batch_size=12), Progress(), fresh()
    found = []
    for _ in range(2):
        pieces = split_to_fit(pieces_of_step(examples, 0), progress)
        found.append([len(piece.examples) for piece in pieces])
        halve_pieces(model, pieces, progress, "too little")
    assert found == [[4], [2, 2]]
    with pytest.raises(UserError, match="one utterance at a time is still too much"):
        halve_pieces(
            model, split_to_fit(pieces_of_step(examples, 0), progress), progress, "too little"
        )


WITHOUT_DROPOUT = """
import sys
sys.path.insert(0, {root!r})
import model
model.DROPOUT = 0.0
import mtbi
sys.exit(mtbi.main())
"""


@pytest.mark.parametrize(
    "launcher, accumulate",
    [
        (["torch.distributed.run", "--nproc_per_node", "2", "--master_port"], 2),
        (
            [
                "accelerate.commands.launch",
                "--multi_gpu",
                "--num_processes",
                "2",
                "--main_process_port",
            ],
            1,
        ),
    ],
    ids=["torchrun", "accelerate"],
)
def test_two_processes_get_the_loss_and_the_weights_of_one(
    run, tmp_path, monkeypatch, launcher, accumulate
):
    """With two micro-batches each process takes one, and even the dropout is the same.

    One micro-batch is divided, so dropout is off there.
    """
    command = ROOT / "mtbi.py"
    if accumulate == 1:
        monkeypatch.setattr(model_module, "DROPOUT", 0.0)
        command = tmp_path / "without_dropout.py"
        command.write_text(WITHOUT_DROPOUT.format(root=str(ROOT)))
    one, two = begun_anew(run, tmp_path / "one"), begun_anew(run, tmp_path / "two")
    # Adam blows rounding up to the rate's size
    more = [*SMALL, "--accumulate", str(accumulate), "--steps", "3", "--lr", "0.0001"]
    assert main(["train", str(one), *more]) == 0
    words = ["-m", *launcher, free_port(), command, "train", two, *more, "--save-every", "2"]
    done = program(words)
    assert done.returncode == 0, done.said
    assert "2 processes share the work" in done.said
    assert done.said.count("device:") == 1
    alone, together = (load_file(r / "mtbi" / "connector.safetensors") for r in (one, two))
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=1e-5)
    losses = losses_in(one / "mtbi")
    assert losses == pytest.approx(losses_in(two / "mtbi"), abs=1e-5)
    assert len(losses) == 3
    # clipping and Adam would hide a mean where a sum should be
    norms = []
    for folder in (one, two):
        norms.append([row["grad_norm"] for row in read_log(folder / "mtbi" / "log.jsonl")])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_a_training_on_an_llm_of_other_bits_is_another_training(run, tmp_path, capsys):
    new = begun_anew(run, tmp_path)
    argv = ["train", str(new), "--recipe", "asr", *SMALL, "--steps", "2"]
    assert main(argv) == 0
    config = read_json(new / "config.json")
    config["options"]["bits"] = 16
    write_json(new / "config.json", config)
    assert main(argv) == 2
    one_line(capsys, "bits was 4, now 16")
