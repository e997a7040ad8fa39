"""Conversations with one server: order, memory, aborts, pauses, roles."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from backends.engine import Refused, ids_prompt, named_prompt
from backends.engine.tokens import EOS
from policies.types import Role
from tests.backends.engine_fleet import Servers, pd, prompt

GREEDY: dict[str, Any] = {"ignore_eos": True, "stream": True}


def test_a_prompt_is_computed_in_chunks_and_then_one_token_a_step() -> None:
    servers = Servers(u={"chunk_tokens": 100})
    heard = servers.submit("u", prompt=prompt(250), max_new_tokens=3, **GREEDY)
    servers.run()
    assert heard.tokens_at == pytest.approx([0.025, 0.035])
    assert heard.ended_at == pytest.approx(0.045)


def test_prefill_goes_before_decode() -> None:
    servers = Servers(u={})
    first = servers.submit("u", "a", prompt=prompt(10), max_new_tokens=4, **GREEDY)
    servers.clock.call_at(
        0.005, lambda: servers.submit("u", "b", prompt=prompt(500, 5000), max_new_tokens=1)
    )
    servers.run()
    gaps = [later - sooner for sooner, later in pairwise(first.tokens_at)]
    assert gaps == pytest.approx([0.01, 0.05 + 0.01])
    assert first.ended_at == pytest.approx(0.001 + 0.03 + 0.05)


def test_a_repeated_prompt_is_not_computed_again() -> None:
    servers = Servers(u={"page_tokens": 16})
    servers.submit("u", "a", prompt=prompt(100), max_new_tokens=1)
    servers.run()
    servers.submit("u", "b", prompt=prompt(100), max_new_tokens=1)
    servers.run()
    assert servers["u"].machine.counters.prefill_cached_tokens == 96
    assert servers["u"].loads()["total_prefill_uncached_tokens"] == 104


def test_prompts_of_different_spaces_share_nothing() -> None:
    servers = Servers(u={})
    for rid in ("a", "b"):
        servers.submit("u", rid, prompt=prompt(100), max_new_tokens=1, space=rid)
        servers.run()
    assert servers["u"].machine.counters.prefill_cached_tokens == 0


def test_named_prompts_share_what_has_the_same_name() -> None:
    servers = Servers(u={})
    for job in ("a", "b"):
        shared = named_prompt(("system", 300), (job, 50))
        servers.submit("u", job, prompt=shared, max_new_tokens=10, true_tokens=2)
        servers.run()
    assert servers["u"].machine.counters.prefill_cached_tokens == 300


def test_the_coldest_prefix_goes_when_memory_is_short() -> None:
    servers = Servers(u={"kv_tokens": 250})
    for rid, start in (("a", 1000), ("b", 2000), ("again", 1000), ("c", 3000)):
        servers.submit("u", rid, prompt=prompt(100, start), max_new_tokens=1)
        servers.run()
    cache = servers["u"].machine.kv.cache
    held = [cache.match("", prompt(100, start), 100)[1] for start in (1000, 2000, 3000)]
    assert held[0] == 100
    assert held[1] < 100


def test_an_aborted_running_request_gets_one_more_token_and_is_kept() -> None:
    servers = Servers(u={})
    heard = servers.submit("u", prompt=prompt(10), max_new_tokens=50, **GREEDY)
    servers.clock.call_at(0.025, servers["u"].abort, "r")
    servers.run()
    reason = {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}
    assert heard.reason == reason
    assert len(heard.output) == 5
    assert servers["u"].machine.kv.cache.tokens == 10 + 4


def test_an_aborted_waiting_request_ends_in_the_queue() -> None:
    servers = Servers(u={"max_running": 1})
    servers.submit("u", "first", prompt=prompt(10), max_new_tokens=50, **GREEDY)
    waiting = servers.submit("u", "second", prompt=prompt(10), max_new_tokens=50)
    servers.clock.call_at(0.1, servers["u"].abort, "second")
    servers.run()
    assert waiting.reason["message"] == "Abort in waiting queue"
    assert waiting.output == []


def test_the_front_wants_the_exact_rid_and_the_scheduler_takes_the_prefix() -> None:
    servers = Servers(u={})
    long = servers.submit("u", "req-10", prompt=prompt(10), max_new_tokens=50, **GREEDY)
    short = servers.submit("u", "req-1", prompt=prompt(10), max_new_tokens=50, **GREEDY)
    servers.clock.call_at(0.1, servers["u"].abort, "req")
    servers.clock.call_at(0.2, servers["u"].abort, "req-1")
    servers.run()
    assert [it.reason["message"] for it in (long, short)] == ["Aborted", "Aborted"]
    assert long.ended_at > 0.2


def test_an_abort_before_dispatch_is_lost_and_blocks_later_ones() -> None:
    servers = Servers(u={"ingest_s": 0.05})
    heard = servers.submit("u", prompt=prompt(10), max_new_tokens=20, **GREEDY)
    for when in (0.01, 0.1, 0.15):
        servers.clock.call_at(when, servers["u"].abort, "r")
    servers.run()
    assert heard.reason == {"type": "length", "length": 20}


def test_a_client_that_leaves_before_dispatch_is_dropped() -> None:
    servers = Servers(u={"ingest_s": 0.05})
    heard = servers.submit("u", prompt=prompt(10), max_new_tokens=20)
    resident = servers["u"].residents[0]
    servers.clock.call_at(0.01, servers["u"].leave, resident)
    servers.run()
    assert heard.ended_at == 0.01
    assert servers["u"].machine.counters.prefill_uncached_tokens == 0


def test_a_live_rid_is_refused_a_second_time() -> None:
    servers = Servers(u={})
    servers.submit("u", prompt=prompt(10))
    with pytest.raises(Refused, match="Duplicate request ID detected: r"):
        servers.submit("u", prompt=prompt(10))


def test_what_exceeds_the_context_is_refused() -> None:
    servers = Servers(u={"context_tokens": 100})
    with pytest.raises(Refused, match=r"The input \(100 tokens\) is longer"):
        servers.submit("u", prompt=prompt(100))
    with pytest.raises(Refused, match="Requested token count exceeds"):
        servers.submit("u", prompt=prompt(90), max_new_tokens=11)


def test_what_exceeds_memory_is_refused_by_the_scheduler() -> None:
    servers = pd(kv_tokens=100)
    prefill, decode = servers.pair(prompt=prompt(200), max_new_tokens=1)
    assert prefill.reason["status_code"] == decode.reason["status_code"] == 400
    assert "exceeds the maximum number of tokens: 200 > 99" in decode.reason["message"]


def test_a_full_queue_answers_503_or_gives_up_its_least_urgent() -> None:
    servers = Servers(u={"max_running": 1, "max_queued": 1, "priority": True})
    servers.submit("u", "runs", prompt=prompt(10), max_new_tokens=50, **GREEDY)
    servers.run(until=0.05)
    low = servers.submit("u", "low", prompt=prompt(10), priority=1)
    same = servers.submit("u", "same", prompt=prompt(10), priority=1)
    high = servers.submit("u", "high", prompt=prompt(10), max_new_tokens=2, priority=5)
    servers.run()
    assert same.reason["message"] == "The request queue is full."
    assert low.reason["message"] == "The request is aborted by a higher priority request."
    assert high.reason["type"] != "abort"


@pytest.mark.parametrize(("priority", "retractions"), [(12, 1), (11, 0)])
def test_only_a_much_more_urgent_request_displaces_a_running_one(
    priority: int, retractions: int
) -> None:
    servers = Servers(u={"max_running": 2, "priority": True})
    running = [
        servers.submit("u", rid, prompt=prompt(10), max_new_tokens=50, priority=1, **GREEDY)
        for rid in ("old", "new")
    ]
    servers.run(until=0.1)
    servers.submit("u", "urgent", prompt=prompt(10), max_new_tokens=5, priority=priority)
    servers.run()
    assert servers["u"].machine.counters.retractions == retractions
    assert [len(it.output) for it in running] == [50, 50]
    assert (running[0].ended_at < running[1].ended_at) == bool(retractions)


def test_memory_is_freed_by_as_many_as_it_takes() -> None:
    servers = Servers(u={"kv_tokens": 320, "priority": True})
    running = [
        servers.submit(
            "u", f"r{i}", prompt=prompt(20, 1000 * i), max_new_tokens=80, priority=1, **GREEDY
        )
        for i in (1, 2, 3)
    ]
    servers.run(until=0.03)
    urgent = servers.submit("u", "x", prompt=prompt(150, 9000), max_new_tokens=5, priority=50)
    servers.run()
    assert servers["u"].machine.counters.retractions == 2
    assert urgent.ended_at < min(it.ended_at for it in running)


def test_larger_priorities_go_first_and_those_without_one_last() -> None:
    servers = Servers(u={"max_running": 1, "priority": True})
    order: list[tuple[float, str]] = []
    heard = {
        rid: servers.submit("u", rid, prompt=prompt(10), max_new_tokens=2, priority=priority)
        for rid, priority in (("none", None), ("low", 1), ("high", 9))
    }
    servers.run()
    order = sorted((it.ended_at, rid) for rid, it in heard.items())
    assert [rid for _, rid in order] == ["high", "low", "none"]


def test_retraction_hits_the_one_with_the_fewest_tokens_and_loses_none() -> None:
    unsure: dict[str, Any] = {"stream": True, "true_tokens": 90}
    servers = Servers(u={"kv_tokens": 212})
    old = servers.submit("u", "old", prompt=prompt(60), max_new_tokens=90, **unsure)
    servers.run(until=0.3)
    servers["u"].prefilling.ratio = 0.1
    young = servers.submit("u", "young", prompt=prompt(20, 5000), max_new_tokens=90, **unsure)
    servers.run()
    assert servers["u"].machine.counters.retractions == 1
    assert [len(it.output) for it in (old, young)] == [90, 90]
    assert old.ended_at < young.ended_at
    assert len(young.tokens_at) == 89


def test_an_answer_ends_by_itself_at_the_same_token_on_resume() -> None:
    servers = Servers(u={"eos_every": 20})
    whole = servers.submit("u", "a", prompt=prompt(10), max_new_tokens=1000)
    servers.run()
    cut = len(whole.output) // 2
    grown = prompt(10).grown(whole.output[:cut])
    rest = servers.submit("u", "b", prompt=grown, max_new_tokens=1000)
    servers.run()
    assert whole.reason == rest.reason == {"type": "stop", "matched": EOS}
    assert whole.output[:cut] + rest.output == whole.output


def test_a_stop_token_ends_the_answer() -> None:
    servers = Servers(u={})
    free = servers.submit("u", "a", prompt=prompt(10), max_new_tokens=30, ignore_eos=True)
    servers.run()
    stop = free.output[7]
    held = servers.submit(
        "u", "b", prompt=prompt(10), max_new_tokens=30, ignore_eos=True, stop_token_ids=(stop,)
    )
    servers.run()
    assert held.reason == {"type": "stop", "matched": stop}
    assert held.output == free.output[: free.output.index(stop) + 1]


def test_a_hidden_length_ends_the_answer_without_ids() -> None:
    servers = Servers(u={})
    heard = servers.submit("u", prompt=named_prompt(("j", 10)), max_new_tokens=30, true_tokens=4)
    servers.run()
    assert heard.reason["type"] == "stop"
    assert heard.ended_at == pytest.approx(0.001 + 0.03)


@pytest.mark.parametrize("mode", ["in_place", "retract"])
def test_a_pause_holds_running_and_new_requests(mode: str) -> None:
    servers = Servers(u={})
    running = servers.submit("u", "a", prompt=prompt(10), max_new_tokens=20, **GREEDY)
    servers.run(until=0.055)
    servers["u"].pause(mode)
    new = servers.submit("u", "b", prompt=prompt(10), max_new_tokens=1)
    servers.run(until=10.0)
    assert new.ends == []
    assert servers["u"].machine.kv.used == (0 if mode == "retract" else 16)
    servers["u"].resume()
    servers.run()
    assert len(running.output) == 20
    assert len(new.output) == 1


def test_a_pause_with_abort_ends_what_runs() -> None:
    servers = Servers(u={})
    running = servers.submit("u", prompt=prompt(10), max_new_tokens=20, **GREEDY)
    servers.run(until=0.055)
    servers["u"].pause("abort")
    servers.run()
    assert running.reason["message"] == "Aborted"
    assert servers["u"].idle


def test_a_role_is_switched_only_when_idle_and_takes_its_time() -> None:
    servers = pd(role_switch_s=0.4)
    servers.submit("d", bootstrap_host="127.0.0.1", bootstrap_room=3, prompt=prompt(10))
    busy = servers["d"].refuses_role("prefill")
    assert busy == "instance is not idle; drain all requests before switching"
    servers["d"].abort_all()
    servers.run()
    assert servers["d"].refuses_role("prefill") is None
    done: list[float] = []
    began = servers.clock.time()
    servers["d"].switch_role(Role.PREFILL, lambda: done.append(servers.clock.time()))
    servers.run()
    assert done == [pytest.approx(began + 0.4)]
    assert servers["d"].loads()["disaggregation"]["mode"] == "prefill"


def test_slowing_down_adds_to_every_pass() -> None:
    servers = Servers(u={})
    servers["u"].slow_down(0.1)
    heard = servers.submit("u", prompt=prompt(10), max_new_tokens=3, **GREEDY)
    servers.run()
    assert heard.ended_at == pytest.approx(0.101 + 2 * 0.11)


def test_the_cache_is_flushed_only_when_idle() -> None:
    servers = Servers(u={})
    servers.submit("u", prompt=prompt(10), max_new_tokens=20, **GREEDY)
    servers.run(until=0.05)
    assert not servers["u"].flush_cache()
    servers.run()
    assert servers["u"].flush_cache()
    assert servers["u"].machine.kv.cache.tokens == 0


def test_the_load_report_counts_decode_steps_as_moments() -> None:
    servers = Servers(u={})
    for rid in ("a", "b"):
        servers.submit("u", rid, prompt=ids_prompt([1, 2, 3]), max_new_tokens=5, **GREEDY)
    servers.run()
    moments = servers["u"].loads()["decode_moments"]
    assert moments == pytest.approx([3, 6, 30_000, 12, 60_000, 6])  # the first step has no time


def test_tokens_are_counted_without_being_told_to_whoever_does_not_listen() -> None:
    servers = Servers(u={})
    heard = servers.submit("u", prompt=prompt(10), max_new_tokens=30, ignore_eos=True)
    steps: list[int] = []
    servers["u"].on_step = lambda engine: steps.append(len(engine.machine.batch))
    servers.run()
    assert len(heard.tokens_at) == 1
    assert len(steps) == 29
