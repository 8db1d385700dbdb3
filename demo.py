"""The demo: the other commands in a row, in the tiny world."""

import shlex
import time
from pathlib import Path

from files import TIMES, timed


def show_demo(args, run_command):
    """Run and time prepare, imitate, train twice, and bench; say what to try next."""
    out, start = Path(args.out), time.perf_counter()
    data, seed = str(out / "data"), ["--seed", str(args.seed)]
    short = {"prepare": ["--train", "200", "--test", "40"], "train": ["--steps", "30"],
             "bench": ["--per-prompt", "2", "--dialogues", "4", "--probes", "8"]} if args.short else {}
    commands = [["prepare", "tiny", "--out", data], ["imitate", data, "--out", str(out)], ["train", str(out), "--recipe", "mtbi"],
                ["train", str(out), "--recipe", "asr"], ["bench", str(out), "--data", data]]
    for command in commands:
        command += short.get(command[0], []) + seed + ["--force"] * args.force
        print(f"\n$ python mtbi.py {shlex.join(command)}")
        with timed(f"== {command[0]}" + (f" {command[3]}" if command[0] == "train" else "")):
            run_command(command)
    print(f"\ndemo: {time.perf_counter() - start:.0f} s" + (" (shortened: the scores mean nothing)" if args.short else ""))
    if args.profile:
        total = sum(s for name, s in TIMES.items() if name.startswith("== "))
        print("\n| step | seconds | share |\n|---|---|---|")
        print("\n".join(f"| {name} | {s:.1f} | {s / total:.0%} |" for name, s in TIMES.items()))
    wav = str(out / "data" / "audio" / "test-00000.wav")
    print(f"""
What to try next
  python mtbi.py generate {out} {wav} "Translate this into Spanish."
  python mtbi.py generate {out} {wav} "Translate this into Spanish." --recipe asr
  python mtbi.py train {out} --recipe mtbi-no-interleave, then bench {out}: what does interleaving add?
  Record yourself saying a sentence like those in {out / 'report.md'} and generate from it.
  Open model.py: SpeechLLM.embed is where speech becomes tokens.""")
