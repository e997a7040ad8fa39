"""What whole engines measured, beside what the shipped constants predict for them."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median

from policies.calibration import CalibrationError, Sample, Setup, held_out
from policies.constants import lookup
from policies.devices import Precision, device_named
from policies.models import model_named
from policies.roofline import CostModel, Parallel, Phase, build, decode_batch, prefill_batch
from policies.shipped import SHIPPED

Finding = dict[str, object]
Pair = tuple[float, float]
"""Measured and predicted, in milliseconds."""


def _cost(system: str, name: str, tp: int, precision: Precision = Precision.BF16) -> CostModel:
    device, model = device_named(system), model_named(name, precision)
    constants = lookup(SHIPPED, device.name, model.family, tp)
    return build(model, device, constants, Parallel(tp=tp))


def splitwise(path: Path) -> list[Finding]:
    """Llama-2-70B on vLLM of 2023, without CUDA graphs: a different engine, nothing fitted to it.

    Batches of 64 on two devices were split by that engine and are left out.
    """
    measured: dict[tuple[str, int, int, int, int], list[Mapping[str, str]]] = {}
    for row in _rows(path):
        device = {"a100-80gb": "a100", "h100-80gb": "h100"}.get(row["hardware"])
        tp, batch = int(row["tensor_parallel"]), int(row["batch_size"])
        if row["model"] != "llama2-70b" or device is None or (tp == 2 and batch == 64):
            continue
        key = (device, tp, batch, int(row["prompt_size"]), int(row["token_size"]))
        measured.setdefault(key, []).append(row)
    pairs: dict[tuple[str, int, Phase], list[Pair]] = {}
    steps: dict[tuple[str, int], list[Sample]] = {}
    for (device, tp, batch, prompt, tokens), rows in sorted(measured.items()):
        cost = _cost(device, "Llama-2-70b", tp)
        work = {
            "prompt_time": prefill_batch([(prompt, 0)] * batch),
            "token_time": decode_batch(batch, batch * (prompt + tokens // 2)),
        }
        for column, step in work.items():
            seen_ms = mean(float(row[column]) for row in rows)
            pair = (seen_ms, cost.cost(step).seconds * 1e3)
            pairs.setdefault((device, tp, step.phase), []).append(pair)
            steps.setdefault((device, tp), []).append(Sample(batch=step, seconds=seen_ms * 1e-3))
    calibrated = {key: _calibrated(*key, samples) for key, samples in steps.items()}
    return [
        {
            "device": device,
            "tp": tp,
            "phase": phase.value,
            **_bias(found),
            "mape_calibrated_pct": calibrated[device, tp].get(phase),
        }
        for (device, tp, phase), found in sorted(pairs.items())
    ]


def _calibrated(device: str, tp: int, samples: Sequence[Sample]) -> dict[Phase, float]:
    """Errors of the steps of one half under constants fitted to the other half."""
    setup = Setup(
        model=model_named("Llama-2-70b"),
        device=device_named(device),
        parallel=Parallel(tp=tp),
    )
    prior = lookup(SHIPPED, device, setup.model.family, tp)
    try:
        errors = held_out(setup, samples, prior)
    except CalibrationError:
        return {}  # too few points for halves
    return {phase: round(100 * found.mean, 1) for phase, found in errors.items()}


def end_to_end(path: Path) -> list[Finding]:
    """Closed loops on servers that prefill and decode in turn; nothing is fitted to them.

    Each of `b` sequences waits for the others' prefills, one per answer:
    TPOT = step(b) + (b - 1)·prefill/osl. TTFT holds queueing, so the smallest tenth of what it
    exceeds the prefill by stands for the fixed overhead.
    """
    groups: dict[tuple[str, str, str, str], list[tuple[Pair, float]]] = {}
    for row in _rows(path):
        if row["precision"] == "fp4":
            continue
        precision = Precision.FP8 if row["precision"] == "fp8" else Precision.BF16
        model = row["model_path"].rsplit("/", 1)[-1].removesuffix("-FP8")
        cost = _cost(row["system"], model, int(float(row["tp_size"])), precision)
        count, isl, osl = int(float(row["batch_size"])), int(row["isl"]), int(row["osl"])
        prefill = cost.prefill_one(isl).seconds * 1e3
        step = cost.decode(count, count * (isl + osl // 2)).seconds * 1e3
        pair = (float(row["silicon_tpot_ms"]), step + (count - 1) * prefill / osl)
        key = (row["backend"], row["system"], model, precision.value)
        groups.setdefault(key, []).append((pair, float(row["silicon_ttft_ms"]) - prefill))
    return [
        {
            "backend": backend,
            "device": device_named(system).name,
            "model": model,
            "precision": precision,
            **_bias([pair for pair, _ in found]),
            "ttft_overhead_ms": round(sorted(rest for _, rest in found)[len(found) // 10], 1),
        }
        for (backend, system, model, precision), found in sorted(groups.items())
    ]


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def _bias(pairs: Sequence[Pair]) -> Finding:
    """How far off as shipped, and after what one number could mend: a factor or a fixed time."""
    ratio = median(measured / predicted for measured, predicted in pairs)
    excess = median(measured - predicted for measured, predicted in pairs)

    def missed(factor: float, fixed: float) -> float:
        return round(100 * mean(abs((factor * p + fixed) / m - 1) for m, p in pairs), 1)

    return {
        "points": len(pairs),
        "measured_over_predicted": round(ratio, 2),
        "fixed_excess_ms": round(excess, 1),
        "mape_pct": missed(1.0, 0.0),
        "mape_with_factor_pct": missed(ratio, 0.0),
        "mape_with_fixed_pct": missed(1.0, excess),
    }
