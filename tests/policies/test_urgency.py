"""In which order a patched engine takes prompts into its chunks."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.urgency import OLDEST_EVERY, PREFILL_ORDER, RESERVE, Speed, Waiting, fcfs_slacks

NOW = Speed(now_us=10_000_000.0, tokens_per_us=0.02)
TTFT_US = 8_000_000.0

prompts = st.lists(
    st.builds(
        Waiting,
        arrival_us=st.integers(0, 10_000_000).map(float),
        rest_tokens=st.integers(1, 130_000),
        prompt_tokens=st.integers(130_000, 131_000),
        ttft_us=st.sampled_from([0.0, TTFT_US]),
        is_online=st.booleans(),
        max_tokens=st.just(64),
    ),
    max_size=8,
).map(lambda rows: sorted(rows, key=lambda row: row.arrival_us))


def prompt(tokens: int, *, waited_s: float = 0.0, online: bool = True) -> Waiting:
    return Waiting(NOW.now_us - waited_s * 1e6, tokens, tokens, TTFT_US * online, online)


def taken(name: str, *waiting: Waiting) -> list[int]:
    keys = PREFILL_ORDER[name](waiting, NOW)
    return sorted(range(len(waiting)), key=lambda i: (keys[i], i))


@pytest.mark.parametrize("name", PREFILL_ORDER)
@given(prompts)
def test_every_prompt_has_a_key_and_the_same_twice(name: str, waiting: list[Waiting]) -> None:
    keys = PREFILL_ORDER[name](waiting, NOW)
    assert len(keys) == len(waiting)
    assert keys == PREFILL_ORDER[name](waiting, NOW)
    assert len(sorted(keys)) == len(keys)


@pytest.mark.parametrize("name", ["edf", "shortest", "kairos", "salvage", "rescue"])
def test_offline_prompts_come_after_online_ones(name: str) -> None:
    assert taken(name, prompt(10, online=False), prompt(100_000)) == [1, 0]


def test_each_order_by_its_own_rule() -> None:
    old_long, short, older = (
        prompt(60_000, waited_s=5),
        prompt(500, waited_s=1),
        prompt(9_000, waited_s=6),
    )
    queue = (older, old_long, short)
    assert taken("fcfs", *queue) == [0, 1, 2]
    assert taken("edf", *queue) == [0, 1, 2]
    assert taken("shortest", *queue) == [2, 0, 1]
    assert taken("hrrn", *queue) == [2, 0, 1]


def test_late_prompts_go_longest_first_as_printed_and_shortest_first_as_repaired() -> None:
    late = (prompt(90_000, waited_s=9), prompt(1_000, waited_s=9))
    assert taken("kairos", *late) == [0, 1]
    assert taken("salvage", *late) == [1, 0]
    assert taken("rescue", *late) == [1, 0]


def test_who_can_be_saved_goes_before_who_cannot() -> None:
    doomed, fine = prompt(4_000, waited_s=7.9), prompt(30_000)
    assert taken("salvage", doomed, fine) == [1, 0]
    assert taken("rescue", doomed, fine) == [1, 0]


def test_rescue_serves_a_long_prompt_first_where_all_can_be_on_time() -> None:
    """6 s of work that is due in 7 s, and 1 s that is due in 8 s: salvage would let it miss."""
    long, short = prompt(120_000, waited_s=1), prompt(20_000)
    assert taken("rescue", long, short) == [0, 1]
    assert taken("salvage", long, short) == [1, 0]


@given(prompts)
def test_rescue_keeps_as_many_on_time_as_any_choice_could(waiting: list[Waiting]) -> None:
    """Of those who are here, with the reserve that the rule takes."""
    timed = [row for row in waiting if row.ttft_us]
    keys = PREFILL_ORDER["rescue"](timed, NOW)
    kept = sum(key[1] == 0.0 for key in keys)
    best = max(
        size
        for size in range(len(timed) + 1)
        if size == 0 or any(all_on_time(chosen) for chosen in combinations(timed, size))
    )
    assert kept == best


def all_on_time(chosen: tuple[Waiting, ...]) -> bool:
    done_us = NOW.now_us
    for row in sorted(chosen, key=lambda row: row.arrival_us + row.ttft_us):
        done_us += row.rest_tokens * RESERVE / NOW.tokens_per_us
        if done_us > row.arrival_us + row.ttft_us:
            return False
    return True


def test_slack_is_that_of_a_first_come_queue_as_a_share_of_the_target() -> None:
    first, second = prompt(20_000), prompt(60_000)
    assert fcfs_slacks([first, second], NOW) == pytest.approx([7 / 8, 4 / 8])


def test_orders_that_could_starve_a_prompt_have_turns_for_the_oldest() -> None:
    assert {"shortest", "salvage", "rescue"} == OLDEST_EVERY.keys()
