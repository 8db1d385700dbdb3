"""What the pages say can be typed: their Python runs, and their commands are understood."""

import re
import shlex
import shutil
import textwrap

import pytest
from conftest import ROOT

import model
import mtbi
from app.drawing import DrawingOptions
from app.screenshot import ScreenshotOptions
from lab.dose import DoseOptions
from lab.gpu import GpuOptions
from lab.look import LookOptions, look
from lab.step import StepOptions
from mtbi import COMMANDS
from support.files import read_json, write_json
from support.options import parse_options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tiny" / "README.md"]
WITH_PYTHON = ["README.md", "docs/extend.md"]
BLOCK = re.compile(r"^ *```(\w+)\n(.*?)^ *```", re.S | re.M)


def blocks_of(page, language):
    """The fenced blocks of a page in a language, without the page's indentation."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [textwrap.dedent(text) for kind, text in found if kind == language]


def snippets():
    found = []
    for name in WITH_PYTHON:
        for i, text in enumerate(blocks_of(ROOT / name, "python"), 1):
            found.append(pytest.param(name, text, id=f"{name}-{i}"))
    return found


@pytest.fixture
def beside_mtbi(trained_world, tmp_path, monkeypatch):
    """A folder like the project's after the demo: a task table, and a trained run in runs/demo."""
    demo = tmp_path / "runs" / "demo"
    shutil.copytree(trained_world / "run", demo)
    shutil.copytree(trained_world / "data", demo / "data")
    config = read_json(demo / "config.json")
    config["options"]["data"] = "data"
    write_json(demo / "config.json", config)
    (tmp_path / "tiny").mkdir()
    shutil.copy(ROOT / "tiny" / "tasks.toml", tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tables_as_before():
    """What a snippet adds to a table is taken out again."""
    tables = (mtbi.RECIPES, model.CONNECTORS, model.LOSSES, model.ENCODERS)
    before = [dict(table) for table in tables]
    yield
    for table, rows in zip(tables, before):
        table.clear()
        table.update(rows)


@pytest.mark.parametrize("page, snippet", snippets())
def test_the_python_of_the_pages_runs(
    page, snippet, beside_mtbi, tables_as_before, monkeypatch, capsys
):
    command = mtbi.main

    def must_do(words):
        assert command(words) == 0, words

    monkeypatch.setattr(mtbi, "main", must_do)
    exec(compile(snippet, page, "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "it says something"


def test_the_readme_asks_a_trained_model_in_three_lines_of_python():
    [snippet] = blocks_of(ROOT / "README.md", "python")
    assert len([line for line in snippet.splitlines() if line]) == 3
    assert "SpeechLLM.from_pretrained" in snippet


def test_the_readme_names_the_papers_by_their_full_titles():
    papers = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    titles = re.findall(r"^\*([^*]+)\*,\s+arXiv", papers, re.M)
    assert len(titles) == 4
    for title in titles:
        assert f"*{' '.join(title.split())}*" in readme


def test_each_extension_takes_at_most_twenty_lines():
    for snippet in blocks_of(ROOT / "docs" / "extend.md", "python"):
        assert len([line for line in snippet.splitlines() if line]) <= 20


def test_extending_it_shows_a_recipe_a_task_a_connector_a_loss_and_an_encoder():
    text = "\n".join(blocks_of(ROOT / "docs" / "extend.md", "python"))
    for table in ("RECIPES[", "CONNECTORS[", "LOSSES[", "ENCODERS[", "tasks.toml"):
        assert table in text


# ---- commands ----

PROGRAMS = {
    "app.drawing": DrawingOptions,
    "app.screenshot": ScreenshotOptions,
    "lab.dose": DoseOptions,
    "lab.gpu": GpuOptions,
    "lab.look": LookOptions,
    "lab.step": StepOptions,
}


def command_lines(page):
    """[words] of the `python …` lines in a page's sh blocks, and of those in its text."""
    text = page.read_text(encoding="utf-8")
    ours = r"python (?:mtbi|train|eval)\.py [^`]+|python -m (?:app|lab)\.[^`]+"
    lines = re.findall(f"`({ours})`", text)
    for block in blocks_of(page, "sh"):
        lines += block.replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        if line.startswith("python ") and "…" not in line:
            found.append(shlex.split(line, comments=True)[1:])
    return found


def options_of(words):
    """(dataclass of the options, the words after the command) of a command line of ours."""
    if words[:1] == ["-m"]:
        return PROGRAMS[words[1]], words[2:]
    if words[0] in ("train.py", "eval.py"):
        return COMMANDS[{"train.py": "train", "eval.py": "bench"}[words[0]]][0], words[1:]
    if words[0] == "mtbi.py" and words[1:2] not in ([], ["COMMAND"]):
        return COMMANDS[words[1]][0], words[2:]
    return None, words  # not one of ours, or only the form of one


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_line_of_the_pages_is_understood(page):
    for words in command_lines(page):
        kind, rest = options_of(words)
        if kind:
            parse_options(kind, rest, " ".join(words[:2]), "")


def test_command_lines_are_found_in_blocks_and_in_the_text():
    commands = [words[1] for words in command_lines(ROOT / "README.md") if words[0] == "mtbi.py"]
    assert {"demo", "generate", "plan", "prepare", "behaviors", "train", "bench"} <= set(commands)


def test_the_first_hours_commands_run_on_what_the_demo_leaves(beside_mtbi, capsys):
    """Those of the README about runs/demo, but for the demo itself."""
    ran = []
    for words in command_lines(ROOT / "README.md"):
        if "runs/demo" not in words or "serve" in words:  # which stays: see test_page.py
            continue
        kind, rest = options_of(words)
        if words[0] == "mtbi.py":
            assert mtbi.main(words[1:]) == 0, words
        else:
            look(parse_options(kind, rest, "look", ""))
        assert capsys.readouterr().out.strip()
        ran.append(words[1])
    assert {"generate", "lab.look"} <= set(ran)
