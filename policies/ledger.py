"""What the gateway has sent to one server and not got back, corrected by what the server says."""

from __future__ import annotations

from policies.breaker import Breaker
from policies.events import Load
from policies.paces import Paces, Stream
from policies.prefixes import Prefixes
from policies.roofline import CostModel
from policies.steps import Steps
from policies.tide import Tide
from policies.types import Job, Kind, Worker

DISPLACES, SELECTS = "prefill", "online-first"
"""Of `Worker.engine`: offline prompts give way at chunks, offline decodes at steps. The engine sees
to it: nothing is aborted for that from here, nor kept out."""

_OFFLINE = Kind.OFFLINE


class PrefillRate:
    """Prompt tokens a microsecond while there was anything to do, over the last seconds of work."""

    __slots__ = ("_busy_us", "_is_whole", "_since_us", "_tokens", "tokens_per_us")

    WINDOW_US = 10_000_000
    EVIDENCE_TOKENS = 2_048
    """Below this nothing is claimed."""

    def __init__(self) -> None:
        self._since_us = 0
        self._is_whole = True
        """All that was worked on since then is there, or done."""
        self._busy_us = 0.0
        self._tokens = 0.0
        self.tokens_per_us: float | None = None
        """Kept: it is read at every look and changes with each prompt only."""

    def begin(self, now_us: int) -> None:
        self._since_us, self._is_whole = now_us, True

    def broke_off(self) -> None:
        """A prompt was taken off: how much of it was computed is not known, but it took time."""
        self._is_whole = False

    def under_way(self, now_us: int) -> float:
        """Tokens computed since the last prompt was, if the server kept to its rate."""
        return (now_us - self._since_us) * (self.tokens_per_us or 0.0)

    def done(self, tokens: int, now_us: int) -> None:
        if self._is_whole:
            self._busy_us += now_us - self._since_us
            self._tokens += tokens
        self.begin(now_us)
        if self._busy_us > self.WINDOW_US:
            self._busy_us /= 2
            self._tokens /= 2
        if self._tokens >= self.EVIDENCE_TOKENS and self._busy_us > 0:
            self.tokens_per_us = self._tokens / self._busy_us
        else:
            self.tokens_per_us = None


class Offline:
    """The part of a server's books that can be taken back."""

    __slots__ = ("context_tokens", "decodes", "prefill_tokens", "prefills", "reserved_tokens")

    def __init__(self) -> None:
        self.prefills = 0
        self.prefill_tokens = 0
        self.decodes = 0
        self.context_tokens = 0
        self.reserved_tokens = 0

    def add(self, context: int, reserved: int) -> None:
        self.decodes += 1
        self.context_tokens += context
        self.reserved_tokens += reserved

    def end(self, context: int, reserved: int) -> None:
        self.decodes -= 1
        self.context_tokens -= context
        self.reserved_tokens -= reserved

    def add_prefill(self, tokens: int) -> None:
        self.prefills += 1
        self.prefill_tokens += tokens

    def end_prefill(self, tokens: int) -> None:
        self.prefills -= 1
        self.prefill_tokens -= tokens


class Ledger:
    """Written by the core in the step that decides; policies only read it.

    The server's own report never replaces the books: it adds the work of others, and only the
    smaller of its last two readings counts, because a report lags behind what was sent just now.
    """

    __slots__ = (
        "_foreign_before",
        "batch_tokens",
        "breaker",
        "chunk_tokens",
        "context_tokens",
        "crowded",
        "decodes",
        "dispatched",
        "draining",
        "foreign_tokens",
        "kv_tokens",
        "line",
        "load",
        "max_running",
        "offline",
        "online",
        "paced_with",
        "paces",
        "prefill_rate",
        "prefill_tokens",
        "prefills",
        "prefixes",
        "reserved_tokens",
        "running",
        "sent_us",
        "shares",
        "stands_back",
        "steps",
        "switching",
        "up",
        "worker",
    )

    def __init__(self, worker: Worker, breaker: Breaker) -> None:
        self.worker = worker
        self.chunk_tokens = worker.chunk_tokens
        self.breaker = breaker
        self.up = True
        self.draining = False
        """By an operator's word."""
        self.switching = False
        """Nothing new until it has its new role."""
        self.shares = self.crowded = False
        """Its GPU with other servers; some of which were at work since its last report, so that
        this one corrects no prediction."""
        self.stands_back = False
        """No more offline work while online work beside it on its GPU is in danger."""
        self.prefills = self.prefill_tokens = 0
        self.sent_us = -1
        """When the last prompt went there."""
        self.batch_tokens = 0
        """Of the prompts that the server may compute together with it."""
        self.prefill_rate = PrefillRate()
        self.decodes = self.context_tokens = self.reserved_tokens = 0
        self.dispatched = 0
        self.prefixes = Prefixes()
        """Of the prompts that went there to be computed."""
        self.foreign_tokens = 0
        self.load: Load | None = None
        self.kv_tokens = worker.kv_tokens
        """The capacity, by the operator's word or the server's; 0 when nobody knows it."""
        self.max_running = worker.max_running
        self.offline = Offline()
        self.online = Tide()
        self.paced_with = 0, 0, 0
        """Its sequences, their tokens and the offline ones among them, when the pace was seen."""
        self.running: dict[str, Stream] = {}
        """The jobs whose place it is to decode here, by id."""
        self.paces = Paces()
        self.steps: Steps | None = None
        """Predicted step times, where the hardware is known."""
        self.line: tuple[float, float, float] | None = None
        """What placement last made of these books: a step's time, what a token of one more prompt
        adds to it, and what an offline job pays to be here; none once they have changed."""
        self._foreign_before = 0

    def __repr__(self) -> str:
        return (
            f"<Ledger {self.worker.name}: {self.prefills} prefills of {self.prefill_tokens}, "
            f"{self.decodes} decodes of {self.context_tokens}, {self.reserved_tokens} reserved>"
        )

    @property
    def is_empty(self) -> bool:
        return not self.prefills and not self.decodes

    @property
    def is_leaving(self) -> bool:
        """It gets nothing new, though it may well be up."""
        return self.draining or self.switching

    def usable(self, now_us: int) -> bool:
        if self.draining or self.switching or not self.up:
            return False
        return not self.breaker.open_until_us or self.breaker.allows(now_us)

    def takes(self, job: Job, now_us: int) -> bool:
        """Whether it may be sent there now. One that stands back is worth a wait, and goes on for
        an online job."""
        if self.stands_back and job.kind is _OFFLINE:
            return False
        return self.usable(now_us)

    def adopt(self, worker: Worker) -> None:
        """The same server, better known."""
        self.worker, load = worker, self.load
        self.chunk_tokens = worker.chunk_tokens
        self.line = None
        self.kv_tokens = _tighter(worker.kv_tokens, load.capacity_tokens if load else 0)
        self.max_running = _tighter(worker.max_running, load.max_running if load else 0)

    def correct(self, load: Load) -> None:
        self.load = load
        self.online.roll(load.seen_us)
        self.adopt(self.worker)
        foreign = max(0, load.total_tokens - self.context_tokens - self.prefill_tokens)
        self.foreign_tokens = min(foreign, self._foreign_before)
        self._foreign_before = foreign
        self.line = None
        if self.steps is not None and load.counters is not None:
            if self.crowded:
                self.steps.overlook(load.counters)
            else:
                self.steps.observe(load.counters, self.decodes, self.context_tokens, load.seen_us)
        self.crowded = False

    def predict_by(self, cost: CostModel | None) -> None:
        """What was learnt stays for as long as the hardware does."""
        self.line = None
        chunk_tokens, replicas = self.chunk_tokens, self.worker.dp_size
        if cost is None:
            self.steps = None
        elif self.steps is None or not self.steps.fits(cost, chunk_tokens, replicas):
            self.steps = Steps(cost, chunk_tokens=chunk_tokens, replicas=replicas)

    @property
    def prefill_tokens_per_us(self) -> float | None:
        """As seen; before anything was seen, as predicted; None where neither is known."""
        if (seen := self.prefill_rate.tokens_per_us) is not None:
            return seen
        return None if self.steps is None else self.steps.prefill_tokens_per_us

    def before(self, job: Job) -> int:
        """Prompt tokens that this one would wait behind: an engine that displaces offline prompts
        computes online ones first."""
        if job.kind is Kind.ONLINE and DISPLACES in self.worker.engine:
            return self.prefill_tokens - self.offline.prefill_tokens
        return self.prefill_tokens

    def forget_report(self) -> None:
        """The report is too old to be believed: the books alone go on."""
        self.foreign_tokens = self._foreign_before = 0
        self.line = None

    def uncached(self, job: Job) -> int:
        """The prompt tokens that this server would have to compute."""
        if job.cached_on and job.cached_on != self.worker.name:
            return job.prompt_tokens
        return job.prompt_tokens - job.cached_tokens

    def add_prefill(self, tokens: int, now_us: int) -> None:
        if not self.prefills:
            self.prefill_rate.begin(now_us)
        self.batch_tokens = tokens + (self.batch_tokens if self.has_open_batch(now_us) else 0)
        self.prefills += 1
        self.prefill_tokens += tokens
        self.sent_us = now_us

    def has_open_batch(self, now_us: int) -> bool:
        """What was sent last has just gone, or waits there behind something else."""
        return self.sent_us == now_us or self.prefill_tokens > self.batch_tokens

    def prefilled(self, tokens: int, now_us: int) -> None:
        """The prompt is computed: what that took tells how fast the server is."""
        self.prefills -= 1
        self.prefill_tokens -= tokens
        self.prefill_rate.done(tokens, now_us)
        if self.steps is not None:
            self.steps.prefilled(tokens)

    def end_prefill(self, tokens: int) -> None:
        self.prefills -= 1
        self.prefill_tokens -= tokens
        self.prefill_rate.broke_off()

    def paced(self, us: int, tokens: int, now_us: int) -> None:
        """An online job got so many tokens in that time."""
        if self.online.paced(us, tokens, now_us):
            self.paced_with = self.decodes, self.context_tokens, self.offline.decodes

    def add_decode(self, context: int, reserved: int) -> None:
        self.decodes += 1
        self.context_tokens += context
        self.reserved_tokens += reserved
        self.line = None

    def grow_decode(self, tokens: int, reserved: int) -> None:
        self.context_tokens += tokens
        self.reserved_tokens += reserved
        self.line = None

    def end_decode(self, context: int, reserved: int) -> None:
        self.decodes -= 1
        self.context_tokens -= context
        if self.steps is not None:
            self.steps.left(context)
        self.reserved_tokens -= reserved
        self.line = None


def _tighter(one: int, other: int) -> int:
    """Of two limits where 0 is none."""
    return min(one, other) if one and other else one or other
