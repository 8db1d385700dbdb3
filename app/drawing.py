"""The picture of interleaving in the README: python -m app.drawing RUN --out interleaved.svg

Everything in it is of a run: its sound, its numbers of tokens, the answer of its LLM.
"""

import sys
from dataclasses import dataclass

import numpy as np

from app.generate import chosen_recipe
from data import SAMPLE_RATE, Speech, chat_parts, frame_cuts, interleave, load_audio, open_run
from data import positions_of, transcript_tokens, user_turn
from lab.plots import finish_figure, picture_to_draw, pyplot
from lab.programs import run_program
from model import SpeechLLM
from support.chat_template import tokenize_in_context
from support.files import UserError
from support.options import Count, RunFolder

TEXT, SPEECH, TRAINED, FROZEN, ANSWER = "#dbe7f6", "#fde3c8", "#ffd59e", "#eceff1", "#dcefdc"
EDGE, SOUND = "#607d8b", "#e07b1f"
CHARACTER = 0.24  # width of a written character, in widths of a token
GAP = 0.7  # between two boxes


@dataclass
class DrawingOptions:
    run: RunFolder
    """a run folder in which the recipe mtbi is trained"""
    out: str
    """the picture to write: an .svg or a .png"""
    utterance: str | None = None
    """which of its utterances; default: the first sentence of the test split"""
    first: Count = 2
    """the first word that enters as text, counted from 1"""
    last: Count = 3
    """the last one"""
    prompt: str = "Translate this into Spanish."
    """what the LLM is asked"""


@dataclass
class Box:
    """A part of the LLM's input: what it says, how many tokens it takes, and its sound, if any."""

    words: str
    tokens: int
    sound: np.ndarray | None = None  # samples, of speech

    @property
    def width(self):
        return max(self.tokens, width_of(self.words))


def width_of(words):
    """Of written words with some room around them, in widths of a token."""
    return CHARACTER * len(words) + 0.6


def draw_interleaved(options):
    """Draw an utterance of which some words enter as text, and what the LLM answers to it."""
    out = picture_to_draw(options.out)
    if options.first > options.last:
        raise UserError(f"--first {options.first}: comes after --last {options.last}")
    folder = chosen_recipe(options.run, None, ["mtbi"])
    run = open_run(folder.parent)
    utterance = chosen_utterance(run, options)
    model = SpeechLLM.from_pretrained(folder)
    if model.lora:
        raise UserError(f"{folder}: has an adapter, and the picture is of a frozen LLM")
    prompt = Box(options.prompt, len(tokenize_in_context(model.tokenizer, options.prompt)[0]))
    boxes = [prompt, *boxes_of(model, utterance, options)]
    written = [[transcript_tokens(model.tokenizer, utterance.text)]]
    reads = chat_parts(model.tokenizer, user_turn(options.prompt), written)
    answer = model.generate_rows([reads])[0][0]
    finish_figure(figure_of(boxes, answer, model.connector.k, run.options["bits"]), out)
    print(f"{out}: {utterance.id}, {utterance.text!r}")


def chosen_utterance(run, options):
    """The utterance that was named, or the first that fits; UserError if there is none."""
    for utterance in run.utterances:
        fits = utterance.split == "test" and utterance.kind in ("", "sentence")
        if options.utterance:
            fits = utterance.id == options.utterance
        if fits and len(utterance.words or []) > options.last:
            return utterance
    raise UserError(
        f"{options.run}: has no such utterance with word times and more than {options.last} words"
    )


def boxes_of(model, utterance, options):
    """A Box for each part of the utterance, with its words and its sound."""
    words = utterance.text.split()
    as_text = [options.first <= n + 1 <= options.last for n in range(len(words))]
    samples = load_audio(utterance.audio)
    frames = model.encoder(samples, utterance.id)  # (T, D_encoder)
    parts = interleave(model.tokenizer, utterance, frames, as_text)
    cuts = frame_cuts(utterance, len(frames))
    borders = sorted({0, options.first - 1, options.last, len(words)})  # words
    for part, first, last in zip(parts, borders, borders[1:]):
        sound = None
        if isinstance(part, Speech):
            seconds = [cuts[n] / model.encoder.frame_rate for n in (first, last)]
            begin, end = (round(second * SAMPLE_RATE) for second in seconds)
            sound = samples[begin:end]
        yield Box(" ".join(words[first:last]), positions_of(part, model.connector.k), sound)


# ---- the picture: rows from the top to the bottom, at these heights ----

ENTERS, ENCODER, CONNECTOR, TOKENS, LLM, ANSWERED = 10, 7.2, 5.6, 4, 2, 0


def figure_of(boxes, answer, k, bits):
    """The figure; one unit of its width is a token."""
    total = sum(box.width for box in boxes) + GAP * (len(boxes) - 1)
    figure, axes = pyplot.subplots(figsize=(0.3 * (total + 10), 4.8))
    axes.set(xlim=(-0.3, total + 10), ylim=(-1, 13))
    axes.axis("off")
    axes.text(
        0,
        12.6,
        "what the LLM is asked, and an utterance: some words as text, the rest as speech",
        color=EDGE,
    )
    at = 0.0
    for box in boxes:
        draw_box(axes, at, box)
        at += box.width + GAP
    rectangle(axes, 0, LLM, total, 1.3, FROZEN, f"LLM, {bits} bits, frozen")
    arrow(axes, total / 2, LLM, ANSWERED + 1.2)
    wide = max(18, width_of(answer))
    rectangle(axes, max(0, total / 2 - wide / 2), ANSWERED, wide, 1.2, ANSWER, answer)

    beside = total + 0.6
    axes.text(beside, ENCODER + 0.4, "frozen", color=EDGE)
    axes.text(
        beside, CONNECTOR + 0.6, "trained: the only thing that is", color="#b35c00", weight="bold"
    )
    axes.text(beside, CONNECTOR - 0.1, f"{k} frames in, 1 speech token out", color=EDGE)
    axes.text(beside, TOKENS + 0.2, "one row of embeddings", color=EDGE)
    axes.text(
        beside,
        ANSWERED + 0.1,
        "the answer that the same LLM gave\nto the transcript: what training imitates",
        color=EDGE,
    )
    return figure


def draw_box(axes, at, box):
    """A part as it enters, what happens to it, and its tokens in the row."""
    middle = at + box.width / 2
    speech = box.sound is not None
    rectangle(
        axes, at, ENTERS, box.width, 1.8, SPEECH if speech else TEXT, "" if speech else box.words
    )
    if speech:
        sound = box.sound[::20]  # as much as an eye can see
        height = 0.8 * sound / max(1e-3, float(np.abs(sound).max()))
        times = np.linspace(at + 0.15, at + box.width - 0.15, len(height))
        axes.plot(times, ENTERS + 0.9 + height, color=SOUND, linewidth=0.4)
        axes.text(middle, ENTERS - 0.7, f"“{box.words}”", ha="center", color="#a0561b", fontsize=9)
        arrow(axes, middle, ENTERS - 0.9, ENCODER + 1.1)
        rectangle(axes, at, ENCODER, box.width, 1.1, FROZEN, "encoder" if box.width > 2 else "")
        arrow(axes, middle, ENCODER, CONNECTOR + 1.1)
        rectangle(
            axes, at, CONNECTOR, box.width, 1.1, TRAINED, "connector" if box.width > 2.6 else ""
        )
        arrow(axes, middle, CONNECTOR, TOKENS + 0.9)
    else:
        arrow(axes, middle, ENTERS, TOKENS + 0.9)
        if box.width > 5:  # so there is room beside the arrow
            axes.text(middle + 0.2, ENCODER, "its own\nembeddings", color=EDGE, fontsize=8)
    arrow(axes, middle, TOKENS, LLM + 1.3)
    each = box.width / box.tokens
    for n in range(box.tokens):
        rectangle(axes, at + n * each + 0.05, TOKENS, each - 0.1, 0.9, SPEECH if speech else TEXT)


def rectangle(axes, left, bottom, width, height, colour, words=""):
    axes.add_patch(
        pyplot.Rectangle((left, bottom), width, height, facecolor=colour, edgecolor=EDGE)
    )
    axes.text(left + width / 2, bottom + height / 2, words, ha="center", va="center", fontsize=9)


def arrow(axes, x, top, bottom):
    axes.annotate(
        "", (x, bottom), (x, top), arrowprops={"arrowstyle": "-|>", "color": EDGE, "linewidth": 1}
    )


if __name__ == "__main__":
    sys.exit(run_program("drawing", DrawingOptions, draw_interleaved, "app"))
