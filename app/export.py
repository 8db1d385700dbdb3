"""A folder of a trained recipe, with weights, spec and a model card, that can be published."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from app.generate import chosen_recipe
from data import open_run
from lab.report import markdown_table, percent
from support.files import HALF_WRITTEN, UserError, read_json, read_json_if_whole, writing
from support.options import RunFolder
from support.runs import fingerprint_of_training, read_spec

FILES = ["model.json", "connector.safetensors"]
ADAPTER = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"]


@dataclass
class ExportOptions:
    run: RunFolder
    """a run folder with a trained recipe"""
    out: str
    """the folder to make"""
    recipe: str | None = None
    """which of its recipes; default: the first of the table that is there"""


CARD = """---
library_name: pytorch
base_model:
{bases}
tags:
- speech-llm
- mtbi
---

# {recipe}: ears for {llm}

A connector of {parameters:.2f} million parameters{adapter}, trained by the recipe `{recipe}`
({about}): it lets the frozen LLM **{llm}** ({bits}) hear what the frozen speech encoder
**{encoder}** makes of speech. The LLM and the encoder are not in this folder; `model.json` names
them, with fingerprints of the weights that it was trained for.

## Use it

```python
from model import SpeechLLM

model = SpeechLLM.from_pretrained("{name}")
print(model.answer("Translate this into Spanish.", "clip.wav"))
```

in a clone of the project that made it, where `python mtbi.py bench` measures it, too.

## Data

{data}

## Scores

{scores}

## Limits and licences

It was trained to answer as the LLM does, and says what the LLM would say, wrong or right. It was
measured on speech like its training data and on nothing else. The licence of this connector is for
whoever publishes it to choose; it is of use only together with the LLM and the encoder, whose
licences stand with them{bases_in_words}, and it was made from speech whose licence stands with it.
"""


def write_folder(options, recipes):
    """Write the folder whole, or not at all; recipes: the table's names."""
    folder = chosen_recipe(options.run, options.recipe, recipes)
    out = Path(options.out)
    if out.exists():
        raise UserError(f"{out}: is there already; name another --out")
    spec = read_spec(folder)
    if fingerprint_of_training(folder) != spec["weights_fingerprint"]:
        raise UserError(f"{folder}: its weights are not those that were trained; train it again")
    card = model_card(options.run, folder, out.name, spec)
    names = FILES + (ADAPTER if spec["lora"] else [])
    half = out.with_name(f"{HALF_WRITTEN}{out.name}")
    with writing(out):
        shutil.rmtree(half, ignore_errors=True)  # of a process that was killed
        for name in names:
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, half / name)
        (half / "README.md").write_text(card, encoding="utf-8")
        half.rename(out)
    print(f"{out}: {', '.join(names)} and README.md, the model card")
    print(f"publish it: hf upload YOU/{out.name} {out}")


def model_card(run_folder, folder, name, spec):
    """The text of README.md: everything in it is read off the run."""
    run = open_run(run_folder)
    bases = [spec[part] for part in ("llm", "encoder") if spec[part] != "tiny"]
    row = read_json(folder / "config.json", "content")["content"]["recipe"]
    about = ", ".join(f"{key} {value}" for key, value in row.items()) or "the table's defaults"
    return CARD.format(
        bases="\n".join(f"- {base}" for base in bases) or "- none: the tiny world's own",
        recipe=folder.name,
        llm=spec["llm"],
        encoder=spec["encoder"],
        parameters=spec["trained_parameters"] / 1e6,
        adapter=f" and a LoRA adapter of rank {spec['lora']}" if spec["lora"] else "",
        about=about,
        bits="NF4" if spec["bits"] == 4 else f"{spec['bits']} bits",
        name=name,
        data=data_for_card(run),
        scores=scores_for_card(run, folder.name),
        bases_in_words=f" ({', '.join(bases)})" if bases else "",
    )


def data_for_card(run):
    """How much speech it was trained and measured on."""
    lines = []
    for split in ("train", "test"):
        rows = [u for u in run.utterances if u.split == split]
        hours = sum(u.duration for u in rows) / 3600
        speakers = len({u.speaker for u in rows})
        lines.append(f"- {split}: {len(rows)} utterances, {hours:.2f} hours, {speakers} speakers")
    lines.append(f"- task table: `{run.options['tasks']}`; the answers are the LLM's own")
    return "\n".join(lines)


def scores_for_card(run, recipe):
    """A table of the benchmark's cells with their intervals, if there was a benchmark."""
    report = read_json_if_whole(run.folder / "report.json", "recipes")
    entry = (report or {}).get("recipes", {}).get(recipe)
    if not entry:
        return "Not measured: no benchmark was run before the export."
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
