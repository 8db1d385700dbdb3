"""The command line of a command, made from its dataclass of options by tyro."""

import contextlib
import copy
import inspect
import io
import re
from dataclasses import dataclass, fields, make_dataclass
from types import UnionType
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import docstring_parser
import tyro

from support.files import UserError

Positional = tyro.conf.Positional


def called(metavar):
    """A text that stands in its place on the command line, and what its help calls it."""
    return Positional[Annotated[str, tyro.conf.arg(metavar=metavar)]]


def called_many(metavar):
    """Any number of texts that stand in their place on the command line."""
    return Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar=metavar)]]


RunFolder, DataFolder = called("RUN"), called("DATA")


def names_in(text):
    """The names in a list separated by commas, as --recipes takes it."""
    return [name.strip() for name in text.split(",") if name.strip()]


@dataclass(frozen=True)
class Between:
    """Marks a field of options whose value lies between two bounds (or is None)."""

    low: float
    high: float


Count = Annotated[int, Between(1, 2**20)]
Seed = Annotated[int, Between(0, 2**31 - 1)]
Rank = Annotated[int, Between(0, 1024)]
RankOrFull = Rank | Literal["full"]
FramesPerToken = Annotated[int, Between(1, 256)]
Rate = Annotated[float, Between(1e-12, 1)]
Size = Annotated[float, Between(1e-6, 1e6)]


def parse_options(kind, words, prog, description):
    """The options of the dataclass `kind` from the words of a command line.

    UserError says in one line what cannot be understood. Asked for --help, it prints that and
    leaves by SystemExit(0).
    """
    refuse_values_of_switches(kind, words)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            typed = tyro.cli(
                with_help(kind),
                prog=prog,
                description=inspect.cleandoc(description),
                args=words,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{in_one_line(said.getvalue())} (see {prog} --help)") from None
    options = kind(**vars(typed))
    check(options)
    return options


def refuse_values_of_switches(kind, words):
    """UserError for a word like --force=no: tyro would read --force, and `no` as a word more."""
    switches = [as_option(field.name) for field in fields(kind) if field.type is bool]
    for word in words:
        option, equals, _ = word.partition("=")  # tyro takes --skip_bad for --skip-bad
        if equals and option.replace("_", "-") in switches:
            raise UserError(f"{option}: is a switch, it takes no value")


def with_help(kind):
    """The dataclass as tyro is to read it: each field's docstring is its help, as one paragraph.

    A default that is None, False or empty goes without saying.
    """
    texts = {p.arg_name: p.description for p in docstring_parser.parse_from_object(kind).params}
    hints = get_type_hints(kind, include_extras=True)
    columns = []
    for field in fields(kind):
        unsaid = field.default is None or field.default is False or field.default in ("", ())
        text = " ".join(texts[field.name].split())
        explained = tyro.conf.arg(help=text, help_behavior_hint="" if unsaid else None)
        kept = copy.copy(field)  # make_dataclass writes the new type into the field it is given
        columns.append((field.name, Annotated[hints[field.name], explained], kept))
    return make_dataclass(kind.__name__, columns)


def in_one_line(box):
    """The first paragraph of a framed message of tyro's."""
    words = []
    for line in box.splitlines()[1:]:
        line = line.strip("│╭╰─╮╯ ")
        if line.strip("-"):
            words.append(line)
        elif words:
            break  # a rule: ─, or - where the console knows no UTF-8
    return re.sub(r"\s+", " ", " ".join(words)).strip()


def check(options):
    """UserError if a field's value is not of its type, none of its choices, or out of its bounds.

    tyro sees to types and choices of what is typed; not to those of a config.json.
    """
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, name = getattr(options, field.name), as_option(field.name)
        for text in value if isinstance(value, tuple) else [value]:
            if isinstance(text, str) and text != field.default:
                refuse_odd_text(name, text)
        problem = what_is_wrong(value, hints[field.name])
        if problem:
            raise UserError(f"{name} {value}: is {problem}")


# an empty text would be the current folder; where it is the default it means none, and is right
FOLDERS = ("--out", "--run", "--data", "--download-to")


def refuse_odd_text(name, value):
    """UserError for a text that can be no name of a file and nothing to say."""
    if not value:
        raise UserError(f"{name}: {'names no folder' if name in FOLDERS else 'is an empty text'}")
    if value == "--":  # of --out=--
        raise UserError(f"{name} --: is no value of an option")
    try:
        value.encode()
    except UnicodeEncodeError:
        shown = value.encode(errors="backslashreplace").decode()
        raise UserError(f"{name} {shown}: is not in UTF-8") from None
    if "\0" in value:
        raise UserError(f"{name}: holds a NUL character")


def what_is_wrong(value, hint):
    """Why a value is none of a type, in words; "" if it is one."""
    if get_origin(hint) in (Union, UnionType):
        wrong = [what_is_wrong(value, part) for part in get_args(hint)]
        return "" if "" in wrong else wrong[0]
    bounds = None
    if isinstance(value, tuple):  # of called_many: each of its texts was looked at
        return ""
    if get_origin(hint) is Annotated:
        bounds = next((mark for mark in hint.__metadata__ if isinstance(mark, Between)), None)
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        choices = ", ".join(map(str, get_args(hint)))
        return "" if value in get_args(hint) else f"none of {choices}"
    kind, is_flag = (int, float) if hint is float else hint, isinstance(value, bool)
    of_kind = isinstance(value, kind) and is_flag == (hint is bool)
    if not bounds:
        return "" if of_kind else f"no {WORDS.get(hint, 'value')} of this option"
    if of_kind and bounds.low <= value <= bounds.high:
        return ""
    return f"no {WORDS[hint]} from {bounds.low:.12g} to {bounds.high:.12g}"


WORDS = {int: "whole number", float: "number", str: "text", bool: "switch"}


def as_option(name):
    """What a field of options is called on the command line."""
    return f"--{name.replace('_', '-')}"


def command_words(options, *names):
    """Options as the words of a command: those of these names whose value is not None."""
    words = []
    for name in names:
        value = getattr(options, name)
        if value is not None:
            words += [as_option(name), str(value)]
    return words
