"""Ask a trained model about sound files, or go through a conversation; the answer streams."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import TextStreamer

from app.microphone import recorded
from data import Speech, user_turn
from model import SpeechLLM
from support.checks import check_messages
from support.files import MOST_BYTES, UserError, ceil_div, explained, read_text
from support.options import Count, RunFolder, Size, called_many
from support.processes import DEVICE
from support.runs import trained_recipes


@dataclass
class GenerateOptions:
    run: RunFolder
    """a run folder with a trained recipe, or the folder of one, RUN/RECIPE"""
    words: called_many("AUDIO... PROMPT") = ()
    """WAV, FLAC, OGG or MP3 files, and what to ask about each of them; the prompt alone with
    --record; nothing with --messages"""
    messages: str | None = None
    """a JSON file with a whole conversation in the Hugging Face message format, whose audio entries
    name files: what comes next?"""
    record: Size | None = None
    """so many seconds, up to 30, from the microphone instead of a file (needs sounddevice)"""
    recipe: str | None = None
    """which of its recipes; default: the first of the table that is there"""
    system: str = ""
    """a system turn before the question; default: none"""
    max_new_tokens: Count = 64
    """longest answer, in tokens"""
    verbose: bool = False
    """say how long the first token took, how many came a second, how many speech tokens were heard,
    and the most memory that was in use"""


def answer_questions(options, recipes):
    """Answer everything that is asked; recipes: the names of the table."""
    folder = chosen_recipe(options.run, options.recipe, recipes)
    conversations = list(conversations_of(options))  # what is asked is looked at before all else
    model = SpeechLLM.from_pretrained(folder)
    for name, messages in conversations:
        if options.system:
            messages = [{"role": "system", "content": options.system}, *messages]
        if len(conversations) > 1:
            print(f"{name}: ", end="", flush=True)
        start = time.perf_counter()
        stream = answer_streaming(model, messages, options.max_new_tokens)
        took = time.perf_counter() - start
        print(f"{folder}: answered in {took:.1f} s", file=sys.stderr)
        if options.verbose:
            print(describe_answer(stream, start), file=sys.stderr)


def chosen_recipe(run, name, table):
    """The folder of a trained recipe of a run: the one of this name, or the table's first.

    A folder of a recipe itself, RUN/RECIPE or what `export` made, stands for itself.
    """
    run = Path(run)
    if not name and (run / "model.json").exists():
        return run
    found = list(trained_recipes(run, table))
    if not name and found:
        name = found[0]
    if name not in found:
        wanted = f" {name!r}" if name else ""
        there = ", ".join(found) or "none: run `train` first"
        raise UserError(f"{run}: holds no trained recipe{wanted}; there are {there}")
    return run / name


def conversations_of(options):
    """(name, messages) of everything that is asked; UserError if it is too much or too little."""
    words = list(options.words)
    if options.messages:
        if words or options.record:
            raise UserError("--messages FILE is the whole conversation: name no AUDIO or PROMPT")
        yield options.messages, read_messages(options.messages)
        return
    if not words:
        raise UserError('say what to ask: generate RUN AUDIO... "PROMPT"')
    *clips, prompt = words
    if options.record:
        if clips:
            raise UserError("--record takes the place of the sound files: name the PROMPT alone")
        yield "the microphone", user_turn(prompt, recorded(options.record))
        return
    if not clips:
        raise UserError(
            f"{prompt!r} is all that is said: name the sound files, then what to ask: generate RUN "
            'AUDIO... "PROMPT"'
        )
    for clip in clips:
        yield clip, user_turn(prompt, clip)


def read_messages(path):
    """The messages of a JSON file; its audio entries' paths count from its own folder."""
    with explained(f"{path}: is no JSON", ValueError, RecursionError):
        messages = json.loads(read_text(path, "utf-8", MOST_BYTES))
    check_messages(messages)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{path}: its last message is an answer already")
    for message in messages:
        for entry in message["content"] if isinstance(message["content"], list) else []:
            if entry["type"] == "audio":
                entry["audio"] = str(Path(path).parent / entry["audio"])
    return messages


# ---- one answer, as it comes ----


class Stream(TextStreamer):
    """Prints an answer's words as they come, and notes when its tokens came.

    say: what prints. until: a time of time.perf_counter(), after which it ends by TimeoutError.
    """

    def __init__(self, tokenizer, say=print, until=None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say, self.until = say, until
        self.times = []  # when each token came
        self.text = ""
        self.speech_tokens = 0

    def put(self, value):
        was_prompt = self.next_tokens_are_prompt
        super().put(value)
        if not was_prompt:
            self.times.append(time.perf_counter())
        if self.until and time.perf_counter() > self.until:
            raise TimeoutError

    def on_finalized_text(self, text, stream_end=False):
        if not self.text:
            text = text.lstrip()
        self.text += text
        self.say(text, end="\n" if stream_end else "", flush=True)


def answer_streaming(model, messages, max_new_tokens):
    """Answer a conversation and print the answer as it comes; the Stream that did."""
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    stream = Stream(model.tokenizer)
    parts = model.listen(messages)
    for part in parts:
        if isinstance(part, Speech):
            stream.speech_tokens += ceil_div(len(part.frames), model.connector.k)
    model.generate_rows([parts], max_new_tokens, stream)
    return stream


def describe_answer(stream, start):
    """Times, tokens and memory of an answer in a line."""
    said = []
    if stream.times:
        said.append(f"first token after {stream.times[0] - start:.2f} s")
    if len(stream.times) > 1:
        rate = (len(stream.times) - 1) / max(1e-9, stream.times[-1] - stream.times[0])
        said.append(f"{len(stream.times)} tokens, {rate:.1f} a second")
    said.append(f"{stream.speech_tokens} speech tokens heard")
    if DEVICE != "cpu":
        said.append(f"at most {torch.cuda.max_memory_allocated() / 1e9:.2f} GB of the GPU")
    else:
        said.append(f"at most {most_memory() / 1e9:.2f} GB of memory")
    return ", ".join(said)


def most_memory():
    """The most memory that this process has had, in bytes."""
    of_windows = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if of_windows:
        return of_windows
    import resource  # Windows has none

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
