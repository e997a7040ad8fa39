"""What the latency budget of a peer predicts with, and which budgets are tried for it."""

from __future__ import annotations

from itertools import product

import numpy as np

from backends.steptimes import StepTimes
from gateway.simulation.budget import BudgetEntry

BUDGETS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1)
"""Shares of the target for a token; the search over them takes the place of that over loads."""
SEQUENCES = (1, 8, 16, 32, 64, 128, 256)
CONTEXTS = (256, 1024, 2048, 4096)
PROMPTS = (512, 1024, 2048, 4096)


def fitted(times: StepTimes, *, stalls: bool) -> BudgetEntry:
    """By least squares on the servers' own step times, as their profiler does.

    The relative error counts, so that small steps are met as well as large ones. `stalls`: whether
    decode steps wait for prompts.
    """
    steps = [(n, n * context) for n, context in product(SEQUENCES, CONTEXTS)]
    taken = np.array([times.decode_s(n, context) for n, context in steps])
    rows = np.array([(1.0, n, context) for n, context in steps]) / taken[:, None]
    solved = np.linalg.lstsq(rows, np.ones(len(steps)), rcond=None)[0]
    base_s, sequence_s, context_token_s = (max(0.0, float(it)) for it in solved)
    prompt_token_s = float(np.mean([times.prefill_s([(it, 0)]) / it for it in PROMPTS]))
    return BudgetEntry(
        step_ms=base_s * 1e3,
        sequence_us=sequence_s * 1e6,
        context_token_us=context_token_s * 1e6,
        prompt_token_us=prompt_token_s * 1e6 if stalls else 0.0,
    )
