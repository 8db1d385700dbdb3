"""Every recipe, several seeds, one report: what each paper claims, and whether that holds here.

Run everything that is not done yet; read the answers of all runs into one table; decide.
"""

import re
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pandas

from data import FULL, read_manifest
from eval import DIALOGUES
from lab.claims import BAR, CLAIMS, CURVE, RULE, STEPS, Results, all_differences, decide
from lab.compare_report import COMPARISON, claims_table, write_comparison
from lab.jobs import Jobs
from lab.mistakes import MISTAKES
from lab.report import where_it_ran
from lab.statistics import AT, LINES, MEASURES, NAMES, TASK, mean_or_none, read_answers, repeat_wer
from lab.statistics import task_metrics
from model import pinned_encoder
from support.files import UserError, fingerprint, read_json, read_json_if_whole, write_json
from support.frames import content_names
from support.hub import pinned
from support.logs import read_log
from support.options import Between, Count, FramesPerToken, RankOrFull, command_words
from support.recordings import speakers_of
from support.runs import begin, finish, is_done, lock_folder, option_before, read_spec
from support.states import saved_states


@dataclass
class CompareOptions:
    out: str
    """the folder to write: a run folder for each seed, report.md, plots"""
    recipes: str = "all"
    """which recipes, separated by commas"""
    seeds: str = "3"
    """how many seeds, or which: 8:16 are those from 8 to 15"""
    quick: bool = False
    """one seed, 300 steps, fewer questions"""
    no_curve: bool = False
    """without the trainings on 10 and 30% of the speech, and without the benchmarks after 125, 250
    and 500 steps"""

    # training
    steps: Count = 1000
    """training steps of every recipe"""
    batch_size: Count = 32
    """conversations in a micro-batch"""
    accumulate: Count = 1
    """micro-batches in a step"""
    k: FramesPerToken | None = None
    """encoder frames per speech token, of every recipe (blsp needs a power of two); default: by the
    encoder's frame rate and the recipe's speech tokens a second"""
    lora: RankOrFull | None = None
    """as of `train`, for every recipe; default: the recipe's"""

    # benchmark
    per_prompt: Count = 8
    """questions for each prompt of each task; and twelve times as many utterances to be repeated"""
    dialogues: Count = 60
    """conversations of two turns of each kind"""
    probes: Count = 96
    """questions on which the behavior gap and the attention shares are measured"""
    mistakes: Count = 40
    """wrong answers of each system, at most, of which it is looked into how they are wrong"""

    # speech
    speech: str = "tiny"
    """what `prepare` is given: `tiny`, a manifest, or a folder"""
    train: Count = 1500
    """tiny: training utterances to render"""
    test: Count = 300
    """tiny: held-out utterances to render"""
    join: str | None = None
    """of a manifest of single-word recordings: make strings of them, fewest:most words"""
    count: Count | None = None
    """how many such strings; default: as many as `prepare` makes"""
    leave_one_speaker_out: bool = False
    """a run for each speaker, held out in it, instead of one for each seed"""

    # models
    llm: str = "tiny"
    """the LLM: `tiny`, a local folder, or a Hugging Face name"""
    bits: Literal[4, 8, 16] = 4
    """load the LLM in 4 (NF4), 8 or 16 (not quantized) bits"""
    tasks: str | None = None
    """task table; default: tiny/tasks.toml for the tiny LLM, tasks.toml for any other"""
    encoder: str = "tiny"
    """the speech encoder: `tiny`, a local folder, or a Hugging Face name"""
    asr: str | None = None
    """CTC model for the cascade; `own`: a recognizer trained on the very speech of each run, on as
    many examples as the recipes, the fair rival; default: the speech encoder's own head, if it has
    one"""

    jobs: Annotated[int, Between(1, 64)] | None = None
    """commands at once, each in a process of its own; default: with the tiny models one a core, at
    most 4 on a CPU and 12 on a GPU, otherwise one"""

    MAKES: ClassVar = ("sittings.json", *COMPARISON)
    force: ClassVar = False
    CHANGES_NOTHING: ClassVar = ("out", "recipes", "seeds", "no_curve", "jobs")  # may change later


def shortened(options):
    """What --quick makes of the options: one seed, the first that was named."""
    seed = parse_seeds(options.seeds)[0]
    return replace(
        options,
        seeds=f"{seed}:{seed + 1}",
        steps=min(options.steps, 300),
        per_prompt=min(options.per_prompt, 4),
        dialogues=min(options.dialogues, 30),
        probes=min(options.probes, 48),
    )


def with_pinned_models(options):
    """The options with NAME@COMMIT for hub names, so that runs added later have the same models."""
    before = partial(option_before, options.out, options)
    asr = options.asr
    return replace(
        options,
        llm=pinned(options.llm, "llm", before("llm")),
        encoder=pinned_encoder(options.encoder, before("encoder")),
        asr=asr if asr in (None, "own") else pinned_encoder(asr, before("asr")),
    )


def compare(options, run_command, chosen):
    """Train and benchmark the chosen recipes in several runs, and test each paper's claims.

    run_command: does a command, given as words. Writes OUT/report.md.
    """
    options = shortened(options) if options.quick else options
    out = Path(options.out)
    if options.lora == FULL and options.bits != 16:
        raise UserError(f"--lora {FULL} trains all of the LLM, which must not be packed: --bits 16")
    options = replace(with_pinned_models(options), speech=str(Path(options.speech)))  # rec/ is rec
    names = chosen if options.no_curve else with_curve(chosen)
    runs = runs_of(options)
    is_done(  # refuses a folder of other settings; recipes and seeds may be added later
        out,
        "compare",
        options,
        {},
        "report.md",
        half_way="*/config.json",
        advice="name another --out",
    )
    with lock_folder(out):
        begin(out, "compare", options, {})
        failures = compare_runs(options, run_command, names, runs)
        finish(out, "compare", options, {})
    if failures:
        raise UserError(
            f"{out}: of its jobs {len(failures)} failed ({', '.join(failures)}); report.md says "
            "why, and the same command tries them again"
        )


def compare_runs(options, run_command, names, runs):
    """Run what is not done, measure, decide, and write the report; returns {job: why it failed}."""
    start, out = time.perf_counter(), Path(options.out)
    print(f"{len(names)} trainings in each of {len(runs)} runs: {', '.join(names)}")
    asr = "tiny" if options.asr in (None, "own") else options.asr
    tiny = {options.llm, options.encoder, asr} == {"tiny"}
    jobs = Jobs(options.jobs, run_command, tiny)
    sittings = earlier_sittings(out / "sittings.json")
    try:
        measured = run_all(runs, options, names, jobs)
    finally:  # however it ends, this was time spent
        sittings.append(round(time.perf_counter() - start))
        write_json(out / "sittings.json", {"seconds": sittings})

    measured = {run: systems for run, systems in measured.items() if systems}
    if not measured:
        why = next(iter(jobs.failures.values()), "no recipe was asked for")
        raise UserError(f"{out}: nothing could be measured: {why}")
    reports = {run: read_json(out / run / "report.json", "recipes") for run in measured}
    report = summarize_runs(out, measured, reports, [*LINES, *names])
    training = sum(row["train_seconds"] * row["runs"] for row in report["training"])
    report["meta"] = {
        **asdict(options),
        "runs": list(measured),
        "recipes": names,
        "failures": jobs.failures,
        "jobs_at_once": jobs.at_once,
        "wall_seconds_by_sitting": sittings,
        "training_seconds": round(training),
        "bench_seconds": round(bench_seconds(reports)),
        "heard_no_speaker": all(is_of_unheard_speakers(r["meta"]) for r in reports.values()),
        **where_it_ran(),
    }
    write_comparison(out, report)
    print(f"\n{claims_table(report)}\n")
    print(f"report: {out / 'report.md'}; {time.perf_counter() - start:.0f} s in this sitting")
    return jobs.failures


def earlier_sittings(path):
    """The seconds of each earlier call of this comparison; of a damaged file, none."""
    seconds = (read_json_if_whole(path, "seconds") or {}).get("seconds")
    return seconds if isinstance(seconds, list) else []


# ---- run ----


@dataclass(frozen=True)
class OneRun:
    """One run of the comparison: its name, its `prepare` command without --out, and its seed."""

    name: str
    prepare: tuple
    seed: int


def runs_of(options):
    """A run for each seed, or for each speaker left out."""
    source = ("prepare", options.speech, *command_words(options, "join", "count"))
    if not options.leave_one_speaker_out:
        return [OneRun(f"seed-{seed}", source, seed) for seed in parse_seeds(options.seeds)]
    if not Path(options.speech).is_file():
        raise UserError(
            f"--speech {options.speech}: --leave-one-speaker-out needs a JSONL manifest file "
            "that names speakers, and this is none"
        )
    speakers = speakers_of(options.speech)
    if len(speakers) < 2:
        raise UserError(
            f"{options.speech}: names {len(speakers)} speakers; --leave-one-speaker-out needs two "
            "or more"
        )
    names = [re.sub(r"[^A-Za-z0-9_-]", "-", speaker) for speaker in speakers]
    runs = []
    first = parse_seeds(options.seeds)[0]
    for i, (speaker, name) in enumerate(zip(speakers, names)):
        if names.count(name) > 1:  # others are left with the same letters
            name += f"-{fingerprint(speaker)}"
        # each with a seed of its own, or the interval would not tell how trainings differ
        chosen = (*source, "--test-speakers", speaker)
        runs.append(OneRun(f"without-{name}", chosen, first + i))
    return runs


def parse_seeds(text):
    """The seeds that --seeds names: how many, from 0 on, or first:end."""
    first, colon, end = text.partition(":")
    if not colon:
        first, end = "0", text
    numbers = first.isdecimal() and end.isdecimal() and len(first) < 7 and len(end) < 7
    if not numbers or not int(first) < int(end) <= int(first) + 64:
        raise UserError(f"--seeds {text}: say how many, at most 64, or which, like 8:16")
    return range(int(first), int(end))


def with_curve(names):
    """The recipes chosen, and what the data-efficiency curve needs of them."""
    names = list(names)
    for name in list(names):
        names += [f"{name}@{share}" for share in CURVE.get(name, ())]
    return list(dict.fromkeys(names))


class RunAll:
    """The commands of a comparison: prepare, behaviors, train and bench, run by run."""

    def __init__(self, options, jobs):
        self.options, self.jobs, self.out = options, jobs, Path(options.out)

    def attempt(self, run, name, *words):
        words = [*words, "--seed", str(run.seed)]
        return self.jobs.attempt(words, self.out / run.name, name)

    def has_behaviors(self, run):
        folder = self.out / run.name
        there = (folder / "data" / "manifest.jsonl", folder / "behaviors.jsonl")
        return all(path.exists() for path in there)

    def prepare(self, run):
        """Speech and behaviors; returns whether there are."""
        folder, options = self.out / run.name, self.options
        size = command_words(options, "train", "test") if options.speech == "tiny" else []
        words = [*run.prepare, *size, "--out", str(folder / "data")]
        if not self.attempt(run, "data", *words):
            return False
        llm = command_words(options, "llm", "bits", "tasks")
        behaviors = ["behaviors", str(folder / "data"), "--out", str(folder), *llm]
        return self.attempt(run, "behaviors", *behaviors)

    def train(self, pair):
        """Train one recipe in one run; returns whether it is trained."""
        run, recipe = pair
        how = command_words(self.options, "encoder", "k", "lora")
        how += command_words(self.options, "steps", "batch_size", "accumulate")
        words = ["train", str(self.out / run.name), "--recipe", recipe, *how]
        if self.is_followed(recipe):
            words += ["--keep-states", "--save-every", str(STEPS[0])]
        return self.attempt(run, recipe, *words)

    def is_followed(self, recipe):
        """Is it measured on the way, too?"""
        return recipe in CURVE and not self.options.no_curve

    def bench_on_the_way(self, run, trained, words):
        """Measure the recipes that are followed as they were after each of STEPS.

        Returns what was measured, by names like mtbi-at-250.
        """
        steps = [step for step in STEPS if step < self.options.steps]
        followed = []
        for name in filter(self.is_followed, trained):
            folder = self.out / run.name / name
            kept = {int(path.stem) for path in saved_states(folder)}
            if kept.issuperset(steps):
                followed.append(name)
            else:
                self.jobs.failures[f"{run.name}/{name} on the way"] = (
                    "it was trained with --no-curve, and its states were not kept; move "
                    f"{folder} away, and the same command trains it again"
                )
        measured = []
        for step in steps if followed else ():
            at = ["--step", str(step), "--recipes", ",".join(followed)]
            if self.attempt(run, f"bench-{step}", *words, *at):
                measured += [f"{name}{AT}{step}" for name in followed]
        return measured

    def is_trained(self, pair):
        run, recipe = pair
        return (self.out / run.name / recipe / "connector.safetensors").exists()

    def bench(self, run, trained):
        """Measure the trained recipes of a run; returns the systems that were measured."""
        asked = command_words(self.options, "per_prompt", "dialogues", "probes", "mistakes")
        if self.options.asr == "own":
            data = str(self.out / run.name / "data")
            size = self.options.batch_size * self.options.accumulate
            how = [*command_words(self.options, "encoder", "steps"), "--batch-size", str(size)]
            if not self.attempt(run, "recognizer", "recognizer", data, *how):
                return []
            asked += ["--asr", f"{data}/recognizer"]
        elif self.options.asr:
            asked += ["--asr", self.options.asr]
        words = ["bench", str(self.out / run.name), *asked]
        on_the_way = self.bench_on_the_way(run, trained, words)
        words.append("--recipes")
        if trained and not self.attempt(run, "bench", *words, ",".join(trained)):
            # one of them spoils it: each by itself, then those that can be measured together
            trained = [name for name in trained if self.attempt(run, name, *words, name)]
            if trained and not self.attempt(run, "bench", *words, ",".join(trained)):
                return []
        return [*LINES, *trained, *on_the_way] if trained else []

    def do_each(self, what, do, items, is_there):
        """{item: do(item)}, several at once; what is there is only looked at, without a process.

        Whether it is done, and with these settings, its command says itself.
        """
        todo = [item for item in items if not is_there(item)]
        results = dict(zip(todo, self.jobs.each(what, do, todo)))
        for item in items:
            if item not in results:
                results[item] = do(item)
        return results


def run_all(runs, options, names, jobs):
    """Do all that is not done already; returns {run: the systems measured in it now}."""
    work = RunAll(options, jobs)
    begun = work.do_each("prepare and behaviors", work.prepare, runs, work.has_behaviors)
    ready = [run for run in runs if begun[run]]

    # recipe by recipe: a comparison half done compares some in all runs
    pairs = [(run, recipe) for recipe in names for run in ready]
    results = work.do_each("train", work.train, pairs, work.is_trained)
    trained = {run: [] for run in ready}
    for run, recipe in pairs:
        if results[run, recipe]:
            trained[run].append(recipe)

    systems = jobs.each("bench", lambda run: work.bench(run, trained[run]), ready)
    return {run.name: names for run, names in zip(ready, systems)}


# ---- measure ----


def is_of_unheard_speakers(meta):
    """Were the speakers of a benchmark named, and all of them others than those of the training?"""
    return 0 < meta["n_speakers"] == meta["n_unheard_speakers"]


def bench_seconds(reports):
    seconds = 0.0
    for report in reports.values():
        seconds += sum(entry["bench_seconds"] for entry in report["recipes"].values())
    return seconds


def all_answers(out, measured):
    """The answers of all runs as one table, with a column `run`.

    What a recipe answered after so many steps is a system of its own, like mtbi-at-250. What an
    earlier call measured on the way is left out if this one did not.
    """
    tables = []
    for run, systems in measured.items():
        tables.append(read_answers(out / run / "answers.csv").assign(run=run))
        for step in STEPS:
            if any(name.endswith(f"{AT}{step}") for name in systems):
                table = read_answers(out / run / "steps" / str(step) / "answers.csv")
                table = table.assign(system=table["system"] + f"{AT}{step}", run=run)
                tables.append(table[table["system"].isin(systems)])
    return pandas.concat(tables, ignore_index=True)


def named_by_recording(answers, out):
    """The table with what names the sound of each utterance in the place of its name.

    Runs give one name to several recordings, and a recording may have a name in each.
    """
    tables = []
    for run, rows in answers.groupby("run", sort=False):
        data = out / run / "data"
        heard = [u for u in read_manifest(data / "manifest.jsonl") if u.split == "test"]
        names = content_names(heard, data / "features")
        tables.append(rows.assign(utterance=[names[i] for i in rows["utterance"]]))
    return pandas.concat(tables)


def summarize_runs(out, measured, reports, names):
    """Everything report.md and the plots show, as tables: lists of rows.

    measured: {run: its systems}; reports: {run: its report.json}.
    """
    answers = named_by_recording(all_answers(out, measured), out)
    results = Results(answers)
    measured_at = [f"{name}{AT}{step}" for name in names for step in STEPS]
    systems = [name for name in (*names, *measured_at) if name in results.systems()]
    tasks = answers[answers["set"] == "questions"]["task"].unique()
    measures = [*MEASURES, *(TASK + task for task in tasks)]
    named = [m for m in MEASURES if m not in DIALOGUES]
    trained = [name for name in systems if name not in LINES and AT not in name]
    return {
        "rule": RULE,
        "claims": [decide(claim, results) for claim in CLAIMS],
        "bar": BAR,
        "scores": score_rows(results, systems, measures),
        "repeat_wer": wer_rows(answers, systems),
        "metrics": metric_rows(answers, systems),
        "kinds": kind_rows(answers, systems),
        "mistakes": mistakes_by_system(reports, systems),
        "differences": all_differences(results, systems, named),
        "attention": attention_by_system(reports, systems),
        "training": [training_row(out, measured, system) for system in trained],
    }


def score_rows(results, systems, measures):
    """A row for every system and measure, over its runs."""
    rows = []
    for system in systems:
        for measure in measures:
            found = results.over(system, measure)
            low, high = found["ci95"]
            if low is not None:
                # no score is below 0 or above 1, whatever Student's t says; gains and drops may be
                most = np.inf if measure == "behavior gap" else 1.0
                least = -np.inf if measure.startswith(("gain", "drop")) else 0.0
                low, high = (float(np.clip(end, least, most)) for end in (low, high))
            rows.append(
                {
                    "system": system,
                    "measure": measure,
                    "score": found["score"],
                    "low": low,
                    "high": high,
                    "runs": found["n"],
                    "by_run": found["by_run"],
                }
            )
    return rows


def kind_rows(answers, systems):
    """A row for every kind of utterance and system: its scores, as means over the runs."""
    rows = []
    for kind in answers["kind"].unique():
        if not kind:
            continue
        about = answers[answers["kind"] == kind]
        results = Results(about)
        wer = {row["system"]: row["wer"] for row in wer_rows(about, systems)}
        for system in systems:
            row = {c: results.over(system, f"gain, {n}")["score"] for c, n in NAMES.items()}
            row["ignored"] = results.over(system, "ignored instruction")["score"]
            rows.append({"kind": kind, "system": system, **row, "wer": wer[system]})
    return rows


def mistakes_by_system(reports, systems):
    """{system: {one of MISTAKES: how many}}, of all runs together."""
    found = {}
    for system in systems:
        total = dict.fromkeys(MISTAKES, 0)
        for report in reports.values():
            for mistake, n in report["recipes"].get(system, {}).get("mistakes", {}).items():
                total[mistake] += n
        if any(total.values()):
            found[system] = total
    return found


def wer_rows(answers, systems):
    """The word error rate of the task repeat, as the mean over runs."""
    rows = []
    for system in systems:
        by_run = answers[answers["system"] == system].groupby("run", sort=False)
        rows.append({"system": system, "wer": mean_or_none(repeat_wer(run) for _, run in by_run)})
    return rows


def metric_rows(answers, systems):
    """Exact match, WER, chrF and BLEU of every system and task, as means over the runs."""
    rows = []
    for system in systems:
        by_run = answers[answers["system"] == system].groupby("run", sort=False)
        runs = pandas.concat([task_metrics(run) for _, run in by_run])
        means = runs.groupby("task", sort=False).mean(skipna=False).reset_index()
        means.insert(0, "system", system)
        rows += means.to_dict("records")
    return rows


def attention_by_system(reports, systems):
    """{system: {"instruction": [by layer], "utterance": [by layer]}}, as means over the runs."""
    found = {}
    for system in systems:
        runs = []
        for report in reports.values():
            if system in report["recipes"] and report["recipes"][system]["attention"]:
                runs.append(report["recipes"][system]["attention"])
        if runs:
            found[system] = {}
            for where in runs[0]:
                found[system][where] = np.mean([run[where] for run in runs], axis=0).tolist()
    return found


def training_row(out, measured, system):
    """Trained parameters, audio seconds heard and seconds of a recipe, as means over the runs."""
    folders = [out / run / system for run, systems in measured.items() if system in systems]
    logs = [read_log(folder / "log.jsonl") for folder in folders]
    audio = [sum(row["audio_seconds"] for row in log) for log in logs]
    spec = read_spec(folders[0])
    return {
        "system": system,
        "runs": len(logs),
        "trained_parameters": spec["trained_parameters"],
        "audio_seconds": float(np.mean(audio)),
        "train_seconds": float(np.mean([log[-1]["seconds"] for log in logs])),
    }
