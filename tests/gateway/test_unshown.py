"""What a report frees of the prompts at a unified server is what a look at every job would find."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.books import Ticket
from gateway.core import Rules
from gateway.unshown import Unshown
from policies.breaker import Breaker, BreakerRule
from policies.events import FirstToken, Load, LoadReport
from policies.ledger import Ledger
from policies.order import Fcfs
from tests.gateway.talk import SECOND, Talk, offline, unified

Moves = list[tuple[str, int]]
MOVES = st.lists(st.tuples(st.sampled_from(("send", "show", "end", "ask")), st.integers(0, 5)))


def idle(seen_us: int) -> Load:
    return Load(seen_us=seen_us, running=1, waiting=0, used_tokens=0, total_tokens=0)


def there(name: str = "u") -> Ledger:
    return Ledger(unified(name), Breaker(BreakerRule()))


@given(MOVES)
def test_only_those_that_are_there_and_old_enough_are_told_once(moves: Moves) -> None:
    unshown, ledger, tickets = Unshown(), there(), [Ticket(offline(str(n))) for n in range(6)]
    for now_us, (move, number) in enumerate(moves):
        ticket = tickets[number]
        if move == "send" and ticket.prefill is None and ticket.decode is None:
            ticket.book(ledger, ledger, 1, now_us)
            unshown.sent(ticket, ledger)
        elif move == "show":
            ticket.prefilled(now_us)
        elif move == "end":
            ticket.release()
        elif move == "ask":
            before_us = now_us - number
            wanted = [t for t in tickets if t.prefill is ledger and t.sent_us < before_us]
            found = list(unshown.computed(ledger, before_us))
            assert sorted(map(id, found)) == sorted(map(id, wanted))
            for one in found:
                one.free_prefill()


def test_what_nobody_asks_for_is_forgotten() -> None:
    unshown, servers = Unshown(), [there(str(n)) for n in range(300)]
    for now_us, ledger in enumerate([*servers, *[servers[0]] * 1000]):
        ticket = Ticket(offline(str(now_us)))
        ticket.book(ledger, ledger, 1, now_us)
        unshown.sent(ticket, ledger)
        ticket.release()
    assert len(unshown) < 400


def test_a_report_frees_the_prompt_of_an_answer_that_shows_no_first_token() -> None:
    talk = Talk([unified()], Rules(order=Fcfs()))
    talk.arrive(offline("a"), offline("b"))
    talk.say(FirstToken("b"))
    (ledger,) = talk.core.ledgers.values()
    assert ledger.prefills == 1
    talk.say(LoadReport("u", idle(SECOND // 4)), at_us=SECOND // 4)
    assert ledger.prefills == 1
    talk.say(LoadReport("u", idle(SECOND)), at_us=SECOND)
    assert ledger.prefills == 0
