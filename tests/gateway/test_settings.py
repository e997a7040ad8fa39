from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import pytest

from gateway.settings import ConfigError, bounded, decode, one_of


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    must: int
    text: str = "x"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    share: float = bounded(0.5, low=0, high=1)
    colour: Colour = Colour.RED
    name: str = one_of("a", {"a": 1, "b": 2})
    flag: bool = False
    maybe: int | None = None
    inner: Inner = field(default_factory=lambda: Inner(must=1))
    many: tuple[Inner, ...] = ()


def test_an_empty_table_is_all_defaults() -> None:
    assert decode(Outer, {}) == Outer()


def test_tables_lists_and_enums_are_built() -> None:
    outer = decode(Outer, {"colour": "blue", "many": [{"must": 1}, {"must": 2}], "maybe": 3})
    assert (outer.colour, [one.must for one in outer.many]) == (Colour.BLUE, [1, 2])
    assert outer.maybe == 3


def test_a_whole_number_is_a_float_where_one_is_wanted() -> None:
    share = decode(Outer, {"share": 1}).share
    assert (share, type(share)) == (1.0, float)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"wrong": 1}, "unknown key wrong, expected one of"),
        ({"inner": {"must": 1, "odd": 2}}, r"unknown key inner\.odd"),
        ({"many": [{"must": 1}, {"must": 1, "odd": 2}]}, r"unknown key many\[1\]\.odd"),
        ({"inner": {}}, r"inner\.must is missing"),
        ({"share": "x"}, "share must be a number, got 'x'"),
        ({"share": True}, "share must be a number, got True"),
        ({"share": 1.5}, "share must be at most 1, got 1.5"),
        ({"share": -1}, "share must be at least 0, got -1"),
        ({"share": float("nan")}, "share must be"),
        ({"flag": 1}, "flag must be true or false, got 1"),
        ({"maybe": "x"}, "maybe must be a whole number"),
        ({"colour": "green"}, r"colour must be one of \['red', 'blue'\], got 'green'"),
        ({"colour": ["red"]}, "colour must be one of"),
        ({"name": "c"}, r"name must be one of \['a', 'b'\], got 'c'"),
        ({"inner": 5}, "inner must be a table, got 5"),
        ({"many": {"must": 1}}, "many must be a list"),
        ({"many": [1]}, r"many\[0\] must be a table"),
    ],
)
def test_a_mistake_is_called_by_its_key(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decode(Outer, table)
