"""A patched engine and the gateway mean the same by a name, though each counts in its own way."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.order import Outlook
from policies.registry import ORDER
from policies.salvage import GUARD_TARGETS
from policies.types import Job
from policies.urgency import PREFILL_ORDER, Speed, Waiting
from tests.gateway.talk import SECOND, online

RATE = 1 / 64
"""A power of two: both reckon without rounding."""
NOW_US = 40 * SECOND
TARGETS_S = (4, 8, 30)
LONGEST_WAIT_US = min(TARGETS_S) * GUARD_TARGETS * SECOND
"""Beyond it a guard puts the gateway's late prompts on; an engine has turns for the oldest."""
SAME = sorted(PREFILL_ORDER.keys() & ORDER.keys())

PROMPTS = st.lists(
    st.tuples(
        st.integers(0, LONGEST_WAIT_US),
        st.integers(1, 130_000),
        st.integers(0, 100_000),
        st.sampled_from(TARGETS_S),
    ),
    min_size=2,
    max_size=12,
).map(lambda rows: sorted(rows, reverse=True))


def test_all_orders_of_the_gateway_are_orders_of_a_patched_engine() -> None:
    assert ORDER.keys() == set(SAME)


@pytest.mark.parametrize("name", SAME)
@given(PROMPTS)
def test_what_the_gateway_puts_first_an_engine_does_not_put_later(
    name: str, prompts: list[tuple[int, int, int, int]]
) -> None:
    """As they came; each waits, lacks so many tokens, has others cached, and has its target."""
    waiting, jobs = list[Waiting](), list[Job]()
    for number, (waited_us, rest, cached, target_s) in enumerate(prompts):
        arrival_us, target_us = NOW_US - waited_us, target_s * SECOND
        waiting.append(Waiting(arrival_us, rest, rest + cached, target_us))
        jobs.append(
            online(
                f"{number:02}",
                rest + cached,
                arrival_us,
                deadline_us=arrival_us + target_us,
                cached_tokens=cached,
            )
        )
    inside = PREFILL_ORDER[name](waiting, Speed(NOW_US, RATE))
    before = accumulate((row.rest_tokens for row in waiting), initial=0)
    outlook, order = Outlook(NOW_US, RATE), ORDER[name]()
    keys = [order.key(job, outlook.behind(it)) for job, it in zip(jobs, before, strict=False)]
    by_gateway = sorted(range(len(jobs)), key=lambda it: (keys[it], it))
    for one, next_one in pairwise(by_gateway):
        *ranks, value = inside[one]
        *next_ranks, next_value = inside[next_one]
        assert ranks <= next_ranks
        assert ranks < next_ranks or value <= next_value + 1e-9 * abs(next_value)
