"""Numbers on the command lines that argparse reads: the range stands in the type, and what is out of it is one line."""

from __future__ import annotations

import argparse
from typing import Any, get_args

from nanofed.errors import ConfigError
from nanofed.ranges import check_number


def add_number(parser: argparse._ActionsContainer, *flags: str, kind: Any, **options: Any) -> None:
    """Add an option that takes a number of a range.

    Args:
        parser: the parser, or a group of it, that gets the option.
        flags: the option's flags; errors name the last one.
        kind: the type with its range, such as `Annotated[int, Range(1, 64)]`.
        options: further arguments of `add_argument`.

    Raises:
        ConfigError: when it is parsed: it is no number, or out of range; names the option.
    """
    parser.add_argument(*flags, type=lambda text: read_number(flags[-1], text, kind), **options)


def read_number(name: str, text: str, kind: Any) -> int | float:
    """Return the number that a person wrote.

    Raises:
        ConfigError: it is no number, or out of the range in its type; names it.
    """
    whole = get_args(kind)[0] is int
    try:
        number: int | float = int(text) if whole else float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a {'whole ' * whole}number, not {text!r:.60}") from None
    check_number(name, number, kind)
    return number
