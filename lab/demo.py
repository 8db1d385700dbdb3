"""The demo: the other commands in the tiny world, two at once where there are two cores."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from lab.jobs import Failed, Jobs, lines_without_bars
from lab.report import show
from support.console import TIMES, timed
from support.files import UserError, read_json
from support.options import Seed


@dataclass
class DemoOptions:
    out: str | None = None
    """the run folder; default: runs/demo, or runs/short with --short"""
    short: bool = False
    """a few steps only, to see that everything runs"""
    profile: bool = False
    """print a table of where the time went"""
    force: bool = False
    """do every step again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""


SHORT = {
    "prepare": ["--train", "200", "--test", "40"],
    "train": ["--steps", "30"],
    "bench": ["--per-prompt", "2", "--dialogues", "4", "--probes", "8"],
}


class Demo:
    """The commands, with the demo's options."""

    def __init__(self, options, run_command):
        self.options, self.run_command = options, run_command
        self.out = Path(options.out or ("runs/short" if options.short else "runs/demo"))
        self.jobs = Jobs(None, run_command, tiny=True)

    def words(self, *words):
        """A command of the demo, whole."""
        words = list(words)
        if self.options.short:
            words += SHORT.get(words[0], [])
        if words[0] != "encode":
            words += ["--seed", str(self.options.seed)]
            words += ["--force"] if self.options.force else []
        return words

    def alone(self, *words):
        """A command by itself."""
        words = self.words(*words)
        print(f"\n$ python mtbi.py {shlex.join(words)}")
        self.run_command(words)

    def side_by_side(self, *commands):
        """Commands that do not need each other, each in a process of its own."""
        commands = [self.words(*words) for words in commands]
        names = [words[3] if words[0] == "train" else "demo" for words in commands]

        def run(at):
            return self.jobs.attempt(commands[at], self.out, names[at])

        print()
        done = self.jobs.each("side by side", run, range(len(commands)))
        if not all(done):
            raise UserError(next(iter(self.jobs.failures.values())))
        if self.jobs.at_once > 1:  # what the processes said is in their files
            for words, name in zip(commands, names):
                self.show_output(words, f"output-{words[0]}-{name}.txt")

    def shared(self, *words):
        """One command, divided among processes."""
        words = self.words(*words)
        print(f"\n$ python mtbi.py {shlex.join(words)}")
        try:
            self.jobs.together(words, self.out)
        except Failed as error:
            raise UserError(str(error)) from None

    def show_output(self, words, name):
        print(f"\n$ python mtbi.py {shlex.join(words)}")
        print("\n".join(lines_without_bars(self.out / name)))


def show_demo(options, run_command):
    """Prepare; behaviors and frames; two connectors; the benchmark. Says what to try next."""
    start, demo = time.perf_counter(), Demo(options, run_command)
    out, data = str(demo.out), str(demo.out / "data")
    with timed("== prepare"):
        demo.alone("prepare", "tiny", "--out", data)
    with timed("== behaviors, encode"):
        demo.side_by_side(["behaviors", data, "--out", out], ["encode", data])
    with timed("== train mtbi, train asr"):
        train = ["train", out, "--recipe"]
        demo.side_by_side([*train, "mtbi"], [*train, "asr"])
    with timed("== bench"):
        demo.shared("bench", out, "--data", data)
    if demo.jobs.at_once > 1:
        show(read_json(demo.out / "report.json"), demo.out)
    shortened = " (shortened: the scores mean nothing)" if options.short else ""
    print(f"\ndemo: {time.perf_counter() - start:.0f} s{shortened}")
    if options.profile:
        show_times()
    show_next(demo.out)


def show_times():
    """Where the time went; the steps of the demo begin with ==."""
    total = sum(seconds for name, seconds in TIMES.items() if name.startswith("== "))
    print("\n| step | seconds | share |\n|---|---|---|")
    for name, seconds in TIMES.items():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.0%} |")


def show_next(out):
    wav = out / "data" / "audio" / "test-00000.wav"
    print(f"""
What to try next
  python mtbi.py generate {out} {wav} "Translate this into Spanish."
  python mtbi.py generate {out} {wav} "Translate this into Spanish." --recipe asr
  python mtbi.py train {out} --recipe mtbi-no-interleave, then bench: what does interleaving add?
  Record yourself saying a sentence like those in {out / "report.md"} and generate from it.
  Open model.py: SpeechLLM.embed is where speech becomes tokens.""")
