from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from backends.ceilings import Ceilings, CeilingsError, constants_from, measure
from policies.devices import device_named
from policies.models import model_named
from policies.shipped import SHIPPED

H100 = device_named("h100")
PRIOR = SHIPPED["h100", "*", 0]
SEEN = Ceilings(
    where="a test",
    copy_bytes_per_s=2.9e12,
    gemm_flops=700e12,
    attention_flops=500e12,
    kv_bytes_per_s=2.5e12,
)


def test_ceilings_become_efficiencies_and_overheads_stay() -> None:
    found = constants_from(SEEN, H100, PRIOR)
    assert found.gemm_efficiency == pytest.approx(700 / 989)
    assert found.weight_efficiency == pytest.approx(2.9 / 3.35)
    assert found.decode_layer_us == PRIOR.decode_layer_us
    assert "a test" in found.source


def test_a_ceiling_above_the_peak_asks_whether_the_device_is_right() -> None:
    with pytest.raises(CeilingsError, match=r"kv_efficiency.*h100.*right"):
        constants_from(replace(SEEN, kv_bytes_per_s=4e12), H100, PRIOR)


def test_without_torch_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CeilingsError, match="torch cannot be imported"):
        measure(model_named("Llama-3.1-8B"), 1, lambda: 0.0)
