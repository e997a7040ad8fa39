"""Every state a job can be in, and every step between them."""

from __future__ import annotations

from enum import IntEnum, auto


class State(IntEnum):
    QUEUED = auto()
    PREFILL = auto()
    DECODE = auto()
    YIELDING = auto()
    """Preempted: its legs are closing, and it is going to queue again."""
    DONE = auto()
    REJECTED = auto()
    FAILED = auto()
    CANCELLED = auto()


class Step(IntEnum):
    DISPATCHED = auto()
    FIRST_TOKEN = auto()
    LAST_TOKEN = auto()
    PREEMPTED = auto()
    RETURNED = auto()
    RETRIED = auto()
    REFUSED = auto()
    BROKE = auto()
    CLIENT_LEFT = auto()


TRANSITIONS: dict[State, dict[Step, State]] = {
    State.QUEUED: {
        Step.DISPATCHED: State.PREFILL,
        Step.REFUSED: State.REJECTED,
        Step.CLIENT_LEFT: State.CANCELLED,
    },
    State.PREFILL: {
        Step.FIRST_TOKEN: State.DECODE,
        Step.LAST_TOKEN: State.DONE,
        Step.PREEMPTED: State.YIELDING,
        Step.RETRIED: State.QUEUED,
        Step.BROKE: State.FAILED,
        Step.CLIENT_LEFT: State.CANCELLED,
    },
    State.DECODE: {
        Step.LAST_TOKEN: State.DONE,
        Step.PREEMPTED: State.YIELDING,
        Step.RETRIED: State.QUEUED,
        Step.BROKE: State.FAILED,
        Step.CLIENT_LEFT: State.CANCELLED,
    },
    State.YIELDING: {
        Step.RETURNED: State.QUEUED,
        Step.LAST_TOKEN: State.DONE,
        Step.RETRIED: State.QUEUED,
        Step.BROKE: State.FAILED,
        Step.CLIENT_LEFT: State.CANCELLED,
    },
    State.DONE: {},
    State.REJECTED: {},
    State.FAILED: {},
    State.CANCELLED: {},
}


class IllegalStep(RuntimeError):
    """A bug in the gateway, never an answer to a client."""


def advance(state: State, step: Step) -> State:
    try:
        return TRANSITIONS[state][step]
    except KeyError:
        raise IllegalStep(f"{step.name} while {state.name}") from None
