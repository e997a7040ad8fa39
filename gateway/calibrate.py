"""`slackwater calibrate`: which constants explain this hardware, from what was measured on it."""

from __future__ import annotations

import argparse
import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median

import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as Grid

from backends.calibration_run import CannotMeasure
from backends.ceilings import Ceilings, CeilingsError, constants_from, measure
from backends.constants_file import dump_constants, load_constants
from backends.step_tables import Origin, TableError, read_table
from gateway import terminal
from gateway.calibrate_live import Asked, Measured, measure_servers
from gateway.clock import LiveClock
from gateway.predict import read_model
from policies.calibration import (
    CalibrationError,
    Errors,
    Fit,
    Sample,
    Setup,
    TooFew,
    fit,
    held_out,
    relative_errors,
)
from policies.clock import Clock
from policies.constants import Constants, ConstantsError, Key, lookup
from policies.devices import Device, UnknownDevice, device_named
from policies.models import Model, ModelError, model_named
from policies.roofline import Parallel, Phase
from policies.shipped import SHIPPED

LINE_EVERY_S = 10.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--table", type=Path, help="CSV of measured step times")
    source.add_argument("--torch", action="store_true", help="measure this machine's own ceilings")
    source.add_argument(
        "--worker", action="append", default=[], metavar="URL", help="an idle unified server"
    )
    source.add_argument(
        "--prefill", metavar="URL", help="an idle prefill server, together with --decode"
    )
    parser.add_argument("--decode", metavar="URL", help="an idle decode server")
    parser.add_argument("--api-key", default="", help="sent to the servers")
    parser.add_argument(
        "--seconds",
        type=float,
        default=90.0,
        help="no measurement is begun later, all servers together; the one in course ends, and "
        "five rounds are enough (default: %(default)s)",
    )
    parser.add_argument(
        "--model", help="a known name, a config.json or its folder; default: the server's own"
    )
    parser.add_argument("--gpu", help="device, such as h100; default: what the server says")
    parser.add_argument("--tp", type=int, help="default: what the server says, or 1")
    parser.add_argument("--out", type=Path, help="TOML file to write, or to add to")


def run_calibrate(arguments: argparse.Namespace, console: Console | None = None) -> int:
    """0 with constants; 1 when the measurements make none, 2 when what was asked makes no sense."""
    out = console or terminal.console()
    try:
        setup, constants = _calibrated(arguments, out)
        text = _merged(arguments.out, setup, constants)
        if arguments.out:
            arguments.out.write_text(text)
    except (CalibrationError, CannotMeasure, CeilingsError) as error:
        return _refused(out, error, 1)
    except (ConstantsError, ModelError, OSError, TableError, UnknownDevice, ValueError) as error:
        return _refused(out, error, 2)
    if arguments.out:
        out.print(f"wrote {arguments.out}", markup=False, highlight=False)
    else:
        out.print(text, markup=False, highlight=False, soft_wrap=True)
    return 0


def _refused(out: Console, error: Exception, status: int) -> int:
    out.print(f"calibrate: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
    return status


def _calibrated(arguments: argparse.Namespace, out: Console) -> tuple[Setup, Constants]:
    if arguments.decode and not arguments.prefill:
        raise ValueError("--decode goes with --prefill: a decode server gets no work alone")
    if arguments.prefill and not arguments.decode:
        raise ValueError("--prefill goes with --decode: a prefill server hands its work on")
    if arguments.worker or arguments.prefill:
        return _from_servers(arguments, out)
    if not arguments.model or not arguments.gpu:
        raise ValueError("--model and --gpu are needed where no server can be asked")
    setup = _setup(arguments.model, arguments.gpu, arguments.tp or 1)
    if arguments.torch:
        return setup, _from_torch(setup, out)
    return setup, _from_table(arguments.table, setup, out)


def _setup(model: str, device: str, tp: int) -> Setup:
    return Setup(model=read_model(model), device=device_named(device), parallel=Parallel(tp=tp))


def fit_table(path: Path, setup: Setup, prior: Constants) -> tuple[Fit, dict[Phase, Errors]]:
    """The fit to all rows that belong to the setup, and the errors of each half on the other."""
    table = read_table(path)
    samples = [
        sample for origin, rows in table.items() if _belongs(origin, setup) for sample in rows
    ]
    if not samples:
        raise TableError(
            f"{path.name} has no rows for {setup.model.name} on {setup.device.name} "
            f"with tp {setup.parallel.tp}"
        )
    source = f"calibrated from {len(samples)} steps in {path.name}"
    return fit([(setup, samples)], prior, source=source), _halves(setup, samples, prior)


def _halves(setup: Setup, samples: list[Sample], prior: Constants) -> dict[Phase, Errors]:
    try:
        return held_out(setup, samples, prior)
    except CalibrationError:
        return {}  # halves too small to stand alone say nothing about the whole


def _belongs(origin: Origin, setup: Setup) -> bool:
    return (
        (not origin.system or device_named(origin.system) is setup.device)
        and (not origin.tp or origin.tp == setup.parallel.tp)
        and (not origin.model or _same_model(origin.model, setup.model))
    )


def _same_model(name: str, model: Model) -> bool:
    if name.rsplit("/", 1)[-1].lower() == model.name.rsplit("/", 1)[-1].lower():
        return True
    try:
        return replace(model_named(name), name="") == replace(model, name="")
    except ModelError:
        return False


def _prior(setup: Setup) -> Constants:
    return lookup(SHIPPED, setup.device.name, setup.model.family, setup.parallel.tp)


def _from_table(path: Path, setup: Setup, out: Console) -> Constants:
    found, halves = fit_table(path, setup, _prior(setup))
    _show_fit(out, found, halves)
    return found.constants


def _show_fit(out: Console, found: Fit, halves: Mapping[Phase, Errors]) -> None:
    grid = Grid("phase", "steps", "mean error", "p95", "mean error on the other half", "p95")
    for phase, errors in ((Phase.PREFILL, found.prefill), (Phase.DECODE, found.decode)):
        if errors:
            grid.add_row(
                phase.value, str(errors.count), *_shown(errors), *_shown(halves.get(phase))
            )
        else:
            grid.add_row(phase.value, "0", "as shipped", "", "", "")
    out.print(terminal.whole(grid))
    if not halves:
        out.print("-: half of the steps are too few to be fitted alone and tried on the other half")


def _from_servers(arguments: argparse.Namespace, out: Console) -> tuple[Setup, Constants]:
    targets = tuple((url, url) for url in arguments.worker)
    asked = Asked(
        targets=targets or ((arguments.prefill, arguments.decode),),
        model=arguments.model or "",
        device=arguments.gpu or "",
        tp=arguments.tp or 0,
        api_key=arguments.api_key,
        seconds=arguments.seconds,
    )
    measured = _measured(asked)
    try:
        setup, found, halves = fit_servers(measured)
    except TooFew as error:
        raise TooFew(f"{error}: measure for longer, --seconds {2 * asked.seconds:g}") from error
    _show_fit(out, found, halves)
    behind = relative_errors(setup.cost(found.constants), measured.behind_prefixes, Phase.PREFILL)
    if behind:
        out.print(
            f"prompts behind a cached prefix, which are not fitted: {median(behind):.0%} off, "
            f"{max(behind):.0%} at most"
        )
    if measured.overheads_s:
        overhead_ms = median(measured.overheads_s) * 1e3
        out.print(f"a first token takes {overhead_ms:.1f} ms besides its prefill")
    if measured.disturbed:
        out.print(
            f"{measured.disturbed} measurements left out: somebody else's work fell into them"
        )
    return setup, found.constants


def _measured(asked: Asked) -> Measured:
    told = Console(stderr=True, soft_wrap=True)
    with (
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        Progress(console=told, transient=True, disable=not told.is_terminal) as progress,
    ):
        clock = LiveClock(runner.get_loop())
        bar = progress.add_task("asking the servers", total=1.0)

        def show(share: float, what: str) -> None:
            progress.update(bar, completed=share, description=what)

        rng = random.Random(random.SystemRandom().getrandbits(64))
        report = show if told.is_terminal else in_lines(told, clock)
        return runner.run(measure_servers(asked, clock, rng, report))


def in_lines(told: Console, clock: Clock) -> Callable[[float, str], None]:
    """For a file or a pipe, where no bar can move: a line now and then."""
    due_s = clock.time()

    def report(share: float, what: str) -> None:
        nonlocal due_s
        if clock.time() >= due_s or share >= 1.0:
            due_s = clock.time() + LINE_EVERY_S
            told.print(f"calibrate: {share:4.0%} {what}", markup=False, highlight=False)

    return report


def fit_servers(measured: Measured) -> tuple[Setup, Fit, dict[Phase, Errors]]:
    setup, samples = measured.setup, measured.samples
    prior = _prior(setup)
    source = f"calibrated from {len(samples)} loads of {', '.join(measured.urls)}"
    return setup, fit([(setup, samples)], prior, source=source), _halves(setup, samples, prior)


def _shown(errors: Errors | None) -> tuple[str, str]:
    return (f"{errors.mean:.1%}", f"{errors.p95:.1%}") if errors else ("-", "-")


def _from_torch(setup: Setup, out: Console) -> Constants:
    with asyncio.Runner() as runner:
        clock = LiveClock(runner.get_loop())
        ceilings = measure(setup.model, setup.parallel.tp, clock.time)
    grid = Grid("ceiling", "measured", "of the peak")
    for name, value, share in _ceiling_rows(ceilings, setup.device):
        grid.add_row(name, value, share)
    out.print(terminal.whole(grid))
    return constants_from(ceilings, setup.device, _prior(setup))


def _ceiling_rows(ceilings: Ceilings, device: Device) -> list[tuple[str, str, str]]:
    speeds = (
        ("copy", ceilings.copy_bytes_per_s, device.memory_bytes_per_s),
        ("cache read", ceilings.kv_bytes_per_s, device.memory_bytes_per_s),
    )
    rates = (
        ("matrix products", ceilings.gemm_flops, device.bf16_flops),
        ("attention", ceilings.attention_flops, device.bf16_flops),
    )
    return [
        *((name, f"{value / 1e9:.1f} GB/s", f"{value / peak:.0%}") for name, value, peak in speeds),
        *(
            (name, f"{value / 1e12:.3f} TFLOP/s", f"{value / peak:.0%}")
            for name, value, peak in rates
        ),
    ]


def _merged(path: Path | None, setup: Setup, constants: Constants) -> str:
    """The file with this setup's constants replaced or added; other setups stay."""
    table: dict[Key, Constants] = {}
    if path and path.exists():
        table.update(load_constants(path))
    table[setup.device.name, setup.model.family, setup.parallel.tp] = constants
    return dump_constants(table)


def constants_table(path: Path | None) -> Mapping[Key, Constants]:
    """The shipped constants, with those of a calibration before them."""
    return {**SHIPPED, **load_constants(path)} if path else SHIPPED
