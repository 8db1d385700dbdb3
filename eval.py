"""The generalization benchmark: seen and unseen tasks x seen and unseen prompts, on speech that training never heard.

The reference is the text LLM's own answer to the true transcript, so any LLM and any transcribed speech can be benchmarked.
"""

import os
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from answers import generate_all
from data import Speech, ask, chat_parts, normalize, transcript_tokens
from files import UserError, read_config, read_json, timed, whole_file, write_json, write_jsonl
from features import encode_all
from model import SpeechLLM
from train import read_log

QUADRANTS = ["seen_task_seen_prompt", "seen_task_unseen_prompt", "unseen_task_seen_prompt", "unseen_task_unseen_prompt"]
RESAMPLES = 1000             # bootstrap resamples of the utterances


@dataclass(frozen=True)
class Case:
    """One question of the benchmark."""
    utterance: object
    task: object
    prompt: str
    quadrant: str


def draw_cases(tasks, utterances, per_prompt, seed):
    """For every prompt of every task `per_prompt` held-out utterances the task applies to; the same ones for every system."""
    rng, cases = random.Random(f"bench-{seed}"), []
    for task in tasks.values():
        fitting = [u for u in utterances if task.applies(u.text)]
        for prompts, seen in ((task.prompts, "seen"), (task.unseen_prompts, "unseen")):
            quadrant = f"{'seen' if task.split == 'train' else 'unseen'}_task_{seen}_prompt"
            for prompt in prompts:
                cases += [Case(u, task, prompt, quadrant) for u in rng.sample(fitting, min(per_prompt, len(fitting)))]
    if not cases:
        raise UserError("no task of the task table applies to any held-out transcript")
    return cases


def answer_cases(model, hear, cases, name, batch_size, max_new_tokens, kept, key):
    """The model's answers; hear(utterance) gives the parts that stand for the utterance: text, speech, or what the cascade heard."""
    heard = {c.utterance.id: hear(c.utterance) for c in cases}
    parts = [chat_parts(model.tokenizer, ask(c.prompt), [heard[c.utterance.id]]) for c in cases]
    order = [(c.task.name, c.utterance.duration) for c in cases]
    return [text for text, _ in generate_all(model, parts, order, f"bench {name}", batch_size, max_new_tokens, kept, key)]


def systems(run, encoders, transcriber, llm, utterances, cache, keep, precision):
    """{name: function that loads it, giving (model, hear)}: the top line, the cascade if there is a transcriber for it, and each trained recipe.

    encoders: {recipe: function that gives its speech encoder}; llm: the (LLM, tokenizer) that the frozen recipes share.
    """
    reader = SpeechLLM(*llm)

    def text():
        return reader, lambda u: [transcript_tokens(reader.tokenizer, u.text)]

    def cascade():
        frames = encode_all(transcriber, utterances, cache, keep)
        return reader, lambda u: [transcript_tokens(reader.tokenizer, transcriber.transcribe(frames[u.id]) or "…")]

    def trained(name):
        own_llm = read_json(run / name / "model.json", "lora")["lora"] > 0
        model = SpeechLLM.from_pretrained(run / name, None if own_llm else llm, encoders[name](), precision)
        frames = encode_all(model.encoder, utterances, cache, keep)
        return model, lambda u: [Speech(frames[u.id])]

    if transcriber.head is None:
        print(f"cascade: left out, {transcriber.name} has no CTC head; --asr names a CTC model to transcribe with")
    return {"text": text, **({"cascade": cascade} if transcriber.head is not None else {}), **{name: partial(trained, name) for name in encoders}}


def run_systems(systems, cases, batch_size, max_new_tokens, run, key):
    """({system: answers}, {system: seconds of loading and answering}); the answers are kept in `run` as they come, under `key`."""
    answers, seconds = {}, {}
    for name, load in systems.items():
        start = time.perf_counter()
        with timed(f"bench {name}"):
            answers[name] = answer_cases(*load(), cases, name, batch_size, max_new_tokens, run / f"answers-{name}", key)
        seconds[name] = time.perf_counter() - start
    return answers, seconds


# ---- metrics ----

def word_error_rate(reference, answer):
    import jiwer
    reference, answer = normalize(reference), normalize(answer)
    return jiwer.wer(reference, answer) if reference else float(bool(answer))


def score(metric, reference, answer):
    """0..1: "exact" match, "wer" as 1 - word error rate (jiwer), or "chrf" (sacrebleu, Popović 2015)."""
    if metric == "exact":
        return float((normalize(reference) or reference) == (normalize(answer) or answer))
    if metric == "wer":
        return max(0.0, 1.0 - word_error_rate(reference, answer))
    from sacrebleu import sentence_chrf
    return sentence_chrf(answer, [reference]).score / 100 if reference else float(not answer)


def repeats_instead(case, reference, answer):
    """The model ignored the instruction: asked for another task, it answered with the transcript, give or take a quarter of its words."""
    return case.task.name != "repeat" and word_error_rate(case.utterance.text, answer) <= 0.25 < word_error_rate(case.utterance.text, reference)


def cell(scores, utterances, seed=0):
    """{"score", "share_of_text", "n", "ci95"}: mean score, its share of the top line's, and a 95% bootstrap interval over utterances.

    The text LLM is its own reference, so the top line's score is 1 and the share is the score.
    """
    if not scores:
        return {"score": None, "share_of_text": None, "n": 0, "ci95": [None, None]}
    scores, ids = np.asarray(scores), np.unique(utterances, return_inverse=True)[1]
    sums, counts = np.bincount(ids, scores), np.bincount(ids)
    picks = np.random.default_rng(seed).integers(0, len(sums), (RESAMPLES, len(sums)))
    means = sums[picks].sum(1) / counts[picks].sum(1)
    return {"score": float(scores.mean()), "share_of_text": float(scores.mean()), "n": len(scores),
            "ci95": [float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))]}


def grade(cases, references, answers, seconds):
    """One system's entry of report.json; references are the answers of the top line."""
    scores = [score(c.task.metric, r, a) for c, r, a in zip(cases, references, answers)]

    def over(chosen):
        rows = [i for i, c in enumerate(cases) if chosen(c)]
        return cell([scores[i] for i in rows], [cases[i].utterance.id for i in rows])

    asked = [repeats_instead(c, r, a) for c, r, a in zip(cases, references, answers) if c.task.name != "repeat"]
    return {"quadrants": {q: over(lambda c: c.quadrant == q) for q in QUADRANTS},
            "tasks": {t: over(lambda c: c.task.name == t) for t in dict.fromkeys(c.task.name for c in cases)},
            "repeat_wer": corpus_wer(cases, answers),
            "ignored_instruction_rate": float(np.mean(asked)) if asked else None, "seconds": round(seconds, 1)}


def corpus_wer(cases, answers):
    """Word error rate of the task "repeat" against the true transcripts, over all its words; None if it was not asked."""
    import jiwer
    rows = [(normalize(c.utterance.text), normalize(a)) for c, a in zip(cases, answers) if c.task.name == "repeat" and normalize(c.utterance.text)]
    return jiwer.wer([r for r, _ in rows], [a for _, a in rows]) if rows else None


# ---- the report ----

def percent(value, digits=1):
    return "–" if value is None else f"{100 * value:.{digits}f}%"


def quadrant_table(report):
    """The table people look at first, as markdown."""
    names = [q.replace("_task_", " task × ").replace("_prompt", " prompt") for q in QUADRANTS]
    lines = ["| system | " + " | ".join(names) + " | repeat WER | ignored instruction |", "|---|" + "---|" * (len(names) + 2)]
    for name, entry in report["recipes"].items():
        cells = [f"{percent(c['score'])} [{percent(c['ci95'][0], 0)}, {percent(c['ci95'][1], 0)}]" for c in entry["quadrants"].values()]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {percent(entry['repeat_wer'])} | {percent(entry['ignored_instruction_rate'])} |")
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
{meta['n_cases']} questions. The score is a mean over questions of what
the task asks for: exact match, 1 - word error rate, or chrF, against the text LLM's own answer to the true transcript. `text`, the top line, is therefore 100%
wherever it is measured against itself, and a score is at the same time its share of the top line. In brackets: 95% bootstrap interval over utterances.

{quadrant_table(report)}

![scores by quadrant](quadrants.png)

## Tasks

{task_table(report)}

![task × system](tasks.png)

## Training

![loss](loss.png)

## Five conversations

{samples}

## How this was made

{chr(10).join(f'- {key}: {value}' for key, value in meta.items() if key != 'task_splits')}
"""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_report(folder, report, cases, answers):
    """answers.jsonl, the plots, report.md, and last report.json."""
    write_jsonl(folder / "answers.jsonl", [{"utterance": c.utterance.id, "task": c.task.name, "prompt": c.prompt, "quadrant": c.quadrant,
                                            "answers": {name: rows[i] for name, rows in answers.items()}} for i, c in enumerate(cases)])
    write_plots(folder, report)
    write_markdown(folder / "report.md", report)
    write_json(folder / "report.json", report)


def show(report, run):
    print("\nScore, % of the text LLM's own answers [95% interval over utterances]\n\n" + quadrant_table(report) + "\n")
    for s in report["samples"]:
        print(f"{s['prompt']}  [{s['transcript']}]  ({s['quadrant'].replace('_', ' ')}; {s['audio']})")
        print("\n".join(f"    {name:<8} {' '.join(answer.split())}" for name, answer in s["answers"].items()))
    print(f"\nreport: {run / 'report.md'} (and report.json, answers.jsonl, quadrants.png, tasks.png, loss.png)")


def earlier_report(run, asked):
    """The report of an earlier `bench` that was asked for the very same, or None."""
    try:
        report = read_json(run / "report.json", "recipes", "samples", "meta")
    except UserError:
        return None                                                # none, or not whole: it is written anew
    return report if isinstance(report["meta"], dict) and report["meta"].get("asked") == asked else None


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
    yield describe_scores(scored) if scored else "not benchmarked yet"


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


# ---- plots ----

def save_plot(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")


def write_plots(folder, report):
    """quadrants.png, tasks.png and loss.png in `folder`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    recipes = report["recipes"]

    figure, axes = pyplot.subplots(figsize=(9, 4))
    width = 0.8 / len(recipes)
    for i, (name, entry) in enumerate(recipes.items()):
        cells = [entry["quadrants"][q] for q in QUADRANTS]
        means = [100 * (c["score"] or 0) for c in cells]
        spread = [[100 * abs((c["score"] or 0) - (end if end is not None else 0)) for c, end in zip(cells, ends)]
                  for ends in ([c["ci95"][0] for c in cells], [c["ci95"][1] for c in cells])]
        axes.bar(np.arange(4) + i * width, means, width * 0.9, yerr=spread, capsize=2, label=name)
    axes.set_xticks(np.arange(4) + 0.4 - width / 2, [q.replace("_task_", " task\n").replace("_prompt", " prompt") for q in QUADRANTS])
    axes.set(ylabel="score, % of the text LLM", ylim=(0, 105), title="Generalization (bars: 95% interval over utterances)")
    axes.legend(loc="lower left")
    save_plot(figure, Path(folder) / "quadrants.png")
    pyplot.close(figure)

    tasks = sorted(next(iter(recipes.values()))["tasks"], key=lambda t: report["meta"]["task_splits"][t] == "unseen")
    grid = np.array([[entry["tasks"][t]["score"] for entry in recipes.values()] for t in tasks])
    figure, axes = pyplot.subplots(figsize=(2 + 1.1 * len(recipes), 0.8 + 0.27 * len(tasks)))
    axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(recipes)), list(recipes))
    axes.set_yticks(range(len(tasks)), [t + (" (unseen)" if report["meta"]["task_splits"][t] == "unseen" else "") for t in tasks], fontsize=8)
    axes.set_title("score by task, %")
    save_plot(figure, Path(folder) / "tasks.png")
    pyplot.close(figure)

    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name in report["meta"]["training"]:
        rows = [row for row in read_log(Path(folder) / name / "log.jsonl") if row["loss"] is not None]
        smooth = np.convolve(np.pad([r["loss"] for r in rows], (9, 0), mode="edge"), np.ones(10) / 10, mode="valid")
        axes.plot([r["step"] for r in rows], smooth, label=name)
    axes.set(xlabel="step", ylabel="loss, nats/token (mean of 10 steps)", yscale="log", title="Stage 2")
    axes.legend()
    save_plot(figure, Path(folder) / "loss.png")
    pyplot.close(figure)
