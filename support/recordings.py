"""What names a recording, and the sound file itself: whole, or refused with what is wrong."""

import math
import re
import unicodedata

import numpy as np
import soundfile

from support.files import UserError, read_jsonl, size_of_file

# ---- a manifest's rows ----

# Our names of a row's keys, and what NeMo, BLSP, Self-Powered LSM and Common Voice call them.
KEYS = {
    "audio_filepath": ("audio_filepath", "audio", "path"),
    "text": ("text", "sentence", "transcript"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "duration": ("duration",),
    "split": ("split",),
    "words": ("words",),
    "offset": ("offset",),
    "kind": ("kind",),
}


def get(row, key):
    """The value of one of our keys in a manifest row, under whichever name it has; or None."""
    for name in KEYS[key]:
        if row.get(name) is not None:
            return row[name]
    return None


def audio_name(row):
    """How a row, a bad one perhaps, names its recording."""
    return "" if isinstance(row, str) else str(get(row, "audio_filepath") or "")


def checked_row(row):
    """A manifest row under our names, with an id; a string says why a line is no row at all."""
    if isinstance(row, str):
        raise UserError(row)
    for key in ("audio_filepath", "text"):
        value = get(row, key)
        if value is None:
            raise UserError(f"lacks the key {key!r}")
        if not isinstance(value, str):
            raise UserError(f"{key!r} is {value!r}, which is not a text")
    text = " ".join(get(row, "text").split())
    check_transcript(text)
    if get(row, "offset"):
        raise UserError(
            f"has the offset {get(row, 'offset')}: parts of longer recordings are not read; cut "
            "them into files of their own"
        )
    split = "" if get(row, "split") is None else get(row, "split")
    if split not in ("", "train", "test"):
        raise UserError(f"'split' is {split!r}; it must be train or test")
    kind = get(row, "kind") or ""
    if not isinstance(kind, str) or len(kind) > 40:
        raise UserError(f"'kind' is {str(kind)[:50]!r}; it must be a text of at most 40 letters")
    duration = checked_duration(get(row, "duration"))
    words, speaker = get(row, "words"), get(row, "speaker")
    if isinstance(speaker, (list, dict, bool)):
        raise UserError(f"'speaker' is {speaker!r}, which is no name")
    return {
        "audio_filepath": get(row, "audio_filepath"),
        "id": get(row, "audio_filepath"),
        "text": text,
        "duration": duration,
        "speaker": "" if speaker is None else str(speaker).strip(),
        "split": split,
        "kind": kind,
        "words": None if words is None else check_words(words, text, duration or math.inf),
    }


def speakers_of(manifest):
    """The speakers that a JSONL manifest names, in order; its durations need not be known yet."""
    speakers = set()
    for number, row in read_jsonl(manifest):
        try:
            speakers.add(checked_row(row)["speaker"])
        except UserError as error:
            raise UserError(f"{manifest}:{number}: {error}") from None
    return sorted(speakers - {""})


def checked_duration(duration):
    """Seconds; 0.0 for None."""
    if duration is None:
        return 0.0
    if isinstance(duration, bool) or not isinstance(duration, (int, float)):
        raise UserError(f"'duration' is {duration!r}, which is not a number")
    if not 0 < duration < 1e6:
        raise UserError(f"the duration is {duration} s")
    return float(duration)


def check_words(words, text, duration):
    """[[word, start_s, end_s], ...] as numbers; UserError if they cannot be the words' times."""
    try:
        times = [[str(word), float(start), float(end)] for word, start, end in words]
    except (TypeError, ValueError, OverflowError):
        raise UserError("'words' must be [[word, start_s, end_s], …]") from None
    said = text.split()
    if len(times) != len(said):
        raise UserError(f"has times for {len(times)} words, but its transcript has {len(said)}")
    same = sum(letters(word) == letters(time[0]) for word, time in zip(said, times))
    if len(said) >= 3 and not same:  # one or two may be written in another way: 7, seven
        raise UserError(f"has the times of other words ({times[0][0]!r}, …) than its transcript's")
    last = 0.0
    for word, start, end in times:
        if not last - 1e-3 <= start <= end:  # NaN fails this too
            raise UserError(f"the word times run backwards at {word!r} ({start} to {end} s)")
        if end > duration + 0.05:
            raise UserError(
                f"the word {word!r} ends at {end} s, past the end of the audio ({duration} s)"
            )
        last = end
    return times


def letters(word):
    """A word without capitals and punctuation."""
    return re.sub(r"\W", "", word.casefold())


# ---- transcripts ----

# Four minutes of reading aloud, which is LONGEST.
MAX_TEXT = 4000  # characters
# The fastest talkers say 25 a second; 100 more, for what is written longer than it is said.
TEXT_PER_SECOND, TEXT_AT_LEAST = 40, 100  # characters
# Of Latin, Greek and Cyrillic letters, digits and signs (up to U+052F). The longest compounds of
# German have 80. Chinese, Thai and others have no spaces between words, so they have no such limit.
MAX_WORD = 100
LONG_WORD = re.compile(rf"[!-\u052f]{{{MAX_WORD + 1}}}")
# Burmese, Tibetan and pointed Hebrew put up to five on one letter.
MAX_MARKS = 8
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
FILLERS = "\u115f\u1160\u2800\u3164\uffa0"  # letters and a sign that are blank


def check_transcript(text):
    """UserError if a text, its white space single blanks, is none that anybody could have said."""
    if not text:
        raise UserError("the transcript is empty")
    control = CONTROL.search(text)
    if control:
        raise UserError(f"the transcript holds a control character (U+{ord(control[0]):04X})")
    if len(text) > MAX_TEXT:
        raise UserError(f"the transcript is too long ({len(text)} characters, at most {MAX_TEXT})")
    word = LONG_WORD.search(text)
    if word:
        raise UserError(
            f"the transcript has too long a word ({word[0][:20]}…, at most {MAX_WORD} characters)"
        )
    if not any(is_visible(c) for c in text):
        raise UserError("the transcript has nothing visible")
    marks = 0  # in a row
    for c in text:
        marks = marks + 1 if unicodedata.category(c) in ("Mn", "Me") else 0
        if marks > MAX_MARKS:
            raise UserError(f"the transcript has too many marks on a letter (at most {MAX_MARKS})")


def is_visible(c):
    """Is it a letter, a number, a punctuation mark or a symbol?"""
    return unicodedata.category(c)[0] in "LNPS" and c not in FILLERS


def check_text_fits(text, seconds):
    """UserError if nobody could say so much in so many seconds."""
    if len(text) > min(MAX_TEXT, TEXT_PER_SECOND * seconds + TEXT_AT_LEAST):
        raise UserError(
            f"the transcript is too long for its audio ({len(text)} characters in {seconds:.2f} s)"
        )


# ---- sound files ----

MAX_SECONDS = 30.0  # how long a recording may be, if `prepare --max-seconds` does not say otherwise
LONGEST = 240.0  # the most that it may say
FORMATS = ("WAV", "WAVEX", "FLAC", "OGG", "MP3")  # of which it is known when one was cut off
RATES = (1000, 400_000)  # Hz
MAX_CHANNELS = 8  # as of 7.1 surround sound
BLOCK = 2**20  # frames


def read_sound(path, duration=None, max_seconds=None):
    """(float32 samples (n,), the mean of the channels; rate in Hz) of a whole sound file.

    duration: seconds, as its manifest says; max_seconds: as its data folder allows. Of a file that
    says that it is longer nothing is read. UserError names the file and what is wrong.
    """
    if size_of_file(path, "audio file") == 0:
        raise UserError(f"{path}: the audio file is empty")
    try:
        with soundfile.SoundFile(path) as file:
            check_header(file, duration, max_seconds)
            samples = read_mono(file)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (soundfile.LibsndfileError, RuntimeError, OSError, TypeError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    check_whole(path, file, samples, duration)
    return samples, file.samplerate


def check_header(file, duration, max_seconds):
    """UserError if an open sound file says that it is too long, or something that is not read."""
    if file.format not in FORMATS:
        raise UserError(f"is a {file.format} file; WAV, FLAC, OGG and MP3 can be read")
    low, high = RATES
    if not low <= file.samplerate <= high:
        raise UserError(f"has a rate of {file.samplerate} Hz; {low} to {high} Hz can be read")
    if file.channels > MAX_CHANNELS:
        raise UserError(f"has {file.channels} channels; up to {MAX_CHANNELS} can be read")
    if file.frames >= 2**62:
        raise UserError("does not say how long it is, as if written to a pipe; write it anew")
    check_length(file.frames / file.samplerate, duration, max_seconds)


def check_length(seconds, duration, max_seconds):
    """UserError if a recording is longer than its data folder, or else its manifest, allows."""
    if max_seconds:
        limit = max_seconds
        why = f"the limit is {limit:g} s; `prepare --max-seconds` sets another, up to {LONGEST:g}"
    elif duration:
        limit = 1.05 * duration + 0.5  # manifests are rough
        why = f"its manifest says {duration:.1f} s; run `prepare … --force`"
    else:
        limit = MAX_SECONDS
        why = f"the limit is {limit:g} s"
    if seconds > 1.001 * limit:  # resampling may lengthen it by so much
        raise UserError(f"the audio is too long ({seconds:.1f} s; {why})")


def read_mono(file):
    """float32 samples (n,), the mean of the channels, of an open sound file.

    Never more than its header says; in blocks, so that channels do not multiply the memory.
    """
    blocks = []
    while True:
        block = file.read(BLOCK, dtype="float32", always_2d=True)  # (n, channels)
        if not len(block):
            break
        blocks.append(block.mean(axis=1))  # (n,)
    if not blocks:
        raise UserError("the audio file holds no samples")
    return np.concatenate(blocks)


def check_whole(path, file, samples, duration):
    """UserError if a file that was read as `samples` ends too early."""
    expected = file.frames
    if file.format == "MP3" and not says_its_length(path):
        check_mp3(path, file.samplerate, len(samples))
        expected = 0  # what is said is a guess: as if all frames were as large as the first

    # Four signs: samples, bytes, the mark of the end, and what the manifest says.
    seconds = len(samples) / file.samplerate
    truncated = len(samples) < expected
    truncated = truncated or path.stat().st_size < bytes_promised(path)
    truncated = truncated or not ends_as_ogg(path)
    truncated = truncated or bool(duration and seconds < 0.95 * duration - 0.05)
    if truncated:
        of = f" of {duration:.2f} s" if duration else ""
        raise UserError(f"{path}: the audio file is truncated, it holds {seconds:.2f} s{of}")


def bytes_promised(path):
    """How long a WAV file's header says that it is; 0 for any other file, and where it can't tell.

    Programs that write into a pipe do not know the length, and say the largest that there is: of 32
    bits (ffmpeg), or of 31, less or more their header (SoX, arecord).
    """
    with open(path, "rb") as file:
        head = file.read(8)
    order = {b"RIFF": "little", b"RIFX": "big"}.get(head[:4])
    promised = int.from_bytes(head[4:8], order) + 8 if order else 0
    is_unknown = promised >= 2**32 - 1024 or abs(promised - 2**31) <= 2**12
    return 0 if is_unknown else promised


# ---- where an OGG file ends ----

OGG_PAGE = 65307  # bytes of the largest one


def ends_as_ogg(path):
    """Is the last page of an OGG file whole, and marked as the last? True for any other file.

    A page: "OggS", the version 0, flags, 20 bytes, n, the lengths of n segments, the segments.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"OggS":
            return True
        file.seek(max(0, path.stat().st_size - 2 * OGG_PAGE))
        content = file.read(2 * OGG_PAGE)
    pages = list(re.finditer(rb"OggS\0[\0-\7]", content))
    if not pages:
        return False
    page = content[pages[-1].start() :]
    if len(page) < 27:
        return False
    lengths = page[27 : 27 + page[26]]  # none where nothing but the mark was left to write
    whole = len(lengths) == page[26] and len(page) >= 27 + page[26] + sum(lengths)
    return whole and page[5] & 4 > 0


# ---- where an MP3 file ends: a Xing header says how many frames it has, or else nothing does ----

MP3_BYTES = 2**24  # more than LONGEST at any bitrate
MP3_START = re.compile(rb"\0*(?=\xff[\xe2-\xff])")  # zeros may fill up the tag before it
# In the first frame, after 11 to 36 bytes; its flags are odd where it counts the frames.
XING = re.compile(rb"\xff[\xe2-\xff].{11,36}?(?:Xing|Info)...[\1\3\5\7\x09\x0b\x0d\x0f]", re.S)
KBITS = {  # a second, of layer III by MPEG version; 0: not allowed, or not told
    1: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 0),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160, 0),
}


def says_its_length(path):
    """False for an MP3 file without a Xing header."""
    start = mp3_frames(path, 4096)
    return start is None or XING.match(start) is not None


def mp3_frames(path, most=MP3_BYTES):
    """The bytes of an MP3 file from its first frame on, about so many; None for any other file."""
    with open(path, "rb") as file:
        head = file.read(10)
        at = 0
        if head[:3] == b"ID3" and len(head) == 10:
            at = 10 + sum(byte << 7 * i for i, byte in enumerate(reversed(head[6:])))
        file.seek(at)
        content = file.read(most)
    start = MP3_START.match(content)
    return content[start.end() :] if start else None


def check_mp3(path, rate, n_samples):
    """UserError if the frames of an MP3 file end within one, or hold more than n_samples."""
    content = mp3_frames(path) or b""
    at = expected = 0
    while True:
        size, samples = mp3_frame(content[at : at + 4])
        if not size:
            break
        at += size
        expected += samples
    rest = content[at:]
    if at > len(content) or (len(rest) < 4 and rest[:1] == b"\xff"):  # in the frame, or its header
        raise UserError(f"{path}: the audio file is truncated, its last frame is cut off")
    if expected > 1.05 * n_samples + 2 * 1152:  # the decoder's delay
        raise UserError(
            f"{path}: is an MP3 file of variable bitrate without a Xing header, of which "
            f"{n_samples / rate:.2f} of {expected / rate:.2f} s can be read; write it anew"
        )


def mp3_frame(header):
    """(bytes, samples) of the frame of layer III with this header of four bytes; (0, 0) if none."""
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0b11100110 != 0b11100010:
        return 0, 0
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    kbits = KBITS[1 if version == 3 else 2][bitrate]
    if version == 1 or rate == 3 or not kbits:
        return 0, 0
    # MPEG-1, MPEG-2 with half the rates, and MPEG-2.5 with a quarter of them
    divisor = {3: 1, 2: 2, 0: 4}[version]
    hertz = (44100, 48000, 32000)[rate] // divisor
    samples = 1152 if version == 3 else 576
    padding = header[2] >> 1 & 1
    return samples // 8 * 1000 * kbits // hertz + padding, samples
