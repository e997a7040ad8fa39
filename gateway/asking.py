"""Whose request it is, how urgent it is, and what targets it has: headers, tier and key."""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config import Classes, Key
from gateway.dialects import Ask
from gateway.errors import ApiError, Code
from policies.types import Job, Kind, Resume

CLASS_HEADER = "x-slackwater-class"
TTFT_HEADER = "x-slo-ttft-ms"
TPOT_HEADER = "x-slo-tpot-ms"

_TIERS = {
    "auto": None,
    "default": Kind.ONLINE,
    "priority": Kind.ONLINE,
    "flex": Kind.OFFLINE,
    "scale": Kind.ONLINE,
}


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    kind: Kind | None
    """The most urgent class it may use; none: any."""
    key: Key | None = None


ANYONE = Caller("", None)


def secret_of(headers: Mapping[str, str]) -> bytes:
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = headers.get("x-api-key", "")
    return given.strip().encode(errors="surrogateescape")


class Keyring:
    """Which key belongs to whom. No keys at all: everybody may call."""

    def __init__(self, keys: tuple[Key, ...]) -> None:
        self._callers = {key.key.encode(): Caller(key.tenant, key.kind, key) for key in keys}

    @property
    def asks(self) -> bool:
        return bool(self._callers)

    def caller(self, headers: Mapping[str, str]) -> Caller:
        if not self._callers:
            return ANYONE
        secret = secret_of(headers)
        for key, caller in self._callers.items():
            if hmac.compare_digest(key, secret):
                return caller
        raise ApiError(Code.UNAUTHORIZED, "a valid API key is needed: Authorization: Bearer KEY")


def kind_of(headers: Mapping[str, str], ask: Ask, caller: Caller, default: Kind) -> Kind:
    """The header decides, then the tier, then the key; a key for offline work stays offline."""
    if (named := headers.get(CLASS_HEADER)) is not None:
        if named not in (Kind.ONLINE, Kind.OFFLINE):
            known = ", ".join(Kind)
            raise ApiError(Code.UNKNOWN_CLASS, f"{CLASS_HEADER} must be one of {known}")
        kind = Kind(named)
    else:
        if ask.service_tier and ask.service_tier not in _TIERS:
            known = ", ".join(_TIERS)
            message = f"service_tier must be one of {known}"
            raise ApiError(Code.UNKNOWN_CLASS, message, param="service_tier")
        kind = _TIERS.get(ask.service_tier) or caller.kind or default
    return Kind.OFFLINE if caller.kind is Kind.OFFLINE else kind


def job_of(
    ask: Ask,
    *,
    job_id: str,
    kind: Kind,
    model: str,
    headers: Mapping[str, str],
    classes: Classes,
    now_us: int,
) -> Job:
    """The request as policies see it; a caller may ask for a tighter target, never a looser one."""
    if kind is Kind.OFFLINE:
        deadline_us = now_us + round(classes.offline.window_s * 1e6)
        give_up_us, tpot_us = deadline_us, 0
    else:
        online = classes.online
        ttft_ms = _target(headers, TTFT_HEADER, online.ttft_ms)
        tpot_us = round(_target(headers, TPOT_HEADER, online.tpot_ms) * 1000)
        deadline_us = now_us + round(ttft_ms * 1000)
        give_up_us = now_us + round(ttft_ms * online.patience * 1000)
    return Job(
        id=job_id,
        kind=kind,
        model=model,
        prompt_tokens=max(1, ask.prompt_tokens),
        max_tokens=ask.max_tokens,
        arrival_us=now_us,
        deadline_us=deadline_us,
        give_up_us=give_up_us,
        tpot_us=tpot_us,
        resume=Resume.UNTIL_SHOWN if ask.stream else Resume.RESTART,
    )


def _target(headers: Mapping[str, str], name: str, limit_ms: float) -> float:
    if (given := headers.get(name)) is None:
        return limit_ms
    try:
        value = float(given)
    except ValueError:
        value = -1.0
    if not 0 < value < 1e9:
        raise ApiError(Code.INVALID_REQUEST, f"{name} must be a positive number", param=name)
    return min(value, limit_ms)
