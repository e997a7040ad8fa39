"""Which of the running requests take the next decode step; the others keep their KV and wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
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

    * Everybody steps, unless that takes longer than the limit: then as many as fit do, first those
      who would be late before they are asked again, then the shortest.
    * The limit is `aim` of the target, or what the least advanced request that is on time has in
      hand at that pace, where this is more. Who is late for good sets none: it would stop all.
    * Tokens per second are not fewer than in a step of all, but for what may be `spent` on targets:
      a busy server would fall behind. Where those who fit are too few for that, all step, or as few
      more as it takes.
    * Nobody waits for more than `most_skipped` steps in a row; when a turn comes, all step, because
      a step that one long context makes slow costs the others least when they are in it.
    """

    aim: float = 0.7
    most_skipped: int = 15
    forgiven: float = 0.0
    """Who is late by more tokens than these is late for good; who by fewer, may yet catch up."""
    haste: float = 0.7
    """What `aim` is for those who have to catch up."""
    grows: bool = False
    """Where too few fit: by as few as it takes, not to all."""
    spent: float = 0.0
    """Of the tokens per second of a step of all. A step has a part that does not depend on who is
    in it, so that without this hardly any step of fewer is worth its time."""
    due_steps: int = 0
    """A choice may be good for so many steps of all: who is late by then is due now."""
    by_longest = False

    def choose(self, running: Sequence[Running], step_us: StepUs) -> list[int]:
        everybody = list(range(len(running)))
        contexts = [row.context_tokens for row in running]
        limit_us = self.limit_us(running)
        if len(running) < 2 or any(row.skipped >= self.most_skipped for row in running):
            return everybody
        all_us = step_us(len(running), sum(contexts), max(contexts))
        if all_us <= limit_us:
            return everybody
        everybody.sort(key=contexts.__getitem__)  # stable: in a tie, who joined first
        if self.due_steps:
            soon_us = self.due_steps * all_us
            everybody.sort(key=lambda i: not self._is_due(running[i], soon_us))
        must = [i for i in everybody if running[i].must_step]
        everybody = must + [i for i in everybody if not running[i].must_step]
        least = max(1, len(must))
        sums = list(accumulate(contexts[i] for i in everybody))
        tops = list(accumulate((contexts[i] for i in everybody), max))
        low, high = least, len(running)
        while low + 1 < high:
            middle = (low + high) // 2
            if step_us(middle, sums[middle - 1], tops[middle - 1]) <= limit_us:
                low = middle
            else:
                high = middle
        least_per_us = (1 - self.spent) * len(running) / all_us
        while low < len(running) and low < least_per_us * step_us(
            low, sums[low - 1], tops[low - 1]
        ):
            low = low + 1 if self.grows else len(running)
        return sorted(everybody[:low])

    def limit_us(self, running: Sequence[Running]) -> float:
        """How long a step may take for the sake of those who can be on time."""
        least_us, aim = inf, self.aim
        for row in running:
            tpot_us, since_us = row.tpot_us, row.since_first_us
            due_us = tpot_us * (row.produced + 1)
            if tpot_us > 0 and since_us <= due_us + self.forgiven * tpot_us:
                pace = aim if since_us <= due_us else self.haste
                own_us = max(aim * due_us - since_us, pace * tpot_us)
                if own_us < least_us:
                    least_us = own_us
        return least_us

    def _is_due(self, row: Running, soon_us: float) -> bool:
        left_us = _slack_us(row)
        return -self.forgiven * row.tpot_us <= left_us < soon_us


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
    "slack-due": Slack(aim=0.8, forgiven=32.0, due_steps=5, grows=True, spent=0.03),
    "online-first": OnlineFirst(),
    "online-exact": OnlineFirst(ask_every=1),
    "online-paced": OnlinePaced(),
}


def _slack_us(row: Running) -> float:
    """Until its next token is due, at the pace of one token in each target since the first."""
    if row.tpot_us <= 0:
        return inf
    return row.tpot_us * (row.produced + 1) - row.since_first_us


def _shortest_first(running: Sequence[Running]) -> list[int]:
    return sorted(range(len(running)), key=lambda i: (running[i].context_tokens, i))
