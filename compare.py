"""Every recipe, several seeds, one report: what each paper claims, what we measured, and whether that holds.

The claims and the rule that decides them stand here, before any run; no hand touches the verdicts.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compare_report import claims_table, write
from data import read_manifest
from eval import DIALOGUES, QUADRANTS, RESAMPLES, bootstrap
from files import UserError, claim, is_done, read_json, read_json_if_whole, write_json
from jobs import Jobs
from options import command_words
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
        "runs are widened as Student's t does, because few runs show too little of them. One run shows nothing of them: its verdicts are about that "
        "one training of each recipe. Each claim is decided by itself: of forty without any truth in them one may seem to hold.")
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}      # 97.5% quantile of t, by the number of runs
CURVE = {"mtbi": (10, 30), "mtbi-no-interleave": (10, 30), "asr": (10, 30)}      # the data-efficiency curve: recipes, and percents of the speech beside 100
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
    source = ["prepare", args.speech, *command_words(vars(args), "join", "count")]
    if args.leave_one_speaker_out:
        if not Path(args.speech).is_file():
            raise UserError(f"--speech {args.speech}: --leave-one-speaker-out needs the file of a JSONL manifest that names speakers, and this is none")
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
    out, options = Path(args.out), vars(args)
    size = command_words(options, "train", "test") if args.speech == "tiny" else []

    def attempt(fold, name, *argv):
        return jobs.attempt([*argv, "--seed", str(fold.seed)], out / fold.name, name)

    def behaviors(fold):
        run = out / fold.name
        return (attempt(fold, "data", *fold.prepare, *size, "--out", str(run / "data")) and
                attempt(fold, "behaviors", "imitate", str(run / "data"), "--out", str(run), *command_words(options, "llm", "bits", "tasks")))

    def train(pair):
        fold, recipe = pair
        words = command_words(options, "encoder", "k", "steps", "batch_size", "accumulate")
        return attempt(fold, recipe, "train", str(out / fold.name), "--recipe", recipe, *words)

    ready = [fold for fold, good in zip(runs, jobs.each("prepare and imitate", behaviors, runs)) if good]
    pairs = [(fold, recipe) for recipe in names for fold in ready]             # recipe by recipe: what is half done compares some in all runs
    todo = [(fold, recipe) for fold, recipe in pairs if not (out / fold.name / recipe / "connector.safetensors").exists()]
    results = dict(zip(todo, jobs.each("train", train, todo)))
    done = [pair for pair in pairs if (results[pair] if pair in results else train(pair))]      # what is there needs no process: it is only looked at

    def bench(fold):
        trained = [recipe for f, recipe in done if f is fold]
        words = ["bench", str(out / fold.name), *command_words(options, "per_prompt", "dialogues", "probes", "asr"), "--recipes"]
        if trained and not attempt(fold, "bench", *words, ",".join(trained)):
            trained = [recipe for recipe in trained if attempt(fold, recipe, *words, recipe)]
        return ["text", "cascade", *trained] if trained else []

    return {fold.name: measured for fold, measured in zip(ready, jobs.each("bench", bench, ready))}


def compare(args, run_command, chosen, where):
    """Train and benchmark every recipe with several seeds, and test each paper's claims: OUT/report.md."""
    start, out = time.perf_counter(), Path(args.out)
    names, runs = chosen if args.no_curve else with_curve(chosen), folds(args)
    settings = {key: value for key, value in vars(args).items() if key not in ("command", "function", "out", "recipes", "seeds", "no_curve", "jobs")}
    is_done(out, settings, "report.md", half_way="*/config.json", advice="name another --out")      # refuses others; recipes and seeds may be added later
    claim(out, settings)
    print(f"{len(names)} trainings in each of {len(runs)} runs: {', '.join(names)}")
    jobs = Jobs(args.jobs, run_command, tiny={args.llm, args.encoder, args.asr or "tiny"} == {"tiny"})
    sittings = read_json_if_whole(out / "sittings.json", "seconds") or {"seconds": []}
    try:
        kept = {name: read_records(out / name, measured) for name, measured in run_all(runs, args, names, jobs).items()}
    finally:                                                       # however it ends, this was time spent
        sittings["seconds"].append(round(time.perf_counter() - start))
        write_json(out / "sittings.json", sittings)
    if not any(kept.values()):
        raise UserError(f"{out}: nothing could be measured: {next(iter(jobs.failures.values()), 'no recipe was asked for')}")
    report = summarize(out, kept, ["text", "cascade", *names])
    report["meta"] = {"runs": [fold.name for fold in runs], "recipes": names, **settings, "failures": jobs.failures, "jobs_at_once": jobs.at_once,
                      "wall_seconds_by_sitting": sittings["seconds"],
                      "training_seconds": round(sum(row["train_seconds"] * row["runs"] for row in report["training"].values())),
                      "bench_seconds": round(sum(record["seconds"] for records in kept.values() for record in records.values())),
                      **where}
    write(out, report)
    claim(out, settings, done=True)
    print(f"\n{claims_table(report)}\n\nreport: {out / 'report.md'}; {time.perf_counter() - start:.0f} s in this sitting")


# ---- measure ----

def read_records(folder, names):
    """{recipe: its record} of a run, of those that are there."""
    there = {name: folder / "bench" / f"{name}.json" for name in names if (folder / "bench" / f"{name}.json").exists()}
    return {name: read_json(path, "values", "metrics", "attention", "repeat_wer", "seconds") for name, path in there.items()}


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
    return {"claim": about.says, "paper": about.paper, "measure": about.measure, "difference": about.formula(),
            "recipes": [name for _, name in about.terms], **found, "verdict": verdict}


def summarize(out, kept, names):
    """Everything report.md and the plots show."""
    def over(name, measure):
        found = over_runs([rows_of(records[name], measure) for records in kept.values() if name in records])
        most = np.inf if measure == "behavior gap" else 1.0       # no score is below 0 or above 1, whatever Student's t says
        return {**found, "ci95": [None if end is None else float(np.clip(end, 0, most)) for end in found["ci95"]]}

    found = [name for name in names if any(name in records for records in kept.values())]
    tasks = list(dict.fromkeys(t for records in kept.values() for record in records.values() for t in record["values"] if t.startswith("task ")))
    attention = {name: [records[name]["attention"] for records in kept.values() if name in records and records[name]["attention"]] for name in found}
    return {"rule": RULE, "claims": [decide(about, kept) for about in CLAIMS], "bar": BAR, "differences": differences(kept, found),
            "quadrants": {name: {q: over(name, q) for q in QUADRANTS} for name in found},
            "measures": {name: {m: over(name, m) for m in MEASURES} for name in found},
            "dialogues": {name: {d: over(name, d) for d in DIALOGUES} for name in found},
            "tasks": {name: {task.removeprefix("task "): over(name, task)["score"] for task in tasks} for name in found},
            "metrics": {name: mean_metrics([records[name]["metrics"] for records in kept.values() if name in records]) for name in found},
            "repeat_wer": {name: float(np.mean([r[name]["repeat_wer"] for r in kept.values() if name in r])) for name in found},
            "attention": {name: {kind: np.mean([rows[kind] for rows in runs], axis=0).tolist() for kind in runs[0]}
                          for name, runs in attention.items() if runs},
            "curve": {name: {share: over(f"{name}@{share}" if share < 100 else name, "score, unseen tasks") for share in (*CURVE[name], 100)}
                      for name in CURVE if name in found and any("@" in other for other in found)},
            "training": {name: training(out, kept, name) for name in found if name not in ("text", "cascade")}}


def differences(kept, names):
    """{measure: {recipe: {another: what `decide` finds of recipe − another}}}: every pair, not those alone that a claim is about."""
    whole = [name for name in names if "@" not in name]
    return {measure: {a: {b: {key: found[key] for key in ("score", "ci95", "n", "verdict")} for b in whole[i + 1:]
                          if (found := decide(Claim("", "", measure, above(a, b)), kept))["n"]} for i, a in enumerate(whole[:-1])} for measure in MEASURES}


def mean_metrics(runs):
    """{task: {metric: its mean over the runs}} of every task and metric that all runs have."""
    return {task: {metric: float(np.mean([run[task][metric] for run in runs])) if all(run[task][metric] is not None for run in runs) else None
                   for metric in metrics} for task, metrics in runs[0].items() if all(task in run for run in runs)}


def training(out, kept, name):
    """Trained parameters, audio seconds seen and seconds of a recipe, the last two as means over the runs."""
    logs = [read_log(out / run / name / "log.jsonl") for run, records in kept.items() if name in records]
    run = next(run for run, records in kept.items() if name in records)
    return {"trained_parameters": read_json(out / run / name / "model.json", "trained_parameters")["trained_parameters"],
            "runs": len(logs), "audio_seconds": float(np.mean([sum(row["audio_seconds"] for row in log) for log in logs])),
            "train_seconds": float(np.mean([log[-1]["seconds"] for log in logs]))}
