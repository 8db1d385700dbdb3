"""What a user's file or call must look like; where it does not, a UserError says so in one line."""

import math
from pathlib import Path

from support.files import UserError

METRICS = ("exact", "wer", "chrf")  # what a task may be scored by

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


def check_task(task):
    """A data.Task must have a split, a metric and two lists of prompts that share none."""
    if task.split not in ("train", "unseen") or task.metric not in METRICS:
        raise UserError(f"split must be train or unseen, metric one of {', '.join(METRICS)}")
    for prompts in (task.prompts, task.unseen_prompts):
        texts = isinstance(prompts, list) and all(isinstance(p, str) and p for p in prompts)
        if not prompts or not texts:
            raise UserError("prompts and unseen_prompts must be lists of texts")
    if set(task.prompts) & set(task.unseen_prompts):
        raise UserError("no prompt may be in prompts and in unseen_prompts")


def is_turn(turn):
    return isinstance(turn, list) and [type(x) for x in turn] == [str, str, str]


def check_messages(messages):
    """UserError unless it is a conversation in the Hugging Face message format."""
    if not isinstance(messages, list) or not messages:
        messages = [None]
    for message in messages:
        if not is_message(message):
            raise UserError(
                f'{message!r} is no message like {{"role": "user", "content": TEXT}}, where '
                'instead of a text may stand a list of {"type": "text", "text": TEXT} and '
                '{"type": "audio", "audio": PATH}'
            )


def is_message(message):
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    if isinstance(content, str):
        return True
    return isinstance(content, list) and all(is_entry(entry) for entry in content)


def is_entry(entry):
    if not isinstance(entry, dict) or entry.get("type") not in ("text", "audio"):
        return False
    return isinstance(entry.get(entry["type"]), (str, Path))
