"""Shared pieces: the shipped tiny models, a little rendered speech, and the real data of MTBI_SHARED where it is there.

The environment variable MTBI_SHARED names a folder with data/fsdd (Free Spoken Digit Dataset), data/speechocean (sentences of speechocean762) and
data/ljspeech, each with a manifest.jsonl, models/whisper-tiny.en, and tokenizers/qwen2.5-instruct and tokenizers/smollm2-135m-instruct, all from Hugging Face
or GitHub.
"""

import os
import random
import sys
from pathlib import Path

import pytest

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
        terminalreporter.write_line(f"NOTE: no real speech or real models at {SHARED}: the tests that need them were skipped (set MTBI_SHARED)", red=True)


@pytest.fixture(scope="session")
def spec():
    return {"llm": "tiny", "bits": 4, "encoder": "tiny", "pad_whisper": False, "connector": "stack-mlp", "k": 6, "hidden": 64, "lora": 0}


@pytest.fixture(scope="session")
def llm():
    from model import load_llm
    return load_llm("tiny", 4)


@pytest.fixture(scope="session")
def encoder():
    from model import SpeechEncoder
    return SpeechEncoder("tiny")


@pytest.fixture
def model(spec, llm, encoder):
    """The tiny LLM in NF4, the tiny encoder, a fresh connector."""
    from model import SpeechLLM
    return SpeechLLM.build(spec, llm, encoder).train(False)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A small prepared data folder of rendered speech."""
    import mtbi
    out = tmp_path_factory.mktemp("tiny") / "data"
    assert mtbi.main(["prepare", "tiny", "--out", str(out), "--train", "48", "--test", "16"]) == 0
    return out


@pytest.fixture(scope="session")
def utterances(data):
    from data import read_manifest
    return read_manifest(data / "manifest.jsonl")


@pytest.fixture(scope="session")
def frames(utterances, encoder, data):
    from features import encode_all
    return encode_all(encoder, utterances, data / "features")


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A run folder with behaviors."""
    import mtbi
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert mtbi.main(["imitate", str(data), "--out", str(out), "--per-utterance", "2"]) == 0
    return out


@pytest.fixture
def rng():
    return random.Random(0)
