"""Several commands of mtbi.py, each in a process of its own; one that fails stops no other."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager

import torch
from tqdm import tqdm

from support.files import PROJECT, UserError, WriteError, write_text
from support.processes import DEVICE

MOST = 4  # processes at once, if nothing else is said: each wants 1.4 GB of memory
MOST_ON_GPU = 12  # at once: on an H200 as many trained at 12 steps a second each
BYTES_ON_GPU = 2.5e9  # of each, at most, with the tiny models
GLANCE = 0.5  # seconds between two looks at what a process says
CLEAR_LINE = "\x1b[K"  # tells a terminal to forget what stands from here to the end of the line


class Failed(Exception):
    """A command in a process of its own that failed: the last line it wrote, and all it wrote."""

    def __init__(self, line, output):
        super().__init__(line)
        self.output = output


class Jobs:
    """Runs commands, one after the other here, or several at once in processes of their own.

    What failed is kept in `failures`, {"FOLDER/NAME": why}, and the whole of it in
    FOLDER/failed-COMMAND-NAME.txt.
    """

    def __init__(self, at_once, run_command, tiny):
        self.at_once, why = at_once, "as asked by --jobs"
        if not at_once:
            self.at_once, why = jobs_that_fit(tiny)
        print(f"jobs: {self.at_once} at once, {why}")
        self.run_command, self.failures = run_command, {}
        self.threads = 0  # of each process; 0: no processes, one command after the other, here
        self.running, self.stopped, self.lock = set(), False, threading.Lock()
        self.lines = []  # which lines of the screen show a process; None: free

    def each(self, what, function, items):
        """[function(item) for item in items], several at once if there are several items.

        What `attempt` runs meanwhile, it runs in processes of their own.
        """
        at_once = min(self.at_once, len(items))
        if at_once < 2:
            return [function(item) for item in items]
        self.threads = max(1, torch.get_num_threads() // at_once)
        self.lines = [None for _ in range(at_once)]
        bar = tqdm(desc=what, total=len(items), unit="job", dynamic_ncols=True)
        try:
            with sigterm_as_ctrl_c(), ThreadPoolExecutor(at_once) as pool, bar:
                futures = [pool.submit(function, item) for item in items]
                try:
                    for future in as_completed(futures):
                        future.result()
                        bar.update()
                except BaseException:  # KeyboardInterrupt above all
                    self.stop()
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            return [future.result() for future in futures]
        finally:
            self.threads = 0

    @property
    def shares(self):
        """Is one command divided among processes? On one GPU they would be in each other's way."""
        return self.at_once > 1 and DEVICE == "cpu"

    def together(self, words, folder):
        """One command that several processes share, as torchrun starts it; Failed if it fails."""
        if not self.shares:
            self.run_command(words)
            return
        shared = {
            "WORLD_SIZE": str(self.at_once),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }

        def one_of_them(rank):
            name = f"output-{words[0]}" + (f"-{rank}" if rank else "") + ".txt"
            ranked = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.in_a_process(words, folder / name, ranked)

        self.each(f"{words[0]}, shared", one_of_them, range(self.at_once))

    def stop(self):
        """Begin no process any more, and end those that run: the trainings save a state first."""
        with self.lock:
            self.stopped = True
            if os.name == "nt":
                return  # Windows has told them already, and knows no friendly way to tell one alone
            for process in self.running:
                process.terminate()

    def attempt(self, words, folder, name):
        """Run a command; if it fails, say so, keep why, and go on. Returns whether it succeeded."""
        key, why = f"{folder.name}/{name}", folder / f"failed-{words[0]}-{name}.txt"
        try:
            tqdm.write(f"{'' if self.threads else chr(10)}$ python mtbi.py {' '.join(words)}")
            if self.threads:
                self.in_a_process(words, folder / f"output-{words[0]}-{name}.txt")
            else:
                self.run_command(words)
            if is_output(why):
                why.unlink()
            self.failures.pop(key, None)  # of an earlier try in this sitting
            return True
        except WriteError:  # a full disk stops the others, too
            raise
        except Exception as error:  # whatever else it is, the others are to go on
            if isinstance(error, Failed):
                said, whole = str(error), error.output
            else:
                said, whole = " ".join(str(error).split()), traceback.format_exc()
                if not isinstance(error, UserError):
                    said = f"{type(error).__name__}: {said}"
            self.failures[key] = said
            tqdm.write(f"FAILED: {key}: {said}")
            begin_output(why, words)
            with why.open("a", encoding="utf-8") as file:
                file.write(whole)
            return False

    def in_a_process(self, words, output, more=None):
        """Run a command in a process of its own, which writes what it says to the file `output`.

        more: environment variables of its own. Failed if it fails.
        """
        begin_output(output, words)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "PYTHONIOENCODING": "utf-8",
            "PYTHONUNBUFFERED": "1",  # so that its last line is the last thing it said
            **(more or {}),
        }
        command = [sys.executable, str(PROJECT / "mtbi.py"), *words]
        with output.open("a", encoding="utf-8") as file, self.lock:
            if self.stopped:
                raise KeyboardInterrupt
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment
            )
            self.running.add(process)
        code = self.watch(process, output)
        with self.lock:
            self.running.discard(process)
            self.stopped |= code == 130  # Ctrl-C reached it first
        if self.stopped:
            raise KeyboardInterrupt
        if code:
            last, said = last_line(output), output.read_text(encoding="utf-8", errors="replace")
            line = last.removeprefix("mtbi: ")
            if code != 2:
                line += f" (exit code {code})"
            raise Failed(line, said)

    def watch(self, process, output):
        """Wait for a process, showing the last line it wrote on a line of the screen."""
        with self.lock:
            place = self.lines.index(None) if None in self.lines else len(self.lines)
            self.lines[place : place + 1] = [process]
        line = tqdm(
            bar_format=CLEAR_LINE + "{desc}",
            position=place + 1,
            leave=False,
            dynamic_ncols=True,  # cut where the terminal ends now, or it would fill two lines
            disable=not sys.stderr.isatty(),
        )
        with line:
            while True:
                try:
                    code = process.wait(GLANCE)
                    break
                except subprocess.TimeoutExpired:
                    line.set_description_str(last_line(output)[:110])
        with self.lock:
            self.lines[place] = None
        return code


FIRST_LINE = "$ python mtbi.py "  # of every file that keeps what a command said


def is_output(path):
    """Is it a file that keeps what an earlier command said?"""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(len(FIRST_LINE)) == FIRST_LINE


def begin_output(path, words):
    """A file for what a command says; UserError if somebody else's stands there."""
    if path.exists() and not is_output(path):
        raise UserError(f"{path}: was not made by this program; move it away")
    write_text(path, f"{FIRST_LINE}{shlex.join(words)}\n")


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def last_line(output):
    """The last thing that a process wrote; a progress bar overwrites its line again and again."""
    with open(output, "rb") as file:
        file.seek(max(0, output.stat().st_size - 4096))  # of the bars of hours there are megabytes
        said = file.read().decode("utf-8", errors="replace").strip()
    lines = said.replace("\r", "\n").splitlines()
    return lines[-1].strip() if lines else ""


def lines_without_bars(output):
    """What a process wrote, without its progress bars."""
    kept = []
    said = output.read_text(encoding="utf-8", errors="replace")
    for line in said.split("\n")[1:]:  # the first is the command
        line = line.split("\r")[-1]
        if line.strip() and "%|" not in line and "it/s]" not in line:
            kept.append(line)
    return kept


def jobs_that_fit(tiny):
    """(how many jobs at once, the reason)."""
    if not tiny:
        what = "CPU" if DEVICE == "cpu" else "GPU"
        return 1, f"because one training fills a {what}, if the models are not tiny"
    if DEVICE != "cpu":
        cores, free = os.cpu_count() or 1, torch.cuda.mem_get_info()[0]
        why = (
            "because a tiny model leaves a GPU waiting for the core that starts its kernels: there "
            f"are {cores} cores and {free / 1e9:.0f} GB of free GPU memory, of which each process "
            f"takes up to {BYTES_ON_GPU / 1e9:g}; {MOST_ON_GPU} at most"
        )
        return max(1, min(MOST_ON_GPU, cores, int(free / BYTES_ON_GPU))), why
    threads = torch.get_num_threads()
    why = (
        f"because PyTorch has {threads} threads, of which a tiny model needs one, and each process "
        f"takes 1.4 GB of memory; {MOST} at most"
    )
    return min(MOST, threads), why


@contextmanager
def sigterm_as_ctrl_c():
    """Asked to end, end like by Ctrl-C: otherwise the processes begun would go on alone."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
