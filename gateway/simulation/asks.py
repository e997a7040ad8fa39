"""The requests of one run: drawn or replayed, checked against the fleet, and turned into jobs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from backends.engine import Prompt, named_prompt
from backends.simulated import Work
from backends.workload import Ask, replayed, synthetic
from gateway.scenario import BACKLOG, CLOSED, OPEN, BadRows, WorkloadEntry
from gateway.settings import ConfigError
from gateway.simulation.fleet import capacities, fits, servers_of
from gateway.simulation.plan import Plan, Source
from gateway.simulation.records import Record
from policies.prefixes import FIRST_PREFIX_TOKENS
from policies.types import Job, Kind, Role


@dataclass(slots=True)
class Stream:
    """One workload's requests, in order of time; a closed one is drawn from as answers come."""

    entry: WorkloadEntry
    asks: Iterator[Ask]
    random: Random
    """For what is not drawn in advance: pauses between requests, families of prompts."""
    clients: int = 0
    made: int = 0


@dataclass(slots=True)
class Counts:
    """What was left out or cut, and is told in the report."""

    skipped_rows: int = 0
    too_large: int = 0
    cut_answers: int = 0


@dataclass(slots=True)
class Asks:
    """All requests of one run."""

    room: Room
    streams: list[Stream] = field(default_factory=list)
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True, slots=True)
class Room:
    """What fits into each of the compared fleets, so that all of them see the same requests."""

    largest: Sequence[dict[Role, int]]
    context_tokens: int

    @classmethod
    def of(cls, plan: Plan) -> Room:
        fleets = {plan.scenario.fleet_of(policy).name for policy in plan.scenario.policy}
        plans = [servers_of(it, plan.data) for it in plan.scenario.fleet if it.name in fleets]
        contexts = [server.config.context_tokens for fleet in plans for server in fleet]
        return cls([capacities(fleet) for fleet in plans], min(contexts))

    def limit(self, entry: WorkloadEntry, ask: Ask) -> int:
        """The most that a request names, within the model's context."""
        named = ask.output_tokens if entry.names_length else entry.max_tokens
        return max(1, min(named, self.context_tokens - ask.input_tokens))

    def holds(self, ask: Ask) -> bool:
        if ask.input_tokens >= self.context_tokens:
            return False
        return all(fits(ask.input_tokens, ask.output_tokens, one) for one in self.largest)


def prepared(plan: Plan, load: float, seed: int) -> Asks:
    """The same for every policy: a seed gives each workload randomness of its own."""
    room = Room.of(plan)
    asks = Asks(room)
    until_s = plan.until_s(load)
    for number, source in enumerate(plan.sources):
        random = Random(f"{seed}/{source.entry.name}")
        drawn = _drawn(source, plan.scale(source.entry, load), until_s, random)
        sieve = _sieve(drawn, source, room, asks.counts, f"workload[{number}]")
        clients = 0
        if source.entry.arrivals == CLOSED:
            clients = max(1, round(source.entry.clients * plan.scale(source.entry, load)))
        else:
            sieve = iter(list(sieve))  # a request that is refused is refused before anything runs
        own = Random(f"{seed}/{source.entry.name}/own")
        asks.streams.append(Stream(source.entry, sieve, own, clients))
        asks.counts.skipped_rows += len(source.trace.skipped) if source.trace else 0
    return asks


def _drawn(source: Source, scale: float, until_s: float, random: Random) -> Iterable[Ask]:
    entry = source.entry
    if source.is_replayed and source.trace is not None:
        rows: Iterable[Ask] = source.trace.rows
        if entry.keep_share < 1.0:
            rows = [row for row in rows if random.random() < entry.keep_share]
        return replayed(
            rows,
            from_s=entry.from_s,
            until_s=until_s,
            rate_scale=entry.rate_scale * scale,
            tick_s=entry.tick_s,
            random=random,
        )
    lengths = source.law_of_lengths()
    if entry.arrivals == BACKLOG:
        return (Ask(0.0, *lengths.draw(random)) for _ in range(round(entry.count * scale)))
    if entry.arrivals == CLOSED:
        return iter(lambda: Ask(0.0, *lengths.draw(random)), None)
    law = OPEN[entry.arrivals](entry, entry.rate * entry.rate_scale * scale)
    return synthetic(law, lengths, until_s=until_s, random=random)


def _sieve(
    asks: Iterable[Ask], source: Source, room: Room, counts: Counts, where: str
) -> Iterator[Ask]:
    entry = source.entry
    for number, ask in enumerate(asks, start=1):
        limit = room.limit(entry, ask)
        fitting = ask._replace(output_tokens=min(ask.output_tokens, limit))
        if room.holds(fitting):
            counts.cut_answers += fitting.output_tokens < ask.output_tokens
            yield fitting
        elif entry.too_large is BadRows.SKIP:
            counts.too_large += 1
        else:
            line = f"{source.trace.path}, line {ask.line}" if source.trace and ask.line else ""
            raise ConfigError(
                f"{where} {entry.name!r}: {line or f'request {number}'}: a prompt of "
                f"{ask.input_tokens} and an answer of {ask.output_tokens} tokens are more than "
                'any server holds; too_large = "skip" leaves such requests out'
            )


def opened(stream: Stream, ask: Ask, now_us: int, room: Room) -> tuple[Job, Work, Record]:
    """One request as policies see it, as servers do, and as it is remembered."""
    entry = stream.entry
    stream.made += 1
    job_id = f"{entry.name}-{stream.made}"
    is_online = entry.kind is Kind.ONLINE
    ttft_us, window_us = round(entry.ttft_ms * 1e3), round(entry.window_s * 1e6)
    tpot_us = round(entry.tpot_ms * 1e3) if is_online else 0
    patience_us = round(entry.ttft_ms * entry.patience * 1e3) if is_online else window_us
    job = Job(
        id=job_id,
        kind=entry.kind,
        model="",
        prompt_tokens=ask.input_tokens,
        max_tokens=room.limit(entry, ask),
        arrival_us=now_us,
        deadline_us=now_us + (ttft_us if is_online else window_us),
        give_up_us=now_us + patience_us,
        tpot_us=tpot_us,
    )
    record = Record(
        id=job_id,
        workload=entry.name,
        kind=entry.kind,
        arrival_us=now_us,
        prompt_tokens=ask.input_tokens,
        output_tokens=ask.output_tokens,
        ttft_target_us=ttft_us,
        tpot_target_us=tpot_us,
        window_us=window_us,
    )
    return job, Work(prompt=_prompt(job_id, stream, ask), answer_tokens=ask.output_tokens), record


def _prompt(job_id: str, stream: Stream, ask: Ask) -> Prompt:
    """Cached tokens are the beginning of a stretch that a family of prompts has in common."""
    if not ask.cached_tokens:
        return named_prompt((job_id, ask.input_tokens))
    family = f"{stream.entry.name}/{stream.random.randrange(stream.entry.prefix_groups)}"
    own = ask.input_tokens - ask.cached_tokens
    return named_prompt((family, ask.cached_tokens), (job_id, own))


def prefixes_of(prompt: Prompt) -> tuple[int, ...]:
    """The keys that the gateway would make of its text: equal names are equal text."""
    keys, tokens = list[int](), FIRST_PREFIX_TOKENS
    while tokens <= prompt.tokens:
        digest = blake2b(prompt.cut(0, tokens).seed(), digest_size=8).digest()
        keys.append(int.from_bytes(digest, "big"))
        tokens *= 2
    return tuple(keys)
