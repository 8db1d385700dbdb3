"""One batch of a training, printed as parts:  python -m lab.look RUN

For the reader: what `Examples.batch` gives, and what `SpeechLLM.embed` makes of it.
"""

import sys
from dataclasses import dataclass

from data import Examples, Recipe, Response, Speech, open_run, positions_of, read_behaviors
from model import SpeechLLM, encode_all
from support.files import UserError, explained
from support.options import Count, RunFolder, parse_options
from support.runs import read_config


@dataclass
class LookOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    recipe: str = "mtbi"
    """the recipe whose batch it is"""
    step: Count = 1
    """which step of its training"""
    show: Count = 4
    """how many of the batch's conversations are printed"""


def look(options):
    """Print some conversations of one batch as parts, and the shapes that embed gives."""
    run = open_run(options.run)
    folder = run.folder / options.recipe
    kinds = {"steps": int, "batch_size": int, "accumulate": int, "seed": int}
    trained, content, _ = read_config(folder, "train", **kinds)
    with explained(f"{folder / 'config.json'}: its recipe is none", TypeError):
        recipe = Recipe(about="", **content["recipe"])
    model = SpeechLLM.from_pretrained(folder)
    utterances = [u for u in run.utterances if u.split == "train"]
    examples = Examples(
        model.tokenizer,
        utterances,
        read_behaviors(run.folder / "behaviors.jsonl"),
        encode_all(model.encoder, utterances, run.data / "features"),
        recipe,
        k=model.connector.k,
        steps=trained["steps"],
        batch_size=trained["batch_size"],
        accumulate=trained["accumulate"],
        seed=trained["seed"],
    )
    batch = [example.parts for example in examples.batch(options.step)]
    for parts in batch[: options.show]:
        print()
        for part in parts:
            print(describe_part(part, model))
    embeds, mask, labels = model.embed(batch)
    used, answered = int(mask.sum()), int((labels >= 0).sum())
    print(f"\nembed: embeddings {tuple(embeds.shape)} (B, L, D), mask and labels (B, L)")
    print(f"{used} of {mask.numel()} positions are used, {answered} of them carry loss")


def describe_part(part, model):
    if isinstance(part, Speech):
        n = positions_of(part, model.connector.k)
        return f"  Speech    {len(part.frames)} frames -> {n} speech tokens"
    name = "Response" if isinstance(part, Response) else "Text"
    return f"  {name:<9} {len(part.ids)} ids  {model.tokenizer.decode(part.ids)!r}"


if __name__ == "__main__":
    try:
        look(parse_options(LookOptions, sys.argv[1:], "python -m lab.look", look.__doc__))
    except UserError as error:
        print(f"look: {error}", file=sys.stderr)
        sys.exit(2)
