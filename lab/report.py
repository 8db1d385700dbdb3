"""What `bench` shows: answers.csv, report.json, report.md with its tables and plots."""

import csv
import json
import os
import platform
import random

import pandas
import torch
import transformers

from eval import CELLS, DIALOGUES
from lab import plots
from lab.mistakes import MISTAKES
from lab.statistics import NAMES, TASK, over_utterances, repeat_wer, rows_of, task_metrics
from support.files import fingerprint_of_file, read_json_if_whole, whole_file, write_json
from support.files import write_text
from support.logs import read_log
from support.processes import DEVICE, MAIN, first_process
from support.runs import fingerprint_of_training

REPORT = ("recipes", "samples", "meta")  # what report.json holds

TERMS = """*Score*: the mean over questions of what the task asks for, exact match, 1 - word error
rate (WER), or chrF, against the text LLM's own answer to the true transcript. So the top line,
`text`, has 100%. The bottom line, `copy`, answers every question with the transcript. *Gain*: the
share of the way from the bottom to the top line, (score - copy) / (1 - copy), over the same
questions; those that the transcript answers, as in *repeat*, are left out of it: their word error
rate is reported. *Seen* are the tasks and prompts that stage 2 may train on, *unseen prompts* other
prompts of these tasks, *unseen tasks* all prompts of tasks that no training saw; a recipe that
trains on a part of the tasks has not seen the others. *Repeat WER*: the word error rate of the task
*repeat* against the true transcripts. *Word accuracy on one wording*: 1 - WER of more utterances
that are only to be repeated, in the wording that a recipe of one prompt trains on. *Ignored
instruction*: answers that are the transcript, word for word, though another task was asked. *Anchor
rate*: of the questions about an utterance that is itself a question or a command, the answers that
do what the speech says. *Conversations*: two turns, of speech and text mixed, against the text
LLM's own answer to the same in text. *Text retention*: the score of the same questions about the
true transcript in text, after training; an LLM that is frozen answers as before. *Behavior gap*: KL
between the LLM's next-token distributions reading the transcript and hearing the speech, over its
own answer. *Attention*: share that the position which predicts the first token of the answer pays
to the instruction and to what stands for the utterance, mean over layers and heads; the rest falls
on the chat template."""


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def markdown_table(head, rows):
    """A table as markdown; head and rows are lists of texts."""
    lines = []
    for cells in (head, *rows):
        cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


def bullet_list(values):
    """A line as markdown for each entry of {name: value}."""
    return "\n".join(f"- {name}: {value}" for name, value in values.items())


# ---- from the answers to report.json ----


def summarize(answers):
    """A system's entry of report.json, from its rows of the table of answers."""

    def over(measure, among=answers):
        return over_utterances(rows_of(among, measure))

    questions = answers[answers["set"] == "questions"]
    tasks = questions["task"].unique()
    ignored = over("ignored instruction")
    kinds = {}
    for kind, rows in questions.groupby("kind", sort=False):
        if kind:
            kinds[kind] = {
                "cells": cells_of(rows),
                "repeat_wer": repeat_wer(rows),
                "ignored_instruction_rate": over("ignored instruction", rows)["score"],
            }
    return {
        "cells": cells_of(answers),
        "kinds": kinds,
        "mistakes": mistakes_of(questions),
        "anchor_rate": over("anchor rate"),
        "dialogues": {d: over(d) for d in DIALOGUES},
        "tasks": {task: over(TASK + task) for task in tasks},
        "metrics": without_nan(task_metrics(answers)).to_dict("index"),
        "repeat_wer": repeat_wer(answers),
        "word_accuracy": over("word accuracy on one wording"),
        "ignored_instruction_rate": ignored["score"],
        "ignored_instruction_ci95": ignored["ci95"],
        "behavior_gap": over("behavior gap"),
        "text_retention": over("text retention"),
    }


def cells_of(answers):
    """{cell: {"score", "gain", "exact", "n", "ci95"}}: the interval is that of the gain.

    n: the questions of the cell, those that the transcript answers among them.
    """
    cells = {}
    for cell, name in NAMES.items():
        gain = over_utterances(rows_of(answers, f"gain, {name}"))
        score = over_utterances(rows_of(answers, f"score, {name}"))
        exact = over_utterances(rows_of(answers, f"exact, {name}"))
        cells[cell] = {
            "score": score["score"],
            "gain": gain["score"],
            "exact": exact["score"],
            "n": score["n"],
            "ci95": gain["ci95"],
        }
    return cells


def mistakes_of(questions):
    """{one of MISTAKES: how many of the wrong answers that were looked into}."""
    counts = questions["mistake"].value_counts()
    return {mistake: int(counts.get(mistake, 0)) for mistake in MISTAKES}


def without_nan(table):
    """The table with None, which JSON has, for what could not be measured."""
    return table.astype(object).where(table.notna(), None)


@first_process
def write_table(path, table):
    """A table as CSV, which pandas and spreadsheets open."""
    with whole_file(path) as temporary:
        # in quotes, or a lone carriage return in an answer would end its row
        table.to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)


def write_report(measured):
    """answers.csv, the plots, report.md, and last report.json, which is returned."""
    folder, run = measured.bench.folder, measured.bench.run.folder
    answers = pandas.DataFrame(measured.rows)
    write_table(folder / "answers.csv", answers)
    logs = {name: read_log(run / name / "log.jsonl") for name in measured.bench.trained_with}
    recipes = {}
    for name, rows in answers.groupby("system", sort=False):
        training = logs[name][-1]["seconds"] if name in logs else 0
        recipes[name] = {
            **summarize(rows),
            "attention": measured.attention[name],
            "bench_seconds": measured.seconds[name],
            "seconds": round(measured.seconds[name] + training, 1),
        }
    report = {
        "recipes": recipes,
        "samples": draw_samples(answers, measured.bench.options.seed),
        "meta": {
            **describe_questions(answers, measured.bench.run.utterances),
            "task_splits": {task.name: task.split for task in measured.tasks.values()},
            "llm": measured.bench.run.options["llm"],
            "llm_is_4_bit": measured.llm_is_4_bit,
            "settings": as_json(measured.bench.settings),
            "answers": fingerprint_of_file(folder / "answers.csv"),
            "training": measured.bench.trained_with,
            **where_it_ran(),
        },
    }
    if MAIN:
        plots.of_bench(folder, report, logs)
    write_text(folder / "report.md", as_markdown(report))
    write_json(folder / "report.json", report)
    return report


def describe_questions(answers, trained_on):
    """How much was asked, and of whom."""
    one = answers[answers["system"] == answers["system"].iloc[0]]
    questions, dialogues = (one[one["set"] == which] for which in ("questions", "dialogues"))
    known = {u.speaker for u in trained_on if u.split == "train"}
    speakers = set(questions["speaker"]) - {""}
    return {
        "n_utterances": questions["utterance"].nunique(),
        "n_speakers": len(speakers),
        "n_unheard_speakers": len(speakers - known),
        "n_cases": len(questions),
        "n_dialogues": {kind: int((dialogues["cell"] == kind).sum()) for kind in DIALOGUES},
        "n_probes": int(questions["behavior_gap"].notna().sum()),
    }


def draw_samples(answers, seed, n=5):
    """n questions from all cells in turn, with every system's answer."""
    rng, samples = random.Random(f"samples-{seed}"), []
    questions = answers[answers["set"] == "questions"]
    by_system = dict(list(questions.groupby("system", sort=False)))
    first = next(iter(by_system.values()))
    for i in range(n):
        wanted = first["cell"] == CELLS[-1 - i % 3]
        places = [at for at, fits in enumerate(wanted) if fits] or list(range(len(first)))
        at = rng.choice(places)
        row = first.iloc[at]
        samples.append(
            {
                "prompt": row["prompt"],
                "task": row["task"],
                "cell": row["cell"],
                "audio": os.path.normpath(row["audio"]),
                "transcript": row["transcript"],
                "answers": {name: rows["answer"].iloc[at] for name, rows in by_system.items()},
            }
        )
    return samples


def where_it_ran():
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {DEVICE}"
    return {
        "machine": machine,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def as_json(value):
    """The value as it is read again from JSON: tuples are lists, keys are texts."""
    return json.loads(json.dumps(value))


def earlier_report(bench):
    """The report of an earlier `bench` that was asked for the very same, or None."""
    path, answers = bench.folder / "report.json", bench.folder / "answers.csv"
    report = read_json_if_whole(path, *REPORT, instead="it is written anew")
    if not report or not can_be_shown(report):
        return None
    if report["meta"]["settings"] != as_json(bench.settings):
        return None
    for name in report["recipes"]:
        if not read_json_if_whole(bench.folder / "bench" / f"{name}.json", "fingerprint", "rows"):
            return None
    if not (bench.folder / "report.md").exists():
        return None
    if not answers.exists() or fingerprint_of_file(answers) != report["meta"]["answers"]:
        print(f"{answers}: is not the table that was written there; it is written anew")
        return None
    return report


def is_of(report, folder):
    """Whether it measured what is trained in a recipe's folder now, and not what was before."""
    settings = report["meta"].get("settings") or {}
    return (settings.get("trained") or {}).get(folder.name) == fingerprint_of_training(folder)


def can_be_shown(report):
    """Whether it holds all that report.md and a comparison take from it."""
    try:
        as_markdown(report)
        sum(entry["bench_seconds"] for entry in report["recipes"].values())
        return {"settings", "answers", "training"} <= set(report["meta"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return False


# ---- tables ----


def cell_table(report):
    """The table people look at first."""
    head = ["system", *(f"gain, {name}" for name in NAMES.values())]
    rows = []
    for name, entry in report["recipes"].items():
        row = [f"`{name}`"]
        for cell in entry["cells"].values():
            low, high = (percent(end, 0) for end in cell["ci95"])
            row.append(f"{percent(cell['gain'])} [{low}, {high}]")
        row += [percent(entry["repeat_wer"]), percent(entry["ignored_instruction_rate"])]
        rows.append(row)
    return markdown_table([*head, "repeat WER", "ignored instruction"], rows)


def score_table(report):
    """The scores that the gains are made of, and how many answers are exactly right."""
    head = ["system"]
    for name in NAMES.values():
        head += [f"score, {name}", "exact"]
    rows = []
    for name, entry in report["recipes"].items():
        row = [f"`{name}`"]
        for cell in entry["cells"].values():
            row += [percent(cell["score"]), percent(cell["exact"])]
        rows.append(row)
    return markdown_table(head, rows)


def kind_table(report):
    """The scores by the kind of utterance."""
    kinds = next(iter(report["recipes"].values()))["kinds"]
    if not kinds:
        return "The corpus names no kinds of utterances."
    rows = []
    for kind in kinds:
        for name, entry in report["recipes"].items():
            found = entry["kinds"][kind]
            scores = [cell["gain"] for cell in found["cells"].values()]
            scores += [found["repeat_wer"], found["ignored_instruction_rate"]]
            rows.append([kind, f"`{name}`", *map(percent, scores)])
    gains = [f"gain, {name}" for name in NAMES.values()]
    return markdown_table(["kind", "system", *gains, "repeat WER", "ignored instruction"], rows)


def mistake_table(counts, anchor_rates):
    """How wrong answers are wrong: shares of those whose utterance the system repeats.

    counts: {system: {one of MISTAKES: how many}}; anchor_rates: {system: share, or None}.
    """
    kinds = [mistake for mistake in MISTAKES if mistake != "misheard"]
    rows = []
    for name, found in counts.items():
        looked_into, misheard = sum(found.values()), found["misheard"]
        heard = looked_into - misheard
        shares = [percent(found[kind] / heard if heard else None, 0) for kind in kinds]
        anchored = percent(anchor_rates[name])
        rows.append([f"`{name}`", str(looked_into), str(misheard), *shares, anchored])
    return markdown_table(["system", "looked into", "misheard", *kinds, "anchor rate"], rows)


def explain_mistakes(most):
    """What the table shows, for people; most: wrong answers of a system that are looked into."""
    kinds = [f"*{kind}*, {about}" for kind, about in MISTAKES.items()]
    return (
        f"Up to {most} wrong answers of each system, looked into: {'; '.join(kinds)}. The shares "
        "are of those not misheard; a recipe that does not learn to repeat misheard everything, by "
        "this measure. The last column is of all questions about directives."
    )


def inside_table(report):
    """Beyond the cells: conversations of two turns, words, text retention, gap, attention."""
    head = ["system", *(d.replace("_", " ") for d in DIALOGUES)]
    head += ["word accuracy on one wording", "text retention", "behavior gap, nats/token"]
    head.append("attention on instruction / on speech")
    rows = []
    for name, entry in report["recipes"].items():
        gap, attention = entry["behavior_gap"]["score"], entry["attention"]
        shares = "–"
        if attention:
            means = [sum(by_layer) / len(by_layer) for by_layer in attention.values()]
            shares = " / ".join(percent(mean) for mean in means)
        row = [f"`{name}`", *(percent(entry["dialogues"][d]["score"]) for d in DIALOGUES)]
        row += [percent(entry[of]["score"]) for of in ("word_accuracy", "text_retention")]
        row.append("–" if gap is None else f"{gap:.3f}")
        rows.append([*row, shares])
    return markdown_table(head, rows)


def metric_table(report):
    """Every metric of every task."""
    metrics, rows = ("exact", "wer", "chrf", "bleu"), []
    for task in report["meta"]["task_splits"]:
        for name, entry in report["recipes"].items():
            if task in entry["metrics"]:
                values = [percent(entry["metrics"][task][metric]) for metric in metrics]
                rows.append([task, f"`{name}`", *values])
    return markdown_table(["task", "system", "exact", "WER", "chrF", "BLEU"], rows)


def task_table(report):
    recipes, rows = report["recipes"], []
    asked = next(iter(recipes.values()))["tasks"]
    for split, seen in (("train", "seen"), ("unseen", "unseen")):
        for task, its_split in report["meta"]["task_splits"].items():
            if its_split == split and task in asked:
                scores = [percent(entry["tasks"][task]["score"]) for entry in recipes.values()]
                rows.append([f"{task} ({seen})", *scores])
    return markdown_table(["task", *(f"`{name}`" for name in recipes)], rows)


# ---- report.md ----


def sample_text(sample):
    """One question with every system's answer, as markdown."""
    where = sample["cell"].replace("_", " ")
    lines = [f"- **{sample['prompt']}** ({where})"]
    lines.append(f"  speech: *{sample['transcript']}* ({sample['audio']})")
    for name, answer in sample["answers"].items():
        lines.append(f"  `{name}`: {' '.join(answer.split())}")
    return "  \n".join(lines)


def as_markdown(report):
    """report.md, from the gains to how it was made."""
    parts = [gains_part(report), wrong_answers_part(report), inside_part(report)]
    return "\n".join([*parts, details_part(report)])


def gains_part(report):
    """What was asked, and how good the answers are: all together, and by the kind of utterance."""
    meta = report["meta"]
    return f"""# Benchmark of {", ".join(report["recipes"])}

{meta["n_utterances"]} held-out utterances of {meta["n_speakers"]} speakers, \
{meta["n_unheard_speakers"]} of them never heard in training; {meta["n_cases"]} questions. In \
brackets: 95% bootstrap interval over utterances. Every answer is a row of answers.csv.

{TERMS}

{cell_table(report)}

![gain by cell](cells.png)

{score_table(report)}

## Kinds of utterances

{kind_table(report)}
"""


def wrong_answers_part(report):
    """How wrong answers are wrong, and in which tasks there are how many."""
    mistakes = {name: entry["mistakes"] for name, entry in report["recipes"].items()}
    anchor_rates = {n: entry["anchor_rate"]["score"] for n, entry in report["recipes"].items()}
    return f"""## Mistakes

{explain_mistakes(report["meta"]["settings"]["mistakes"])}

{mistake_table(mistakes, anchor_rates)}

## Tasks

{task_table(report)}

![task × system](tasks.png)
"""


def inside_part(report):
    """Conversations, what the LLM keeps of its text skills and looks at, and the loss."""
    meta = report["meta"]
    dialogues = ", ".join(f"{n} {kind}" for kind, n in meta["n_dialogues"].items())
    return f"""## Conversations, text, and what happens inside

Conversations of two turns: {dialogues}. Behavior gap and attention on {meta["n_probes"]} of the \
questions.

{inside_table(report)}

![attention by layer](attention.png)

## Training

![loss](loss.png)
"""


def details_part(report):
    """Every metric, five conversations, and every setting."""
    samples = "\n".join(sample_text(sample) for sample in report["samples"])
    made = {key: value for key, value in report["meta"].items() if key != "task_splits"}
    return f"""## All metrics

{metric_table(report)}

## Five conversations

{samples}

## How this was made

{bullet_list(made)}
"""


def show(report, folder):
    print("\nGain, % of the way from copying to the text LLM [95% interval over utterances]\n")
    print(cell_table(report) + "\n")
    for sample in report["samples"]:
        where = sample["cell"].replace("_", " ")
        print(f"{sample['prompt']}  [{sample['transcript']}]  ({where}; {sample['audio']})")
        for name, answer in sample["answers"].items():
            print(f"    {name:<8} {' '.join(answer.split())}")
    print(f"\nreport: {folder / 'report.md'} (and report.json, answers.csv, and the plots in it)")
