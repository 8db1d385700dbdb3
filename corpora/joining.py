"""Strings of single words: longer utterances with exact word times, made from recorded words."""

import random
from pathlib import Path

import numpy as np

from data import SAMPLE_RATE, Utterance, held_out, load_audio, write_audio
from support.console import progress_bar
from support.files import UserError, explained
from support.recordings import check_length, check_text_fits
from tiny.speech import as_recorded

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
        samples, times = say(rng, words, options.one_go, split)
        seconds = len(samples) / SAMPLE_RATE
        with explained(f"--join {options.join}: a string of {len(words)} words cannot be made"):
            check_length(seconds, None, options.max_seconds)
            check_text_fits(text, seconds)
        path = Path(out) / "audio" / f"{n:05d}.flac"
        write_audio(path, samples)
        made.append(Utterance(path, text, seconds, speaker, split, times))
    return made


def say(rng, recordings, one_go, split):
    """(samples, word times) of recordings as one string.

    Before each word is a pause of 50 to 250 ms; or, with one_go, they follow each other as in
    speech, and those for training are varied.
    """
    words = [(u.text, load_audio(u.audio, u.duration)) for u in recordings]
    if not one_go:
        return lay_out(words, [rng.uniform(0.05, 0.25) for _ in words])
    samples, times = spoken_in_one_go(rng, words)
    return varied(rng, samples, times) if split == "train" else (samples, times)


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


def lay_out(words, pauses):
    """(samples at SAMPLE_RATE, [[word, start_s, end_s], ...]) of recordings one after the other.

    pauses: for each word the seconds before it; less than nothing: it is cross-faded so long with
    the end of the word before, and the times of the two meet in the middle.
    """
    samples, spans = np.zeros(0, dtype=np.float32), []  # spans: from, to, in samples
    before = 0  # samples of the word before
    for (_, sound), pause in zip(words, pauses):
        gap = int(pause * SAMPLE_RATE)
        shared = min(max(0, -gap), before // 2, len(sound) // 2)  # samples of both words
        before = len(sound)
        if shared:
            rising = np.linspace(0.0, 1.0, shared, dtype=np.float32)
            mixed = samples[-shared:] * (1 - rising) + sound[:shared] * rising
            samples = np.concatenate([samples[:-shared], mixed, sound[shared:]])
            spans[-1][1] -= shared / 2
        else:
            silence = np.zeros(max(0, gap), dtype=np.float32)
            samples = np.concatenate([samples, silence, sound])
        spans.append([len(samples) - len(sound) + shared / 2, len(samples)])
    times = []
    for (text, _), (start, end) in zip(words, spans):
        times.append([text, start / SAMPLE_RATE, end / SAMPLE_RATE])
    return samples, times


# ---- as people say several words in one go ----


def spoken_in_one_go(rng, words):
    """lay_out of words without the silence around them; three joins in five have no pause.

    words: [(text, samples at SAMPLE_RATE)].
    """
    pauses = [rng.uniform(0.0, 0.1)]
    for _ in words[1:]:
        tight = rng.random() < 0.6
        pauses.append(-rng.uniform(0.0, 0.06) if tight else rng.uniform(0.02, 0.25))
    trimmed = [(text, without_silence(sound)) for text, sound in words]
    return lay_out(trimmed, pauses)


def without_silence(samples, threshold=0.05, margin=0.01):
    """The samples between the first and the last loud window of 10 ms, and a margin in seconds.

    Loud: at least the threshold of the loudest window.
    """
    window = SAMPLE_RATE // 100
    whole = samples[: len(samples) // window * window].reshape(-1, window)  # (windows, window)
    if not len(whole):
        return samples
    loudness = np.sqrt((whole**2).mean(1))  # (windows,)
    loud = np.flatnonzero(loudness >= threshold * loudness.max())
    margin = round(margin * SAMPLE_RATE)
    start = max(0, loud[0] * window - margin)
    return samples[start : (loud[-1] + 1) * window + margin]


def varied(rng, samples, times):
    """lay_out's result in another room: faster or slower, louder or softer, with noise.

    Speed 0.85 to 1.25, which moves the pitch along; the loudest sample 0.2 to 0.9; white noise 12
    to 40 dB below the speech.
    """
    import torch
    from torchaudio.functional import resample

    played = 200 * round(SAMPLE_RATE * rng.uniform(0.85, 1.25) / 200)  # Hz; coarse, to be quick
    samples = resample(torch.from_numpy(samples), played, SAMPLE_RATE).numpy()
    speed = played / SAMPLE_RATE
    times = [[word, start / speed, end / speed] for word, start, end in times]
    return as_recorded(rng, samples, loudest=(0.2, 0.9), below=(12, 40)), times
