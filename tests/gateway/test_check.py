from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from backends.emulator import EmulatedFleet, FaultKind, ServerSpec
from gateway import check, serve
from gateway.__main__ import main
from gateway.check import Report, inspect
from gateway.config import Config, WorkerEntry
from gateway.facts import Facts
from gateway.probe import learnt
from gateway.settings import ConfigError
from gateway.suitability import Level, of_fleet, of_pair
from gateway.trial import Trial
from policies.types import Pool, Role, Worker
from tests.gateway.gateway_under_test import PAIR, TWO_PAIRS, UNIFIED, entry_of, fault, spec
from tests.gateway.talk import decode, prefill, unified

TIMEOUT_S = 5.0
RELAXED = spec("d2", Role.DECODE, pool=Pool.RELAXED)


@asynccontextmanager
async def fleet_of(specs: Sequence[ServerSpec]) -> AsyncIterator[tuple[EmulatedFleet, Config]]:
    async with EmulatedFleet(specs) as fleet:
        entries = tuple(entry_of(server) for server in fleet.servers.values())
        yield fleet, Config(worker=entries)
        await asyncio.sleep(30)
        assert fleet.resident() == {}


async def checked(config: Config) -> Report:
    return await inspect(config, asyncio.get_running_loop(), random.Random(3), TIMEOUT_S)


def told(report: Report, level: Level) -> list[str]:
    return [f"{one.subject}: {one.text}" for one in report.findings if one.level is level]


def facts_of(name: str, info: dict[str, Any]) -> Facts:
    worker = Worker(name=name, url=f"http://{name}:1", role=Role.DECODE)
    return Facts(configured=worker, worker=learnt(worker, info, ""), info=info)


def reconfigured(config: Config, name: str, **changes: Any) -> Config:
    entries = [replace(e, **changes) if e.name == name else e for e in config.worker]
    return replace(config, worker=tuple(entries))


async def test_servers_that_fit_are_found_good_with_a_token_through_every_route() -> None:
    async with fleet_of((*TWO_PAIRS, *UNIFIED)) as (_, config):
        report = await checked(config)
    assert report.ok
    assert [(t.prefill, t.decode, t.error) for t in report.trials] == [
        ("p1", "d1", ""),
        ("p1", "d2", ""),
        ("p2", "d1", ""),
        ("p2", "d2", ""),
        ("", "u1", ""),
    ]
    assert told(report, Level.BAD) == told(report, Level.WARNING) == []


async def test_a_dead_server_is_bad_and_no_route_through_it_is_tried() -> None:
    async with fleet_of(TWO_PAIRS) as (fleet, config):
        await fleet.kill("d2")
        report = await checked(config)
    assert [trial.decode for trial in report.trials] == ["d1", "d1"]
    assert len(told(report, Level.BAD)) == 1
    assert told(report, Level.BAD)[0].startswith("d2: connect_failed")


async def test_a_server_that_hangs_is_given_up_in_time() -> None:
    async with fleet_of(PAIR) as (fleet, config):
        fleet["p1"].faults.add(fault(FaultKind.HANG, path="/server_info"))
        report = await checked(config)
    assert told(report, Level.BAD)[0].startswith("p1: timeout: after 5.0 s")


async def test_a_prefill_that_generates_nothing_makes_its_pairs_bad_and_leaves_nothing_behind() -> (
    None
):
    async with fleet_of(TWO_PAIRS) as (fleet, config):
        fleet["p2"].faults.add(fault(FaultKind.HANG))
        report = await checked(config)
    assert [(t.prefill, t.decode) for t in report.trials if t.error] == [("p2", "d1"), ("p2", "d2")]
    assert told(report, Level.BAD)[0].startswith("p2 -> d1: no token: ")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (FaultKind.REFUSE, "d1: closed"),
        (FaultKind.ERROR_STATUS, "d1: 503 injected fault"),
        (FaultKind.IN_BAND, "d1: 503 injected fault"),
        (FaultKind.TRUNCATE, "d1: "),
    ],
)
async def test_what_a_decode_server_answers_instead_of_a_token_is_quoted(
    kind: FaultKind, words: str
) -> None:
    async with fleet_of(PAIR) as (fleet, config):
        fleet["d1"].faults.add(fault(kind))
        report = await checked(config)
    assert told(report, Level.BAD)[0].startswith(f"p1 -> d1: no token: {words}")


async def test_page_sizes_that_differ_make_a_pair_bad() -> None:
    specs = (spec("p1", Role.PREFILL, page_tokens=16), spec("d1", Role.DECODE, page_tokens=64))
    async with fleet_of(specs) as (_, config):
        report = await checked(config)
    expected = "p1 -> d1: page sizes differ: 16 and 64; SGLang refuses such a pair"
    assert told(report, Level.BAD) == [expected]


@pytest.mark.parametrize(
    ("prefill", "decode", "levels"),
    [
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "bfloat16"}, [Level.BAD]),
        ({"kv_cache_dtype": "fp8_e4m3"}, {"kv_cache_dtype": "auto"}, []),
        ({"kv_cache_dtype": "auto"}, {}, []),
        ({"dp_size": 1}, {"dp_size": 4}, [Level.WARNING]),
    ],
)
def test_cache_types_that_differ_are_bad_and_data_parallel_sizes_a_warning(
    prefill: dict[str, Any], decode: dict[str, Any], levels: list[Level]
) -> None:
    trial = Trial(prefill="p", decode="d", error="", took_ms=1.0)
    servers = {"p": facts_of("p", prefill), "d": facts_of("d", decode)}
    assert [finding.level for finding in of_pair(trial, servers)] == levels


async def test_a_wrong_role_is_a_warning_that_names_both() -> None:
    async with fleet_of(UNIFIED) as (_, config):
        report = await checked(reconfigured(config, "u1", role=Role.PREFILL))
    assert report.ok
    words = "u1: configured as prefill, is unified: the gateway goes by what it is; "
    words += 'say --worker-urls, or role = "unified" in its [[worker]]'
    assert told(report, Level.WARNING) == [words]


async def test_a_decode_server_without_a_prefill_of_its_model_is_bad() -> None:
    specs = (*PAIR, spec("d2", Role.DECODE, model="another"))
    async with fleet_of(specs) as (_, config):
        report = await checked(config)
    assert told(report, Level.BAD) == ["d2: there is no prefill server that it could work with"]


async def test_a_model_that_a_server_does_not_have_is_a_warning() -> None:
    async with fleet_of(UNIFIED) as (_, config):
        report = await checked(reconfigured(config, "u1", model="llama"))
    assert told(report, Level.WARNING) == ["u1: configured for llama, it serves emulated"]


async def test_a_bootstrap_port_that_nobody_listens_on_is_a_warning_and_the_pair_is_bad() -> None:
    async with fleet_of(PAIR) as (_, config):
        report = await checked(reconfigured(config, "p1", bootstrap_port=1))
    assert told(report, Level.WARNING)[0].startswith(
        "p1: its bootstrap server does not answer from here: 127.0.0.1:1: connect_failed"
    )
    assert told(report, Level.BAD)[0].startswith("p1 -> d1: no token: ")


async def test_a_refused_api_key_is_named_as_such() -> None:
    locked = replace(UNIFIED[0], api_key="secret")
    async with fleet_of((locked,)) as (_, config):
        without = await checked(config)
        with_key = await checked(reconfigured(config, "u1", api_key="secret"))
    assert told(without, Level.BAD) == ["u1: it refuses the API key: /server_info answers 401"]
    assert with_key.ok


async def test_a_missing_load_page_is_a_warning_and_a_missing_info_page_too() -> None:
    async with fleet_of(UNIFIED) as (fleet, config):
        for path in ("/v1/loads", "/server_info", "/get_server_info"):
            fleet["u1"].faults.add(fault(FaultKind.ERROR_STATUS, path=path, status=404))
        report = await checked(config)
    assert [text.split(":")[1] for text in told(report, Level.WARNING)] == [
        " it has no /server_info",
        " no /v1/loads",
    ]


async def test_a_load_report_that_stays_old_after_a_token_is_a_warning() -> None:
    async def old_load(request: web.Request) -> web.Response:
        rank = {"timestamp": 1_700_000_000.0, "num_total_tokens": 0}
        page = {"timestamp": "2023-11-14T22:14:20+00:00", "loads": [rank]}
        return web.json_response(page)

    app = web.Application()
    app.router.add_get("/v1/loads", old_load)
    async with TestServer(app, host="127.0.0.1") as server:
        entry = WorkerEntry(url=str(server.make_url("")).rstrip("/"), name="u1")
        report = await checked(Config(worker=(entry,)))
    words = "u1: its load report is 60 s old although it has just been used"
    assert words in told(report, Level.WARNING)


async def test_each_lever_that_is_off_is_a_note_and_one_that_is_on_is_none() -> None:
    off = spec("p1", Role.PREFILL, role_switch=False)
    on = spec("d1", Role.DECODE, priority=True, incremental=True)
    async with fleet_of((off, on, RELAXED)) as (_, config):
        report = await checked(config)
    notes = told(report, Level.NOTE)
    assert sorted(n.split(":")[1].strip() for n in notes if n.startswith("p1")) == [
        "no incremental streaming",
        "no priority scheduling",
        "no role switch",
    ]
    assert not [note for note in notes if note.startswith("d1")]


async def test_decode_servers_of_one_pool_only_are_noted_where_pools_are_kept() -> None:
    async with fleet_of(PAIR) as (_, config):
        kept = await checked(config)
        shared = await checked(replace(config, policies=replace(config.policies, pools="none")))
    assert any("offline work shares them" in note for note in told(kept, Level.NOTE))
    assert not any("shares them" in note for note in told(shared, Level.NOTE))


@pytest.mark.parametrize(
    ("pools", "noted"),
    [(("strict", "relaxed"), []), (("strict", "strict"), ["offline"]), (("relaxed",), ["online"])],
)
def test_a_unified_server_of_the_other_pool_is_one_that_its_kind_has(
    pools: tuple[str, ...], noted: list[str]
) -> None:
    makes = (decode, unified)
    workers = [make(pool=Pool(pool)) for make, pool in zip(makes, pools, strict=False)]
    servers = [Facts(configured=it, worker=it) for it in (prefill(), *workers)]
    found = [each.text for each in of_fleet(servers, keeps_pools=True)]
    assert [text.partition(": ")[2].split()[0] for text in found] == noted


async def test_what_is_noted_of_many_servers_is_shown_once() -> None:
    out = io.StringIO()
    async with fleet_of(TWO_PAIRS) as (_, config):
        check.show(await checked(config), Console(file=out, width=400))
    assert out.getvalue().count("no incremental streaming") == 1
    assert "note p1, d1, p2, d2: no incremental streaming" in out.getvalue()


# The command.


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    check.add_arguments(parser)
    return parser.parse_args(words)


def test_a_configuration_without_servers_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(ConfigError, match="--config FILE with \\[\\[worker\\]\\] tables"):
        check.run_check(arguments())


@pytest.mark.parametrize("more", [("--fleet", "fleet.toml"), ("--timeout-s", "0")])
def test_flags_that_make_no_sense_for_a_check_are_refused(more: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=more[0]):
        check.run_check(arguments("--decode", "http://d:1", *more))


@pytest.mark.parametrize("text", ["nonsense = 1", "[[worker]]\nurl = 'tcp://x'", "]["])
def test_a_wrong_configuration_ends_with_2(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    assert main(["check", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith("slackwater: ")


def test_a_dead_server_ends_with_1_and_json_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["check", "--worker-urls", "http://127.0.0.1:1", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (code, report["ok"]) == (1, False)
    assert report["servers"][0]["up"] is False


async def test_the_table_tells_servers_routes_findings_and_a_verdict() -> None:
    out = io.StringIO()
    async with fleet_of(PAIR) as (_, config):
        check.show(await checked(config), Console(file=out, width=160))
    text = out.getvalue()
    for words in ("p1", "prefill", "400,000", "0.5.23", "2 servers, 1 route: all of them can"):
        assert words in text


def test_the_flags_of_serve_name_servers_here_too() -> None:
    given = arguments("--prefill", "http://p:1", "9000", "--decode", "http://d:2")
    urls = [entry.url for entry in serve.configuration(given).worker]
    assert urls == ["http://p:1", "http://d:2"]
    assert isinstance(serve.configuration(given).worker[0], WorkerEntry)
