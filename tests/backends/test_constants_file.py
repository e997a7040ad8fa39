from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from backends.constants_file import dump_constants, load_constants, parse_constants
from policies.constants import NUMBERS, ConstantsError
from policies.shipped import SHIPPED

KEY = ("h100", "llama", 4)
TEXT = dump_constants({KEY: SHIPPED[KEY]})


def test_what_is_written_is_read_back() -> None:
    table = parse_constants(dump_constants(SHIPPED))
    assert list(table) == list(SHIPPED)
    for key, constants in table.items():
        assert constants.source == SHIPPED[key].source
        for name in NUMBERS:
            assert getattr(constants, name) == pytest.approx(getattr(SHIPPED[key], name), rel=1e-5)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", r"\[\[constants\]\]"),
        ("gemm_efficiency = ", "not a TOML file"),
        (TEXT + "\n[other]\n", "nothing else"),
        (TEXT.replace("gemm_efficiency", "gem_efficiency"), "gem_efficiency.*gemm_efficiency"),
        (TEXT.replace('device = "h100"', "device = 100"), "device 100"),
        (TEXT.replace("tp = 4", "tp = true"), "tp True"),
    ],
)
def test_a_file_that_says_something_else_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConstantsError, match=reason):
        parse_constants(text)


@pytest.mark.parametrize("value", ["-0.5", "2.0", '"fast"', "true", "nan"])
def test_an_efficiency_that_no_machine_has_is_refused(value: str) -> None:
    line = next(line for line in TEXT.splitlines() if line.startswith("gemm_efficiency"))
    with pytest.raises(ConstantsError, match="gemm_efficiency"):
        parse_constants(TEXT.replace(line, f"gemm_efficiency = {value}"))


def test_the_error_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("x = 1")
    with pytest.raises(ConstantsError, match=r"mine\.toml"):
        load_constants(path)


def test_sources_with_quotes_survive() -> None:
    odd = SHIPPED[KEY].__class__(**{**asdict(SHIPPED[KEY]), "source": 'a "b" \\ c\nd ü'})
    assert parse_constants(dump_constants({KEY: odd}))[KEY].source == 'a "b" \\ c\nd ü'
