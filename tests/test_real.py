"""The commands of docs/real.md on real input.

Real speech, the real encoder of whisper-tiny.en, the real tokenizers of Qwen2.5 and SmolLM2, on
small random-weight LLMs.
"""

import re
import shlex
import time
import tomllib
from pathlib import Path

import pytest
import transformers
from checkpoints import save_llm
from conftest import ROOT, shared
from programs import program

import lab.demo
import lab.jobs
from app.serve import Page
from app.systems import Systems
from data import read_manifest
from mtbi import RECIPES, main
from support.files import read_json, read_jsonl

# The same commands, done sooner.
SHORTER = {
    "behaviors": "--max-new-tokens 6 --per-utterance 2",
    "train": "--steps 40",  # of two, the later one counts
    "bench": "--per-prompt 1 --max-new-tokens 6 --dialogues 4 --probes 8",
    "generate": "--max-new-tokens 6",
}
KILLED_AT = 10  # steps
SENTENCES = 48


def write_kaldi_folder(rows, corpus, folder):
    """Sentences as speechocean762 itself comes: a Kaldi folder with transcripts in capitals."""
    files = {"wav.scp": [], "text": [], "utt2spk": []}
    for row in rows:
        name = Path(row["audio_filepath"]).stem
        files["wav.scp"].append(f"{name}\t{corpus / row['audio_filepath']}\n")
        files["text"].append(f"{name}\t{row['text'].upper()}\n")
        files["utt2spk"].append(f"{name}\t{row['speaker']}\n")
    folder.mkdir()
    for name, lines in files.items():
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder


def what_is_here(folder):
    """{public name: what stands for it on this machine}; the shortest sentences."""
    corpus = shared("data/speechocean")
    rows = [row for _, row in read_jsonl(corpus / "manifest.jsonl")]
    rows.sort(key=lambda row: row["duration"])
    train = [row for row in rows if row["split"] == "train"][:SENTENCES]
    test = [row for row in rows if row["split"] == "test"][:8]
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared("tokenizers/qwen2.5-instruct"))
    return {
        "speechocean762/train": write_kaldi_folder(train, corpus, folder / "train"),
        "speechocean762/test": write_kaldi_folder(test, corpus, folder / "test"),
        "facebook/wav2vec2-base-960h": "tiny",
        "Qwen/Qwen2.5-0.5B-Instruct": save_llm(folder / "llm", "qwen2", tokenizer, sure=10),
        "openai/whisper-tiny.en": shared("models/whisper-tiny.en"),
        "question.wav": min(corpus.glob("*.flac")),
        "runs/real/data": folder / "run" / "data",
        "runs/real/testset": folder / "run" / "testset",
        "runs/real": folder / "run",
    }


def documented_commands(here):
    """[words] of the commands about runs/real in docs/real.md, shortened."""
    page = (ROOT / "docs" / "real.md").read_text(encoding="utf-8")
    commands = []
    for line in page.splitlines():
        if line.startswith("python mtbi.py") and "runs/real" in line:
            name, *words = shlex.split(line)[2:]
            words = [str(here.get(word, word)) for word in words]
            commands.append([name, *words, *SHORTER.get(name, "").split()])
    return commands


def kill_when_a_state_is_saved(words, state):
    process = program(["mtbi.py", *words], wait=False)
    while not state.exists():
        assert process.poll() is None, f"ended before a state was saved: {process.stdout.read()}"
        time.sleep(0.05)
    process.kill()
    process.communicate()


def test_the_documented_commands_run_on_real_input_resume_and_say_what_they_did(tmp_path, capsys):
    commands = documented_commands(what_is_here(tmp_path))
    names = [words[0] for words in commands]
    assert names[:7] == "prepare word-times behaviors train bench generate info".split()
    assert names[7:] == "prepare bench encode".split()
    run, said = tmp_path / "run", {}
    for name, *words in commands:
        if name == "train":
            state = run / "mtbi" / "state" / f"{KILLED_AT:08d}.safetensors"
            kill_when_a_state_is_saved([name, *words, "--save-every", KILLED_AT], state)
        assert main([name, *words]) == 0, capsys.readouterr().err
        said.setdefault(name, capsys.readouterr().out)
    for words in commands[:7]:  # for `pytest -rP`
        print(f"$ python mtbi.py {shlex.join(words)}\n{said[words[0]]}")

    rows = read_manifest(run / "data" / "manifest.jsonl")
    assert len(rows) == SENTENCES
    assert {u.split for u in rows} == {"train", "test"}
    assert sum(bool(u.words) for u in rows) > 0.95 * SENTENCES
    assert f"resuming at step {KILLED_AT}" in said["train"]
    check_loss(run / "mtbi" / "log.jsonl")
    assert read_json(run / "report.json")["meta"]["llm_is_4_bit"]
    for name, words in (
        ("prepare", "check the audio: "),
        ("word-times", f"word times of {SENTENCES} utterances: "),
        ("behaviors", "behaviors: "),
        ("train", "train mtbi: "),
        ("bench", "bench mtbi: "),
    ):
        assert re.search(re.escape(words) + r"\d+\.\d s", said[name]), said[name]
    assert "50.0 frames/s" in said["train"]
    assert "speech tokens/s" in said["train"]
    for words in ("whisper-tiny.en", "NF4", "with word times", "steps 40 of 40", "gains"):
        assert words in said["info"]
    assert (run / "on" / "testset" / "report.md").exists()


def check_loss(log):
    """It has fallen, all steps are there once, and none was skipped."""
    losses = [row["loss"] for _, row in read_jsonl(log)]
    first, last = sum(losses[:5]) / 5, sum(losses[-10:]) / 10
    print(f"loss: {first:.2f} (first five steps) -> {last:.2f} nats/token (last ten)")
    assert len(losses) == 40
    assert last < 0.9 * first


def write_few_tasks(path):
    """Some tasks of tasks.toml, with two prompts of each kind."""
    table = tomllib.loads((ROOT / "tasks.toml").read_text(encoding="utf-8"))
    lines = []
    for name in ("repeat", "continue", "translate_german", "topic", "first_word", "title"):
        lines.append(f"[{name}]")
        for key, value in table[name].items():
            few = value[:2] if isinstance(value, list) else value
            lines.append(f"{key} = {few!r}")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.mark.parametrize("half", [0, 1])
def test_every_recipe_trains_and_is_measured_with_a_real_encoder_and_a_real_tokenizer(
    half, tmp_path
):
    """The rows of the table, compared as in the tiny world, in two halves.

    Human speech, whisper-tiny.en, SmolLM2 in 4 bits (random weights), tasks of tasks.toml.
    """
    names = [name for name, recipe in RECIPES.items() if recipe.connector][half::2]
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        shared("tokenizers/smollm2-135m-instruct")
    )
    llm = save_llm(tmp_path / "llm", "smollm", tokenizer, sure=10, brief=4)
    words = ["compare", "--out", tmp_path / "out", "--recipes", ",".join(names), "--seeds", 1]
    words += ["--speech", shared("data/fsdd") / "manifest.jsonl", "--join", "3:6", "--count", 40]
    words += ["--llm", llm, "--encoder", shared("models/whisper-tiny.en"), "--asr", "tiny"]
    words += ["--tasks", write_few_tasks(tmp_path / "tasks.toml"), "--no-curve", "--jobs", 1]
    words += "--steps 2 --batch-size 8 --per-prompt 1 --dialogues 2 --probes 4".split()
    assert main([str(word) for word in words]) == 0

    report = read_json(tmp_path / "out" / "report.json")
    assert not report["meta"]["failures"]
    measured = dict.fromkeys(row["system"] for row in report["scores"])
    assert list(measured) == ["text", "copy", "cascade", *names]
    for row in report["scores"]:
        # there are no directives in this corpus, and copy is no model and reads nothing
        measured = row["measure"] != "anchor rate" and row["system"] != "copy"
        assert row["runs"] == 1 or not measured
    assert [row["system"] for row in report["training"]] == names
    for row in report["training"]:
        folder = tmp_path / "out" / "seed-0" / row["system"]
        adapter = folder / "adapter" / "adapter_model.safetensors"
        assert row["audio_seconds"] > 0
        assert row["trained_parameters"] > 0
        assert adapter.exists() == (RECIPES[row["system"]].lora > 0)

    # and the page answers with each, and the text LLM
    run = tmp_path / "out" / "seed-0"
    page = Page(Systems(run, list(RECIPES), 4, asr="tiny"))
    clip = next(u.audio for u in read_manifest(run / "data" / "manifest.jsonl"))
    *_, (turns, *chats) = page.ask([], "Repeat this.", str(clip), "one two three")
    assert [*turns[0].answers] == page.systems.names() == [*names, "cascade", "text"]
    assert not any(turns[0].notices.values()) and len(chats) == len(names) + 2


def test_the_demo_on_human_voices_holds_a_speaker_out(tmp_path, capsys, monkeypatch):
    short = {
        "prepare": ["--join", "3:4", "--count", "60"],
        "behaviors": ["--per-utterance", "1"],
        "train": ["--steps", "2", "--batch-size", "8", "--k", "12"],
        "bench": ["--per-prompt", "1", "--dialogues", "1", "--probes", "2"],
    }
    monkeypatch.setattr(lab.demo, "SHORT_DIGITS", short)
    monkeypatch.setattr(lab.jobs, "jobs_that_fit", lambda tiny: (1, "because this is a test"))
    words = ["demo", "digits", "--short", "--out", tmp_path / "run"]
    words += ["--speech", shared("data/fsdd") / "manifest.jsonl"]
    words += ["--encoder", shared("models/whisper-tiny.en"), "--test-speaker", "george"]
    assert main([str(word) for word in words]) == 0
    said = capsys.readouterr().out
    assert "held out from everything: george" in said and "mtbi.py serve" in said
    speakers = {"train": set(), "test": set()}
    for u in read_manifest(tmp_path / "run" / "data" / "manifest.jsonl"):
        speakers[u.split].add(u.speaker)
    assert speakers["test"] == {"george"} and "george" not in speakers["train"]
    assert main([*map(str, words[:-1]), "nobody"]) == 2
    assert "--test-speaker nobody: there are george" in capsys.readouterr().err
