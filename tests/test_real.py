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


def kill_when_a_state_is_saved(argv, state):
    process = subprocess.Popen([sys.executable, "mtbi.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not os.path.exists(state):
        assert process.poll() is None, "the training ended before a state was saved"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
