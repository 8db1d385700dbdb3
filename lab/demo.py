"""The demo: the other commands in a row, two at once where there are two cores.

In the tiny world, or on human voices that say digits.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lab.jobs import Failed, Jobs, lines_without_bars
from lab.report import show
from support.console import TIMES, timed
from support.files import UserError, read_json
from support.options import Positional, Seed
from support.recordings import speakers_of


@dataclass
class DemoOptions:
    world: Positional[Literal["tiny", "digits"]] = "tiny"
    """`tiny`: sentences of espeak-ng, offline; `digits`: human voices that say digits, which are
    downloaded with an encoder that knows people (some 160 MB)"""
    out: str | None = None
    """the run folder; default: runs/demo, runs/digits, or runs/short with --short"""
    speech: str | None = None
    """digits: a manifest of single spoken digits instead of the download"""
    encoder: str | None = None
    """digits: a local folder or a Hugging Face name; default: openai/whisper-tiny.en"""
    test_speaker: str | None = None
    """digits: who is held out; default: the last one in the alphabet"""
    download_to: str = "datasets"
    """digits: the folder they are downloaded to, and found in the next time"""
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


# human voices through Whisper: its frames are twelve per speech token, 240 ms. Digits in one go, as
# a visitor says them.
DIGITS = {
    "prepare": ["--join", "3:6", "--one-go", "--count", "1400"],
    "train": ["--steps", "500", "--k", "12"],
}
SHORT_DIGITS = {
    "prepare": ["--join", "3:6", "--one-go", "--count", "200"],
    "train": ["--steps", "30", "--k", "12"],
    "bench": SHORT["bench"],
}
ENCODER = "openai/whisper-tiny.en"


class Demo:
    """The commands, with the demo's options."""

    def __init__(self, options, run_command):
        self.options, self.run_command = options, run_command
        usual = {"tiny": "demo", "digits": "digits"}[options.world]
        self.out = Path(options.out or f"runs/{'short' if options.short else usual}")
        self.jobs = Jobs(None, run_command, tiny=True)
        self.more = SHORT if options.short else {}
        if options.world == "digits":
            self.more = SHORT_DIGITS if options.short else DIGITS

    def words(self, *words):
        """A command of the demo, whole."""
        words = list(words)
        words += self.more.get(words[0], [])
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


def show_demo(options, run_command, download_digits):
    """Prepare; behaviors and frames; two connectors; the benchmark. Says what to try next.

    download_digits: what gets the recordings, given a folder.
    """
    start, demo = time.perf_counter(), Demo(options, run_command)
    out, data = str(demo.out), str(demo.out / "data")
    source, encoder = ["tiny"], []
    if options.world == "digits":
        source, encoder = digits_of(options, download_digits)
        start = time.perf_counter()  # what is downloaded is had once
    with timed("== prepare"):
        demo.alone("prepare", *source, "--out", data)
    with timed("== behaviors, encode"):
        demo.side_by_side(["behaviors", data, "--out", out], ["encode", data, *encoder])
    with timed("== train mtbi, train asr"):
        train = [["train", out, "--recipe", name, *encoder] for name in ("mtbi", "asr")]
        demo.side_by_side(*train)
    with timed("== bench"):
        demo.shared("bench", out, "--data", data)
    if demo.jobs.shares:  # then the processes said nothing here
        show(read_json(demo.out / "report.json"), demo.out)
    shortened = " (shortened: the scores mean nothing)" if options.short else ""
    print(f"\ndemo: {time.perf_counter() - start:.0f} s{shortened}")
    if options.profile:
        show_times()
    show_next(demo.out, options.world, shlex.join(encoder[1:]))


def digits_of(options, download_digits):
    """(the words that prepare the recordings, those that name the encoder)."""
    encoder = options.encoder or ENCODER
    if not options.speech or not options.encoder:
        print(
            "downloads what is not there yet: the Free Spoken Digit Dataset (CC BY-SA 4.0, 10 MB) "
            f"and {encoder} (MIT, 150 MB)"
        )
    manifest = options.speech or str(download_digits(options.download_to))
    speakers = speakers_of(manifest)
    if len(speakers) < 2:
        raise UserError(f"{manifest}: names {len(speakers)} speakers; one is to be held out")
    held_out = options.test_speaker or speakers[-1]
    if held_out not in speakers:
        raise UserError(f"--test-speaker {held_out}: there are {', '.join(speakers)}")
    others = [name for name in speakers if name != held_out]
    print(f"held out from everything: {held_out}; the others are {', '.join(others)}")
    return [manifest, "--test-speakers", held_out], ["--encoder", encoder]


def show_times():
    """Where the time went; the steps of the demo begin with ==."""
    total = sum(seconds for name, seconds in TIMES.items() if name.startswith("== "))
    print("\n| step | seconds | share |\n|---|---|---|")
    for name, seconds in TIMES.items():
        print(f"| {name} | {seconds:.1f} | {seconds / total:.0%} |")


def show_next(out, world, encoder):
    if world == "digits":
        print(f"""
What to try next
  python mtbi.py serve {out}                (pip install -r requirements-page.txt)
  and say some digits: it has never heard you, nor anybody who sounds like the one held out.
  python mtbi.py recognizer {out}/data --encoder {encoder}
  and serve with --asr {out}/data/recognizer: a cascade beside them, of the same recordings.""")
        return
    wav = out / "data" / "audio" / "test-00000.wav"
    print(f"""
What to try next
  python mtbi.py generate {out} {wav} "Translate this into Spanish."
  python mtbi.py generate {out} {wav} "Translate this into Spanish." --recipe asr
  python mtbi.py train {out} --recipe mtbi-no-interleave, then bench: what does interleaving add?
  Record yourself saying a sentence like those in {out / "report.md"} and generate from it.
  Open model.py: SpeechLLM.embed is where speech becomes tokens.""")
