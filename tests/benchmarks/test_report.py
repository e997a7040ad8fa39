from __future__ import annotations

import io
import os
import platform
from typing import Any

import orjson
import pytest
from rich.console import Console

from benchmarks.machine import cpu_model, installed, this_machine
from benchmarks.report import Check, Goal, Report, Spread, number


def check(value: float | None, goal: Goal = Goal.AT_MOST) -> Check:
    return Check(name="cost [us]", value=value, target=10.0, unit="us", goal=goal)


def printed(report: Report, *, as_json: bool = True) -> tuple[int, str]:
    out = io.StringIO()
    code = report.finish(as_json=as_json, console=Console(file=out, width=100))
    return code, out.getvalue()


def last_line(report: Report) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(printed(report)[1].splitlines()[-1])
    return found


def test_the_last_line_is_one_json_object_of_the_agreed_shape() -> None:
    found = last_line(Report(title="t", checks=[check(9.0)], spread={"a": Spread.of([3, 1, 2])}))
    assert set(found) >= {"checks", "spread", "machine", "date"}
    assert set(found["checks"][0]) >= {"name", "value", "target", "unit", "ok"}
    assert found["spread"]["a"] == {"low": 1, "median": 2, "high": 3, "samples": 3}


def test_without_json_there_is_only_the_table_for_people() -> None:
    code, text = printed(Report(title="t", checks=[check(9.0)]), as_json=False)
    assert code == 0
    assert "cost [us]" in text
    assert "{" not in text


@pytest.mark.parametrize(
    ("it", "ok"),
    [
        (check(10.0), True),
        (check(10.1), False),
        (check(10.0, Goal.AT_LEAST), True),
        (check(9.9, Goal.AT_LEAST), False),
        (check(None), False),
        (check(None, Goal.AT_LEAST), False),
        (check(float("nan")), False),
    ],
)
def test_a_check_is_kept_only_by_a_measured_value_on_the_right_side(it: Check, ok: object) -> None:
    assert it.ok is ok
    assert Report(title="t", checks=[check(1.0), it]).exit_code == (0 if ok else 1)


def test_a_missed_check_is_said_in_words_and_in_the_exit_code() -> None:
    code, text = printed(Report(title="t", checks=[check(None)]))
    assert code == 1
    assert "not measured" in text
    assert "missed" in text


def test_nothing_measured_has_no_spread() -> None:
    with pytest.raises(ValueError, match="nothing"):
        Spread.of([])


@pytest.mark.parametrize(
    ("value", "text"), [(0.125, "0.12"), (12.34, "12.3"), (1234.5, "1,234"), (0, "0.0")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_the_machine_line_names_no_host_no_user_and_no_path() -> None:
    text = str(this_machine())
    assert f"Python {platform.python_version()}" in text
    for secret in (platform.node(), os.getcwd(), "/"):
        assert not secret or len(secret) < 4 or secret not in text


def test_packages_that_are_not_installed_are_left_out() -> None:
    assert installed(("no-such-package-at-all",)) == {}
    assert cpu_model() != ""
