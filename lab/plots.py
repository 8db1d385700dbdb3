"""Every plot, drawn from the numbers of a report (matplotlib)."""

from pathlib import Path

import matplotlib
import numpy as np

from support.files import UserError, unused, whole_file

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

TWENTY = pyplot.get_cmap("tab20").colors  # for 20 systems: the strong colours first
pyplot.rcParams["text.parse_math"] = False  # a prompt about dollars is no formula
pyplot.rcParams["axes.prop_cycle"] = pyplot.cycler(color=TWENTY[::2] + TWENTY[1::2])


def picture_to_draw(name):
    """The path of a picture that is not there yet; UserError if it is, or if it is no picture."""
    path = unused(name, "--out")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {name}: must end in .png, .svg or .pdf")
    return path


def finish_figure(figure, path):
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def bars(path, groups, cells, title, ylabel):
    """cells: {system: one {"score", "ci95"} per group}."""
    width, size = 0.8 / len(cells), max(6, 2 + 0.22 * len(groups) * len(cells))
    figure, axes = pyplot.subplots(figsize=(size, 4))
    for i, (name, row) in enumerate(cells.items()):
        # what was not measured is None, which becomes NaN and is not drawn
        means = np.array([cell["score"] for cell in row], dtype=float)  # (groups,)
        ends = np.array([cell["ci95"] for cell in row], dtype=float)  # (groups, 2)
        spread = np.abs(means[:, None] - ends).T  # (2, groups)
        places = np.arange(len(groups)) + i * width
        axes.bar(places, 100 * means, width * 0.9, yerr=100 * spread, capsize=2, label=name)
    axes.set_xticks(np.arange(len(groups)) + 0.4 - width / 2, groups)
    axes.set(ylabel=ylabel, title=title)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish_figure(figure, path)


def heat_map(path, rows, columns, grid, title):
    """grid: (rows, columns) of shares, 0..1."""
    figure, axes = pyplot.subplots(figsize=(2 + 0.75 * len(columns), 0.8 + 0.27 * len(rows)))
    axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for (y, x), value in np.ndenumerate(grid):
        if not np.isnan(value):
            color = "white" if value < 0.6 else "black"
            text = f"{100 * value:.0f}"
            axes.text(x, y, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_title(title)
    finish_figure(figure, path)


def lines(path, curves, xlabel, ylabel, title, **options):
    """curves: {name: (xs, ys, (lows, highs) or None)}."""
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for name, (xs, ys, spread) in curves.items():
        [line] = axes.plot(xs, ys, marker="." if len(xs) < 40 else None, label=name)
        if spread:
            axes.fill_between(xs, *spread, color=line.get_color(), alpha=0.15)
            # one point alone has no area
            axes.vlines(xs, *spread, color=line.get_color(), alpha=0.3)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, **options)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish_figure(figure, path)


def attention(path, systems):
    """systems: {name: {"instruction": [by layer], "utterance": [by layer]}}."""
    titles = {
        "instruction": "on the instruction",
        "utterance": "on the speech (or its transcript)",
    }
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, (kind, title) in zip(panels, titles.items()):
        for name, shares in systems.items():
            layers = range(1, len(shares[kind]) + 1)
            axes.plot(layers, 100 * np.array(shares[kind]), marker=".", label=name)
        axes.set(xlabel="layer", ylabel="share of attention, %", title=f"Attention {title}")
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    finish_figure(figure, path)


def of_bench(folder, report, logs):
    """cells.png, tasks.png, attention.png, loss.png of a run; logs: {recipe: rows}."""
    folder, recipes, splits = Path(folder), report["recipes"], report["meta"]["task_splits"]
    cells = {}
    for name, entry in recipes.items():
        cells[name] = [{**cell, "score": cell["gain"]} for cell in entry["cells"].values()]
    title = "Generalization (bars: 95% interval over utterances)"
    names = ["seen", "unseen prompts", "unseen tasks"]
    bars(folder / "cells.png", names, cells, title, "gain, % of the way from copy to text")

    asked = next(iter(recipes.values()))["tasks"]
    tasks = sorted(asked, key=lambda task: splits[task] == "unseen")
    names = [task + (" (unseen)" if splits[task] == "unseen" else "") for task in tasks]
    grid = []
    for task in tasks:
        grid.append([entry["tasks"][task]["score"] for entry in recipes.values()])
    heat_map(folder / "tasks.png", names, list(recipes), np.array(grid), "score by task, %")

    inside = {name: entry["attention"] for name, entry in recipes.items() if entry["attention"]}
    attention(folder / "attention.png", inside)
    curves = {name: smooth(rows) for name, rows in logs.items()}
    ylabel = "loss, nats/token (mean of 10 steps)"
    lines(folder / "loss.png", curves, "step", ylabel, "Stage 2", yscale="log")


def smooth(rows):
    """(steps, mean loss of the last 10 steps, None) of a training log."""
    rows = [row for row in rows if row["loss"] is not None]
    if not rows:
        return [], [], None
    losses = np.pad([row["loss"] for row in rows], (9, 0), mode="edge")
    means = np.convolve(losses, np.ones(10) / 10, mode="valid")
    return [row["step"] for row in rows], means, None
