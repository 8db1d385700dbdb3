"""Commands of mtbi.py in a row that is not stopped by one that fails: here, one after the other, or several at once, each in a process of its own."""

import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch
from tqdm import tqdm

from files import whole_file
from parallel import DEVICE

MTBI = Path(__file__).resolve().with_name("mtbi.py")
MOST = 4                     # processes at once, if nothing else is said: each wants 1.4 GB of memory


class Failed(Exception):
    """A command in a process of its own that failed: the last line it wrote, and all of its output."""

    def __init__(self, line, output):
        super().__init__(line)
        self.output = output


class Jobs:
    """Runs commands, keeps what failed in `failures`, {"FOLDER/NAME": why}, and the whole of it in FOLDER/failed-COMMAND-NAME.txt."""

    def __init__(self, at_once, run_command, tiny):
        self.at_once, why = (at_once, "as asked by --jobs") if at_once else jobs_that_fit(tiny)
        print(f"jobs: {self.at_once} at once, {why}")
        self.run_command, self.failures, self.running, self.threads, self.stopped = run_command, {}, set(), 0, False

    def each(self, what, function, items):
        """[function(item) for item in items], several at once if there are several items; what `attempt` runs meanwhile, it runs in processes of their own."""
        at_once = min(self.at_once, len(items))
        if at_once < 2:
            return [function(item) for item in items]
        self.threads = max(1, torch.get_num_threads() // at_once)
        try:
            with ThreadPoolExecutor(at_once) as pool, tqdm(desc=what, total=len(items), unit="job") as bar:
                futures = [pool.submit(function, item) for item in items]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:                              # KeyboardInterrupt above all: the trainings save a state before they end
                    self.stopped = True
                    pool.shutdown(wait=False, cancel_futures=True)
                    for process in list(self.running):
                        process.terminate()
                    raise
            return [future.result() for future in futures]
        finally:
            self.threads = 0

    def attempt(self, argv, folder, name):
        """Run a command; if it fails, say so, keep why, and go on. Returns whether it succeeded."""
        key, why = f"{folder.name}/{name}", folder / f"failed-{argv[0]}-{name}.txt"
        try:
            tqdm.write(f"{'' if self.threads else chr(10)}$ python mtbi.py {' '.join(argv)}")
            self.in_a_process(argv, folder / f"output-{argv[0]}-{name}.txt") if self.threads else self.run_command(argv)
            why.unlink(missing_ok=True)
            return True
        except Exception as error:                                 # whatever it is, the others are to go on
            failed = isinstance(error, Failed)
            self.failures[key] = str(error) if failed else f"{type(error).__name__}: {' '.join(str(error).split())}"
            tqdm.write(f"FAILED: {key}: {self.failures[key]}")
            with whole_file(why) as temporary:
                temporary.write_text(error.output if failed else traceback.format_exc(), encoding="utf-8")
            return False

    def in_a_process(self, argv, output):
        """Run a command in a process of its own, which writes what it says to the file `output`. Failed if it fails."""
        output.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONIOENCODING": "utf-8"}
        with output.open("w", encoding="utf-8") as file:
            process = subprocess.Popen([sys.executable, str(MTBI), *argv], stdout=file, stderr=subprocess.STDOUT, env=environment)
        self.running.add(process)
        try:
            code = process.wait()
        finally:
            self.running.discard(process)
        if code == 130 or self.stopped:
            raise KeyboardInterrupt
        if code:
            said = output.read_text(encoding="utf-8", errors="replace")
            last = (said.strip().splitlines() or [""])[-1].split("\r")[-1]
            raise Failed(last.removeprefix("mtbi: ") if code == 2 else f"{last} (exit code {code})", said)


def jobs_that_fit(tiny):
    """(how many jobs at once, the reason)."""
    if DEVICE != "cpu" or not tiny:
        return 1, "because one training fills a " + ("GPU" if DEVICE != "cpu" else "CPU, if the models are not tiny")
    return min(MOST, torch.get_num_threads()), f"because there are {torch.get_num_threads()} cores, and the tiny models gain little from a second one each"
