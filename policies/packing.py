"""Which of the running requests take the next decode step; the others keep their KV and wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf
from typing import NamedTuple, Protocol


class Running(NamedTuple):
    """One running request before a step; those of a step are given in the order they joined."""

    context_tokens: int
    """Prompt and answer so far."""
    produced: int
    """Tokens after the first one."""
    since_first_us: float
    tpot_us: float
    """What each of them may take on average; 0 when nobody waits for it."""
    skipped: int = 0
    """The steps in a row that it was left out of."""
    is_online: bool = True
    must_step: bool = False
    """It is to end, or the server cannot leave it out."""


StepUs = Callable[[int, int, int], float]
"""Predicted time of a step, by how many take part, their tokens together, and the longest's."""


class Packing(Protocol):
    """Answers indices in ascending order; of requests that run, at least one steps."""

    @property
    def by_longest(self) -> bool:
        """Whether steps are to be looked up by the longest context, whatever the server is like."""
        ...

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class All:
    """Continuous batching: everybody takes every step."""

    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        return list(range(len(running)))


@dataclass(frozen=True, slots=True)
class Kairos:
    """Algorithm 3 of arXiv 2605.02329 as printed: the least slack of all bounds the step.

    One request that is late for good makes the bound smaller than any step, and then all run.
    """

    by_longest = True

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        least_us = inf
        for row in running:
            if (slack_us := _slack_us(row)) < 0:
                least_us = slack_us  # no step is as short as that: nobody is chosen
                break
            if slack_us < inf:
                alone_us = step_us(1, row.context_tokens, row.context_tokens)
                least_us = min(least_us, slack_us - alone_us)
        chosen: list[int] = []
        context, now_us = 0, 0.0
        for index in _shortest_first(running) if least_us >= 0 else ():
            tokens = running[index].context_tokens
            count = len(chosen) + 1
            then_us = step_us(count, context + tokens, tokens)
            if then_us <= least_us and (not chosen or count * now_us > len(chosen) * then_us):
                chosen.append(index)
                context, now_us = context + tokens, then_us
        chosen += [i for i, row in enumerate(running) if row.must_step and i not in chosen]
        return sorted(chosen) if chosen else list(range(len(running)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Slack:
    """Whoever is on time gets ahead of its target, and what is ahead is spent on long contexts.

    * Everybody steps, unless that takes longer than the limit: then the shortest do that fit.
    * The limit is `aim` of the target, or what the least advanced request that is on time has in
      hand at that pace, where this is more. Who is late sets none: it would stop all.
    * Tokens per second are never fewer than in a step of all: a busy server would fall behind.
      Where those who fit are too few for that, all step.
    * Nobody waits for more than `most_skipped` steps in a row; when a turn comes, all step, because
      a step that one long context makes slow costs the others least when they are in it.
    """

    aim: float = 0.7
    most_skipped: int = 15
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        everybody = list(range(len(running)))
        if _is_turn(running, self.most_skipped):
            return everybody
        contexts = [row.context_tokens for row in running]
        limit_us, all_us = (
            self.limit_us(running),
            step_us(len(running), sum(contexts), max(contexts)),
        )
        if all_us <= limit_us:
            return everybody
        everybody.sort(key=lambda i: (not running[i].must_step, contexts[i]))
        line = _Line(everybody, contexts, step_us)
        fit = line.fit(limit_us, max(1, sum(row.must_step for row in running)))
        too_few = fit * all_us < len(running) * line.us(fit)
        return sorted(everybody if too_few else everybody[:fit])

    def limit_us(self, running: Sequence[Running]) -> float:
        """How long a step may take for the sake of those who are on time."""
        least_us, aim = inf, self.aim
        for row in running:
            tpot_us, since_us = row.tpot_us, row.since_first_us
            due_us = tpot_us * (row.produced + 1)
            if tpot_us > 0 and since_us <= due_us:
                own_us = max(aim * due_us - since_us, aim * tpot_us)
                if own_us < least_us:
                    least_us = own_us
        return least_us


@dataclass(frozen=True, slots=True, kw_only=True)
class MostKept:
    """As many targets as can be kept, by the pace that each request can afford from now on.

    * Everybody steps, unless shorter steps keep the targets of `worth` of all more. So it is stock
      where stock keeps all, and where nothing can keep more than stock does.
    * What a request can afford is `aim` of its target, longer or shorter by what it has in hand or
      lacks, over the next tokens. A step is as long as the least advanced of those with one target
      can afford: the target by which the most are kept. Who can afford more takes only its share
      of such steps, and those whose shares are the smallest are kept.
    * Of these, first come those who would be late before the next choice, then the shortest of all.
    * Tokens per second are not fewer than in a step of all, but for what may be `spent`: a busy
      server would fall behind. Where those who fit are too few, as few more step as it takes.
    * Nobody waits for more than `most_skipped` steps in a row; when a turn comes, all step.
    """

    aim: float = 0.8
    over_tokens: float = 32.0
    """What a request has in hand, or lacks, is made up for over so many."""
    hopeless: float = 0.5
    """Who can afford less than so much of its target sets no pace: it would stop all."""
    worth: float = 0.15
    spent: float = 0.03
    """A step has a part that does not depend on who is in it: without anything to spend hardly any
    step of fewer is worth its time."""
    due_steps: int = 5
    """A choice may be good for so many steps of all: who is late by then is due now."""
    most_skipped: int = 15
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        everybody = list(range(len(running)))
        if _is_turn(running, self.most_skipped):
            return everybody
        contexts = [row.context_tokens for row in running]
        all_us = step_us(len(running), sum(contexts), max(contexts))
        limit_us, kept = self.kept(running, step_us)
        if limit_us >= all_us:
            return everybody
        soon_us = self.due_steps * all_us
        due = {i for i in kept if _slack_us(running[i]) < soon_us}
        everybody.sort(key=lambda i: (not running[i].must_step, i not in due, contexts[i]))
        line = _Line(everybody, contexts, step_us)
        fit = line.fit(limit_us, max(1, sum(row.must_step for row in running)))
        least_per_us = (1 - self.spent) * len(running) / all_us
        while fit < len(running) and fit < least_per_us * line.us(fit):
            fit += 1
        return sorted(everybody[:fit])

    def kept(self, running: Sequence[Running], step_us: StepUs) -> tuple[float, list[int]]:
        """The length of a step by which the most are kept, and who they are."""
        contexts = [row.context_tokens for row in running]
        affords_us = [self.afford_us(row) for row in running]
        all_us = step_us(len(running), sum(contexts), max(contexts))
        best = all_us, [i for i, afford_us in enumerate(affords_us) if afford_us >= all_us]
        fewest = len(best[1]) + max(1, ceil(self.worth * len(running)))
        paces_us = self._paces_us(running, affords_us) if fewest <= len(running) else ()
        for pace_us in paces_us:
            if pace_us < all_us:
                kept = _sharing(pace_us, affords_us, contexts, step_us)
                if len(kept) >= fewest:
                    fewest, best = len(kept), (pace_us, kept)
        return best

    def afford_us(self, row: Running) -> float:
        """For each of its next tokens."""
        if row.tpot_us <= 0:
            return inf
        return self.aim * row.tpot_us + _slack_us(row) / self.over_tokens

    def _paces_us(self, running: Sequence[Running], affords_us: Sequence[float]) -> list[float]:
        """Of each target, what the least advanced of those who still may keep it can afford."""
        least_us: dict[float, float] = {}
        for row, afford_us in zip(running, affords_us, strict=True):
            target_us = row.tpot_us
            if self.hopeless * target_us <= afford_us < least_us.get(target_us, inf):
                least_us[target_us] = afford_us
        return sorted(least_us.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineFirst:
    """OOCO's mixed decoding (arXiv 2511.21862): online first, offline into what room is left.

    First come, first served in each class, until the predicted step is as long as the target.
    """

    fill: float = 0.98
    """Of the tightest target among those who wait for one."""
    ask_every: int = 3
    """The step is predicted anew with every so many requests."""
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        targets = [row.tpot_us for row in running if row.tpot_us > 0]
        budget_us = self.fill * min(targets) if targets else inf
        chosen = [i for i, row in enumerate(running) if row.must_step]
        taken = set(chosen)
        for is_online in (True, False):
            queue = [
                i for i, row in enumerate(running) if row.is_online is is_online and i not in taken
            ]
            chosen = self._filled(running, chosen, queue, step_us, budget_us)
        return sorted(chosen) if chosen else [0] if running else []

    def _filled(
        self,
        running: Sequence[Running],
        chosen: list[int],
        queue: Sequence[int],
        step_us: StepUs,
        budget_us: float,
    ) -> list[int]:
        context = sum(running[i].context_tokens for i in chosen)
        longest = max((running[i].context_tokens for i in chosen), default=0)
        for index in queue:
            tokens = running[index].context_tokens
            context, longest, count = context + tokens, max(longest, tokens), len(chosen) + 1
            is_due = count % self.ask_every == 0 or count == 1
            if is_due and step_us(count, context, longest) > budget_us:
                break
            chosen = [*chosen, index]
        return chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlinePaced:
    """Online requests step; offline ones fill the room that is left on average, as they came.

    * The limit lends what the least advanced online request has in hand at `fill` of its target
      over the next steps, and takes back what it lacks. So what whole requests leave of one step is
      made up for by another, and what steps are predicted wrongly by shows in the pace.
    * No step is longer than `most` of a target for the sake of offline work, whatever is in hand.
    * Who is late for good takes nothing back: its target is lost, and offline work would stop for
      the rest of it.
    * No online request waits, even where they alone take longer than the target: a prediction that
      is too long by a little would make the last of them wait for good.
    """

    fill: float = 0.98
    over_steps: int = 8
    """What is in hand is lent over so many: at least as many as a choice is good for."""
    most: float = 1.5
    forgiven: float = 32.0
    """Who is late by more tokens than these is late for good."""
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        must: list[int] = []
        online: list[int] = []
        offline: list[int] = []
        for index, row in enumerate(running):
            (must if row.must_step else online if row.is_online else offline).append(index)
        order = must + online + offline
        contexts = [running[i].context_tokens for i in order]
        sums, tops = list(accumulate(contexts)), list(accumulate(contexts, max))
        limit_us = self.limit_us(running)
        low, middle, high = len(must) + len(online), len(order), len(order)
        while low < high:  # everybody is asked first
            if step_us(middle, sums[middle - 1], tops[middle - 1]) <= limit_us:
                low = middle
            else:
                high = middle - 1
            middle = (low + high + 1) // 2
        return sorted(order[: max(1, low)])

    def limit_us(self, running: Sequence[Running]) -> float:
        """How long the next steps may be, by how those with a target have fared."""
        least_us = inf
        for row in running:
            if row.tpot_us > 0:
                aim_us = self.fill * row.tpot_us
                ahead_us = aim_us * row.produced - row.since_first_us
                if not row.is_online or ahead_us < -self.forgiven * row.tpot_us:
                    ahead_us = 0.0  # an offline one is late because it was left out
                own_us = min(aim_us + ahead_us / self.over_steps, self.most * row.tpot_us)
                least_us = min(least_us, own_us)
        return least_us


PACKING: dict[str, Packing] = {
    "all": All(),
    "kairos": Kairos(),
    "slack": Slack(),
    "most-kept": MostKept(),
    "online-first": OnlineFirst(),
    "online-exact": OnlineFirst(ask_every=1),
    "online-paced": OnlinePaced(),
}


def _is_turn(running: Sequence[Running], most_skipped: int) -> bool:
    """Whether all step, whatever they can afford."""
    return len(running) < 2 or any(row.skipped >= most_skipped for row in running)


class _Line:
    """Requests in the order in which they are taken into a step."""

    def __init__(self, order: Sequence[int], contexts: Sequence[int], step_us: StepUs) -> None:
        self._step_us = step_us
        self._sums = list(accumulate(contexts[i] for i in order))
        self._tops = list(accumulate((contexts[i] for i in order), max))

    def us(self, count: int) -> float:
        """The step of the first so many."""
        return self._step_us(count, self._sums[count - 1], self._tops[count - 1])

    def fit(self, limit_us: float, least: int) -> int:
        """How many of the first ones do, `least` at least, and not all."""
        low, high = least, len(self._sums)
        while low + 1 < high:
            middle = (low + high) // 2
            if self.us(middle) <= limit_us:
                low = middle
            else:
                high = middle
        return low


def _sharing(
    pace_us: float, affords_us: Sequence[float], contexts: Sequence[int], step_us: StepUs
) -> list[int]:
    """Who can be kept by steps that are so long, each in its share of them."""
    shares = sorted(
        (pace_us / afford_us * contexts[i], pace_us / afford_us, i)
        for i, afford_us in enumerate(affords_us)
        if afford_us >= pace_us
    )
    kept: list[int] = []
    tokens = count = 0.0
    longest = 0
    for share_tokens, share, index in shares:
        tokens, count = tokens + share_tokens, count + share
        longest = max(longest, contexts[index]) if share else 0
        if step_us(ceil(count), int(tokens), longest) > pace_us and share:
            break
        kept.append(index)
    return kept


def _slack_us(row: Running) -> float:
    """Until its next token is due, at the pace of one token in each target since the first."""
    if row.tpot_us <= 0:
        return inf
    return row.tpot_us * (row.produced + 1) - row.since_first_us


def _shortest_first(running: Sequence[Running]) -> list[int]:
    return sorted(range(len(running)), key=lambda i: (running[i].context_tokens, i))
