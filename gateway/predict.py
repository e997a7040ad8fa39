"""`slackwater predict`: what a model on a device can do, before anybody buys or starts it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table as Grid

from backends.constants_file import load_constants
from gateway import terminal
from policies.constants import Constants, ConstantsError, Key, lookup
from policies.devices import Device, Precision, UnknownDevice, device_named
from policies.models import Model, ModelError, model_named, parse_config
from policies.roofline import Bottleneck, CostModel, DoesNotFit, Parallel, StepCost, build
from policies.shipped import SHIPPED
from policies.sizing import capacity_tokens, greatest, largest_batch, saturation_batch, transfer

PROMPTS = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


TTFT_MS, TPOT_MS = 2000.0, 100.0
"""As `classes.online` of the gateway has them."""
TITLES = {
    "isl": "prompt tokens",
    "osl": "answer tokens",
    "cached": "prompt tokens found in the cache",
    "ttft_ms": "target for the first token, ms",
    "tpot_ms": "target for each further token, ms",
    "overhead_ms": "first token besides its prefill, ms",
    "prefill_ms": "prefill of a prompt, ms",
    "prefill_requests_per_s": "requests/s that one prefill server bears",
    "decode_batch": "sequences of a decode step",
    "decode_limited_by": "they are limited by",
    "decode_step_ms": "decode step, ms",
    "decode_requests_per_s": "requests/s that one decode server bears",
    "prefill_per_decode": "prefill servers per decode server",
    "transfer_ms": "transfer of a prompt's KV, ms",
}
"""How the table calls what the JSON has under these names."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = _Defaults
    parser.add_argument("--model", required=True, help="a known name, a config.json or its folder")
    parser.add_argument("--gpu", required=True, help="device, such as h100")
    parser.add_argument("--tp", type=int, default=1, help="devices that one model is spread over")
    parser.add_argument("--dp", type=int, default=1, help="replicas behind one door")
    parser.add_argument("--dp-attention", action="store_true", help="dp inside of tp, as SGLang's")
    parser.add_argument(
        "--weights",
        type=Precision,
        choices=list(Precision),
        help="what the model's weights are kept in; without it: the model's own",
    )
    parser.add_argument("--kv-cache", type=Precision, choices=(Precision.BF16, Precision.FP8),
                        default=Precision.BF16, help="what the cache is kept in")  # fmt: skip
    parser.add_argument("--constants", type=Path, help="TOML file written by slackwater calibrate")
    parser.add_argument("--isl", type=int, default=1024, help="prompt tokens of a request")
    parser.add_argument("--osl", type=int, default=256, help="answer tokens of a request")
    parser.add_argument("--cached", type=int, default=0, help="prompt tokens found in the cache")
    parser.add_argument("--ttft-ms", type=float, default=TTFT_MS, help="target for the first token")
    parser.add_argument(
        "--tpot-ms", type=float, default=TPOT_MS, help="target for each further token"
    )
    parser.add_argument(
        "--overhead-ms",
        type=float,
        default=50.0,
        help="fixed time of a first token besides the prefill",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument("--plot", action="store_true", help="bars of the terms beside the tables")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Tells each default that there is: not the None of an option that may be left away."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def read_model(name: str, weights: Precision | None = None) -> Model:
    """A config.json, a folder that holds one, or a model known by name."""
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.suffix != ".json":
        return model_named(name, weights)
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object")
    return parse_config(config, name, weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One predicted step: of a prompt with so many tokens, or of so many sequences."""

    size: int
    milliseconds: float
    bottleneck: Bottleneck
    terms_ms: Mapping[str, float]
    resources_ms: Mapping[Bottleneck, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """A length mix and its targets."""

    isl: int
    osl: int
    cached: int
    ttft_ms: float
    tpot_ms: float
    overhead_ms: float

    def __post_init__(self) -> None:
        if self.isl < 1 or self.osl < 1 or not 0 <= self.cached < self.isl:
            raise ValueError(
                f"isl {self.isl}, osl {self.osl}, cached {self.cached} make no request"
            )
        if self.ttft_ms <= 0 or self.tpot_ms <= 0 or self.overhead_ms < 0:
            raise ValueError("targets must be positive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one prefill server and one decode server of this kind bear."""

    prefill_ms: float
    prefill_requests_per_s: float
    """So that the mean wait plus the prefill keeps the TTFT target (M/D/1)."""
    decode_batch: int
    decode_limited_by: Bottleneck
    decode_step_ms: float
    decode_requests_per_s: float
    prefill_per_decode: float
    """Prefill servers that feed one decode server."""
    transfer_ms: float


def answer(cost: CostModel, demand: Demand, kv_tokens: int) -> Answer:
    """Requests per second; replicas behind one door add up."""
    prefill_s = cost.prefill_one(demand.isl - demand.cached, demand.cached).seconds
    context = demand.isl + demand.osl // 2
    limit = largest_batch(cost, context, demand.tpot_ms * 1e-3, kv_tokens)
    step_s = cost.decode(limit.count, limit.count * context).seconds if limit.count else 0.0
    wait_s = (demand.ttft_ms - demand.overhead_ms) * 1e-3 - prefill_s
    prefill_rate = _queue_rate(prefill_s, wait_s) * cost.replicas
    decode_rate = limit.count / (step_s * demand.osl) * cost.replicas if limit.count else 0.0
    return Answer(
        prefill_ms=prefill_s * 1e3,
        prefill_requests_per_s=prefill_rate,
        decode_batch=limit.count,
        decode_limited_by=limit.limited_by,
        decode_step_ms=step_s * 1e3,
        decode_requests_per_s=decode_rate,
        prefill_per_decode=decode_rate / prefill_rate if prefill_rate else 0.0,
        transfer_ms=transfer(cost, demand.isl).seconds * 1e3,
    )


def _queue_rate(service_s: float, wait_s: float) -> float:
    """M/D/1: a mean wait of u·s / (2·(1 - u)), solved for the rate; 0 if an idle server is late."""
    return 2 * wait_s / (service_s * (service_s + 2 * wait_s)) if wait_s > 0 else 0.0


def prefill_lines(cost: CostModel, kv_tokens: int) -> list[Line]:
    return [_line(n, cost.prefill_one(n)) for n in PROMPTS if n <= kv_tokens]


def decode_lines(cost: CostModel, context: int, kv_tokens: int) -> list[Line]:
    counts = [count for count in BATCHES if count * context <= kv_tokens]
    return [_line(count, cost.decode(count, count * context)) for count in counts]


def _line(size: int, step: StepCost) -> Line:
    return Line(
        size=size,
        milliseconds=step.seconds * 1e3,
        bottleneck=step.bottleneck,
        terms_ms={f.name.removesuffix("_s"): getattr(step, f.name) * 1e3 for f in fields(step)},
        resources_ms={name: value * 1e3 for name, value in step.by_resource().items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Everything that is shown; the JSON has these names."""

    model: str
    device: str
    tp: int
    dp: int
    constants: str
    """Where the constants come from."""
    kv_bytes_per_token: float
    capacity_tokens: int
    saturation_batch: int
    longest_prompt_tokens: int
    """That an idle server answers within the TTFT target."""
    prefill: list[Line]
    decode_context_tokens: int
    decode: list[Line]
    demand: Demand
    answer: Answer


def run_predict(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """0 with a prediction, 2 with the reason why there is none."""
    out = console or terminal.console()
    try:
        model = read_model(arguments.model, arguments.weights)
        device = device_named(arguments.gpu)
        spread = Parallel(tp=arguments.tp, dp=arguments.dp, dp_attention=arguments.dp_attention)
        constants = _constants(arguments.constants, device, model, spread)
        cost = build(model, device, constants, spread, arguments.kv_cache)
        report = _report(model, device, spread, cost, _demand(arguments))
    except (
        ConstantsError, DoesNotFit, ModelError, OSError, UnknownDevice, ValueError
    ) as error:  # fmt: skip
        complaints = console or Console(stderr=True, soft_wrap=True)
        complaints.print(f"predict: {error}", style="red", markup=False, highlight=False)
        return 2
    if arguments.json:
        out.file.write(json.dumps(asdict(report)) + "\n")
    else:
        _show(out, report, plot=arguments.plot)
    return 0


def _constants(path: Path | None, device: Device, model: Model, spread: Parallel) -> Constants:
    table: Mapping[Key, Constants] = {**SHIPPED, **load_constants(path)} if path else SHIPPED
    return lookup(table, device.name, model.family, spread.tp)


def _demand(arguments: argparse.Namespace) -> Demand:
    return Demand(
        isl=arguments.isl,
        osl=arguments.osl,
        cached=arguments.cached,
        ttft_ms=arguments.ttft_ms,
        tpot_ms=arguments.tpot_ms,
        overhead_ms=arguments.overhead_ms,
    )


def _report(
    model: Model, device: Device, spread: Parallel, cost: CostModel, demand: Demand
) -> Report:
    kv_tokens = capacity_tokens(cost)
    context = demand.isl + demand.osl // 2
    return Report(
        model=model.name,
        device=device.name,
        tp=spread.tp,
        dp=spread.dp,
        constants=cost.source,
        kv_bytes_per_token=cost.kv_bytes_per_token,
        capacity_tokens=kv_tokens,
        saturation_batch=saturation_batch(cost),
        longest_prompt_tokens=greatest(
            lambda n: cost.prefill_one(n).seconds * 1e3 + demand.overhead_ms <= demand.ttft_ms,
            1,
            kv_tokens,
        ),
        prefill=prefill_lines(cost, kv_tokens),
        decode_context_tokens=context,
        decode=decode_lines(cost, context, kv_tokens),
        demand=demand,
        answer=answer(cost, demand, kv_tokens),
    )


def _show(out: Console, report: Report, *, plot: bool) -> None:
    lines = (
        f"{report.model} on {report.device}, tp {report.tp}, dp {report.dp}",
        f"constants: {report.constants}",
        f"cache: {report.kv_bytes_per_token:,.0f} bytes per token, "
        f"{report.capacity_tokens:,} tokens per replica",
        f"linear layers are bound by arithmetic from {report.saturation_batch:,} sequences on",
        f"longest prompt within the TTFT target on an idle server: "
        f"{report.longest_prompt_tokens:,} tokens",
    )
    out.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    _show_lines(out, "prompt tokens", report.prefill, plot=plot)
    _show_lines(
        out, f"sequences of {report.decode_context_tokens} tokens", report.decode, plot=plot
    )
    grid = Grid("for this demand", "")
    for name, value in (asdict(report.demand) | asdict(report.answer)).items():
        grid.add_row(TITLES[name], f"{value:.2f}" if isinstance(value, float) else str(value))
    out.print(terminal.whole(grid))
    if plot:
        out.print("bars: c compute, b bandwidth, l link, o overhead", highlight=False)


def _show_lines(out: Console, title: str, lines: Sequence[Line], *, plot: bool) -> None:
    terms = list(lines[0].terms_ms) if lines else []
    grid = Grid(title, "ms", "bottleneck", *(["of the longest"] if plot else terms))
    longest = max((line.milliseconds for line in lines), default=1.0)
    for line in lines:
        rest = [_bar(line, longest)] if plot else [f"{v:.2f}" for v in line.terms_ms.values()]
        grid.add_row(str(line.size), f"{line.milliseconds:.2f}", line.bottleneck.value, *rest)
    out.print(terminal.whole(grid))


def _bar(line: Line, longest: float, width: int = 48) -> str:
    return "".join(
        name.value[0] * round(width * value / longest) for name, value in line.resources_ms.items()
    )
