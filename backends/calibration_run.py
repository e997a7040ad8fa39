"""Measuring a live server: which prompts and batches it is given, and what its counters say after.

Only stock levers are used: /generate with made-up token ids, and the cumulative counters of
/v1/loads. A prefill server is measured together with a decode server, as neither works alone.
"""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import orjson

from backends.counters import counters_of
from backends.fetch import Answer, fetch
from backends.http import HttpError, Upstream
from backends.pause import pause
from policies.calibration import DecodeMoments, Sample
from policies.clock import Clock
from policies.roofline import decode_batch, prefill_batch
from policies.steps import Counters

T = TypeVar("T")

PROMPTS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
"""Tokens of cold prompts; each is one step, so none is longer than the server's chunk."""

BEHIND = ((256, 1024), (512, 4096), (2048, 8192))
"""New tokens behind cached ones."""

BATCHES = (1, 4, 16, 32, 64, 128, 256)
CONTEXTS = (64, 512, 2048, 8192)
FEWEST_TOKENS, MOST_TOKENS = 64, 256
"""An answer is long enough for some counter updates, which SGLang publishes every 15 steps."""

RUN_S = 0.6
"""How long a decode run should take."""
POLL_S = 0.1
SETTLE_S = 0.02
COUNTED_WITHIN_S = 3.0
"""The last counters of a request come this long after its answer at most."""
REQUEST_S = 60.0
MOST_ROUNDS = 5
EVEN = 0.02
"""A window in which the batch varied by more (its variance over its mean's square) is left out."""
MINIMUM_STEPS = 8
"""Fewer of one batch size say nothing."""
KV_SHARE = 0.7
"""Of a server's cache that a batch may fill."""


class CannotMeasure(Exception):
    """The server is dead, busy or silent; the message says which, in one line."""


Report = Callable[[float, str], None]
"""Hears the share that is done, and what is being measured."""


@dataclass(frozen=True, slots=True)
class Peer:
    """One server as it is reached."""

    url: str
    upstream: Upstream


@dataclass(frozen=True, slots=True)
class Target:
    """A unified server as both, or a prefill and a decode server that work together."""

    prefill: Peer
    decode: Peer

    @property
    def is_pair(self) -> bool:
        return self.prefill is not self.decode


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a server says of itself and its limits."""

    mode: str
    model_path: str
    accelerator: str
    tp: int
    chunk_tokens: int
    context_tokens: int
    kv_tokens: int
    max_running: int
    bootstrap_port: int


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower quartile; of up to four, the least."""
    ordered = sorted(seconds)
    return ordered[(len(ordered) - 1) // 4]


class Step(NamedTuple):
    context_tokens: float
    """Of all sequences together."""
    seconds: float


@dataclass(slots=True)
class Findings:
    """Lower quartiles over all rounds: what disturbs a step can only make it longer."""

    prefills: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    """Seconds by (new tokens, cached tokens)."""
    decodes: dict[tuple[int, int], list[Step]] = field(default_factory=lambda: defaultdict(list))
    """By (sequences, prompt tokens of each)."""
    overheads: list[float] = field(default_factory=list)
    """Seconds of a first token besides its prefill."""
    disturbed: int = 0
    """Measurements into which somebody else's work fell."""

    def samples(self) -> list[Sample]:
        """What constants are fitted to."""
        return [
            *self._prompts(lambda cached: not cached),
            *(
                Sample(
                    batch=decode_batch(count, round(median(step.context_tokens for step in steps))),
                    seconds=undisturbed(step.seconds for step in steps),
                )
                for (count, _), steps in sorted(self.decodes.items())
            ),
        ]

    def behind_prefixes(self) -> list[Sample]:
        """A check only: engines differ in what a cached prefix costs, and one formula is asked."""
        return self._prompts(bool)

    def _prompts(self, wanted: Callable[[int], bool]) -> list[Sample]:
        return [
            Sample(batch=prefill_batch([(new, cached)]), seconds=undisturbed(seconds))
            for (new, cached), seconds in sorted(self.prefills.items())
            if wanted(cached)
        ]


async def facts_of(peer: Peer) -> Facts:
    """Raises CannotMeasure for a server that does not answer, or is busy."""
    info = await _page(peer, b"/server_info") or await _page(peer, b"/get_server_info")
    model = await _page(peer, b"/model_info") or await _page(peer, b"/get_model_info")
    page = await _loads(peer)
    ranks = page["loads"]
    if counters_of(ranks) is None:
        raise CannotMeasure(f"{peer.url} does not count its work (total_prefill_busy_us)")
    if len(ranks) > 1:
        raise CannotMeasure(f"{peer.url} has {len(ranks)} ranks: measure one with dp 1")
    load = ranks[0]
    present = _whole(load, "num_running_reqs") + _whole(load, "num_waiting_reqs")
    if present:
        what = "1 request" if present == 1 else f"{present} requests"
        raise CannotMeasure(f"{peer.url} is busy with {what}: measure an idle server")
    return Facts(
        mode=str(info.get("disaggregation_mode") or "null"),
        model_path=str(model.get("model_path") or info.get("model_path") or ""),
        accelerator=str(page.get("accelerator") or ""),
        tp=_whole(info, "tp_size") or 1,
        chunk_tokens=_whole(info, "chunked_prefill_size") or PROMPTS[-1],
        context_tokens=_whole(info, "context_length")
        or _whole(info, "max_req_input_len")
        or PROMPTS[-1],
        kv_tokens=_whole(load, "max_total_num_tokens") or _whole(info, "max_total_num_tokens"),
        max_running=_whole(load, "max_running_requests") or _whole(info, "max_running_requests"),
        bootstrap_port=_whole(info, "disaggregation_bootstrap_port") or 8998,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure, in this order."""

    prefills: Sequence[tuple[int, int]]
    """(new tokens, cached tokens)"""
    decodes: Sequence[tuple[int, int]]
    """(sequences, prompt tokens of each)"""


def planned(prefill: Facts, decode: Facts) -> Plan:
    return Plan(prefills=planned_prefills(prefill), decodes=planned_decodes(decode))


def planned_prefills(facts: Facts) -> list[tuple[int, int]]:
    """(new tokens, cached tokens) of each prompt, the longest and the shortest first."""
    longest = min(facts.context_tokens - 2, round(facts.kv_tokens * KV_SHARE))
    cold = [n for n in PROMPTS if n <= min(longest, facts.chunk_tokens)]
    warm = [(new, old) for new, old in BEHIND if new + old <= longest]
    warm = [(new, old) for new, old in warm if new <= facts.chunk_tokens]
    return [*outside_in([(n, 0) for n in cold]), *warm]


def planned_decodes(facts: Facts) -> list[tuple[int, int]]:
    """(sequences, prompt tokens of each), the corners first: time may run out."""
    room = facts.kv_tokens * KV_SHARE
    longest = facts.context_tokens - MOST_TOKENS - 2
    batches = [b for b in BATCHES if b <= max(1, facts.max_running)]
    contexts = [c for c in CONTEXTS if c <= longest]
    return [
        (b, c)
        for b in outside_in(batches)
        for c in outside_in(contexts)
        if b * (c + MOST_TOKENS) <= room
    ]


def outside_in(ordered: Sequence[T]) -> list[T]:
    """The first, the last, the second, the last but one, ..."""
    return [ordered[i // 2] if i % 2 == 0 else ordered[-1 - i // 2] for i in range(len(ordered))]


class Measuring:
    """One target, one measurement after the other, until the plan is done or time is up."""

    def __init__(
        self,
        target: Target,
        facts: tuple[Facts, Facts],
        vocabulary: int,
        clock: Clock,
        rng: random.Random,
        *,
        plan: Plan,
        budget_s: float,
        report: Report,
    ) -> None:
        self._target = target
        self._prefill_facts, _ = facts
        self._plan = plan
        self._longest = max((context for _, context in plan.decodes), default=1)
        self._vocabulary = vocabulary
        self._clock = clock
        self._rng = rng
        self._until_s = clock.time() + budget_s
        self._budget_s = budget_s
        self._report = report
        self._prompts: list[list[int]] = []
        self._step_s = RUN_S / FEWEST_TOKENS
        self.findings = Findings()

    async def run(self, rounds: int = MOST_ROUNDS) -> Findings:
        """Prefill and decode take turns, so that both are known when time runs out early."""
        prefills, decodes = self._plan.prefills, self._plan.decodes
        await self._warm_up()
        for _ in range(rounds):
            for index in range(max(len(prefills), len(decodes))):
                for plan, measure in ((prefills, self._prefill), (decodes, self._decode)):
                    if index < len(plan) and not self._is_late():
                        await measure(*plan[index])
        self._report(1.0, "done")
        return self.findings

    def _is_late(self) -> bool:
        return self._clock.time() >= self._until_s

    def _say(self, what: str) -> None:
        left = max(0.0, self._until_s - self._clock.time())
        self._report(1 - left / self._budget_s, what)

    async def _warm_up(self) -> None:
        """The first steps of a server compile and allocate; a pair meets for the first time."""
        self._say("warming up")
        await self._ask(self._random(64), 8)
        await self._ask(self._random(min(1024, self._prefill_facts.chunk_tokens)), 2)
        await self._idle(self._target.prefill)
        await self._idle(self._target.decode)

    # Prefill.

    async def _prefill(self, new: int, cached: int) -> None:
        self._say(f"prefill of {new} tokens" + (f" behind {cached}" if cached else ""))
        prompt = self._random(new + cached)
        if cached:
            await self._ask(prompt[:cached], 1)
        before = await self._idle(self._target.prefill)
        began_s = self._clock.time()
        await self._ask(prompt, 1)
        took_s = self._clock.time() - began_s
        after = await self._prefilled(before, new)
        tokens = after.prefill_tokens - before.prefill_tokens
        busy_s = (after.prefill_busy_us - before.prefill_busy_us) * 1e-6
        if tokens > len(prompt) or (not cached and tokens < new - by_chance(new)):
            self.findings.disturbed += 1
        elif tokens <= self._prefill_facts.chunk_tokens and busy_s > 0:
            if abs(tokens - new) > by_chance(new):  # the server's cache decides, not the plan
                new, cached = tokens, len(prompt) - tokens
            self.findings.prefills[new, cached].append(busy_s)
            self.findings.overheads.append(took_s - busy_s)

    async def _prefilled(self, before: Counters, tokens: int) -> Counters:
        """Counters come a little later than the answer."""
        until_s = self._clock.time() + COUNTED_WITHIN_S
        while True:
            now = await self._idle(self._target.prefill)
            if now.prefill_tokens > before.prefill_tokens:
                return now
            if self._clock.time() > until_s:
                url = self._target.prefill.url
                raise CannotMeasure(f"{url} has computed {tokens} tokens and counts none of them")

    # Decode.

    async def _decode(self, count: int, context: int) -> None:
        self._say(f"decode of {count} x {context} tokens")
        while len(self._prompts) < count:
            self._prompts.append(self._random(self._longest))
        tokens = min(MOST_TOKENS, max(FEWEST_TOKENS, round(RUN_S / self._step_s)))
        before = await self._idle(self._target.decode)
        seen = [before]
        async with _together() as group:
            asked = [
                group.create_task(self._ask(prompt[:context], tokens))
                for prompt in self._prompts[:count]
            ]
            while not all(task.done() for task in asked):
                await pause(self._clock, POLL_S)
                seen.append(await self._counters(self._target.decode))
        seen.append(await self._idle(self._target.decode))
        self._note_windows(seen, count, context, context + tokens / 2)

    def _note_windows(
        self, seen: Sequence[Counters], most: int, prompt: int, context: float
    ) -> None:
        """Of windows in which the batch stayed the same: requests join and leave at the ends."""
        windows = [b.decoded.since(a.decoded) for a, b in pairwise(seen)]
        even = [window for window in windows if window.steps >= 1 and is_even(window)]
        if any(window.batch > window.steps * most for window in even):
            self.findings.disturbed += 1
            return
        steps: dict[int, list[DecodeMoments]] = defaultdict(list)
        for window in even:
            steps[round(window.batch / window.steps)].append(window)
        for count, these in steps.items():
            if sum(window.steps for window in these) >= MINIMUM_STEPS:
                seconds = median(w.time_us / w.steps for w in these) * 1e-6
                self.findings.decodes[count, prompt].append(Step(count * context, seconds))
                self._step_s = seconds

    # Requests.

    def _random(self, tokens: int) -> list[int]:
        """Ids in the upper part of the vocabulary: the lower one holds special tokens."""
        low = self._vocabulary // 8
        return [self._rng.randrange(low, self._vocabulary) for _ in range(tokens)]

    async def _ask(self, prompt: Sequence[int], tokens: int) -> None:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {
                "max_new_tokens": tokens,
                "ignore_eos": True,
                "temperature": 0,
            },
        }
        target = self._target
        if target.is_pair:
            body |= {
                "bootstrap_host": urlsplit(target.prefill.url).hostname,
                "bootstrap_port": self._prefill_facts.bootstrap_port,
                "bootstrap_room": self._rng.getrandbits(62),
            }
        raw = orjson.dumps(body)
        if not target.is_pair:
            await _generate(target.decode, raw)
            return
        async with _together() as legs:
            for peer in (target.prefill, target.decode):
                legs.create_task(_generate(peer, raw))

    async def _idle(self, peer: Peer) -> Counters:
        """The counters once they stand still: what is counted late belongs to what was before."""
        until_s = self._clock.time() + COUNTED_WITHIN_S
        last: Counters | None = None
        while True:
            page = await _loads(peer)
            now, load = counters_of(page["loads"]), page["loads"][0]
            if now is None:
                raise CannotMeasure(f"{peer.url} no longer counts its work")
            still = not _whole(load, "num_running_reqs") and not _whole(load, "num_waiting_reqs")
            if still and now == last:
                return now
            if self._clock.time() > until_s:
                raise CannotMeasure(f"{peer.url} does not come to rest: somebody else uses it")
            last = now
            await pause(self._clock, SETTLE_S)

    async def _counters(self, peer: Peer) -> Counters:
        found = counters_of((await _loads(peer))["loads"])
        if found is None:
            raise CannotMeasure(f"{peer.url} no longer counts its work")
        return found


def by_chance(tokens: int) -> int:
    """Made-up prompts may begin alike: so many tokens of one may be found in the cache."""
    return 4 + tokens // 50


def is_even(window: DecodeMoments) -> bool:
    """Whether all steps of the window had about the same batch."""
    mean = window.batch / window.steps
    variance = window.batch_squared / window.steps - mean * mean
    return mean > 0 and variance <= EVEN * mean * mean


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first trouble is told as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except* CannotMeasure as errors:
        raise errors.exceptions[0] from None


async def _generate(peer: Peer, body: bytes) -> None:
    answer = await _fetch(peer, b"POST", b"/generate", body, REQUEST_S)
    if answer.status != 200:
        text = answer.body[:200].decode(errors="replace")
        raise CannotMeasure(f"{peer.url} answered {answer.status} to /generate: {text}")


async def _loads(peer: Peer) -> Mapping[str, Any]:
    page = await _page(peer, b"/v1/loads?include=core,disagg")
    if not page.get("loads"):
        raise CannotMeasure(f"{peer.url} has no /v1/loads: SGLang 0.5.23 is needed")
    return page


async def _page(peer: Peer, path: bytes) -> Mapping[str, Any]:
    """Empty where the server has no such page."""
    answer = await _fetch(peer, b"GET", path, b"", 10.0)
    if answer.status != 200:
        return {}
    try:
        page = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        return {}
    return page if isinstance(page, dict) else {}


async def _fetch(peer: Peer, method: bytes, path: bytes, body: bytes, timeout_s: float) -> Answer:
    try:
        return await fetch(peer.upstream, method, path, body, timeout_s=timeout_s)
    except HttpError as error:
        raise CannotMeasure(f"{peer.url} does not answer: {error}") from None


def _whole(table: Mapping[str, Any], key: str) -> int:
    value = table.get(key)
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0
