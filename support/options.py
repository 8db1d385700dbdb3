"""The command line of a command, made from its dataclass of options by tyro."""

import contextlib
import inspect
import io
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import tyro

from support.files import UserError

Positional = tyro.conf.Positional


def called(metavar):
    """A text that stands in its place on the command line, and what its help calls it."""
    return Positional[Annotated[str, tyro.conf.arg(metavar=metavar)]]


RunFolder, DataFolder = called("RUN"), called("DATA")


@dataclass(frozen=True)
class Between:
    """Marks a field of options whose value lies between two bounds (or is None)."""

    low: float
    high: float


Count = Annotated[int, Between(1, 2**20)]
Seed = Annotated[int, Between(0, 2**31 - 1)]
Rank = Annotated[int, Between(0, 1024)]
FramesAToken = Annotated[int, Between(1, 256)]
Rate = Annotated[float, Between(1e-12, 1)]
Size = Annotated[float, Between(1e-6, 1e6)]


def parse_options(kind, words, prog, description):
    """The options of the dataclass `kind` from the words of a command line.

    UserError says in one line what cannot be understood. Asked for --help, it prints that and
    leaves by SystemExit(0).
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(
                kind,
                prog=prog,
                description=inspect.cleandoc(description),
                args=words,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
            )
    except SystemExit as end:
        if not end.code:
            raise
        raise UserError(f"{in_one_line(said.getvalue())} (see {prog} --help)") from None
    check(options)
    return options


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
    """UserError if a field's value is out of the bounds, or none of the choices, of its type."""
    hints = get_type_hints(type(options), include_extras=True)
    for field in fields(options):
        value, hint = getattr(options, field.name), hints[field.name]
        name = f"--{field.name.replace('_', '-')}"
        if get_origin(hint) is Literal and value not in get_args(hint):
            raise UserError(f"{name} {value}: is none of {', '.join(map(str, get_args(hint)))}")
        for bounds in bounds_in(hint):
            is_number = isinstance(value, (int, float))
            if value is None or (is_number and bounds.low <= value <= bounds.high):
                continue
            what = "whole number" if isinstance(value, int) else "number"
            raise UserError(
                f"{name} {value}: is no {what} from {bounds.low:.12g} to {bounds.high:.12g}"
            )


def bounds_in(hint):
    """The Between marks of a type, also of one that may be None."""
    if get_origin(hint) is Annotated:
        return [mark for mark in hint.__metadata__ if isinstance(mark, Between)]
    found = []
    for part in get_args(hint):
        found += bounds_in(part)
    return found


def command_words(options, *names):
    """Options as the words of a command: those of these names whose value is not None."""
    words = []
    for name in names:
        value = getattr(options, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return words
