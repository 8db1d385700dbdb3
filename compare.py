"""Every recipe, several seeds, one report: what each paper claims, what we measured, and whether that holds.

The claims and the rule that decides them stand here, before any run; no hand touches the verdicts.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import plots
from data import read_manifest
from eval import DIALOGUES, QUADRANTS, RESAMPLES, bootstrap, quadrant_names
from files import UserError, claim, is_done, read_json, whole_file, write_json
from jobs import Jobs
from report import percent
from train import read_log

MEASURES = {                 # what a claim can be about: names of the values in RUN/bench/RECIPE.json
    "score, seen tasks and prompts": QUADRANTS[:1], "score, unseen prompts": QUADRANTS[1:2], "score, unseen tasks": QUADRANTS[2:],
    "score, everything but training's own cells": QUADRANTS[1:], "conversations of two turns": DIALOGUES, "ignored instruction": ["ignored instruction"],
    "behavior gap": ["behavior gap"], "attention on instruction": ["attention on instruction"], "text retention": ["text retention"]}


@dataclass(frozen=True)
class Claim:
    """A sum of measured values, recipe by recipe with a sign, that must be over a margin, zero if nothing else is said, if the claim holds."""
    says: str
    paper: str
    measure: str
    terms: tuple             # (+1 or -1, recipe), ...
    margin: float = 0.0      # it must be over this

    def formula(self):
        terms = " ".join(("+ " if sign > 0 else "− ") + name for sign, name in self.terms).removeprefix("+ ")
        return terms + (f" > {100 * self.margin:g}" if self.margin else "")


def above(better, worse):
    return ((1, better), (-1, worse))


MTBI, SELF, VTB, BLSP = "MTBI, 2505.18644", "Self-Powered LSM, 2410.03798", "VoiceTextBlender, 2410.17485", "BLSP, 2309.00916"
CLAIMS = [
    *(Claim(f"MTBI generalizes to unseen {what} better than {other}", MTBI, f"score, unseen {what}", above("mtbi", other))
      for what in ("prompts", "tasks") for other in ("asr", "blsp", "vtb")),
    Claim("interleaving helps", MTBI, "score, unseen tasks", above("mtbi", "mtbi-no-interleave")),
    Claim("interleaving helps with 10% of the speech", MTBI, "score, unseen tasks", above("mtbi@10", "mtbi-no-interleave@10")),
    Claim("and more than with all of it", MTBI, "score, unseen tasks", above("mtbi@10", "mtbi-no-interleave@10") + above("mtbi-no-interleave", "mtbi")),
    Claim("fewer hours are needed: MTBI with 30% of the speech beats ASR tuning with all of it", MTBI, "score, unseen tasks", above("mtbi@30", "asr")),
    Claim("behavior imitation with one task generalizes better than ASR tuning", BLSP, "score, unseen tasks", above("blsp", "asr")),
    Claim("ASR instructions alone make the model ignore other instructions (anchor bias)", SELF, "ignored instruction", above("vanilla-it", "self-powered")),
    Claim("self-powered data brings attention back to the instruction", SELF, "attention on instruction", above("self-powered", "vanilla-it")),
    Claim("self-powered data generalizes better than ASR instructions alone", SELF, "score, everything but training's own cells",
          above("self-powered", "vanilla-it")),
    Claim("without text-only data text skills are lost: more than one point of them", VTB, "text retention", above("text", "vtb-no-text"), 0.01),
    Claim("text-only data keeps them better", VTB, "text retention", above("vtb", "vtb-no-text")),
    Claim("joint tuning handles unseen prompts better than ASR tuning", VTB, "score, unseen prompts", above("vtb", "asr")),
    Claim("joint tuning handles multi-turn and mixed-modal input better than ASR tuning", VTB, "conversations of two turns", above("vtb", "asr")),
    Claim("imitating the whole distribution narrows the behavior gap", "ours", "behavior gap", above("mtbi", "mtbi-kl")),
]
RULE = ("holds: the 95% interval lies above zero (or the margin named); does not hold: it lies below; undecided: it includes it. The interval is a "
        f"bootstrap of the paired difference over runs and over utterances ({RESAMPLES} resamples, percentiles 2.5 and 97.5), in which the differences between "
        "runs are widened as Student's t does, because few runs show too little of them. Each claim is decided by itself: of twenty that are wrong one may "
        "seem to hold.")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}      # 97.5% quantile of t, by the number of runs
CURVE = {"mtbi": (10, 30), "mtbi-no-interleave": (10,), "asr": ()}      # the data-efficiency curve: recipes, and percents of the speech beside 100
BAR = {"score, seen tasks and prompts": 0.95, "score, unseen prompts": 0.93, "score, unseen tasks": 0.85}      # what mtbi should reach in the tiny world


# ---- run ----

@dataclass(frozen=True)
class Fold:
    """One run of the comparison: its name, its `prepare` command without --out, and its seed."""
    name: str
    prepare: tuple
    seed: int


def folds(args):
    """A run for each seed, or for each speaker left out."""
    source = ["prepare", args.speech] + [word for key in ("join", "count") if getattr(args, key) for word in (f"--{key}", str(getattr(args, key)))]
    if args.leave_one_speaker_out:
        if not Path(args.speech).is_file():
            raise UserError(f"{args.speech}: --leave-one-speaker-out needs a JSONL manifest that names speakers")
        speakers = sorted({u.speaker for u in read_manifest(Path(args.speech))} - {""})
        if len(speakers) < 2:
            raise UserError(f"{args.speech}: names {len(speakers)} speakers; --leave-one-speaker-out needs two or more")
        return [Fold(f"without-{re.sub(r'[^A-Za-z0-9_-]', '-', speaker)}", (*source, "--test-speakers", speaker), 0) for speaker in speakers]
    return [Fold(f"seed-{seed}", tuple(source), seed) for seed in range(args.seeds)]


def with_curve(names):
    """The recipes chosen, and what the data-efficiency curve needs of them."""
    return list(dict.fromkeys(names + [f"{name}@{share}" for name in names if name in CURVE for share in CURVE[name]]))


def run_all(runs, args, names, jobs):
    """Prepare, imitate, train and bench all runs, where that is not done already; returns {run: the systems measured in it now}."""
    out = Path(args.out)
    training = ["--encoder", args.encoder, *(["--k", str(args.k)] if args.k else []), "--steps", str(args.steps), "--batch-size", str(args.batch_size)]
    size = ["--train", str(args.train), "--test", str(args.test)] if args.speech == "tiny" else []
    sizes = ["--per-prompt", str(args.per_prompt), "--dialogues", str(args.dialogues), "--probes", str(args.probes), *(["--asr", args.asr] if args.asr else [])]

    def attempt(fold, name, *argv):
        return jobs.attempt([*argv, "--seed", str(fold.seed)], out / fold.name, name)

    def behaviors(fold):
        run = out / fold.name
        return (attempt(fold, "data", *fold.prepare, *size, "--out", str(run / "data")) and
                attempt(fold, "behaviors", "imitate", str(run / "data"), "--out", str(run), "--llm", args.llm))

    def train(pair):
        fold, recipe = pair
        return attempt(fold, recipe, "train", str(out / fold.name), "--recipe", recipe, *training)

    ready = [fold for fold, good in zip(runs, jobs.each("prepare and imitate", behaviors, runs)) if good]
    pairs = [(fold, recipe) for recipe in names for fold in ready]             # recipe by recipe: what is half done compares some in all runs
    todo = [(fold, recipe) for fold, recipe in pairs if not (out / fold.name / recipe / "connector.safetensors").exists()]
    results = dict(zip(todo, jobs.each("train", train, todo)))
    done = [pair for pair in pairs if (results[pair] if pair in results else train(pair))]      # what is there needs no process: it is only looked at

    def bench(fold):
        words, trained = ["bench", str(out / fold.name), *sizes, "--recipes"], [recipe for f, recipe in done if f is fold]
        if trained and not attempt(fold, "bench", *words, ",".join(trained)):
            trained = [recipe for recipe in trained if attempt(fold, recipe, *words, recipe)]
        return ["text", "cascade", *trained] if trained else []

    return {fold.name: measured for fold, measured in zip(ready, jobs.each("bench", bench, ready))}


def compare(args, run_command, chosen, where):
    """Train and benchmark every recipe with several seeds, and test each paper's claims: OUT/report.md."""
    start, out = time.perf_counter(), Path(args.out)
    names, runs = chosen if args.no_curve else with_curve(chosen), folds(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "function", "out", "recipes", "seeds", "no_curve", "jobs")}
    is_done(out, settings, "report.md", half_way="*/config.json", advice="name another --out")      # recipes and seeds may be added later, nothing else
    claim(out, settings)
    print(f"{len(names)} trainings in each of {len(runs)} runs: {', '.join(names)}")
    jobs = Jobs(args.jobs, run_command, tiny={args.llm, args.encoder, args.asr or "tiny"} == {"tiny"})
    kept = {name: read_records(out / name, measured) for name, measured in run_all(runs, args, names, jobs).items()}
    if not any(kept.values()):
        raise UserError(f"{out}: nothing could be measured: {next(iter(jobs.failures.values()), 'no recipe was asked for')}")
    report = summarize(out, kept, ["text", "cascade", *names])
    report["meta"] = {"runs": [fold.name for fold in runs], "recipes": names, "steps": args.steps, "llm": args.llm, "encoder": args.encoder,
                      "speech": args.speech, "quick": args.quick, "failures": jobs.failures, "jobs at once": jobs.at_once,
                      "wall_seconds_of_this_sitting": round(time.perf_counter() - start),
                      "training_seconds": round(sum(row["train_seconds"] * row["runs"] for row in report["training"].values())),
                      "bench_seconds": round(sum(record["seconds"] for records in kept.values() for record in records.values())),
                      **where}
    write(out, report)
    claim(out, settings, done=True)
    print(f"\n{claims_table(report)}\n\nreport: {out / 'report.md'}; {time.perf_counter() - start:.0f} s in this sitting")


# ---- measure ----

def read_records(folder, names):
    """{recipe: its record} of a run, of those that are there."""
    return {name: read_json(folder / "bench" / f"{name}.json", "values", "answers") for name in names if (folder / "bench" / f"{name}.json").exists()}


def over_runs(groups, seed=0):
    """{"score", "ci95", "n", "by_run"} of one list of (utterance, value) rows a run: the mean of the runs' means, its interval as RULE says, and the means."""
    groups = [rows for rows in groups if rows]
    if not groups:
        return {"score": None, "ci95": [None, None], "n": 0, "by_run": []}
    rng, n = np.random.default_rng(seed), len(groups)
    means = np.array([np.mean([v for _, v in rows]) for rows in groups])                                                      # (runs)
    within = np.array([bootstrap([v for _, v in rows], [u for u, _ in rows], rng) for rows in groups]) - means[:, None]       # (runs, resamples)
    between = (means - means.mean())[rng.integers(0, n, (n, RESAMPLES))].mean(0)                                              # (resamples)
    wider = STUDENT.get(n, 1.96) / 1.96 * (n / (n - 1)) ** 0.5 if n > 1 else 0.0
    low, high = np.percentile(means.mean() + wider * between + within.mean(0), [2.5, 97.5])
    return {"score": float(means.mean()), "ci95": [float(low), float(high)], "n": n, "by_run": means.tolist()}


def rows_of(record, measure):
    return [row for name in MEASURES.get(measure, [measure]) for row in record["values"].get(name, [])]


def decide(about, kept):
    """A claim's entry: the value, its interval, the number of runs, and the verdict by RULE."""
    groups = []
    for records in kept.values():
        if all(name in records for _, name in about.terms):
            columns = [rows_of(records[name], about.measure) for _, name in about.terms]
            if any([u for u, _ in column] != [u for u, _ in columns[0]] for column in columns):
                raise UserError("the recipes of one run were asked different questions; choose another folder for --out")
            groups.append([(rows[0][0], sum(sign * value for (sign, _), (_, value) in zip(about.terms, rows))) for rows in zip(*columns)])
    found = over_runs(groups)
    low, high = found["ci95"]
    verdict = "not measured" if not found["n"] else "holds" if low > about.margin else "does not hold" if high < about.margin else "undecided"
    return {"claim": about.says, "paper": about.paper, "measure": about.measure, "difference": about.formula(), **found, "verdict": verdict}


def summarize(out, kept, names):
    """Everything report.md and the plots show."""
    def over(name, measure):
        found = over_runs([rows_of(records[name], measure) for records in kept.values() if name in records])
        most = np.inf if measure == "behavior gap" else 1.0       # no score is below 0 or above 1, whatever Student's t says
        return {**found, "ci95": [None if end is None else float(np.clip(end, 0, most)) for end in found["ci95"]]}

    found = [name for name in names if any(name in records for records in kept.values())]
    tasks = list(dict.fromkeys(t for records in kept.values() for record in records.values() for t in record["values"] if t.startswith("task ")))
    attention = {name: [records[name]["attention"] for records in kept.values() if name in records and records[name]["attention"]] for name in found}
    return {"claims": [decide(about, kept) for about in CLAIMS],
            "quadrants": {name: {q: over(name, q) for q in QUADRANTS} for name in found},
            "measures": {name: {m: over(name, m) for m in MEASURES} for name in found},
            "dialogues": {name: {d: over(name, d) for d in DIALOGUES} for name in found},
            "tasks": {name: {task.removeprefix("task "): over(name, task)["score"] for task in tasks} for name in found},
            "repeat_wer": {name: float(np.mean([r[name]["repeat_wer"] for r in kept.values() if name in r])) for name in found},
            "attention": {name: {kind: np.mean([rows[kind] for rows in runs], axis=0).tolist() for kind in runs[0]}
                          for name, runs in attention.items() if runs},
            "curve": {name: {share: over(f"{name}@{share}" if share < 100 else name, "score, unseen tasks") for share in (*CURVE[name], 100)}
                      for name in CURVE if name in found and any("@" in other for other in found)},
            "training": {name: training(out, kept, name) for name in found if name not in ("text", "cascade")}}


def training(out, kept, name):
    """Trained parameters, audio seconds seen and seconds of a recipe, the last two as means over the runs."""
    logs = [read_log(out / run / name / "log.jsonl") for run, records in kept.items() if name in records]
    run = next(run for run, records in kept.items() if name in records)
    return {"trained_parameters": read_json(out / run / name / "model.json", "trained_parameters")["trained_parameters"],
            "runs": len(logs), "audio_seconds": float(np.mean([sum(row["audio_seconds"] for row in log) for log in logs])),
            "train_seconds": float(np.mean([log[-1]["seconds"] for log in logs]))}


# ---- write ----

def interval(found, digits=1, factor=100):
    if found["score"] is None:
        return "–"
    return f"{factor * found['score']:.{digits}f} [{factor * found['ci95'][0]:.{digits}f}, {factor * found['ci95'][1]:.{digits}f}]"


def claims_table(report):
    lines = ["| claim | paper | difference | in | measured [95%] | runs | verdict |", "|---|---|---|---|---|---|---|"]
    for c in report["claims"]:
        small = c["measure"] == "behavior gap"
        lines.append(f"| {c['claim']} | {c['paper']} | {c['difference']} | {c['measure']}{', nats/token' if small else ', points'} | "
                     f"{interval(c, 3, 1) if small else interval(c)} | {c['n']} | **{c['verdict']}** |")
    return "\n".join(lines)


def recipe_table(report):
    lines = ["| recipe (runs) | " + " | ".join(quadrant_names(" × ")) +
             " | repeat WER | ignored instruction | behavior gap | text retention | conversations |", "|---|" + "---|" * 9]
    for name, row in report["quadrants"].items():
        m = report["measures"][name]
        lines.append(f"| `{name}` ({row[QUADRANTS[0]]['n']}) | " + " | ".join(interval(row[q]) for q in QUADRANTS) +
                     f" | {percent(report['repeat_wer'][name])} | {interval(m['ignored instruction'])} | {interval(m['behavior gap'], 3, 1)} | "
                     f"{interval(m['text retention'])} | "
                     f"{interval(m['conversations of two turns'])} |")
    return "\n".join(lines)


def bar_table(report):
    """The quality bar: shares of the text top line that mtbi should reach, and 97% of the cascade."""
    if not {"mtbi", "cascade"} <= set(report["measures"]):
        return "Not measured: it needs `mtbi` and `cascade`."
    lines = ["| cells | mtbi | bar | reached | share of the cascade | 97% reached |", "|---|---|---|---|---|---|"]
    for measure, bar in BAR.items():
        ours, cascade = (report["measures"][name][measure]["score"] for name in ("mtbi", "cascade"))
        if ours is None or cascade is None:
            continue
        share = ours / cascade if cascade else None
        lines.append(f"| {measure.removeprefix('score, ')} | {percent(ours)} | {percent(bar, 0)} | {'yes' if ours >= bar else 'no'} | {percent(share)} | "
                     f"{'–' if share is None else 'yes' if share >= 0.97 else 'no'} |")
    return "\n".join(lines)


def training_table(report):
    lines = ["| recipe | runs | trained parameters | audio seen, hours | training, s |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {row['runs']} | {row['trained_parameters'] / 1e6:.2f}M | {row['audio_seconds'] / 3600:.1f} | "
                              f"{row['train_seconds']:.0f} |"
                              for name, row in report["training"].items()])


def write(out, report):
    """The plots, each with the JSON it was drawn from, report.md and report.json."""
    draw(out, report)
    meta, failures = report["meta"], report["meta"]["failures"]
    text = f"""# {', '.join(meta['recipes'])}: {len(meta['runs'])} run{'s' * (len(meta['runs']) > 1)}{', shortened' if meta['quick'] else ''}

Scores are percentages of the text LLM's own answers to the true transcripts, on speakers, sentences, prompts and tasks that were held out. In brackets: 95%
bootstrap intervals over {'runs and ' if len(meta['runs']) > 1 else ''}utterances.

## Claims

{claims_table(report)}

The rule, written before the run: {RULE} Runs: {', '.join(meta['runs'])}.
{'' if not failures else chr(10).join(['', '**Failed:**', *(f'- {name}: {why}' for name, why in failures.items())])}

## The quality bar

{bar_table(report)}

## Recipes

{recipe_table(report)}

![recipe × quadrant](quadrants.png)

![ignored instruction](ignored.png)

![recipe × task](tasks.png)

![conversations](dialogues.png)

## Data efficiency

{'![unseen tasks by share of the speech](curve.png)' if report['curve'] else 'Not measured: no recipe was trained on a part of the speech.'}

## Attention

![attention by layer](attention.png)

## Text retention

![text retention](retention.png)

## How this was made

{training_table(report)}

{chr(10).join(f'- {key}: {value}' for key, value in meta.items() if key != 'failures')}
"""
    with whole_file(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    write_json(out / "report.json", report)


def draw(out, report):
    """Every PNG, and beside it the JSON it was drawn from."""
    def keep(name, numbers):
        write_json(out / f"{name}.json", numbers)
        return out / f"{name}.png"

    def whole(table):
        """Without the recipes on a part of the speech, which the curve shows."""
        return {name: row for name, row in table.items() if "@" not in name}

    plots.bars(keep("quadrants", report["quadrants"]), quadrant_names("\n"), {n: list(row.values()) for n, row in whole(report["quadrants"]).items()},
               "Generalization", "score, % of the text LLM")
    plots.bars(keep("dialogues", report["dialogues"]), [d.replace("_", " ") for d in DIALOGUES],
               {n: list(row.values()) for n, row in whole(report["dialogues"]).items()}, "Conversations of two turns", "score, % of the text LLM")
    for name, measure in (("ignored", "ignored instruction"), ("retention", "text retention")):
        cells = {n: [row[measure]] for n, row in whole(report["measures"]).items()}
        plots.bars(keep(name, cells), [measure], cells, measure.capitalize(), "%")
    tasks = list(next(iter(report["tasks"].values())))
    grid = np.array([[row[t] for row in report["tasks"].values()] for t in tasks], dtype=float)
    plots.heat_map(keep("tasks", report["tasks"]), tasks, list(report["tasks"]), grid, "score by task, %")
    curves = {n: (list(row), [100 * c["score"] for c in row.values()], tuple([100 * c["ci95"][end] for c in row.values()] for end in (0, 1)))
              for n, row in report["curve"].items() if all(c["score"] is not None for c in row.values())}
    if report["curve"]:
        plots.lines(keep("curve", report["curve"]), curves, "share of the training speech, %", "score on unseen tasks, % of the text LLM", "Data efficiency")
    plots.attention(keep("attention", report["attention"]), whole(report["attention"]))
