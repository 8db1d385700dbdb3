"""From the table of answers to numbers: means, intervals, metrics over whole tasks (pandas)."""

import numpy as np
import pandas

from data import normalize
from eval import DIALOGUES, QUADRANTS

RESAMPLES = 1000  # bootstrap resamples of the utterances
# 97.5% quantile of Student's t, by the number of runs
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

# What is measured: the column of the table, which rows, and which cells.
MEASURES = {
    "score, seen tasks and prompts": ("score", "questions", QUADRANTS[:1]),
    "score, unseen prompts": ("score", "questions", QUADRANTS[1:2]),
    "score, unseen tasks": ("score", "questions", QUADRANTS[2:]),
    "score, everything but training's own cells": ("score", "questions", QUADRANTS[1:]),
    "conversations of two turns": ("score", "dialogues", DIALOGUES),
    "ignored instruction": ("ignored_instruction", "questions", QUADRANTS),
    "behavior gap": ("behavior_gap", "questions", QUADRANTS),
    "attention on instruction": ("attention_on_instruction", "questions", QUADRANTS),
    "text retention": ("score", "text", QUADRANTS),
}
# every cell by itself, by its own name
for quadrant in QUADRANTS:
    MEASURES[quadrant] = ("score", "questions", [quadrant])
for kind in DIALOGUES:
    MEASURES[kind] = ("score", "dialogues", [kind])
TASK = "task "  # "task NAME" is the score of one task


def rows_of(answers, measure):
    """What a measure is about: a table with the columns utterance and value, in order."""
    if measure.startswith(TASK):
        column, part = "score", "questions"
        chosen = answers["task"] == measure.removeprefix(TASK)
    else:
        column, part, cells = MEASURES[measure]
        chosen = answers["cell"].isin(cells)
    rows = answers[chosen & (answers["set"] == part)]
    rows = rows[["utterance", column]].rename(columns={column: "value"})
    return rows.dropna().astype({"value": float})


def bootstrap(values, utterances, rng):
    """RESAMPLES means, each over as many utterances, drawn with replacement.

    Answers about one utterance are no independent observations.
    """
    ids = np.unique(utterances, return_inverse=True)[1]
    sums, counts = np.bincount(ids, np.asarray(values)), np.bincount(ids)  # (utterances,)
    picks = rng.integers(0, len(sums), (RESAMPLES, len(sums)))
    return sums[picks].sum(1) / counts[picks].sum(1)  # (RESAMPLES,)


def over_utterances(rows, seed=0):
    """{"score", "n", "ci95"} of one run: the mean, and its 95% bootstrap interval."""
    if not len(rows):
        return {"score": None, "n": 0, "ci95": [None, None]}
    means = bootstrap(rows["value"], rows["utterance"], np.random.default_rng(seed))
    low, high = np.percentile(means, [2.5, 97.5])
    return {"score": float(rows["value"].mean()), "n": len(rows), "ci95": [float(low), float(high)]}


def over_runs(groups, seed=0):
    """{"score", "ci95", "n", "by_run"} of one table of rows a run.

    The mean of the runs' means, and an interval in which the differences between runs are widened
    as Student's t does, because few runs show too little of them.
    """
    groups = [rows for rows in groups if len(rows)]
    if not groups:
        return {"score": None, "ci95": [None, None], "n": 0, "by_run": []}
    rng, n = np.random.default_rng(seed), len(groups)
    means = np.array([rows["value"].mean() for rows in groups])  # (runs,)
    resampled = [bootstrap(rows["value"], rows["utterance"], rng) for rows in groups]
    within = np.array(resampled) - means[:, None]  # (runs, RESAMPLES)
    picks = rng.integers(0, n, (n, RESAMPLES))
    between = (means - means.mean())[picks].mean(0)  # (RESAMPLES,)
    wider = STUDENT.get(n, 1.96) / 1.96 * (n / (n - 1)) ** 0.5 if n > 1 else 0.0
    spread = means.mean() + wider * between + within.mean(0)
    low, high = np.percentile(spread, [2.5, 97.5])
    return {
        "score": float(means.mean()),
        "ci95": [float(low), float(high)],
        "n": n,
        "by_run": means.tolist(),
    }


def task_metrics(answers):
    """A table with a row for each task: exact, wer, chrf, bleu (sacrebleu, jiwer).

    Every metric of every task over all its answers, whichever its score is made of; NaN where a
    reference has no words, so that there is no word error rate.
    """
    import jiwer
    from sacrebleu import corpus_bleu, corpus_chrf

    rows = []
    questions = answers[answers["set"] == "questions"]
    for task, asked in questions.groupby("task", sort=False):
        references = [normalize(text) or text for text in asked["reference"]]
        found = [normalize(text) or text for text in asked["answer"]]
        rows.append(
            {
                "task": task,
                "exact": sum(r == a for r, a in zip(references, found)) / len(asked),
                "wer": jiwer.wer(references, found) if all(references) else np.nan,
                "chrf": corpus_chrf(found, [references]).score / 100,
                "bleu": corpus_bleu(found, [references]).score / 100,
            }
        )
    return pandas.DataFrame(rows).set_index("task")


def repeat_wer(answers):
    """Word error rate of the task "repeat" against the true transcripts, over all its words.

    None if it was not asked.
    """
    import jiwer

    rows = answers[(answers["set"] == "questions") & (answers["task"] == "repeat")]
    said = [normalize(text) for text in rows["transcript"]]
    repeated = [normalize(text) for text in rows["answer"]]
    pairs = [(s, r) for s, r in zip(said, repeated) if s]
    if not pairs:
        return None
    return jiwer.wer([s for s, _ in pairs], [r for _, r in pairs])


def mean_or_none(values):
    """The mean of numbers that are all there, or None."""
    values = list(values)
    return None if any(v is None for v in values) else float(np.mean(values))


NUMBERS = (
    "score",
    "exact",
    "wer",
    "chrf",
    "bleu",
    "ignored_instruction",
    "behavior_gap",
    "attention_on_instruction",
    "attention_on_utterance",
)
SWITCHES = ("task_seen", "prompt_seen")


def read_answers(path):
    """The table of answers of an answers.csv, the very same that was written.

    "None", "nan" and "007" are texts in it; a number that was not measured is NaN.
    """
    columns = pandas.read_csv(path, nrows=0).columns
    kinds = dict.fromkeys(columns, str)
    kinds |= dict.fromkeys(NUMBERS, float)
    kinds |= dict.fromkeys(SWITCHES, bool)
    holes = {name: [""] for name in NUMBERS}
    return pandas.read_csv(path, dtype=kinds, keep_default_na=False, na_values=holes)
