"""What servers on one GPU cost each other: equal shares of its time, and nothing while paused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from backends.engine import Request, ids_prompt
from policies.types import Role
from tests.backends.engine_fleet import STEP_S, Heard, Servers

TOKENS = 21


def asked(servers: Servers, name: str, tokens: int = TOKENS) -> Heard:
    heard = Heard(servers.clock)
    request = Request(
        rid=name, prompt=ids_prompt([1, 2, 3]), max_new_tokens=tokens, ignore_eos=True, stream=True
    )
    servers[name].submit(request, heard)
    return heard


def two(host_a: str = "gpu", host_b: str = "gpu") -> Servers:
    return Servers(
        a={"role": Role.UNIFIED, "host": host_a}, b={"role": Role.UNIFIED, "host": host_b}
    )


def paces(heard: Heard) -> list[float]:
    """The time of each token but the first."""
    return [round(later - at, 6) for at, later in pairwise(heard.tokens_at)]


def test_while_both_are_at_work_each_step_takes_twice_as_long() -> None:
    servers = two()
    told = [asked(servers, name) for name in ("a", "b")]
    servers.run()
    for heard in told:
        assert set(paces(heard)[2:-2]) == {2 * STEP_S}


@pytest.mark.parametrize("hosts", [("gpu", "other"), ("", "")])
def test_servers_on_gpus_of_their_own_do_not_notice_each_other(hosts: tuple[str, str]) -> None:
    servers = two(*hosts)
    told = [asked(servers, name) for name in ("a", "b")]
    servers.run()
    assert [set(paces(heard)) for heard in told] == [{STEP_S}] * 2


def test_one_that_is_paused_costs_nothing_and_goes_on_where_it_was() -> None:
    servers = two()
    mine, its = asked(servers, "a"), asked(servers, "b")
    servers.clock.call_at(0.05, servers["b"].pause, "in_place")
    servers.clock.call_at(1.0, servers["b"].resume)
    servers.run()
    assert set(paces(mine)[6:]) == {STEP_S}
    assert len(its.output) == TOKENS
    assert max(paces(its)) > 0.9


def test_one_that_dies_leaves_the_whole_gpu_to_the_other() -> None:
    servers = two()
    mine = asked(servers, "a")
    asked(servers, "b")
    servers.clock.call_at(0.05, servers["b"].kill)
    servers.run()
    assert set(paces(mine)[6:]) == {STEP_S}
