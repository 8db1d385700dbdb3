"""Commands of mtbi.py in a row that is not stopped by one that fails: here, one after the other, or several at once, each in a process of its own."""

import os
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
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
        self.run_command, self.failures, self.threads = run_command, {}, 0      # threads of each process; 0: no processes, one command after the other, here
        self.running, self.stopped, self.lock = set(), False, threading.Lock()

    def each(self, what, function, items):
        """[function(item) for item in items], several at once if there are several items; what `attempt` runs meanwhile, it runs in processes of their own."""
        at_once = min(self.at_once, len(items))
        if at_once < 2:
            return [function(item) for item in items]
        self.threads = max(1, torch.get_num_threads() // at_once)
        try:
            with sigterm_as_ctrl_c(), ThreadPoolExecutor(at_once) as pool, tqdm(desc=what, total=len(items), unit="job") as bar:
                futures = [pool.submit(function, item) for item in items]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:                              # KeyboardInterrupt above all
                    self.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            return [future.result() for future in futures]
        finally:
            self.threads = 0

    def stop(self):
        """Begin no process any more, and end those that run: the trainings save a state first."""
        with self.lock:
            self.stopped = True
            for process in self.running if os.name != "nt" else []:    # Windows has told them already, and knows no friendly way to tell one alone
                process.terminate()

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
            self.failures[key] = str(error) if failed else f"{type(error).__name__}: {' '.join(str(error).split())}".removeprefix("UserError: ")
            tqdm.write(f"FAILED: {key}: {self.failures[key]}")
            with whole_file(why) as temporary:
                temporary.write_text(error.output if failed else traceback.format_exc(), encoding="utf-8")
            return False

    def in_a_process(self, argv, output):
        """Run a command in a process of its own, which writes what it says to the file `output`. Failed if it fails."""
        output.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONIOENCODING": "utf-8",
                       "PYTHONUNBUFFERED": "1"}                    # so that its last line is the last thing it said
        with output.open("w", encoding="utf-8") as file, self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen([sys.executable, str(MTBI), *argv], stdout=file, stderr=subprocess.STDOUT, env=environment)
            self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
            self.stopped |= code == 130                            # Ctrl-C reached it first
        if self.stopped:
            raise KeyboardInterrupt
        if code:
            said = output.read_text(encoding="utf-8", errors="replace")
            last = (said.strip().splitlines() or [""])[-1].split("\r")[-1]
            raise Failed(last.removeprefix("mtbi: ") if code == 2 else f"{last} (exit code {code})", said)


def jobs_that_fit(tiny):
    """(how many jobs at once, the reason)."""
    if DEVICE != "cpu" or not tiny:
        return 1, "because one training fills a " + ("GPU" if DEVICE != "cpu" else "CPU, if the models are not tiny")
    return min(MOST, torch.get_num_threads()), (f"because PyTorch has {torch.get_num_threads()} threads, of which a tiny model needs one, and "
                                                f"each process takes 1.4 GB of memory; {MOST} at most")


@contextmanager
def sigterm_as_ctrl_c():
    """Asked to end, end like by Ctrl-C: otherwise the processes begun would go on alone."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
