"""What a task table, an earlier turn or a message must look like; UserError says what it is not."""

from pathlib import Path

from support.files import UserError

METRICS = ("exact", "wer", "chrf")  # what a task may be scored by


def check_task(task):
    """A data.Task must have a split, a metric and two lists of prompts that share none."""
    if task.split not in ("train", "unseen") or task.metric not in METRICS:
        raise UserError(f"split must be train or unseen, metric one of {', '.join(METRICS)}")
    for prompts in (task.prompts, task.unseen_prompts):
        texts = isinstance(prompts, list)
        texts = texts and all(isinstance(p, str) and p.strip() for p in prompts)
        if not prompts or not texts:
            raise UserError("prompts and unseen_prompts must be lists of texts, neither empty")
    every = [prompt.strip() for prompt in (*task.prompts, *task.unseen_prompts)]
    if len(set(every)) < len(every):
        raise UserError("no prompt may stand twice in prompts and unseen_prompts")


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
