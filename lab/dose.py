"""How much messy text must the LLM have read?  python -m lab.dose --out runs/dose

The dose-response of the tiny world: its LLM pre-trained with more or less of what stands between
the words of speech, and the recipes trained on each.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lab import plots
from lab.compare_report import GAINS, Scores, interval, wer_of
from lab.programs import run_program
from lab.report import markdown_table, percent
from support.console import exit_codes
from support.files import PROJECT, UserError, read_json, write_json, write_text
from support.options import Between

HESITANT, BLENDED = 0.3, 0.5  # as tiny.pretrain has them
CORES = os.cpu_count() or 1


@dataclass
class DoseOptions:
    out: str
    """the folder to write: LLM and comparison of each dose, dose.md, dose.json, dose.png"""
    doses: str = "0,0.3,0.6:0,0.6"
    """shares of the pre-training conversations that hesitate, from 0 to 1, separated by commas;
    after a colon the share of these that read like speech and not like text, usually 0.5"""
    recipes: str = "mtbi,asr"
    """which recipes are trained on each LLM, separated by commas"""
    seeds: str = "8:10"
    """how many seeds of each, or which, as of `compare`"""
    pretrain: Annotated[float, Between(0.0, 1.0)] = 1.0
    """share of all pre-training steps to run, to try things"""
    quick: bool = False
    """shortened comparisons, as of `compare`"""


@dataclass(frozen=True)
class Dose:
    """What an LLM read: the share of hesitant conversations, and the share of these blended."""

    hesitant: float
    blended: float

    def __str__(self):
        if not self.hesitant:
            return "clean text"
        return f"{self.hesitant:.0%} hesitant, {self.blended:.0%} of these blended"

    def folder(self, out):
        return out / f"{self.hesitant:g}-{self.blended:g}"


def measure_doses(options):
    """Pre-train an LLM for each dose, train the recipes on each, and draw what became of them.

    What is there already is not made again: to measure an LLM that you have, put it into
    OUT/HESITANT-BLENDED/llm, and its measured.json beside it. Pre-training takes 95 to 105 minutes
    of one core for each.
    """
    out, doses = Path(options.out), parse_doses(options.doses)
    pretrain_missing(out, doses, options.pretrain)
    rows = []
    for dose in doses:
        compare_on(dose.folder(out), options)
        rows.append(row_of_dose(out, dose))
    write_doses(out, rows)


def parse_doses(text):
    """The Doses that --doses names, in order."""
    doses = []
    for entry in text.split(","):
        hesitant, _, blended = entry.partition(":")
        try:
            dose = Dose(float(hesitant), float(blended or BLENDED))
        except ValueError:
            dose = Dose(-1, -1)
        if not (0 <= dose.hesitant <= 1 and 0 <= dose.blended <= 1):
            raise UserError(f"--doses {text}: give numbers from 0 to 1, like 0,0.3,0.6:0,0.6")
        doses.append(dose)
    return list(dict.fromkeys(doses))


# ---- run ----


def pretrain_missing(out, doses, pretrain):
    """An LLM for each dose, in its folder; as many at once as there are cores."""
    todo = [dose for dose in doses if not is_pretrained(dose, out, pretrain)]
    for start in range(0, len(todo), CORES):
        running = []
        for dose in todo[start : start + CORES]:
            words = ["-m", "tiny.pretrain", "--only", "llm", "--share", str(pretrain)]
            words += ["--hesitant", str(dose.hesitant), "--blended", str(dose.blended)]
            words += ["--out", str(dose.folder(out).absolute())]
            running.append(begin_python(words, threads=1))
        wait_for(running)


def is_pretrained(dose, out, pretrain):
    """Whether there is an LLM; UserError if it read otherwise, or for another share of the steps.

    What measured.json does not say is as tiny.pretrain has it.
    """
    folder = dose.folder(out)
    if not (folder / "measured.json").exists():
        return False
    found = in_measured(folder)
    for what, usual, wanted in (
        ("share", 1.0, pretrain),
        ("hesitant", HESITANT, dose.hesitant),
        ("blended", BLENDED, dose.blended),
    ):
        there = found.get(f"llm_{what}", usual)
        if there != wanted:
            raise UserError(
                f"{folder}: its LLM was pre-trained with {what} {there:g}, and {wanted:g} is asked "
                "for; name another folder for --out"
            )
    return True


def in_measured(folder):
    """What stands in measured.json, as tiny.pretrain writes it."""
    path = folder / "measured.json"
    try:
        found = json.loads(path.read_text())
        found["llm_4_bits"].values()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not what tiny.pretrain writes there") from None
    return found


def compare_on(folder, options):
    """The recipes trained and measured on the LLM in FOLDER/llm; goes on where it was."""
    words = [str(PROJECT / "mtbi.py"), "compare", "--llm", str((folder / "llm").absolute())]
    words += ["--tasks", str(PROJECT / "tiny" / "tasks.toml"), "--no-curve"]
    words += ["--recipes", options.recipes, "--seeds", options.seeds]
    words += ["--jobs", str(CORES)]
    words += ["--out", str((folder / "compare").absolute())]
    words += ["--quick"] if options.quick else []
    wait_for([begin_python(words)])


def begin_python(words, threads=None):
    """Python with these words as a process, in the project's folder."""
    print(f"\n$ python {' '.join(words)}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    return subprocess.Popen([sys.executable, *words], cwd=PROJECT, env=environment)


def wait_for(processes):
    """Until all have ended; UserError if one failed, which has said why.

    Stopped, each saves where it is.
    """
    if any(exit_codes(processes)):
        raise UserError("a command above failed; mend what it says, and the same command goes on")


# ---- measure ----


def row_of_dose(out, dose):
    """What became of a dose: what the LLM knows in text (NF4), scores, claims and mistakes."""
    folder = dose.folder(out)
    report = read_json(folder / "compare" / "report.json", "scores", "meta")
    scores, wer = Scores(report), wer_of(report)
    in_text = in_measured(folder)["llm_4_bits"]
    exact = [value for cells in in_text.values() for value in cells.values()]
    systems = {}
    for name in scores.systems:
        if name in ("text", "copy"):  # the two lines that frame every gain
            continue
        gains = {measure: scores.cell(name, measure) for measure in GAINS}
        ignored = scores.cell(name, "ignored instruction")["score"]
        systems[name] = {**gains, "repeat WER": wer[name], "ignored instruction": ignored}
    return {
        "dose": str(dose),
        "text": sum(exact) / len(exact),
        "runs": report["meta"]["runs"],
        "systems": systems,
        "claims": [claim for claim in report["claims"] if claim["n"]],
        "mistakes": report["mistakes"],
    }


def write_doses(out, rows):
    """dose.json, dose.md and dose.png."""
    write_json(out / "dose.json", {"doses": rows})
    head = ["the LLM read", "exact in text", "system", *GAINS, "repeat WER", "ignored instruction"]
    table = []
    for row in rows:
        for name, system in row["systems"].items():
            cells = [row["dose"], percent(row["text"]), f"`{name}`"]
            cells += [percent(system[measure]["score"]) for measure in GAINS]
            cells += [percent(system["repeat WER"]), percent(system["ignored instruction"])]
            table.append(cells)
    page = f"{markdown_table(head, table)}\n\n{claims_of_doses(rows)}"
    write_text(out / "dose.md", page + "\n")
    print(f"\n{page}\n")
    title = "What the LLM read before it heard"
    groups = [row["dose"].replace(", ", ",\n").replace(" blended", "\nblended") for row in rows]
    plots.bars(out / "dose.png", groups, cells_of_doses(rows), title, "gain, %")
    print(f"drawn: {out / 'dose.png'}")


def claims_of_doses(rows):
    """The table of what was claimed and could be decided on each dose."""
    head = ["the LLM read", "difference", "in points of", "measured [95%]", "verdict"]
    table = []
    for row in rows:
        for claim in row["claims"]:
            measured = interval(claim["score"], *claim["ci95"])
            cells = [row["dose"], claim["difference"], claim["measure"]]
            table.append([*cells, measured, f"**{claim['verdict']}**"])
    return markdown_table(head, table)


def cells_of_doses(rows):
    """{"SYSTEM, CELL": its score and interval at every dose} of what is drawn."""
    cells = {}
    everywhere = [n for n in rows[0]["systems"] if all(n in row["systems"] for row in rows)]
    for name in everywhere:
        for measure in ("gain, seen", "gain, unseen tasks"):
            label = f"{name}, {measure.removeprefix('gain, ')}"
            cells[label] = [row["systems"][name][measure] for row in rows]
    return cells


if __name__ == "__main__":
    sys.exit(run_program("dose", DoseOptions, measure_doses))
