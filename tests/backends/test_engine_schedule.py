"""SGLang's --schedule-policy, as a setting of the engine model."""

from __future__ import annotations

from typing import Any

import pytest

from backends.engine.schedule import SCHEDULE
from tests.backends.engine_fleet import Heard, Servers, prompt


def server(**config: Any) -> Servers:
    return Servers(u={"chunk_tokens": 100, **config})


def ask(servers: Servers, rid: str, tokens: int, start: int, **request: Any) -> Heard:
    asked = {"max_new_tokens": 1, "ignore_eos": True, **request}
    return servers.submit("u", rid, prompt=prompt(tokens, start), **asked)


def ends(policy: str, *tokens: int, limits: tuple[int, ...] = ()) -> list[float]:
    """When the first token of each is there, of prompts that came at once behind 100 tokens."""
    servers = server(schedule_policy=policy)
    first = ask(servers, "first", 100, 0)
    limits = limits or (1,) * len(tokens)
    heard = [
        ask(servers, f"r{i}", n, 10_000 * (i + 1), max_new_tokens=m, stream=True)
        for i, (n, m) in enumerate(zip(tokens, limits, strict=True))
    ]
    servers.run()
    assert first.ended_at == pytest.approx(0.01) or policy != "fcfs"
    return [it.tokens_at[0] for it in heard]


def test_fcfs_takes_them_as_they_came() -> None:
    assert ends("fcfs", 300, 100) == pytest.approx([0.04, 0.05])


def test_shortest_prefill_first_takes_the_short_one_first() -> None:
    assert ends("shortest-prefill-first", 300, 100)[1] == pytest.approx(0.02)


def test_longest_output_first_goes_by_the_limit() -> None:
    first, second = ends("lof", 100, 100, limits=(2, 50))
    assert second < first


def test_shortest_prefill_first_cuts_the_running_chunk_for_a_shorter_prompt() -> None:
    """1,000 tokens in chunks of 100; 40 come after the second and take their part of the fourth."""
    for policy, at in (("shortest-prefill-first", 0.04), ("fcfs", 0.104)):
        servers = server(schedule_policy=policy)
        long = ask(servers, "long", 1_000, 0)
        servers.run(until=0.025)
        short = ask(servers, "short", 40, 20_000)
        servers.run()
        assert short.ended_at == pytest.approx(at)
        assert long.ended_at <= 0.11


def test_a_second_prompt_is_not_begun_in_the_room_that_a_cut_leaves() -> None:
    """Only one prompt is in its middle: 60 tokens fit into what is left, 90 do not."""
    servers = server(schedule_policy="shortest-prefill-first")
    ask(servers, "long", 1_000, 0)
    servers.run(until=0.005)
    short, other = ask(servers, "short", 60, 20_000), ask(servers, "other", 90, 40_000)
    servers.run()
    assert short.ended_at == pytest.approx(0.02)
    assert other.ended_at == pytest.approx(0.03)


def test_hrrn_lets_a_long_prompt_go_once_it_has_waited_for_its_length() -> None:
    servers = server(schedule_policy="hrrn")
    ask(servers, "first", 1_000, 0)
    servers.run(until=0.001)
    long = ask(servers, "long", 200, 20_000)
    servers.run(until=0.095)
    short = ask(servers, "short", 100, 40_000)
    servers.run()
    assert long.ended_at < short.ended_at


@pytest.mark.parametrize("policy", SCHEDULE)
def test_every_policy_ends_every_request(policy: str) -> None:
    assert len(ends(policy, 90, 250, 30, 250, 70)) == 5
