"""From the table of answers to numbers: means, intervals, metrics over whole tasks (pandas)."""

from fnmatch import fnmatch

import numpy as np
import pandas

from data import as_compared, normalize
from eval import CELLS, DIALOGUES, word_error_rate

LINES = ("text", "copy", "cascade")  # the systems that every recipe is held against
AT = "-at-"  # mtbi-at-250 is mtbi as it was after 250 steps
RESAMPLES = 1000  # bootstrap resamples of the utterances
# 97.5% quantile of Student's t, by the number of runs; beyond twenty the last one
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
STUDENT |= {11: 2.23, 12: 2.20, 13: 2.18, 14: 2.16, 15: 2.14, 16: 2.13, 17: 2.12, 18: 2.11}
STUDENT |= {19: 2.10, 20: 2.09}
NORMAL = 1.96  # that of the normal distribution

# the kinds of conversations of two turns: the first turn was spoken, or typed
ABOUT_SPEECH, AFTER_TEXT = ["speech_then_text_question", "two_speeches"], ["text_then_speech"]

ROUNDING = 1e-9  # numbers that differ by less are one

# What is measured: the column of the table, which rows, and which cells.
MEASURES = {}
for what in ("gain", "score", "exact"):
    MEASURES |= {
        f"{what}, seen": (what, "questions", ["seen"]),
        f"{what}, unseen prompts": (what, "questions", ["unseen_prompt"]),
        f"{what}, unseen tasks": (what, "questions", ["unseen_task"]),
        f"{what}, everything unseen": (what, "questions", ["unseen_prompt", "unseen_task"]),
        f"{what}, all": (what, "questions", CELLS),
    }
MEASURES |= {
    "drop from seen to unseen prompts": ("drop", "questions", ["seen", "unseen_prompt"]),
    "word accuracy on one wording": ("word_accuracy", "repeats", ["seen"]),
    "conversations of two turns": ("score", "dialogues", DIALOGUES),
    "gain, a second turn about speech": ("gain", "dialogues", ABOUT_SPEECH),
    "gain, a second turn after text": ("gain", "dialogues", AFTER_TEXT),
    "ignored instruction": ("ignored_instruction", "questions", CELLS),
    "anchor rate": ("anchored", "questions", CELLS),
    "behavior gap": ("behavior_gap", "questions", CELLS),
    "attention on instruction": ("attention_on_instruction", "questions", CELLS),
    "text retention": ("score", "text", CELLS),
}
for kind in DIALOGUES:  # each by itself, by its own name
    MEASURES[kind] = ("score", "dialogues", [kind])
NAMES = {"seen": "seen", "unseen_prompt": "unseen prompts", "unseen_task": "unseen tasks"}
QUESTION = ["utterance", "transcript", "task", "prompt"]  # the columns that say what was asked
TASK = "task "  # "task NAME" is the score of one task


def rows_of(answers, measure, tasks=()):
    """What a measure is about: a table of the questions with columns value and weight, in order.

    What is measured is the weighted mean of the values. tasks: of these alone, names or patterns
    like translate*; none: of all.
    """
    if measure.startswith(TASK):
        column, part = "score", "questions"
        chosen = answers["task"] == measure.removeprefix(TASK)
    else:
        column, part, cells = MEASURES[measure]
        chosen = answers["cell"].isin(cells)
    if tasks:
        chosen &= answers["task"].map(lambda name: any(fnmatch(name, task) for task in tasks))
    rows = answers[chosen & (answers["set"] == part)].assign(weight=1.0)
    if column == "gain":
        rows = with_gain(rows)
    if column == "drop":
        rows = with_drop(rows)
    if column == "word_accuracy":
        rows = with_word_accuracy(rows)
    rows = rows[[*QUESTION, column, "weight"]].rename(columns={column: "value"})
    return rows.dropna().astype({"value": float})


def with_gain(rows):
    """The rows with a column `gain` and weights, by which its mean is (score - copy) / (1 - copy).

    That is the share of the way from the bottom line, which answers every question with the
    transcript, to the top line; score and copy are means over the same questions. So each question
    weighs as much as its way is long. One that the transcript answers, as those of *repeat* are,
    has no way to go, and is left out.
    """
    rows = rows[rows["copy"] < 1.0]
    way = 1.0 - rows["copy"]
    return rows.assign(gain=(rows["score"] - rows["copy"]) / way, weight=way)


def with_drop(rows):
    """The rows with a column `drop`, whose mean is that of seen prompts minus that of unseen ones.

    Task by task, so that a hard task with more prompts of one sort is not taken for a drop; a task
    without both sorts has none, and is left out. A row's value is its task's whole drop and what
    the row adds to it, as its score differs from its cell's mean: drawing more rows of one cell
    than of the other then adds no noise.
    """
    parts = [rows[:0].assign(drop=0.0)]
    for _, asked in rows.groupby("task", sort=False):
        means = asked.groupby("cell")["score"].mean()
        if len(means) == 2:
            counts = asked["cell"].value_counts()
            share = {"seen": len(asked) / counts["seen"]}
            share["unseen_prompt"] = -len(asked) / counts["unseen_prompt"]
            whole = means["seen"] - means["unseen_prompt"]
            adds = asked["cell"].map(share) * (asked["score"] - asked["cell"].map(means))
            parts.append(asked.assign(drop=whole + adds))
    return pandas.concat(parts)


def with_word_accuracy(rows):
    """The rows with a column `word_accuracy`: 1 - WER against the true transcript."""
    accuracy = []
    for said, answer in zip(rows["transcript"], rows["answer"]):
        accuracy.append(1.0 - min(1.0, word_error_rate(said, answer)))
    return rows.assign(word_accuracy=accuracy)


def weighted_mean(rows):
    return float(np.average(rows["value"], weights=rows["weight"]))


def bootstrap(groups, rng):
    """RESAMPLES means of the means of some runs' rows, each over utterances drawn anew.

    Answers about one utterance are no independent observations, so utterances are drawn, with
    replacement; and one that several runs were asked about is drawn in all of them or in none.
    """
    keys = [utterances_of(rows) for rows in groups]
    known = pandas.Index(pandas.concat(keys).unique())  # the utterances, U
    times = np.zeros((RESAMPLES, len(known)))  # how often each is drawn
    for i, picks in enumerate(rng.integers(0, len(known), times.shape)):
        times[i] = np.bincount(picks, minlength=len(known))
    sums, totals = np.zeros((2, len(known), len(groups)))  # (U, runs) each
    for run, (rows, key) in enumerate(zip(groups, keys)):
        ids, weights = known.get_indexer(key), rows["weight"].to_numpy()
        sums[:, run] = np.bincount(ids, rows["value"] * weights, len(known))
        totals[:, run] = np.bincount(ids, weights, len(known))
    drawn = times @ totals  # (RESAMPLES, runs)
    none = drawn == 0  # utterances of other runs alone
    means = np.where(none, np.nan, times @ sums / np.where(none, 1, drawn))
    return np.nanmean(means, axis=1)  # (RESAMPLES,)


def over_utterances(rows, seed=0):
    """{"score", "n", "ci95"} of one run: the mean, and its 95% bootstrap interval."""
    if not len(rows):
        return {"score": None, "n": 0, "ci95": [None, None]}
    resampled = bootstrap([rows], np.random.default_rng(seed))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {"score": weighted_mean(rows), "n": len(rows), "ci95": [float(low), float(high)]}


def over_runs(groups, seed=0):
    """{"score", "ci95", "n", "by_run"} of one table of rows a run.

    The mean of the runs' means. Its 95% interval is Student's t over them, for trainings differ,
    and so do the runs' utterances. Runs that are asked about the same recordings agree too well,
    and few may agree exactly by chance: then what a bootstrap over the utterances shows is added,
    as variances add.
    """
    groups = [rows for rows in groups if len(rows)]
    if not groups:
        return {"score": None, "ci95": [None, None], "n": 0, "by_run": []}
    n = len(groups)
    if n == 1:
        found = over_utterances(groups[0], seed)
        return {**found, "n": 1, "by_run": [found["score"]]}
    means = np.array([weighted_mean(rows) for rows in groups])  # (runs,)
    reach = STUDENT[min(n, 20)] * means.std(ddof=1) / n**0.5
    if share_utterances(groups) or reach < ROUNDING:
        resampled = bootstrap(groups, np.random.default_rng(seed))
        reach = np.hypot(reach, NORMAL * resampled.std())
    return {
        "score": float(means.mean()),
        "ci95": [float(means.mean() - reach), float(means.mean() + reach)],
        "n": n,
        "by_run": means.tolist(),
    }


def share_utterances(groups):
    """Were two runs asked about the same utterance?"""
    asked = [set(utterances_of(rows)) for rows in groups]
    return sum(map(len, asked)) > len(set().union(*asked))


def utterances_of(rows):
    """What each row was asked about."""
    return rows["utterance"] + "\n" + rows["transcript"]


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
        references = [as_compared(text) for text in asked["reference"]]
        found = [as_compared(text) for text in asked["answer"]]
        rows.append(
            {
                "task": task,
                "exact": sum(r == a for r, a in zip(references, found)) / len(asked),
                "wer": jiwer.wer(references, found) if all(references) else np.nan,
                "chrf": corpus_chrf(found, [references]).score / 100,
                # of the orders that the answers are long enough for
                "bleu": corpus_bleu(found, [references], use_effective_order=True).score / 100,
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


def is_whole(system):
    """Was it trained on all the speech, to its end?"""
    return "@" not in system and AT not in system


def mean_or_none(values):
    """The mean of numbers that are all there, or None."""
    values = list(values)
    return None if any(v is None for v in values) else float(np.mean(values))


NUMBERS = (
    "score",
    "copy",
    "exact",
    "wer",
    "chrf",
    "bleu",
    "ignored_instruction",
    "anchored",
    "behavior_gap",
    "attention_on_instruction",
    "attention_on_utterance",
)


def read_answers(path):
    """The table of answers of an answers.csv, the very same that was written.

    "None", "nan" and "007" are texts in it; a number that was not measured is NaN.
    """
    columns = pandas.read_csv(path, nrows=0).columns
    kinds = dict.fromkeys(columns, str)
    kinds |= dict.fromkeys(NUMBERS, float)
    holes = {name: [""] for name in NUMBERS}
    return pandas.read_csv(path, dtype=kinds, keep_default_na=False, na_values=holes)
