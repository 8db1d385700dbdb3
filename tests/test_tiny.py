"""The tiny world: what is said, how it sounds, and what its LLM knows."""

import random
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from data import ask, chat_parts, held_out, transcript_tokens
from model import SpeechLLM
from tiny import speech, world
from examples import load_tasks


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**9))
def test_every_task_that_applies_has_an_answer(seed):
    utterance = world.draw(random.Random(seed))
    tasks = load_tasks(world.TASKS_TOML)
    assert set(tasks) == set(world.ANSWERS)
    answers = {name: world.ANSWERS[name](utterance) for name, task in tasks.items() if task.applies(utterance.words)}
    assert len(answers) >= 13 and all(a and a == " ".join(a.split()) for a in answers.values())
    assert answers["repeat"] == utterance.words and utterance.words.split()[-1] == answers["last_word"]
    assert held_out(utterance.words) == world.is_held_out(utterance), "the tiny LLM's held-out texts are the benchmark's"


def test_some_answers_by_hand():
    u = world.Sentence(("farmer",), "sold", "three", "red", "apples", "in", "market", "yesterday", "spt")
    assert u.words == "the farmer sold three red apples in the market yesterday"
    said = {name: world.ANSWERS[name](u) for name in ("translate", "negate", "future", "question", "who", "where", "when", "category")}
    assert said == {"translate": "el granjero vendió tres manzanas rojas en el mercado ayer",
                    "negate": "the farmer did not sell three red apples in the market yesterday",
                    "future": "the farmer will sell three red apples in the market tomorrow",
                    "question": "who sold three red apples in the market yesterday",
                    "who": "the farmer", "where": "in the market", "when": "yesterday", "category": "food"}
    d = world.Digits(("three", "nine", "zero", "five"))
    assert [world.ANSWERS[n](d) for n in ("sort", "reverse", "largest", "parity", "numerals")] == \
        ["zero three five nine", "five zero nine three", "nine", "odd", "3 9 0 5"]


def test_the_world_has_the_tasks_and_prompts_it_promises():
    tasks = load_tasks(world.TASKS_TOML)
    assert len(tasks) >= 20 and sum(t.split == "unseen" for t in tasks.values()) >= 8
    assert all(len(t.prompts) + len(t.unseen_prompts) >= 8 and len(t.unseen_prompts) == 3 for t in tasks.values())


def test_word_times_are_where_the_words_are():
    voice = {"voice": "en-us+m1", "rate": 160, "pitch": 50, "range": 50}
    audio, rate, words = speech.speak("in the kitchen seven apples", voice)
    assert [w for w, _, _ in words] == "in the kitchen seven apples".split()
    assert words[0][1] < 0.1 and all(a[2] == b[1] for a, b in zip(words, words[1:])) and words[-1][2] <= len(audio) / rate

    # "seven" begins with a hiss, "apples" with a vowel
    def hiss(start, end):
        spectrum = np.abs(np.fft.rfft(audio[int(start * rate):int(end * rate)]))
        return spectrum[len(spectrum) // 3:].sum() / spectrum.sum()
    seven, apples = words[3], words[4]
    assert hiss(seven[1], seven[1] + 0.08) > 2 * hiss(apples[1], apples[1] + 0.08)


def test_a_seed_gives_the_same_speech_today_and_tomorrow():
    """Breathy voices too, whose noise espeak-ng seeds by the clock; what was spoken before in the same process matters, so it takes two processes."""
    script = """
import hashlib
from tiny import speech
voices = [{"voice": f"en-us+{name}", "rate": 160, "pitch": 50, "range": 50} for name in ("sandro", "victor", "m1")]
print(hashlib.sha256(b"".join(speech.speak("three red apples", voice)[0].tobytes() for voice in voices)).hexdigest())"""
    said = []
    for _ in range(2):
        said.append(subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        time.sleep(1.1)                                            # the clock ticks in seconds
    assert said[0] == said[1]


def test_the_benchmarks_voices_are_not_the_training_voices():
    assert not set(speech.TRAIN_VARIANTS) & set(speech.TEST_VARIANTS)
    rng = random.Random(0)
    for split in ("train", "test"):
        audio, words, voice = speech.render("three five nine", rng, split)
        assert voice["voice"].split("+")[1] in speech.variants(split) and words[-1][2] < len(audio) / speech.SAMPLE_RATE
        assert 0.1 < np.abs(audio).max() <= 1


@pytest.mark.parametrize("hesitations", [False, True])
def test_the_tiny_llm_in_4_bits_answers_held_out_sentences(llm, hesitations):
    from tiny.pretrain import hesitate
    assert llm[0].is_loaded_in_4bit
    model, tasks, rng, rows = SpeechLLM(*llm), load_tasks(world.TASKS_TOML), random.Random(1), []
    stream = world.draws("test", held_out=True)
    for _ in range(12):
        u = next(stream)
        rows += [(u, t, rng.choice(t.prompts + t.unseen_prompts)) for t in tasks.values() if t.applies(u.words)]
    texts = [hesitate(rng, u.words) if hesitations else u.words for u, _, _ in rows]
    answers = model.generate([chat_parts(model.tokenizer, ask(p), [[transcript_tokens(model.tokenizer, text)]]) for (_, _, p), text in zip(rows, texts)])
    right = [a == world.ANSWERS[t.name](u) for a, (u, t, _) in zip(answers, rows)]
    assert np.mean(right) >= (0.9 if hesitations else 0.95), [(p, text, a) for (_, _, p), text, a, ok in zip(rows, texts, answers, right) if not ok][:5]


def test_pretraining_reads_the_prompt_just_as_the_product_writes_it(llm):
    from tiny.pretrain import tokenize
    _, tokenizer = llm
    ids, labels = tokenize(tokenizer, [
        {"role": "user", "content": "Who did it?\nthe farmer sold three red apples"}, {"role": "assistant", "content": "the farmer"}])
    parts = chat_parts(tokenizer, ask("Who did it?"), [[transcript_tokens(tokenizer, "the farmer sold three red apples")]])
    prompt = [i for p in parts for i in p.ids]
    assert ids[:len(prompt)] == prompt and labels[:len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode([i for i in labels if i != -100]) == "the farmer<|im_end|>"


def test_the_checkpoints_are_small_and_have_a_card():
    files = list((ROOT / "tiny" / "llm").glob("*.safetensors")) + list((ROOT / "tiny" / "encoder").glob("*.safetensors"))
    assert len(files) == 2 and sum(f.stat().st_size for f in files) <= 16e6
    card = (ROOT / "tiny" / "README.md").read_text(encoding="utf-8")
    assert "python -m tiny.pretrain" in card and re.search(r"WER", card)


def test_the_llm_knows_what_was_said_before_but_takes_a_second_utterance_for_the_first(llm, rng):
    """Of two turns, true answers to a question about the same utterance, and about a second one: the second is no use in the tiny world, which is known."""
    from data import dialogue
    model, tasks, stream, right = SpeechLLM(*llm), load_tasks(ROOT / "tiny" / "tasks.toml"), world.draws("second", True), {True: [], False: []}
    for again in right:
        rows, truths = [], []
        for _ in range(200):
            first = next(stream)
            second = first if again else next(stream)
            asked = [rng.choice([t for t in tasks.values() if t.applies(u.words)]) for u in (first, second)]
            answers = [world.ANSWERS[t.name](u) for t, u in zip(asked, (first, second))]
            heard = [[transcript_tokens(model.tokenizer, u.words)] for u in ((first,) if again else (first, second))]
            rows.append(chat_parts(model.tokenizer, dialogue([(rng.choice(asked[0].prompts), answers[0])], rng.choice(asked[1].prompts), again), heard))
            truths.append(answers[1])
        right[again] = [a == b for a, b in zip(model.generate(rows), truths)]
    share = {again: sum(hits) / len(hits) for again, hits in right.items()}
    print(f"true answers in a second turn: {share[True]:.1%} about the same utterance, {share[False]:.1%} about a second one")
    assert share[True] > 0.9 and share[False] < 0.5
