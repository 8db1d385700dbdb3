"""The command `word-times`: when each word of a transcript was said, by CTC forced alignment.

spell every word in the CTC vocabulary -> align the letters with the frames -> spans of words
-> subtract the delay with which a CTC head names a letter -> let words meet midway
"""

import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from corpora.recognizing import RecognizerOptions, train_recognizer
from data import SAMPLE_RATE, is_mark, load_audio, read_manifest
from model import load_encoder
from support.console import progress_bar, threads_for, timed
from support.files import UserError, fingerprint_of_file, first_line, read_json_if_whole
from support.files import write_json, write_jsonl
from support.hub import absolute_if_local
from support.options import called
from support.runs import lock_folder

# Mean probability of the letters aligned; the tiny encoder gives unheard espeak-ng voices 0.9 and
# more, human ones 0.5 and less.
UNDERSTOOD = 0.75
PAUSE = 0.05  # seconds


@dataclass
class WordTimesOptions:
    manifest: called("MANIFEST")
    """a JSONL manifest, or a data folder made by `prepare`"""
    out: str | None = None
    """the manifest to write; default: in a data folder made by `prepare` that manifest itself,
    elsewhere NAME-aligned.jsonl beside it"""
    asr: str = "tiny"
    """the CTC model: `tiny`, a local folder, or a Hugging Face name"""
    encoder: str | None = None
    """of a data folder: first train a recognizer for it on this speech encoder (DATA/recognizer),
    and align with that"""
    force: bool = False
    """do it again, also for rows that have word times (default: those are kept)"""


# ---- the command ----


def add_word_times(options):
    """Add word times to the rows of a manifest that have none, by CTC forced alignment.

    Interleaving needs them.
    """
    manifest, out = where_to_read_and_write(options)
    in_place = out.resolve() == manifest.resolve()
    asr = options.asr
    if options.encoder:
        if not is_made_by_prepare(manifest):
            raise UserError(
                f"--encoder: {manifest} is in no data folder; make one with `prepare` first"
            )
        own = RecognizerOptions(str(manifest.parent), options.encoder, force=options.force)
        asr = str(train_recognizer(own))
    with lock_folder(manifest.parent) if in_place else nullcontext():
        utterances = read_manifest(manifest)
        todo = [u for u in utterances if options.force or not u.words]
        if not todo:
            print(
                f"{manifest}: all {len(utterances)} utterances have word times already; --force "
                "makes them anew"
            )
            return
        encoder = load_ctc_model(asr)
        with timed(f"word times of {len(todo)} utterances"), threads_for(encoder):
            sure, failed = align_all(encoder, todo)
        if in_place:
            write_jsonl(out, [u.row(out.parent) for u in utterances])
        else:
            write_own(out, [u.row(out.parent) for u in utterances])
    tell_word_times(out, utterances, sure, failed)


def where_to_read_and_write(options):
    """(the manifest to read, the one to write); UserError if that would overwrite what is given.

    In a data folder made by `prepare` nothing is lost by adding to its manifest.
    """
    manifest = Path(options.manifest)
    if manifest.is_dir():
        manifest = manifest / "manifest.jsonl"
    ours = is_made_by_prepare(manifest)
    if options.out:
        out = Path(options.out)
    elif ours:
        out = manifest
    else:
        out = manifest.with_name(f"{manifest.stem}-aligned.jsonl")
    if out.resolve() == manifest.resolve() and not ours:
        raise UserError(
            f"--out {out}: would overwrite the manifest it is made from; choose another name"
        )
    if out.resolve() != manifest.resolve():
        refuse_others(out)
    return manifest, out


def refuse_others(out):
    """UserError if there is a file at `out` that is not as an earlier run of this command left it.

    Its fingerprint is in .NAME.made.json beside it.
    """
    if not os.path.lexists(out):
        return
    made = read_json_if_whole(record_of(out), "fingerprint")
    if not made or made["fingerprint"] != fingerprint_of_file(out):
        raise UserError(
            f"{out}: is there already, and not as `word-times` left it; move it away, or name "
            "another with --out"
        )


def write_own(out, rows):
    """A manifest, and beside it what tells later that it is this command's own."""
    write_jsonl(out, rows)
    write_json(record_of(out), {"fingerprint": fingerprint_of_file(out)})


def record_of(out):
    return out.with_name(f".{out.name}.made.json")


def is_made_by_prepare(manifest):
    config = read_json_if_whole(manifest.parent / "config.json", "command")
    return manifest.name == "manifest.jsonl" and bool(config) and config["command"] == "prepare"


def load_ctc_model(name):
    """An encoder with a CTC head and that head's tokenizer; UserError if it has none."""
    encoder = load_encoder(absolute_if_local(name))
    if not encoder.can_transcribe:
        raise UserError(
            f"--asr {name}: has no CTC head to align with; name a CTC model, like "
            "facebook/wav2vec2-base-960h"
        )
    return encoder


def align_all(encoder, utterances):
    """Fill in the `words` of utterances, and measure their durations.

    What cannot be aligned keeps the word times that it had. Returns (for each that was aligned the
    mean probability of its characters, for each other one what was wrong).
    """
    sure, failed = [], []
    for u in progress_bar(utterances, desc="word times", unit="utt"):
        try:
            samples = load_audio(u.audio, u.duration)
            duration = len(samples) / SAMPLE_RATE
            frames = encoder(samples, u.audio)
            u.words, score = word_times(encoder, frames, u.text, duration, pauses_in(samples))
            u.duration = duration  # with its words: those that it had are of the one that it had
            sure.append(score)
        except UserError as error:
            failed.append(f"{u.audio}: {error}")
    return sure, failed


def tell_word_times(out, utterances, sure, failed):
    """How many utterances have word times now, and whether they can be trusted."""
    there = sum(bool(u.words) for u in utterances)
    said = f"{out}: {there} of {len(utterances)} utterances have word times"
    if failed:
        said += (
            f"; {len(failed)} could not be aligned, and are never interleaved if they had no times "
            f"before, the first: {failed[0]}"
        )
    print(said)
    if sure and np.mean(sure) < UNDERSTOOD:
        print(
            "the CTC model gives the transcripts' characters a mean probability of only "
            f"{np.mean(sure):.2f}: it hardly understands this speech, so the times are rough; run "
            "`word-times` again with --force and a CTC model for it, like "
            "--asr facebook/wav2vec2-base-960h"
        )


# ---- one utterance ----


def word_times(encoder, frames, text, duration, pauses=()):
    """([[word, start_s, end_s], ...], mean probability of its characters) of one utterance.

    frames: (T, D_encoder), which the encoder made of `duration` seconds of audio; pauses: as
    pauses_in finds them in it. Numbers and
    letters the CTC vocabulary lacks are aligned with a token that stands for any sound. UserError
    if the transcript has nothing to align, or does not fit the audio.
    """
    tokenizer, words = encoder.ctc_tokenizer, text.split()
    scores = encoder.ctc(frames)  # (T, V_ctc)
    any_sound = scores.shape[1]  # a token after those of the vocabulary,
    as_likely_as_can_be = torch.zeros(len(scores), 1)  # log-probability 0 in every frame
    scores = torch.cat([scores, as_likely_as_can_be], dim=1)  # (T, V_ctc + 1)

    spelled = []
    for word in words:
        spelled.append([any_sound if i is None else i for i in spell(tokenizer, word)])
    delimiter = word_delimiter(tokenizer)
    targets = join_spellings(spelled, delimiter)
    spans = align_with_frames(scores, targets, tokenizer.pad_token_id, duration)

    seconds_a_frame = duration / len(frames)
    times = times_of_words(spelled, spans, 0 if delimiter is None else 1, seconds_a_frame)
    fill_gaps(times, duration)
    times = said_earlier(times, encoder.ctc_delay)
    meet_midway(times, pauses)

    known = [span.score for span in spans if span.token != any_sound]
    score = float(np.mean(known)) if known else 0.0
    return [[word, start, end] for word, (start, end) in zip(words, times)], score


# -- spelling: from words to CTC tokens --


def spell(tokenizer, word):
    """CTC token ids of a word; None stands for digits or letters that the vocabulary lacks.

    Of punctuation alone: [].
    """
    ids = []
    # accents and vowel signs belong to the letters, which the pattern does not know
    as_letters = "".join("a" if is_mark(letter) else letter for letter in word)
    for found in re.finditer(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+", as_letters):
        piece = word[found.start() : found.end()]
        ids += known_letters(tokenizer, piece) or [None]
    return ids


def known_letters(tokenizer, piece):
    """CTC token ids of a run of letters or digits, small or capital as the vocabulary has them.

    [] if it has none of them.
    """
    unknown, delimiter = tokenizer.unk_token_id, word_delimiter(tokenizer)

    def spell_as(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [i for i in ids if i != delimiter]

    def lost(ids):
        return ids.count(unknown) if ids else len(piece)

    spellings = [spell_as(text) for text in (piece.lower(), piece.upper(), piece)]
    known = [i for i in min(spellings, key=lost) if i != unknown]
    tokens = "".join(tokenizer.convert_ids_to_tokens(known))
    says_something = any(c.isalnum() for c in tokens)  # a space alone says nothing
    return known if says_something else []


def word_delimiter(tokenizer):
    """The token between words, "|" in wav2vec 2.0's vocabulary; None in one that has none."""
    return getattr(tokenizer, "word_delimiter_token_id", None)


def join_spellings(spelled, delimiter):
    """The token ids of a whole transcript, with the delimiter between words, if there is one."""
    targets = []
    for ids in spelled:
        if ids and targets and delimiter is not None:
            targets.append(delimiter)
        targets += ids
    return targets


# -- alignment: from CTC tokens to frames, from frames to seconds --


def align_with_frames(scores, targets, blank, duration):
    """The most likely path of the targets through the frames: for each its span of frames.

    scores: (T, V) log-probabilities. By torchaudio.functional.forced_align and merge_tokens, which
    come from Pratap et al. (arXiv 2305.13516, section 3.1), as does a token for any sound.
    """
    from torchaudio.functional import forced_align, merge_tokens

    if not targets:
        raise UserError("its transcript has no letters and no digits")
    try:
        path, path_scores = forced_align(
            scores[None], torch.tensor([targets], dtype=torch.int32), blank=blank
        )  # (1, T), (1, T)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the transcript does not fit the audio: {len(targets)} characters in "
            f"{duration:.2f} s ({first_line(error)})"
        ) from None
    return merge_tokens(path[0], path_scores[0].exp(), blank=blank)


def times_of_words(spelled, spans, between, seconds_a_frame):
    """[start_s, end_s] of each word, from its first token's span to its last; None if it has none.

    between: how many tokens stand between two words.
    """
    times, at = [], 0
    for ids in spelled:
        if not ids:
            times.append(None)
            continue
        first, last = spans[at], spans[at + len(ids) - 1]
        times.append([first.start * seconds_a_frame, last.end * seconds_a_frame])
        at += len(ids) + between
    return times


def fill_gaps(times, duration):
    """Give a word of punctuation alone the time between its neighbours."""
    for i, time in enumerate(times):
        if time is None:
            before = times[i - 1][1] if i else 0.0
            after = next((later[0] for later in times[i + 1 :] if later), duration)
            times[i] = [before, after]


def said_earlier(times, delay):
    """Word times without the delay (seconds) of the CTC head."""
    return [[max(0.0, start - delay), max(0.0, end - delay)] for start, end in times]


def meet_midway(times, pauses):
    """Close the gaps: CTC peaks are short, so words are made to meet midway between them.

    Where there is a pause between two words, they meet in the middle of the longest.
    """
    for a, b in zip(times, times[1:]):
        middle, longest = (a[1] + b[0]) / 2, 0.0
        for start, end in pauses:
            start, end = max(start, a[1]), min(end, b[0])
            if end - start > longest:
                middle, longest = (start + end) / 2, end - start
        a[1] = middle
        b[0] = middle


def pauses_in(samples):
    """[(start_s, end_s)] of the pauses: PAUSE seconds or more that are 40 dB below the loud parts.

    samples: (n,) at SAMPLE_RATE. Loudness is the root mean square of 10 ms.
    """
    hop = SAMPLE_RATE // 100
    n = len(samples) // hop
    loudness = np.sqrt((samples[: n * hop].reshape(n, hop) ** 2).mean(1))  # (n,)
    if not n:
        return []
    silent = loudness < 0.01 * np.percentile(loudness, 95)  # (n,)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(int)))
    pauses = []
    for start, end in edges.reshape(-1, 2):  # where silence begins and ends
        if end - start >= 100 * PAUSE:
            pauses.append((start / 100, end / 100))
    return pauses
