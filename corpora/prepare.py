"""The command `prepare`: from any common corpus, or the tiny world, to DATA/manifest.jsonl.

rows of a reader -> Utterances, checked -> the split -> (strings of words) -> the manifest
"""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from corpora.joining import join_words, parse_join
from corpora.readers import download_librispeech, find_rows
from corpora.rendering import render_tiny
from data import as_compared, held_out, read_manifest
from support.console import timed
from support.files import UserError, fingerprint, relative, write_jsonl
from support.options import Between, Count, Positional, Seed, called, names_in
from support.recordings import LONGEST, MAX_SECONDS, audio_name, get, says_its_length
from support.runs import begin, finish, is_done, lock_folder

MANIFEST = "manifest.jsonl"
TEST_ONLY = "--test-only: every row is held out"


@dataclass
class PrepareOptions:
    source: called("SOURCE")
    """`tiny`, `librispeech`, a manifest or table, or a folder: see above"""
    out: str
    """the data folder to write"""
    part: Positional[str | None] = None
    """librispeech: which part, like dev-clean (337 MB) or train-clean-100 (6.3 GB)"""
    force: bool = False
    """do it again, whatever is there"""
    seed: Seed = 0
    """seed of every random choice"""

    # recordings
    download_to: str = "datasets"
    """librispeech: the folder it is downloaded to, and found in the next time"""
    max_seconds: Annotated[float, Between(0.1, LONGEST)] = MAX_SECONDS
    """a longer recording is a bad row, here and for every later command"""
    skip_bad: bool = False
    """leave bad rows out and list them in skipped.jsonl, instead of stopping"""
    test_speakers: str = ""
    """speakers to hold out, separated by commas; default: the manifest's split, or one transcript
    in eight"""
    test_only: bool = False
    """hold out every row: a test set, for `bench`"""

    # strings of single words
    join: str = ""
    """make strings of single-word recordings of one speaker, fewest:most words, like 3:6; default:
    rows as they are"""
    count: Count = 1500
    """how many such strings"""
    one_go: bool = False
    """join them as tightly as people speak who say a string in one go: no silence around the words,
    three joins in five without a pause; those for training also in other speeds, loudnesses and
    noises"""

    # tiny
    train: Count = 1500
    """tiny: training utterances to render"""
    test: Count = 300
    """tiny: held-out utterances to render, in held-out voices"""

    MAKES: ClassVar = (
        MANIFEST,
        "skipped.jsonl",
        f"audio/{5 * '[0-9]'}.flac",  # joined words
        f"audio/train-{5 * '[0-9]'}.wav",  # tiny
        f"audio/test-{5 * '[0-9]'}.wav",
    )
    CHANGES_NOTHING: ClassVar = ("out", "download_to")


# ---- the command ----


def prepare(options):
    """Check speech and transcripts of a common corpus, and write DATA/manifest.jsonl.

    SOURCE: `tiny` renders speech with espeak-ng; `librispeech PART` downloads a part of
    LibriSpeech, like dev-clean; or a JSONL manifest, a Common Voice TSV, LJSpeech's metadata.csv, a
    folder of LibriSpeech, a Kaldi folder, or a folder of sound files with .txt beside.
    """
    lengths = parse_join(options.join)
    refuse_contradictions(options)
    if options.source == "tiny":
        prepare_tiny(options)
    else:
        prepare_recordings(options, lengths)


def refuse_contradictions(options):
    """UserError for options that do not go together."""
    tiny, librispeech = options.source == "tiny", options.source == "librispeech"
    if tiny and (options.join or options.test_speakers or options.skip_bad):
        raise UserError("prepare tiny: --join, --test-speakers and --skip-bad are for recordings")
    if librispeech and not options.part:
        raise UserError("prepare librispeech: name a part, like dev-clean or train-clean-100")
    if options.part and not librispeech:
        raise UserError(f"prepare {options.source} {options.part}: only librispeech has parts")
    if options.one_go and not options.join:
        raise UserError("prepare --one-go: is how words are joined; say --join, like --join 3:6")
    if options.test_only and options.test_speakers:
        raise UserError("--test-only holds out every speaker: leave --test-speakers out")


def prepare_tiny(options):
    """Speech that espeak-ng renders; it comes with word times."""
    n_train = options.train
    why = "tiny world: held-out sentences in held-out voices"
    if options.test_only:
        n_train = 0
        why = TEST_ONLY

    def make():
        with timed("render speech"):
            return render_tiny(Path(options.out), n_train, options.test, options.seed)

    # None: has no effect here
    used = replace(options, train=n_train, count=None, max_seconds=None)
    if not is_prepared(used, {}):
        make_manifest(used, {}, make, why)


def prepare_recordings(options, lengths):
    """Recorded speech; lengths: (fewest, most) words of the strings to make of it, or None."""
    out, source = Path(options.out), options.source
    if options.part:
        source = download_librispeech(options.part, options.download_to)
    what, path, rows = find_rows(source)
    if (out / MANIFEST).resolve() == path.resolve():
        raise UserError(
            f"--out {out}: would overwrite the manifest it is made from; choose another folder"
        )
    used = replace(
        options,
        source=relative(path, out),  # so that both can be moved together
        part=None,  # is in the path
        train=None,  # has no effect here
        test=None,
    )
    content = {"rows": fingerprint(rows)}
    if is_prepared(used, content):
        return
    print(f"{path}: {what}, {len(rows)} rows")
    utterances, skipped = check_rows(path, rows, options)
    lower_capitals(utterances)
    speakers = named_speakers(options.test_speakers, utterances)
    why = fill_in_split(utterances, speakers, options.test_only, joined=bool(lengths))
    if not lengths:
        utterances = leave_out_tested(utterances)

    def make():
        if options.skip_bad:
            report_skipped(out, skipped)
        if not lengths:
            return utterances
        with timed("join words"):
            return join_words(utterances, lengths, options, out)

    make_manifest(used, content, make, why)


def named_speakers(text, utterances):
    """The speakers that --test-speakers names; one whose own name has a comma comes alone."""
    text = text.strip()
    if text and text in {u.speaker for u in utterances}:
        return [text]
    names = names_in(text)
    if text and not names:
        raise UserError(f"--test-speakers {text}: names no speaker")
    return names


def is_prepared(options, content):
    """True, and says so, if OUT was prepared with these options; UserError if with others."""
    # half-way nothing is kept that would be used again: only the manifest counts
    if not is_done(options.out, "prepare", options, content, MANIFEST, half_way=MANIFEST):
        return False
    print(f"{options.out}: is prepared already")
    skipped = Path(options.out) / "skipped.jsonl"
    if getattr(options, "skip_bad", False) and skipped.exists():
        print(f"what --skip-bad left out is in {skipped}; once it is mended, --force reads it")
    return True


def make_manifest(options, content, make, why):
    """Write OUT/manifest.jsonl from the utterances that make() gives, in one process at a time.

    why: what decided the split.
    """
    out = Path(options.out)
    with lock_folder(out):
        if is_prepared(options, content):  # by another process, while this one checked the audio
            return
        (out / MANIFEST).unlink(missing_ok=True)
        begin(out, "prepare", options, content)
        utterances = make()
        write_jsonl(out / MANIFEST, [u.row(out) for u in utterances])
        finish(out, "prepare", options, content)
    minutes = sum(u.duration for u in utterances) / 60
    splits = dict(Counter(u.split for u in utterances))
    timed_words = sum(bool(u.words) for u in utterances)
    print(
        f"{out / MANIFEST}: {len(utterances)} utterances, {minutes:.1f} minutes; "
        f"{splits} ({why}); {timed_words} with word times"
    )


# ---- rows: checked, and their capitals ----


def check_rows(path, rows, options):
    """(the utterances, the bad rows that were skipped); UserError for a bad row otherwise."""
    skipped = []
    with timed("check the audio"):
        utterances = read_manifest(
            path,
            rows,
            check_audio=True,
            skipped=skipped if options.skip_bad else None,
            max_seconds=options.max_seconds,
        )
    tell_unknown_lengths(rows, utterances)
    return utterances, skipped


def tell_unknown_lengths(rows, utterances):
    """Count the files of which nothing says whether they are whole: neither they nor their row."""
    said = {audio_name(row) for _, row in rows if isinstance(row, dict) and get(row, "duration")}
    unknown = [u for u in utterances if u.id not in said and not says_its_length(u.audio)]
    if unknown:
        print(
            f"{len(unknown)} files whose true length cannot be known (MP3 without a Xing header), "
            f"the first: {unknown[0].audio}"
        )


def report_skipped(out, skipped):
    """List the bad rows in OUT/skipped.jsonl, and count them by their reasons."""
    for row in skipped:
        for key, value in row.items():
            if isinstance(value, str):  # a name on disk may be no UTF-8
                row[key] = value.encode(errors="backslashreplace").decode()
    write_jsonl(out / "skipped.jsonl", skipped)
    # a reason up to where it becomes particular: a number in brackets, a name, a line
    reasons = Counter(re.split(r" \(|,| '| line ", row["reason"])[0] for row in skipped)
    counts = "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common())
    print(f"{len(skipped)} rows left out, listed in {out / 'skipped.jsonl'}: {counts}")


def lower_capitals(utterances):
    """Transcripts that are all in capitals, as LibriSpeech's are, in small letters.

    An LLM reads those in fewer tokens.
    """
    if any(u.text != u.text.upper() for u in utterances):
        return
    if all(u.text == u.text.lower() for u in utterances):  # no letters that have capitals
        return
    print(
        "all transcripts are in capitals: they are put in small letters, which an LLM reads in "
        "fewer tokens"
    )
    for u in utterances:
        u.text = u.text.lower()
        if u.words:
            u.words = [[word.lower(), start, end] for word, start, end in u.words]


# ---- the split ----


def fill_in_split(utterances, test_speakers=(), test_only=False, joined=False):
    """Decide the `split` of every utterance, "train" or "test"; returns what decided it, in words.

    UserError if that cannot be decided, or leaves nothing for training where no test set was asked
    for, or nothing for testing.
    """
    if test_only:
        for u in utterances:
            u.split = "test"
        return TEST_ONLY
    given = any(u.split for u in utterances)
    check_splits(utterances, given, test_speakers, joined)
    if test_speakers:
        why = f"speakers held out: {', '.join(test_speakers)}"
        for u in utterances:
            u.split = "test" if u.speaker in test_speakers else "train"
    elif given:
        why = "the manifest's own split"
    else:
        why = (
            "no split in the manifest and no --test-speakers: one transcript in eight is held "
            "out, by a hash of its words"
        )
        for u in utterances:
            u.split = "test" if held_out(u.text) else "train"
    splits = {u.split for u in utterances}
    test_set = splits == {"test"} and given and not test_speakers  # the manifest says so
    if splits != {"train", "test"} and not test_set:
        raise UserError(
            f"all {len(utterances)} utterances are for {utterances[0].split}ing; name speakers to "
            "hold out with --test-speakers, or hold out every row with --test-only"
        )
    return why


def check_splits(utterances, given, test_speakers, joined):
    """UserError if the rows and the options do not say enough, or name nobody, to hold out."""
    speakers = {u.speaker for u in utterances}
    for speaker in test_speakers:
        if speaker not in speakers:
            there = ", ".join(sorted(speakers)[:20]) or "none"
            raise UserError(f"--test-speakers: there is no speaker {speaker!r}; there are {there}")
    if test_speakers:
        return
    n_given = sum(bool(u.split) for u in utterances)
    if given and n_given < len(utterances):
        raise UserError(
            f"'split' is given for {n_given} of {len(utterances)} rows; give it for all or none, "
            "or name --test-speakers"
        )
    if joined and not given:
        raise UserError(
            "--join needs recordings for training and for testing; name the speakers to hold out "
            "with --test-speakers, or hold out every row with --test-only"
        )


def leave_out_tested(utterances):
    """The utterances without training rows whose transcript is tested.

    UserError if that leaves no training rows; a test set has none from the start.
    """
    training = [u for u in utterances if u.split == "train"]
    tested = {as_compared(u.text) for u in utterances if u.split == "test"}
    left_out = [u for u in training if as_compared(u.text) in tested]
    if not left_out:
        return utterances
    print(f"{len(left_out)} training rows left out, because their transcript is tested")
    if len(left_out) == len(training):
        raise UserError(
            "no training rows are left: every transcript is also spoken by a held-out speaker"
        )
    return [u for u in utterances if u.split == "test" or as_compared(u.text) not in tested]
