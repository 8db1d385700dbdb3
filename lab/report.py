"""What `bench` shows: answers.csv, report.json, report.md with its tables and plots."""

import json
import os
import platform
import random

import pandas
import torch
import transformers

from eval import DIALOGUES, QUADRANTS
from lab import plots
from lab.statistics import TASK, over_utterances, repeat_wer, rows_of, task_metrics
from support.files import fingerprint_of_file, read_json_if_whole, whole_file, write_json
from support.files import write_text
from support.logs import read_log
from support.processes import DEVICE, MAIN, first_process

REPORT = ("recipes", "samples", "meta")  # what report.json holds

TERMS = """*Score*: the mean over questions of what the task asks for, exact match, 1 - word error
rate (WER), or chrF, against the text LLM's own answer to the true transcript. So it is a share of
the top line, `text`, which has 100%. *Seen* are the tasks and prompts that stage 2 may train on; a
recipe that trains on a part of these tasks has not seen the others. *Repeat WER*: the word error
rate of the task *repeat* against the true transcripts. *Ignored instruction*: answers that are the
transcript, though another task was asked. *Conversations*: two turns, of speech and text mixed,
against the text LLM's own answer to the same in text. *Text retention*: the score of the same
questions about the true transcript in text, after training; an LLM that is frozen answers as
before. *Behavior gap*: KL between the LLM's next-token distributions reading the transcript and
hearing the speech, over its own answer. *Attention*: share that the positions which predict the
answer pay to the instruction and to what stands for the utterance, mean over layers and heads; the
rest falls on the chat template and the answer."""


def quadrant_names(between):
    """The quadrants for people: "seen task × seen prompt", …; `between` stands after the task."""
    return [q.replace("_task_", f" task{between}").replace("_prompt", " prompt") for q in QUADRANTS]


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def markdown_table(head, rows):
    """A table as markdown; head and rows are lists of texts."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines)


# ---- from the answers to report.json ----


def summarize(answers):
    """A system's entry of report.json, from its rows of the table of answers."""

    def over(measure):
        return over_utterances(rows_of(answers, measure))

    tasks = answers[answers["set"] == "questions"]["task"].unique()
    ignored = over("ignored instruction")
    quadrants = {q: over(q) for q in QUADRANTS}
    for cell in quadrants.values():
        cell["share_of_text"] = cell["score"]  # the text LLM is its own reference
    return {
        "quadrants": quadrants,
        "dialogues": {d: over(d) for d in DIALOGUES},
        "tasks": {task: over(TASK + task) for task in tasks},
        "metrics": without_nan(task_metrics(answers)).to_dict("index"),
        "repeat_wer": repeat_wer(answers),
        "ignored_instruction_rate": ignored["score"],
        "ignored_instruction_ci95": ignored["ci95"],
        "behavior_gap": over("behavior gap"),
        "text_retention": over("text retention"),
    }


def without_nan(table):
    """The table with None, which JSON has, for what could not be measured."""
    return table.astype(object).where(table.notna(), None)


@first_process
def write_table(path, table):
    """A table as CSV, which pandas and spreadsheets open."""
    with whole_file(path) as temporary:
        table.to_csv(temporary, index=False)


def write_report(measured):
    """answers.csv, the plots, report.md, and last report.json, which is returned."""
    folder, run = measured.bench.folder, measured.bench.run.folder
    answers = pandas.DataFrame(measured.rows)
    write_table(folder / "answers.csv", answers)
    logs = {name: read_log(run / name / "log.jsonl") for name in measured.bench.trained}
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
            "training": measured.bench.trained,
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
    questions = one[one["set"] == "questions"]
    known = {u.speaker for u in trained_on if u.split == "train"}
    speakers = set(questions["speaker"])
    return {
        "n_utterances": questions["utterance"].nunique(),
        "n_speakers": len(speakers),
        "n_unheard_speakers": len(speakers - known - {""}),
        "n_cases": len(questions),
        "n_dialogues": int((one["set"] == "dialogues").sum()) // len(DIALOGUES),
        "n_probes": int(questions["behavior_gap"].notna().sum()),
    }


def draw_samples(answers, seed, n=5):
    """n questions from all quadrants in turn, with every system's answer."""
    rng, samples = random.Random(f"samples-{seed}"), []
    questions = answers[answers["set"] == "questions"]
    by_system = dict(list(questions.groupby("system", sort=False)))
    first = next(iter(by_system.values()))
    for i in range(n):
        wanted = first["cell"] == QUADRANTS[(3 - i) % 4]
        places = [at for at, fits in enumerate(wanted) if fits] or list(range(len(first)))
        at = rng.choice(places)
        row = first.iloc[at]
        samples.append(
            {
                "prompt": row["prompt"],
                "task": row["task"],
                "quadrant": row["cell"],
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
    if not answers.exists() or fingerprint_of_file(answers) != report["meta"]["answers"]:
        print(f"{answers}: is not the table that was written there; it is written anew")
        return None
    return report


def can_be_shown(report):
    """Whether it holds all that report.md and a comparison take from it."""
    try:
        as_markdown(report)
        sum(entry["bench_seconds"] for entry in report["recipes"].values())
        return {"settings", "answers", "training"} <= set(report["meta"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return False


# ---- tables ----


def quadrant_table(report):
    """The table people look at first."""
    head = ["system", *quadrant_names(" × "), "repeat WER", "ignored instruction"]
    rows = []
    for name, entry in report["recipes"].items():
        row = [f"`{name}`"]
        for cell in entry["quadrants"].values():
            low, high = (percent(end, 0) for end in cell["ci95"])
            row.append(f"{percent(cell['score'])} [{low}, {high}]")
        row += [percent(entry["repeat_wer"]), percent(entry["ignored_instruction_rate"])]
        rows.append(row)
    return markdown_table(head, rows)


def inside_table(report):
    """Beyond the quadrants: conversations of two turns, text retention, gap, attention."""
    head = ["system", *(d.replace("_", " ") for d in DIALOGUES)]
    head += ["text retention", "behavior gap, nats/token", "attention on instruction / on speech"]
    rows = []
    for name, entry in report["recipes"].items():
        gap, attention = entry["behavior_gap"]["score"], entry["attention"]
        shares = "–"
        if attention:
            means = [sum(by_layer) / len(by_layer) for by_layer in attention.values()]
            shares = " / ".join(percent(mean) for mean in means)
        row = [f"`{name}`", *(percent(entry["dialogues"][d]["score"]) for d in DIALOGUES)]
        row += [percent(entry["text_retention"]["score"]), "–" if gap is None else f"{gap:.3f}"]
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
    where = sample["quadrant"].replace("_", " ")
    lines = [f"- **{sample['prompt']}** ({where})"]
    lines.append(f"  speech: *{sample['transcript']}* ({sample['audio']})")
    for name, answer in sample["answers"].items():
        lines.append(f"  `{name}`: {' '.join(answer.split())}")
    return "  \n".join(lines)


def as_markdown(report):
    meta = report["meta"]
    samples = "\n".join(sample_text(sample) for sample in report["samples"])
    made = "\n".join(f"- {key}: {value}" for key, value in meta.items() if key != "task_splits")
    return f"""# Benchmark of {", ".join(report["recipes"])}

{meta["n_utterances"]} held-out utterances of {meta["n_speakers"]} speakers, \
{meta["n_unheard_speakers"]} of them never heard in training; {meta["n_cases"]} questions. In \
brackets: 95% bootstrap interval over utterances. Every answer is a row of answers.csv.

{TERMS}

{quadrant_table(report)}

![scores by quadrant](quadrants.png)

## Tasks

{task_table(report)}

![task × system](tasks.png)

## Conversations, text, and what happens inside

Conversations of two turns: {meta["n_dialogues"]} of each kind. Behavior gap and attention on \
{meta["n_probes"]} of the questions.

{inside_table(report)}

![attention by layer](attention.png)

## Training

![loss](loss.png)

## All metrics

{metric_table(report)}

## Five conversations

{samples}

## How this was made

{made}
"""


def show(report, folder):
    print("\nScore, % of the text LLM's own answers [95% interval over utterances]\n")
    print(quadrant_table(report) + "\n")
    for sample in report["samples"]:
        where = sample["quadrant"].replace("_", " ")
        print(f"{sample['prompt']}  [{sample['transcript']}]  ({where}; {sample['audio']})")
        for name, answer in sample["answers"].items():
            print(f"    {name:<8} {' '.join(answer.split())}")
    print(f"\nreport: {folder / 'report.md'} (and report.json, answers.csv, and the plots in it)")
