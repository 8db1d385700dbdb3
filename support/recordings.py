"""What names a recording, and the sound file itself: whole, or refused with what is wrong."""

import math

import soundfile

from support.files import UserError

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
    if not text:
        raise UserError("the transcript is empty")
    if get(row, "offset"):
        raise UserError(
            f"has the offset {get(row, 'offset')}: parts of longer recordings are not read; cut "
            "them into files of their own"
        )
    split = get(row, "split") or ""
    if split not in ("", "train", "test"):
        raise UserError(f"'split' is {split!r}; it must be train or test")
    duration = checked_duration(get(row, "duration"))
    words, speaker = get(row, "words"), get(row, "speaker")
    return {
        "audio_filepath": get(row, "audio_filepath"),
        "id": get(row, "audio_filepath"),
        "text": text,
        "duration": duration,
        "speaker": "" if speaker is None else str(speaker),
        "split": split,
        "words": None if words is None else check_words(words, text, duration or math.inf),
    }


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
    if len(times) != len(text.split()):
        n = len(text.split())
        raise UserError(f"has times for {len(times)} words, but its transcript has {n}")
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


# ---- sound files ----


def read_sound(path, duration):
    """(float32 samples (n, channels), rate in Hz) of a whole sound file."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such audio file")
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: the audio file is empty")
    try:
        expected = soundfile.info(path).frames
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)  # (n, channels)
    except (soundfile.LibsndfileError, RuntimeError, OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as audio ({error})") from None
    if len(samples) == 0:
        raise UserError(f"{path}: the audio file holds no samples")

    # Three signs of a file that ends too early: samples, bytes, and what the manifest says.
    seconds = len(samples) / rate
    truncated = len(samples) < expected
    truncated = truncated or size < bytes_promised(path) < 2**32 - 1024
    truncated = truncated or bool(duration and seconds < 0.95 * duration - 0.05)
    if truncated:
        of = f" of {duration:.2f} s" if duration else ""
        raise UserError(f"{path}: the audio file is truncated, it holds {seconds:.2f} s{of}")
    return samples, rate


def bytes_promised(path):
    """How long a WAV file's header says that it is; 0 for any other file."""
    with open(path, "rb") as file:
        head = file.read(8)
    return int.from_bytes(head[4:8], "little") + 8 if head[:4] == b"RIFF" else 0
