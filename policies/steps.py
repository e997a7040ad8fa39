"""How long one worker's steps take: its cost model's word, corrected by its own counters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from policies.calibration import DecodeMoments
from policies.correction import Correction, observe
from policies.roofline import CostModel
from policies.sizing import saturation_batch, throughput_knee
from policies.step_line import SeenStep, StepLine
from policies.types import Worker

RATE_PROMPT_TOKENS = 2048
"""The prompt whose speed stands for all where the server has not named its chunk."""

TOLD_US = 5_000_000
"""For so long after a report of steps, means over many steps correct nothing."""

_NOTHING_DECODED = DecodeMoments(
    steps=0, batch=0, time_us=0, batch_squared=0, batch_time_us=0, generated=0
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """What a server has done since it started, by its own report."""

    prefill_tokens: int
    prefill_busy_us: int
    decoded: DecodeMoments = _NOTHING_DECODED

    def is_before(self, other: Counters) -> bool:
        """Counters that went backwards are those of a server that has started anew."""
        return (
            self.prefill_tokens < other.prefill_tokens
            or self.prefill_busy_us < other.prefill_busy_us
            or self.decoded.steps < other.decoded.steps
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Which cost model predicts which worker."""

    default: CostModel | None = None
    by_name: Mapping[str, CostModel] = field(default_factory=dict)

    def of(self, worker: Worker) -> CostModel | None:
        return self.by_name.get(worker.name, self.default)


class Steps:
    """A decision costs two look-ups: a decode step's time is linear in the contexts."""

    __slots__ = (
        "_base_us",
        "_busy_us",
        "_computed_tokens",
        "_knee_tokens",
        "_left",
        "_left_context",
        "_pairs",
        "_prompt_tokens",
        "_prompts",
        "_saturation",
        "_seen",
        "_token_us",
        "_told_us",
        "chunk_tokens",
        "cost",
        "decode",
        "prefill",
        "replicas",
    )

    def __init__(self, cost: CostModel, *, chunk_tokens: int = 0, replicas: int = 1) -> None:
        self.cost = cost
        self.chunk_tokens = chunk_tokens or RATE_PROMPT_TOKENS
        self.replicas = max(1, replicas)
        """Ranks behind one door; each has its share of the sequences and steps by itself."""
        self.prefill = Correction()
        self.decode = Correction()
        self._base_us: list[float] = []
        self._token_us: list[float] = []
        self._seen: Counters | None = None
        self._prompts = self._prompt_tokens = 0
        self._pairs = 0.0
        self._computed_tokens = self._busy_us = 0
        self._left = self._left_context = 0
        self._saturation = self._knee_tokens = 0
        self._told_us = 0

    def fits(self, cost: CostModel, chunk_tokens: int, replicas: int) -> bool:
        """Whether these predictions are still those of such a worker."""
        return (
            self.cost == cost
            and self.chunk_tokens == (chunk_tokens or RATE_PROMPT_TOKENS)
            and self.replicas == max(1, replicas)
        )

    # Predictions.

    def decode_us(self, count: int, context_tokens: float) -> float:
        """Of a step of `count` sequences that hold so many tokens together, as corrected."""
        return self.line(count, context_tokens)[0]

    def line(self, count: int, context_tokens: float) -> tuple[float, float]:
        """The same, and what each further token of context adds to it."""
        count = -(-count // self.replicas)
        if count >= len(self._base_us):
            self._tabulate(count)
        factor = self.decode_factor
        token_us = self._token_us[count] * factor / self.replicas
        return self._base_us[count] * factor + context_tokens * token_us, token_us

    @property
    def decode_factor(self) -> float:
        """What is known of the other phase stands in while nothing is known of this one: a unified
        server that computes a prompt before each step counts no steps."""
        return (self.decode if self.decode.is_in_force else self.prefill).factor

    @property
    def prefill_tokens_per_us(self) -> float:
        """At the size of a whole chunk, as corrected, all ranks together."""
        seconds = self.cost.prefill_one(self.chunk_tokens).seconds * self.prefill.factor
        return self.replicas * self.chunk_tokens / (seconds * 1e6)

    @property
    def saturation(self) -> int:
        """Sequences beyond which a step's linear layers win nothing more, all ranks together."""
        if not self._saturation:
            self._saturation = saturation_batch(self.cost)
        return self._saturation * self.replicas

    @property
    def knee_tokens(self) -> int:
        """Prompt tokens beyond which a larger batch is computed no faster for each of them."""
        if not self._knee_tokens:
            self._knee_tokens = throughput_knee(self.cost, self.chunk_tokens)
        return self._knee_tokens

    def _tabulate(self, count: int) -> None:
        for known in range(len(self._base_us), count + 64):
            base = self.cost.decode(known, 0).seconds
            token = (self.cost.decode(known, 1_000_000).seconds - base) * 1e-6
            self._base_us.append(base * 1e6)
            self._token_us.append(token * 1e6)

    @property
    def corrections(self) -> dict[str, Correction]:
        return {"prefill": self.prefill, "decode": self.decode}

    @property
    def step_line(self) -> StepLine | None:
        """A rank's decode step as a line of its requests and their tokens; None where it bends the
        other way."""
        small, large = 1, max(2, self._saturation or saturation_batch(self.cost))
        base_us, token_us = self.line(small * self.replicas, 0)
        request_us = (self.line(large * self.replicas, 0)[0] - base_us) / (large - small)
        line = StepLine(base_us - small * request_us, request_us, token_us * self.replicas)
        return line if min(line) >= 0 else None

    # What happened.

    def stepped(self, steps: Sequence[SeenStep], now_us: int) -> None:
        """Corrects by steps of which the server has told who was in them: no mean is guessed."""
        self._told_us = now_us
        for step in steps:
            seconds = self.cost.decode(step.requests, step.context_tokens).seconds
            self.decode = observe(
                self.decode, predicted_s=seconds, measured_s=step.took_us * 1e-6, now_us=now_us
            )

    def prefilled(self, tokens: int) -> None:
        """A prompt was computed, in as many steps as it has chunks."""
        self._prompts += -(-tokens // self.chunk_tokens)
        self._prompt_tokens += tokens
        self._pairs += 0.5 * tokens * (tokens + 1)

    def left(self, context_tokens: int) -> None:
        """A sequence ended with so much context: it was in some of the steps since the report."""
        self._left += 1
        self._left_context += context_tokens

    def observe(self, now: Counters, count: int, context_tokens: int, now_us: int) -> None:
        """Corrects by what the server has counted since it was last heard.

        Servers tell how many sequences each step had but not how long they were: the mean context
        is that of the gateway's own books, of `count` present sequences and of those that left.
        """
        before, self._seen = self._seen, now
        if before is not None and not now.is_before(before):
            self._computed_tokens += now.prefill_tokens - before.prefill_tokens
            self._busy_us += now.prefill_busy_us - before.prefill_busy_us
            self._observe_prefill(now_us)
            is_told = self._told_us and now_us - self._told_us < TOLD_US
            if (sequences := count + self._left) and not is_told:
                mean_context = (context_tokens + self._left_context) / sequences
                self._observe_decode(now.decoded.since(before.decoded), mean_context, now_us)
        self._left = self._left_context = 0

    def overlook(self, now: Counters) -> None:
        """What it has counted since then was not its own doing alone: nothing is learnt from it."""
        self._seen = now
        self._prompts = self._prompt_tokens = 0
        self._pairs = 0.0
        self._computed_tokens = self._busy_us = self._left = self._left_context = 0

    def _observe_prefill(self, now_us: int) -> None:
        """By the time of a token: prompts end at other times than reports come."""
        if not self._prompt_tokens or self._computed_tokens <= 0:
            return
        steps = self._prompts
        mean = self.cost.prefill_sums(1, round(self._prompt_tokens / steps), 0, self._pairs / steps)
        self.prefill = observe(
            self.prefill,
            predicted_s=steps * mean.seconds / self._prompt_tokens,
            measured_s=self._busy_us * 1e-6 / self._computed_tokens,
            now_us=now_us,
            steps=steps,
        )
        self._prompts = self._prompt_tokens = 0
        self._pairs = 0.0
        self._computed_tokens = self._busy_us = 0

    def _observe_decode(self, window: DecodeMoments, mean_context: float, now_us: int) -> None:
        if window.steps < 1:
            return
        batch = window.batch / window.steps
        self.decode = observe(
            self.decode,
            predicted_s=self._uncorrected_us(batch, batch * mean_context) * 1e-6,
            measured_s=window.time_us / window.steps * 1e-6,
            now_us=now_us,
            steps=round(window.steps),
        )

    def _uncorrected_us(self, batch: float, context_tokens: float) -> float:
        """Of one rank, at a mean batch that is no whole number."""
        low = int(batch)
        share = batch - low
        if low + 1 >= len(self._base_us):
            self._tabulate(low + 1)
        base_us, token_us = (
            table[low] + (table[low + 1] - table[low]) * share
            for table in (self._base_us, self._token_us)
        )
        return base_us + context_tokens * token_us
