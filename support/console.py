"""What a command says while it works, and how it hears that it should stop."""

import signal
import threading
import time
from contextlib import contextmanager

import torch
from tqdm import tqdm

from support.files import first_line
from support.processes import DEVICE, MAIN, WHY_DEVICE, WORLD

NARROW = 256  # values a frame: below that an encoder hears short clips faster with one thread
TIMES = {}  # what each step of this process took, in seconds: `demo --profile` prints it


def progress_bar(items=None, *, desc, unit, **options):
    """A progress bar (tqdm); with several processes the first one's stands for all."""
    return tqdm(items, desc=desc, unit=unit, disable=not MAIN, **options)


@contextmanager
def timed(name):
    """Says what the step took, and keeps it in TIMES."""
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    TIMES[name] = TIMES.get(name, 0) + seconds
    print(f"{name}: {seconds:.1f} s", flush=True)


# How the libraries of a GPU say that memory ran out, beside torch's own error: any of them when it
# asks for room to work in, cuBLAS when it begins, cuDNN where no way of its own fits what is left.
SIGNS_OF_WANT = (
    "out of memory",
    "ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "unable to find an engine",
)


@contextmanager
def threads_for(encoder):
    """One thread for a narrow encoder: numpy's threads and torch's, taking turns, would wait.

    And on a GPU, where many threads make features. Of two cores the tiny one (width 192) makes 3 s
    of sound in 39 ms, with one thread in 28; wider ones gain: whisper-tiny (384) 15 s in 94 instead
    of 161 ms, whisper-small (768) in 0.8 instead of 1.7 s.
    """
    threads = torch.get_num_threads()
    if DEVICE != "cpu" or encoder.width < NARROW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def say_device():
    shared = f"; {WORLD} processes share the work" if WORLD > 1 else ""
    print(f"device: {DEVICE} ({torch.get_num_threads()} threads), because {WHY_DEVICE}{shared}")


def is_out_of_memory(error):
    """Whether an error of torch says so: not all that do are OutOfMemoryErrors."""
    said = str(error)
    is_one = isinstance(error, torch.OutOfMemoryError)
    return is_one or any(sign in said for sign in SIGNS_OF_WANT)


def want_of_memory(error):
    """What is said of a torch.OutOfMemoryError that nothing could be done about."""
    return (
        f"the GPU's memory does not suffice ({first_line(error)}); `plan` says what fits: a "
        "smaller --batch-size, a smaller LLM, --bits 4, --head-bits 4 --embeddings host; or close "
        "what else uses the GPU"
    )


@contextmanager
def stop_signals():
    """Yields a list that is no longer empty when Ctrl-C or SIGTERM asked to stop.

    The step is finished and saved first. A second Ctrl-C stops at once.
    """
    asked, before = [], {}

    def ask(number, _):
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_codes(processes):
    """Wait until all have ended. Ctrl-C reaches them by itself, SIGTERM is passed on.

    KeyboardInterrupt if they were asked to stop.
    """
    with stop_signals() as asked:
        told = False
        while any(process.poll() is None for process in processes):
            if signal.SIGTERM in asked and not told:
                told = True
                for process in processes:
                    process.terminate()
            time.sleep(0.2)
    if asked:
        raise KeyboardInterrupt
    return [process.returncode for process in processes]
