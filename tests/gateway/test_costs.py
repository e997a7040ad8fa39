from __future__ import annotations

import json
from pathlib import Path

import pytest

from backends.constants_file import dump_constants
from backends.counters import counters_of
from gateway.config import load
from gateway.rulebook import rules_of
from gateway.settings import ConfigError
from policies.known_models import KNOWN_CONFIGS
from policies.roofline import CostModel
from policies.shipped import SHIPPED, TYPICAL
from policies.steps import Costs
from policies.types import Role, Worker
from tests.gateway.gateway_under_test import standing

CONSTANTS = {("h100", "llama", 1): TYPICAL}
TWO = """
[[worker]]
url = "http://a:1"
name = "a"
role = "prefill"
[[worker]]
url = "http://b:1"
name = "b"
role = "decode"
"""


def costs(folder: Path, text: str) -> Costs:
    (folder / "config.toml").write_text(text)
    return rules_of(load(folder / "config.toml")).costs


def model_of(found: Costs, name: str) -> CostModel | None:
    return found.of(Worker(name=name, url=f"http://{name}:1", role=Role.DECODE))


def source(found: Costs, name: str) -> str:
    model = model_of(found, name)
    return "" if model is None else model.source


def test_nothing_said_is_nothing_predicted(tmp_path: Path) -> None:
    found = costs(tmp_path, TWO)
    assert (source(found, "a"), source(found, "b")) == ("", "")


def test_one_model_for_all_with_the_shipped_constants(tmp_path: Path) -> None:
    found = costs(tmp_path, TWO + '[cost]\nmodel = "Llama-3.1-8B"\ndevice = "h100"\n')
    assert source(found, "a") == source(found, "b") == SHIPPED["h100", "llama", 1].source


def test_constants_and_models_lie_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(dump_constants(CONSTANTS))
    shape = next(config for name, config in KNOWN_CONFIGS.items() if "lama-3.1-8b" in name.lower())
    (tmp_path / "config.json").write_text(json.dumps(shape))
    text = '[cost]\nconstants = "mine.toml"\nmodel = "config.json"\ndevice = "h100"\n'
    assert source(costs(tmp_path, TWO + text), "a") == TYPICAL.source


def test_a_worker_says_where_it_differs(tmp_path: Path) -> None:
    text = TWO + 'device = "a100"\n[cost]\nmodel = "Llama-3.1-8B"\ndevice = "h100"\n'
    found = costs(tmp_path, text)
    h100, a100 = model_of(found, "a"), model_of(found, "b")
    assert h100 is not None
    assert a100 is not None
    assert a100.decode(8, 8000).seconds > 1.3 * h100.decode(8, 8000).seconds


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('constants = "none.toml"', "cannot read"),
        ('model = "Llama-3.1-8B"', "device is missing"),
        ('device = "h100"', "model is missing"),
        ('model = "Llama-3.1-8B"\ndevice = "gtx"', "unknown device 'gtx'"),
        ('model = "Llama-9"\ndevice = "h100"', "Llama-9"),
        ('model = "Llama-3.1-8B"\ndevice = "h100"\ntp = 0', "cost.tp must be at least 1"),
        ('gpu = "h100"', "unknown key cost.gpu"),
    ],
)
def test_a_wrong_cost_section_is_refused_and_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        costs(tmp_path, f"[cost]\n{text}\n{TWO}")


def test_constants_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("[[constants]]\ndevice = 3\n")
    with pytest.raises(ConfigError, match=r"cost\.constants"):
        costs(tmp_path, '[cost]\nconstants = "mine.toml"\n')


async def test_a_worker_added_over_http_has_the_costs_of_all() -> None:
    async with standing() as site:
        body = {"url": "http://127.0.0.1:9", "device": "h100"}
        told = await site.ask("/workers", body)
    assert told.status == 400
    assert "config.toml only" in told.body["error"]["message"]


def test_ranks_are_summed_and_a_server_that_counts_nothing_is_told_apart() -> None:
    rank = {"total_prefill_busy_us": 5, "total_prefill_uncached_tokens": 7, "decode_moments": None}
    busy = {**rank, "decode_moments": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    found = counters_of([rank, busy, busy])
    assert found is not None
    assert (found.prefill_busy_us, found.prefill_tokens) == (15, 21)
    assert (found.decoded.steps, found.decoded.time_us) == (2.0, 6.0)
    assert counters_of([{"num_running_reqs": 1}]) is None
