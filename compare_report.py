"""What `compare` writes: report.md, report.json, and every plot with the JSON it was drawn from."""

import numpy as np

import plots
from eval import DIALOGUES, QUADRANTS, quadrant_names
from files import whole_file, write_json
from report import TERMS, percent


# ---- tables ----

def interval(found, digits=1, factor=100):
    if found["score"] is None:
        return "–"
    return f"{factor * found['score']:.{digits}f} [{factor * found['ci95'][0]:.{digits}f}, {factor * found['ci95'][1]:.{digits}f}]"


def claims_table(report):
    """The claims about recipes that were asked for; how many others there are is said below."""
    asked = {"text", "cascade", *report["meta"]["recipes"]}
    claims = [c for c in report["claims"] if asked >= set(c["recipes"])]
    lines = ["| claim | paper | difference | in | measured [95%] | runs | verdict |", "|---|---|---|---|---|---|---|"]
    for c in claims:
        small = c["measure"] == "behavior gap"
        lines.append(f"| {c['claim']} | {c['paper']} | {c['difference']} | {c['measure']}{', nats/token' if small else ', points'} | "
                     f"{interval(c, 3, 1) if small else interval(c)} | {c['n']} | **{c['verdict']}** |")
    if others := len(report["claims"]) - len(claims):
        lines += ["", f"{others} other claims are about recipes that were not asked for here."]
    return "\n".join(lines)


def recipe_table(report):
    lines = ["| recipe (runs) | " + " | ".join(quadrant_names(" × ")) +
             " | repeat WER | ignored instruction | behavior gap | text retention | conversations |", "|---|" + "---|" * 9]
    for name, row in report["quadrants"].items():
        m = report["measures"][name]
        lines.append(f"| `{name}` ({row[QUADRANTS[0]]['n']}) | " + " | ".join(interval(row[q]) for q in QUADRANTS) +
                     f" | {percent(report['repeat_wer'][name])} | {interval(m['ignored instruction'])} | {interval(m['behavior gap'], 3, 1)} | "
                     f"{interval(m['text retention'])} | "
                     f"{interval(m['conversations of two turns'])} |")
    return "\n".join(lines)


def spread_table(report):
    """The same, with the lowest and the highest run instead of intervals."""
    def spread(found):
        if found["score"] is None:
            return "–"
        low, high = (percent(end(found["by_run"]), 0).removesuffix("%") for end in (min, max))
        return f"{percent(found['score'])} ({low}–{high})"

    names = ["ignored instruction", "text retention", "conversations of two turns"]
    lines = ["| system | " + " | ".join([*quadrant_names(" × "), "repeat WER", *names]) + " |", "|---|" + "---|" * 8]
    for name, row in report["quadrants"].items():
        cells = [*map(spread, row.values()), percent(report["repeat_wer"][name]), *(spread(report["measures"][name][m]) for m in names)]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bar_table(report):
    """The quality bar: shares of the text top line that mtbi should reach, and 97% of the cascade."""
    if {report["meta"][key] for key in ("speech", "llm", "encoder")} != {"tiny"} or report["meta"]["tasks"]:
        return "It is of the tiny world, and this is another."
    if not {"mtbi", "cascade"} <= set(report["measures"]):
        return "Not measured: it needs `mtbi` and `cascade`."
    lines = ["| cells | mtbi | bar | reached | share of the cascade | 97% reached |", "|---|---|---|---|---|---|"]
    for measure, bar in report["bar"].items():
        ours, cascade = (report["measures"][name][measure]["score"] for name in ("mtbi", "cascade"))
        if ours is None or cascade is None:
            continue
        share = ours / cascade if cascade else None
        lines.append(f"| {measure.removeprefix('score, ')} | {percent(ours)} | {percent(bar, 0)} | {'yes' if ours >= bar else 'no'} | {percent(share)} | "
                     f"{'–' if share is None else 'yes' if share >= 0.97 else 'no'} |")
    return "\n".join(lines)


def training_table(report):
    lines = ["| recipe | runs | trained parameters | audio seen, hours | training, s |", "|---|---|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {row['runs']} | {row['trained_parameters'] / 1e6:.2f}M | {row['audio_seconds'] / 3600:.1f} | "
                              f"{row['train_seconds']:.0f} |"
                              for name, row in report["training"].items()])


def difference_table(report, measure="score, unseen tasks"):
    """Row minus column, points; bold where the interval excludes zero."""
    pairs = report["differences"][measure]
    names = list(dict.fromkeys(name for a, row in pairs.items() for name in (a, *row) if row))
    if not names:
        return "Not measured: there are no two recipes with all the speech."
    lines = ["| | " + " | ".join(f"`{name}`" for name in names) + " |", "|---|" + "---|" * len(names)]
    for a in names:
        cells = []
        for b in names:
            found, sign = (pairs[a][b], 1) if b in pairs.get(a, {}) else (pairs.get(b, {}).get(a), -1)
            text = "" if found is None else f"{round(100 * sign * found['score'], 1) + 0.0:+.1f}"
            cells.append(f"**{text}**" if found and found["verdict"] != "undecided" else text)
        lines.append(f"| `{a}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# ---- files ----

def write(out, report):
    """The plots, each with the JSON it was drawn from, report.md and report.json."""
    draw(out, report)
    meta, failures = report["meta"], report["meta"]["failures"]
    text = f"""# {', '.join(meta['recipes'])}: {len(meta['runs'])} run{'s' * (len(meta['runs']) > 1)}{', shortened' if meta['quick'] else ''}

On held-out speakers and sentences; in percent, the behavior gap in nats a token; in brackets 95% bootstrap intervals over \
{'runs and ' if len(meta['runs']) > 1 else ''}utterances.

{TERMS}

## Claims

{claims_table(report)}

The rule, written before the run: {report['rule']} Runs: {', '.join(meta['runs'])}.
{'' if not failures else chr(10).join(['', '**Failed:**', *(f'- {name}: {why}' for name, why in failures.items())])}

## The quality bar

{bar_table(report)}

## Recipes

{recipe_table(report)}

{f'The same, in brackets the lowest and the highest run instead of an interval:{chr(10) * 2}{spread_table(report)}' if len(meta['runs']) > 1 else ''}

![recipe × quadrant](quadrants.png)

![ignored instruction](ignored.png)

![recipe × task](tasks.png)

![conversations](dialogues.png)

Exact match, WER, chrF and BLEU of every task, as means over the runs: metrics.json.

## Paired differences

Row minus column in points of the score on unseen tasks; bold: the 95% interval excludes zero, by the same rule. Every other measure, with the
intervals: differences.json.

{difference_table(report)}

## Data efficiency

{'![unseen tasks by share of the speech](curve.png)' if report['curve'] else 'Not measured: no recipe was trained on a part of the speech.'}

## Attention

![attention by layer](attention.png)

## Text retention

![text retention](retention.png)

## How this was made

{training_table(report)}

{chr(10).join(f'- {key}: {value}' for key, value in meta.items() if key != 'failures')}
"""
    with whole_file(out / "report.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    for name in ("differences", "metrics"):                        # tables too long for report.md
        write_json(out / f"{name}.json", report[name])
    write_json(out / "report.json", report)


def draw(out, report):
    """Every PNG, and beside it the JSON it was drawn from."""
    def keep(name, numbers):
        write_json(out / f"{name}.json", numbers)
        return out / f"{name}.png"

    def whole(table):
        """Without the recipes on a part of the speech, which the curve shows."""
        return {name: row for name, row in table.items() if "@" not in name}

    plots.bars(keep("quadrants", report["quadrants"]), quadrant_names("\n"), {n: list(row.values()) for n, row in whole(report["quadrants"]).items()},
               "Generalization", "score, % of the text LLM")
    plots.bars(keep("dialogues", report["dialogues"]), [d.replace("_", " ") for d in DIALOGUES],
               {n: list(row.values()) for n, row in whole(report["dialogues"]).items()}, "Conversations of two turns", "score, % of the text LLM")
    for name, measure in (("ignored", "ignored instruction"), ("retention", "text retention")):
        cells = {n: [row[measure]] for n, row in whole(report["measures"]).items()}
        plots.bars(keep(name, cells), [measure], cells, measure.capitalize(), "%")
    tasks = list(next(iter(report["tasks"].values())))
    grid = np.array([[row[t] for row in report["tasks"].values()] for t in tasks], dtype=float)
    plots.heat_map(keep("tasks", report["tasks"]), tasks, list(report["tasks"]), grid, "score by task, %")
    curves = {n: (list(row), [100 * c["score"] for c in row.values()], tuple([100 * c["ci95"][end] for c in row.values()] for end in (0, 1)))
              for n, row in report["curve"].items() if all(c["score"] is not None for c in row.values())}
    if report["curve"]:
        plots.lines(keep("curve", report["curve"]), curves, "share of the training speech, %", "score on unseen tasks, % of the text LLM", "Data efficiency")
    plots.attention(keep("attention", report["attention"]), whole(report["attention"]))
