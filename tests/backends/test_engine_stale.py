"""A prefill server that is back before it was missed: old connections to it lead nowhere."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from policies.types import Role
from tests.backends.engine_fleet import Heard, Servers, pd, prompt

TIMEOUT_S = 8.0
HEARTBEAT_S = 4.0


def pair(servers: Servers, room: int, host: str = "127.0.0.1") -> tuple[Heard, Heard]:
    request = {"bootstrap_host": host, "bootstrap_port": 1, "bootstrap_room": room}
    request |= {"prompt": prompt(100), "max_new_tokens": 2, "ignore_eos": True}
    return servers.submit("p", f"r{room}", **request), servers.submit("d", f"r{room}", **request)


def restarted(servers: Servers) -> None:
    servers["p"].kill()
    servers["p"].revive()


def switched_and_back(servers: Servers) -> None:
    for role in (Role.DECODE, Role.PREFILL):
        servers["p"].switch_role(role, lambda: None)
        servers.run(servers.clock.time() + 1.0)


ways = pytest.mark.parametrize("how", [restarted, switched_and_back])


@pytest.fixture
def servers() -> Servers:
    """The two have met."""
    servers = pd(
        bootstrap_timeout_s=TIMEOUT_S, waiting_timeout_s=TIMEOUT_S, heartbeat_s=HEARTBEAT_S
    )
    pair(servers, 1)
    servers.run()
    return servers


@ways
def test_a_pair_over_the_old_connection_is_lost_and_the_one_after_it_is_not(
    servers: Servers, how: Callable[[Servers], None]
) -> None:
    how(servers)
    began_s = servers.clock.time()
    prefill, decode = pair(servers, 2)
    servers.run()
    again = pair(servers, 3)[1]
    servers.run()
    assert prefill.reason["message"].endswith("in KVPoll.Bootstrapping")
    assert decode.reason["message"].endswith("in KVPoll.WaitingForInput")
    assert decode.ended_at == pytest.approx(began_s + TIMEOUT_S)
    assert again.reason == {"type": "length", "length": 2}


@ways
def test_closing_a_lost_pair_repairs_nothing(
    servers: Servers, how: Callable[[Servers], None]
) -> None:
    how(servers)
    for room in (2, 3):
        pair(servers, room)
        servers.run(servers.clock.time() + 1.0)
        for name in "pd":
            servers[name].abort(f"r{room}")
        servers.run(servers.clock.time() + 1.0)
    _, decode = pair(servers, 4)
    servers.run()
    assert "timed out" in decode.reason["message"]


@ways
def test_another_spelling_of_the_address_is_a_new_connection(
    servers: Servers, how: Callable[[Servers], None]
) -> None:
    how(servers)
    _, decode = pair(servers, 2, host="127.0.0.0x1")
    servers.run()
    assert decode.reason == {"type": "length", "length": 2}


def test_a_death_that_heartbeats_have_noticed_costs_no_pair(servers: Servers) -> None:
    servers["p"].kill()
    servers.run(servers.clock.time() + HEARTBEAT_S)
    servers["p"].revive()
    _, decode = pair(servers, 2)
    servers.run()
    assert decode.reason == {"type": "length", "length": 2}


def test_a_decode_server_that_restarts_knows_of_no_connection(servers: Servers) -> None:
    restarted(servers)
    servers["d"].kill()
    servers["d"].revive()
    _, decode = pair(servers, 2)
    servers.run()
    assert decode.reason == {"type": "length", "length": 2}
