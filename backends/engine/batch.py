"""The running batch, at a cost per step that does not grow with it: counts follow from the step."""

from __future__ import annotations

import heapq

from backends.engine.config import CLIP_NEW_TOKENS
from backends.engine.request import Resident, Stage


class DecodeBatch:
    """A request that joined at step j with g tokens has g + steps - j of them now."""

    def __init__(self, page: int) -> None:
        self._page = page
        self.steps = 0
        self.context_tokens = 0
        """Tokens of KV that the members hold together."""
        self.members: dict[int, Resident] = {}
        self.streaming: dict[int, Resident] = {}
        self._ends: list[tuple[int, int, Resident]] = []
        self._due_by_residue = [0] * page
        self._budget_ends = {True: 0, False: 0}
        self._counts = {True: 0, False: 0}

    def __len__(self) -> int:
        return len(self.members)

    def promised_tokens(self, ratio: float) -> int:
        """What the members may still generate: all of it where no EOS ends it, else a share."""
        fixed = self._budget_ends[True] - self._counts[True] * self.steps
        likely = self._budget_ends[False] - self._counts[False] * self.steps
        return max(0, fixed) + int(max(0, likely) * ratio)

    def join(self, resident: Resident) -> None:
        resident.stage = Stage.RUNNING
        resident.joined = self.steps
        resident.batch = self
        self.members[resident.serial] = resident
        if resident.request.stream:
            self.streaming[resident.serial] = resident
        self.context_tokens += resident.prefilled
        self._due_by_residue[self._residue(resident)] += 1
        self._budget_ends[resident.request.ignore_eos] += self._budget_end(resident)
        self._counts[resident.request.ignore_eos] += 1
        left = resident.limit - resident.generated_before
        heapq.heappush(self._ends, (self.steps + max(1, left), resident.serial, resident))

    def leave(self, resident: Resident) -> None:
        """Write the counts down and forget the request."""
        passed = self.steps - resident.joined
        del self.members[resident.serial]
        self.streaming.pop(resident.serial, None)
        self.context_tokens -= resident.prefilled + passed
        self._due_by_residue[self._residue(resident)] -= 1
        self._budget_ends[resident.request.ignore_eos] -= self._budget_end(resident)
        self._counts[resident.request.ignore_eos] -= 1
        resident.generated_before += passed
        resident.prefilled += passed
        resident.batch = None
        covered = -(-resident.prefilled // self._page) * self._page
        resident.held = covered - resident.shared

    def end_next_step(self, resident: Resident) -> None:
        heapq.heappush(self._ends, (self.steps + 1, resident.serial, resident))

    def tokens_due(self) -> int:
        """The pages, in tokens, that the next step takes."""
        return self._due_by_residue[-self.steps % self._page] * self._page

    @property
    def longest_tokens(self) -> int:
        """The most that one member holds."""
        ahead = (it.prefilled - it.joined for it in self.members.values())
        return self.steps + max(ahead, default=-self.steps)

    def context_of(self, resident: Resident) -> int:
        return resident.prefilled + self.steps - resident.joined

    @property
    def steps_to_first_end(self) -> int:
        """No member has all of its tokens, or was told to end, before."""
        return self._ends[0][0] - self.steps if self._ends else 1

    def pass_step(self) -> None:
        """One token for everybody, where nobody ends."""
        self.steps += 1
        self.context_tokens += len(self.members)

    def step(self) -> list[Resident]:
        """One token for everybody; answers those who have all of theirs."""
        self.pass_step()
        over = []
        while self._ends and self._ends[0][0] <= self.steps:
            _, serial, resident = heapq.heappop(self._ends)
            if self.members.get(serial) is resident and self._is_over(resident):
                over.append(resident)
                self.leave(resident)
        return over

    def _is_over(self, resident: Resident) -> bool:
        return resident.end_reason is not None or resident.generated >= resident.limit

    def _residue(self, resident: Resident) -> int:
        return (resident.prefilled - resident.joined) % self._page

    def _budget_end(self, resident: Resident) -> int:
        asked = resident.budget - resident.generated_before
        return resident.joined + min(max(asked, 0), CLIP_NEW_TOKENS)
