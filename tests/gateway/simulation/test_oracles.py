"""What an order could do that knew how long answers will be; and that nobody takes it for ours."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

import pytest

from gateway.config import Config, Policies
from gateway.scenario import PolicyEntry, ServerEntry, WorkloadEntry
from gateway.settings import ConfigError, decode
from gateway.simulation.oracles import NO_ORACLE, ORACLES, SrpfOracle, answer_left
from gateway.simulation.records import Ended, Record
from policies.registry import ORDER
from policies.retry import continued
from policies.types import Role
from tests.gateway.simulation.scenarios import plan, ran
from tests.gateway.talk import online

ANSWERS = {"brief": 10, "wordy": 900}


def test_the_least_left_of_prompt_and_answer_goes_first() -> None:
    order = SrpfOracle(lambda job: ANSWERS[job.id])
    brief, wordy = online("brief", 500), online("wordy", 100)
    assert order.key(brief) < order.key(wordy)
    assert order.key(brief._replace(cached_tokens=450)) == (60, 0)


def test_what_was_generated_before_is_left_no_more() -> None:
    job = online("a", 100)
    record = Record(
        id="a",
        workload="chat",
        kind=job.kind,
        arrival_us=0,
        prompt_tokens=100,
        output_tokens=80,
        ttft_target_us=1,
        tpot_target_us=1,
        window_us=1,
    )
    assert answer_left(job, record) == 80
    assert answer_left(continued(job, 30, 5), record) == 50


@pytest.mark.parametrize("name", ORACLES.keys() - {NO_ORACLE})
def test_no_configuration_may_name_an_oracle(name: str) -> None:
    with pytest.raises(ConfigError, match=r"policies\.order must be one of"):
        decode(Config, {"policies": {"order": name}})
    with pytest.raises(ConfigError, match=r"unknown key policies\.oracle"):
        decode(Config, {"policies": {"oracle": name}})
    assert name not in ORDER
    assert "oracle" in name


def test_knowing_the_answers_ends_a_backlog_of_equal_prompts_sooner() -> None:
    """One server with two seats; lengths of answers differ, and no policy can see them."""
    backlog = WorkloadEntry(
        name="chat",
        arrivals="backlog",
        count=60,
        input_median=200.0,
        input_sigma=0.0,
        output_median=60.0,
        output_sigma=1.0,
        output_max=600,
        patience=1e4,
    )
    servers = (ServerEntry(role=Role.UNIFIED, kv_tokens=50_000, max_running=2),)
    blind = PolicyEntry(name="blind", policies=Policies(order="shortest", pools="none"))
    seeing = replace(blind, name="oracle", oracle="srpf-oracle")
    of, ends = plan(backlog, servers=servers, drain_s=1000.0), dict[str, float]()
    for policy in (blind, seeing):
        records = ran(of, policy=policy).records
        assert {it.ended for it in records} == {Ended.FINISHED}
        ends[policy.name] = fmean(it.last_us or 0 for it in records)
    assert ends["oracle"] < 0.8 * ends["blind"]
