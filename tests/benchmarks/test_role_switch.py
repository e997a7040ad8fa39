"""What the role switch benchmark makes of a log and of answers, and its client in virtual time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.report import Report
from benchmarks.role_switch import (
    ANSWERS,
    PROMPTS,
    Answer,
    Client,
    Switch,
    gateway_config,
    left_on,
    specs,
    switches_in,
    table_of,
)
from gateway import config
from gateway.planning import Mode
from tests.gateway.gateway_under_test import standing

WORKER = '[[worker]]\nname = "p1"\nurl = "http://127.0.0.1:2"\nrole = "prefill"\n'
OVER = "2026-01-01T00:00:10+00:00"
OVER_S = 1767225610.0


def line(**told: object) -> str:
    fields = {"event": "role switch", "outcome": "done", "timestamp": OVER, "worker": "p1"}
    return json.dumps({**fields, "role": "decode", "drained_s": 0.5, "took_s": 1.0, **told})


def answer(workers: str, after_s: float, **more: object) -> Answer:
    given = Answer(is_online=True, expected=[5, 6], status=200, ids=[5, 6], ends=1)
    given.workers, given.first_s = tuple(workers.split(",")), OVER_S + after_s
    for name, value in more.items():
        setattr(given, name, value)
    return given


def test_a_server_serves_with_the_first_token_of_a_request_in_its_new_role() -> None:
    answers = [answer("p1,d1", 0.1), answer("p2,p1", -3.0), answer("p2,p1", 0.4)]
    [switch] = switches_in(f"no json\n[]\n{line()}", answers)
    assert replace(switch, serving_s=None) == Switch("p1", "decode", 0.5, 1.0, None)
    assert switch.serving_s == pytest.approx(1.4)
    [switch] = switches_in(line(role="prefill"), answers)
    assert switch.serving_s == pytest.approx(1.1)


def test_a_switch_that_failed_or_never_served_has_no_time() -> None:
    assert switches_in(line(outcome="failed"), []) == []
    assert [it.serving_s for it in switches_in(line(), [answer("p2,d1", 1.0)])] == [None]


def whole_and_not() -> Iterator[tuple[Answer, bool]]:
    yield answer("p,d", 0.0), True
    yield answer("p,d", 0.0, ids=[5]), False
    yield answer("p,d", 0.0, ids=[5, 7]), False
    yield answer("p,d", 0.0, ends=2), False
    yield answer("p,d", 0.0, ends=0), False
    yield answer("p,d", 0.0, status=503), False


@pytest.mark.parametrize(("told", "whole"), list(whole_and_not()))
def test_only_the_right_tokens_and_one_end_count(told: Answer, *, whole: bool) -> None:
    assert told.is_whole is whole


async def test_the_client_takes_whole_answers_and_nothing_is_left() -> None:
    async with standing(specs()) as site:
        client = Client(site.url, ((PROMPTS, 1.0), (ANSWERS, 1.0)), seed=1)
        await client.run()
        assert {it.is_online for it in client.answers} == {True, False}
        assert [it for it in client.answers if not it.is_whole] == []
        assert await left_on(server.url for server in site.fleet.servers.values()) == 0
        table = table_of("a title", [Switch("p1", "decode", 0.1, 0.5, None)], client.answers)
        assert table.row_count == 1
        assert Report(title="empty").exit_code == 0


@pytest.mark.parametrize("preempts", [True, False])
def test_the_gateway_takes_the_configuration(tmp_path: Path, *, preempts: bool) -> None:
    file = tmp_path / "config.toml"
    file.write_text(gateway_config(1, WORKER, preempts=preempts))
    read = config.load(file)
    assert (read.ratio.hand_over_offline_s == 0.0) is preempts
    assert (read.ratio.policy, read.ratio.mode) == ("dopd+", Mode.ACT)
