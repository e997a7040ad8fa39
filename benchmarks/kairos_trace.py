"""The long-tail trace of the Kairos benchmark, chosen so that the paper's *baseline* comes out.

The paper's 1000 requests are not published. What is known of them: a long tail to 128 K tokens, and
what first come, first served and continuous batching made of them (its tables for DistServe). Here
lengths are the 1000 quantiles of a log-normal law, shuffled; arrivals are Poisson. Four numbers are
unknown: mean and sigma of the prompts, the mean answer, and what a step takes longer once a batch
meets all experts. They are searched on a grid for the least error against the baseline alone, by
recursions for a first-come queue and for a batch that everybody steps in. No policy of ours is
looked at. `python -m benchmarks.kairos_trace` repeats the search.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean, median

REQUESTS = 1000
LONGEST = 126_000
LONGEST_ANSWER = 4_000
ANSWER_SIGMA = 0.6
TTFT_S, TPOT_S = 8.0, 0.05
PREFILL_TOKEN_S, PREFILL_PAIR_S = 4.766e-5, 2.972e-10
"""T(start, n) = 4.766e-5 n + 1.486e-10 ((start + n)^2 - start^2); a pair is twice that."""
DECODE_S, DECODE_TOKEN_S = 9.05e-3, 0.2385e-6
EXPERTS, EXPERTS_PER_TOKEN = 256, 8
SEEDS = (1, 2, 3, 4, 5)

PAPER_TTFT = {2.8: 100.0, 3.0: 76.1, 3.4: 60.5, 5.0: 15.5}
PAPER_TPOT = {2.0: 73.7, 3.0: 62.5}
PAPER_E2E = {3.0: 55.8, 4.0: 29.0, 4.2: 22.8}
PAPER_TOKENS_PER_S = {2.0: 23.6, 5.0: 20.9}
RATES = sorted({*PAPER_TTFT, *PAPER_TPOT, *PAPER_E2E, *PAPER_TOKENS_PER_S})


@dataclass(frozen=True, slots=True, kw_only=True)
class Law:
    """What the trace and the machine are taken to be."""

    prompt_mean: float = 5_600.0
    prompt_sigma: float = 1.6
    answer_mean: float = 1_200.0
    experts_s: float = 0.014
    """Within 0.3 points of the least error that `search` finds (answers of 1,400): it lies in a
    valley, where answers of 700 to 1,400 tokens with 20 to 14 ms for the experts differ by one
    point. Reading 229 GB of weights with four H200 takes 12 ms.
    """


@dataclass(frozen=True, slots=True)
class Row:
    gap: float
    """Of arrivals at one request a second."""
    prompt: int
    answer: int


def rows_of(law: Law, seed: int) -> list[Row]:
    """The same lengths for every seed, in another order, at other times."""
    random = Random(f"kairos/{seed}")
    prompts = quantiles(law.prompt_mean, law.prompt_sigma, LONGEST)
    answers = quantiles(law.answer_mean, ANSWER_SIGMA, LONGEST_ANSWER)
    random.shuffle(prompts)
    random.shuffle(answers)
    gaps = [random.expovariate(1.0) for _ in prompts]
    stretch = len(gaps) / sum(gaps)
    return [Row(g * stretch, p, a) for g, p, a in zip(gaps, prompts, answers, strict=True)]


def quantiles(mean: float, sigma: float, most: int) -> list[int]:
    law = NormalDist(math.log(mean) - sigma**2 / 2, sigma)
    points = (math.exp(law.inv_cdf((i + 0.5) / REQUESTS)) for i in range(REQUESTS))
    return [max(1, min(most, round(point))) for point in points]


def write_trace(rows: Sequence[Row], path: Path) -> None:
    """At one request a second; a sweep's value is then the rate."""
    now_s = 0.0
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["timestamp", "input_tokens", "output_tokens"])
        for row in rows:
            now_s += row.gap
            writer.writerow([f"{now_s:.6f}", row.prompt, row.answer])


# The baseline by recursion.


@dataclass(frozen=True, slots=True)
class Baseline:
    ttft: float
    tpot: float
    e2e: float
    tokens_per_s: float


def first_tokens_s(rows: Sequence[Row], rate: float) -> tuple[list[float], list[float]]:
    """Arrivals and first tokens at one server, first come, first served."""
    arrivals = list(itertools.accumulate(row.gap / rate for row in rows))
    free_s, firsts = 0.0, []
    for at_s, row in zip(arrivals, rows, strict=True):
        work_s = PREFILL_TOKEN_S * row.prompt + PREFILL_PAIR_S / 2 * row.prompt**2
        free_s = max(free_s, at_s) + work_s
        firsts.append(free_s)
    return arrivals, firsts


def tpots_s(rows: Sequence[Row], firsts: Sequence[float], experts_s: float) -> list[float]:
    """Everybody steps, and the longest context says how long; rows in order of first tokens."""
    tpots, active, now_s, index = [0.0] * len(rows), list[list[float]](), 0.0, 0
    while index < len(rows) or active:
        while index < len(rows) and firsts[index] <= now_s:
            row = rows[index]
            if row.answer > 1:
                active.append([row.prompt + 1, row.answer - 1, now_s, index])
            index += 1
        if not active:
            now_s = firsts[index] if index < len(rows) else now_s
            continue
        step_s = (
            DECODE_S
            + experts_s * share_of_experts(len(active))
            + DECODE_TOKEN_S * max(it[0] for it in active)
        )
        steps = min(it[1] for it in active)
        if index < len(rows):
            steps = min(steps, max(1, math.ceil((firsts[index] - now_s) / step_s)))
        now_s += steps * step_s + DECODE_TOKEN_S * steps * (steps - 1) / 2
        for it in active:
            it[0], it[1] = it[0] + steps, it[1] - steps
            if it[1] <= 0:
                number = int(it[3])
                tpots[number] = (now_s - it[2]) / (rows[number].answer - 1)
        active = [it for it in active if it[1] > 0]
    return tpots


def share_of_experts(batch: int) -> float:
    """Beyond those that one sequence meets, where tokens choose evenly."""
    missed = 1 - EXPERTS_PER_TOKEN / EXPERTS
    return (missed - missed**batch) / missed


def baseline(law: Law, rate: float, seeds: Sequence[int] = SEEDS) -> Baseline:
    """The mean over the seeds."""
    each = [_baseline(law, rate, seed) for seed in seeds]
    return Baseline(
        ttft=fmean(it.ttft for it in each),
        tpot=fmean(it.tpot for it in each),
        e2e=fmean(it.e2e for it in each),
        tokens_per_s=fmean(it.tokens_per_s for it in each),
    )


def _baseline(law: Law, rate: float, seed: int) -> Baseline:
    rows = rows_of(law, seed)
    arrivals, firsts = first_tokens_s(rows, rate)
    tpots = tpots_s(rows, firsts, law.experts_s)
    on_time = [f - a <= TTFT_S for a, f in zip(arrivals, firsts, strict=True)]
    in_pace = [tpot <= TPOT_S for tpot in tpots]
    both = [a and b for a, b in zip(on_time, in_pace, strict=True)]
    return Baseline(
        ttft=100 * fmean(on_time),
        tpot=100 * fmean(in_pace),
        e2e=100 * fmean(both),
        tokens_per_s=1 / median(it for it in tpots if it),
    )


def ttft_errors(law: Law) -> Iterator[float]:
    """Points of attainment."""
    for rate, paper in PAPER_TTFT.items():
        kept = []
        for seed in SEEDS:
            pairs = zip(*first_tokens_s(rows_of(law, seed), rate), strict=True)
            kept.append(100 * fmean(first - at <= TTFT_S for at, first in pairs))
        yield fmean(kept) - paper


def decode_errors(law: Law) -> Iterator[float]:
    """Points of attainment, and percent of the median speed."""
    found = {rate: baseline(law, rate) for rate in RATES if rate not in (2.8, 3.4)}
    yield from (found[rate].tpot - paper for rate, paper in PAPER_TPOT.items())
    yield from (found[rate].e2e - paper for rate, paper in PAPER_E2E.items())
    for rate, paper in PAPER_TOKENS_PER_S.items():
        yield 100 * (found[rate].tokens_per_s / paper - 1)


def rms(errors: Iterator[float]) -> float:
    return math.sqrt(fmean(error**2 for error in errors))


def search() -> list[tuple[float, Law]]:
    """Prompts by the TTFT column first, then answers and steps by the rest; the best first."""
    laws = [
        Law(prompt_mean=mean, prompt_sigma=sigma)
        for mean in range(4800, 6601, 200)
        for sigma in (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
    ]
    laws.sort(key=lambda law: rms(ttft_errors(law)))
    for law in laws[:5]:
        print(f"TTFT rms {rms(ttft_errors(law)):.1f} points: {law}")
    best = laws[0]
    found = []
    for mean, ms in itertools.product((700, 850, 1000, 1200, 1400), (12, 14, 16, 18, 20)):
        law = Law(
            prompt_mean=best.prompt_mean,
            prompt_sigma=best.prompt_sigma,
            answer_mean=mean,
            experts_s=ms / 1e3,
        )
        found.append((rms(decode_errors(law)), law))
    return sorted(found, key=lambda pair: pair[0])


def main() -> None:
    found = search()
    for error, law in found[:5]:
        print(f"decode rms {error:.1f}: {law}")
    for rate in RATES:
        print(f"{rate} QPS: {baseline(found[0][1], rate)}")


if __name__ == "__main__":
    main()
