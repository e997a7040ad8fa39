from __future__ import annotations

import sys

import pytest

from benchmarks import proxy
from benchmarks.proxy import BARE, OURS, REFERENCE, STREAM_US, TTFT_P50, UNARY_US, Findings
from benchmarks.report import Report
from benchmarks.systems import SYSTEMS, Fleet, NotInstalled, System, require, templated


def findings(**ours: float) -> Findings:
    it = Findings()
    for what, theirs, mine in ((STREAM_US, 40.0, ours["stream"]), (UNARY_US, 200, ours["unary"])):
        for noise in (1.0, 3.0, 1.5):
            it.add(REFERENCE, what, theirs * noise)
            it.add(OURS, what, mine * noise)
    for bare in (1.0, 5.0, 2.0):
        it.add(BARE, TTFT_P50, bare)
        it.add(OURS, TTFT_P50, bare + ours["ttft"])
    return it


def report_of(found: Findings) -> Report:
    report = Report(title="t")
    proxy.report_costs(report, [SYSTEMS[name] for name in (OURS, REFERENCE, BARE)], found)
    return report


def test_ratios_are_taken_within_a_round_so_that_noise_cancels() -> None:
    report = report_of(findings(stream=24.0, unary=140.0, ttft=1.9))
    assert [round(check.value or 0, 6) for check in report.checks] == [0.6, 0.7, 1.9]
    assert report.exit_code == 0


@pytest.mark.parametrize(
    "missed", [{"stream": 26.1}, {"unary": 151.0}, {"ttft": 2.1}], ids=lambda each: next(iter(each))
)
def test_each_target_is_checked_by_itself(missed: dict[str, float]) -> None:
    report = report_of(findings(**{"stream": 24.0, "unary": 140.0, "ttft": 1.9, **missed}))
    assert [check.ok for check in report.checks].count(False) == 1


def test_a_round_that_was_not_measured_makes_no_ratio() -> None:
    found = findings(stream=24.0, unary=140.0, ttft=1.9)
    found.of(OURS, STREAM_US).pop()
    report = report_of(found)
    assert report.checks[0].value is None
    assert report.exit_code == 1


def test_another_proxy_is_a_name_and_a_command_with_ports() -> None:
    system = templated("mine=./mine --port {port} {prefill_port} {decode_port}")
    assert system.command is not None
    assert system.command(1, Fleet((2,), (3,))) == ["./mine", "--port", "1", "2", "3"]
    with pytest.raises(ValueError, match="NAME=COMMAND"):
        templated("mine=./mine")


def test_every_router_gets_the_same_workers() -> None:
    for name in (OURS, REFERENCE, "smg"):
        command = SYSTEMS[name].command
        assert command is not None
        words = " ".join(command(30000, Fleet((1,), (2, 3))))
        assert "--prefill http://127.0.0.1:1 8998" in words
        assert "--decode http://127.0.0.1:2 --decode http://127.0.0.1:3" in words


def test_a_system_that_is_not_installed_is_named_with_the_way_out() -> None:
    with pytest.raises(NotInstalled, match="install the extra `bench`"):
        require(System("ghost", lambda *_: [], "no_such_module_at_all"))


def test_an_unknown_system_is_refused_with_the_known_ones(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["proxy", "--systems", "nginx"])
    with pytest.raises(SystemExit) as stopped:
        proxy.main()
    assert stopped.value.code == 2
    assert "sglang-router" in capsys.readouterr().err
