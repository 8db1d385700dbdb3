"""Statistics, claims and verdicts, several commands at once, `compare`, `plan`, `info`."""

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
import transformers
from checkpoints import save_encoder
from conftest import A_SMALL_BENCH, FEW_TASKS, ROOT, made_once
from programs import begun_anew, one_line
from hypothesis import given, settings
from hypothesis import strategies as st

import lab.gpu
import lab.plan
import lab.plots
import lab.smoke
import lab.step
from corpora.recognizing import RecognizerOptions
from data import FULL, write_audio
from eval import CELLS, DIALOGUES
from lab.claims import (
    BOTH_TRAINED_ON,
    BAR,
    CLAIMS,
    CURVE,
    FEWEST,
    STEPS,
    RULE,
    Claim,
    Results,
    above,
    all_differences,
    decide,
)
from lab.compare import CompareOptions, OneRun, RunAll, all_answers, named_by_recording
from lab.compare import parse_seeds, run_all, runs_of
from lab.compare import score_rows, shortened, with_curve, with_pinned_models
from lab.compare_report import bar_table, claims_part, curve_points
from lab.dose import cells_of_doses, parse_doses, pretrain_missing, row_of_dose, write_doses
from lab.jobs import CLEAR_LINE, Jobs, last_line, lines_without_bars
from lab.look import LookOptions, look
from lab.memory import estimate, weight_bytes
from lab.model_shapes import encoder_shape, find_config, full_name, llm_shape
from lab.plan import largest_fit
from lab.programs import run_program
from lab.plots import smooth
from lab.report import draw_samples, markdown_table, percent, write_table
from lab.statistics import AT, MEASURES, TASK, over_runs, over_utterances, rows_of
from lab.statistics import share_utterances, task_metrics
from lab.statistics import read_answers, weighted_mean
from model import PRECISIONS, Connector, SpeechLLM, load_llm
from mtbi import COMMANDS, RECIPES, main, run_command
from support.adam import RoomyAdamW
from support.console import exit_codes
from support.files import UserError, read_json, write_json, write_jsonl
from support.hub import TINY, load_in_places
from support.options import parse_options
from support.runs import begin


def values_of(rows, run=""):
    """A table of (utterance, value), which weigh alike; runs of other names have other words."""
    table = pandas.DataFrame(rows, columns=["utterance", "value"]).astype({"utterance": str})
    said = run + table["utterance"]
    return table.assign(weight=1.0, transcript=said, task="who", prompt="Who?")


# ---- intervals ----

scores = st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1)), min_size=2, max_size=60)


@settings(max_examples=50, deadline=None)
@given(scores)
def test_the_interval_over_utterances_lies_in_0_to_1_and_the_score_is_the_mean(rows):
    found = over_utterances(values_of(rows))
    assert 0 <= found["ci95"][0] <= found["ci95"][1] <= 1 + 1e-9
    assert found["n"] == len(rows)
    assert found["score"] == pytest.approx(np.mean([value for _, value in rows]))


def test_an_interval_of_many_like_scores_of_one_utterance_is_honest():
    """100 answers about one of two utterances are two observations, not 101."""
    rows = [("a", 1.0) for _ in range(100)] + [("b", 0.0)]
    assert over_utterances(values_of(rows))["ci95"] == [0.0, 1.0]


def test_of_nothing_there_is_no_score_and_no_number_that_json_lacks():
    found = over_utterances(values_of([]))
    assert found == {"score": None, "n": 0, "ci95": [None, None]}
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert over_runs([]) == {"score": None, "ci95": [None, None], "n": 0, "by_run": []}
    assert percent(None) == "–"


runs = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.floats(0, 1)), min_size=3, max_size=20),
    min_size=1,
    max_size=3,
)


@settings(max_examples=20, deadline=None)
@given(runs)
def test_the_interval_over_runs_holds_the_score(runs):
    found = over_runs([values_of(rows) for rows in runs])
    assert found["ci95"][0] - 1e-9 <= found["score"] <= found["ci95"][1] + 1e-9
    assert found["n"] == len(found["by_run"]) == len(runs)


@settings(max_examples=20, deadline=None)
@given(runs)
def test_a_recipe_never_differs_from_itself(runs):
    found = over_runs([values_of([(u, v - v) for u, v in rows]) for rows in runs])
    assert found["ci95"] == [0, 0]


def test_when_runs_differ_more_than_utterances_do_three_that_agree_by_chance_decide_nothing():
    """Under no true difference, with runs that scatter, about one in twenty may be decided."""
    rng, decided = np.random.default_rng(0), 0

    def a_run(name):
        values = rng.normal(rng.normal(0, 0.1), 0.3, 60)
        return values_of(list(enumerate(values)), name)

    for _ in range(400):
        low, high = over_runs([a_run(name) for name in "abc"])["ci95"]
        decided += low > 0 or high < 0
    assert 0.01 < decided / 400 < 0.1


def test_runs_that_are_asked_about_the_same_utterances_do_not_wash_these_out():
    """With one test set what its utterances happen to be like is common to all runs."""
    rng, missed = np.random.default_rng(0), 0
    for _ in range(100):
        common = rng.normal(0, 0.3, 50)
        groups = []
        for _ in range(4):
            values = common + rng.normal(rng.normal(0, 0.01), 0.05, 50)
            groups.append(values_of(list(enumerate(values))))
        low, high = over_runs(groups)["ci95"]
        missed += low > 0 or high < 0
    assert missed / 100 < 0.15


def test_utterances_of_two_runs_are_the_same_if_their_sound_is(tmp_path):
    """Every run of the tiny world has a first test utterance, and some say the same by chance."""
    tables = []
    for run, seed in {"one": 0, "same": 0, "other": 1}.items():
        samples = np.random.default_rng(seed).normal(0, 0.1, 16000).astype(np.float32)
        (tmp_path / run / "data").mkdir(parents=True)
        write_audio(tmp_path / run / "data" / "first.wav", samples)
        row = {"audio_filepath": "first.wav", "text": "three nine", "duration": 1.0}
        row["split"] = "test"
        write_jsonl(tmp_path / run / "data" / "manifest.jsonl", [row])
        tables.append({"run": run, "utterance": "first.wav", "transcript": "three nine"})
    named = named_by_recording(pandas.DataFrame(tables), tmp_path)
    one, same, other = (rows for _, rows in named.groupby("run", sort=False))
    assert share_utterances([one, same]) and not share_utterances([one, other])


def test_two_runs_are_judged_by_students_t():
    """Two runs that differ by 2 d leave 12.7 d on either side of their mean."""
    groups = [values_of([(0, 0.1)], "a"), values_of([(0, 0.3)], "b")]
    assert over_runs(groups)["ci95"] == pytest.approx([0.2 - 1.271, 0.2 + 1.271])


# ---- claims and verdicts ----


def table(run, system, value, n=40):
    """Answers of a system in a run: each measure is value(i) for utterance i, in every cell."""
    rows = []
    asked = {"questions": CELLS, "repeats": ["seen"], "dialogues": DIALOGUES, "text": CELLS}
    for part, cells in asked.items():
        for cell in cells:
            for i in range(n):
                row = {"run": run, "system": system, "set": part, "cell": cell, "task": "who"}
                row |= {"utterance": f"u{i}", "copy": 0.0}  # so a gain is a score
                said = f"words of {run} {i}"
                row |= {"transcript": said, "answer": said, "prompt": f"{cell}?"}
                for column in ("score", "exact", "anchored", "ignored_instruction", "behavior_gap"):
                    row[column] = value(i)
                row["attention_on_instruction"] = value(i)
                rows.append(row)
    return rows


def results_of(values, runs=1):
    """The Results of so many runs alike; values: {system: value(i)}."""
    rows = []
    for run in range(runs):
        for system, value in values.items():
            rows += table(f"seed-{run}", system, value)
    return Results(pandas.DataFrame(rows))


def always(value):
    return lambda i: value


MTBI_OVER_ASR = Claim("a claim", "a paper", "score, unseen tasks", above("mtbi", "asr"))


@pytest.mark.parametrize(
    "ours, theirs, verdict",
    [
        (always(0.9), always(0.5), "holds"),
        (always(0.5), always(0.9), "does not hold"),
        (lambda i: i % 2, lambda i: (i + 1) % 2, "undecided"),
        (always(0.5), always(0.5), "undecided"),
    ],
)
def test_the_verdict_follows_the_rule(ours, theirs, verdict):
    found = decide(MTBI_OVER_ASR, results_of({"mtbi": ours, "asr": theirs}, runs=3))
    assert found["verdict"] == verdict
    assert found["n"] == 3


def test_a_claim_about_a_recipe_that_is_not_there_is_not_measured():
    found = decide(MTBI_OVER_ASR, results_of({"mtbi": always(0.9)}))
    assert found["verdict"] == "not measured"
    assert found["score"] is None


def test_recipes_that_were_asked_different_questions_are_not_compared():
    rows = table("seed-0", "mtbi", always(1.0)) + table("seed-0", "asr", always(1.0), n=39)
    with pytest.raises(UserError, match="asked different questions"):
        decide(MTBI_OVER_ASR, Results(pandas.DataFrame(rows)))


@pytest.mark.parametrize("retention, verdict", [(0.998, "does not hold"), (0.9, "holds")])
def test_a_margin_must_be_exceeded(retention, verdict):
    claim = next(c for c in CLAIMS if c.margin > 0)
    found = results_of({"text": always(1.0), "vtb-no-text": always(retention)})
    assert decide(claim, found)["verdict"] == verdict


def test_a_difference_of_differences_is_paired():
    """What the recipes have in common cancels."""
    claim = next(c for c in CLAIMS if len(c.terms) == 4)

    def noisy(at):
        return lambda i: ((7 * i) % 11) / 11 + at

    values = {
        "mtbi@10": noisy(0.5),
        "mtbi-no-interleave@10": noisy(0.2),
        "mtbi": noisy(0.6),
        "mtbi-no-interleave": noisy(0.5),
    }
    found = decide(claim, results_of(values))
    assert found["score"] == pytest.approx(0.2)
    assert found["ci95"] == pytest.approx([0.2, 0.2])


def test_every_claim_is_about_recipes_that_are_trained_and_values_that_are_measured():
    trained = set(RECIPES)
    for name, shares in CURVE.items():
        trained |= {f"{name}@{share}" for share in shares}
        trained |= {f"{name}{AT}{step}" for step in STEPS}
    for claim in CLAIMS:
        assert set(claim.recipes()) <= trained
        assert claim.measure in MEASURES
        assert sum(sign for sign, _ in claim.terms) == 0
    assert set(BAR) <= set(MEASURES)


def test_every_pair_of_systems_is_compared_and_those_on_a_part_of_the_speech_are_not():
    values = {"text": always(1.0), "mtbi": always(0.7), "asr": always(0.5), "asr@10": always(0.1)}
    rows = all_differences(results_of(values), list(values), ["score, unseen tasks"])
    pairs = {(row["system"], row["minus"]): row["score"] for row in rows}
    assert pairs == pytest.approx(
        {("text", "mtbi"): 0.3, ("text", "asr"): 0.5, ("mtbi", "asr"): 0.2}
    )


def test_measures_are_rows_of_the_table_by_column_set_and_cell():
    answers = pandas.DataFrame(table("seed-0", "mtbi", lambda i: i / 40))
    assert len(rows_of(answers, "score, unseen tasks")) == 40
    assert len(rows_of(answers, "score, everything unseen")) == 2 * 40
    assert len(rows_of(answers, "conversations of two turns")) == 3 * 40
    assert len(rows_of(answers, "text retention")) == 3 * 40
    assert len(rows_of(answers, f"{TASK}who")) == 3 * 40
    answers.loc[answers["utterance"] != "u1", "behavior_gap"] = None  # few are probed
    assert len(rows_of(answers, "behavior gap")) == 3


def test_a_gain_is_the_share_of_the_way_from_copying_to_the_top_line():
    rows = table("seed-0", "mtbi", always(0.8), n=4)
    for row in rows:
        row["copy"] = {"u0": 0.0, "u1": 0.5, "u2": 0.7, "u3": 1.0}[row["utterance"]]
    found = rows_of(pandas.DataFrame(rows), "gain, seen")
    assert len(found) == 3, "what the transcript answers is left out"
    assert weighted_mean(found) == pytest.approx((0.8 - 0.4) / (1 - 0.4))


def test_word_accuracy_is_that_of_what_was_to_be_repeated_against_what_was_said():
    rows = table("seed-0", "self-powered", always(0.0), n=4)
    for row in rows:
        if row["set"] != "repeats":
            row["answer"] = ""
        elif row["utterance"] == "u0":
            row["answer"] = "words of another one 0"
    found = rows_of(pandas.DataFrame(rows), "word accuracy on one wording")
    assert found["value"].tolist() == pytest.approx([0.6, 1.0, 1.0, 1.0])


def test_a_claim_names_the_tasks_that_were_asked_of_those_it_is_about():
    claim = Claim("a claim", "a paper", "score, all", above("mtbi", "asr"), tasks=("wh*", "where"))
    found = decide(claim, results_of({"mtbi": always(0.9), "asr": always(0.5)}))
    assert found["measure"] == "score, all (who)"


@pytest.mark.parametrize("n, verdict", [(FEWEST - 1, "undecided"), (FEWEST, "holds")])
def test_few_utterances_give_no_verdict(n, verdict):
    rows = table("seed-0", "mtbi", always(1.0), n=n) + table("seed-0", "asr", always(0.0), n=n)
    assert decide(MTBI_OVER_ASR, Results(pandas.DataFrame(rows)))["verdict"] == verdict


def test_two_runs_that_agree_by_chance_decide_nothing():
    one_in_forty = results_of({"mtbi": lambda i: float(i == 0), "asr": always(0.0)}, runs=2)
    found = decide(MTBI_OVER_ASR, one_in_forty)
    assert found["by_run"] == [0.025, 0.025]
    assert found["verdict"] == "undecided"


def test_a_gap_that_is_no_number_leaves_its_claim_unmeasured_and_the_others_alone():
    rows = table("seed-0", "mtbi", always(0.9)) + table("seed-0", "asr", always(0.5))
    rows[3]["behavior_gap"] = float("nan")
    results = Results(pandas.DataFrame(rows))
    gap = Claim("a claim", "a paper", "behavior gap", above("mtbi", "asr"))
    assert decide(gap, results)["verdict"] == "not measured"
    assert decide(MTBI_OVER_ASR, results)["verdict"] == "holds"


def test_the_tasks_both_were_trained_on_are_those_of_the_recipe():
    for other, tasks in BOTH_TRAINED_ON.items():
        assert tasks == RECIPES[other].tasks


def test_the_same_three_utterances_in_two_runs_are_three():
    rows = []
    for system, value in (("mtbi", 1.0), ("asr", 0.0)):
        once = table("seed-0", system, always(value), n=3)
        rows += once + [{**row, "run": "seed-1"} for row in once]
    assert decide(MTBI_OVER_ASR, Results(pandas.DataFrame(rows)))["verdict"] == "undecided"


def test_a_hard_task_with_more_unseen_prompts_is_no_drop():
    easy, hard = table("seed-0", "asr", always(0.9)), table("seed-0", "asr", always(0.1))
    hard = [{**row, "task": "where"} for row in hard]
    few = [row for row in easy if row["cell"] == "seen" or row["utterance"] == "u1"]
    found = rows_of(pandas.DataFrame(few + hard), "drop from seen to unseen prompts")
    assert weighted_mean(found) == pytest.approx(0.0)


def test_a_drop_is_what_unseen_prompts_cost_on_the_tasks_that_are_named():
    rows = table("seed-0", "asr", always(0.9))
    for row in rows:
        if row["cell"] == "unseen_prompt":
            row["score"] = 0.6
    other = [{**row, "task": "where", "score": 0.0} for row in rows]
    answers = pandas.DataFrame(rows + other)
    found = rows_of(answers, "drop from seen to unseen prompts", ("who",))
    assert weighted_mean(found) == pytest.approx(0.3)
    assert len(found) == 2 * 40


@pytest.mark.parametrize("text, seeds", [("3", [0, 1, 2]), ("8:11", [8, 9, 10])])
def test_seeds_are_so_many_or_those_named(text, seeds):
    assert list(parse_seeds(text)) == seeds


@pytest.mark.parametrize("text", ["0", "", "-1", "3:3", "5:2", "x", "1:2:3", "65", "1e3"])
def test_no_seeds_and_too_many_are_refused(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_the_curve_has_the_parts_of_the_speech_in_order_and_the_whole_last():
    values = {"asr": always(0.5), "asr@30": always(0.3), "asr@10": always(0.1)}
    rows = score_rows(results_of(values), list(values), list(MEASURES))
    [(name, (shares, on_unseen_tasks, _))] = curve_points({"scores": rows}).items()
    assert (name, shares) == ("asr", [10, 30, 100])
    assert on_unseen_tasks == pytest.approx([10, 30, 50])
    assert with_curve(["vtb", "asr"]) == ["vtb", "asr", "asr@10", "asr@30"]


def test_the_steps_are_a_curve_too_and_the_whole_training_is_its_end():
    values = {"asr": always(0.5), "asr-at-250": always(0.3), "asr-at-125": always(0.1)}
    rows = score_rows(results_of(values), list(values), list(MEASURES))
    assert list(curve_points({"scores": rows})) == []
    [(name, (steps, gains, _))] = curve_points({"scores": rows}, AT, 1000).items()
    assert (name, steps) == ("asr", [125, 250, 1000])
    assert gains == pytest.approx([10, 30, 50])


def test_no_interval_of_a_score_leaves_0_to_1():
    """Whatever Student's t says of three runs."""
    rows = []
    for run, value in enumerate((0.1, 0.5, 0.9)):
        rows += table(f"seed-{run}", "mtbi", always(value))
    for row in score_rows(Results(pandas.DataFrame(rows)), ["mtbi"], list(MEASURES)):
        assert row["low"] <= row["score"] <= row["high"]
        assert 0 <= row["low"] or row["measure"].startswith("gain")
        assert row["high"] <= 1 or row["measure"] == "behavior gap"


def test_the_quality_bar_is_of_the_tiny_world():
    values = {"mtbi": always(0.92), "cascade": always(0.93)}
    found = score_rows(results_of(values), list(values), list(MEASURES))
    meta = {"speech": "tiny", "llm": "tiny", "encoder": "tiny", "tasks": None}
    meta |= {"quick": False, "k": None, "lora": None, "steps": 1000}
    meta |= {"batch_size": 16, "accumulate": 2}
    report = {"scores": found, "bar": BAR, "meta": meta}
    seen = next(line for line in bar_table(report).splitlines() if "| seen |" in line)
    assert seen.split(" | ")[1:] == ["92.0%", "93%", "no", "98.9%", "yes |"]
    another = {**report, "meta": {**meta, "tasks": "tasks.toml"}}
    assert "this is another" in bar_table(another)
    others = [{"quick": True}, {"steps": 300}, {"k": 12}, {"lora": 0}, {"lora": "full"}]
    for other in (*others, {"batch_size": 4}):
        assert "these are others" in bar_table({**report, "meta": {**meta, **other}})


def test_a_quick_comparison_has_the_first_seed_that_was_named():
    assert shortened(CompareOptions(out="out", seeds="8:16", quick=True)).seeds == "8:9"
    assert shortened(CompareOptions(out="out", quick=True)).seeds == "0:1"


def test_what_was_not_measured_is_not_drawn(tmp_path, monkeypatch):
    drawn = []

    def bar(self, places, heights, *_, **options):
        drawn.append((heights, options["yerr"]))

    monkeypatch.setattr(lab.plots.pyplot.Axes, "bar", bar)
    whole = {"score": 0.5, "ci95": [0.4, 0.6]}
    none = {"score": None, "ci95": [None, None]}
    lab.plots.bars(tmp_path / "bars.png", ["a", "b"], {"copy": [whole, none]}, "", "")
    heights, spread = drawn[0]
    assert heights[0] == pytest.approx(50) and np.isnan(heights[1])
    assert spread[:, 0] == pytest.approx([10, 10]) and np.isnan(spread[:, 1]).all()


# ---- the reports of `bench` ----


def answers_of(*texts, task="repeat"):
    rows = []
    for reference, answer in texts:
        rows.append({"set": "questions", "task": task, "reference": reference, "answer": answer})
    return pandas.DataFrame(rows)


def test_every_metric_of_a_task_is_over_all_its_answers():
    found = task_metrics(answers_of(("a b c d", "A b, c d."), ("a b c d", "a x c d"))).loc["repeat"]
    assert found["exact"] == 0.5
    assert found["wer"] == pytest.approx(1 / 8), "of all words, not a mean of means"
    assert 0 < found["bleu"] < 1 and 0 < found["chrf"] < 1
    short = task_metrics(answers_of(("at noon", "At noon."))).loc["repeat"]
    assert short["bleu"] == pytest.approx(1), "of no more words at once than there are"


def test_samples_are_of_every_cell_and_each_has_every_systems_answer(benched_world):
    answers = pandas.read_csv(benched_world / "run" / "answers.csv", keep_default_na=False)
    samples = draw_samples(answers, seed=0)
    assert {sample["cell"] for sample in samples} == set(CELLS)
    for sample in samples:
        assert list(sample["answers"]) == ["text", "copy", "cascade", "mtbi", "asr"]
    assert samples == draw_samples(answers, seed=0) != draw_samples(answers, seed=1)


# ---- several commands at once ----


def test_a_job_that_fails_is_explained_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    # what a command prints must come before why it failed
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    jobs, name = Jobs(2, run_command, tiny=True), tmp_path.name
    nowhere = ["--speech", str(tmp_path / "nowhere"), "--jobs", "1"]
    commands = [["recipes"], ["compare", "--out", str(tmp_path / "out"), *nowhere]]

    def attempt(words):
        return jobs.attempt(words, tmp_path, words[0])

    assert jobs.each("two commands", attempt, commands) == [True, False]
    assert list(jobs.failures) == [f"{name}/compare"]
    assert "nothing could be measured" in jobs.failures[f"{name}/compare"]
    said = (tmp_path / "output-recipes-recipes.txt").read_text(encoding="utf-8")
    assert "mtbi-no-interleave" in said
    whole = (tmp_path / "failed-compare-compare.txt").read_text(encoding="utf-8")
    assert "trainings in each of 3 runs" in whole
    assert "FAILED" in capsys.readouterr().out


def test_a_job_that_succeeds_after_all_leaves_no_failure_behind(tmp_path, capsys):
    def fails_once(words):
        if not (tmp_path / "failed-recipes-job.txt").exists():
            raise UserError("not now")

    jobs = Jobs(1, fails_once, tiny=True)
    assert not jobs.attempt(["recipes"], tmp_path, "job")
    assert "not now" in (tmp_path / "failed-recipes-job.txt").read_text(encoding="utf-8")
    assert jobs.attempt(["recipes"], tmp_path, "job")
    assert not (tmp_path / "failed-recipes-job.txt").exists()


def test_ctrl_c_ends_what_runs_and_begins_nothing_more():
    jobs, begun = Jobs(2, run_command, tiny=True), []

    def work(item):
        begun.append(item)
        if item == 1:
            raise KeyboardInterrupt
        time.sleep(0.2)

    with pytest.raises(KeyboardInterrupt):
        jobs.each("ten things", work, list(range(10)))
    assert len(begun) < 10
    assert not jobs.threads


def test_what_a_job_says_is_cut_to_its_line_and_clears_what_stood_there(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("lab.jobs.GLANCE", 0.05)
    output = tmp_path / "output.txt"
    output.write_text("word " * 50, encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.5)"])
    assert Jobs(2, run_command, tiny=True).watch(process, output) == 0
    shown = terminal.getvalue().split("\r")
    assert any(line.startswith(CLEAR_LINE + "word word") for line in shown)
    assert max(len(line) for line in shown) < 130


def test_tiny_models_share_a_gpu_as_far_as_its_memory_and_the_cores_go(monkeypatch):
    monkeypatch.setattr(lab.jobs, "DEVICE", "cuda")
    monkeypatch.setattr(lab.jobs.os, "cpu_count", lambda: 16)
    for gigabytes, expected in ((1, 1), (8, 3), (80, 12)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda g=gigabytes: (int(g * 1e9), None))
        assert lab.jobs.jobs_that_fit(tiny=True)[0] == expected
    monkeypatch.setattr(lab.jobs.os, "cpu_count", lambda: 2)
    assert lab.jobs.jobs_that_fit(tiny=True)[0] == 2
    assert lab.jobs.jobs_that_fit(tiny=False)[0] == 1
    assert not Jobs(4, None, tiny=True).shares, "one command on one GPU is one process"


def test_of_what_a_process_said_the_last_line_and_all_but_the_bars_are_shown(tmp_path):
    output = tmp_path / "output.txt"
    bar = "train mtbi:  50%|█████     | 1/2 [00:01<00:01,  1.0it/s]\rtrain mtbi: 100%|███| 2/2\n"
    output.write_text(f"$ python mtbi.py train\nk: 6\n{bar}train mtbi: 2.0 s\n\n", encoding="utf-8")
    assert last_line(output) == "train mtbi: 2.0 s"
    assert lines_without_bars(output) == ["k: 6", "train mtbi: 2.0 s"]
    output.write_text(f"{bar * 100}train mtbi: 3.0 s\n", encoding="utf-8")
    assert last_line(output) == "train mtbi: 3.0 s", "of a long output, too"


# ---- compare ----

COMPARED = ["--recipes", "mtbi,blsp,vtb", "--seeds", "1", "--no-curve", "--jobs", "1"]
COMPARED += ["--steps", "2", "--batch-size", "8", "--accumulate", "2", "--train", "40"]
COMPARED += ["--test", "16", "--per-prompt", "1", "--dialogues", "1", "--probes", "4"]
COMPARED += ["--bits", "16", "--tasks", str(FEW_TASKS)]
COMPARED += ["--k", "6"]  # no power of two, which the convolutions of blsp need


@pytest.fixture(scope="session")
def compared_once(tmp_path_factory):
    def make(folder):
        assert again(folder) == 2  # one recipe cannot be trained

    return made_once(tmp_path_factory, "compared", make)


@pytest.fixture
def compared(compared_once, tmp_path):
    """A comparison in which one recipe failed; it may be changed."""
    return shutil.copytree(compared_once, tmp_path / "compared")


def again(out, *words):
    return main(["compare", "--out", str(out), *COMPARED, *words])


@pytest.fixture(scope="session")
def comparison(compared_once):
    return read_json(compared_once / "report.json")


def test_every_command_of_a_comparison_is_told_what_concerns_it(compared_once):
    asked = read_json(compared_once / "seed-0" / "config.json")["options"]
    trained = read_json(compared_once / "seed-0" / "mtbi" / "config.json")["options"]
    assert (asked["bits"], asked["tasks"]) == (16, "tests/few_tasks.toml")
    assert (trained["batch_size"], trained["accumulate"], trained["k"]) == (8, 2, 6)


def test_all_of_an_unquantized_llm_can_be_trained_measured_and_exported(
    compared_once, tmp_path, capsys
):
    run = begun_anew(compared_once / "seed-0", tmp_path)
    words = ["train", str(run), "--recipe", "asr", "--lora", "full", "--hidden", "16"]
    words += ["--steps", "2", "--batch-size", "8"]
    assert main([*words, "--precision", "bf16"]) == 2
    one_line(capsys, "--precision bf16", "what is trained is in fp32")
    assert main(words) == 0
    assert "all of the LLM); the encoder is frozen" in capsys.readouterr().out
    assert main(["bench", str(run), *A_SMALL_BENCH]) == 0
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    assert "all of the LLM trained" in said and "gains seen" in said
    assert main(["export", str(run / "asr"), "--out", str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text(encoding="utf-8")
    assert "A connector and, in `adapter/`, a changed copy of all the LLM's weights" in card
    assert "- that copy of the LLM: as the LLM" in card


def test_a_comparison_trains_what_it_is_told_of_the_llm(tmp_path, capsys):
    attempted = []
    jobs = SimpleNamespace(attempt=lambda words, *_: attempted.append(words))
    options = CompareOptions(out=str(tmp_path), lora="full", bits=16)
    RunAll(options, jobs).train((OneRun("seed-0", (), 0), "vanilla-it"))
    [words] = attempted
    assert words[words.index("--lora") + 1] == "full"
    assert main(["compare", "--out", str(tmp_path / "new"), "--lora", "full"]) == 2
    one_line(capsys, "which must not be packed: --bits 16")
    assert not (tmp_path / "new").exists()


def test_the_fair_recognizer_learns_from_as_many_examples_as_the_recipes(tmp_path):
    attempted = []
    jobs = SimpleNamespace(attempt=lambda words, *_: attempted.append(words))
    options = CompareOptions(out=str(tmp_path), asr="own", steps=80, batch_size=8, accumulate=2)
    assert RunAll(options, jobs).bench(OneRun("seed-0", (), 0), ["mtbi"]) == []
    [words] = attempted
    made = parse_options(RecognizerOptions, words[1:], "recognizer", "")
    assert (words[0], made.steps, made.batch_size) == ("recognizer", 80, 16)


def test_seeds_added_to_a_comparison_have_the_commits_that_it_was_begun_with(tmp_path, monkeypatch):
    monkeypatch.setattr("support.hub.fingerprint_of_weights", lambda name, kind: f"the-{kind}")
    models = {"llm": "someone/llm", "encoder": "someone/ears", "asr": "someone/ctc"}
    options = CompareOptions(out=str(tmp_path), **models)
    first = with_pinned_models(options)
    assert (first.llm, first.encoder) == ("someone/llm@the-llm", "someone/ears@the-encoder")
    assert first.asr == "someone/ctc@the-encoder"
    begin(tmp_path, "compare", first, {})
    monkeypatch.setattr("support.hub.fingerprint_of_weights", lambda name, kind: "another")
    assert with_pinned_models(options) == first
    for asr in (None, "own", "tiny"):
        tiny = CompareOptions(out=str(tmp_path), asr=asr)
        assert with_pinned_models(tiny) == tiny


def test_a_recipe_that_fails_is_reported_and_the_others_go_on(compared_once, comparison):
    failures = comparison["meta"]["failures"]
    assert list(failures) == ["seed-0/blsp"]
    assert "power of two" in failures["seed-0/blsp"]
    systems = dict.fromkeys(row["system"] for row in comparison["scores"])
    assert list(systems) == ["text", "copy", "cascade", "mtbi", "vtb"]
    verdicts = {(c["claim"], c["difference"]): c["verdict"] for c in comparison["claims"]}
    about_vtb = verdicts["MTBI generalizes to unseen tasks better than vtb", "mtbi − vtb"]
    assert about_vtb in ("holds", "does not hold", "undecided")
    about_blsp = verdicts["MTBI generalizes to unseen tasks better than blsp", "mtbi − blsp"]
    assert about_blsp == "not measured"
    text = (compared_once / "report.md").read_text(encoding="utf-8")
    assert "**Failed:**" in text and "power of two" in text


def test_the_report_of_a_comparison_has_the_rule_the_claims_and_how_it_was_made(
    compared_once, comparison
):
    text = (compared_once / "report.md").read_text(encoding="utf-8")
    assert RULE in text
    asked = {"mtbi", "blsp", "vtb", "text", "copy", "cascade"}
    others = sum(not set(claim.recipes()) <= asked for claim in CLAIMS)
    assert f"{others} other claims are about recipes that were not asked for" in text
    assert "On held-out speakers and sentences;" in text and "too narrow" not in text
    left_out = {"heard_no_speaker": False, "leave_one_speaker_out": True}
    other = claims_part({**comparison, "meta": {**comparison["meta"], **left_out}})
    assert "some were heard in training" in other and "somewhat too narrow" in other
    assert "this is another" in text.split("## The quality bar")[1]
    assert "no recipe was trained on a part" in text
    assert not (compared_once / "curve.png").exists()
    assert comparison["meta"]["k"] == 6
    for name in ("cells", "tasks", "ignored", "retention", "dialogues", "attention"):
        assert (compared_once / f"{name}.png").stat().st_size > 1000


def test_the_scores_of_a_comparison_are_means_of_the_answers_of_its_runs(compared_once, comparison):
    answers = pandas.read_csv(compared_once / "seed-0" / "answers.csv")
    questions = answers[(answers["set"] == "questions") & (answers["cell"] == "unseen_task")]
    means = questions.groupby("system")["score"].mean()
    table = pandas.read_csv(compared_once / "scores.csv").set_index(["system", "measure"])
    for system, mean in means.items():
        assert table.loc[(system, "score, unseen tasks"), "score"] == pytest.approx(mean)
    assert len(table) == len(comparison["scores"])


def test_a_comparisons_tables_have_every_pair_and_every_metric(compared_once):
    differences = pandas.read_csv(compared_once / "differences.csv")
    unseen = differences[differences["measure"] == "score, unseen tasks"]
    pairs = list(zip(unseen["system"], unseen["minus"]))
    systems = ["text", "copy", "cascade", "mtbi", "vtb"]
    assert pairs == [(a, b) for i, a in enumerate(systems) for b in systems[i + 1 :]]
    metrics = pandas.read_csv(compared_once / "metrics.csv").set_index(["system", "task"])
    assert list(metrics.columns) == ["exact", "wer", "chrf", "bleu"]
    assert metrics.loc[("text", "repeat"), "exact"] == 1


def test_a_paired_difference_is_the_difference_of_the_scores(compared_once, comparison):
    by_name = {(row["system"], row["measure"]): row["score"] for row in comparison["scores"]}
    measure = "gain, unseen tasks"
    gap = by_name["mtbi", measure] - by_name["vtb", measure]
    differences = pandas.read_csv(compared_once / "differences.csv")
    row = differences.set_index(["measure", "system", "minus"]).loc[measure, "mtbi", "vtb"]
    assert row["score"] == pytest.approx(gap)
    text = (compared_once / "report.md").read_text(encoding="utf-8")
    lines = text.split("## Paired differences")[1].splitlines()
    vtb = next(line for line in lines if line.startswith("| `vtb` |"))
    assert float(vtb.split("|")[5].strip(" *")) == pytest.approx(-100 * gap, abs=0.051)


def test_what_a_training_took_stands_in_the_report(comparison):
    rows = {row["system"]: row for row in comparison["training"]}
    assert list(rows) == ["mtbi", "vtb"]
    assert all(row["audio_seconds"] > 0 and row["runs"] == 1 for row in rows.values())
    assert rows["vtb"]["trained_parameters"] > rows["mtbi"]["trained_parameters"]


def test_a_comparison_does_nothing_twice_but_what_failed(compared, capsys):
    def results():
        files = [*(compared / "seed-0").rglob("*.safetensors"), *compared.glob("seed-0/bench/*")]
        return {file: file.stat().st_mtime_ns for file in files}

    before = results()
    assert len(before) > 8
    assert again(compared) == 2
    one_line(capsys, "of its jobs 1 failed (seed-0/blsp)", "tries them again")
    assert results() == before
    meta = read_json(compared / "report.json")["meta"]
    assert len(meta["wall_seconds_by_sitting"]) == 2


def test_a_damaged_record_of_a_comparison_is_measured_again(compared, comparison):
    (compared / "seed-0" / "bench" / "mtbi.json").write_text("{")
    assert again(compared) == 2, "blsp failed once more"
    report = read_json(compared / "report.json")
    assert report["claims"] == comparison["claims"]
    assert report["scores"] == comparison["scores"]


def test_records_of_other_settings_are_never_put_beside_each_other(compared, capsys):
    assert again(compared, "--steps", "3") == 2
    assert "steps was 2, now 3" in capsys.readouterr().err


def test_a_recipe_that_spoils_the_benchmark_is_left_out_of_it():
    class Spoiled:
        failures = {}

        def attempt(self, words, folder, name):
            return "blsp" not in words[words.index("--recipes") + 1].split(",")

    work = RunAll(CompareOptions(out="out"), Spoiled())
    assert work.bench(OneRun("seed-0", (), 0), ["mtbi", "blsp"]) == [
        "text",
        "copy",
        "cascade",
        "mtbi",
    ]


class Told:
    """Stands in for Jobs: (run, command, whether in a process of its own) of all it was told."""

    def __init__(self):
        self.said, self.apart, self.failures = [], False, {}

    def each(self, what, function, items):
        self.apart = True
        done = [function(item) for item in items]
        self.apart = False
        return done

    def attempt(self, words, folder, name):
        self.said.append((folder.name, words[0], self.apart))
        return True


def test_what_is_there_is_looked_at_without_a_process(tmp_path):
    done = tmp_path / "seed-0"
    for name in ("data/manifest.jsonl", "behaviors.jsonl", "mtbi/connector.safetensors"):
        (done / name).parent.mkdir(parents=True, exist_ok=True)
        (done / name).touch()
    jobs, options = Told(), CompareOptions(out=str(tmp_path), seeds="2")
    run_all(runs_of(options), options, ["mtbi"], jobs)
    assert jobs.said[:6] == [
        ("seed-1", "prepare", True),
        ("seed-1", "behaviors", True),
        ("seed-0", "prepare", False),
        ("seed-0", "behaviors", False),
        ("seed-1", "train", True),
        ("seed-0", "train", False),
    ]


def test_a_recipe_whose_states_were_not_kept_is_named_and_does_not_spoil_the_others(tmp_path):
    jobs, run = Told(), OneRun("seed-0", (), 0)
    for step in STEPS:
        state = tmp_path / "seed-0" / "asr" / "state" / f"{step:08d}.safetensors"
        state.parent.mkdir(parents=True, exist_ok=True)
        state.touch()
    asked = []

    def attempt(words, folder, name):
        asked.append(words[words.index("--step") + 1 :])
        return name != f"bench-{STEPS[1]}"  # which fails

    jobs.attempt = attempt
    work = RunAll(CompareOptions(out=str(tmp_path)), jobs)
    measured = work.bench_on_the_way(run, ["mtbi", "asr"], [])
    assert measured == [f"asr{AT}{STEPS[0]}", f"asr{AT}{STEPS[2]}"]
    assert [words[:3] for words in asked] == [[str(step), "--recipes", "asr"] for step in STEPS]
    [(what, why)] = jobs.failures.items()
    assert what == "seed-0/mtbi on the way" and "states were not kept" in why


def test_what_an_earlier_call_measured_on_the_way_is_left_out(tmp_path):
    for folder in ("seed-0", *(f"seed-0/steps/{step}" for step in STEPS)):
        write_table(
            tmp_path / folder / "answers.csv", pandas.DataFrame(table("", "asr", always(1)))
        )
    measured = ["asr", f"asr{AT}{STEPS[1]}"]
    answers = all_answers(tmp_path, {"seed-0": measured})
    assert answers["system"].unique().tolist() == measured
    assert set(answers["run"]) == {"seed-0"}


def test_a_comparison_of_nothing_is_refused(tmp_path, capsys):
    for recipes, why in (
        ("text,cascade", "names no recipe that is trained"),
        ("mtbi,nothing", "there is no recipe 'nothing'"),
    ):
        assert main(["compare", "--out", str(tmp_path), "--recipes", recipes]) == 2
        assert why in capsys.readouterr().err


def speakers_manifest(data, path, speakers):
    """The first utterances of a data folder, as said by these speakers."""
    lines = (data / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{**json.loads(line), "speaker": name} for line, name in zip(lines, speakers)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_leaving_each_speaker_out_needs_speakers(data, tmp_path, capsys):
    manifest = speakers_manifest(data, tmp_path / "one.jsonl", ["ann", "ann", "ann"])
    words = ["compare", "--out", str(tmp_path / "out"), "--leave-one-speaker-out"]
    assert main([*words, "--speech", str(manifest)]) == 2
    assert "needs two or more" in capsys.readouterr().err
    assert main(words) == 2
    assert "needs a JSONL manifest file" in capsys.readouterr().err


def test_leaving_each_speaker_out_is_a_run_for_each(data, tmp_path):
    manifest = speakers_manifest(data, tmp_path / "two.jsonl", ["ann b", "joe", "joe"])
    options = CompareOptions(out="out", speech=str(manifest), leave_one_speaker_out=True)
    assert [(run.name, run.prepare[-2:], run.seed) for run in runs_of(options)] == [
        ("without-ann-b", ("--test-speakers", "ann b"), 0),
        ("without-joe", ("--test-speakers", "joe"), 1),
    ]
    seeds = [run.seed for run in runs_of(replace(options, seeds="8:10"))]
    assert seeds == [8, 9], "one each, or the interval would not tell how trainings differ"
    assert [run.seed for run in runs_of(CompareOptions(out="out"))] == [0, 1, 2]


def test_speakers_whose_names_leave_the_same_letters_have_runs_of_their_own(data, tmp_path):
    manifest = speakers_manifest(data, tmp_path / "all.jsonl", ["李", "王", "a.b", "a-b", "joe"])
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        del row["duration"]  # which `prepare` measures
    manifest.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    options = CompareOptions(out="out", speech=str(manifest), leave_one_speaker_out=True)
    names = [run.name for run in runs_of(options)]
    assert len(set(names)) == 5 and "without-joe" in names


# ---- tables that were written ----


def test_a_table_of_answers_is_read_as_it_was_written(tmp_path, benched_world):
    answers = read_answers(benched_world / "run" / "answers.csv")
    said = ["one\rtwo", "a\nb", '"quoted", so', "None", "007", "", " x "]
    answers.loc[: len(said) - 1, "answer"] = said
    write_table(tmp_path / "answers.csv", answers)
    pandas.testing.assert_frame_equal(read_answers(tmp_path / "answers.csv"), answers)


def test_where_nobody_was_asked_to_repeat_there_is_no_word_accuracy_and_no_error(benched_world):
    answers = read_answers(benched_world / "run" / "answers.csv")
    nothing = answers[answers["task"] == "no such task"]
    assert over_utterances(rows_of(nothing, "word accuracy on one wording", ()))["n"] == 0


def test_a_training_of_which_every_step_was_skipped_has_no_curve():
    assert smooth([{"step": 0, "loss": None}]) == ([], [], None)


# ---- plan ----


@pytest.mark.parametrize(
    "name, billions",
    [
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.544),
        ("qwen2.5-3b", 3.086),
        ("qwen2.5-7b", 7.616),
        ("qwen2.5-14b", 14.77),
        ("llama-3.2-1b", 1.236),
        ("llama-3.2-3b", 3.213),
        ("llama-3.1-8b", 8.030),
        ("smollm2-360m", 0.362),
        ("smollm2-1.7b", 1.711),
    ],
)
def test_the_shapes_have_as_many_parameters_as_the_published_models(name, billions):
    llm = llm_shape(find_config(name, "llm"), torch.bfloat16)
    assert llm.num_parameters() / 1e9 == pytest.approx(billions, rel=2e-3)


def test_models_of_the_table_are_known_by_the_last_part_of_their_name():
    assert full_name("qwen2.5-7b", "llm") == "Qwen/Qwen2.5-7B-Instruct"
    assert full_name("whisper-tiny.en", "encoder") == "openai/whisper-tiny"
    assert full_name("somebody/qwen2.5-7b", "llm") == "somebody/qwen2.5-7b"
    assert full_name("unheard-of", "llm") == "unheard-of"


def test_a_published_encoder_is_measured_from_its_configuration():
    config = find_config("openai/whisper-large-v3", "encoder")
    assert encoder_shape(config, "") == (636968960, 1280, 50.0)


@pytest.mark.parametrize(
    "family, width, rate",
    [
        ("wav2vec2-ctc", 32, 50.0),
        ("parakeet", 32, 12.5),
        ("parakeet-encoder", 32, 12.5),
        ("whisper", 32, 50.0),
        ("tiny", 192, 100 / 3),
    ],
)
def test_an_encoder_in_a_folder_is_measured_from_its_configuration(family, width, rate, tmp_path):
    name = family if family == "tiny" else str(save_encoder(tmp_path, family))
    shape = encoder_shape(find_config(name, "encoder"), name)
    assert shape.width == width
    assert shape.frame_rate == pytest.approx(rate, rel=0.02)


SMALL_QWEN = {
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 8000,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    "bits, frugal", [(4, {}), (16, {}), (4, {"head_bits": 4, "embeddings": "host"})]
)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision, loss", [("fp32", "ce"), ("bf16", "ce"), ("bf16", "kl")])
@pytest.mark.parametrize("slices", [1, 9])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(
    bits, frugal, checkpointing, precision, loss, slices, monkeypatch
):
    """On a CPU: the tensors that are alive in a real step, on real weights."""
    if slices > 1:
        monkeypatch.setattr("model.AT_ONCE", 20 * SMALL_QWEN["vocab_size"])
    config, dtype = transformers.Qwen2Config(**SMALL_QWEN), PRECISIONS[precision]
    llm = lab.step.random_llm(config, bits, dtype, **frugal)
    measured = peak_of_step(llm, checkpointing, loss)
    planned = planned_step(config, bits, dtype, checkpointing, loss, **frugal)
    megabytes = {name: round(value / 1e6, 1) for name, value in planned.items()}
    assert planned["peak"] == pytest.approx(measured, rel=0.15), megabytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_knows_what_int8_keeps_of_a_step(checkpointing, tmp_path):
    """The inputs of its layers: the step beside the same in NF4, which keeps none of them."""
    config = transformers.Qwen2Config(**SMALL_QWEN)
    transformers.Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    steps, plans = {}, {}
    for bits in (4, 8):
        llm = load_in_places(str(tmp_path), bits, torch.float32, "cpu")
        llm.eval().requires_grad_(False)
        steps[bits] = peak_of_step(llm, checkpointing) - bytes_of(llm)
        plan = planned_step(config, bits, torch.float32, checkpointing)
        plans[bits] = plan["peak"] - plan["weights"]
    assert steps[8] > steps[4] + 10e6
    assert plans[8] - plans[4] == pytest.approx(steps[8] - steps[4], rel=0.3)


@pytest.mark.parametrize("bits, lora", [(4, 16), (16, FULL)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_knows_what_training_the_llm_takes(bits, lora, checkpointing):
    config = transformers.Qwen2Config(**SMALL_QWEN)
    llm = lab.step.random_llm(config, bits, torch.float32)
    planned = planned_step(config, bits, torch.float32, checkpointing, lora=lora)
    measured = peak_of_step(llm, checkpointing, lora=lora)
    megabytes = {name: round(value / 1e6, 1) for name, value in planned.items()}
    assert planned["peak"] == pytest.approx(measured, rel=0.15), megabytes


def bytes_of(llm):
    """What its weights take."""
    storages = [tensor.untyped_storage() for tensor in lab.step.tensors_of(llm)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def peak_of_step(llm, checkpointing, loss="ce", lora=0):
    """Bytes of the tensors that are alive in a step, at most."""
    options = SimpleNamespace(batch_size=6, prompt_tokens=40, answer_tokens=30, seconds=6.0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "llm")
    model = SpeechLLM(llm, tokenizer, None, Connector("stack-mlp", 128, 256, 9, 1024), lora)
    if checkpointing:
        model.checkpoint_gradients()
    model.train()
    optimizer = torch.optim.AdamW(model.trainable().values())
    examples = lab.step.random_conversations(options, 128, 300)
    step = partial(lab.step.our_step, loss=loss)
    step(model, optimizer, examples, None)
    return 1e9 * lab.step.peak_bytes(step, model, optimizer, examples, None)["peak_gb"]


def planned_step(config, bits, dtype, checkpointing, loss="ce", **more):
    """What `estimate` says of the same."""
    return estimate(
        config,
        128,
        50.0,
        bits=bits,
        dtype=dtype,
        seconds=6.0,
        prompt=40,
        answer=30,
        batch=6,
        checkpointing=checkpointing,
        loss=loss,
        **more,
    )


def test_the_weights_are_estimated_to_the_percent(llm):
    shape = llm_shape(llm[0].config, torch.float32)
    real = bytes_of(load_llm("tiny", 4)[0])
    assert weight_bytes(shape, 4, torch.float32)[0] == pytest.approx(real, rel=0.02)


def planned(capsys, *words):
    """What `plan` says, and its table: {what: GB}."""
    assert main(["plan", *words]) == 0
    said, table = capsys.readouterr().out, {}
    for line in said.splitlines():
        if line.startswith("|") and not line.startswith(("| what", "|---")):
            what, size = line.split("|")[1:3]
            table[what.strip()] = float(size)
    return said, table


def commands_in(said):
    """{command: its options} of the command lines that `plan` says."""
    found = {}
    for line in said.splitlines():
        if line.startswith("  python mtbi.py"):
            name, *words = shlex.split(line)[2:]
            found[name] = parse_options(COMMANDS[name][0], words, name, "")
    return found


def test_what_is_said_to_fit_is_a_command_that_runs_and_more_memory_never_fits_less(capsys):
    micro_batches = []
    for vram in (8, 16, 80):
        said, table = planned(capsys, "--vram", str(vram))
        commands = commands_in(said)
        assert commands["behaviors"].llm == "Qwen/Qwen2.5-7B-Instruct"
        train = commands["train"]
        assert train.batch_size * train.accumulate == 32
        assert train.gradient_checkpointing == ("off" if vram == 80 else "on")
        micro_batches.append(train.batch_size)
        # 750 frames in 94 tokens of 8, a prompt of 48 tokens and an answer of 64
        assert f"{train.batch_size} x 206 positions at once" in said
        assert table["peak"] <= vram
        of_the_step = list(table)[: list(table).index("peak")]
        # the table adds up
        assert sum(table[what] for what in of_the_step) == pytest.approx(table["peak"], abs=0.03)
    assert micro_batches == sorted(micro_batches)
    assert micro_batches[-1] > micro_batches[0]


@given(batch_size=st.integers(1, 96), room=st.integers(1, 1000))
def test_the_largest_micro_batch_that_fits_is_found_in_few_estimates(batch_size, room):
    tried = []

    def estimated(batch, checkpointing):
        tried.append(batch)
        return {"peak": 10 * batch}

    found = largest_fit(estimated, batch_size, True, room)
    assert batch_size % found.micro_batch == 0 and len(tried) <= 4
    assert found.fits == (10 * found.micro_batch <= room)
    assert found.fits or found.micro_batch == 1
    larger = [size for size in tried if size > found.micro_batch]
    assert not any(10 * size <= room for size in larger)
    if found.fits and found.micro_batch < batch_size:
        assert 10 * min(larger) > room, "the next larger one was tried"


def test_plan_takes_what_is_free_of_the_gpu_that_is_there(monkeypatch, capsys):
    monkeypatch.setattr(lab.plan, "DEVICE", "cpu")
    monkeypatch.setattr(lab.plan, "bytes_left_free", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (5.85e9, 8.585e9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "card")
    assert lab.plan.free_vram() == 8.0 and "8 GB are assumed" in capsys.readouterr().out
    monkeypatch.setattr(lab.plan, "DEVICE", "cuda:0")
    assert lab.plan.free_vram() == 6.6, "CUDA's own 0.8 GB are this program's"
    assert "GPU memory: 6.6 GB, what is free of the card" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (8.5e9, 8.585e9))
    assert lab.plan.free_vram() == 8.5, "never more than the card has"


def test_what_does_not_fit_is_said_with_what_would_help(capsys):
    said, _ = planned(capsys, "--llm", "qwen2.5-7b", "--vram", "4", "--batch-size", "4")
    assert "It does not fit 4 GB" in said
    assert "GB are needed" in said
    assert "python mtbi.py train" not in said


def test_what_is_no_llm_and_no_memory_is_refused(tmp_path, capsys):
    assert main(["plan", "--llm", str(save_encoder(tmp_path, "whisper"))]) == 2
    assert "is no causal LLM" in capsys.readouterr().err
    assert main(["plan", "--vram", "-1"]) == 2
    assert "--vram -1.0: is no number from" in capsys.readouterr().err


def test_a_lora_adapter_and_other_connectors_are_counted(capsys):
    models = ("--llm", "qwen2.5-0.5b", "--encoder", "whisper-small", "--batch-size", "1")

    def trained(*words):
        return planned(capsys, *models, *words)[1]["connector and optimizer"]

    plain = trained()
    with_adapter = trained("--lora", "16")
    assert with_adapter == pytest.approx(plain + 8.8e6 * 16 / 1e9, abs=0.02)  # 8.8M, says PEFT
    assert trained("--connector", "qformer") > plain


def test_all_of_an_llm_is_planned_as_a_second_copy_of_its_weights_in_fp32(capsys):
    words = (
        "--llm",
        "qwen2.5-0.5b",
        "--encoder",
        "whisper-small",
        "--batch-size",
        "1",
        "--vram",
        "24",
    )
    _, plain = planned(capsys, *words, "--bits", "16", "--precision", "fp32")
    said, full = planned(capsys, *words, "--bits", "16", "--lora", "full")
    assert full["LLM weights"] == plain["LLM weights"], "the first copy, frozen"
    weights = full["connector and optimizer"] - plain["connector and optimizer"]
    assert weights == pytest.approx(4 * plain["LLM weights"], rel=0.01)
    commands = commands_in(said)
    assert commands["train"].lora == "full"
    assert (commands["behaviors"].bits, commands["behaviors"].precision) == (16, "fp32")


@pytest.mark.parametrize("words", [("--bits", "4"), ("--bits", "16", "--precision", "bf16")])
def test_all_of_a_packed_or_rounded_llm_is_not_planned(capsys, words):
    assert main(["plan", "--lora", "full", *words]) == 2
    assert "--lora full" in capsys.readouterr().err


def test_a_prompt_about_dollars_is_drawn_as_it_is_written(tmp_path):
    names = ["Is $5^$ right?", "$_$"]
    lab.plots.heat_map(
        tmp_path / "a.png", names, ["mtbi"], np.array([[0.5], [1.0]]), "from $5 to $6"
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_what_stands_in_a_table_does_not_break_it():
    table = markdown_table(["kind", "n"], [["q|a\nx", "3"]])
    assert table.splitlines()[-1] == "| q\\|a x | 3 |"


# ---- the step benchmark, and a look at a batch ----


def test_the_benchmark_of_a_step_runs_beside_the_baseline(tmp_path, capsys, monkeypatch):
    words = ["--llm", str(TINY / "llm"), "--encoder", "whisper-tiny", "--steps", "2"]
    words += ["--batch-size", "2", "--seconds", "3", "--out", str(tmp_path / "step.json")]
    monkeypatch.setattr("sys.argv", ["step", *words])
    assert lab.step.main() == 0
    said = capsys.readouterr().out
    assert "ours / plain" in said
    assert "`plan` says" in said
    keys = ("ours", "plain", "planned_peak_gb", "torch", "date")
    result = read_json(tmp_path / "step.json", *keys)
    assert result["ours"]["samples_s"] > result["plain"]["samples_s"] > 0
    assert result["plain"]["peak_gb"] > result["ours"]["peak_gb"]
    assert 0 < result["ours"]["share_of_flop_limit"] < 1


def test_the_step_that_is_timed_is_padded_as_those_of_a_training_are(llm):
    model, masks = lab.smoke.tiny_model(), []
    layer = model.llm.model.layers[0]
    layer.register_forward_pre_hook(
        lambda *call: masks.append(call[2]["attention_mask"]), with_kwargs=True
    )
    options = lab.step.StepOptions(seconds=2.0, batch_size=2)
    uneven = lab.step.random_conversations(options, model.encoder.width, 100)
    for examples in (uneven, 2 * uneven[:1]):
        optimizer = lab.step.adam_w(model.trainable(), 1e-4)
        lab.step.our_step(model, optimizer, examples, None, "ce")
    assert masks[0] is not None and masks[1] is None, "kernels for no mask are others"


def test_a_step_whose_moments_found_no_room_says_so(monkeypatch, capsys):
    monkeypatch.setattr(RoomyAdamW, "on_host", True)
    options = lab.step.StepOptions("tiny", "openai/whisper-tiny", seconds=1, batch_size=1)
    result = lab.step.compare_steps(replace(options, steps=1, ours_only=True))
    lab.step.show_steps(result)
    assert "ours: the optimizer's moments found no room" in capsys.readouterr().out
    assert any("moments on the host" in cell for cell in lab.gpu.step_cells(result))


def test_the_baseline_of_a_step_is_of_whisper_alone(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--llm", str(TINY / "llm"), "--encoder", "tiny"])
    assert lab.step.main() == 2
    assert "name a Whisper" in capsys.readouterr().err


def test_a_look_at_a_batch_shows_its_parts_and_what_embed_makes_of_them(trained_world, capsys):
    look(LookOptions(str(trained_world / "run"), step=1, show=2))
    said = capsys.readouterr().out
    for words in ("Text", "Speech", "Response", "speech tokens", "embed: embeddings (8, "):
        assert words in said
    assert said.count("Response") == 2


def test_a_look_is_half_way_and_begins_with_an_interleaved_conversation(trained_world, capsys):
    look(LookOptions(str(trained_world / "run"), show=1))
    said = capsys.readouterr().out
    kinds = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert "step 1 of 2, counted from 0" in said
    assert len(kinds) > len(["Text", "Speech", "Text", "Response"])
    assert set(kinds) == {"Text", "Speech", "Response"}


def test_a_batch_is_not_shown_of_speech_that_has_other_word_times_now(trained_world, tmp_path):
    """Or other words would be text in it than there were."""
    world = shutil.copytree(trained_world, tmp_path / "world")
    manifest = world / "data" / "manifest.jsonl"
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    write_jsonl(manifest, [{**row, "words": None} for row in rows])
    with pytest.raises(UserError, match="manifest.jsonl: is not what .*mtbi was trained on"):
        look(LookOptions(str(world / "run"), step=1, show=2))


def test_a_look_beyond_the_training_is_refused_in_one_line(trained_world, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["look", str(trained_world / "run"), "--step", "2"])
    assert run_program("look", LookOptions, look) == 2
    assert "are 0 to 1" in capsys.readouterr().err


# ---- info ----


def test_info_tells_what_a_run_folder_is(trained_world, capsys):
    assert main(["info", str(trained_world / "run")]) == 0
    said = capsys.readouterr().out
    for words in (
        "tiny, 4 bits (NF4)",
        "48 utterances",
        "48 with word times",
        "behaviors",
        "asr",
        "connector qformer (k 5, hidden 16), LoRA of rank 2",
        "connector stack-mlp (k 5, hidden 32), LLM frozen",
        "steps 2 of 2, 8 utterances each",
        "not in the last report",
        "report     none yet",
    ):
        assert words in said, (words, said)


def test_info_tells_the_scores_of_the_last_report(benched_world, capsys):
    run = benched_world / "run"
    assert main(["info", str(run)]) == 0
    said = capsys.readouterr().out
    score = read_json(run / "report.json")["recipes"]["mtbi"]["cells"]["seen"]["gain"]
    assert f"seen {percent(score)}" in said
    assert "not in the last report" not in said
    assert f"report     {run / 'report.md'}" in said


def test_info_says_of_a_folder_that_it_is_no_run(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "there is no folder made by `behaviors`" in capsys.readouterr().err


# ---- the first meeting with a GPU; here what a CPU can try of it ----

IN_PROCESS = []
for each in lab.smoke.CHECKS:
    if not each.runs_programs and not each.needs_gpu:
        IN_PROCESS.append(each)


@pytest.mark.parametrize("check", IN_PROCESS, ids=lambda check: check.function.__name__)
def test_a_check_of_the_smoke_test_works_on_a_cpu(check, tmp_path, capsys):
    assert lab.smoke.run_check(check, tmp_path), capsys.readouterr().out
    assert capsys.readouterr().out.startswith("works ")


def test_a_path_that_does_not_work_is_named_with_what_to_do(tmp_path, capsys, monkeypatch):
    def broken(folder):
        """It gives what it should."""
        raise AssertionError("it gives something else")

    monkeypatch.setattr(lab.smoke, "CHECKS", [lab.smoke.Check(broken, "mend it")])
    with pytest.raises(UserError, match="do not work"):
        lab.gpu.meet_gpu(lab.gpu.GpuOptions(smoke=True))
    said = capsys.readouterr().out
    assert "FAILED" in said and "it gives something else. What to do: mend it" in said
    assert "1 checks, 1 failed" in said


def test_what_a_gpu_is_measured_by_is_written_row_by_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lab.gpu, "STEPS", 1)
    out = tmp_path / "gpu"
    options = lab.gpu.GpuOptions(out=str(out), only="encoder,frugal")
    lab.gpu.meet_gpu(options)
    rows = {path.stem: path.stat().st_mtime_ns for path in (out / "rows").iterdir()}
    assert sorted(rows) == ["encoder-whisper-tiny", "step-tiny-whisper-tiny-1s-x2-ce-frugal"]
    page = (out / "gpu.md").read_text()
    assert "hours of audio an hour" in page and "embeddings on the host" in page
    assert set(read_json(out / "gpu.json")["rows"]) == set(rows)

    capsys.readouterr()
    lab.gpu.meet_gpu(options)
    assert "measured" not in capsys.readouterr().out, "a row that is there was measured again"
    here = lab.gpu.describe_device()
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(lab.gpu, "describe_device", lambda: {**here, "device": "another card"})
        with pytest.raises(UserError, match="and this is another card; name another --out"):
            lab.gpu.meet_gpu(options)

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match="not made by this"):
        lab.gpu.meet_gpu(lab.gpu.GpuOptions(out=str(tmp_path / "mine")))


def test_an_llm_that_cannot_be_made_is_tried_once_and_the_other_rows_are_measured(
    tmp_path, monkeypatch, capsys
):
    tried = []

    def make_llm(name, frugal):
        tried.append(name)
        if name:
            raise KeyError("a layer of another kind")

    monkeypatch.setattr(lab.gpu, "make_llm", make_llm)
    lab.gpu.meet_gpu(lab.gpu.GpuOptions(out=str(tmp_path / "gpu"), only="answers,kl,encoder"))
    assert tried == ["", "tiny"], "once for both rows of the tiny LLM"
    said = capsys.readouterr().out
    for row in ("answers-tiny: 'a layer of", "-kl: 'a layer of", "encoder-whisper-tiny: measured"):
        assert row in said


def test_where_nothing_else_fits_the_embeddings_go_to_the_host(capsys):
    words = ["--llm", "Qwen2.5-7B", "--encoder", "whisper-large-v3", "--vram"]
    said, table = planned(capsys, *words, "6")
    assert "--head-bits 4 --embeddings host" in said and "It fits 6 GB" in said
    assert 4 < table["loading the LLM"] < table["peak"], "the table goes through the GPU"
    assert "for a moment" not in said
    said, table = planned(capsys, *words, "12")
    assert "--embeddings" not in said and table["loading the LLM"] < table["peak"]


def test_a_drop_is_not_blurred_by_how_high_the_scores_are():
    """Two systems that lose nothing on unseen prompts: 0, and no doubt about it."""
    rows = []
    for i in range(60):
        cell = "seen" if i % 3 else "unseen_prompt"
        rows.append({"utterance": f"u{i}", "cell": cell, "set": "questions", "task": "who"})
        rows[-1] |= {"transcript": f"words {i}", "prompt": cell}
    for level in (0.5, 0.9):
        answers = pandas.DataFrame(rows).assign(score=level, copy=0.0)
        found = over_utterances(rows_of(answers, "drop from seen to unseen prompts", ()))
        assert found["score"] == pytest.approx(0.0)
        assert found["ci95"] == pytest.approx([0.0, 0.0])


# ---- programs beside the commands ----


def test_a_program_that_is_stopped_says_nothing_more(monkeypatch):
    def stopped(_):
        """Nothing."""
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["look", "run"])
    assert run_program("look", LookOptions, stopped) == 130


def test_who_is_asked_to_end_asks_the_processes_it_waits_for():
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(7)); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", child])
    threading.Timer(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(KeyboardInterrupt):
        exit_codes([process])
    assert process.returncode in (7, -15)


# ---- the dose-response of the tiny world ----


@pytest.mark.parametrize("text", ["", "0.3,much", "1.5", "nan", "0.6:2", "0.6:x"])
def test_doses_that_are_none_are_named(text):
    assert len(parse_doses("0.3,0.3:0.5,0")) == 2, "named twice"
    with pytest.raises(UserError, match=f"--doses {text}"):
        parse_doses(text)


def test_a_dose_is_read_off_its_comparison_and_drawn(tmp_path, capsys):
    """Of an LLM that is there none is pre-trained; the table's numbers are the reports'."""
    report = json.loads((ROOT / "docs/results/fsdd/report.json").read_text())
    del report["checksum"]  # of what stood in it before the paths were made public
    gains = {(row["system"], row["measure"]): row["score"] for row in report["scores"]}
    measured = json.loads((ROOT / "tiny/measured.json").read_text())
    doses = parse_doses("0,0.6:0,0.6")
    for dose in doses:
        folder = dose.folder(tmp_path)
        (folder / "compare").mkdir(parents=True)
        write_json(folder / "compare" / "report.json", report)
        read = {"llm_hesitant": dose.hesitant, "llm_blended": dose.blended}
        write_json(folder / "measured.json", {**measured, **read})
    pretrain_missing(tmp_path, doses, pretrain=1.0)
    assert "tiny.pretrain" not in capsys.readouterr().out
    with pytest.raises(UserError, match="with share 1, and 0.5 is asked for; name another"):
        pretrain_missing(tmp_path, doses, pretrain=0.5)
    shutil.copy(ROOT / "tiny/measured.json", doses[0].folder(tmp_path))
    with pytest.raises(UserError, match="with hesitant 0.3, and 0 is asked for; name another"):
        pretrain_missing(tmp_path, doses, pretrain=1.0)

    rows = [row_of_dose(tmp_path, dose) for dose in doses]
    assert set(rows[0]["systems"]) == {"cascade", "mtbi", "asr"}
    cells = cells_of_doses(rows)["asr, unseen tasks"]
    assert [cell["score"] for cell in cells] == [gains["asr", "gain, unseen tasks"]] * 3
    write_doses(tmp_path, rows)
    said = capsys.readouterr().out
    assert f"| `mtbi` | {percent(gains['mtbi', 'gain, seen'])} |" in said
    assert "| clean text |" in said and "| 60% hesitant, 0% of these blended |" in said
    claim = next(c for c in report["claims"] if c["measure"] == "gain, unseen tasks" and c["n"])
    low, high = claim["ci95"]
    measured = f"{100 * claim['score']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    row = f"| mtbi − asr | gain, unseen tasks | {measured} | **{claim['verdict']}** |"
    assert said.count(row) == 3
    assert read_json(tmp_path / "dose.json", "doses")["doses"] == rows
    assert (tmp_path / "dose.png").stat().st_size > 10_000
