"""What is written down of each request of a run: when it went, and how it ended."""

from __future__ import annotations

from collections.abc import Callable

from backends.engine import Resident
from gateway.simulation.records import Ended, Record
from policies.events import (
    Decision,
    Dispatch,
    Event,
    Fail,
    Failed,
    Finished,
    FirstToken,
    Preempted,
    Reject,
)


class Recorder:
    """Hears what the core hears, sees what it decides, and asks servers what a leg took."""

    def __init__(self, ended: Callable[[Record], None]) -> None:
        self.records: dict[str, Record] = {}
        self._ended = ended

    def decided(self, now_us: int, decision: Decision) -> None:
        match decision:
            case Dispatch(job=job):
                self._dispatched(self.records[job.id], decision, now_us)
            case Reject(job, reason):
                self._over(self.records[job.id], Ended.REJECTED, reason, now_us)
            case Fail(job, reason):
                self._over(self.records[job.id], Ended.FAILED, reason, now_us)
            case _:
                pass

    @staticmethod
    def _dispatched(record: Record, dispatch: Dispatch, now_us: int) -> None:
        if record.dispatched_us is None:
            record.dispatched_us = now_us
        record.sent_us = now_us
        record.attempts = dispatch.attempt
        record.prefill, record.decode = dispatch.prefill or "", dispatch.decode

    def _over(self, record: Record, ended: Ended, reason: str, now_us: int) -> None:
        record.ended, record.reason, record.last_us = ended, str(reason), now_us
        self._ended(record)

    def heard(self, event: Event, now_us: int) -> None:
        match event:
            case FirstToken(job_id):
                record = self.records[job_id]
                record.first_us = now_us if record.first_us is None else record.first_us
            case Finished(job_id, generated):
                record = self.records[job_id]
                record.generated += generated
                self._over(record, Ended.FINISHED, "", now_us)
            case Failed(job_id):
                self.records[job_id].generated += event.generated
            case Preempted(job_id, generated, lost):
                record = self.records[job_id]
                record.generated += generated
                record.preemptions += 1
                record.lost_tokens += lost
            case _:
                pass

    def leg_ended(self, job_id: str, resident: Resident) -> None:
        record = self.records[job_id]
        if resident.began_s is None:
            return
        began_us = round(resident.began_s * 1e6)
        if record.computed_tokens == 0 and record.began_us is None:
            record.cached_tokens = resident.cached_tokens
        record.computed_tokens += resident.computed_tokens
        if record.sent_us is not None and began_us >= record.sent_us:
            record.began_us = began_us
            computed_s = resident.computed_s
            record.computed_us = None if computed_s is None else round(computed_s * 1e6)
