"""What a server says of itself when `slackwater check` asks it for the pages we rely on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import orjson

from backends.fetch import fetch
from backends.http import HttpError, Upstream
from gateway.probe import learnt
from policies.types import Role, Worker

_LOADS = b"/v1/loads?include=core,disagg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One server; what it did not say is empty or None."""

    configured: Worker
    worker: Worker
    """As it is: what the operator wrote, completed by what the server says."""
    error: str = ""
    """Why it cannot be used at all."""
    info: Mapping[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    bootstrap_error: str = ""
    """Why its bootstrap server cannot be reached from here."""

    @property
    def name(self) -> str:
        return self.configured.name


async def learn(worker: Worker, upstream: Upstream, timeout_s: float) -> Facts:
    try:
        info = await _page(upstream, b"/server_info", timeout_s)
        info = info or await _page(upstream, b"/get_server_info", timeout_s) or {}
        models = _models(await _page(upstream, b"/v1/models", timeout_s))
        known = learnt(worker, info, models[0] if models else "")
    except (HttpError, ValueError, TypeError) as error:
        return Facts(configured=worker, worker=worker, error=str(error))
    return Facts(
        configured=worker,
        worker=known,
        info=info,
        models=models,
        bootstrap_error=await _bootstrap_error(known, timeout_s),
    )


async def load_age_s(upstream: Upstream, timeout_s: float) -> float | None:
    """How old the load is that a server tells, by its own clock; None: it tells none."""
    try:
        answer = await _page(upstream, _LOADS, timeout_s)
        if not answer or not answer.get("loads"):
            return None
        told_s = datetime.fromisoformat(answer["timestamp"]).timestamp()
        return max(0.0, told_s - min(float(rank["timestamp"]) for rank in answer["loads"]))
    except (HttpError, ValueError, KeyError, TypeError):
        return None


async def _page(upstream: Upstream, path: bytes, timeout_s: float) -> Mapping[str, Any] | None:
    """None where there is no such page; a refusal or a failure is a ValueError."""
    answer = await fetch(upstream, b"GET", path, timeout_s=timeout_s)
    if answer.status in (401, 403):
        raise ValueError(f"it refuses the API key: {path.decode()} answers {answer.status}")
    if answer.status >= 500:
        raise ValueError(f"{path.decode()} answers {answer.status}")
    if answer.status != 200:
        return None
    try:
        parsed = orjson.loads(answer.body)
    except orjson.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise ValueError(f"{path.decode()} does not answer a JSON object: is this SGLang?")
    return parsed


def _models(answer: Mapping[str, Any] | None) -> tuple[str, ...]:
    data = answer.get("data") if answer else None
    cards = data if isinstance(data, list) else []
    return tuple(str(card["id"]) for card in cards if isinstance(card, dict) and "id" in card)


async def _bootstrap_error(worker: Worker, timeout_s: float) -> str:
    """Decode servers fetch the KV cache through this address; here it is only asked for a sign."""
    if worker.role is not Role.PREFILL:
        return ""
    address = f"{worker.bootstrap_host}:{worker.bootstrap_port}"
    upstream = Upstream(f"http://{address}", connect_timeout_s=timeout_s)
    try:
        answer = await fetch(upstream, b"GET", b"/health", timeout_s=timeout_s)
    except HttpError as error:
        return f"{address}: {error}"
    finally:
        upstream.close()
    return "" if answer.status == 200 else f"{address} answers {answer.status}"
