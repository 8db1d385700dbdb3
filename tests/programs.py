"""Commands as programs of their own, and what they say: shared by the tests."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from support.files import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]


def program(words, env=None, wait=True):
    """Python with these words, in the project's folder, on one thread.

    wait: until it has ended; then `.said` holds its output and errors, in the order they came.
    """
    process = subprocess.Popen(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if wait:
        process.said = process.communicate()[0]
    return process


def python(code, *words, env=None, wait=True):
    """A program of its own from a text; `words` are its sys.argv[1:]."""
    return program(["-c", code, *words], env, wait)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def begun_anew(run, folder):
    """A copy FOLDER/run of a run folder: its behaviors are there, and nothing is trained."""
    new = Path(folder) / "run"
    new.mkdir(parents=True)
    shutil.copy(run / "behaviors.jsonl", new)
    config = read_json(run / "config.json")
    config["options"]["data"] = str((run / config["options"]["data"]).resolve())
    write_json(new / "config.json", config)
    return new


def one_line(capsys, *needed):
    """The one line that a command said on stderr when it refused; it holds all of `needed`."""
    said = capsys.readouterr().err
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith("mtbi: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    assert all(text in lines[0] for text in needed), lines[0]
    return lines[0]
