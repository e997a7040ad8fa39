"""`slackwater simulate` as its user meets it: tables, JSON, the log, the page, and refusals."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gateway.__main__ import main, parsed
from gateway.simulate import run_simulate
from gateway.simulation.progress import Shares, write_share
from gateway.simulation.runs import run_all
from gateway.simulation.show import MEASURED
from gateway.simulation.summary import METRICS
from gateway.simulation.svg import Axis, Line, axis, bars, log_axis, plot
from tests.documents import ROOT
from tests.gateway.simulation.scenarios import CHAT, plan

SCENARIO = """
name = "a <small> day"
seeds = [1, 2]
warm_up_s = 1.0
duration_s = 6.0
[[fleet]]
server = [{ role = "prefill", kv_tokens = 20000 }, { role = "decode", kv_tokens = 20000 }]
[[workload]]
name = "chat"
rate = 4.0
input_max = 2000
output_median = 20.0
output_max = 60
[[workload]]
name = "batch"
kind = "offline"
arrivals = "backlog"
count = 10
input_max = 2000
output_max = 60
[[policy]]
name = "edf"
[[policy]]
name = "fcfs & friends"
policies = { order = "fcfs" }
[sweep]
values = [1.0, 2.0]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("simulate")


@pytest.fixture(scope="module")
def told(folder: Path) -> dict[str, Any]:
    """The JSON of one simulation that wrote a log and a page beside it."""
    path = folder / "scenario.toml"
    path.write_text(SCENARIO)
    out = io.StringIO()
    options = ["--json", "--processes", "1", "--log", str(folder), "--html", str(folder / "r.html")]
    given = parsed(["simulate", str(path), *options])
    assert run_simulate(given, Console(file=out, width=200)) == 0
    answer: dict[str, Any] = json.loads(out.getvalue())
    return answer


def test_the_json_has_a_row_for_each_load_policy_and_workload(told: dict[str, Any]) -> None:
    rows = [(it["load"], it["policy"], it["workload"]) for it in told["summary"]]
    assert len(set(rows)) == len(rows) == 2 * 2 * 2
    assert all(set(it["metrics"]) == set(METRICS) for it in told["summary"])
    assert len(told["runs"]) == 2 * 2 * 2


def test_a_spread_lies_around_its_median(told: dict[str, Any]) -> None:
    for row in told["summary"]:
        for spread in filter(None, row["metrics"].values()):
            assert spread["low"] <= spread["median"] <= spread["high"]
    ttft = [row["metrics"]["ttft_ms_p50"] for row in told["summary"] if row["workload"] == "chat"]
    assert any(it["low"] < it["high"] for it in ttft)


def test_the_log_has_every_request_of_every_run(told: dict[str, Any], folder: Path) -> None:
    lines = (folder / "requests.csv").read_text().splitlines()
    assert len(lines) - 1 == sum(run["requests"] for run in told["runs"])
    assert len((folder / "runs.csv").read_text().splitlines()) - 1 == len(told["runs"])


class Page(HTMLParser):
    """What a page refers to, and how its elements nest."""

    VOID = frozenset({"meta"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        self.svgs += tag == "svg"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone_and_shows_every_plot(told: dict[str, Any], folder: Path) -> None:
    text = (folder / "r.html").read_text()
    page = Page()
    page.feed(text)
    assert (page.open, page.links) == ([], [])
    assert page.svgs >= 3 + 1 + 2 + 4 + 4
    assert "a &lt;small&gt; day" in text
    assert "<script" not in text
    for word in ("Attainment against load", "TTFT at load 2", "fcfs &amp; friends: waiting"):
        assert word in text


def test_tables_name_policies_and_workloads(folder: Path) -> None:
    path = folder / "small.toml"
    path.write_text(SCENARIO.replace("[1.0, 2.0]", "[1.0]").replace("[1, 2]", "[1]"))
    out = io.StringIO()
    given = parsed(["simulate", str(path), "--processes", "1", "--quiet"])
    assert run_simulate(given, Console(file=out, width=220)) == 0
    for word in ("edf", "fcfs & friends", "batch", "TTFT kept", "refused", "step times"):
        assert word in out.getvalue()


def test_a_wrong_scenario_ends_with_its_reason_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(SCENARIO.replace('"fcfs"', '"fifo"'))
    assert main(["simulate", str(path), "--quiet"]) == 2
    assert "policies.order must be one of" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "absent.toml")]) == 2
    assert "cannot read" in capsys.readouterr().err


def test_a_report_that_could_not_be_written_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    assert main(["simulate", str(path), "--html", str(tmp_path / "absent" / "r.html")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["simulate", str(path), "--log", str(path)]) == 2
    assert "file exists" in capsys.readouterr().err


def test_runs_need_a_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(folder / "any.toml"), "--processes", "0"]) == 2
    assert "--processes must be at least 1, got 0" in capsys.readouterr().err


ONE = SCENARIO.replace("[1.0, 2.0]", "[1.0]").replace("[1, 2]", "[1]")


def test_a_page_that_is_a_directory_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(ONE)
    assert main(["simulate", str(path), "--processes", "1", "--html", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert f"--html: {tmp_path}: is a directory" in told.err.replace("\n", "")
    assert "simulating" not in told.err


def test_a_full_disk_costs_the_page_and_the_log_but_not_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, log = tmp_path / "scenario.toml", tmp_path / "log"
    path.write_text(ONE)
    log.mkdir()
    (log / "requests.csv").symlink_to("/dev/full")
    options = ["--processes", "1", "--html", "/dev/full", "--log", str(log)]
    assert main(["simulate", str(path), *options]) == 2
    told = capsys.readouterr()
    assert "TTFT kept" in told.out
    assert f"--log {log}: no space left" in told.err
    assert "--html /dev/full: no space left" in told.err


def test_a_pipe_hears_of_each_tenth_and_of_parts_of_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(ONE)
    assert main(["simulate", str(path), "--processes", "1"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "simulating" in line]
    assert lines[-1] == "simulating: 100%"
    assert len(lines) > 2  # than there are runs


def test_what_runs_beside_each_other_have_done_adds_up(tmp_path: Path) -> None:
    shares = Shares(tmp_path / "shares", 4)
    write_share(tmp_path / "shares", 1, 0.5)
    write_share(tmp_path / "shares", 3, 1.0)
    assert shares.of_all() == pytest.approx(0.375)


def test_the_bar_hears_of_runs_in_other_processes_before_they_end() -> None:
    heard: list[float] = []
    of = plan(replace(CHAT, rate=2.0), seeds=(1, 2), duration_s=600.0)
    run_all(of, processes=2, keep=None, tick=heard.append)
    assert set(heard) - {0.0, 0.5, 1.0}  # whatever else there is, is of a run that goes on
    assert heard[-1] == 1.0


def test_whoever_shows_percentiles_says_whom_they_leave_out(
    told: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    path, out = tmp_path / "scenario.toml", io.StringIO()
    path.write_text(ONE)
    given = parsed(["simulate", str(path), "--processes", "1", "--quiet"])
    assert run_simulate(given, Console(file=out, width=400)) == 0
    for text in (out.getvalue(), (folder / "r.html").read_text()):
        assert MEASURED in text
        assert all(word in text for word in ("submitted", "refused", "failed", "not ended"))
    assert {"submitted", "rejected", "failed", "unfinished"} <= told["summary"][0]["metrics"].keys()


INTERRUPTED = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "gateway.simulate":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
runpy.run_module("gateway", run_name="__main__")
"""


def test_an_interrupt_during_start_up_ends_without_a_traceback() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], cwd=ROOT, capture_output=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (130, b"")


@pytest.mark.parametrize("points", [[], [(1.0, 0.5)], [(0.0, 0.0), (1.0, 1.0), (2.0, 0.2)]])
def test_a_plot_is_well_formed_whatever_is_in_it(points: list[tuple[float, float]]) -> None:
    xs = [x for x, _ in points]
    for across in (axis("x", xs), axis("x", xs, from_zero=False), log_axis("x", xs)):
        up = Axis(label="y", low=0.0, high=1.0, percent=True)
        figure = plot("a & b", across, up, [Line(name="<c>", points=points)])
        parsed = ElementTree.fromstring(figure)
        assert parsed.find("figcaption") is not None
        assert "nan" not in figure


def test_the_parts_of_a_bar_are_as_long_as_their_values() -> None:
    figure = ElementTree.fromstring(bars("t", "ms", ["one"], ["a", "b"], [[30.0, 10.0]]))
    widths = [float(it.attrib["width"]) for it in figure.iter("rect")]
    assert widths[0] == pytest.approx(3 * widths[1], rel=0.01)


@pytest.mark.parametrize("high", [0.003, 1.0, 7.0, 45_000.0])
def test_an_axis_has_a_handful_of_round_ticks(high: float) -> None:
    ticks = axis("x", [high]).ticks()
    assert 2 <= len(ticks) <= 7
    assert ticks[0] == 0
    assert ticks[-1] <= high * 1.0001
