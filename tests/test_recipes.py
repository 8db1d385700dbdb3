"""Every row of the recipe table is data: what its examples hold, and what they never hold."""

import random
from fnmatch import fnmatch

import pytest
import torch
from conftest import ROOT

import mtbi
from data import Speech, Text
from examples import Examples, Recipe, fewer, load_tasks, read_behaviors
from mtbi import RECIPES, find_recipe, main
from train import count_frames, my_batches

TRAINED = [name for name, recipe in RECIPES.items() if recipe.connector]


def examples_of(recipe, model, utterances, run, frames, batch_size=8):
    return Examples(model, [u for u in utterances if u.split == "train"], read_behaviors(run / "behaviors.jsonl"), frames, recipe, 6, batch_size, 0)


def kinds(parts):
    return {type(p) for p in parts[:-1]}


def test_the_table_has_every_recipe_of_the_papers_and_is_printed(capsys):
    assert list(RECIPES) == ["mtbi", "mtbi-no-interleave", "mtbi-kl", "asr", "blsp", "self-powered", "vanilla-it", "vtb", "vtb-no-text", "cascade", "text"]
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name:<20} {recipe.about}" in said for name, recipe in RECIPES.items()) and "text_only 0.25" in said


@pytest.mark.parametrize("name", TRAINED)
def test_a_recipes_speech_is_asked_only_what_its_row_names(name, model, utterances, run, frames):
    recipe, rng = RECIPES[name], random.Random(0)
    examples = examples_of(recipe, model, utterances, run, frames)
    assert len(examples.utterances) >= (24 if name == "blsp" else 48), "of a task that a recipe trains on alone there is no lack"
    for step in range(6):
        tasks = {examples.choose(rng, u, step).task for u in examples.utterances}
        assert tasks and all(any(fnmatch(task, pattern) for pattern in recipe.tasks) for task in tasks)
    assert all(any(fnmatch(b.task, pattern) for pattern in recipe.tasks) for b in examples.dialogues), "in conversations of two turns, too"
    assert (recipe.text_only > 0) == (name == "vtb") and (recipe.lora > 0) == (recipe.connector == "qformer" or name.startswith("vtb"))


@pytest.mark.parametrize("table", ["tasks.toml", "tiny/tasks.toml"])
def test_every_recipe_finds_its_tasks_in_both_task_tables(table):
    training = [name for name, task in load_tasks(ROOT / table).items() if task.split == "train"]
    for name in TRAINED:
        found = [task for task in training if RECIPES[name].trains_on(task)]
        assert len(found) >= {"asr": 1, "blsp": 1, "vanilla-it": 1, "self-powered": 5, "vtb": 5, "vtb-no-text": 5}.get(name, 10), (name, found)


def test_text_only_examples_have_no_speech_and_mixed_ones_have_some_beside_text(model, utterances, run, frames):
    def shares(**row):
        rows = [parts for step in range(6) for parts in examples_of(Recipe("", lora=2, **row), model, utterances, run, frames).batch(step)[0]]
        return rows, [any(isinstance(p, Speech) for p in parts) for parts in rows]

    rows, spoken = shares(text_only=1.0)
    assert not any(spoken)
    rows, spoken = shares(mixed=1.0)
    assert all(spoken) and any(sum(isinstance(p, Speech) for p in parts) > 1 for parts in rows)
    rows, spoken = shares(text_only=0.5)
    assert 0.25 < sum(spoken) / len(spoken) < 0.75
    assert all(shares()[1]), "neither, unless the recipe says so"


def test_a_step_of_text_alone_trains_the_adapter_and_counts_no_audio(spec, encoder, utterances, run, frames, tmp_path):
    from model import SpeechLLM
    from train import read_log, train
    model = SpeechLLM.build({**spec, "lora": 2}, encoder=encoder)
    examples = examples_of(Recipe("", text_only=1.0, lora=2), model, utterances, run, frames)
    before = {name: p.detach().clone() for name, p in model.trainable().items()}
    train(model, examples, tmp_path, lr=1e-3)
    assert all(row["audio_seconds"] == 0 for row in read_log(tmp_path / "log.jsonl"))
    changed = {name for name, p in model.trainable().items() if not torch.equal(p, before[name])}
    assert any("lora_B" in name for name in changed) and not any(name.startswith("connector") for name in changed)


def test_the_audio_seconds_of_a_step_are_those_of_its_speech(model, utterances, run, frames):
    examples = examples_of(RECIPES["asr"], model, utterances, run, frames)
    batch = examples.batch(0)[0]
    assert count_frames(my_batches(examples, 0)) == sum(len(p.frames) for parts in batch for p in parts if isinstance(p, Speech)) > 0


def test_two_turn_behaviors_are_the_llms_own_and_seen_only(data, run, utterances):
    behaviors, trained = read_behaviors(run / "behaviors.jsonl"), {u.id for u in utterances if u.split == "train"}
    two = [b for b in behaviors if b.earlier]
    answered = {(b.prompt, b.utterance): b.response for b in behaviors if not b.earlier}
    assert len(two) == 48 and 0 < sum(b.again for b in two) < 48
    for b in two:
        [[prompt, utterance, answer]] = b.earlier
        assert answered[prompt, utterance] == answer and set(b.utterances()) <= trained and len(b.utterances()) == 2 - b.again
        assert [m["role"] for m in b.messages()] == ["user", "assistant", "user"]


def test_a_part_of_the_speech_is_the_same_part_and_a_part_of_a_larger_part(utterances):
    few, more = fewer(utterances, 0.1), fewer(utterances, 0.3)
    assert len(few) == round(0.1 * len(utterances)) and {u.id for u in few} < {u.id for u in more} and fewer(utterances, 1.0) == utterances
    assert find_recipe("mtbi@10").speech == 0.1 and find_recipe("mtbi@10").interleave == RECIPES["mtbi"].interleave
    assert fewer(utterances[::-1], 0.1)[::-1] == few, "whatever the order"


@pytest.mark.parametrize("name", ["nothing", "mtbi@", "mtbi@0", "mtbi@100", "mtbi@ten", "@10", "mtbi@10@10"])
def test_a_recipe_that_is_none_is_refused(name, run, capsys):
    assert main(["train", str(run), "--recipe", name]) == 2
    assert "there is no recipe" in capsys.readouterr().err


def test_text_alone_without_an_adapter_is_refused(run, capsys):
    assert main(["train", str(run), "--recipe", "vtb", "--lora", "0", "--steps", "2", "--batch-size", "8"]) == 2
    assert "there is nothing in them to train" in capsys.readouterr().err


def test_nothing_is_trained_for_the_top_line_and_the_cascade(run, capsys):
    for name in ("text", "cascade"):
        assert main(["train", str(run), "--recipe", name]) == 0 and "nothing is trained" in capsys.readouterr().out and not (run / name).exists()


def test_a_mixed_modal_turn_speaks_one_span_or_all_of_an_utterance(model, utterances, run, frames, rng):
    examples = examples_of(RECIPES["vtb"], model, utterances, run, frames)
    for u in examples.utterances[:20]:
        for _ in range(5):
            parts = examples.hear_in_text(rng, u)
            assert sum(isinstance(p, Speech) for p in parts) == 1 and len(parts) <= 3
            assert all(isinstance(p, (Text, Speech)) for p in parts)


def test_the_readme_names_every_recipe():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in mtbi.RECIPES)
