"""The range of every number that a person can set: written in the option's type, checked in one place, refused by name."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from nanofed.errors import ConfigError


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; `above` and `below` leave the bound itself out.

    It stands in an option's type, `Annotated[int, Range(1, 64)]`, also inside `… | None` and `list[…]`.
    """

    least: float
    most: float
    above: bool = False
    below: bool = False

    def problem(self, value: float) -> str | None:
        """Say what is wrong with a number, as the end of "NAME must be …"; None where nothing is."""
        if not -math.inf < value < math.inf:
            return f"a number, not {value}"
        if value < self.least or (self.above and value == self.least):
            least = f"{self.least:,}"
            if self.above:
                return f"{'positive' if self.least == 0 else f'above {least}'}, not {value}"
            return f"at least {least}, not {_short(value)}"
        if value > self.most or (self.below and value == self.most):
            return f"{'below' if self.below else 'at most'} {self.most:,}, not {_short(value)}"
        return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


# How large a number may be where nothing else limits it: far beyond any use, and no overflow on the way from there.
Count = Annotated[int, Range(1, 1 << 40)]
CountOrZero = Annotated[int, Range(0, 1 << 40)]
Tokens = Annotated[int, Range(1, 1 << 60)]
Rows = Annotated[int, Range(1, 1 << 24)]  # of a batch, and tokens of a row
Factor = Annotated[float, Range(0, 1e9)]  # a rate, a decay, a norm
Share = Annotated[float, Range(0, 1)]
Nucleus = Annotated[float, Range(0, 1, above=True)]  # a share of probability that is not empty
Seconds = Annotated[float, Range(0, 1e9, above=True)]
SecondsOrZero = Annotated[float, Range(0, 1e9)]
Seed = Annotated[int, Range(0, (1 << 32) - 1)]  # what NumPy takes, and so Lightning


def check_number(name: str, value: Any, kind: Any) -> None:
    """Refuse a number, or a list of them, that is not of the range in an annotated type.

    Args:
        name: what a person calls it.
        value: what it is set to; what is no number (None, say) passes.
        kind: the type: a range stands in an `Annotated` of it. Without one every number that is finite, and no larger than
            64 bits, passes.

    Raises:
        ConfigError: it is out of range or not finite; names it.
    """
    for item, hint in _hinted(value, kind):
        limits = list(_limits(hint))
        bounds = limits[0] if limits else BITS_64 if isinstance(item, Integral) else FINITE
        if limits and get_args(hint)[0] is int and not isinstance(item, Integral):
            raise ConfigError(f"{name} must be a whole number, not {item}")
        if problem := bounds.problem(item):
            raise ConfigError(f"{name} must be {problem}")


FINITE = Range(-math.inf, math.inf)
BITS_64 = Range(-(1 << 63), (1 << 64) - 1)


def check_numbers(values: Any, prefix: str = "", *, kind: Any = None) -> None:
    """Refuse the numbers of an options object, or of the arguments of a call, that are out of range.

    Args:
        values: a dataclass object, or a mapping of names to values.
        prefix: what an error writes in front of the names, such as `federation.`.
        kind: what `ranged` takes; by default the object's own class.

    Raises:
        ConfigError: one is out of range; names it.
    """
    given = values if isinstance(values, Mapping) else vars(values)
    for name, hint in ranged(kind or type(values)).items():
        if name in given:
            check_number(f"{prefix}{name}", given[name], hint)


def ranged(kind: Any) -> dict[str, Any]:
    """Return the options of a dataclass, or the arguments of another class, whose types hold a range, by name."""
    takes: Any = kind if is_dataclass(kind) else getattr(kind, "__init__", kind)
    hints = get_type_hints(takes, include_extras=True)
    return {name: hint for name, hint in hints.items() if any(_limits(hint))}


def _limits(kind: Any) -> Iterator[Range]:
    for hint in _parts(kind):
        yield from (part for part in get_args(hint) if isinstance(part, Range))


def _parts(kind: Any) -> Iterator[Any]:
    """Yield the annotated types inside a type."""
    if get_origin(kind) is Annotated:
        yield kind
    else:
        for part in get_args(kind):
            yield from _parts(part)


def _hinted(value: Any, kind: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the numbers in a value, each with the type that is written for it."""
    origin, parts = get_origin(kind), get_args(kind)
    listed = isinstance(value, (list, tuple))
    if origin in (Union, UnionType):
        parts = tuple(part for part in parts if any(_limits(part))) or (None,)
        for part in [part for part in parts if (get_origin(part) in (list, tuple)) == listed] or parts:
            yield from _hinted(value, part)
    elif origin in (list, tuple) and listed:
        for item, part in zip(value, parts if origin is tuple else parts * len(value), strict=False):
            yield from _hinted(item, part)
    else:
        yield from ((number, kind) for number in _numbers(value))


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, bool):
        return
    if isinstance(value, Real):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _numbers(item)
