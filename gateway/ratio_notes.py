"""What an operator may not expect of `[ratio]`: said by `slackwater check`, refused nowhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gateway.actuation import ELASTIC, Actuation
from gateway.config import RatioSettings
from gateway.planning import Mode
from gateway.suitability import Finding, Level
from policies.types import Role, Worker


def ratio_notes(ratio: RatioSettings, workers: Sequence[Worker]) -> list[Finding]:
    found = [*_without_effect(ratio)]
    if ratio.policy != "static":
        found += [*_in_its_time(ratio)]
        if ratio.mode is Mode.ACT and ratio.actuator not in ELASTIC:
            found += [*_in_its_numbers(workers)]
    return [Finding(level=Level.NOTE, subject=key, text=text) for key, text in found]


def _without_effect(ratio: RatioSettings) -> Iterator[tuple[str, str]]:
    if ratio.policy == "static" and ratio.mode is Mode.ACT:
        yield "ratio.mode", "nothing is switched while ratio.policy is static"
    if ratio.budget_gpus and ratio.actuator not in ELASTIC:
        starts = " and ".join(sorted(ELASTIC))
        yield (
            "ratio.budget_gpus",
            f"it does nothing with ratio.actuator {ratio.actuator.value}: only {starts} start "
            "servers and end them",
        )


def _in_its_time(ratio: RatioSettings) -> Iterator[tuple[str, str]]:
    most = {
        Actuation.WEBHOOK: ("ratio.webhook.within_s", ratio.webhook.within_s),
        Actuation.KUBERNETES: ("ratio.kubernetes.start_s", ratio.kubernetes.start_s),
        Actuation.RAY: ("ratio.ray.start_s", ratio.ray.start_s),
    }
    if ratio.actuator not in most:
        return
    key, most_s = most[ratio.actuator]
    if ratio.switch_s < most_s:
        yield (
            "ratio.switch_s",
            f"{ratio.switch_s:g} s are less than {key} ({most_s:g} s): a change that takes longer "
            "is told of as one that hangs, and may still be done",
        )


def _in_its_numbers(workers: Sequence[Worker]) -> Iterator[tuple[str, str]]:
    """The last server of a role is never taken."""
    for role in (Role.PREFILL, Role.DECODE):
        names = [worker.name for worker in workers if worker.role is role]
        if len(names) == 1:
            yield (
                names[0],
                f"it is the only {role.value} server: it is not switched while there is no other",
            )
