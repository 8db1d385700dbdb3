"""One batch of a training, printed as parts:  python -m lab.look RUN

For the reader: what `Examples.batch` gives, and what `SpeechLLM.embed` makes of it.
"""

import sys
from dataclasses import dataclass
from typing import Annotated

from data import Examples, Recipe, Response, Speech, open_run, positions_of, read_behaviors
from lab.programs import run_program
from model import SpeechLLM, encode_all
from support.files import UserError, explained, fingerprint_of_file
from support.options import Between, Count, RunFolder
from support.runs import read_config


@dataclass
class LookOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    recipe: str = "mtbi"
    """the recipe whose batch it is"""
    step: Annotated[int, Between(0, 2**20)] | None = None
    """which step of its training, counted from 0; default: the one half-way"""
    show: Count = 4
    """how many of the batch's conversations are printed: the one of most parts (where the recipe
    interleaves, that is an interleaved one), then the others in order"""


def look(options):
    """One batch of a training: some of its conversations as parts, and the shapes embed gives."""
    run = open_run(options.run)
    folder = run.folder / options.recipe
    model, examples = examples_of(run, folder)
    steps = examples.steps
    step = steps // 2 if options.step is None else options.step
    if step >= steps:
        raise UserError(f"--step {step}: the {steps} steps of {folder} are 0 to {steps - 1}")
    batch = [example.parts for example in examples.batch(step)]
    print(f"\nstep {step} of {steps}, counted from 0: a micro-batch of {len(batch)} conversations")
    most_parts = max(range(len(batch)), key=lambda i: len(batch[i]))
    others = [i for i in range(len(batch)) if i != most_parts]
    for i in [most_parts, *others][: options.show]:
        print(f"\nconversation {i}" + (", the one of most parts" if i == most_parts else ""))
        for part in batch[i]:
            print(describe_part(part, model))
    embeds, mask, labels = model.embed(batch)
    used, answered = int(mask.sum()), int((labels >= 0).sum())
    print(f"\nembed: embeddings {tuple(embeds.shape)} (B, L, D), mask and labels (B, L)")
    print(f"{used} of {mask.numel()} positions are used, {answered} of them carry loss")


def examples_of(run, folder):
    """(the trained model in a folder, the Examples that it was trained on)."""
    kinds = {"steps": int, "batch_size": int, "accumulate": int, "seed": int}
    trained, content, _ = read_config(folder, "train", **kinds)
    with explained(f"{folder / 'config.json'}: its recipe is none", TypeError):
        changed = {**content["recipe"]}
        changed.pop("lr", None)  # the connector's
        recipe = Recipe(about="", **changed)
    behaviors, manifest = run.folder / "behaviors.jsonl", run.data / "manifest.jsonl"
    for name, path in {"behaviors": behaviors, "manifest": manifest}.items():  # or its word times
        if content.get(name) != fingerprint_of_file(path):
            raise UserError(f"{path}: is not what {folder} was trained on; train it again")
    model = SpeechLLM.from_pretrained(folder)
    utterances = [u for u in run.utterances if u.split == "train"]
    examples = Examples(
        model.tokenizer,
        utterances,
        read_behaviors(behaviors),
        encode_all(model.encoder, utterances, run.data / "features"),
        recipe,
        k=model.connector.k,
        steps=trained["steps"],
        batch_size=trained["batch_size"],
        accumulate=trained["accumulate"],
        seed=trained["seed"],
    )
    return model, examples


def describe_part(part, model):
    if isinstance(part, Speech):
        n = positions_of(part, model.connector.k)
        return f"  Speech    {len(part.frames)} frames -> {n} speech tokens"
    name = "Response" if isinstance(part, Response) else "Text"
    return f"  {name:<9} {len(part.ids)} ids  {model.tokenizer.decode(part.ids)!r}"


if __name__ == "__main__":
    sys.exit(run_program("look", LookOptions, look))
