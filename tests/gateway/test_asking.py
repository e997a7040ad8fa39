from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.asking import ANYONE, Caller, Keyring, job_of, kind_of
from gateway.config import Classes, Key
from gateway.dialects import Ask, Dialect, Limits, read
from gateway.errors import ApiError, Code
from policies.types import Job, Kind

KEYS = (
    Key(key="live", tenant="shop"),
    Key(key="batch", tenant="night", kind=Kind.OFFLINE),
)
CLASSES = Classes()


def ask(**fields: Any) -> Ask:
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields}
    return read(Dialect.CHAT, orjson.dumps(body), limits=Limits())


def job(kind: Kind = Kind.ONLINE, **headers: str) -> Job:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return job_of(
        ask(), job_id="j", kind=kind, model="m", headers=named, classes=CLASSES, now_us=1_000
    )


def kind(
    headers: dict[str, str] | None = None, caller: Caller = ANYONE, tier: str = "", **more: Kind
) -> Kind:
    fields = {"service_tier": tier} if tier else {}
    return kind_of(headers or {}, ask(**fields), caller, more.get("default", Kind.ONLINE))


def test_without_keys_everybody_may_call() -> None:
    assert Keyring(()).caller({}) is ANYONE


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer batch"},
        {"authorization": "bearer  batch "},
        {"x-api-key": "batch"},
    ],
)
def test_a_key_says_whose_request_it_is(headers: dict[str, str]) -> None:
    assert Keyring(KEYS).caller(headers) == Caller("night", Kind.OFFLINE, KEYS[1])


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer"},
        {"authorization": "Basic live"},
        {"authorization": "live"},
        {"x-api-key": ""},
        {"x-api-key": "l\udcefve"},
    ],
)
def test_a_wrong_key_is_unauthorized(headers: dict[str, str]) -> None:
    with pytest.raises(ApiError) as refused:
        Keyring(KEYS).caller(headers)
    assert refused.value.code is Code.UNAUTHORIZED


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        ("auto", Kind.ONLINE),
        ("default", Kind.ONLINE),
        ("priority", Kind.ONLINE),
        ("scale", Kind.ONLINE),
        ("flex", Kind.OFFLINE),
    ],
)
def test_the_tier_names_a_class(tier: str, expected: Kind) -> None:
    assert kind(tier=tier) is expected


def test_the_header_goes_before_the_tier_and_the_tier_before_the_key() -> None:
    offline = {"x-slackwater-class": "offline"}
    assert kind(offline, tier="priority") is Kind.OFFLINE
    assert kind(caller=Caller("t", Kind.ONLINE), tier="flex") is Kind.OFFLINE
    assert kind(caller=Caller("t", Kind.ONLINE), default=Kind.OFFLINE) is Kind.ONLINE


def test_auto_leaves_the_choice_to_the_key_and_then_to_the_default() -> None:
    assert kind(caller=Caller("t", Kind.OFFLINE), tier="auto") is Kind.OFFLINE
    assert kind(tier="auto", default=Kind.OFFLINE) is Kind.OFFLINE


@pytest.mark.parametrize(
    ("headers", "tier"), [({"x-slackwater-class": "online"}, ""), ({}, "priority")]
)
def test_a_key_for_offline_work_stays_offline(headers: dict[str, str], tier: str) -> None:
    assert kind(headers, Caller("night", Kind.OFFLINE), tier) is Kind.OFFLINE


@pytest.mark.parametrize(
    ("headers", "tier"),
    [({"x-slackwater-class": "urgent"}, ""), ({"x-slackwater-class": ""}, ""), ({}, "gold")],
)
def test_an_unknown_class_is_refused_with_those_that_exist(
    headers: dict[str, str], tier: str
) -> None:
    with pytest.raises(ApiError, match="must be one of") as refused:
        kind(headers, tier=tier)
    assert refused.value.code is Code.UNKNOWN_CLASS


def test_an_online_job_has_its_targets() -> None:
    one = job()
    assert (one.arrival_us, one.deadline_us) == (1_000, 2_001_000)
    assert (one.give_up_us, one.tpot_us) == (10_001_000, 100_000)


def test_an_offline_job_has_a_window_and_no_pace() -> None:
    one = job(Kind.OFFLINE, x_slo_ttft_ms="5")
    assert one.deadline_us == one.give_up_us == 86_400_000_000 + 1_000
    assert one.tpot_us == 0


@given(st.floats(0.001, 1e8))
def test_a_caller_may_only_tighten(wanted_ms: float) -> None:
    one = job(x_slo_ttft_ms=repr(wanted_ms), x_slo_tpot_ms=repr(wanted_ms))
    assert one.deadline_us <= job().deadline_us
    assert one.tpot_us <= job().tpot_us
    assert one.arrival_us <= one.deadline_us <= one.give_up_us


@pytest.mark.parametrize("value", ["", "0", "-5", "nan", "inf", "1e12", "soon", "٣-"])
@pytest.mark.parametrize("name", ["x_slo_ttft_ms", "x_slo_tpot_ms"])
def test_a_target_that_is_no_positive_number_is_refused(name: str, value: str) -> None:
    with pytest.raises(ApiError, match="must be a positive number") as refused:
        job(Kind.ONLINE, **{name: value})
    assert refused.value.code is Code.INVALID_REQUEST
