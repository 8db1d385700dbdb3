"""Strings of single words: longer utterances with exact word times, made from recorded words."""

import random
from pathlib import Path

import numpy as np

from data import SAMPLE_RATE, Utterance, held_out, load_audio, write_audio
from support.console import progress_bar
from support.files import UserError, explained
from support.recordings import check_length, check_text_fits

TRIES = 1000  # draws of a string before it is said that there are too few words


def parse_join(text):
    """The fewest and the most words of a string: "3:6" -> (3, 6); None for an empty text."""
    if not text:
        return None
    low, _, high = text.partition(":")
    numbers = low.isdecimal() and high.isdecimal() and len(high) < 5
    if not numbers or not 1 <= int(low) <= int(high):
        raise UserError(f"--join {text}: give the fewest and the most words, like 3:6")
    return int(low), int(high)


def join_words(utterances, lengths, options, out):
    """options.count new utterances, their audio in OUT/audio, each of recordings of one speaker.

    lengths: (fewest, most) words. One string in five is for testing: from test recordings, with a
    text that held_out() holds out; all are, where every recording is for testing. UserError if a
    recording is of more than one word, or a string longer than options.max_seconds.
    """
    rng, made = random.Random(f"join-{options.seed}"), []
    pools = pools_by_speaker(utterances)
    for n in progress_bar(range(options.count), desc="join words", unit="utt"):
        tested = n % 5 == 4 or not pools["train"]
        split = "test" if tested else "train"
        speaker = rng.choice(sorted(pools[split]))
        words, text = draw_words(rng, pools[split][speaker], lengths, split)
        samples, times = lay_out(rng, words)
        seconds = len(samples) / SAMPLE_RATE
        with explained(f"--join {options.join}: a string of {len(words)} words cannot be made"):
            check_length(seconds, None, options.max_seconds)
            check_text_fits(text, seconds)
        path = Path(out) / "audio" / f"{n:05d}.flac"
        write_audio(path, samples)
        made.append(Utterance(path, text, seconds, speaker, split, times))
    return made


def pools_by_speaker(utterances):
    """{"train": {speaker: the recordings}, "test": likewise}."""
    pools = {"train": {}, "test": {}}
    for u in utterances:
        if " " in u.text:
            raise UserError(f"--join wants recordings of single words, but {u.id} says {u.text!r}")
        pools[u.split].setdefault(u.speaker, []).append(u)
    return pools


def draw_words(rng, recordings, lengths, split):
    """(recordings, what they say together), which must be a text of this split."""
    for _ in range(TRIES):
        n_words = rng.randint(*lengths)
        words = [rng.choice(recordings) for _ in range(n_words)]
        text = " ".join(u.text for u in words)
        if held_out(text) == (split == "test"):
            return words, text
    raise UserError(
        "--join: too few words to make different strings for training and for testing (speaker "
        f"{recordings[0].speaker!r}); make longer strings"
    )


def lay_out(rng, words):
    """(samples at SAMPLE_RATE, [[word, start_s, end_s], ...]) of recordings one after the other.

    Before each word is a pause of 50 to 250 ms.
    """
    pieces, times, at = [], [], 0  # at: samples so far
    for u in words:
        pause = np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE), dtype=np.float32)
        samples = load_audio(u.audio, u.duration)
        start = at + len(pause)
        at = start + len(samples)
        pieces += [pause, samples]
        times.append([u.text, start / SAMPLE_RATE, at / SAMPLE_RATE])
    return np.concatenate(pieces), times
