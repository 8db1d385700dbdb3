"""From any corpus to DATA/manifest.jsonl: readers of common corpora, the split, strings of single words, and word times.

A reader gives rows of the manifest format, [(line number or name, row)], and one piece of code (data.read_manifest) checks them all.
"""

import hashlib
import os
import random
import re
import shutil
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import SAMPLE_RATE, Utterance, held_out, load_audio, normalize, read_manifest, write_audio
from files import UserError, claim, is_done, one_thread, read_json, read_jsonl, read_lines, relative, timed, write_jsonl
from encoder import shared_encoder
from hub import named

UNDERSTOOD = 0.75            # mean probability of the letters aligned; the tiny encoder gives unheard espeak-ng voices 0.9 and more, human ones 0.5 and less
AUDIO_ENDINGS = (".wav", ".flac", ".ogg", ".mp3")
LIBRISPEECH_PARTS = ("dev-clean", "dev-other", "test-clean", "test-other", "train-clean-100", "train-clean-360", "train-other-500")


# ---- readers ----

def librispeech(folder):
    """LibriSpeech as it is on disk, any part of it: lines "ID TRANSCRIPT" in *.trans.txt, with ID.flac beside; the ID begins with the speaker."""
    for path in sorted(folder.rglob("*.trans.txt")):
        try:
            lines = read_lines(path)
        except UserError as error:
            yield relative(path, folder), str(error)
            continue
        for number, line in enumerate(lines, 1):
            name, _, text = line.partition(" ")
            if name:
                audio = relative(path.parent / f"{name}.flac", folder)
                yield f"{relative(path, folder)}:{number}", {"audio_filepath": audio, "text": text, "speaker": name.split("-")[0]}


def common_voice(path):
    """A Common Voice TSV (train.tsv, validated.tsv, …): columns path, sentence and client_id; the audio is in clips/."""
    header, *lines = (line.rstrip("\r").split("\t") for line in read_lines(path))
    if not {"path", "sentence"} <= set(header):
        raise UserError(f"{path}: is no Common Voice table; its first line has no columns path and sentence")
    for number, fields in enumerate(lines, 2):
        row = dict(zip(header, fields))
        if {"path", "sentence"} <= set(row):
            yield number, {"audio_filepath": f"clips/{row['path']}", "text": row["sentence"], "speaker": row.get("client_id", "")}
        elif fields != [""]:
            yield number, f"has {len(fields)} columns, not {len(header)}"


def ljspeech(path):
    """LJSpeech's metadata.csv: lines "ID|text" or "ID|text|text as spoken"; the audio is in wavs/."""
    for number, line in enumerate(read_lines(path), 1):
        name, *texts = line.rstrip("\r").split("|")
        if texts:
            audio = next((f"wavs/{name}{ending}" for ending in AUDIO_ENDINGS if (path.parent / f"wavs/{name}{ending}").exists()), f"wavs/{name}.wav")
            yield number, {"audio_filepath": audio, "text": texts[-1]}
        elif name:
            yield number, "is no line of the form ID|text"


def kaldi(folder):
    """A Kaldi data folder (speechocean762 and many others): wav.scp, text, and utt2spk if it is there. Paths are relative to it or to the folder above."""
    def table(name):
        lines = read_lines(folder / name) if (folder / name).exists() else []
        return {fields[0]: "".join(fields[1:]) for fields in (line.split(None, 1) for line in lines) if fields}

    if (folder / "segments").exists():
        raise UserError(f"{folder}: has a file `segments`: its utterances are parts of longer recordings; cut them into files of their own first")
    texts, speakers = table("text"), table("utt2spk")
    for name, path in table("wav.scp").items():
        path = path.strip()
        audio = path if os.path.exists(folder / path) or os.path.isabs(path) else f"../{path}"
        yield name, "is made by a command, not read from a file" if path.endswith("|") else "has no path in wav.scp" if not path else {
            "audio_filepath": audio, "text": texts.get(name), "speaker": speakers.get(name, "").strip()}


def text_beside(folder):
    """A folder of sound files, each with its transcript in a .txt of the same name beside it; in sub-folders the sub-folder's name is the speaker."""
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS):
        text, name = path.with_suffix(".txt"), relative(path, folder)
        try:
            yield name, {"audio_filepath": name, "text": " ".join(read_lines(text)), "speaker": "" if path.parent == folder else path.parent.name}
        except UserError as error:
            yield name, f"has no {text.name} beside it" if not text.exists() else str(error)


def find_rows(source):
    """(what the corpus is, the path its rows are relative to, its rows [(line number or name, row)]) of whatever `source` is."""
    path = Path(source)
    path = next((path / name for name in ("manifest.jsonl", "metadata.csv") if (path / name).is_file()), path)
    if path.is_dir():
        if (path / "clips").is_dir():
            raise UserError(f"{path}: holds a Common Voice language; name one of its tables, like {path / 'validated.tsv'}")
        what, reader = (("a Kaldi folder", kaldi) if (path / "wav.scp").exists() else
                        ("LibriSpeech", librispeech) if next(path.rglob("*.trans.txt"), None) else ("sound files with .txt beside", text_beside))
    else:
        what, reader = {".tsv": ("a Common Voice table", common_voice), ".csv": ("LJSpeech's metadata", ljspeech)}.get(
            path.suffix.lower(), ("a JSONL manifest", read_jsonl))
    rows = list(reader(path))
    if not rows:
        raise UserError(f"{path}: holds no speech in a form that is known: a JSONL manifest, a Common Voice TSV, LJSpeech's metadata.csv, LibriSpeech, "
                        "a Kaldi folder, or sound files with .txt beside")
    return what, path, rows


def download_librispeech(part, root):
    """The folder of a part of LibriSpeech (torchaudio.datasets.LIBRISPEECH), downloaded to `root` unless it is there; never a half-unpacked one."""
    from torchaudio.datasets import LIBRISPEECH
    if part not in LIBRISPEECH_PARTS:
        raise UserError(f"LibriSpeech has no part {part!r}; its parts are {', '.join(LIBRISPEECH_PARTS)}")
    folder, arriving = Path(root) / "LibriSpeech" / part, Path(root) / f".arriving-{part}"
    if not folder.exists():
        shutil.rmtree(arriving / "LibriSpeech", ignore_errors=True)
        arriving.mkdir(parents=True, exist_ok=True)
        try:
            with timed(f"download LibriSpeech {part}"):
                LIBRISPEECH(arriving, part, download=True)
        except (EOFError, tarfile.TarError, zlib.error) as error:
            shutil.rmtree(arriving)
            raise UserError(f"LibriSpeech {part}: the archive was damaged ({error}) and is deleted; run the same command again") from None
        except (RuntimeError, OSError) as error:
            raise UserError(f"LibriSpeech {part}: cannot be downloaded ({' '.join(str(error).split())})") from None
        folder.parent.mkdir(parents=True, exist_ok=True)
        (arriving / "LibriSpeech" / part).rename(folder)
        shutil.rmtree(arriving)
    return folder


# ---- prepare ----

def prepare(args):
    """Check speech and transcripts of a common corpus, and write DATA/manifest.jsonl.

    SOURCE: `tiny` renders speech with espeak-ng; `librispeech PART` downloads a part of LibriSpeech, like dev-clean; or a JSONL manifest, a Common Voice
    TSV, LJSpeech's metadata.csv, a folder of LibriSpeech, a Kaldi folder, or a folder of sound files with .txt beside."""
    out, tiny, lengths = Path(args.out), args.source == "tiny", parse_join(args.join)
    if tiny and (args.join or args.test_speakers or args.skip_bad):
        raise UserError("prepare tiny: --join, --test-speakers and --skip-bad are for recordings")
    if (args.source == "librispeech") != bool(args.part):
        raise UserError("prepare librispeech: name a part, like dev-clean or train-clean-100" if not args.part else
                        f"prepare {args.source} {args.part}: only librispeech has parts")
    if tiny:
        source = {"source": "tiny", "train": args.train, "test": args.test}
    else:
        what, path, rows = find_rows(download_librispeech(args.part, args.download_to) if args.part else args.source)
        if (out / "manifest.jsonl").resolve() == path.resolve():
            raise UserError(f"--out {out}: would overwrite the manifest it is made from; choose another folder")
        source = {"source": hashlib.sha256(repr(rows).encode()).hexdigest()[:12], "folder": relative(path, out), "join": args.join, "count": args.count,
                  "test_speakers": args.test_speakers, "skip_bad": args.skip_bad}
    settings, skipped, why = {**source, "seed": args.seed}, [], "tiny world: held-out sentences in held-out voices"
    if is_done(out, settings, "manifest.jsonl", args.force):
        return print(f"{out}: is prepared already")
    if not tiny:
        print(f"{path}: {what}, {len(rows)} rows")
        with timed("check the audio"):
            utterances = read_manifest(path, rows, check_audio=True, skipped=skipped if args.skip_bad else None)
        lower_capitals(utterances)
        why = split_speakers(utterances, [s.strip() for s in args.test_speakers.split(",") if s.strip()], joined=bool(lengths))
        utterances = utterances if lengths else leave_out_tested(utterances)
    (out / "manifest.jsonl").unlink(missing_ok=True)
    claim(out, settings)
    if args.skip_bad:
        report_skipped(out, skipped)
    if tiny or lengths:
        with timed("render speech" if tiny else "join words"):
            utterances = render_tiny(out, args.train, args.test, args.seed) if tiny else join_words(utterances, lengths, args.count, out, args.seed)
    write_jsonl(out / "manifest.jsonl", [u.row(out) for u in utterances])
    claim(out, settings, done=True)
    print(f"{out / 'manifest.jsonl'}: {len(utterances)} utterances, {sum(u.duration for u in utterances) / 60:.1f} minutes; "
          f"{dict(Counter(u.split for u in utterances))} ({why}); {sum(bool(u.words) for u in utterances)} with word times")


def lower_capitals(utterances):
    """Transcripts that are all in capitals, as LibriSpeech's are, in small letters: an LLM reads those in fewer tokens."""
    if all(u.text == u.text.upper() for u in utterances) and any(u.text != u.text.lower() for u in utterances):
        print("all transcripts are in capitals: they are put in small letters, which an LLM reads in fewer tokens")
        for u in utterances:
            u.text = u.text.lower()
            u.words = u.words and [[word.lower(), start, end] for word, start, end in u.words]


def split_speakers(utterances, test_speakers=(), joined=False):
    """Fill in `split`; returns a line that says how it was decided."""
    speakers, given = {u.speaker for u in utterances}, sum(bool(u.split) for u in utterances)
    if missing := [s for s in test_speakers if s not in speakers]:
        raise UserError(f"--test-speakers: there is no speaker {missing[0]!r}; there are {', '.join(sorted(speakers)[:20]) or 'none'}")
    if given and given < len(utterances) and not test_speakers:
        raise UserError(f"'split' is given for {given} of {len(utterances)} rows; give it for all or none, or name --test-speakers")
    if joined and not given and not test_speakers:
        raise UserError("--join needs recordings for training and for testing; name the speakers to hold out with --test-speakers")
    if not given or test_speakers:
        for u in utterances:
            u.split = "test" if (u.speaker in test_speakers if test_speakers else held_out(u.text)) else "train"
    if {u.split for u in utterances} != {"train", "test"}:
        raise UserError(f"all {len(utterances)} utterances are for {utterances[0].split}ing; name speakers to hold out with --test-speakers")
    return (f"speakers held out: {', '.join(test_speakers)}" if test_speakers else "the manifest's own split" if given else
            "no split in the manifest and no --test-speakers: one transcript in eight is held out, by a hash of its words")


def leave_out_tested(utterances):
    """The utterances without training rows whose transcript is tested."""
    tested = {normalize(u.text) for u in utterances if u.split == "test"}
    kept = [u for u in utterances if u.split == "test" or normalize(u.text) not in tested]
    if len(kept) < len(utterances):
        print(f"{len(utterances) - len(kept)} training rows left out, because their transcript is tested")
    if all(u.split == "test" for u in kept):
        raise UserError("no training rows are left: every transcript is also spoken by a held-out speaker")
    return kept


def join_words(utterances, lengths, count, out, seed=0):
    """`count` new utterances, each a string of single-word recordings of one speaker with pauses between and exact word times.

    lengths: (fewest, most) words. One string in five is for testing: from test recordings, with a text that held_out() holds out.
    """
    rng, pools, made = random.Random(f"join-{seed}"), {"train": {}, "test": {}}, []
    for u in utterances:
        if " " in u.text:
            raise UserError(f"--join wants recordings of single words, but {u.id} says {u.text!r}")
        pools[u.split].setdefault(u.speaker, []).append(u)
    for n in tqdm(range(count), desc="join words", unit="utt"):
        split = "test" if n % 5 == 4 else "train"
        speaker = rng.choice(sorted(pools[split]))
        for _ in range(1000):
            picked = [rng.choice(pools[split][speaker]) for _ in range(rng.randint(*lengths))]
            text = " ".join(u.text for u in picked)
            if held_out(text) == (split == "test"):
                break
        else:
            raise UserError(f"--join: too few words to make different strings for training and for testing (speaker {speaker!r}); make longer strings")
        audio, words, at = [], [], 0
        for u in picked:
            pause, samples = np.zeros(int(rng.uniform(0.05, 0.25) * SAMPLE_RATE), dtype=np.float32), load_audio(u.audio, u.duration)
            start = at + len(pause)
            at = start + len(samples)
            audio += [pause, samples]
            words.append([u.text, start / SAMPLE_RATE, at / SAMPLE_RATE])
        path = Path(out) / "audio" / f"{n:05d}.flac"
        write_audio(path, np.concatenate(audio))
        made.append(Utterance(path, text, at / SAMPLE_RATE, speaker, split, words))
    return made


def parse_join(text):
    """"3:6" -> (3, 6)"""
    if not text:
        return None
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and len(high) < 5 and 1 <= int(low) <= int(high)):
        raise UserError(f"--join {text}: give the fewest and the most words, like 3:6")
    return int(low), int(high)


def render_tiny(out, n_train, n_test, seed):
    from tiny import speech, world
    rng, utterances = random.Random(f"prepare-{seed}"), []
    for split, n in (("train", n_train), ("test", n_test)):
        stream = world.draws(f"prepare-{seed}", held_out=split == "test")
        for i in tqdm(range(n), desc=f"render {split}", unit="utt"):
            text = next(stream).words
            try:
                audio, words, voice = speech.render(text, rng, split)
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"espeak-ng: {error}") from None
            path = out / "audio" / f"{split}-{i:05d}.wav"
            write_audio(path, audio)
            utterances.append(Utterance(path, text, len(audio) / speech.SAMPLE_RATE, voice["voice"], split, words))
    return utterances


def report_skipped(out, skipped):
    write_jsonl(out / "skipped.jsonl", skipped)
    reasons = Counter(re.split(r" \(|,| '| line ", row["reason"])[0] for row in skipped)
    print(f"{len(skipped)} rows left out, listed in {out / 'skipped.jsonl'}: " + "; ".join(f"{n} x {reason}" for reason, n in reasons.most_common()))


# ---- align ----

def align(args):
    """Add word times to the rows of a manifest that have none, by CTC forced alignment; interleaving needs them."""
    manifest = Path(args.manifest)
    manifest = manifest / "manifest.jsonl" if manifest.is_dir() else manifest
    ours = manifest.name == "manifest.jsonl" and (manifest.parent / "config.json").exists() and "done" in read_json(manifest.parent / "config.json")
    # in a data folder made by prepare nothing is lost by adding to its manifest
    out = Path(args.out) if args.out else manifest if ours else manifest.with_name(f"{manifest.stem}-aligned.jsonl")
    if out.resolve() == manifest.resolve() and not ours:
        raise UserError(f"--out {out}: would overwrite the manifest it is made from; choose another name")
    utterances = read_manifest(manifest)
    todo, failed, sure = [u for u in utterances if args.force or not u.words], [], []
    if not todo:
        return print(f"{manifest}: all {len(utterances)} utterances have word times already; --force aligns them anew")
    encoder = shared_encoder(named(args.asr))
    if encoder.head is None:
        raise UserError(f"--asr {args.asr}: has no CTC head to align with; name a CTC model, like facebook/wav2vec2-base-960h")
    with timed(f"align {len(todo)} utterances"), one_thread():
        for u in tqdm(todo, desc="align", unit="utt"):
            audio = load_audio(u.audio, u.duration)
            u.duration = len(audio) / SAMPLE_RATE
            try:
                u.words, score = word_times(encoder, encoder(audio, u.audio), u.text, u.duration)
                sure.append(score)
            except UserError as error:
                failed.append(f"{u.audio}: {error}")
    write_jsonl(out, [u.row(out.parent) for u in utterances])
    print(f"{out}: {sum(bool(u.words) for u in utterances)} of {len(utterances)} utterances have word times"
          + (f"; {len(failed)} could not be aligned and are never interleaved, the first: {failed[0]}" if failed else ""))
    if sure and np.mean(sure) < UNDERSTOOD:
        print(f"the CTC model gives the transcripts' characters a mean probability of only {np.mean(sure):.2f}: it hardly understands this speech, so "
              "the times are rough; run again with --force and a CTC model for it, like --asr facebook/wav2vec2-base-960h")


def spell(tokenizer, word):
    """CTC token ids of a word, in the letters the vocabulary has, small or capital; None stands for a run of digits or letters that it lacks."""
    unknown, bar = tokenizer.unk_token_id, getattr(tokenizer, "word_delimiter_token_id", None)
    ids = []
    for piece in re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+", word):
        tries = [[i for i in tokenizer(w, add_special_tokens=False)["input_ids"] if i != bar] for w in (piece.lower(), piece.upper(), piece)]
        best = min(tries, key=lambda row: row.count(unknown) if row else len(piece))
        known = [i for i in best if i != unknown]
        says = any(c.isalnum() for token in tokenizer.convert_ids_to_tokens(known) for c in token)       # a space alone says nothing
        ids += known if says else [None]
    return ids


def word_times(encoder, frames, text, duration):
    """([[word, start_s, end_s], ...], mean probability of its characters) by CTC forced alignment (torchaudio.functional.forced_align).

    Numbers and letters the CTC vocabulary lacks are aligned with a token that stands for any sound; a word of punctuation alone gets the time between
    its neighbours. A CTC head names a letter some time after it was said; the tiny encoder's config.json holds its delay, as measured on espeak-ng's own times.
    """
    from torchaudio.functional import forced_align, merge_tokens
    tokenizer, scores = encoder.ctc_tokenizer, encoder.ctc(frames)                                      # (T, V)
    any_sound, blank = scores.shape[1], tokenizer.pad_token_id
    scores = torch.cat([scores, torch.zeros(len(scores), 1)], dim=1)                                    # (T, V + 1): any sound is as likely as can be
    spelled = [[any_sound if i is None else i for i in spell(tokenizer, word)] for word in text.split()]
    bar = getattr(tokenizer, "word_delimiter_token_id", None)
    between = [] if bar is None else [bar]
    targets = [i for ids in spelled if ids for i in [*ids, *between]][:len(between) and -1 or None]
    if not targets:
        raise UserError("its transcript has no letters and no digits")
    try:
        path, path_scores = forced_align(scores[None], torch.tensor([targets], dtype=torch.int32), blank=blank)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the transcript does not fit the audio: {len(targets)} characters in {duration:.2f} s ({str(error).splitlines()[0]})") from None
    spans, seconds, times, at = merge_tokens(path[0], path_scores[0].exp(), blank=blank), duration / len(frames), [], 0
    for ids in spelled:
        times.append([spans[at].start * seconds, spans[at + len(ids) - 1].end * seconds] if ids else None)
        at += len(ids) + len(between) if ids else 0
    for i, time in enumerate(times):
        if time is None:
            after = next((t[0] for t in times[i + 1:] if t), duration)
            times[i] = [times[i - 1][1] if i else 0.0, after]
    delay = getattr(encoder.config, "ctc_delay", 0.0)
    times = [[max(0.0, start - delay), max(0.0, end - delay)] for start, end in times]
    for a, b in zip(times, times[1:]):                             # CTC peaks are short: words meet midway between them
        a[1] = b[0] = (a[1] + b[0]) / 2
    known = [span.score for span in spans if span.token != any_sound]
    return [[word, start, end] for word, (start, end) in zip(text.split(), times)], float(np.mean(known)) if known else 0.0
