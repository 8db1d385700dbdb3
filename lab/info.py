"""What `info` says of a run folder; it loads no model."""

from data import FULL, Recipe, read_behaviors
from lab.report import is_of, percent
from support.files import UserError, read_json
from support.logs import read_log
from support.runs import read_config, read_spec, recipe_folders


def describe_run(run, table):
    """Lines about a Run; table: the names of all recipes, in order."""
    report, whole, reported = run.folder / "report.json", {}, {}
    if report.exists():
        whole = read_json(report, "recipes", "meta")
        reported = whole["recipes"]
        if not isinstance(reported, dict):
            raise UserError(f"{report}: is not what `bench` writes; run `bench` again with --force")
    bits = {4: "4 bits (NF4)", 8: "8 bits", 16: "not quantized"}.get(run.options["bits"], "")
    yield f"run        {run.folder}, seed {run.options['seed']}"
    yield f"LLM        {run.options['llm']}, {bits}"
    yield f"data       {run.data.resolve()}"
    for split in ("train", "test"):
        yield describe_split(split, [u for u in run.utterances if u.split == split])
    behaviors = read_behaviors(run.folder / "behaviors.jsonl")
    tasks = {b.task for b in behaviors}
    yield f"behaviors  {len(behaviors)} over {len(tasks)} tasks of {run.options['tasks']}"
    folders = recipe_folders(run.folder, table)
    for name, folder in folders.items():
        yield name
        scored = reported.get(name)
        for line in describe_recipe(folder, scored):
            yield f"  {line}"
        if scored and not is_of(whole, folder):
            yield "  measured before it was trained again: run `bench` again"
    for name, entry in reported.items():
        if name not in folders:
            yield f"{name}\n  {describe_scores(entry)}"
    found = run.folder / "report.md" if reported else f"none yet: run `bench {run.folder}`"
    yield f"report     {found}"
    for other in sorted(run.folder.glob("on/*/report.md")):
        yield f"           {other}"


def describe_split(split, rows):
    minutes = sum(u.duration for u in rows) / 60
    speakers = len({u.speaker for u in rows} - {""})
    timed = sum(bool(u.words) for u in rows)
    return (
        f"  {split:<8} {len(rows)} utterances, {minutes:.1f} minutes, {speakers} known speakers, "
        f"{timed} with word times"
    )


def describe_recipe(folder, scored):
    """Lines about one trained recipe of a run."""
    kinds = {"encoder": str, "steps": int, "batch_size": int, "accumulate": int}
    options, content, done = read_config(folder, "train", **kinds)
    recipe, size = content.get("recipe", {}), ""
    if done:
        spec = read_spec(folder)
        size = f" (k {spec['k']}, hidden {spec['hidden']})"
    lora = recipe.get("lora")
    connector = recipe.get("connector", Recipe.connector)
    adapter = f", LoRA of rank {lora}" if lora else ", LLM frozen"
    adapter = ", all of the LLM trained" if lora == FULL else adapter
    yield f"encoder {options['encoder']}, connector {connector}{size}{adapter}"

    log = read_log(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []
    steps = log[-1]["step"] + 1 if log else 0
    line = f"steps {steps} of {options['steps']}, "
    line += f"{options['batch_size'] * options['accumulate']} utterances each"
    losses = [row["loss"] for row in log if row["loss"] is not None]
    if losses:
        last = losses[-20:]
        line += (
            f"; loss {losses[0]:.3f} -> {sum(last) / len(last):.3f} nats/token (mean of the last "
            f"20 steps), {log[-1]['seconds']:.0f} s"
        )
    yield line if done else f"{line}; not finished: the same `train` command goes on"
    yield describe_scores(scored) if scored else "not in the last report"


def describe_scores(entry):
    try:
        gains = []
        for name, cell in entry["cells"].items():
            gains.append(f"{name.replace('_', ' ')} {percent(cell['gain'])}")
        wer = percent(entry["repeat_wer"])
    except (KeyError, TypeError, AttributeError):
        raise UserError(
            "report.json: is not what `bench` writes; run `bench` again with --force"
        ) from None
    return f"gains {', '.join(gains)}; repeat WER {wer}"
