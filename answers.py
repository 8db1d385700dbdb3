"""Many questions answered by an LLM, in batches, each kept as soon as it is there: stage 1 and the benchmark both come through here."""

import json
import sys
from dataclasses import replace

import torch
from tqdm import tqdm

from data import chat_parts, transcript_tokens
from files import UserError, mend_jsonl, read_jsonl
from parallel import MAIN, RANK, mine, wait


def generate_all(model, conversations, order, desc, batch_size, max_new_tokens, kept, key):
    """[(text, did it end by itself)] for many open conversations, in batches of neighbours by the sort key `order[i]`, with a progress bar.

    Several processes take a share of the batches each. Every batch is appended to the file KEPT.part-PROCESS.jsonl as soon as it is answered: after an
    interruption the same call goes on from there. key: names what was asked of whom; answers kept under another key do not count.
    """
    by_key = sorted(range(len(conversations)), key=order.__getitem__)
    batches = [by_key[at:at + batch_size] for at in range(0, len(by_key), batch_size)]
    for path in kept_parts(kept) if MAIN else []:
        mend_jsonl(path)
    wait()
    answers = read_parts(kept, key)
    todo = [rows for rows in batches if not all(i in answers for i in rows)]      # whole batches, so that the rounding is that of a run never interrupted
    if len(todo) < len(batches):
        print(f"{desc}: {len(answers)} of {len(conversations)} answers are there already")
    wait()
    kept.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{kept}.part-{RANK}.jsonl", "a", encoding="utf-8") as file:
        for rows in tqdm(mine(todo), desc=desc, unit="batch", disable=not MAIN):
            found = answer_in_memory(model, [conversations[i] for i in rows], max_new_tokens)
            file.write("".join(json.dumps({"key": key, "question": i, "answer": answer, "ended": ended}) + "\n" for i, (answer, ended) in zip(rows, found)))
            file.flush()
    wait()
    answers = read_parts(kept, key)
    return [answers[i] for i in range(len(conversations))]


def answer_in_memory(model, conversations, max_new_tokens):
    """generate_rows; where the GPU's memory does not suffice, in two halves."""
    try:
        return model.generate_rows(conversations, max_new_tokens)
    except torch.OutOfMemoryError as error:
        why, half = str(error).splitlines()[0], len(conversations) // 2
    if not half:
        raise UserError(f"one question at a time is still too much for this GPU ({why}); `plan` says what fits")
    torch.cuda.empty_cache()
    tqdm.write(f"out of memory with {len(conversations)} questions at once: {half} at a time; a smaller --batch-size saves the attempt", file=sys.stderr)
    return [answer for rows in (conversations[:half], conversations[half:]) for answer in answer_in_memory(model, rows, max_new_tokens)]


def answer_in_text(model, questions, texts, batch_size, max_new_tokens, kept, key):
    """The LLM's own answers to questions (Behaviors that lack theirs) about transcripts; texts: {Utterance.id: transcript}."""
    parts = [chat_parts(model.tokenizer, q.messages(), [[transcript_tokens(model.tokenizer, texts[i])] for i in q.utterances()]) for q in questions]
    order, said = [(q.task, len(texts[q.utterance])) for q in questions], kept.name.replace("behaviors", "imitate")
    answers = generate_all(model, parts, order, said, batch_size, max_new_tokens, kept, key)
    return [replace(q, response=answer, ended=ended, llm=model.fingerprint) for q, (answer, ended) in zip(questions, answers) if answer or ended]


def kept_parts(kept):
    return sorted(kept.parent.glob(f"{kept.name}.part-*.jsonl"))


def read_parts(kept, key):
    """{question: (answer, did it end by itself)} of what every process has appended so far."""
    rows = [row for path in kept_parts(kept) for _, row in read_jsonl(path) if isinstance(row, dict) and row.get("key") == key]
    return {row["question"]: (row["answer"], row["ended"]) for row in rows if {"question", "answer", "ended"} <= set(row)}


def forget_parts(kept):
    """Delete the parts, when what they hold is written elsewhere; the name may be a pattern."""
    wait()
    for path in kept_parts(kept) if MAIN else []:
        path.unlink(missing_ok=True)
    wait()
