"""`inspect`: one picture of what a trained model makes of a recording, or of a training example."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from app.generate import chosen_recipe
from app.inside import draw_example, draw_heard, hear
from data import Speech, load_audio, open_run
from lab.look import examples_of
from lab.plots import finish_figure, picture_to_draw, pyplot
from model import SpeechLLM
from support.files import UserError
from support.options import Between, RunFolder, called_many


@dataclass
class InspectOptions:
    run: RunFolder
    """a run folder with a trained recipe, or the folder of one, RUN/RECIPE"""
    audio: called_many("AUDIO") = ()
    """a WAV, FLAC, OGG or MP3 file"""
    example: Annotated[int, Between(0, 2**31)] | None = None
    """this conversation of the training instead of a file, counted from 0 over all its steps"""
    prompt: str = "Repeat this."
    """what the model is asked about the file"""
    recipe: str | None = None
    """which of its recipes; default: the first of the table that is there"""
    out: str = "inspect.png"
    """the picture to write"""


def draw_inside(options, recipes):
    """Draw the picture; recipes: the names of the table."""
    if (options.example is None) != (len(options.audio) == 1):
        raise UserError("inspect: name one sound file, or --example N")
    out = picture_to_draw(options.out)
    folder = chosen_recipe(options.run, options.recipe, recipes)
    if options.example is None:
        figure = figure_of_clip(options, folder)
    else:
        figure = figure_of_example(options, folder)
    finish_figure(figure, out)
    print(f"{out}: written")


def figure_of_clip(options, folder):
    """Sound, mel, frames, speech tokens, attention."""
    path = options.audio[0]
    samples = load_audio(path)
    model = SpeechLLM.from_pretrained(folder)
    answer = model.answer(options.prompt, path)
    words = None
    own = open_run(folder.parent).utterances if (folder.parent / "behaviors.jsonl").exists() else []
    for utterance in own:  # of the run's own, word times are known
        if utterance.audio.resolve() == Path(path).resolve():
            words = utterance.words
    return draw_heard(pyplot, model, hear(model, samples, path), options.prompt, answer, words)


def figure_of_example(options, folder):
    """A conversation of the training, text and speech in colours."""
    model, examples = examples_of(open_run(folder.parent), folder)
    size = examples.batch_size
    number, i = divmod(options.example, size)  # of the micro-batch, over all steps
    if number >= examples.steps * examples.accumulate:
        most = examples.steps * examples.accumulate * size - 1
        raise UserError(f"--example {options.example}: they are counted from 0 to {most}")
    step, micro = divmod(number, examples.accumulate)
    batch = examples.batch(step, micro)
    mixed = [n for n, example in enumerate(batch) if pieces_of_speech(example) > 1]
    if mixed and i not in mixed:
        others = ", ".join(str(number * size + n) for n in mixed[:5])
        n = pieces_of_speech(batch[i])
        print(f"--example {options.example}: {n} pieces of speech; more than one have {others}")
    title = f"{folder}: conversation {micro * size + i} of step {step}"
    return draw_example(pyplot, model, batch[i], title)


def pieces_of_speech(example):
    """How many there are, between what is text."""
    return sum(isinstance(part, Speech) for part in example.parts)
