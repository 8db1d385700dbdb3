"""Many questions answered by an LLM, in batches, each kept as soon as it is there.

Stage 1 and the benchmark both come through here.
"""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from support.console import is_out_of_memory, progress_bar
from support.files import UserError, checksum_of, first_line, mend_jsonl, read_jsonl
from support.files import write_json, writing
from support.processes import MAIN, RANK, my_share, wait


def answer_all(model, conversation, *, sort_keys, desc, batch_size, max_new_tokens, kept, asked):
    """[(text, did it end by itself)] for many open conversations: those of 0, 1, 2, … by number.

    conversation(i) is made when it is asked, for all of them would take gigabytes; sort_keys has a
    key for each. They are answered in batches of neighbours by their sort key. Several processes
    take a share of the batches each. Every batch is appended to KEPT.part-PROCESS.jsonl as soon as
    it is answered: after an interruption the same call goes on from there. asked: a fingerprint of
    what was asked of whom; answers kept under another one do not count.
    """
    n = len(sort_keys)
    by_key = sorted(range(n), key=lambda i: sort_keys[i])
    batches = []
    for at in range(0, len(by_key), batch_size):
        batches.append(by_key[at : at + batch_size])
    answers = answers_so_far(kept, asked)

    # whole batches, so that the rounding is that of a run never interrupted
    todo = []
    for rows in batches:
        if any(i not in answers for i in rows):
            todo.append(rows)
    if len(todo) < len(batches):
        print(f"{desc}: {len(answers)} of {n} answers are there already")
    wait()

    part = f"{kept}.part-{RANK}.jsonl"
    mine, at_once = my_share(todo), batch_size
    if mine:
        model.check_finite(conversation(mine[0][0]))
    for rows in progress_bar(mine, desc=desc, unit="batch"):
        asked_now = [conversation(i) for i in rows]
        found, at_once = answer_in_memory(model, asked_now, at_once, max_new_tokens)
        lines = []
        for i, (answer, ended) in zip(rows, found):
            line = {"asked": asked, "question": i, "answer": answer, "ended": ended}
            lines.append(json.dumps({**line, "checksum": checksum_of(line)}) + "\n")
        append_lines(part, lines)
    wait()
    answers = read_parts(kept, asked)
    return [answers[i] for i in range(n)]


def append_lines(path, lines):
    """Add lines to a JSONL file; half a line, where the disk is full, is cut off by mend_jsonl."""
    with writing(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write("".join(lines))


def answer_in_memory(model, conversations, at_once, max_new_tokens):
    """(what generate_rows gives, so many conversations at once; how many went at once at last).

    Where the GPU's memory does not suffice, half as many from there on.
    """
    answers = []
    while len(answers) < len(conversations):
        some = conversations[len(answers) : len(answers) + at_once]
        try:
            answers += model.generate_rows(some, max_new_tokens)
            continue
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            why = first_line(error)
        at_once = len(some) // 2
        if not at_once:
            raise UserError(
                f"one question at a time is still too much for this GPU ({why}); `plan` says what "
                "fits"
            )
        torch.cuda.empty_cache()
        tqdm.write(
            f"out of memory with {len(some)} questions at once: from here on {at_once} at a time; "
            "a smaller --batch-size saves the attempt",
            file=sys.stderr,
        )
    return answers, at_once


# ---- the parts: what every process has answered so far ----


def answers_so_far(kept, asked):
    """{question: (answer, did it end by itself)} of an earlier, interrupted call."""
    if MAIN:
        for path in kept_parts(kept):
            mend_jsonl(path)
    wait()
    answers = read_parts(kept, asked)
    wait()
    return answers


def kept_parts(kept):
    """KEPT.part-PROCESS.jsonl of each process, in order; other files of like names are a user's."""
    parts = []
    for path in sorted(kept.parent.glob(f"{kept.name}.part-[0-9]*.jsonl")):
        if path.stem.rpartition("-")[2].isdecimal():
            parts.append(path)
    return parts


def read_parts(kept, asked):
    answers = {}
    for path in kept_parts(kept):
        for _, row in read_jsonl(path, ours=True):
            if not isinstance(row, dict) or row.get("asked") != asked:
                continue
            if row.pop("checksum", "") == checksum_of(row):  # a damaged answer is asked for again
                answers[row["question"]] = (row["answer"], row["ended"])
    return answers


def keep_record(path, record, parts):
    """Write what was made of the answers in some parts, and delete these."""
    wait()
    write_json(path, record)
    for kept in parts:
        forget_parts(kept)


def forget_parts(kept):
    """Delete the parts, when what they hold is written elsewhere; the name may be a pattern."""
    wait()
    if MAIN:
        for path in kept_parts(kept):
            path.unlink(missing_ok=True)
    wait()
