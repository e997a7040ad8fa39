"""How long a controller leaves servers alone after changes that came to nothing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.refusals import FIRST_S, IN_VAIN, LONGEST_S, Refusals
from policies.clock import VirtualClock
from policies.events import Outcome, SwitchOver
from policies.types import Role


def over(outcome: Outcome, worker: str = "d1") -> SwitchOver:
    return SwitchOver(worker, Role.PREFILL, outcome, 0)


class Book:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.refusals = Refusals(self.clock)

    def waits_s(self) -> int:
        """In whole seconds, from now on."""
        began_s = self.clock.time()
        while self.refusals.waits:
            self.clock.run(self.clock.time() + 1.0)
        return round(self.clock.time() - began_s)


def test_each_refusal_in_a_row_is_waited_for_twice_as_long_up_to_a_bound() -> None:
    book, waits = Book(), []
    for _ in range(9):
        book.refusals.over(over(Outcome.FAILED))
        waits.append(book.waits_s())
    assert waits == [15, 30, 60, 120, 240, 480, 600, 600, 600]


def test_weeks_of_refusals_by_ever_new_servers_are_waited_for_and_not_remembered() -> None:
    book = Book()
    for number in range(1_100):
        book.refusals.over(over(Outcome.FAILED, f"pod-{number}"))
        book.clock.run(book.clock.time() + LONGEST_S)
    book.refusals.over(over(Outcome.FAILED))
    assert book.waits_s() == LONGEST_S
    assert not book.refusals.was_refused("pod-1099")


@given(st.lists(st.sampled_from(Outcome), max_size=40))
def test_only_what_emptied_a_server_in_vain_is_waited_for_and_never_for_longer_than_the_bound(
    outcomes: list[Outcome],
) -> None:
    book = Book()
    for outcome in outcomes:
        book.refusals.over(over(outcome))
        waits_s = book.waits_s()
        assert (waits_s >= FIRST_S) is (outcome in IN_VAIN)
        assert waits_s <= LONGEST_S


def test_one_that_is_done_ends_the_wait_and_what_is_held_against_its_server() -> None:
    book = Book()
    for worker in ("d1", "d2"):
        book.refusals.over(over(Outcome.FAILED, worker))
    book.refusals.over(over(Outcome.DONE, "d1"))
    assert not book.refusals.waits
    assert [book.refusals.was_refused(worker) for worker in ("d1", "d2")] == [False, True]


def test_what_is_held_against_a_server_is_forgotten() -> None:
    book = Book()
    book.refusals.over(over(Outcome.BUSY))
    assert book.refusals.was_refused("d1")
    book.clock.run(book.clock.time() + LONGEST_S)
    assert not book.refusals.was_refused("d1")
