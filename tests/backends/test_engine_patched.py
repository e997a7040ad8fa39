"""A patched engine: the laws of every server, and what it does that SGLang does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.engine import Engine, patched
from backends.engine.patched import PackedBatch
from policies.packing import PACKING
from policies.types import Role
from policies.urgency import PREFILL_ORDER
from tests.backends.engine_fleet import TOKEN_S, Heard, Servers, pd, prompt
from tests.backends.test_engine_laws import pages, play, small_servers, workloads

levers = st.fixed_dictionaries(
    {
        "packing": st.sampled_from(sorted(PACKING)),
        "prefill_order": st.sampled_from(sorted(PREFILL_ORDER)),
        "interrupt_layers": st.sampled_from([0, 4]),
        "straggler": st.booleans(),
    }
)


@dataclass(frozen=True, slots=True)
class ByContext:
    """0.1 ms a prompt token; a step is 5 ms and 0.1 ms for each token of context."""

    def prefill_s(self, chunks: Sequence[tuple[int, int]]) -> float:
        return TOKEN_S * sum(new for new, _ in chunks)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        return 0.005 + 1e-4 * context_tokens


def by_context(config: Any, clock: Any, times: Any, fabric: Any) -> Engine:
    return patched(config, clock, ByContext(), fabric)


def alone(**config: Any) -> Servers:
    return Servers(by_context, u={"role": Role.UNIFIED, **config})


def ask(servers: Servers, rid: str, tokens: int, start: int, **request: Any) -> Heard:
    asked = {"max_new_tokens": 1, "ignore_eos": True, "ttft_s": 1.0, **request}
    return servers.submit("u", rid, prompt=prompt(tokens, start), **asked)


@settings(max_examples=40)
@given(workloads, small_servers, levers)
def test_it_never_overcommits_and_ends_every_request_once(
    work: list[dict[str, Any]], config: dict[str, Any], levers: dict[str, Any]
) -> None:
    servers = Servers(by_context, u={**config, **levers})
    heard = play(servers, ("u",), work)
    assert [len(it.ends) for it in heard] == [1] * len(work)
    assert servers["u"].idle
    assert servers["u"].machine.kv.used == 0


@settings(max_examples=40)
@given(workloads, small_servers, levers)
def test_a_pair_of_them_never_overcommits_and_ends_both_legs_once(
    work: list[dict[str, Any]], config: dict[str, Any], levers: dict[str, Any]
) -> None:
    servers = pd(by_context, **{**config, **levers})
    heard = play(servers, ("p", "d"), work)
    assert [len(it.ends) for it in heard] == [1] * 2 * len(work)
    assert [servers[name].machine.kv.used for name in "pd"] == [0, 0]


@settings(max_examples=40)
@given(workloads, pages, levers)
def test_packing_and_order_change_when_tokens_come_and_not_which(
    work: list[dict[str, Any]], page: int, levers: dict[str, Any]
) -> None:
    config = {"kv_tokens": 400, "chunk_tokens": 32, "page_tokens": page}
    stock = play(Servers(u=config), ("u",), work)
    mine = play(Servers(by_context, u={**config, **levers}), ("u",), work)
    for one, other in zip(stock, mine, strict=True):
        common = min(len(one.output), len(other.output))
        assert one.output[:common] == other.output[:common]


@settings(max_examples=40)
@given(workloads, pages)
def test_with_every_lever_at_rest_it_is_a_stock_server(
    work: list[dict[str, Any]], page: int
) -> None:
    def story(servers: Servers) -> list[tuple[list[float], list[int]]]:
        return [(it.tokens_at, it.output) for it in play(servers, ("p", "d"), work)]

    config = {"chunk_tokens": 32, "page_tokens": page}
    assert story(pd(patched, **config)) == story(pd(**config))


def test_a_long_context_takes_fewer_steps_where_short_ones_are_pressed_for_time() -> None:
    servers = alone(packing="slack", prefill_order="fcfs")
    targets = {"max_new_tokens": 40, "tpot_s": 0.02}
    long = ask(servers, "long", 1_500, 0, **targets)
    short = [ask(servers, f"s{i}", 10, 10_000 * (i + 1), **targets) for i in range(3)]
    servers.run()
    assert max(it.ended_at for it in short) < long.ended_at / 2
    assert [len(it.output) for it in (long, *short)] == [40] * 4


def test_the_batch_counts_contexts_of_those_that_wait_correctly() -> None:
    servers = alone(packing="slack")
    for index in range(4):
        ask(servers, f"r{index}", 400 * index + 10, 10_000 * index, max_new_tokens=30, tpot_s=0.02)
    batch = servers["u"].machine.batch
    assert isinstance(batch, PackedBatch)
    seen = []
    servers["u"].on_step = lambda engine: seen.append(
        (batch.context_tokens, sum(batch.context_of(it) for it in batch.members.values()))
    )
    servers.run()
    assert len(seen) > 30
    assert all(booked == counted for booked, counted in seen)


def test_its_table_learns_what_steps_take() -> None:
    servers = Servers(
        lambda config, clock, times, fabric: patched(
            config, clock, ByContext(), fabric, predicted=times
        ),
        u={"packing": "slack"},
    )
    ask(servers, "r", 100, 0, max_new_tokens=60, tpot_s=1.0)
    servers.run()
    table = servers["u"].decoding.table  # type: ignore[attr-defined]  # a patched one has it
    assert table.step_us(1, 150, 150) == pytest.approx(20_000, rel=0.05)


def test_a_displaced_prompt_goes_on_where_it_was() -> None:
    """2,000 tokens in chunks of 100, and 100 tokens come after the third."""
    servers = alone(prefill_order="salvage", chunk_tokens=100)
    long = ask(servers, "long", 2_000, 0)
    servers.run(until=0.025)
    short = ask(servers, "short", 100, 10_000)
    servers.run()
    assert short.ended_at == pytest.approx(0.04)
    assert long.ended_at == pytest.approx(0.21)


def test_the_oldest_prompt_gets_every_sixteenth_chunk() -> None:
    servers = alone(prefill_order="salvage", chunk_tokens=100)
    long = ask(servers, "long", 300, 0)
    short = [ask(servers, f"s{i}", 50, 10_000 * (i + 1)) for i in range(100)]
    servers.run()
    assert long.ended_at == pytest.approx(0.01 * 33)
    assert sum(it.ended_at > long.ended_at for it in short) == 40


def test_memory_is_given_back_for_a_more_urgent_prompt_and_nothing_hangs() -> None:
    servers = alone(prefill_order="edf", chunk_tokens=100, kv_tokens=1_000)
    long = ask(servers, "long", 900, 0, ttft_s=10.0)
    servers.run(until=0.055)
    urgent = ask(servers, "urgent", 500, 10_000, ttft_s=0.5)
    servers.run()
    assert urgent.ended_at == pytest.approx(0.06 + 0.05)
    assert [len(it.ends) for it in (long, urgent)] == [1, 1]


def test_an_online_prompt_ends_an_offline_pass_with_its_layer() -> None:
    """A pass of 80 ms in four layers: the prompt at 5 ms waits until 20 ms."""
    servers = alone(interrupt_layers=4)
    offline = ask(servers, "offline", 800, 0, is_online=False)
    servers.run(until=0.005)
    online = ask(servers, "online", 100, 10_000)
    servers.run()
    assert online.ended_at == pytest.approx(0.03)
    assert offline.ended_at == pytest.approx(0.03 + 0.08)


def test_an_offline_prompt_ends_no_pass_and_an_online_pass_is_not_ended() -> None:
    servers = alone(interrupt_layers=4)
    first = ask(servers, "first", 800, 0)
    servers.run(until=0.005)
    ask(servers, "second", 100, 10_000)
    servers.run()
    assert first.ended_at == pytest.approx(0.08)
    assert servers["u"].machine.counters.prefill_uncached_tokens == 900
