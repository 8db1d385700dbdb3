"""What `compare` writes: report.md, report.json, tables as CSV, and the plots drawn from them."""

import numpy as np
import pandas

from eval import DIALOGUES
from lab import plots
from lab.report import TERMS, bullet_list, explain_mistakes, markdown_table, mistake_table
from lab.report import percent, write_table
from lab.statistics import AT, LINES, NAMES, TASK, is_whole
from support.files import write_json, write_text
from train import TrainOptions

CONVERSATIONS = "conversations of two turns"
TABLES = ("scores", "metrics", "differences")
GAINS = [f"gain, {name}" for name in NAMES.values()]
PLOTS = ("cells", "dialogues", "ignored", "retention", "tasks", "curve", "steps", "attention")
COMPARISON = (  # the files that a comparison writes
    "report.md",
    "report.json",
    *(f"{table}.csv" for table in TABLES),
    *(f"{plot}.png" for plot in PLOTS),
)


class Scores:
    """The table of scores, one row for a system and a measure."""

    def __init__(self, report):
        self.table = pandas.DataFrame(report["scores"]).set_index(["system", "measure"])
        self.systems = list(self.table.index.get_level_values("system").unique())
        self.measures = list(self.table.index.get_level_values("measure").unique())
        # the recipes on a part of the speech, or half trained, are for the curves
        self.whole = [name for name in self.systems if is_whole(name)]

    def get(self, system, measure):
        return self.table.loc[(system, measure)]

    def cell(self, system, measure):
        """As the plots want it."""
        found = self.get(system, measure)
        if not found["runs"]:
            return {"score": None, "ci95": [None, None]}
        return {"score": found["score"], "ci95": [found["low"], found["high"]]}


# ---- tables ----


def interval(score, low, high, digits=1, factor=100):
    if score is None or pandas.isna(score):
        return "–"
    return f"{factor * score:.{digits}f} [{factor * low:.{digits}f}, {factor * high:.{digits}f}]"


def claims_table(report):
    """The claims about recipes that were asked for; how many others there are is said below."""
    asked = {*LINES, *report["meta"]["recipes"]}
    claims = []
    for claim in report["claims"]:
        if asked >= {name.partition(AT)[0] for name in claim["recipes"]}:
            claims.append(claim)
    head = ["claim", "paper", "difference", "in", "measured [95%]", "runs", "verdict"]
    rows = []
    for claim in claims:
        is_gap = claim["measure"] == "behavior gap"
        digits, factor, unit = (3, 1, "nats/token") if is_gap else (1, 100, "points")
        measured = interval(claim["score"], *claim["ci95"], digits, factor)
        where = f"{claim['measure']}, {unit}"
        row = [claim["claim"], claim["paper"], claim["difference"], where, measured]
        rows.append([*row, str(claim["n"]), f"**{claim['verdict']}**"])
    table, others = markdown_table(head, rows), len(report["claims"]) - len(claims)
    if others:
        table += f"\n\n{others} other claims are about recipes that were not asked for here."
    return table


def wer_of(report):
    return {row["system"]: row["wer"] for row in report["repeat_wer"]}


def recipe_table(report):
    scores, wer = Scores(report), wer_of(report)
    head = ["recipe (runs)", *GAINS, "repeat WER", "ignored instruction", "anchor rate"]
    head += ["behavior gap", "text retention", "conversations"]

    def shown(name, measure, *form):
        found = scores.get(name, measure)
        return interval(found["score"], found["low"], found["high"], *form)

    rows = []
    for name in scores.systems:
        row = [f"`{name}` ({scores.get(name, GAINS[0])['runs']})"]
        row += [shown(name, measure) for measure in GAINS]
        row += [percent(wer[name]), shown(name, "ignored instruction")]
        row.append(shown(name, "anchor rate"))
        row += [shown(name, "behavior gap", 3, 1), shown(name, "text retention")]
        rows.append([*row, shown(name, CONVERSATIONS)])
    return markdown_table(head, rows)


def spread_table(report):
    """The same, with the lowest and the highest run instead of intervals."""
    scores, wer = Scores(report), wer_of(report)
    measures = ["ignored instruction", "text retention", CONVERSATIONS]

    def spread(name, measure):
        found = scores.get(name, measure)
        if not found["runs"]:
            return "–"
        low, high = min(found["by_run"]), max(found["by_run"])
        return f"{percent(found['score'])} ({100 * low:.0f}–{100 * high:.0f})"

    rows = []
    for name in scores.systems:
        row = [f"`{name}`", *(spread(name, measure) for measure in GAINS), percent(wer[name])]
        rows.append([*row, *(spread(name, m) for m in measures)])
    return markdown_table(["system", *GAINS, "repeat WER", *measures], rows)


def kinds_table(report):
    """The scores by the kind of utterance, as means over the runs."""
    if not report["kinds"]:
        return "The corpus names no kinds of utterances."
    rows = []
    for row in report["kinds"]:
        scores = [percent(row[column]) for column in (*NAMES, "wer", "ignored")]
        rows.append([row["kind"], f"`{row['system']}`", *scores])
    return markdown_table(["kind", "system", *GAINS, "repeat WER", "ignored instruction"], rows)


def mistakes_table(report):
    scores = Scores(report)
    systems = report["mistakes"]
    rates = {name: scores.cell(name, "anchor rate")["score"] for name in systems}
    return mistake_table(systems, rates)


def bar_table(report):
    """The quality bar: shares of the top line that mtbi should reach, and 97% of the cascade."""
    meta, scores = report["meta"], Scores(report)
    if {meta[key] for key in ("speech", "llm", "encoder")} != {"tiny"} or meta["tasks"]:
        return "It is of the tiny world, and this is another."
    others = meta["quick"] or meta["k"] or meta["lora"] is not None
    others = others or meta["batch_size"] * meta["accumulate"] != TrainOptions.batch_size
    if others or meta["steps"] < TrainOptions.steps:
        return "It is of trainings with the defaults, and these are others."
    if not {"mtbi", "cascade"} <= set(scores.systems):
        return "Not measured: it needs `mtbi` and `cascade`."
    head = ["cells", "mtbi", "bar", "reached", "share of the cascade", "97% reached"]
    rows = []
    for measure, bar in report["bar"].items():
        ours, cascade = scores.get("mtbi", measure), scores.get("cascade", measure)
        if not ours["runs"] or not cascade["runs"]:
            continue
        row = [measure.removeprefix("gain, "), percent(ours["score"]), percent(bar, 0)]
        row.append("yes" if ours["score"] >= bar else "no")
        if cascade["score"] and cascade["runs"] == ours["runs"]:
            share = ours["score"] / cascade["score"]
            row += [percent(share), "yes" if share >= 0.97 else "no"]
        else:
            row += ["–", "–"]
        rows.append(row)
    return markdown_table(head, rows)


def training_table(report):
    head = ["recipe", "runs", "trained parameters", "audio heard, hours", "training, s"]
    rows = []
    for row in report["training"]:
        size, hours = row["trained_parameters"] / 1e6, row["audio_seconds"] / 3600
        cells = [f"`{row['system']}`", str(row["runs"]), f"{size:.2f}M", f"{hours:.1f}"]
        rows.append([*cells, f"{row['train_seconds']:.0f}"])
    return markdown_table(head, rows)


def difference_table(report, measure="gain, unseen tasks"):
    """Row minus column, points; bold where the interval excludes zero."""
    found, names = {}, []
    for row in report["differences"]:
        if row["measure"] == measure:
            found[row["system"], row["minus"]] = (row["score"], row["verdict"])
            found[row["minus"], row["system"]] = (-row["score"], row["verdict"])
            names += [row["system"], row["minus"]]
    names = list(dict.fromkeys(names))
    if not names:
        return "Not measured: there are no two recipes with all the speech."
    rows = []
    for a in names:
        cells = [f"`{a}`"]
        for b in names:
            score, verdict = found.get((a, b), (None, "undecided"))
            text = "" if score is None else f"{round(100 * score, 1) + 0.0:+.1f}"
            cells.append(text if verdict == "undecided" else f"**{text}**")
        rows.append(cells)
    return markdown_table(["", *(f"`{name}`" for name in names)], rows)


# ---- files ----


def write_comparison(out, report):
    """The plots, the tables as CSV, report.md, and last report.json."""
    draw_comparison(out, report)
    write_text(out / "report.md", comparison_as_markdown(report))
    for name in TABLES:
        write_table(out / f"{name}.csv", pandas.DataFrame(report[name]))
    too_long = ("metrics", "differences")  # they are in their CSV files alone
    write_json(out / "report.json", {key: report[key] for key in report if key not in too_long})


def title_of(meta):
    runs = len(meta["runs"])
    title = f"{', '.join(meta['recipes'])}: {runs} run{'s' if runs > 1 else ''}"
    return title + (", shortened" if meta["quick"] else "")


def failure_list(failures):
    """What failed and why, as markdown; nothing if nothing did."""
    if not failures:
        return ""
    return f"\n**Failed:**\n{bullet_list(failures)}\n"


def comparison_as_markdown(report):
    """report.md, from its claims to how it was made."""
    parts = [claims_part(report), recipes_part(report), answers_part(report), curves_part(report)]
    return "\n".join([*parts, how_it_was_made(report)])


def claims_part(report):
    """What was measured and over what, and what came of the claims."""
    meta = report["meta"]
    over = "runs and utterances" if len(meta["runs"]) > 1 else "utterances"
    held_out = "sentences, of speakers of whom some were heard in training or have no name"
    if meta["heard_no_speaker"]:
        held_out = "speakers and sentences"
    shared = ""
    if meta["leave_one_speaker_out"]:
        shared = " The runs share most of their training speech: these are somewhat too narrow."
    return f"""# {title_of(meta)}

On held-out {held_out}; in percent, the behavior gap in nats a token; in brackets 95% intervals \
over {over}.{shared}

{TERMS}

## Claims

{claims_table(report)}

The rule, written before the run: {report["rule"]} Runs: {", ".join(meta["runs"])}.
{failure_list(meta["failures"])}
## The quality bar

{bar_table(report)}
"""


def recipes_part(report):
    """How good each recipe is, as tables and plots."""
    spread = ""
    if len(report["meta"]["runs"]) > 1:
        spread = "The same, in brackets the lowest and the highest run instead of an interval:\n\n"
        spread += spread_table(report) + "\n"
    return f"""## Recipes

{recipe_table(report)}

{spread}
![recipe × cell](cells.png)

![ignored instruction](ignored.png)

![recipe × task](tasks.png)

![conversations](dialogues.png)

Every score, with its interval: scores.csv. Exact match, WER, chrF and BLEU of every task, as \
means over the runs: metrics.csv.
"""


def answers_part(report):
    """On which utterances recipes differ, how their wrong answers are wrong, and in pairs."""
    return f"""## Kinds of utterances

{kinds_table(report)}

## Mistakes

{explain_mistakes(report["meta"]["mistakes"])} All runs together.

{mistakes_table(report)}

## Paired differences

Row minus column in points of the gain on unseen tasks; bold: the 95% interval excludes zero, by \
the same rule; of so many pairs one in twenty is bold without any truth in it. Every other \
measure, with the intervals: differences.csv.

{difference_table(report)}
"""


def curves_part(report):
    """What is drawn over the speech, the steps and the layers, where it was measured."""
    curve = "![unseen tasks by share of the speech](curve.png)"
    if not curve_points(report):
        curve = "Not measured: no recipe was trained on a part of the speech."
    steps = "![unseen tasks by training step](steps.png)"
    if not curve_points(report, AT):
        steps = "Not measured: no recipe was followed."
    return f"""## Data efficiency

{curve}

## Quality by step

{steps}

## Attention

![attention by layer](attention.png)

## Text retention

![text retention](retention.png)
"""


def how_it_was_made(report):
    """What training took, and every setting."""
    settings = {key: value for key, value in report["meta"].items() if key != "failures"}
    return f"""## How this was made

{training_table(report)}

{bullet_list(settings)}
"""


# ---- plots ----


def draw_comparison(out, report):
    """Every PNG, from the table of scores."""
    scores = Scores(report)

    def cells(*measures):
        return {name: [scores.cell(name, m) for m in measures] for name in scores.whole}

    of_text = "score, % of the text LLM"
    of_way = "gain, % of the way from copy to text"
    plots.bars(out / "cells.png", list(NAMES.values()), cells(*GAINS), "Generalization", of_way)
    names = [kind.replace("_", " ") for kind in DIALOGUES]
    plots.bars(
        out / "dialogues.png", names, cells(*DIALOGUES), "Conversations of two turns", of_text
    )
    for name, measure in (("ignored", "ignored instruction"), ("retention", "text retention")):
        plots.bars(out / f"{name}.png", [measure], cells(measure), measure.capitalize(), "%")

    tasks = [m for m in scores.measures if m.startswith(TASK)]
    grid = [[scores.get(name, task)["score"] for name in scores.systems] for task in tasks]
    names = [task.removeprefix(TASK) for task in tasks]
    grid = np.array(grid, dtype=float)
    plots.heat_map(out / "tasks.png", names, scores.systems, grid, "score by task, %")

    curves, axis = curve_points(report), "share of the training speech, %"
    if curves:
        ylabel = "gain on unseen tasks, %"
        plots.lines(out / "curve.png", curves, axis, ylabel, "Data efficiency")
    curves, axis = curve_points(report, AT, report["meta"]["steps"]), "training steps"
    if curves:
        plots.lines(out / "steps.png", curves, axis, "gain on unseen tasks, %", "Quality by step")
    whole = {name: row for name, row in report["attention"].items() if is_whole(name)}
    plots.attention(out / "attention.png", whole)


def curve_points(report, mark="@", end=100):
    """{recipe: (xs, gains on unseen tasks, (lows, highs))}, in percent.

    The xs are shares of the speech, in percent; or, with the mark AT, training steps. end: where
    the recipe itself stands.
    """
    scores, curves = Scores(report), {}
    for name in scores.whole:
        start = f"{name}{mark}"
        points = sorted(int(s[len(start) :]) for s in scores.systems if s.startswith(start))
        if not points:
            continue
        systems = [*(f"{start}{point}" for point in points), name]
        rows = [scores.get(system, "gain, unseen tasks") for system in systems]
        spread = ([100 * row["low"] for row in rows], [100 * row["high"] for row in rows])
        curves[name] = ([*points, end], [100 * row["score"] for row in rows], spread)
    return curves
