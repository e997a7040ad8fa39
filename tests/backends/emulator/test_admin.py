from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest

from backends.emulator import EmulatedFleet, ServerSpec
from backends.engine import EngineConfig
from tests.backends.emulator.wire import events, greedy


async def get(http: aiohttp.ClientSession, url: str) -> Any:
    async with http.get(url) as response:
        assert response.status == 200
        return await response.json()


async def post(http: aiohttp.ClientSession, url: str, **body: Any) -> tuple[int, Any]:
    async with http.post(url, json=body) as response:
        text = await response.text()
        return response.status, await response.json() if text.startswith("{") else text


async def test_the_load_of_each_role_names_its_mode(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    entries = [(await get(http, fleet.urls[name] + "/v1/loads"))["loads"][0] for name in "pdu"]
    assert [it["disaggregation"]["mode"] for it in entries] == ["prefill", "decode", "null"]
    assert entries[0]["decode_moments"] is None


async def test_include_selects_sections_and_refuses_unknown_ones(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"] + "/v1/loads"
    entry = (await get(http, url + "?include=core,queues"))["loads"][0]
    assert "queues" in entry
    assert "memory" not in entry
    async with http.get(url + "?include=nonsense") as response:
        assert response.status == 400


async def test_info_calls_and_their_aliases_agree(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["d"]
    assert await get(http, url + "/model_info") == await get(http, url + "/get_model_info")
    info = await get(http, url + "/get_server_info")
    assert info["disaggregation_mode"] == "decode"
    assert info["disaggregation_bootstrap_port"] == fleet["d"].bootstrap_port


async def test_text_goes_to_tokens_and_back(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url, text = fleet.urls["p"], "Grüße, and a bal dom!\n"
    _, tokens = await post(http, url + "/v1/tokenize", model="m", prompt=text)
    _, back = await post(http, url + "/v1/detokenize", model="m", tokens=tokens["tokens"])
    assert back["text"] == text
    assert tokens["count"] == len(tokens["tokens"])


async def test_generated_tokens_become_the_text_that_was_answered(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"]
    body = {"prompt": "once", "max_tokens": 5, "ignore_eos": True, "return_token_ids": True}
    _, answer = await post(http, url + "/v1/completions", **body)
    (choice,) = answer["choices"]
    _, back = await post(http, url + "/detokenize", tokens=choice["token_ids"])
    assert back["text"] == choice["text"]


@pytest.mark.parametrize("tokens", ["text", None, ["a"], [1, -1], [[1], "b"], [True]])
async def test_what_are_no_tokens_is_refused(
    fleet: EmulatedFleet, http: aiohttp.ClientSession, tokens: object
) -> None:
    status, told = await post(http, fleet.urls["u"] + "/detokenize", tokens=tokens)
    assert status == 400
    assert told["message"].startswith("tokens: a list of token ids")


async def test_the_tokens_of_a_conversation_are_those_that_its_answer_counts(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    body = {"system": "Be brief.", "messages": [{"role": "user", "content": "Tell me more"}]}
    url = fleet.urls["u"] + "/v1/messages"
    _, counted = await post(http, url + "/count_tokens", model="m", **body)
    _, answer = await post(http, url, model="m", max_tokens=2, **body)
    assert counted == {"input_tokens": answer["usage"]["input_tokens"]}
    assert (await post(http, url + "/count_tokens", model="m"))[0] == 400


async def test_answers_are_dated_by_the_calendar(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    before = int(datetime.now(UTC).timestamp())
    _, answer = await post(http, fleet.urls["u"] + "/v1/completions", prompt="x", max_tokens=2)
    assert before <= answer["created"] <= datetime.now(UTC).timestamp()


async def test_a_page_that_is_not_there_is_refused_as_sglang_does(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    told = await post(http, fleet.urls["u"] + "/unheard_of", text="x")
    assert told == (404, {"detail": "Not Found"})


async def test_metrics_carry_sglang_names(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    await post(http, fleet.urls["u"] + "/generate", **greedy(4, text="hello"))
    async with http.get(fleet.urls["u"] + "/metrics") as response:
        lines = (await response.text()).splitlines()
    values = {line.split("{")[0]: line.split()[-1] for line in lines if not line.startswith("#")}
    assert values["sglang:generation_tokens_total"] == "4"
    assert values["sglang:num_running_reqs"] == "0"
    assert values["sglang:inter_token_latency_seconds_count"] == "3"


async def test_an_abort_ends_the_stream_with_what_there_is(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"]
    body = greedy(5000, text="hello", stream=True, rid="mine")
    async with http.post(url + "/generate", json=body) as response:
        await response.content.readline()
        assert await post(http, url + "/abort_request", rid="mine") == (200, "")
        last = (await events(response))[-2]
    assert last["meta_info"]["finish_reason"]["message"] == "Aborted"
    assert fleet.resident() == {}


async def test_an_aborted_unary_call_is_a_200_with_partial_text(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"]
    call = asyncio.ensure_future(
        post(http, url + "/generate", **greedy(5000, text="hello", rid="mine"))
    )
    await asyncio.sleep(0.1)
    await post(http, url + "/abort_request", abort_all=True)
    status, answer = await call
    assert status == 200
    assert 0 < len(answer["output_ids"]) < 30


async def test_a_pause_makes_the_server_unready_and_holds_requests(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["u"]
    await post(http, url + "/pause_generation", mode="in_place")
    async with http.get(url + "/ready") as response:
        assert response.status == 503
    call = asyncio.ensure_future(post(http, url + "/generate", **greedy(2, text="a")))
    await asyncio.sleep(30)
    assert not call.done()
    await post(http, url + "/continue_generation")
    assert (await call)[0] == 200


async def test_health_takes_a_second(fleet: EmulatedFleet, http: aiohttp.ClientSession) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with http.get(fleet.urls["u"] + "/health") as response:
        assert response.status == 200
    assert loop.time() - began == pytest.approx(1.0, abs=0.01)


async def test_a_busy_server_refuses_to_switch_and_an_idle_one_does(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    url = fleet.urls["d"]
    body = greedy(5, text="a", stream=True, bootstrap_host="127.0.0.1", bootstrap_room=3)
    body["bootstrap_port"] = fleet["p"].bootstrap_port
    async with http.post(url + "/generate", json=body):
        status, refused = await post(http, url + "/pd_role_switch", new_role="prefill")
    assert (status, refused["success"]) == (400, False)
    await asyncio.sleep(0.1)
    status, switched = await post(http, url + "/pd_role_switch", new_role="prefill")
    assert (status, switched["message"], switched["old_role"]) == (200, "ok", "decode")
    assert (await get(http, url + "/model_info"))["disaggregation_mode"] == "prefill"


async def test_the_bootstrap_server_answers_for_a_prefill_role_only(
    fleet: EmulatedFleet, http: aiohttp.ClientSession
) -> None:
    def route(name: str) -> str:
        return f"http://127.0.0.1:{fleet[name].bootstrap_port}/route?prefill_dp_rank=-1"

    assert (await get(http, route("p")))["prefill_http_port"] == fleet["p"].port
    async with http.get(route("d")) as response:
        assert response.status == 503


async def test_an_api_key_guards_all_but_the_probes(http: aiohttp.ClientSession) -> None:
    spec = ServerSpec(engine=EngineConfig(name="k"), api_key="secret")
    async with EmulatedFleet([spec]) as fleet:
        async with http.get(fleet.urls["k"] + "/v1/models") as response:
            assert (response.status, await response.json()) == (401, {"error": "Unauthorized"})
        async with http.get(fleet.urls["k"] + "/ready") as response:
            assert response.status == 200
        key = {"Authorization": "Bearer secret"}
        async with http.get(fleet.urls["k"] + "/v1/models", headers=key) as response:
            assert (await response.json())["data"][0]["owned_by"] == "sglang"
