"""What holds for every server, whatever is asked of it."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from backends.engine import Engine, named_prompt
from backends.steptimes import LinearStepTimes, Noisy
from policies.types import Role
from tests.backends.engine_fleet import Heard, Servers, pd, prompt

SMALL = {"kv_tokens": 192, "max_running": 4, "chunk_tokens": 32, "reserved_decode_tokens": 4}

asked = st.fixed_dictionaries(
    {
        "at": st.floats(0, 0.5),
        "prompt": st.integers(1, 80),
        "family": st.integers(0, 2),
        "tokens": st.integers(1, 60),
        "abort_after": st.none() | st.floats(0, 0.4),
    }
)
workloads = st.lists(asked, min_size=1, max_size=12)
pages = st.sampled_from([1, 4, 16])
small_servers = st.fixed_dictionaries(
    {
        "kv_tokens": st.sampled_from([96, 128, 192, 400]),
        "max_running": st.sampled_from([1, 2, 4, 40]),
        "chunk_tokens": st.sampled_from([16, 32, 100]),
        "reserved_decode_tokens": st.sampled_from([0, 4, 64]),
        "page_tokens": pages,
        "priority": st.booleans(),
        "extra_slots": st.sampled_from([None, 0, 2]),
    }
)


def watched(engine: Engine) -> None:
    """Memory is checked at every decode step and whenever a request is heard of."""
    kv = engine.machine.kv
    assert kv.held >= 0
    assert kv.held + kv.cache.tokens <= kv.capacity
    assert 0 <= kv.cache.protected <= kv.cache.tokens


class Watching(Heard):
    def __init__(self, servers: Servers) -> None:
        super().__init__(servers.clock)
        self.servers = servers

    def tokens(self, resident: Any) -> None:
        super().tokens(resident)
        for engine in self.servers.engines.values():
            watched(engine)

    def finished(self, resident: Any, reason: dict[str, Any]) -> None:
        super().finished(resident, reason)
        for engine in self.servers.engines.values():
            watched(engine)


def play(servers: Servers, names: tuple[str, ...], work: list[dict[str, Any]]) -> list[Watching]:
    """Submit and abort at the given times; answers what each leg of each request heard."""
    heard = {(index, name): Watching(servers) for index in range(len(work)) for name in names}

    def submit(index: int, item: dict[str, Any]) -> None:
        where = {"bootstrap_host": "127.0.0.1", "bootstrap_port": 1, "bootstrap_room": index + 1}
        for name in names:
            asked = request(f"r{index:03}", item, where if len(names) > 1 else {})
            servers[name].submit(asked, heard[index, name])

    for index, item in enumerate(work):
        servers.clock.call_at(item["at"], submit, index, item)
        if item["abort_after"] is not None:
            for name in names:
                when = item["at"] + item["abort_after"]
                servers.clock.call_at(when, servers[name].abort, f"r{index:03}")
    servers.run()
    return list(heard.values())


def request(rid: str, item: dict[str, Any], where: dict[str, Any]) -> Any:
    from_family = prompt(item["prompt"], start=1000 * (item["family"] + 1))
    return Servers.request(
        rid,
        prompt=from_family,
        max_new_tokens=item["tokens"],
        ignore_eos=True,
        stream=True,
        **where,
    )


@given(workloads, small_servers)
def test_a_unified_server_never_overcommits_and_ends_every_request_once(
    work: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    servers = Servers(u=config)
    heard = play(servers, ("u",), work)
    assert [len(it.ends) for it in heard] == [1] * len(work)
    assert servers["u"].idle
    assert servers["u"].machine.kv.used == 0


@given(workloads, small_servers)
def test_a_pair_never_overcommits_and_ends_both_legs_once(
    work: list[dict[str, Any]], config: dict[str, Any]
) -> None:
    servers = pd(**config)
    heard = play(servers, ("p", "d"), work)
    assert [len(it.ends) for it in heard] == [1] * 2 * len(work)
    assert [servers[name].machine.kv.used for name in "pd"] == [0, 0]


@given(workloads, pages)
def test_whoever_finishes_says_what_the_model_says(work: list[dict[str, Any]], page: int) -> None:
    """Chunks, batches, retractions and pairs change when tokens come, not which."""
    calm = [{**item, "at": 1000.0 * index, "abort_after": None} for index, item in enumerate(work)]
    busy = play(Servers(u={**SMALL, "page_tokens": page}), ("u",), work)
    paired = play(pd(**SMALL, page_tokens=page), ("p", "d"), work)[1::2]
    alone = play(Servers(u=SMALL), ("u",), calm)
    for crowded, decoded, expected in zip(busy, paired, alone, strict=True):
        assert crowded.output == expected.output[: len(crowded.output)]
        assert decoded.output == expected.output[: len(decoded.output)]
        if crowded.reason["type"] == "length":
            assert crowded.output == expected.output


@given(st.integers(1, 50), st.integers(2, 40), st.data())
def test_a_resume_with_what_was_generated_continues_exactly(
    length: int, tokens: int, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, tokens - 1))
    servers = Servers(u={})
    whole = servers.submit(
        "u", "whole", prompt=prompt(length), max_new_tokens=tokens, ignore_eos=True
    )
    servers.run()
    grown = prompt(length).grown(whole.output[:cut])
    rest = servers.submit("u", "rest", prompt=grown, max_new_tokens=tokens - cut, ignore_eos=True)
    servers.run()
    assert whole.output[:cut] + rest.output == whole.output


@given(workloads, st.integers(0, 2**32))
def test_the_same_seed_gives_the_same_story(work: list[dict[str, Any]], seed: int) -> None:
    def story() -> list[tuple[list[float], list[dict[str, Any]], list[int]]]:
        servers = pd(**SMALL)
        for engine in servers.engines.values():
            engine.times = Noisy(LinearStepTimes(), Random(seed))
        return [(it.tokens_at, it.ends, it.output) for it in play(servers, ("p", "d"), work)]

    assert story() == story()


@given(workloads, small_servers, st.sampled_from("pd"), st.floats(0, 0.6))
def test_a_pair_ends_both_legs_once_though_one_server_dies_and_comes_back(
    work: list[dict[str, Any]], config: dict[str, Any], victim: str, at: float
) -> None:
    servers = pd(**config)
    servers.clock.call_at(at, servers[victim].kill)
    servers.clock.call_at(at, servers[victim].revive)
    heard = play(servers, ("p", "d"), work)
    assert [len(it.ends) + it.losses for it in heard] == [1] * 2 * len(work)
    assert [servers[name].machine.kv.used for name in "pd"] == [0, 0]


@given(workloads)
def test_a_kill_at_any_time_loses_each_request_or_had_ended_it(work: list[dict[str, Any]]) -> None:
    servers = Servers(u=SMALL)
    servers.clock.call_at(0.7, servers["u"].kill)
    heard = play(servers, ("u",), work)
    assert [len(it.ends) + it.losses for it in heard] == [1] * len(work)
    assert servers["u"].machine.kv.used == 0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 80)), min_size=1, max_size=30))
def test_names_and_lengths_keep_the_books_as_well_as_ids(jobs: list[tuple[int, int]]) -> None:
    servers = Servers(u={"kv_tokens": 1000, "chunk_tokens": 128, "page_tokens": 8})
    heard = [
        servers.submit(
            "u",
            f"j{index}",
            prompt=named_prompt(("system", 64), (f"j{index % 5}", length)),
            max_new_tokens=100,
            true_tokens=true,
        )
        for index, (length, true) in enumerate(jobs)
    ]
    servers.run()
    assert all(len(it.ends) == 1 for it in heard)
    assert servers["u"].machine.kv.held == 0
    assert servers["u"].role == Role.UNIFIED
