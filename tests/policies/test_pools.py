"""Which servers a kind may use, whatever their roles and pools are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.pools import ByLatency, Shared, WithoutRelaxed
from policies.types import Kind, Pool, Role, Worker
from tests.gateway.talk import server

ROLES = {"p": Role.PREFILL, "d": Role.DECODE, "u": Role.UNIFIED}
POOLS = {"s": Pool.STRICT, "r": Pool.RELAXED}
NAMES = [role + pool for role in ROLES for pool in POOLS]
WANTED = {Kind.ONLINE: Pool.STRICT, Kind.OFFLINE: Pool.RELAXED}
KINDS = st.sampled_from(Kind)
FLEETS = st.lists(st.sampled_from(NAMES), max_size=6)
BY_LATENCY = st.builds(
    ByLatency, lends=st.booleans(), without_relaxed=st.sampled_from(WithoutRelaxed)
)


def workers(*names: str) -> list[Worker]:
    """Named by role and pool: "dr" is a relaxed decode server."""
    found = []
    for number, name in enumerate(names):
        role, pool = name[0], name[1]
        found.append(server(f"{name}{number}", ROLES[role], pool=POOLS[pool]))
    return found


def used(kind: Kind, *names: str, pools: ByLatency | Shared | None = None) -> list[str]:
    pools = pools or ByLatency()
    return [w.name[:2] for w in pools.servers(kind, workers(*names))]


def lent(*names: str, **fields: object) -> list[str]:
    pools = ByLatency(lends=True, **fields)  # type: ignore[arg-type]
    return [w.name[:2] for w in pools.lent(Kind.OFFLINE, workers(*names))]


def can_serve(fleet: list[Worker]) -> bool:
    roles = {w.role for w in fleet}
    return Role.UNIFIED in roles or {Role.PREFILL, Role.DECODE} <= roles


@pytest.mark.parametrize(
    ("kind", "own"), [(Kind.ONLINE, ["ps", "ds", "us"]), (Kind.OFFLINE, ["ps", "dr", "ur"])]
)
def test_each_kind_has_its_pool(kind: Kind, own: list[str]) -> None:
    assert used(kind, "ps", "ds", "dr", "us", "ur") == own


@pytest.mark.parametrize(
    ("kind", "fleet", "own"),
    [
        (Kind.ONLINE, ["ps", "ds", "ur"], ["ps", "ds"]),
        (Kind.ONLINE, ["pr", "dr", "us"], ["pr", "us"]),
        (Kind.OFFLINE, ["ps", "ds", "ur"], ["ps", "ur"]),
        (Kind.OFFLINE, ["ps", "dr", "us"], ["ps", "dr"]),
        (Kind.ONLINE, ["ps", "ds", "dr", "ur"], ["ps", "ds"]),
    ],
)
def test_a_server_of_its_pool_in_one_role_keeps_it_off_the_other_pool_in_the_other_role(
    kind: Kind, fleet: list[str], own: list[str]
) -> None:
    assert used(kind, *fleet) == own


@pytest.mark.parametrize(
    ("kind", "fleet"), [(Kind.ONLINE, ["ds", "ur"]), (Kind.OFFLINE, ["dr", "us"])]
)
def test_a_decode_server_without_a_prefill_server_is_no_pool(kind: Kind, fleet: list[str]) -> None:
    assert used(kind, *fleet) == fleet
    assert lent("dr", "us") == []


@pytest.mark.parametrize("policy", [WithoutRelaxed.HOLD, WithoutRelaxed.REJECT])
def test_offline_work_that_may_not_share_has_nobody(policy: WithoutRelaxed) -> None:
    pools = ByLatency(without_relaxed=policy)
    assert used(Kind.OFFLINE, "ps", "ds", "us", pools=pools) == []
    assert used(Kind.OFFLINE, "dr", "us", pools=pools) == []
    assert used(Kind.ONLINE, "ps", "dr", pools=pools) == ["ps", "dr"]


def test_strict_decode_servers_lend_to_offline_work_that_has_a_server_of_its_own() -> None:
    assert lent("ps", "ds", "dr", "us") == ["ds"]
    assert lent("ps", "ds", "ur", without_relaxed=WithoutRelaxed.HOLD) == ["ds"]
    assert lent("ps", "ds", "us") == []


def test_online_work_is_lent_nothing_and_nobody_lends_who_is_not_told_to() -> None:
    fleet = workers("ps", "ds", "dr")
    assert ByLatency(lends=True).lent(Kind.ONLINE, fleet) == []
    assert ByLatency().lent(Kind.OFFLINE, fleet) == []


def test_without_pools_everybody_shares() -> None:
    fleet = ["ps", "ds", "dr", "us", "ur"]
    assert {tuple(used(kind, *fleet, pools=Shared())) for kind in Kind} == {tuple(fleet)}
    assert Shared().lent(Kind.OFFLINE, workers(*fleet)) == []


@given(kind=KINDS, names=FLEETS, pools=BY_LATENCY)
def test_where_its_pool_can_serve_a_kind_uses_nobody_of_the_other_one(
    kind: Kind, names: list[str], pools: ByLatency
) -> None:
    fleet = workers(*names)
    found = pools.servers(kind, fleet)
    own = [w for w in fleet if w.role is Role.PREFILL or w.pool is WANTED[kind]]
    if can_serve(own):
        assert found == own
    else:
        assert found == (fleet if pools.shares(kind) else [])


@given(kind=KINDS, names=FLEETS, pools=BY_LATENCY)
def test_whoever_may_share_is_served_where_any_server_could(
    kind: Kind, names: list[str], pools: ByLatency
) -> None:
    fleet = workers(*names)
    if pools.shares(kind):
        assert can_serve(pools.servers(kind, fleet)) == can_serve(fleet)


@given(kind=KINDS, names=FLEETS, pools=BY_LATENCY)
def test_what_is_lent_comes_on_top(kind: Kind, names: list[str], pools: ByLatency) -> None:
    fleet = workers(*names)
    for each in pools.lent(kind, fleet):
        assert (each.role, each.pool) == (Role.DECODE, Pool.STRICT)
        assert each not in pools.servers(kind, fleet)
