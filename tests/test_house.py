"""How the code stands: which rooms there are, who imports whom, and how its lines read."""

import ast
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THE_FIVE = ["data", "model", "train", "eval", "mtbi"]
PACKAGES = ["app", "corpora", "lab", "support", "tiny"]

# place -> the places that it may import
MAY_IMPORT = {
    "support": set(),
    "tiny": {"support"},
    "data": {"support"},
    "model": {"data", "support"},
    "train": {"model", "data", "support"},
    "eval": {"model", "data", "support"},
    "corpora": {"eval", "model", "data", "support", "tiny"},
    "lab": {"eval", "model", "train", "data", "support"},
    "app": {"lab", "eval", "model", "data", "support", "tiny"},
    "mtbi": {"app", "corpora", "lab", "eval", "model", "train", "data", "support", "tiny"},
}


def files_of(place):
    if place in THE_FIVE:
        return [ROOT / f"{place}.py"]
    return sorted((ROOT / place).glob("*.py"))


def all_files():
    files = []
    for place in MAY_IMPORT:
        files += files_of(place)
    return files


def is_script_ending(node):
    """`if __name__ == "__main__":`, where train.py and eval.py become commands of mtbi.py."""
    return isinstance(node, ast.If) and "__name__" in ast.dump(node.test)


def imports_of(path, place):
    """The places that a file imports, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not is_script_ending(node)]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0] if not node.level else place)
    return (found & set(MAY_IMPORT)) - {place}


def test_in_the_root_stand_the_five_modules_and_no_other():
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    there = [name for name in tracked if (ROOT / name).exists()]
    assert sorted(name for name in there if "/" not in name) == sorted(f"{m}.py" for m in THE_FIVE)
    assert {name.split("/")[0] for name in there if "/" in name} == {*PACKAGES, "tests"}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_run_one_way(place):
    for path in files_of(place):
        assert imports_of(path, place) <= MAY_IMPORT[place], path.name


def test_there_are_at_most_33_imports_between_places_on_at_most_7_levels():
    between, level = {}, {}
    for place in MAY_IMPORT:
        between[place] = set().union(*(imports_of(path, place) for path in files_of(place)))
    for place in MAY_IMPORT:  # in an order in which every place stands above what it imports
        level[place] = 1 + max((level[below] for below in between[place]), default=0)
    assert sum(map(len, between.values())) <= 33
    assert max(level.values()) <= 7


def test_no_function_name_stands_twice():
    names = Counter()
    for path in all_files():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name != "main":
                names[node.name] += 1
    assert [name for name, n in names.items() if n > 1] == []


@pytest.mark.parametrize("path", all_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_line_is_over_100_columns(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []


COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def wide_thoughts(tree):
    """Expressions that hold more than one thought: (line, what is wrong)."""
    for node in ast.walk(tree):
        inside = [n for n in ast.walk(node) if n is not node]
        if isinstance(node, COMPREHENSIONS):
            if any(isinstance(n, COMPREHENSIONS) for n in inside):
                yield node.lineno, "a comprehension within a comprehension"
            if any(isinstance(n, ast.NamedExpr) for n in inside):
                yield node.lineno, "a walrus in a comprehension"
        if isinstance(node, ast.IfExp) and any(isinstance(n, ast.IfExp) for n in inside):
            yield node.lineno, "a conditional expression within another"
        if isinstance(node, ast.AugAssign) and isinstance(node.value, ast.IfExp):
            if isinstance(node.value.orelse, ast.List) and not node.value.orelse.elts:
                yield node.lineno, "x += [...] if ... else []"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            sides = (node.left, node.right)
            if any(isinstance(s, ast.List) for s in sides) and any(
                isinstance(s, (ast.Compare, ast.BoolOp, ast.UnaryOp)) for s in sides
            ):
                yield node.lineno, "list * bool"
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            if isinstance(node.operand, ast.BinOp) and isinstance(node.operand.op, ast.FloorDiv):
                yield node.lineno, "-(-a // b), which is ceil_div"


@pytest.mark.parametrize("module", THE_FIVE)
def test_each_line_of_the_five_holds_one_thought(module):
    tree = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8"))
    assert list(wide_thoughts(tree)) == []


@pytest.mark.parametrize("module", THE_FIVE)
def test_functions_of_the_five_fit_a_screen(module):
    tree, long = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0]  # the docstring, if there is one, does not count
            start = first.end_lineno if ast.get_docstring(node) else first.lineno - 1
            if node.end_lineno - start > 45:
                long.append((node.name, node.end_lineno - start))
    assert long == []


def test_the_readme_has_at_most_1000_words():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1000
