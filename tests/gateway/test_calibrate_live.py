from __future__ import annotations

import argparse
import asyncio
import io
import random
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import gateway.calibrate
from backends.calibration_run import CannotMeasure, Facts, Findings, Plan, Step
from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from backends.steptimes import LinearStepTimes
from gateway.calibrate import add_arguments, fit_servers, in_lines, run_calibrate
from gateway.calibrate_live import Asked, Measured, measure_servers
from gateway.config import load
from gateway.rulebook import rules_of
from policies.calibration import CalibrationError, Setup
from policies.clock import VirtualClock
from policies.devices import device_named
from policies.models import ModelError, model_named
from policies.roofline import Parallel
from policies.types import Role, Worker

TRUE = LinearStepTimes()
PAIR = (
    ServerSpec(engine=EngineConfig(name="p", role=Role.PREFILL)),
    ServerSpec(engine=EngineConfig(name="d", role=Role.DECODE)),
)
UNIFIED = (ServerSpec(engine=EngineConfig(name="u")),)
SETUP = Setup(
    model=model_named("Llama-3.1-8B"), device=device_named("h100"), parallel=Parallel(tp=1)
)
WORDS = ("--model", "Llama-3.1-8B", "--gpu", "h100")


def few(prefill: Facts, decode: Facts) -> Plan:
    return Plan(prefills=[(64, 0), (1024, 0), (256, 0)], decodes=[(1, 64), (4, 512)])


async def measured(
    specs: tuple[ServerSpec, ...] = PAIR, *, model: str = "Llama-3.1-8B", **more: object
) -> Measured:
    async with EmulatedFleet(specs) as fleet:
        urls = [server.url for server in fleet.servers.values()]
        asked = Asked(targets=((urls[0], urls[-1]),), model=model, device="h100", seconds=15)
        loop = asyncio.get_running_loop()
        return await measure_servers(
            asked,
            loop,
            random.Random(2),
            lambda share, what: None,
            **more,  # type: ignore[arg-type]
        )


@pytest.mark.parametrize("specs", [PAIR, UNIFIED], ids=["pair", "unified"])
async def test_what_is_fitted_predicts_sizes_that_were_not_measured(
    specs: tuple[ServerSpec, ...],
) -> None:
    setup, found, _ = fit_servers(await measured(specs))
    cost = setup.cost(found.constants)
    assert found.prefill is not None
    assert found.decode is not None
    for tokens in (700, 1500, 3000, 6000):
        predicted = cost.prefill_one(tokens).seconds
        assert predicted == pytest.approx(TRUE.prefill_s([(tokens, 0)]), rel=0.10)
    for count, context in ((2, 2000), (12, 12 * 900), (100, 100 * 1000)):
        predicted = cost.decode(count, context).seconds
        assert predicted == pytest.approx(TRUE.decode_s(count, context), rel=0.05)


async def test_too_few_points_are_refused() -> None:
    found = await measured(plan_of=few)
    with pytest.raises(CalibrationError, match="too few"):
        fit_servers(found)


async def test_a_nonsensical_fit_is_refused() -> None:
    """A decode server whose steps take 50 s is no H100, whatever its constants."""
    slow = replace(UNIFIED[0], speed=1e-4, engine=EngineConfig(name="u", context_tokens=900))
    with pytest.raises((CalibrationError, CannotMeasure)):
        fit_servers(await measured((slow,)))


async def test_servers_of_a_pair_are_not_taken_for_unified_ones_nor_for_each_other() -> None:
    with pytest.raises(CannotMeasure, match="is a prefill server, not a unified server"):
        await measured(PAIR[:1])
    with pytest.raises(CannotMeasure, match="is a decode server, not a prefill server"):
        await measured(PAIR[::-1])


async def test_a_model_that_nobody_knows_is_asked_for() -> None:
    with pytest.raises(ModelError, match="name it with --model"):
        await measured(model="")


def calibrate(*words: str) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = io.StringIO()
    status = run_calibrate(parser.parse_args(words), Console(file=out, width=200))
    return status, out.getvalue()


def free_url() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_dead_server_is_one_line_and_exit_status_1(tmp_path: Path) -> None:
    target = tmp_path / "mine.toml"
    status, text = calibrate("--worker", free_url(), *WORDS, "--out", str(target))
    assert (status, target.exists()) == (1, False)
    assert "does not answer" in text
    assert len(text.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--decode", "http://x:1", "--table", "t.csv"), "--decode goes with --prefill"),
        (("--prefill", "http://x:1"), "--prefill goes with --decode"),
        (("--table", "t.csv"), "--model and --gpu are needed"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words: tuple[str, ...], reason: str) -> None:
    status, text = calibrate(*words)
    assert status == 2
    assert reason in text


def test_the_file_that_is_written_is_loaded_by_a_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measured_without_servers()
    monkeypatch.setattr(gateway.calibrate, "_measured", lambda asked: found)
    status, text = calibrate("--worker", "http://x:1", *WORDS, "--out", str(tmp_path / "c.toml"))
    assert status == 0, text
    assert "mean error" in text
    (tmp_path / "config.toml").write_text(
        '[cost]\nconstants = "c.toml"\nmodel = "Llama-3.1-8B"\ndevice = "h100"\n'
    )
    config = load(tmp_path / "config.toml")
    model = rules_of(config).costs.of(Worker(name="x", url="http://x:1", role=Role.DECODE))
    assert model is not None
    assert model.source.startswith("calibrated from")
    assert model.decode(32, 32 * 2000).seconds == pytest.approx(
        TRUE.decode_s(32, 32 * 2000), rel=0.05
    )


def test_too_few_loads_ask_for_more_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured_without_servers()
    del found.found[0].prefills[32, 0], found.found[0].prefills[128, 0]
    monkeypatch.setattr(gateway.calibrate, "_measured", lambda asked: found)
    status, text = calibrate("--worker", "http://x:1", *WORDS, "--seconds", "20")
    assert status == 1
    assert "too few" in text
    assert "--seconds 40" in text


def test_halves_that_are_too_small_are_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured_without_servers()
    monkeypatch.setattr(gateway.calibrate, "_measured", lambda asked: found)
    status, text = calibrate("--worker", "http://x:1", *WORDS)
    assert status == 0
    assert "-: half of the steps are too few" in text


async def test_a_calibrated_pair_is_named_by_both_addresses() -> None:
    found = await measured(plan_of=few)
    (told,) = found.urls
    assert told.count("http://127.0.0.1:") == 2


def test_where_no_bar_can_move_a_line_comes_now_and_then() -> None:
    clock, out = VirtualClock(), io.StringIO()
    report = in_lines(Console(file=out, width=200), clock)
    for second in range(35):
        clock.run(until=second)
        report(second / 100, f"second {second}")
    report(1.0, "done")
    told = out.getvalue().splitlines()
    assert [line.split()[-1] for line in told] == ["0", "10", "20", "30", "done"]


def measured_without_servers() -> Measured:
    """What a perfect run brings."""
    from_table = Measured(setup=SETUP)
    from_table.urls.append("http://x:1")
    findings = Findings()
    for tokens in (32, 128, 512, 1024, 2048, 4096, 8192):
        findings.prefills[tokens, 0].append(TRUE.prefill_s([(tokens, 0)]))
    for count in (1, 4, 16, 64):
        for prompt in (64, 512, 2048):
            step = Step(count * prompt, TRUE.decode_s(count, count * prompt))
            findings.decodes[count, prompt].append(step)
    from_table.found.append(findings)
    return from_table
