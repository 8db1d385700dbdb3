"""What `bench` and `info` show: tables and report.md; plots.py draws what is in it."""

import os
import platform
import random

import torch
import transformers

import plots
from eval import DIALOGUES, QUADRANTS, quadrant_names, summary
from files import UserError, read_config, read_json, read_json_if_whole, whole_file, write_json, write_jsonl
from parallel import DEVICE
from train import read_log

TERMS = """*Score*: the mean over questions of what the task asks for, exact match, 1 - word error rate (WER), or chrF, against the text LLM's own answer to
the true transcript. So it is a share of the top line, `text`, which has 100%. *Seen* are the tasks and prompts that stage 2 may train on; a recipe that
trains on a part of these tasks has not seen the others. *Repeat WER*: the word error rate of the task *repeat* against the true transcripts. *Ignored
instruction*: answers that are the transcript, though another task was asked. *Conversations*: two turns, of speech and text mixed, against the text LLM's own
answer to the same in text. *Text retention*: the score of the same questions about the true transcript in text, after training; an LLM that is frozen answers
as before. *Behavior gap*: KL between the LLM's next-token distributions reading the transcript and hearing the speech, over its own answer. *Attention*:
share that the positions which predict the answer pay to the instruction and to what stands for the utterance, mean over layers and heads; the rest falls on
the chat template and the answer."""


def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def quadrant_table(report):
    """The table people look at first, as markdown."""
    names = quadrant_names(" × ")
    lines = ["| system | " + " | ".join(names) + " | repeat WER | ignored instruction |", "|---|" + "---|" * (len(names) + 2)]
    for name, entry in report["recipes"].items():
        cells = [f"{percent(c['score'])} [{percent(c['ci95'][0], 0)}, {percent(c['ci95'][1], 0)}]" for c in entry["quadrants"].values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {percent(entry['repeat_wer'])} | {percent(entry['ignored_instruction_rate'])} |")
    return "\n".join(lines)


def inside_table(report):
    """Beyond the quadrants: conversations of two turns, text retention, behavior gap, attention."""
    names = [d.replace("_", " ") for d in DIALOGUES]
    lines = ["| system | " + " | ".join(names) + " | text retention | behavior gap, nats/token | attention on instruction / on speech |", "|---|" + "---|" * 6]
    for name, row in report["recipes"].items():
        gap, attention = row["behavior_gap"]["score"], row["attention"]
        shares = " / ".join(percent(sum(attention[kind]) / len(attention[kind])) for kind in ("instruction", "utterance")) if attention else "–"
        lines.append(f"| `{name}` | " + " | ".join(percent(row["dialogues"][d]["score"]) for d in DIALOGUES) +
                     f" | {percent(row['text_retention']['score'])} | {'–' if gap is None else f'{gap:.3f}'} | {shares} |")
    return "\n".join(lines)


def metric_table(report):
    """Every metric of every task."""
    lines = ["| task | system | exact | WER | chrF | BLEU |", "|---|---|---|---|---|---|"]
    for task in report["meta"]["task_splits"]:
        lines += [f"| {task} | `{name}` | " + " | ".join(percent(row["metrics"][task][metric]) for metric in ("exact", "wer", "chrf", "bleu")) + " |"
                  for name, row in report["recipes"].items() if task in row["metrics"]]
    return "\n".join(lines)


def task_table(report):
    recipes, splits = report["recipes"], report["meta"]["task_splits"]
    lines = ["| task | " + " | ".join(f"`{name}`" for name in recipes) + " |", "|---|" + "---|" * len(recipes)]
    for split in ("train", "unseen"):
        lines += [f"| {task} ({'seen' if split == 'train' else 'unseen'}) | " + " | ".join(percent(r["tasks"][task]["score"]) for r in recipes.values()) + " |"
                  for task in splits if splits[task] == split and task in next(iter(recipes.values()))["tasks"]]
    return "\n".join(lines)


def write_markdown(path, report):
    meta = report["meta"]
    samples = "\n".join(f"- **{s['prompt']}** ({s['quadrant'].replace('_', ' ')})  \n  speech: *{s['transcript']}* ({s['audio']})  \n" + "  \n".join(
        f"  `{name}`: {' '.join(answer.split())}" for name, answer in s["answers"].items()) for s in report["samples"])
    text = f"""# Benchmark of {', '.join(report['recipes'])}

{meta['n_utterances']} held-out utterances of {meta['n_speakers']} speakers, {meta['n_unheard_speakers']} of them never heard in training;
{meta['n_cases']} questions. In brackets: 95% bootstrap interval over utterances.

{TERMS}

{quadrant_table(report)}

![scores by quadrant](quadrants.png)

## Tasks

{task_table(report)}

![task × system](tasks.png)

## Conversations, text, and what happens inside

Conversations of two turns: {meta['n_dialogues']} of each kind. Behavior gap and attention on {meta['n_probes']} of the questions.

{inside_table(report)}

![attention by layer](attention.png)

## Training

![loss](loss.png)

## All metrics

{metric_table(report)}

## Five conversations

{samples}

## How this was made

{chr(10).join(f'- {key}: {value}' for key, value in meta.items() if key != 'task_splits')}
"""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def where_it_ran():
    return {"machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores, {DEVICE}", "python": platform.python_version(),
            "torch": torch.__version__, "transformers": transformers.__version__}


def describe_cases(questions, heard):
    """How much was asked, of a Bench; heard: the speakers of the training."""
    speakers = {c.utterance.speaker for c in questions.cases}
    return {"n_utterances": len({c.utterance.id for c in questions.cases}), "n_speakers": len(speakers), "n_unheard_speakers": len(speakers - heard - {""}),
            "n_cases": len(questions.cases), "n_dialogues": len(questions.dialogues) // len(DIALOGUES), "n_probes": len(questions.probes)}


def write_report(folder, questions, records, meta, seed):
    """answers.jsonl, the plots, report.md, and last report.json, which is returned."""
    cases, answers = questions.cases, {name: record["answers"] for name, record in records.items()}
    logs = {name: read_log(folder / name / "log.jsonl") for name in meta["training"]}
    report = {"recipes": {name: summary(record, logs[name][-1]["seconds"] if name in logs else 0) for name, record in records.items()},
              "samples": draw_samples(cases, answers, seed), "meta": meta}
    write_jsonl(folder / "answers.jsonl", [{"utterance": c.utterance.id, "task": c.task.name, "prompt": c.prompt, "quadrant": c.quadrant,
                                            "answers": {name: rows[i] for name, rows in answers.items()}} for i, c in enumerate(cases)])
    plots.of_bench(folder, report, logs)
    write_markdown(folder / "report.md", report)
    write_json(folder / "report.json", report)
    return report


def show(report, run):
    print("\nScore, % of the text LLM's own answers [95% interval over utterances]\n\n" + quadrant_table(report) + "\n")
    for s in report["samples"]:
        print(f"{s['prompt']}  [{s['transcript']}]  ({s['quadrant'].replace('_', ' ')}; {s['audio']})")
        print("\n".join(f"    {name:<8} {' '.join(answer.split())}" for name, answer in s["answers"].items()))
    print(f"\nreport: {run / 'report.md'} (and report.json, answers.jsonl, and the plots in it)")


def earlier_report(run, asked):
    """The report of an earlier `bench` that was asked for the very same, or None."""
    report = read_json_if_whole(run / "report.json", "recipes", "samples", "meta")
    if not report or not isinstance(report["meta"], dict) or report["meta"].get("asked") != asked:
        return None
    return report if all(read_json_if_whole(run / "bench" / f"{name}.json", "key", "values") for name in report["recipes"]) else None


def describe_run(run, settings, data, utterances, behaviors, recipes):
    """Lines about a run folder. recipes: {name: folder} of those whose training was begun."""
    report = read_json(run / "report.json", "recipes", "meta")["recipes"] if (run / "report.json").exists() else {}
    bits = {4: "4 bits (NF4)", 8: "8 bits", 16: "not quantized"}.get(settings["bits"], "")
    yield f"run        {run}, seed {settings['seed']}\nLLM        {settings['llm']}, {bits}\ndata       {data.resolve()}"
    for split in ("train", "test"):
        rows = [u for u in utterances if u.split == split]
        yield (f"  {split:<8} {len(rows)} utterances, {sum(u.duration for u in rows) / 60:.1f} minutes, "
               f"{len({u.speaker for u in rows} - {''})} known speakers, {sum(bool(u.words) for u in rows)} with word times")
    yield f"behaviors  {len(behaviors)} over {len({b.task for b in behaviors})} tasks of {settings['tasks']}"
    for name, folder in recipes.items():
        yield "\n".join([name, *("  " + line for line in describe_recipe(folder, report.get(name)))])
    for name in [n for n in report if n not in recipes]:
        yield f"{name}\n  {describe_scores(report[name])}"
    yield f"report     {run / 'report.md'}" if report else f"report     none yet: run `bench {run}`"


def describe_recipe(folder, scored):
    """Lines about one trained recipe of a run."""
    chosen, done = read_config(folder, "train", encoder=str, connector=str, lora=int, steps=int, batch_size=int, accumulate=int)
    log, spec = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else [], read_json(folder / "model.json", "k", "hidden") if done else {}
    steps, log = log[-1]["step"] + 1 if log else 0, [row for row in log if row["loss"] is not None]
    yield (f"encoder {chosen['encoder']}, connector {chosen['connector']}" + (f" (k {spec['k']}, hidden {spec['hidden']})" if done else "") +
           (f", LoRA of rank {chosen['lora']}" if chosen["lora"] else ", LLM frozen"))
    yield (f"steps {steps} of {chosen['steps']}, {chosen['batch_size'] * chosen['accumulate']} utterances each"
           + (f"; loss {log[0]['loss']:.3f} -> {sum(row['loss'] for row in log[-20:]) / len(log[-20:]):.3f} nats/token (mean of the last 20 steps), "
              f"{log[-1]['seconds']:.0f} s" if log else "") + ("" if done else "; not finished: the same `train` command goes on"))
    yield describe_scores(scored) if scored else "not in the last report"


def describe_scores(entry):
    try:
        quadrants = {q.replace("_task_", " × ").removesuffix("_prompt"): percent(cell["score"]) for q, cell in entry["quadrants"].items()}
        return "scores (task × prompt) " + ", ".join(f"{q} {score}" for q, score in quadrants.items()) + f"; repeat WER {percent(entry['repeat_wer'])}"
    except (KeyError, TypeError, AttributeError):
        raise UserError("report.json: is not what `bench` writes; run `bench` again with --force") from None


def draw_samples(cases, answers, seed, n=5):
    """n questions from all quadrants in turn, with every system's answer."""
    rng, samples = random.Random(f"samples-{seed}"), []
    for i in range(n):
        rows = [j for j, c in enumerate(cases) if c.quadrant == QUADRANTS[(3 - i) % 4]] or list(range(len(cases)))
        j = rng.choice(rows)
        case = cases[j]
        samples.append({"prompt": case.prompt, "task": case.task.name, "quadrant": case.quadrant, "audio": os.path.normpath(case.utterance.audio),
                        "transcript": case.utterance.text, "answers": {name: rows[j] for name, rows in answers.items()}})
    return samples
