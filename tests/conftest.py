"""Shared pieces: the shipped tiny models, a little rendered speech, a run trained for a moment, and
the real data of MTBI_SHARED where it is there.

The environment variable MTBI_SHARED names a folder with data/fsdd (Free Spoken Digit Dataset),
data/speechocean (sentences of speechocean762) and data/ljspeech, each with a manifest.jsonl,
models/whisper-tiny.en, and tokenizers/qwen2.5-instruct and tokenizers/smollm2-135m-instruct, all
from Hugging Face or GitHub.
"""

import os
import random
import shutil
import socket
import sys
from pathlib import Path

# Two workers of pytest-xdist share two cores; what they start has one thread, too. Before torch.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from filelock import FileLock
from hypothesis import settings

settings.register_profile("here", deadline=None)  # a busy machine is no failure
settings.load_profile("here")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("MTBI_SHARED", ROOT.parent / "shared"))


def shared(path):
    """A file or folder of the real test data; skips, saying so, where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"real data not found: {SHARED / path} (set MTBI_SHARED)")
    return SHARED / path


def pytest_terminal_summary(terminalreporter):
    if not SHARED.exists():
        terminalreporter.write_line(
            f"NOTE: no real speech or real models at {SHARED}: the tests that need them were "
            "skipped (set MTBI_SHARED)",
            red=True,
        )


@pytest.fixture(scope="session", autouse=True)
def one_thread_a_worker():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Nothing here may ask for anything beyond this machine."""
    real = socket.socket.connect

    def connect(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            assert address[0] in ("127.0.0.1", "::1", "localhost"), f"the network: {address}"
        return real(self, address)

    socket.socket.connect = connect
    yield
    socket.socket.connect = real


# ---- models ----


@pytest.fixture(scope="session")
def spec():
    return {
        "llm": "tiny",
        "bits": 4,
        "encoder": "tiny",
        "pad_whisper": False,
        "connector": "stack-mlp",
        "k": 6,
        "hidden": 64,
        "lora": 0,
    }


@pytest.fixture(scope="session")
def llm():
    from model import load_llm

    return load_llm("tiny", 4)


@pytest.fixture(scope="session")
def encoder():
    from model import load_encoder

    return load_encoder("tiny")


@pytest.fixture
def model(spec, llm, encoder):
    """The tiny LLM in NF4, the tiny encoder, a fresh connector."""
    from model import SpeechLLM

    return SpeechLLM.build(spec, llm, encoder).train(False)


# ---- speech, and runs made of it ----


def mtbi(*words):
    """A command of mtbi.py, which must do what it is asked."""
    from mtbi import main

    assert main([str(word) for word in words]) == 0, words


def made_once(factory, name, make):
    """A folder of the worker's own, a copy of what make(folder) makes once for all workers."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    made = base / name
    with FileLock(base / f"{name}.lock"):
        if not made.exists():
            making = made.with_name(f"{name}-half-made")
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir()
            make(making)
            making.rename(made)
    return shutil.copytree(made, factory.mktemp(name) / name)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """FOLDER/data with a little speech, FOLDER/run with behaviors."""

    def make(folder):
        mtbi("prepare", "tiny", "--out", folder / "data", "--train", 48, "--test", 16)
        mtbi("behaviors", folder / "data", "--out", folder / "run", "--per-utterance", 2)

    return made_once(tmp_path_factory, "world", make)


@pytest.fixture(scope="session")
def data(world):
    """A small prepared data folder of rendered speech."""
    return world / "data"


@pytest.fixture(scope="session")
def utterances(data):
    from data import read_manifest

    return read_manifest(data / "manifest.jsonl")


@pytest.fixture(scope="session")
def frames(utterances, encoder, data):
    from model import encode_all

    return encode_all(encoder, utterances, data / "features")


@pytest.fixture(scope="session")
def run(world):
    """A run folder with behaviors."""
    return world / "run"


FEW_TASKS = ROOT / "tests" / "few_tasks.toml"  # of both splits, 24 prompts
A_SMALL_BENCH = "--per-prompt 1 --dialogues 2 --probes 4 --mistakes 3 --max-new-tokens 8".split()


@pytest.fixture(scope="session")
def trained_world(tmp_path_factory, world):
    """FOLDER/data with its frames; FOLDER/run with `mtbi`, and `asr` with an adapter, trained for
    a moment on few tasks."""

    def make(folder):
        shutil.copytree(world / "data", folder / "data")
        run, short = folder / "run", ("--steps", 2, "--batch-size", 8)
        few = ("--per-utterance", 1, "--tasks", FEW_TASKS)
        mtbi("behaviors", folder / "data", "--out", run, *few)
        mtbi("train", run, "--recipe", "mtbi", *short, "--hidden", 32)
        adapter = ("--connector", "qformer", "--lora", 2, "--hidden", 16)
        mtbi("train", run, "--recipe", "asr", *short, *adapter)

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture(scope="session")
def benched_world(tmp_path_factory, trained_world):
    """The same, benchmarked."""

    def make(folder):
        shutil.copytree(trained_world, folder, dirs_exist_ok=True)
        mtbi("bench", folder / "run", *A_SMALL_BENCH)

    return made_once(tmp_path_factory, "benched", make)


@pytest.fixture
def rng():
    return random.Random(0)
