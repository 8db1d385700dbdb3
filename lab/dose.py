"""How much messy text must the LLM have read?  python -m lab.dose --out runs/dose

The dose-response of the tiny world: its LLM pre-trained with other shares of hesitant
conversations, which are what no connector can change, and the recipes trained on each.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lab import plots
from lab.compare_report import GAINS, Scores, wer_of
from lab.programs import run_program
from lab.report import markdown_table, percent
from support.files import PROJECT, UserError, read_json, write_json, write_text
from support.options import Between


@dataclass
class DoseOptions:
    out: str
    """the folder to write: LLM and comparison of each share, dose.md, dose.json, dose.png"""
    shares: str = "0,0.3,0.6"
    """shares of the pre-training conversations that hesitate, from 0 to 1, separated by commas"""
    recipes: str = "mtbi,asr"
    """which recipes are trained on each LLM, separated by commas"""
    seeds: str = "8:10"
    """how many seeds of each, or which, as of `compare`"""
    pretrain: Annotated[float, Between(0.0, 1.0)] = 1.0
    """share of all pre-training steps to run, to try things"""
    quick: bool = False
    """shortened comparisons, as of `compare`"""


def measure_dose(options):
    """Pre-train an LLM for each share, train the recipes on each, and draw what became of them.

    What is there already is not made again: to measure an LLM that you have, put it into
    OUT/SHARE/llm, and the measured.json beside it. Each takes an hour and a half of one core.
    """
    out, shares = Path(options.out), parse_shares(options.shares)
    pretrain_missing(out, shares, options.pretrain)
    rows = []
    for share in shares:
        compare_on(out / str(share), options)
        rows.append(row_of_share(out / str(share), share))
    write_dose(out, rows)


def parse_shares(text):
    """The shares that --shares names, as numbers from 0 to 1, in order."""
    try:
        shares = sorted({float(share) for share in text.split(",")})
    except ValueError:
        shares = [-1.0]
    if not all(0 <= share <= 1 for share in shares):
        raise UserError(f"--shares {text}: give numbers from 0 to 1, separated by commas")
    return shares


# ---- run ----


def pretrain_missing(out, shares, pretrain):
    """An LLM for each share, in OUT/SHARE/llm; as many at once as there are cores."""
    todo = [share for share in shares if not (out / str(share) / "measured.json").exists()]
    at_once = max(1, os.cpu_count() or 1)
    for start in range(0, len(todo), at_once):
        running = []
        for share in todo[start : start + at_once]:
            words = ["-m", "tiny.pretrain", "--only", "llm", "--hesitant", str(share)]
            words += ["--share", str(pretrain), "--out", str((out / str(share)).absolute())]
            running.append(begin_python(words, threads=1))
        wait_for(running)


def compare_on(folder, options):
    """The recipes trained and measured on the LLM in FOLDER/llm; goes on where it was."""
    words = [str(PROJECT / "mtbi.py"), "compare", "--llm", str(folder / "llm")]
    words += ["--tasks", str(PROJECT / "tiny" / "tasks.toml"), "--no-curve"]
    words += ["--recipes", options.recipes, "--seeds", options.seeds]
    words += ["--jobs", str(max(1, os.cpu_count() or 1)), "--out", str(folder / "compare")]
    words += ["--quick"] if options.quick else []
    wait_for([begin_python(words)])


def begin_python(words, threads=None):
    """Python with these words as a process, in the project's folder."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    return subprocess.Popen([sys.executable, *words], cwd=PROJECT, env=environment)


def wait_for(processes):
    """Until all have ended; UserError if one failed, which has said why. Ctrl-C ends them, too."""
    try:
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        for process in processes:
            process.wait()
        raise
    if any(codes):
        raise UserError("a command above failed; mend what it says, and the same command goes on")


# ---- measure ----


def row_of_share(folder, share):
    """What became of a share: {"hesitant", "text": exact answers in NF4, "systems": {...}}."""
    report = read_json(folder / "compare" / "report.json", "scores", "meta")
    scores, wer = Scores(report), wer_of(report)
    in_text = json.loads((folder / "measured.json").read_text())["llm_4_bits"]
    exact = [value for cells in in_text.values() for value in cells.values()]
    systems = {}
    for name in scores.systems:
        if name in ("text", "copy"):  # the two lines that frame every gain
            continue
        gains = {measure: scores.cell(name, measure) for measure in GAINS}
        ignored = scores.cell(name, "ignored instruction")["score"]
        systems[name] = {**gains, "repeat WER": wer[name], "ignored instruction": ignored}
    return {
        "hesitant": share,
        "text": sum(exact) / len(exact),
        "runs": report["meta"]["runs"],
        "systems": systems,
    }


def write_dose(out, rows):
    """dose.json, dose.md and dose.png."""
    write_json(out / "dose.json", {"shares": rows})
    head = ["hesitant", "the LLM in text", "system", *GAINS, "repeat WER", "ignored instruction"]
    table = []
    for row in rows:
        for name, system in row["systems"].items():
            cells = [percent(row["hesitant"], 0), percent(row["text"]), f"`{name}`"]
            cells += [percent(system[measure]["score"]) for measure in GAINS]
            cells += [percent(system["repeat WER"]), percent(system["ignored instruction"])]
            table.append(cells)
    page = markdown_table(head, table)
    write_text(out / "dose.md", page + "\n")
    print(f"\n{page}\n")
    title = "What the LLM read before, and what it hears"
    xlabel = "share of its pre-training conversations that hesitate, %"
    plots.lines(out / "dose.png", curves_of(rows), xlabel, "gain, %", title)
    print(f"drawn: {out / 'dose.png'}")


def curves_of(rows):
    """{"RECIPE, CELL": (shares, gains, (lows, highs))}, in percent."""
    curves = {}
    for name in rows[0]["systems"]:
        for measure in GAINS:
            cells = [row["systems"][name][measure] for row in rows]
            shares = [100 * row["hesitant"] for row in rows]
            lows = [100 * cell["ci95"][0] for cell in cells]
            highs = [100 * cell["ci95"][1] for cell in cells]
            gains = [100 * cell["score"] for cell in cells]
            curves[f"{name}, {measure.removeprefix('gain, ')}"] = (shares, gains, (lows, highs))
    return curves


if __name__ == "__main__":
    sys.exit(run_program("dose", DoseOptions, measure_dose))
