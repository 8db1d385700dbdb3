"""The recipes, stage 1, and the commands: what each says and makes, and all of them in a row."""

import ast
import inspect
import io
import random
import shlex
import shutil
from dataclasses import MISSING, fields, replace
from fnmatch import fnmatch

import pandas
import pytest
import torch
from conftest import A_SMALL_BENCH, ROOT
from programs import begun_anew, program

import lab.demo
import lab.jobs
import mtbi
from data import Examples, Recipe, Speech, Text, load_tasks, read_behaviors, subset_of
from eval import CELLS
from lab.demo import Demo, DemoOptions
from lab.statistics import read_answers
from model import SpeechLLM
from mtbi import ALWAYS, COMMANDS, RECIPES, draw_questions, draw_second_questions, find_recipe
from mtbi import main, run_command
from support.files import UserError, read_json
from support.logs import read_log
from support.options import check
from train import pieces_of_step, train

TRAINED = [name for name, recipe in RECIPES.items() if recipe.connector]
TINY_TASKS = load_tasks(ROOT / "tiny" / "tasks.toml")
SHORT = ("--steps", "2", "--batch-size", "8", "--hidden", "16")


# ---- recipes ----


@pytest.fixture
def examples_of(llm, utterances, run, frames):
    """recipe -> the Examples of a training of 6 steps of 8."""
    behaviors = read_behaviors(run / "behaviors.jsonl")
    heard = [u for u in utterances if u.split == "train"]

    def make(recipe):
        size = {"k": 6, "steps": 6, "batch_size": 8}
        return Examples(llm[1], heard, behaviors, frames, recipe, **size)

    return make


def spoken_in(example):
    return [part for part in example.parts if isinstance(part, Speech)]


def all_examples(examples):
    drawn = []
    for step in range(examples.steps):
        drawn += examples.batch(step)
    return drawn


def test_the_table_has_every_recipe_of_the_papers_and_is_printed(capsys):
    names = "mtbi asr blsp self-powered vanilla-it vtb vtb-no-text cascade text copy"
    assert set(names.split()) <= set(RECIPES)
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert f"{name:<20} {recipe.about}" in said
    assert "text_only 0.25" in said


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipes_speech_is_asked_only_what_its_row_names(name, examples_of):
    recipe, rng = RECIPES[name], random.Random(0)
    examples = examples_of(recipe)
    # of a task that a recipe trains on alone there is no lack
    assert len(examples.trained_on) >= (20 if recipe.kinds or name.startswith("blsp") else 48)
    tasks = {b.task for b in examples.dialogues}  # in conversations of two turns, too
    for step in range(6):
        asked = {examples.draw_about(rng, u, step / 6).task for u in examples.trained_on}
        assert asked
        tasks |= asked
    for task in tasks:
        assert any(fnmatch(task, pattern) for pattern in recipe.tasks), task


def test_text_alone_is_vtbs_and_adapters_are_those_of_qformers_and_vtb():
    for name in TRAINED:
        recipe = RECIPES[name]
        assert (recipe.text_only > 0) == (name in ("vtb", "vtb-no-mixed"))
        has_adapter = recipe.connector == "qformer" or name.startswith("vtb")
        assert (recipe.lora > 0) == has_adapter


@pytest.mark.parametrize("table", ["tasks.toml", "tiny/tasks.toml"])
def test_every_recipe_finds_its_tasks_in_both_task_tables(table):
    tasks = load_tasks(ROOT / table)
    training = [name for name, task in tasks.items() if task.split == "train"]
    for name in TRAINED:
        recipe = RECIPES[name]
        found = [task for task in training if recipe.trains_on(task)]
        least = {("*",): 10}.get(recipe.tasks, min(len(recipe.tasks), 3))
        assert len(found) >= least, (name, found)


def test_a_recipe_of_one_wording_asks_in_one_and_has_as_many_examples(examples_of):
    asr = replace(RECIPES["asr"], prompts=1)
    every, one = examples_of(RECIPES["asr"]), examples_of(asr)
    assert len(one.utterances) == len(every.utterances)
    wordings = {b.prompt for kinds in one.behaviors_about.values() for b in kinds["repeat"]}
    assert len(wordings) == 1
    assert len({b.prompt for kinds in every.behaviors_about.values() for b in kinds["repeat"]}) > 1


def test_a_recipe_of_some_kinds_hears_no_other(examples_of):
    recipe = replace(RECIPES["asr"], kinds=("sentence",))
    every = examples_of(RECIPES["asr"])
    kinds = {u.kind for u in every.utterances}
    assert kinds == {"sentence", "digits", "directive"}
    assert {u.kind for u in examples_of(recipe).trained_on} == {"sentence"}
    nameless = [replace(u, kind="") for u in every.utterances]  # a corpus that names none
    given = (every.tokenizer, nameless, every.behaviors, every.frames, recipe)
    assert len(Examples(*given, k=6, steps=6, batch_size=8).trained_on) == len(nameless)


def test_true_transcripts_take_the_place_of_what_the_llm_repeats(examples_of):
    recipe = replace(RECIPES["asr"], true_transcripts=True)
    examples = examples_of(recipe)
    for behavior in examples.behaviors:
        behavior.response = "what the LLM says"
    examples = replace(examples)  # drawn up anew from these behaviors
    for utterance in examples.trained_on:
        [behavior] = examples.behaviors_about[utterance.id]["repeat"]
        assert behavior.response == utterance.text


def test_text_only_examples_have_no_speech(examples_of):
    drawn = all_examples(examples_of(Recipe("", lora=2, text_only=1.0)))
    assert not any(spoken_in(example) for example in drawn)


def test_a_share_of_text_only_examples_is_as_the_recipe_says(examples_of):
    drawn = all_examples(examples_of(Recipe("", lora=2, text_only=0.5)))
    spoken = sum(bool(spoken_in(example)) for example in drawn)
    assert 0.25 < spoken / len(drawn) < 0.75


def test_text_only_and_mixed_examples_share_what_is_left(examples_of, monkeypatch):
    monkeypatch.setattr(Examples, "draw_about", lambda *_: pytest.fail("neither of the two"))
    drawn = all_examples(examples_of(Recipe("", lora=2, text_only=0.5, mixed=0.5)))
    spoken = sum(bool(spoken_in(example)) for example in drawn)
    assert 0.25 < spoken / len(drawn) < 0.75


def test_a_recipe_on_a_part_of_the_speech_trains_on_no_other(examples_of):
    half = examples_of(replace(RECIPES["vtb"], speech=0.5))
    assert len(half.by_id) == 24
    assert {u.id for u in half.trained_on} <= set(half.by_id)
    for b in (*half.in_text, *half.dialogues):
        assert set(b.utterances()) <= set(half.by_id)


def test_mixed_examples_have_some_speech_and_some_have_two(examples_of):
    drawn = all_examples(examples_of(Recipe("", lora=2, mixed=1.0)))
    assert all(spoken_in(example) for example in drawn)
    assert any(len(spoken_in(example)) > 1 for example in drawn)


def test_all_examples_have_speech_unless_the_recipe_says_otherwise(examples_of):
    assert all(len(spoken_in(example)) == 1 for example in all_examples(examples_of(Recipe(""))))


def test_a_mixed_modal_turn_speaks_one_span_or_all_of_an_utterance(examples_of, rng):
    examples, spans = examples_of(RECIPES["vtb"]), []
    for u in examples.trained_on[:20]:
        for _ in range(5):
            parts = examples.listen_to_a_span(rng, u)
            assert sum(isinstance(p, Speech) for p in parts) == 1
            assert len(parts) <= 3
            assert all(isinstance(p, (Text, Speech)) for p in parts)
            spans.append(len(parts) > 1)
    assert 0.2 < sum(spans) / len(spans) < 0.7


def test_a_step_of_text_alone_trains_the_adapter_and_counts_no_audio(
    spec, encoder, examples_of, tmp_path
):
    model = SpeechLLM.build({**spec, "lora": 2}, encoder=encoder)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    train(model, examples_of(Recipe("", text_only=1.0, lora=2)), tmp_path, lr=1e-3)
    assert all(row["audio_seconds"] == 0 for row in read_log(tmp_path / "log.jsonl"))
    changed = {n for n, p in model.trainable().items() if not torch.equal(p, before[n])}
    assert any("lora_B" in name for name in changed)
    assert not any(name.startswith("connector") for name in changed)


def test_the_audio_seconds_of_a_step_are_those_of_its_speech(examples_of):
    examples, heard = examples_of(RECIPES["asr"]), 0
    for example in examples.batch(0):
        heard += sum(len(part.frames) for part in spoken_in(example))
    pieces = pieces_of_step(examples, 0)
    assert sum(piece.frames() for piece in pieces) == heard > 0


def test_a_part_of_the_speech_is_the_same_part_and_a_part_of_a_larger_part(utterances):
    few, more = subset_of(utterances, 0.1), subset_of(utterances, 0.3)
    assert len(few) == round(0.1 * len(utterances))
    assert {u.id for u in few} < {u.id for u in more}
    assert subset_of(utterances, 1.0) == utterances
    assert subset_of(utterances[::-1], 0.1)[::-1] == few, "whatever the order"


def test_a_recipe_on_a_part_of_the_speech_is_the_recipe_otherwise():
    found = find_recipe("mtbi@10")
    assert found.speech == 0.1
    for field in fields(Recipe):
        if field.name != "speech":
            assert getattr(found, field.name) == getattr(RECIPES["mtbi"], field.name)


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "mtbi@",
        "mtbi@0",
        "mtbi@010",
        "mtbi@١٠",
        "mtbi@100",
        "mtbi@ten",
        "@10",
        "mtbi@10@10",
    ],
)
def test_a_recipe_that_is_none_is_refused(name, run, capsys):
    assert main(["train", str(run), "--recipe", name]) == 2
    assert "there is no recipe" in capsys.readouterr().err


def test_text_alone_without_an_adapter_is_refused(run, tmp_path, capsys):
    own = begun_anew(run, tmp_path)
    assert main(["train", str(own), "--recipe", "vtb", "--lora", "0", *SHORT]) == 2
    assert "there is nothing in them to train" in capsys.readouterr().err


def test_nothing_is_trained_for_the_top_line_and_the_cascade(run, capsys):
    for name in ("text", "cascade"):
        assert main(["train", str(run), "--recipe", name]) == 0
        assert "nothing is trained" in capsys.readouterr().out
        assert not (run / name).exists()


def test_the_docs_name_every_recipe():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in RECIPES if f"`{name}`" not in text] == []


# ---- stage 1 ----


def test_every_transcript_is_asked_to_be_repeated_and_continued_and_some_more(utterances):
    heard = [u for u in utterances if u.split == "train"]
    questions = draw_questions(TINY_TASKS, heard, 2, seed=0)
    for u in heard:
        asked = [q for q in questions if q.utterance == u.id]
        fitting = {task for task in ALWAYS if TINY_TASKS[task].applies(u.text)}
        assert {q.task for q in asked} >= fitting
        assert len(asked) == len({q.task for q in asked}) == len(fitting) + 2
    for q in questions:
        assert TINY_TASKS[q.task].split == "train"
        assert q.prompt in TINY_TASKS[q.task].prompts, "no prompt of the benchmark's"
    assert questions == draw_questions(TINY_TASKS, heard, 2, seed=0)
    assert questions != draw_questions(TINY_TASKS, heard, 2, seed=1)


def test_second_questions_are_of_training_tasks_and_half_of_them_about_the_same_speech(utterances):
    heard = [u for u in utterances if u.split == "train"]
    first = draw_questions(TINY_TASKS, heard, 2, seed=0)
    second = draw_second_questions(TINY_TASKS, heard, first, 4, seed=0)
    assert len(second) == 4 * len(heard)
    assert 0.3 < sum(q.again for q in second) / len(second) < 0.7
    for q in second:
        assert TINY_TASKS[q.task].split == "train"
        assert q.prompt in TINY_TASKS[q.task].prompts
        assert not q.again or q.earlier[0][1] == q.utterance
    assert draw_second_questions(TINY_TASKS, heard, first, 0, seed=0) == []


def test_two_turn_behaviors_are_the_llms_own_and_seen_only(run, utterances):
    behaviors = read_behaviors(run / "behaviors.jsonl")
    heard = {u.id for u in utterances if u.split == "train"}
    two = [b for b in behaviors if b.earlier]
    answered = {(b.prompt, b.utterance): b.response for b in behaviors if not b.earlier}
    assert len(two) == 48
    assert 0 < sum(b.again for b in two) < 48
    for b in two:
        [[prompt, utterance, answer]] = b.earlier
        assert answered[prompt, utterance] == answer
        assert set(b.utterances()) <= heard
        assert len(b.utterances()) == 2 - b.again
        assert [m["role"] for m in b.messages()] == ["user", "assistant", "user"]


def test_behaviors_name_the_llm_that_gave_them(run, model):
    assert {b.llm for b in read_behaviors(run / "behaviors.jsonl")} == {model.fingerprint}


# ---- the command line ----


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_with_its_default(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    kind, function = COMMANDS[name]
    assert " ".join(function.__doc__.split("\n\n")[0].split()) in said
    explained = documented_fields(kind)
    for field in fields(kind):
        assert explained[field.name].split("(default: ")[0].strip() in said, field.name
        if field.default not in (MISSING, None, "", False, ()):
            assert f"(default: {shlex.quote(str(field.default))})" in said, field.name


def documented_fields(kind):
    """{field: the text under it} of a dataclass of options."""
    [body] = ast.parse(inspect.getsource(kind)).body
    found = {}
    for field, text in zip(body.body, body.body[1:]):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            found[field.target.id] = " ".join(text.value.value.split())
    return found


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_the_commands_are_listed(words, capsys):
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in COMMANDS)


def test_the_list_of_commands_names_those_that_there_are():
    lines = [line.split() for line in mtbi.__doc__.splitlines() if line.startswith("    ")]
    assert [words[0] for words in lines] == list(COMMANDS)


def test_the_defaults_of_every_command_lie_within_their_bounds():
    for kind, _ in COMMANDS.values():
        needed = [field.name for field in fields(kind) if field.default is MISSING]
        check(kind(**dict.fromkeys(needed, "x")))


def test_train_py_and_eval_py_are_the_commands(trained_world, tmp_path):
    """As scripts of their own they make what `mtbi.py train` and `mtbi.py bench` make."""
    world = shutil.copytree(trained_world, tmp_path / "world")
    run = world / "run"
    short = ("--recipe", "asr@99", *SHORT)
    done = program(["train.py", run, *short])
    assert done.returncode == 0, done.said
    weights = (run / "asr@99" / "connector.safetensors").read_bytes()
    shutil.rmtree(run / "asr@99")
    assert main(["train", str(run), *short]) == 0
    assert (run / "asr@99" / "connector.safetensors").read_bytes() == weights

    few = "--recipes mtbi --per-prompt 1 --dialogues 1 --probes 2 --max-new-tokens 4".split()
    done = program(["eval.py", run, *few])
    assert done.returncode == 0, done.said
    table = (run / "answers.csv").read_bytes()
    assert main(["bench", str(run), *few, "--force"]) == 0
    assert (run / "answers.csv").read_bytes() == table


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_mistake_is_said_in_one_line_whatever_the_console_can_write(
    encoding, run, monkeypatch, capsys
):
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(["train", str(run), "--nosuch"]) == 2
    refused = "mtbi: Unrecognized options: --nosuch (see mtbi.py train --help)\n"
    assert capsys.readouterr().err == refused


def test_generate_answers_about_a_sound_file(trained_world, capsys):
    run, wav = trained_world / "run", trained_world / "data" / "audio" / "test-00000.wav"
    asked = ["generate", str(run), str(wav), "Who did it?", "--max-new-tokens", "4"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert f"{run / 'mtbi'}: answered in" in said.err, "the first of the table that is there"
    assert main([*asked, "--recipe", "asr", "--system", "Answer in a few words."]) == 0
    assert f"{run / 'asr'}: answered in" in capsys.readouterr().err
    assert main([*asked, "--recipe", "vtb"]) == 2
    assert "holds no trained recipe 'vtb'; there are mtbi, asr" in capsys.readouterr().err


def test_generate_without_anything_trained_says_what_to_do(run, data, tmp_path, capsys):
    own = begun_anew(run, tmp_path)
    wav = data / "audio" / "test-00000.wav"
    assert main(["generate", str(own), str(wav), "Who did it?"]) == 2
    assert "there are none: run `train` first" in capsys.readouterr().err


# ---- all of it in a row ----

A_SHORT_DEMO = {
    "prepare": ["--train", "40", "--test", "16"],
    "behaviors": ["--per-utterance", "1"],
    "train": ["--steps", "2", "--batch-size", "8"],
    "bench": ["--per-prompt", "1", "--dialogues", "1", "--probes", "4", "--max-new-tokens", "16"],
}


def jobs_at_once(monkeypatch, n):
    monkeypatch.setattr(lab.jobs, "jobs_that_fit", lambda tiny: (n, "because this is a test"))


def test_the_demo_end_to_end_writes_everything_and_does_nothing_twice(
    tmp_path, capsys, monkeypatch
):
    out = tmp_path / "demo"
    monkeypatch.setattr(lab.demo, "SHORT", A_SHORT_DEMO)
    jobs_at_once(monkeypatch, 1)
    assert main(["demo", "--out", str(out), "--short", "--profile"]) == 0
    said = capsys.readouterr().out
    check_demo_report(read_json(out / "report.json", "recipes", "meta")["recipes"])
    made = ["report.md", "answers.csv", "loss.png", "cells.png", "tasks.png", "attention.png"]
    made += ["behaviors.jsonl", "mtbi/connector.safetensors", "asr/log.jsonl"]
    for name in made:
        assert (out / name).stat().st_size > 100, name
    assert "What to try next" in said
    assert said.count("    mtbi ") == 5, "five conversations are shown"
    for words in ("| == behaviors, encode |", "learning rate: ", "python mtbi.py bench"):
        assert words in said

    files = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    assert main(["demo", "--out", str(out), "--short"]) == 0
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()} == files


def test_with_two_cores_the_demos_commands_run_side_by_side_and_what_they_said_is_shown(
    trained_world, tmp_path, capsys, monkeypatch
):
    jobs_at_once(monkeypatch, 2)
    world = shutil.copytree(trained_world, tmp_path / "world")
    demo = Demo(DemoOptions(out=str(world / "run")), run_command)
    train_short = ["train", str(world / "run"), "--recipe", "mtbi@99", *SHORT]
    demo.side_by_side(["encode", str(world / "data")], train_short)
    said = capsys.readouterr().out
    assert "jobs: 2 at once" in said
    assert "holds the frames of 64 utterances" in said
    assert "trainable: " in said
    assert (world / "run" / "mtbi@99" / "connector.safetensors").exists()


def test_where_a_process_of_the_demo_fails_the_demo_says_why(tmp_path, monkeypatch):
    jobs_at_once(monkeypatch, 2)
    demo = Demo(DemoOptions(out=str(tmp_path)), run_command)

    def fails(words, folder, more=None):
        raise lab.jobs.Failed("there is no speech", "all that was said")

    monkeypatch.setattr(demo.jobs, "in_a_process", fails)
    with pytest.raises(UserError, match="there is no speech"):
        demo.shared("bench", str(tmp_path))
    with pytest.raises(UserError, match="there is no speech"):
        demo.side_by_side(["encode", "data"], ["behaviors", "data", "--out", "run"])


def test_a_benchmark_that_two_processes_share_has_the_answers_of_one(
    trained_world, benched_world, tmp_path, monkeypatch
):
    jobs_at_once(monkeypatch, 2)
    world = shutil.copytree(trained_world, tmp_path / "world")
    jobs = lab.jobs.Jobs(None, run_command, tiny=True)
    jobs.together(["bench", str(world / "run"), *A_SMALL_BENCH], tmp_path)
    asked = ["system", "set", "prompt", "utterance", "reference", "answer"]
    tables = [read_answers(folder / "run" / "answers.csv") for folder in (world, benched_world)]
    shared, alone = (table[asked] for table in tables)
    pandas.testing.assert_frame_equal(shared, alone)


def check_demo_report(recipes):
    assert list(recipes) == ["text", "copy", "cascade", "mtbi", "asr"]
    for name, entry in recipes.items():
        assert list(entry["cells"]) == CELLS
        assert entry["seconds"] > 0 or name == "copy"
        assert len(entry["tasks"]) == 28
        for cell in entry["cells"].values():
            assert set(cell) == {"score", "gain", "exact", "n", "ci95"}
        for cell in [*entry["cells"].values(), *entry["tasks"].values()]:
            assert cell["n"] > 0
            assert 0 <= cell["score"] <= 1
            assert name != "text" or cell["score"] == 1
