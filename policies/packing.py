"""Which of the running requests take the next decode step; the others keep their KV and wait."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, inf
from operator import mul
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
        count = len(running)
        if count < 2 or any(row.skipped >= self.most_skipped for row in running):
            return list(range(count))
        everybody, limit_us = Everybody(running, step_us), self.limit_us(running)
        if everybody.us <= limit_us:
            return list(range(count))
        line = everybody.line()
        fit = line.fit(limit_us, everybody.fewest)
        too_few = fit * everybody.us < count * line.us(fit)
        return list(range(count)) if too_few else sorted(line.order[:fit])

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
    """As many targets as can be kept, by steps as short as the least advanced request needs.

    * Everybody steps, unless shorter steps keep the targets of `worth` of all more. So it is stock
      where stock keeps all, and where nothing can keep more than stock does.
    * What a request can afford for each next token is `aim` of its target, longer or shorter by
      what it has in hand or lacks. A step is as long as the least advanced of those with one target
      can afford. What holds steps up shows in what requests lack, whatever was predicted.
    * A target is tried only where steps within it make tokens enough. What it keeps is judged by
      targets: who can afford more takes only its share of the steps, and the longest are given up
      first where there is no room for all shares. Who is late for good counts as whoever comes next
      with its target. (Judged by those alone who still are on time, it would never begin again:
      steps of all make everybody late, and the few who have just come are not worth it.)
    * Of those kept, first come those who would be late before the next choice, then the shortest of
      all.
    * Tokens per second are not fewer than in a step of all, but for what may be `spent`: a busy
      server would fall behind. Where those who fit are too few, as few more step as it takes.
    * Nobody waits for more than `most_skipped` steps in a row; whose turn has come steps.
    """

    aim: float = 0.85
    over_tokens: float = 32.0
    """What a request has in hand, or lacks, is made up for over so many."""
    hopeless: float = 0.5
    """Who can afford less than so much of its target sets no pace: it would stop all."""
    worth: float = 0.1
    spent: float = 0.04
    """A step has a part that does not depend on who is in it: without anything to spend hardly any
    step of fewer is worth its time. A point less than the 5 % that may be lost, because a step of
    fewer pays what holds each step up more often."""
    within: float = 0.98
    """Of a target, steps that are to keep it may take no more than so much."""
    due_steps: int = 5
    """A choice may be good for so many steps of all: who is late by then is due now."""
    most_skipped: int = 15
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        if len(running) < 2:
            return list(range(len(running)))
        everybody = Everybody(running, step_us, self.most_skipped)
        pace_us, kept = self.kept(everybody)
        if pace_us >= everybody.us:
            return list(range(len(running)))
        soon_us = self.due_steps * everybody.us
        targets_us, slacks_us = everybody.targets_us, everybody.slacks_us
        due = {
            i
            for i in kept
            if slacks_us[i] < soon_us
            and self.afford_us(targets_us[i], slacks_us[i]) >= self.hopeless * targets_us[i]
        }
        line = everybody.line(due)
        fit = line.fit(pace_us, everybody.fewest)
        return sorted(line.order[: line.enough(self._least_per_us(everybody), fit)])

    def kept(self, everybody: Everybody) -> tuple[float, list[int]]:
        """The length of a step by which the most targets are kept, and whose; that of a step of all
        where shorter ones are not worth it."""
        best: tuple[float, list[int]] = everybody.us, []
        paces_us, by_stock = self._paces_us(everybody)
        fewest = by_stock + max(1, ceil(self.worth * len(everybody.running)))
        if not paces_us or fewest > len(everybody.running):
            return best
        line = everybody.line()
        least_us = line.us(line.enough(self._least_per_us(everybody), everybody.fewest))
        ascending_us = sorted(everybody.targets_us)
        for target_us, pace_us in sorted(paces_us.items(), reverse=True):
            most_us = min(self.within * target_us, everybody.us)
            if least_us > most_us:
                break
            if len(ascending_us) - bisect_left(ascending_us, most_us) < fewest:
                continue  # hardly anybody has a target as long as that
            kept = _sharing(most_us, everybody, line.order, fewest)
            if len(kept) >= fewest:
                fewest, best = len(kept) + 1, (pace_us, kept)
        return best

    def afford_us(self, target_us: float, slack_us: float) -> float:
        """What a request can, for each of its next tokens."""
        return self.aim * target_us + slack_us / self.over_tokens

    def _paces_us(self, everybody: Everybody) -> tuple[dict[float, float], int]:
        """By target, what the least advanced of those who may keep it can afford, where a step of
        all takes longer; and how many targets steps of all keep."""
        paces_us: dict[float, float] = {}
        by_stock = 0
        for target_us, slack_us in zip(everybody.targets_us, everybody.slacks_us, strict=True):
            afford_us = self.afford_us(target_us, slack_us)
            if afford_us < self.hopeless * target_us:
                afford_us = self.aim * target_us  # whoever comes next
            elif afford_us < paces_us.get(target_us, everybody.us):
                paces_us[target_us] = afford_us
            by_stock += afford_us >= everybody.us
        return paces_us, by_stock

    def _least_per_us(self, everybody: Everybody) -> float:
        """Tokens that a step has to make, for what it takes."""
        return (1 - self.spent) * len(everybody.running) / everybody.us


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


class Everybody:
    """A step of all, and the lines in which fewer are taken into one."""

    __slots__ = (
        *("_by_context", "_firsts", "contexts", "fewest", "running"),
        *("slacks_us", "step_us", "targets_us", "us"),
    )

    def __init__(
        self, running: Sequence[Running], step_us: StepUs, most_skipped: float = inf
    ) -> None:
        self.running = running
        self.step_us = step_us
        self.contexts = [row.context_tokens for row in running]
        self.us = step_us(len(running), sum(self.contexts), max(self.contexts))
        self.targets_us = [row.tpot_us if row.tpot_us > 0 else inf for row in running]
        """Any step is short enough for whom nobody waits."""
        self.slacks_us = [_slack_us(row) for row in running]
        self._by_context = sorted(range(len(running)), key=self.contexts.__getitem__)
        self._firsts = {
            i for i, row in enumerate(running) if row.must_step or row.skipped >= most_skipped
        }
        self.fewest = max(1, len(self._firsts))
        """Who cannot be left out, or whose turn has come, steps; and somebody does."""

    def line(self, due: Set[int] = frozenset()) -> _Line:
        """Those who have to step, those who are due, and then the shortest."""
        order = self._by_context
        for before in (due, self._firsts):
            if before:
                order = [i for i in order if i in before] + [i for i in order if i not in before]
        return _Line(order, self.contexts, self.step_us)


class _Line:
    """Requests in the order in which they are taken into a step."""

    __slots__ = ("_step_us", "_sums", "_tops", "order")

    def __init__(self, order: Sequence[int], contexts: Sequence[int], step_us: StepUs) -> None:
        self.order = order
        self._step_us = step_us
        in_order = [contexts[i] for i in order]
        self._sums = list(accumulate(in_order))
        self._tops = list(accumulate(in_order, max))

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

    def enough(self, per_us: float, least: int) -> int:
        """How many have to step for so many tokens, `least` at least; all of them are enough."""
        if least >= per_us * self.us(least):
            return least
        low, high = least, len(self._sums)
        while low + 1 < high:
            middle = (low + high) // 2
            if middle < per_us * self.us(middle):
                low = middle
            else:
                high = middle
        return high


def _sharing(pace_us: float, everybody: Everybody, order: Sequence[int], fewest: int) -> list[int]:
    """Whose targets steps that are so long can keep, each in its share of them, the longest left
    out where there is no room; nobody, where they are fewer than `fewest`."""
    targets_us, contexts = everybody.targets_us, everybody.contexts
    kept = [i for i in order if targets_us[i] >= pace_us]
    shares = [pace_us / targets_us[i] for i in kept]
    count = sum(shares)
    tokens = sum(map(mul, shares, [contexts[i] for i in kept]))
    while len(kept) >= fewest:
        if everybody.step_us(ceil(count), int(tokens), contexts[kept[-1]]) <= pace_us:
            return kept
        share, last = shares.pop(), kept.pop()
        count, tokens = count - share, tokens - share * contexts[last]
    return []


def _slack_us(row: Running) -> float:
    """Until its next token is due, at the pace of one token in each target since the first."""
    if row.tpot_us <= 0:
        return inf
    return row.tpot_us * (row.produced + 1) - row.since_first_us


def _shortest_first(running: Sequence[Running]) -> list[int]:
    return sorted(range(len(running)), key=lambda i: (running[i].context_tokens, i))
