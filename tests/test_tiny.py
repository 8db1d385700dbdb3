"""The tiny world: what is said, how it sounds, and what its LLM knows."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data import chat_parts, dialogue, held_out, load_tasks, transcript_tokens, user_turn
from model import SpeechLLM
from tiny import pretrain, speech, world
from tiny.pretrain import parse_arguments, refuse_others_files
from tiny.pretrain_data import blend_hesitations, hesitate, tokenize

TASKS = load_tasks(world.TASKS_TOML)


def tasks_for(utterance):
    return [task for task in TASKS.values() if task.applies(utterance.words)]


# ---- what is said ----


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_every_task_that_applies_has_an_answer(seed):
    utterance = world.draw(random.Random(seed))
    assert set(TASKS) == set(world.ANSWERS)
    answers = {task.name: world.ANSWERS[task.name](utterance) for task in tasks_for(utterance)}
    fewest = {"sentence": 13, "digits": 11, "directive": 6}
    assert len(answers) >= fewest[world.kind_of(utterance)]
    assert all(a and a == " ".join(a.split()) for a in answers.values())
    assert answers["repeat"] == utterance.words
    assert answers["last_word"] == utterance.words.split()[-1]


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_the_tiny_llms_held_out_texts_are_the_benchmarks(seed):
    utterance = world.draw(random.Random(seed))
    assert held_out(utterance.words) == world.is_held_out(utterance)


def test_some_answers_about_a_sentence_by_hand():
    u = world.Sentence(
        ("farmer",), "sold", "three", "red", "apples", "in", "market", "yesterday", "spt"
    )
    assert u.words == "the farmer sold three red apples in the market yesterday"
    expected = {
        "translate": "el granjero vendió tres manzanas rojas en el mercado ayer",
        "negate": "the farmer did not sell three red apples in the market yesterday",
        "future": "the farmer will sell three red apples in the market tomorrow",
        "question": "who sold three red apples in the market yesterday",
        "who": "the farmer",
        "where": "in the market",
        "when": "yesterday",
        "category": "food",
    }
    assert {name: world.ANSWERS[name](u) for name in expected} == expected


def test_some_answers_about_digits_by_hand():
    u = world.Digits(("three", "nine", "zero", "five"))
    expected = {
        "sort": "zero three five nine",
        "reverse": "five zero nine three",
        "largest": "nine",
        "parity": "odd",
        "numerals": "3 9 0 5",
    }
    assert {name: world.ANSWERS[name](u) for name in expected} == expected


def test_some_answers_about_a_directive_by_hand():
    """It is content like any other; what it asks for is its reply, for where it is the prompt."""
    u = world.Directive(
        "which is larger two or five", "cuál es mayor dos o cinco", "five", "question"
    )
    expected = {
        "repeat": "which is larger two or five",
        "translate": "cuál es mayor dos o cinco",
        "request": "question",
        "last_word": "five",
        "word_count": "6",
    }
    assert {name: world.ANSWERS[name](u) for name in expected} == expected
    assert u.reply == "five"


def test_the_world_has_the_tasks_and_prompts_it_promises():
    assert set(world.read_task_table()) == set(TASKS)
    assert len(TASKS) >= 20
    assert sum(task.split == "unseen" for task in TASKS.values()) >= 8
    for task in TASKS.values():
        assert len(task.unseen_prompts) == 3
        assert len(task.prompts) + len(task.unseen_prompts) >= 8


# ---- how it sounds ----


def test_word_times_are_where_the_words_are():
    voice = {"voice": "en-us+m1", "rate": 160, "pitch": 50, "range": 50}
    audio, rate, words = speech.speak("in the kitchen seven apples", voice)
    assert [w for w, _, _ in words] == "in the kitchen seven apples".split()
    assert words[0][1] < 0.1
    assert all(a[2] == b[1] for a, b in zip(words, words[1:]))
    assert words[-1][2] <= len(audio) / rate

    def hiss(start):
        """The share of high frequencies in the first 0.08 s of a word."""
        first = audio[int(start * rate) : int((start + 0.08) * rate)]
        spectrum = np.abs(np.fft.rfft(first))
        return spectrum[len(spectrum) // 3 :].sum() / spectrum.sum()

    # "seven" begins with a hiss, "apples" with a vowel
    seven, apples = words[3], words[4]
    assert hiss(seven[1]) > 2 * hiss(apples[1])


def test_a_seed_gives_the_same_speech_today_and_tomorrow():
    """Breathy voices too, whose noise espeak-ng seeds by the clock.

    What was spoken before in the same process matters, so it takes two processes.
    """
    script = """
import hashlib
from tiny import speech
heard = hashlib.sha256()
for name in ("sandro", "victor", "m1"):
    voice = {"voice": f"en-us+{name}", "rate": 160, "pitch": 50, "range": 50}
    heard.update(speech.speak("three red apples", voice)[0].tobytes())
print(heard.hexdigest())"""
    first, second = (
        subprocess.run(
            [sys.executable, "-c", f"import time; time.sleep({wait})\n{script}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for wait in (0, 1.1)  # the clock ticks in seconds
    )
    assert first == second != ""


def test_the_benchmarks_voices_are_not_the_training_voices():
    assert not set(speech.TRAIN_VARIANTS) & set(speech.TEST_VARIANTS)
    rng = random.Random(0)
    for split in ("train", "test"):
        audio, words, voice = speech.render("three five nine", rng, split)
        assert voice["voice"].split("+")[1] in speech.variants(split)
        assert words[-1][2] < len(audio) / speech.SAMPLE_RATE
        assert 0.1 < np.abs(audio).max() <= 1


# ---- what its LLM knows ----


@pytest.mark.parametrize("hesitations, share", [(False, 0.95), (True, 0.9)])
def test_the_tiny_llm_in_4_bits_answers_held_out_sentences(llm, hesitations, share):
    assert llm[0].is_loaded_in_4bit
    model, rng = SpeechLLM(*llm), random.Random(1)
    stream, rows = world.draws("test", held_out=True), []
    for _ in range(12):
        u = next(stream)
        for task in tasks_for(u):
            rows.append((u, task, rng.choice(task.prompts + task.unseen_prompts)))

    conversations, wrong = [], []
    for u, _, prompt in rows:
        text = hesitate(rng, u.words) if hesitations else u.words
        audio = [[transcript_tokens(model.tokenizer, text)]]
        conversations.append(chat_parts(model.tokenizer, user_turn(prompt), audio))
    for (u, task, prompt), answer in zip(rows, model.generate(conversations)):
        if answer != world.ANSWERS[task.name](u):
            wrong.append((prompt, u.words, answer))
    assert len(wrong) <= (1 - share) * len(rows), wrong[:5]


def test_pretraining_reads_the_prompt_just_as_the_product_writes_it(llm):
    _, tokenizer = llm
    transcript = "the farmer sold three red apples"
    messages = [
        {"role": "user", "content": f"Who did it?\n{transcript}"},
        {"role": "assistant", "content": "the farmer"},
    ]
    ids, labels = tokenize(tokenizer, messages)
    parts = chat_parts(
        tokenizer, user_turn("Who did it?"), [[transcript_tokens(tokenizer, transcript)]]
    )
    prompt = [i for part in parts for i in part.ids]
    assert ids[: len(prompt)] == prompt
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode([i for i in labels if i != -100]) == "the farmer<|im_end|>"


def test_text_without_hesitations_stays_as_it_is_and_answers_always_do():
    """Where a row hesitates, half the time what is read is blended and noisy."""
    torch.manual_seed(0)
    ids = torch.tensor([[5, 7, 5, 7], [5, 9, 5, 7]] * 50)  # (B, T); 9 is a hesitation
    labels = torch.tensor([[-100, -100, -100, 7]] * 100)
    embeds = torch.randn(100, 4, 8)  # (B, T, D)
    blended = blend_hesitations(embeds, ids, labels, torch.tensor([9]))
    changed = (blended != embeds).any(-1)  # (B, T)
    assert not changed[0::2].any() and not changed[:, 3].any()
    rows = changed[1::2, :3]
    assert 0.3 < rows.float().mean() < 0.7
    assert torch.equal(rows.any(1), rows.all(1))


def test_a_pretraining_that_was_killed_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed in its second phase, after a state; of the states nothing is left at the end."""
    monkeypatch.setattr(pretrain, "LLM_PHASES", [(2, 3e-3, 0.6, {}), (3, 1e-3, 0.0, {})])
    monkeypatch.setattr(pretrain, "SAVE_EVERY", 1)
    pretrain.pretrain_llm(tmp_path / "whole", seed=0)

    steps_taken, take_step = [], pretrain.take_step

    def killed_in_the_fifth_step(*args):
        steps_taken.append(1)
        if len(steps_taken) == 5:
            raise MemoryError("killed")
        take_step(*args)

    with monkeypatch.context() as once:
        once.setattr(pretrain, "take_step", killed_in_the_fifth_step)
        with pytest.raises(MemoryError):
            pretrain.pretrain_llm(tmp_path / "cut", seed=0)
    pretrain.pretrain_llm(tmp_path / "cut", seed=0)
    made = [tmp_path / name / "llm" / "model.safetensors" for name in ("whole", "cut")]
    assert made[0].read_bytes() == made[1].read_bytes()
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["llm"]


def test_pretraining_writes_over_nobodys_folder(tmp_path):
    (tmp_path / "llm").mkdir()
    with pytest.raises(SystemExit, match="choose another --out"):
        refuse_others_files(tmp_path, ("llm", "encoder"))
    refuse_others_files(tmp_path, ("encoder",))
    (tmp_path / "measured.json").write_text("{}")
    refuse_others_files(tmp_path, ("llm", "encoder"))
    (tmp_path / "measured.json").unlink()
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(SystemExit, match="README.md: is there already"):
        refuse_others_files(tmp_path, ("encoder",))


@pytest.mark.parametrize("only", ["llm", "encoder"])
def test_the_command_that_was_stopped_is_not_refused(tmp_path, monkeypatch, only):
    """What it had begun to write is its own."""
    begun = []

    def stopped(out, *_):
        begun.append(out)
        (out / only).mkdir(exist_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain, f"pretrain_{only}", stopped)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--out", str(tmp_path / "out"), "--only", only])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            pretrain.main()
    assert begun == 2 * [tmp_path / "out"]


@pytest.mark.parametrize("again", [True, False])
def test_the_llm_knows_what_was_said_before_and_tells_two_utterances_apart(llm, rng, again):
    """True answers in a second turn, about the same utterance or about a second one."""
    model, stream = SpeechLLM(*llm), world.draws("second", held_out=True)

    def two_turns():
        """(conversation, the true answer to its second question)."""
        first = next(stream)
        second = first if again else next(stream)
        before, then = (rng.choice(tasks_for(u)) for u in (first, second))
        heard = [first] if again else [first, second]
        earlier = [(rng.choice(before.prompts), world.ANSWERS[before.name](first))]
        messages = dialogue(earlier, rng.choice(then.prompts), again)
        audio = [[transcript_tokens(model.tokenizer, u.words)] for u in heard]
        return chat_parts(model.tokenizer, messages, audio), world.ANSWERS[then.name](second)

    conversations, truths = zip(*(two_turns() for _ in range(200)))
    hits = [a == b for a, b in zip(model.generate(conversations), truths)]
    print(f"true answers in a second turn: {sum(hits) / len(hits):.1%}")
    assert sum(hits) / len(hits) > 0.9


def test_a_directive_is_obeyed_where_it_is_the_prompt(llm):
    """But for what one can only know from having read it, like what comes before six."""
    model, stream = SpeechLLM(*llm), world.draws("obeyed", held_out=True, kind="directive")
    directives, conversations = [], []
    while len(directives) < 100:
        u = next(stream)
        if not world.ASKS_FOR_A_FACT.match(u.words):
            directives.append(u)
    for u in directives:
        conversations.append(chat_parts(model.tokenizer, dialogue([], u.words, True), []))
    hits = []
    for u, answer in zip(directives, model.generate(conversations)):
        hits.append(answer == u.reply)
    assert sum(hits) >= 95


# ---- the checkpoints ----


def test_nobody_replaces_the_checkpoints_without_naming_their_folder(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain"])
    with pytest.raises(SystemExit):
        parse_arguments()
    assert "name a folder with --out" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["pretrain", "--measure"])
    assert parse_arguments().out == ROOT / "tiny"


def test_the_checkpoints_are_small_and_have_a_card():
    files = [*(ROOT / "tiny/llm").glob("*.safetensors")]
    files += [*(ROOT / "tiny/encoder").glob("*.safetensors")]
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) <= 16e6
    card = (ROOT / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "python -m tiny.pretrain" in card
    assert re.search(r"WER", card)
