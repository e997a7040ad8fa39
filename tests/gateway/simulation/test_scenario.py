"""What a scenario may say, and what it is told when it says something else."""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from gateway.scenario import (
    MODES,
    BadRows,
    FleetEntry,
    GatewayEntry,
    PolicyEntry,
    Scenario,
    ServerEntry,
    Sweep,
    WorkloadEntry,
)
from gateway.settings import ConfigError, decode
from gateway.simulation.asks import prepared
from gateway.simulation.fleet import ENGINES, servers_of
from gateway.simulation.plan import PUBLIC, load
from policies.types import Role
from tests.documents import between, scenario_table
from tests.gateway.simulation.scenarios import CHAT, UNIFIED, fleet, plan

SHIPPED = sorted((Path(__file__).parents[3] / "benchmarks" / "scenarios").glob("*.toml"))
DOCUMENTATION = Path(__file__).parents[3] / "docs" / "simulator.md"
HEADER = "timestamp,input_tokens,output_tokens"
SMALL = """
duration_s = 5.0
[[fleet]]
server = [{ role = "unified", kv_tokens = 2000 }]
[[workload]]
name = "chat"
"""


def scenario(folder: Path, text: str) -> Path:
    path = folder / "scenario.toml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as found:
        load(scenario(folder, text))
    return str(found.value)


SECOND_POLICY = '[[policy]]\nname = "x"\n'
SECOND_WORKLOAD = '[[workload]]\nname = "b"\n'
SECOND_FLEET = '[[fleet]]\nname = "b"\nserver = [{ role = "prefill" }]\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            SECOND_POLICY + 'policies = { order = "lifo" }',
            "policy[0].policies.order must be one of ['edf', 'fcfs'",
        ),
        (SECOND_POLICY + 'policies = { plaice = "y" }', "unknown key policy[0].policies.plaice"),
        (SECOND_POLICY + 'fleet = "y"', "policy[0].fleet must be one of ['fleet'], got 'y'"),
        (SECOND_POLICY + 'oracle = "delphi"', "policy[0].oracle must be one of ['none', 'srpf-"),
        (SECOND_POLICY + 'oracle = "srpf-oracle"', 'policy[0].name must have "oracle" in it'),
        (SECOND_POLICY + SECOND_POLICY, "two [[policy]] are called 'x'"),
        ("[sweep]\nvalues = [0.0]", "sweep.values must be positive"),
        ('[sweep]\nof = "speed"', "sweep.of must be one of ['rate', 'offline']"),
        (SECOND_WORKLOAD + 'arrivals = "weekly"', "workload[1].arrivals must be one of"),
        (SECOND_WORKLOAD + 'arrivals = "trace"', 'workload[1]: arrivals = "trace"'),
        ('[sweep]\nof = "offline"', 'sweep.of = "offline" needs a [[workload]]'),
        (SECOND_WORKLOAD + "input_max = 1000", "workload[1].input_median 1024 is above its"),
        (SECOND_WORKLOAD + "rate = 0", "workload[1].rate must be at least"),
        (SECOND_FLEET, "fleet[1] can serve nothing"),
        (SECOND_FLEET + 'mode = "magic"', "fleet[1].mode must be one of ['patched', 'stock']"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(tmp_path: Path, text: str, words: str) -> None:
    assert words in refused(tmp_path, f"{SMALL}\n{text}\n")


@pytest.mark.parametrize("text", ["", "[[workload]]\nname = 'x'", "duration_s = 'long'", "= 3"])
def test_a_scenario_needs_a_fleet_and_a_workload(tmp_path: Path, text: str) -> None:
    assert refused(tmp_path, text)


def test_the_same_seed_twice_is_refused(tmp_path: Path) -> None:
    assert "seeds has 2 twice" in refused(tmp_path, "seeds = [1, 2, 2]" + SMALL)


def test_a_directory_is_no_trace(tmp_path: Path) -> None:
    text = SMALL + '\n[[workload]]\nname = "b"\narrivals = "trace"\ntrace = "."\n'
    assert "is a directory" in refused(tmp_path, text)


def test_a_beginning_past_the_end_of_the_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"workload\[0\]\.from_s 7 is past the end"):
        load(traced(tmp_path, "0,10,5\n6,10,5", "from_s = 7"))


def test_a_warm_up_must_leave_something_to_count(tmp_path: Path) -> None:
    assert "leaves nothing to count" in refused(tmp_path, "warm_up_s = 5.0" + SMALL)


def test_a_trace_that_is_not_there_is_asked_for(tmp_path: Path) -> None:
    text = SMALL + '\n[[workload]]\nname = "b"\narrivals = "trace"\ntrace = "traces/b.csv"\n'
    message = refused(tmp_path, text)
    assert f"workload[1].trace: {tmp_path / 'traces/b.csv'} is not there" in message
    assert "--data" in message
    assert "timestamp, input_tokens, output_tokens" in message
    assert "bursty-chat.toml" in message


def test_a_public_trace_that_is_not_there_is_named_with_its_source(tmp_path: Path) -> None:
    chat = next(path for path in SHIPPED if path.stem == "chat")
    with pytest.raises(ConfigError, match=r"github\.com/Azure/AzurePublicDataset: docs"):
        load(chat, tmp_path)


def commands_of_the_documentation() -> list[Path]:
    """Scenarios that the first commands name: whoever has a clone alone runs these."""
    text = DOCUMENTATION.read_text() + (DOCUMENTATION.parents[1] / "README.md").read_text()
    named = re.findall(r"^slackwater simulate (benchmarks/\S+)", text, re.MULTILINE)
    return [DOCUMENTATION.parents[1] / name for name in named]


def test_the_first_commands_of_the_documentation_need_no_trace(tmp_path: Path) -> None:
    named = commands_of_the_documentation()
    assert len(named) >= 2
    for path in named:
        of = load(path, tmp_path)
        assert all(source.trace is None for source in of.sources)
        assert next(iter(prepared(of, 1.0, 1).streams[0].asks)).input_tokens > 0


def test_every_trace_of_a_shipped_scenario_is_told_of() -> None:
    text = DOCUMENTATION.read_text()
    for path in SHIPPED:
        for entry in decode(Scenario, tomllib.loads(path.read_text())).workload:
            for file in filter(None, (entry.trace, entry.lengths)):
                assert f"`{file}`" in text
                assert any(file.rpartition("/")[2].startswith(begin) for begin in PUBLIC)
    assert all(url in text for url in PUBLIC.values())


def traced(folder: Path, rows: str, keys: str = "") -> Path:
    (folder / "trace.csv").write_text(f"{HEADER}\n{rows}\n")
    text = '[[fleet]]\nserver = [{ role = "unified", kv_tokens = 2000 }]\n[[workload]]\n'
    return scenario(folder, f'{text}name="t"\narrivals="trace"\ntrace="trace.csv"\n{keys}\n')


def test_a_bad_row_is_refused_by_its_line_or_skipped_and_counted(tmp_path: Path) -> None:
    rows = "0,10,5\n1,0,5\n2,10,5"
    with pytest.raises(ConfigError, match=r"workload\[0\]\.trace: .*line 3: input_tokens '0'"):
        load(traced(tmp_path, rows))
    asks = prepared(load(traced(tmp_path, rows, 'bad_rows = "skip"')), 1.0, 1)
    assert asks.counts.skipped_rows == 1
    assert len(list(asks.streams[0].asks)) == 2


def test_a_request_larger_than_any_server_is_refused_by_its_line_or_counted(tmp_path: Path) -> None:
    rows = "0,10,5\n1,1990,50\n2,10,5"
    with pytest.raises(ConfigError, match=r"line 3: a prompt of 1990 and an answer of 50 tokens"):
        prepared(load(traced(tmp_path, rows)), 1.0, 1)
    asks = prepared(load(traced(tmp_path, rows, 'too_large = "skip"')), 1.0, 1)
    assert asks.counts.too_large == 1
    assert len(list(asks.streams[0].asks)) == 2


def test_what_does_not_fit_one_of_the_compared_fleets_is_left_out_of_all(tmp_path: Path) -> None:
    small = replace(UNIFIED[0], kv_tokens=300)
    fleets = (fleet(*UNIFIED), fleet(small, name="small"))
    of = plan(replace(CHAT, too_large=BadRows.SKIP), fleet=fleets)
    policy = replace(of.scenario.policy[0], name="second", fleet="small")
    both = replace(of, scenario=replace(of.scenario, policy=(*of.scenario.policy, policy)))
    assert prepared(of, 1.0, 1).counts.too_large == 0
    assert prepared(both, 1.0, 1).counts.too_large > 10


def test_an_answer_beyond_its_requests_limit_is_cut_and_counted(tmp_path: Path) -> None:
    asks = prepared(load(traced(tmp_path, "0,10,500", "max_tokens = 60")), 1.0, 1)
    assert [it.output_tokens for it in asks.streams[0].asks] == [60]
    assert asks.counts.cut_answers == 1


def test_a_faster_trace_ends_earlier(tmp_path: Path) -> None:
    of = load(traced(tmp_path, "0,10,5\n100,10,5"))
    assert of.until_s(1.0) == pytest.approx(100.0)
    assert of.until_s(4.0) == pytest.approx(25.0)


def test_servers_are_as_large_as_their_weights_leave_room_for() -> None:
    (eight,) = servers_of(fleet(replace(UNIFIED[0], kv_tokens=0)), Path())
    (seventy,) = servers_of(
        fleet(replace(UNIFIED[0], kv_tokens=0, model="Llama-3.1-70B", tp=4)), Path()
    )
    assert 300_000 < eight.config.kv_tokens < 500_000
    assert seventy.gpus == 4
    assert seventy.times.decode_s(8, 8000) > eight.times.decode_s(8, 8000)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "abacus"}, "unknown device 'abacus', expected one of"),
        ({"model": "Eliza"}, "known are"),
        ({"model": "Llama-3.1-405B"}, "raise tp"),
    ],
)
def test_a_server_that_cannot_be_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="fleet 'fleet': .*" + words):
        servers_of(fleet(replace(UNIFIED[0], **{"kv_tokens": 0} | fields)), Path())


def test_a_table_of_measured_steps_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "steps.csv").write_text(
        "system,model,tp,phase,batch_size,ctx_len,latency_ms\n"
        "h100_sxm,meta-llama/Meta-Llama-3.1-8B,1,prefill,1,100,7\n"
        "h100_sxm,meta-llama/Meta-Llama-3.1-8B,1,decode,1,100,5\n"
    )
    (measured,) = servers_of(fleet(*UNIFIED, table="steps.csv"), tmp_path)
    (modelled,) = servers_of(fleet(*UNIFIED, table="other.csv"), tmp_path)
    assert measured.times.decode_s(1, 100) == pytest.approx(0.005)
    assert "steps.csv" in measured.times_source
    assert "other.csv is not there" in modelled.times_source


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_scenario_says_something(path: Path) -> None:
    """Its traces may be absent; everything else is decoded."""
    shipped = decode(Scenario, tomllib.loads(path.read_text()))
    for entry in shipped.fleet:
        roles = {server.config.role for server in servers_of(entry, Path())}
        assert Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles
    assert not any(entry.trace.startswith("/") for entry in shipped.workload)


def test_the_documentation_names_every_key() -> None:
    text = DOCUMENTATION.read_text()
    text = text.replace(between(text, "keys"), "")  # a default alone does not say what it is
    named = set(re.findall(r"`([a-z_.]+)`", text)) | set(re.findall(r"^\[*([a-z_]+)", text, re.M))
    named = {part for it in named for part in it.split(".")}
    for cls in (Scenario, Sweep, GatewayEntry, FleetEntry, ServerEntry, WorkloadEntry, PolicyEntry):
        missing = {field.name for field in fields(cls)} - named
        assert missing <= {"server", "fleet", "workload", "policy", "gateway"}, cls


def test_the_defaults_of_the_documentation_are_those_of_the_code() -> None:
    assert between(DOCUMENTATION.read_text(), "keys") == scenario_table(), "run: make documents"


def test_every_mode_has_its_engine() -> None:
    assert ENGINES.keys() == MODES.keys()
