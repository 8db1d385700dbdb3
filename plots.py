"""Every plot, drawn from the numbers of a report (matplotlib)."""

from pathlib import Path

import matplotlib
import numpy as np

from eval import quadrant_names
from files import whole_file

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.rcParams["axes.prop_cycle"] = pyplot.cycler(color=pyplot.get_cmap("tab20").colors[::2] + pyplot.get_cmap("tab20").colors[1::2])      # 20 systems


def finish(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def bars(path, groups, cells, title, ylabel):
    """cells: {system: one {"score", "ci95"} per group}."""
    figure, axes = pyplot.subplots(figsize=(max(6, 2 + 0.22 * len(groups) * len(cells)), 4))
    width = 0.8 / len(cells)
    for i, (name, row) in enumerate(cells.items()):
        means = [100 * (c["score"] or 0) for c in row]
        spread = [[100 * abs((c["score"] or 0) - (c["ci95"][end] if c["ci95"][end] is not None else 0)) for c in row] for end in (0, 1)]
        axes.bar(np.arange(len(groups)) + i * width, means, width * 0.9, yerr=spread, capsize=2, label=name)
    axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, groups)
    axes.set(ylabel=ylabel, title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish(figure, path)


def heat_map(path, rows, columns, grid, title):
    """grid: (rows, columns) of shares, 0..1."""
    figure, axes = pyplot.subplots(figsize=(2 + 0.75 * len(columns), 0.8 + 0.27 * len(rows)))
    axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title)
    finish(figure, path)


def lines(path, curves, xlabel, ylabel, title, **options):
    """curves: {name: (xs, ys, (lows, highs) or None)}."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, (xs, ys, spread) in curves.items():
        [line] = axes.plot(xs, ys, marker="." if len(xs) < 40 else None, label=name)
        if spread:
            axes.fill_between(xs, *spread, color=line.get_color(), alpha=0.15)
            axes.vlines(xs, *spread, color=line.get_color(), alpha=0.3)                # one point alone has no area
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **options)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish(figure, path)


def attention(path, systems):
    """systems: {name: {"instruction": [by layer], "utterance": [by layer]}}."""
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, kind, title in zip(panels, ("instruction", "utterance"), ("on the instruction", "on the speech (or its transcript)")):
        for name, shares in systems.items():
            axes.plot(range(1, len(shares[kind]) + 1), [100 * share for share in shares[kind]], marker=".", label=name)
        axes.set(xlabel="layer", ylabel="share of attention, %", title=f"Attention {title}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish(figure, path)


def of_bench(folder, report, logs):
    """quadrants.png, tasks.png, attention.png and loss.png of one run; logs: {recipe: rows of its log}."""
    folder, recipes, splits = Path(folder), report["recipes"], report["meta"]["task_splits"]
    bars(folder / "quadrants.png", quadrant_names("\n"),
         {name: list(row["quadrants"].values()) for name, row in recipes.items()}, "Generalization (bars: 95% interval over utterances)",
         "score, % of the text LLM")
    tasks = sorted(next(iter(recipes.values()))["tasks"], key=lambda t: splits[t] == "unseen")
    heat_map(folder / "tasks.png", [t + (" (unseen)" if splits[t] == "unseen" else "") for t in tasks], list(recipes),
             np.array([[row["tasks"][t]["score"] for row in recipes.values()] for t in tasks]), "score by task, %")
    attention(folder / "attention.png", {name: row["attention"] for name, row in recipes.items() if row["attention"]})
    lines(folder / "loss.png", {name: smooth(rows) for name, rows in logs.items()}, "step", "loss, nats/token (mean of 10 steps)", "Stage 2", yscale="log")


def smooth(rows):
    rows = [row for row in rows if row["loss"] is not None]
    return [r["step"] for r in rows], np.convolve(np.pad([r["loss"] for r in rows], (9, 0), mode="edge"), np.ones(10) / 10, mode="valid"), None
