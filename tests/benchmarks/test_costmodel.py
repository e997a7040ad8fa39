from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from backends.step_tables import Origin
from benchmarks.costmodel import STEP_TIMES, main, polynomial_errors, split
from benchmarks.costmodel_report import MARKER, constants_module, scatter_svg
from policies.calibration import Sample
from policies.constants import NUMBERS
from policies.devices import device_named
from policies.models import model_named
from policies.roofline import Parallel, Phase, build, decode_batch, prefill_batch
from policies.shipped import SHIPPED, TYPICAL

ORIGINS = [
    Origin(system="h100_sxm", model="Llama-3.1-8B", tp=1),
    Origin(system="h100_sxm", model="Qwen3-8B", tp=1),
]


def samples(origin: Origin, noise: float) -> list[Sample]:
    model, device = model_named(origin.model), device_named(origin.system)
    cost = build(model, device, SHIPPED["h100", "*", 0], Parallel(tp=origin.tp))
    chance = random.Random(3)
    batches = [
        *(prefill_batch([(n, 0)] * c) for n in (128, 512, 2048, 8192) for c in (1, 2, 4, 8)),
        *(decode_batch(c, c * n) for n in (128, 512, 2048, 8192) for c in (1, 8, 32, 128)),
    ]
    return [
        Sample(batch=b, seconds=cost.cost(b).seconds * math.exp(chance.gauss(0, noise)))
        for b in batches
    ]


def write_tables(folder: Path, noise: float) -> None:
    for name in ("splitwise", "aiconfigurator"):
        (folder / name).mkdir()
    lines = ["system,model,tp,phase,batch_size,ctx_len,latency_ms"]
    for origin in ORIGINS:
        for s in samples(origin, noise):
            length = (s.batch.context_tokens or s.batch.new_tokens) // s.batch.count
            where = f"{origin.system},{origin.model},{origin.tp},{s.batch.phase}"
            lines.append(f"{where},{s.batch.count},{length},{s.seconds * 1e3}")
    (folder / STEP_TIMES.removesuffix(".gz")).write_text("\n".join(lines))
    (folder / "splitwise/perf_model.csv").write_text(
        "model,hardware,prompt_size,batch_size,token_size,prompt_time,token_time,tensor_parallel\n"
        "llama2-70b,h100-80gb,512,1,128,60,29,4\nbloom-176b,h100-80gb,512,1,128,60,29,8\n"
    )
    (folder / "aiconfigurator/silicon_e2e_dense_models.csv").write_text(
        "backend,system,model_path,precision,tp_size,batch_size,isl,osl,"
        "silicon_ttft_ms,silicon_tpot_ms\n"
        "sglang,h200_sxm,meta-llama/Llama-3.1-8B-Instruct,fp8,1.0,16.0,1000,500,90,9\n"
        "vllm,b200_sxm,meta-llama/Llama-3.1-8B-Instruct,fp4,1.0,16.0,1000,500,90,9\n"
    )


@pytest.mark.parametrize(("noise", "status"), [(0.005, 0), (0.2, 1)])
def test_the_command_passes_on_steps_it_can_explain_and_fails_on_others(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    noise: float,
    status: int,
) -> None:
    write_tables(tmp_path, noise)
    monkeypatch.setattr("benchmarks.costmodel.STEP_TIMES", STEP_TIMES.removesuffix(".gz"))
    monkeypatch.setattr("benchmarks.costmodel.prediction_us", lambda _: 1.0)
    document, plot = tmp_path / "doc.md", tmp_path / "plot.svg"
    document.write_text(f"kept\n\n{MARKER}\nold")
    words = ["--tables", str(tmp_path), "--json", "--quick", "--document", str(document)]
    assert main([*words, "--plot", str(plot)]) == status
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {"checks", "spread", "machine", "date"} <= set(result)
    assert all({"name", "value", "target", "unit", "ok"} <= set(c) for c in result["checks"])
    assert any("sglang" in note for note in result["notes"])
    assert not any("b200" in note for note in result["notes"])
    assert document.read_text().startswith("kept")
    assert "old" not in document.read_text()
    assert plot.read_text().startswith("<svg")


def test_halves_share_no_step_and_lose_none() -> None:
    steps = samples(ORIGINS[0], 0.01)
    parts = split(ORIGINS[0], steps, 1)
    assert len(parts.fitted) == len(parts.tested) == 16
    assert {id(s) for s in parts.fitted} | {id(s) for s in parts.tested} == {id(s) for s in steps}
    assert split(ORIGINS[0], reversed(steps), 1).fitted == parts.fitted
    assert split(ORIGINS[0], steps, 2).fitted != parts.fitted


def test_the_polynomial_fits_what_is_polynomial() -> None:
    steps = [
        Sample(batch=prefill_batch([(n, 0)]), seconds=0.01 + 1e-5 * n + 1e-9 * n * n)
        for n in range(100, 3000, 100)
    ]
    parts = split(ORIGINS[0], steps, 1)
    for relative in (False, True):
        assert polynomial_errors(parts, Phase.PREFILL, relative=relative).p95 < 1e-6


def test_written_constants_are_a_module_that_holds_them() -> None:
    scope: dict[str, object] = {}
    code = constants_module({("h100", "*", 0): TYPICAL}, 1)
    exec(code, scope)
    found = scope["FITTED"]
    assert isinstance(found, dict)
    assert [getattr(found["h100", "*", 0], n) for n in NUMBERS] == pytest.approx(
        [getattr(TYPICAL, n) for n in NUMBERS], rel=1e-3
    )
    assert found["h100", "*", 0].source.strip() == TYPICAL.source


def test_a_plot_has_a_panel_for_each_device_and_phase() -> None:
    svg = scatter_svg([("h100", Phase.PREFILL, 0.01, 0.011), ("a100", Phase.DECODE, 0.02, 0.019)])
    assert svg.count("<circle") == 2
    assert "h100, prefill" in svg
    assert "a100, decode" in svg
