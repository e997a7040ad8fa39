"""Each step is told to whoever listens, and to nobody else."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import zmq
import zmq.asyncio

from backends.sglang_plugin.reports import FIELDS, TOPIC
from tests.plugin.ground import FLOOR_S, Trial

pytestmark = [pytest.mark.real_time, pytest.mark.timeout(60, func_only=True)]


async def test_every_step_is_told_with_who_was_in_it(trial: Trial) -> None:
    await trial.wave(trial.asks(4, tokens=30))  # what came before, a warm-up, is over with it
    state = await trial.state()
    context = zmq.asyncio.Context()
    steps: list[dict[str, Any]] = []
    # The first answer lasts for a second at least: the last prompt is computed by then.
    together = [replace(ask, tokens=200) for ask in trial.asks(4)]
    with context.socket(zmq.SUB) as socket:
        socket.connect(state["reports"])
        socket.subscribe(TOPIC)
        await trial.wave(trial.asks(4, tokens=30))  # a listener may miss what is told as it joins
        await trial.wave(together)
        while await socket.poll(300):
            _, _, body = await socket.recv_multipart()
            steps += [dict(zip(FIELDS, step, strict=True)) for step in json.loads(body)["steps"]]
    context.term()
    decodes = [step for step in steps if step["decode"]]
    assert len(decodes) > 20
    assert max((step["count"], step["offline"]) for step in decodes) == (4, 2), decodes
    assert all(step["context_tokens"] > 20 * step["count"] for step in decodes)
    times = sorted(step["took_us"] for step in decodes)
    assert times[len(times) // 2] >= FLOOR_S * 1e6
