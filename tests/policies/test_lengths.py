"""Decode servers that keep short and long contexts apart."""

from __future__ import annotations

from policies.ledger import Ledger
from policies.lengths import LengthSplit
from policies.place import LeastWork
from tests.gateway.talk import decode, online
from tests.policies.test_contract_places import ledger


def server(name: str, count: int, tokens: int) -> Ledger:
    books = ledger(decode(name))
    for _ in range(count):
        books.add_decode(tokens, tokens)
    return books


def best(tokens: int, *servers: Ledger) -> str:
    ranks = LengthSplit().decode(online("a", tokens), servers)
    return servers[ranks.index(min(ranks))].worker.name


def test_like_goes_to_like_where_steps_are_equal() -> None:
    servers = (server("short", 40, 1_000), server("long", 2, 20_000))
    assert best(500, *servers) == "short"
    assert best(90_000, *servers) == "long"


def test_the_boundary_moves_away_from_the_server_with_the_longer_steps() -> None:
    short = server("short", 40, 1_000)
    assert best(6_000, short, server("long", 2, 20_000)) == "long"
    assert best(6_000, short, server("long", 12, 20_000)) == "short"


def test_an_empty_server_is_near_to_everybody() -> None:
    assert best(90_000, server("busy", 4, 80_000), server("empty", 0, 0)) == "empty"


def test_prompts_are_placed_by_least_work() -> None:
    servers = [server("a", 1, 10), server("b", 2, 20)]
    job = online("a", 100)
    assert LengthSplit().prefill(job, servers) == LeastWork().prefill(job, servers)
