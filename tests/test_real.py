"""The commands of docs/real.md on real input: real speech, the real whisper-tiny.en encoder, the real Qwen2.5 tokenizer on a small random-weight Qwen2."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoints import save_llm
from conftest import ROOT, shared

from data import read_manifest
from files import read_json, read_jsonl
from mtbi import RECIPES

SHORTER = {"imitate": ["--max-new-tokens", "8", "--per-utterance", "3"], "bench": ["--max-new-tokens", "8"], "generate": ["--max-new-tokens", "8"]}


def mtbi(argv, **options):
    return subprocess.run([sys.executable, "mtbi.py", *argv], cwd=ROOT, capture_output=True, text=True, **options)


def kaldi_folder(manifest, folder):
    """The 400 training sentences as speechocean762 itself comes: a Kaldi folder with transcripts in capitals."""
    rows = [row for _, row in read_jsonl(manifest) if row["split"] == "train"]
    folder.mkdir()
    for name, column in (("wav.scp", lambda row: manifest.parent / row["audio_filepath"]), ("text", lambda row: row["text"].upper()),
                         ("utt2spk", lambda row: row["speaker"])):
        (folder / name).write_text("".join(f"{Path(row['audio_filepath']).stem}\t{column(row)}\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """{command: its arguments} as docs/real.md writes them, with what is on this machine in place of the public names."""
    from transformers import AutoTokenizer
    folder = tmp_path_factory.mktemp("real")
    corpus = shared("data/speechocean")
    llm = save_llm(folder / "llm", "qwen2", AutoTokenizer.from_pretrained(shared("tokenizers/qwen2.5-instruct")), sure=10)
    here = {"speechocean762/train": kaldi_folder(corpus / "manifest.jsonl", folder / "train"), "facebook/wav2vec2-base-960h": "tiny",
            "Qwen/Qwen2.5-0.5B-Instruct": llm, "openai/whisper-tiny.en": shared("models/whisper-tiny.en"), "question.wav": next(corpus.glob("*.flac")),
            "runs/real/data": folder / "run/data", "runs/real": folder / "run"}
    block = re.search(r"```sh\n(python mtbi.py prepare speechocean762.*?)```", (ROOT / "docs" / "real.md").read_text(encoding="utf-8"), re.S)[1]
    lines = [shlex.split(line)[2:] for line in block.splitlines()]
    return {argv[0]: [str(here.get(word, word)) for word in argv] + SHORTER.get(argv[0], []) for argv in lines}


def test_the_documented_commands_run_on_real_input_resume_and_say_what_they_did(commands):
    assert list(commands) == ["prepare", "align", "imitate", "train", "bench", "generate", "info"]
    run, said = commands["imitate"][commands["imitate"].index("--out") + 1], {}
    for name, argv in commands.items():
        if name == "train":
            kill_when_a_state_is_saved([*argv, "--save-every", "50"], f"{run}/mtbi/state/00000050.safetensors")
        done = mtbi(argv)
        said[name] = done.stdout
        print(f"$ python mtbi.py {shlex.join(argv)}\n{done.stdout}")
        assert done.returncode == 0, done.stderr
    rows = read_manifest(f"{run}/data/manifest.jsonl")
    assert len(rows) == 400 and {u.split for u in rows} == {"train", "test"} and sum(bool(u.words) for u in rows) > 390
    losses = [row["loss"] for _, row in read_jsonl(f"{run}/mtbi/log.jsonl")]
    print(f"loss: {sum(losses[:5]) / 5:.2f} (first five steps) -> {sum(losses[-20:]) / 20:.2f} nats/token (last twenty)")
    assert len(losses) == 200 and sum(losses[-20:]) / 20 < 0.8 * sum(losses[:5]) / 5
    assert "resuming at step 50" in said["train"] and read_json(f"{run}/report.json")["meta"]["llm_is_4_bit"]
    for name, words in (("prepare", "check the audio: "), ("align", "align 400 utterances: "), ("imitate", "imitate: "), ("train", "train mtbi: "),
                        ("bench", "bench mtbi: ")):
        assert re.search(re.escape(words) + r"\d+\.\d s", said[name]), name
    assert "50.0 frames/s" in said["train"] and "speech tokens/s" in said["train"]
    assert all(word in said["info"] for word in ("whisper-tiny.en", "NF4", "with word times", "steps 200 of 200", "scores"))


def test_every_recipe_trains_and_is_measured_with_a_real_encoder_and_a_real_tokenizer(tmp_path):
    """The rows of the table, compared as in the tiny world: human speech, whisper-tiny.en, SmolLM2 in 4 bits (random weights), tasks.toml."""
    from transformers import AutoTokenizer
    llm = save_llm(tmp_path / "llm", "smollm", AutoTokenizer.from_pretrained(shared("tokenizers/smollm2-135m-instruct")), sure=10, brief=4)
    done = mtbi(["compare", "--out", str(tmp_path), "--seeds", "1", "--no-curve", "--llm", str(llm), "--encoder", str(shared("models/whisper-tiny.en")),
                 "--asr", "tiny", "--speech", str(shared("data/fsdd") / "manifest.jsonl"), "--join", "3:6", "--count", "64", "--steps", "2",
                 "--batch-size", "8", "--per-prompt", "1", "--dialogues", "2", "--probes", "4"])
    assert done.returncode == 0, done.stderr
    report = read_json(tmp_path / "report.json")
    assert not report["meta"]["failures"] and list(report["quadrants"]) == ["text", "cascade", *(n for n, r in RECIPES.items() if r.connector)]
    for name, row in report["training"].items():
        adapter = tmp_path / "seed-0" / name / "adapter" / "adapter_model.safetensors"
        assert row["audio_seconds"] > 0 and row["trained_parameters"] > 0 and adapter.exists() == (RECIPES[name].lora > 0)
        assert all(cell["n"] == 1 for cell in [*report["quadrants"][name].values(), *report["dialogues"][name].values()])


def kill_when_a_state_is_saved(argv, state):
    process = subprocess.Popen([sys.executable, "mtbi.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(state):
        assert process.poll() is None, "the training ended before a state was saved"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
