"""Whether a prompt waits because those that decode at a server could not bear its company."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import ClassVar, Final, Protocol

from policies.ledger import Ledger
from policies.order import target_us
from policies.paces import Contexts, Stream
from policies.types import Job, Kind, Role

HOLD_TARGETS: Final = 5
"""Nobody is held for longer, nor for more than half of what clients are patient for."""


class Hold(Protocol):
    @property
    def holds(self) -> bool:
        """Whether anything is ever held; else nobody is asked."""
        ...

    def bears(self, job: Job, ledger: Ledger, first_us: float, now_us: int) -> bool:
        """Whether the job may decode there now, if its first token would come at `first_us`."""
        ...


def held_until_us(job: Job) -> int:
    """From then on nothing holds it."""
    patience_us = (job.give_up_us - job.arrival_us) // 2
    return job.arrival_us + min(HOLD_TARGETS * target_us(job), patience_us)


@dataclass(frozen=True, slots=True)
class Never:
    """Whatever has room goes."""

    holds: ClassVar[bool] = False

    def bears(self, job: Job, ledger: Ledger, first_us: float, now_us: int) -> bool:
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class ForSlack:
    """A job waits while more running answers would lose their TPOT target by it than it would keep.

    An answer bears a step of its target, and what it has in hand spread over the tokens that are
    expected of it. Two kinds are not asked: those that are late already, because they would stop
    the whole; and those that could not even bear what is longer than this job, because holding
    it and its like would save nobody. So short jobs pass where long ones have to wait.
    The job itself counts for one, as long as going now keeps both its targets.
    """

    holds: ClassVar[bool] = True

    answer_tokens: int = 512
    """Expected of an answer: what is booked for one of unknown length."""

    def bears(self, job: Job, ledger: Ledger, first_us: float, now_us: int) -> bool:
        if not _may_hold(job, ledger) or now_us >= held_until_us(job):
            return True
        steps = self._steps_us(job, ledger)
        if steps is None:
            return True
        least_us, after_us = steps
        in_time = first_us <= job.deadline_us
        keeps = 1 if in_time and after_us <= job.tpot_us else 0
        lost = 0
        for it in ledger.running.values():
            if least_us <= self._bears_us(it) < after_us:
                lost += 1
                if lost > keeps:
                    return False
        return True

    def _bears_us(self, stream: Stream) -> float:
        """The step that would just keep its target."""
        if not (tpot_us := stream.tpot_us):
            return inf
        if not stream.first_us or stream.grown_us <= stream.first_us:
            return tpot_us
        in_hand_us = tpot_us * (stream.generated - 1) - (stream.grown_us - stream.first_us)
        return tpot_us + in_hand_us / self.answer_tokens if in_hand_us >= 0 else inf

    def _steps_us(self, job: Job, ledger: Ledger) -> tuple[float, float] | None:
        """With those alone that will be longer than the job, and with all and the job; None where
        nobody can say."""
        like = job.prompt_tokens + self.answer_tokens
        contexts = [it.booked_context for it in ledger.running.values()]
        longer = Contexts.of_tokens([tokens for tokens in contexts if tokens > like])
        everybody = Contexts.of_tokens([*contexts, job.prompt_tokens])
        if (line := ledger.paces.line) is not None:
            shift_us = ledger.paces.shift_us
            return line.step_us(longer) + shift_us, line.step_us(everybody) + shift_us
        if (steps := ledger.steps) is None:
            return None
        foreign = ledger.foreign_tokens
        return (
            steps.decode_us(max(1, longer.answers), longer.together + foreign),
            steps.decode_us(everybody.answers, everybody.together + foreign),
        )


def _may_hold(job: Job, ledger: Ledger) -> bool:
    """Online jobs before decode servers where somebody runs; not a part, whose answer is read by
    nobody."""
    return (
        job.kind is Kind.ONLINE
        and job.max_tokens > 1
        and ledger.worker.role is Role.DECODE
        and ledger.decodes > 0
    )
