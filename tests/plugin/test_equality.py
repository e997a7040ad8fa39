"""Whoever is chosen for a step, each request gets the tokens that stock SGLang gives it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.plugin.ground import FLOOR_S, STEP_S, Ask, Trial

pytestmark = [pytest.mark.real_time, pytest.mark.timeout(120, func_only=True)]
LINE: dict[str, Any] = {"base_us": 2_000.0, "request_us": 500.0, "token_us": 20.0}
"""By which a long context costs more than it does, so that it is left out."""


async def test_any_subset_gives_the_same_tokens_while_others_come_and_go(trial: Trial) -> None:
    asks = trial.asks(12)
    stock = await trial.stock(asks)
    retracted = await trial.retracted()
    for share in (0.5, 0.2):
        await trial.set("random", share=share, hold_steps=3, most_parked_us=6e7)
        await trial.same(asks, stock)
    assert await trial.retracted() > retracted


@pytest.mark.parametrize("mode", ["online-first", "slack"])
async def test_a_policys_choices_give_the_same_tokens(trial: Trial, mode: str) -> None:
    short = [replace(ask, tpot_ms=20.0) for ask in trial.asks(8, prompt=60)]
    long = [Ask(trial.prompt(250), 40, offline=True, tpot_ms=20.0) for _ in range(2)]
    asks = [*short[:4], *long, *short[4:]]
    stock = await trial.stock(asks)
    await trial.set(mode, **LINE)
    await trial.same(asks, stock)


async def test_log_probabilities_are_those_of_stock(trial: Trial) -> None:
    asks = [
        replace(
            ask, more={"return_logprob": True, "top_logprobs_num": 2 * (i % 2)} if i % 3 else {}
        )
        for i, ask in enumerate(trial.asks(8, tokens=30))
    ]

    async def told() -> list[list[float]]:
        legs = [trial.send(ask) for ask in asks]
        await asyncio.gather(*(leg.task for leg in legs))
        tokens = [leg.meta.get("output_token_logprobs") or [] for leg in legs]
        return [[token[0] for token in one] for one in tokens]

    stock = await trial.stock(asks)
    alone = await told()
    await trial.set("random", share=0.4)
    await trial.same(asks, stock)
    # A retraction costs stock SGLang some of them: each request is asked until it is spared one.
    missing = set(range(len(alone)))
    for _ in range(4):
        got = await told()
        # Sums in batches of other sizes differ in their last digits.
        missing = {i for i in missing if got[i] != pytest.approx(alone[i], abs=1e-3)}
        if not missing:
            break
    assert not missing
    assert sum(map(len, alone)) > 100


async def test_a_grammar_is_kept(trial: Trial) -> None:
    sampling = {"regex": "[a-f0-9]{12,30}z[0-9]{8}", "ignore_eos": False}
    asks = [
        replace(ask, sampling=sampling if i % 2 and not trial.ground.is_pair else None)
        for i, ask in enumerate(trial.asks(8, tokens=30))
    ]
    stock = await trial.stock(asks)
    await trial.set("random", share=0.4)
    await trial.same(asks, stock)


async def test_penalties_count_every_token(trial: Trial) -> None:
    kinds: tuple[dict[str, Any], ...] = (
        {"frequency_penalty": 0.7},
        {"repetition_penalty": 1.3, "min_new_tokens": 5},
        {},
        {},
    )
    asks = [replace(ask, sampling=kinds[i % 4]) for i, ask in enumerate(trial.asks(12, tokens=30))]
    await trial.set("all")
    await trial.slow(None)
    waves = [await trial.wave(asks) for _ in range(3)]
    stock = {i: ids for i, ids in enumerate(waves[0]) if all(it[i] == ids for it in waves)}
    assert len(stock) > len(asks) / 2  # under overlap stock SGLang itself wavers with penalties
    await trial.set("random", share=0.4)
    await trial.slow(FLOOR_S)
    before = await trial.state()
    got = await trial.wave(asks)
    after = await trial.state()
    wrong = [i for i, ids in stock.items() if got[i] != ids]
    assert after["views"] > before["views"]
    assert not wrong if not trial.ground.overlaps else len(wrong) <= 1


async def test_an_abort_ends_a_request_that_waits_and_no_other(trial: Trial) -> None:
    online = [Ask(trial.prompt(50), 200) for _ in range(3)]  # they outlast what is done meanwhile
    offline = [Ask(trial.prompt(60), 30, offline=True) for _ in range(4)]
    stock = await trial.stock([*online, *offline])
    await trial.set(
        "online-first", tpot_us=2_000, base_us=1_000, request_us=500, most_parked_us=6e7
    )
    await trial.slow(STEP_S)
    legs = [trial.send(ask) for ask in online]
    await asyncio.gather(*(leg.begun.wait() for leg in legs))
    waiting = [trial.send(ask, rid=f"{i:032x}") for i, ask in enumerate(offline)]
    await trial.until("parked", 4)
    late = trial.send(Ask(trial.prompt(33), 5))
    await trial.client.abort(trial.ground.url, f"{0:032x}")
    await asyncio.gather(waiting[0].task, late.task)
    assert not any(leg.task.done() for leg in [*legs, *waiting[1:]])
    assert waiting[0].finish["type"] == "abort"
    assert len(late.ids) == 5
    await trial.slow(FLOOR_S)
    await asyncio.gather(*(leg.task for leg in [*legs, *waiting[1:]]))
    got = [leg.ids for leg in [*legs, *waiting]]
    assert [i for i, ids in stock.items() if i != len(online) and got[i] != ids] == []


@pytest.mark.parametrize("how", ["in_place", "retract"])
async def test_a_pause_in_the_midst_of_a_choice_loses_nothing(trial: Trial, how: str) -> None:
    asks = [Ask(trial.prompt(50), 150, offline=i % 2 == 1) for i in range(4)]
    stock = await trial.stock(asks)
    await trial.set("online-first", tpot_us=1_000, base_us=900, request_us=500, most_parked_us=6e7)
    await trial.slow(STEP_S)
    legs = [trial.send(ask) for ask in asks]
    await trial.until("parked", 2)
    await trial.client.post(trial.ground.url + "/pause_generation", {"mode": how})
    await asyncio.sleep(0.1)
    await trial.client.post(trial.ground.url + "/continue_generation", {})
    await trial.slow(FLOOR_S)
    await asyncio.gather(*(leg.task for leg in legs))
    assert [i for i, ids in stock.items() if legs[i].ids != ids] == []


async def test_selection_that_fails_three_times_is_off_and_the_server_serves(trial: Trial) -> None:
    asks = trial.asks(12)
    stock = await trial.stock(asks)
    await trial.set("faulty")
    got = await trial.wave(asks)
    state = await trial.state()
    assert [i for i, ids in stock.items() if got[i] != ids] == []
    assert state["features"]["decode"]["on"] is False
    assert state["features"]["decode"]["faults"] == 3
    await trial.set("random", reset=1)
    await trial.same(asks, stock)


@pytest.mark.parametrize("ground", ["overlapping"], indirect=True)
async def test_what_a_gateway_set_ends_with_its_lease(trial: Trial) -> None:
    await trial.set("online-first", tpot_us=1_000, base_us=900, request_us=500, most_parked_us=6e7)
    await trial.slow(STEP_S)
    online = [trial.send(Ask(trial.prompt(50), 450)) for _ in range(2)]  # for 9 s at least
    await asyncio.gather(*(leg.begun.wait() for leg in online))
    offline = [trial.send(Ask(trial.prompt(60), 60, offline=True)) for _ in range(2)]
    await trial.until("parked", 2)
    await trial.set(lease_s=0.3)
    # Who asks for the state would end the lease; here it is the engine that looks.
    await asyncio.gather(*(leg.task for leg in offline))
    assert not any(leg.task.done() for leg in online)
    assert (await trial.state())["mode"] == "all"
    await trial.slow(FLOOR_S)
    await asyncio.gather(*(leg.task for leg in online))


@pytest.mark.parametrize("ground", ["overlapping"], indirect=True)
async def test_nonsense_about_a_request_counts_as_untold(trial: Trial) -> None:
    nonsense = {"slackwater_class": "x", "slackwater_tpot_ms": "soon"}
    asks = [replace(ask, sampling={"custom_params": nonsense}) for ask in trial.asks(4, tokens=30)]
    plain = [replace(ask, offline=False) for ask in trial.asks(4, tokens=30)]
    await trial.set("online-first", tpot_us=1_500, base_us=1_000, request_us=500)
    assert all(await trial.wave([*asks, *plain]))
    assert (await trial.state())["features"]["decode"]["on"]


@pytest.mark.parametrize("ground", ["overlapping"], indirect=True)
async def test_unknown_settings_are_refused_as_a_whole(trial: Trial) -> None:
    for told in ({"slackwater_speed": 1}, {"slackwater_mode": 7}, {"slackwater_hold_steps": 0}):
        body = {"server_args": {"slackwater_mode": 2, **told}}
        url = trial.ground.url + "/set_internal_state"
        assert await trial.client.post(url, body) == (200, [False])
    assert (await trial.state())["mode"] == "all"
