"""A folder of a trained recipe, with weights, spec and a model card, that can be published."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from app.generate import chosen_recipe
from data import FULL, open_run
from model import ENCODERS
from lab.report import is_of, markdown_table, percent
from support.files import HALF_WRITTEN, UserError, read_json, read_json_if_whole, unused
from support.files import write_json, writing
from support.hub import split_revision
from support.options import RunFolder
from support.runs import fingerprint_of_training, read_spec

WEIGHTS = ["connector.safetensors"]
ADAPTER = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@dataclass
class ExportOptions:
    run: RunFolder
    """a run folder with a trained recipe, or the folder of one, RUN/RECIPE"""
    out: str
    """the folder to make"""
    recipe: str | None = None
    """which of its recipes; default: the first of the table that is there"""

    # for the card
    llm_name: str | None = None
    """the LLM's public name, if it was trained with a local folder: others load it by that"""
    encoder_name: str | None = None
    """the encoder's, likewise"""
    speech: str | None = None
    """the public name of the speech, and its licence, as `LibriSpeech (CC BY 4.0)`"""
    license: str | None = None
    """the licence of what you publish, as the hub writes it, like mit or cc-by-4.0"""


CARD = """---
{head}
---

# {recipe}: ears for {llm}

A connector{adapter}, {parameters:.2f} million parameters, trained by the recipe `{recipe}`
({about}): it lets the LLM **{llm}** ({bits}) hear what the frozen speech encoder **{encoder}**
makes of speech. The LLM itself and the encoder are not in this folder; `model.json` names them,
with fingerprints of the weights that it was trained for.

## Use it

In a clone of the project that made it:

```python
from model import SpeechLLM

model = SpeechLLM.from_pretrained("YOU/{name}")  # its hub name, or the path of this folder
print(model.answer("Translate this into Spanish.", "clip.wav"))
```

## Data

{data}

## Scores

{scores}

## Limits

It was trained to answer as the LLM does, and says what the LLM would say, wrong or right. It was
measured on speech like its training data and on nothing else.

## Licences

{licences}
"""


def write_folder(options, recipes):
    """Write the folder whole, or not at all; recipes: the table's names."""
    folder = chosen_recipe(options.run, options.recipe, recipes)
    out = unused(options.out, "--out")
    spec = read_spec(folder)
    if fingerprint_of_training(folder) != spec["weights_fingerprint"]:
        raise UserError(f"{folder}: its weights are not those that were trained; train it again")
    spec = with_public_names(spec, options)
    card = model_card(folder, out.name, spec, options)
    names = WEIGHTS + (ADAPTER if spec["lora"] else [])
    half = out.with_name(f"{HALF_WRITTEN}{out.name}")
    with writing(out):
        shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
        for name in names:
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, half / name)
        write_json(half / "model.json", spec)
        (half / "README.md").write_text(card, encoding="utf-8")
        half.rename(out)
    print(f"{out}: {', '.join(names)}, model.json, and README.md, the model card")
    for part in local_parts(spec):
        print(
            f"{part} is a folder of this machine, {spec[part]}: nobody else can load it; if it has "
            f"a public name, say --{part}-name"
        )
    if not options.license:
        print("the card names no licence of yours: say --license")
    print(f"publish it: hf upload YOU/{out.name} {out}")


def with_public_names(spec, options):
    """The spec with the names by which others load the LLM and the encoder.

    Their fingerprints are of the weights themselves, so another name changes none.
    """
    public = dict(spec)
    for part, name in (("llm", options.llm_name), ("encoder", options.encoder_name)):
        if name:
            public[part] = name
    return public


def local_parts(spec):
    return [part for part in ("llm", "encoder") if Path(spec[part]).is_absolute()]


def trained_of_llm(lora):
    """What a card says of it."""
    if lora == FULL:
        return " and, in `adapter/`, a changed copy of all the LLM's weights"
    return f" and a LoRA adapter of rank {lora}" if lora else ""


def is_on_hub(name):
    """Is it a name of the hub: neither the tiny world's, nor a folder, nor one of ENCODERS?"""
    return name != "tiny" and name not in ENCODERS and not Path(name).is_absolute()


def model_card(folder, name, spec, options):
    """The text of README.md: everything in it is read off the run, or was said."""
    run = open_run(folder.parent)
    row = read_json(folder / "config.json", "content")["content"]["recipe"]
    about = ", ".join(f"{key} {value}" for key, value in row.items()) or "the table's defaults"
    return CARD.format(
        head="\n".join(head_of_card(spec, options)),
        recipe=folder.name,
        llm=public_name(spec, "llm"),
        encoder=public_name(spec, "encoder"),
        parameters=spec["trained_parameters"] / 1e6,
        adapter=trained_of_llm(spec["lora"]),
        about=about,
        bits="NF4" if spec["bits"] == 4 else f"{spec['bits']} bits",
        name=name,
        data=data_for_card(run, options.speech),
        scores=scores_for_card(run, folder.name),
        licences=licences_for_card(spec, options),
    )


def public_name(spec, part):
    """As the card calls it: a local folder without the folders above it."""
    if spec[part] == "tiny":
        return f"the tiny world's {'LLM' if part == 'llm' else 'encoder'}"
    return Path(spec[part]).name if part in local_parts(spec) else spec[part]


def head_of_card(spec, options):
    """The lines of YAML that the hub reads: what it knows by name alone."""
    yield "library_name: pytorch"
    if options.license:
        if not re.fullmatch(r"[\w.+-]+", options.license):
            raise UserError(f"--license {options.license}: give a name like mit or cc-by-4.0")
        yield f"license: {options.license}"
    bases = []
    for part in ("llm", "encoder"):
        if is_on_hub(spec[part]):
            bases.append(split_revision(spec[part])[0])
    if bases:
        yield "base_model:"
    for base in bases:
        yield f"- {base}"
    yield "tags:"
    yield "- speech-llm"
    yield "- mtbi"


def licences_for_card(spec, options):
    """A line for each thing that has a licence."""
    lines = [f"- this connector: {options.license or 'not said by who published it'}"]
    for part, what in (("llm", "LLM"), ("encoder", "speech encoder")):
        stands = "as whoever gives it says"
        if spec[part] == "tiny":
            stands = "MIT, with the project"
        elif is_on_hub(spec[part]):
            stands = f"as huggingface.co/{split_revision(spec[part])[0]} says"
        lines.append(f"- the {what}, which is not in here ({public_name(spec, part)}): {stands}")
    if spec["lora"] == FULL:
        lines.append("- that copy of the LLM: as the LLM")
    lines.append(f"- the speech it was made from: {options.speech or 'not said'}")
    return "\n".join(lines)


def data_for_card(run, speech):
    """What it was trained and measured on, and how much."""
    lines = [f"- speech: {speech}"] if speech else []
    for split in ("train", "test"):
        rows = [u for u in run.utterances if u.split == split]
        hours = sum(u.duration for u in rows) / 3600
        speakers = len({u.speaker for u in rows} - {""})
        who = f"{speakers} known speakers"
        lines.append(f"- {split}: {len(rows)} utterances, {hours:.2f} hours, {who}")
    lines.append(
        f"- task table: `{Path(run.options['tasks']).name}`; the answers are the LLM's own"
    )
    return "\n".join(lines)


def scores_for_card(run, recipe):
    """A table of the benchmark's cells with their intervals, if there was a benchmark."""
    report = read_json_if_whole(run.folder / "report.json", "recipes", "meta")
    entry = (report or {}).get("recipes", {}).get(recipe)
    if not entry:
        return "Not measured: no benchmark was run before the export."
    if not is_of(report, run.folder / recipe):
        return "Not measured: no benchmark was run since it was trained again."
    rows = []
    for name, cell in entry["cells"].items():
        low, high = (percent(end) for end in cell["ci95"])
        gain = f"{percent(cell['gain'])} [{low}, {high}]"
        rows.append([name.replace("_", " "), percent(cell["score"]), gain])
    about = (
        "Held-out speech; *gain* is the share of the way from copying the transcript to the text "
        "LLM that reads it; in brackets 95% over utterances."
    )
    return f"{about}\n\n{markdown_table(['tasks and prompts', 'score', 'gain'], rows)}"
