"""Decode steps counted together: nobody can tell, except by the time that a simulation takes."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.engine import Engine, EngineConfig, Fabric, Request, Resident, named_prompt
from backends.engine.leap import MOST_STEPS
from backends.simulated import Grid
from backends.steptimes import LinearStepTimes
from policies.clock import VirtualClock
from policies.types import Role


class Heard:
    """A listener that remembers when it heard what."""

    def __init__(self, name: str, clock: Grid, story: list[tuple[Any, ...]]) -> None:
        self._name, self._clock, self._story = name, clock, story

    def tokens(self, resident: Resident) -> None:
        self._tell("first", resident.generated)

    def finished(self, resident: Resident, reason: dict[str, Any]) -> None:
        self._tell(reason["type"], resident.generated)

    def lost(self, resident: Resident) -> None:
        self._tell("lost", resident.generated)

    def _tell(self, *what: object) -> None:
        self._story.append((self._clock.time(), self._name, *what))


class Day:
    """One unified server, with or without leaps, and all that was heard of it."""

    def __init__(self, *, leaps: bool, kv_tokens: int = 100_000, page_tokens: int = 1) -> None:
        self.virtual = VirtualClock()
        self.clock = Grid(self.virtual)
        self.story: list[tuple[Any, ...]] = []
        config = EngineConfig(role=Role.UNIFIED, kv_tokens=kv_tokens, page_tokens=page_tokens)
        self.engine = Engine(config, self.clock, LinearStepTimes(), Fabric(self.clock))
        self.engine.leaps = leaps
        self.residents: list[Resident] = []

    def at(self, when_s: float, callback: Callable[..., object], *args: object) -> None:
        self.clock.call_at(when_s, callback, *args)

    def ask(self, name: str, prompt: int, answer: int) -> None:
        request = Request(
            rid=name, prompt=named_prompt((name, prompt)), max_new_tokens=500, true_tokens=answer
        )
        heard = Heard(name, self.clock, self.story)
        self.residents.append(self.engine.submit(request, heard))

    def look(self) -> None:
        """What others may read at any time."""
        loads = self.engine.loads()
        seen = (loads["num_running_reqs"], loads["num_used_tokens"], loads["num_total_tokens"])
        tokens = tuple(it.generated for it in self.residents)
        self.story.append((self.clock.time(), *seen, *tokens))

    def leave(self, number: int) -> None:
        if number < len(self.residents):
            self.engine.leave(self.residents[number])


def told(seed: int, **options: Any) -> list[tuple[Any, ...]]:
    """A random day: requests, looks, clients that leave, a pause, and a death near the end."""
    day, random = Day(**options), Random(seed)
    for i in range(12):
        prompt, answer = random.randint(1, 900), random.randint(1, 120)
        day.at(random.uniform(0, 3), day.ask, f"r{i}", prompt, answer)
        day.at(random.uniform(0, 4), day.look)
    for _ in range(3):
        day.at(random.uniform(0.5, 4), day.leave, random.randrange(12))
    pause_s = random.uniform(1, 3)
    day.at(pause_s, day.engine.pause, random.choice(["in_place", "retract"]))
    day.at(pause_s + 0.3, day.engine.resume)
    if random.random() < 0.3:
        day.at(3.5, day.engine.kill)
    day.virtual.run(60)
    day.look()
    return day.story


def rounded(story: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [(round(it[0], 6), *it[1:]) for it in story]


@given(st.integers(0, 10_000))
def test_leaps_change_nothing_that_anybody_hears_or_reads(seed: int) -> None:
    assert rounded(told(seed, leaps=True)) == rounded(told(seed, leaps=False))


@pytest.mark.parametrize("seed", range(10))
def test_leaps_change_nothing_where_memory_is_short(seed: int) -> None:
    options = {"kv_tokens": 2000, "page_tokens": 16}
    short, steps = (told(seed, leaps=leaps, **options) for leaps in (True, False))
    assert rounded(short) == rounded(steps)


def test_a_long_answer_takes_few_turns() -> None:
    day = Day(leaps=True)
    turns = [0]
    call_at = day.virtual.call_at

    def counted(*args: Any) -> Any:
        turns[0] += 1
        return call_at(*args)

    day.virtual.call_at = counted  # type: ignore[method-assign]  # counts timers
    day.ask("a", 100, 500)
    day.virtual.run()
    assert day.story[-1][2:] == ("stop", 500) or day.story[-1][2:] == ("length", 500)
    assert turns[0] < 500 / MOST_STEPS + 10


def test_whoever_wants_every_token_gets_every_token() -> None:
    day = Day(leaps=True)
    request = Request(
        rid="s", prompt=named_prompt(("s", 50)), max_new_tokens=30, true_tokens=30, stream=True
    )
    day.engine.submit(request, Heard("s", day.clock, day.story))
    day.virtual.run()
    assert [it[3] for it in day.story] == [*range(1, 30), 30]
