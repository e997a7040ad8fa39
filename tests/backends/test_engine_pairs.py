"""Conversations between the two legs of a pair: who waits for whom, and who is told of failures."""

from __future__ import annotations

from typing import Any

import pytest

from backends.engine import FAKE_BOOTSTRAP_HOST
from policies.types import Role
from tests.backends.engine_fleet import Servers, pd, prompt

PROMPT = prompt(100)


def test_the_prefill_leg_answers_one_token_after_the_transfer() -> None:
    servers = pd(link_latency_s=0.5)
    prefill, decode = servers.pair(prompt=PROMPT, max_new_tokens=3, ignore_eos=True, stream=True)
    servers.run()
    assert prefill.reason == {"type": "length", "length": 0}
    assert prefill.output == decode.output[:1]
    assert prefill.ended_at == pytest.approx(0.5 + 0.01, abs=0.001)


def test_the_first_token_is_told_by_decode_when_it_starts_to_run() -> None:
    servers = pd(link_latency_s=0.5)
    prefill, decode = servers.pair(prompt=PROMPT, max_new_tokens=3, ignore_eos=True, stream=True)
    servers.run()
    assert prefill.tokens_at == []
    assert decode.tokens_at[0] == pytest.approx(0.51, abs=0.001)
    assert decode.ended_at == pytest.approx(0.53, abs=0.001)


def test_prefill_does_not_compute_before_decode_has_memory() -> None:
    servers = pd(reserved_decode_tokens=0, kv_tokens=150)
    servers.pair("first", room=1, prompt=PROMPT, max_new_tokens=20, ignore_eos=True)
    second = servers.pair("second", room=2, prompt=prompt(100, 5000), max_new_tokens=2)
    servers.run(until=0.1)
    queues = servers["p"].loads()["disaggregation"], servers["d"].loads()["disaggregation"]
    assert queues[0]["prefill_bootstrap_queue_reqs"] == 1
    assert queues[1]["decode_prealloc_queue_reqs"] == 1
    servers.run()
    assert second[1].ended_at > 0.2


def test_a_prefill_leg_without_decode_ends_after_its_timeout() -> None:
    servers = pd(bootstrap_timeout_s=3.0)
    leg = servers.submit("p", prompt=PROMPT, bootstrap_room=5)
    servers.run()
    assert leg.reason["status_code"] == 500
    assert leg.reason["message"].endswith("timed out after 3.0s in KVPoll.Bootstrapping")
    assert leg.ended_at == 3.0


def test_a_decode_leg_without_prefill_holds_memory_until_its_timeout() -> None:
    servers = pd(waiting_timeout_s=3.0)
    where: dict[str, Any] = {
        "bootstrap_host": "localhost",
        "bootstrap_port": 1,
        "bootstrap_room": 5,
    }
    leg = servers.submit("d", prompt=PROMPT, **where)
    servers.run(until=2.9)
    assert servers["d"].machine.kv.used == 100
    servers.run()
    assert leg.reason["message"].endswith("timed out after 3.0s in KVPoll.WaitingForInput")
    assert servers["d"].machine.kv.used == 0


def test_an_abort_of_decode_is_told_to_prefill() -> None:
    servers = Servers(p={"role": Role.PREFILL}, d={"role": Role.DECODE, "kv_tokens": 200})
    servers.pair("big", room=1, prompt=prompt(150), max_new_tokens=20, ignore_eos=True)
    prefill, decode = servers.pair("r", room=2, prompt=PROMPT)
    servers.run(until=0.05)
    servers["d"].abort("r")
    servers.run(until=0.1)
    assert decode.reason["message"].startswith("Decode handshake failed")
    assert prefill.reason["message"].startswith("Prefill bootstrap failed")
    assert prefill.reason["message"].endswith("Aborted by AbortReq.")


def test_an_abort_of_decode_lets_prefill_compute_to_the_end_before_it_fails() -> None:
    servers = pd()
    prefill, decode = servers.pair(prompt=PROMPT)
    servers.run(until=0.005)
    servers["d"].abort("r")
    servers.run()
    assert decode.reason["message"].startswith("Decode transfer failed")
    assert prefill.reason["message"].startswith("Prefill transfer failed")
    assert prefill.ended_at == pytest.approx(0.01)


def test_an_abort_of_prefill_is_not_told_to_decode() -> None:
    servers = pd(waiting_timeout_s=30.0)
    prefill, decode = servers.pair(prompt=prompt(20_000))
    servers.run(until=0.1)
    servers["p"].abort("r")
    servers.run(until=29.0)
    assert prefill.reason["message"] == "Abort in waiting queue"
    assert decode.ends == []
    servers.run()
    assert decode.ended_at == pytest.approx(30.0)
    assert decode.reason["status_code"] == 500


def test_an_aborted_prefill_keeps_its_finished_chunks() -> None:
    servers = pd(chunk_tokens=1000)
    servers.pair("r", room=1, prompt=prompt(12_000))
    servers.run(until=0.55)
    servers["p"].abort("r")
    servers["d"].abort("r")
    servers.run()
    again = servers.pair("s", room=2, prompt=prompt(12_000), max_new_tokens=1)
    servers.run()
    assert servers["p"].machine.counters.prefill_cached_tokens == 5000, "the one under way is lost"
    assert again[1].reason["type"] == "length"


def test_decode_notices_a_dead_prefill_by_heartbeat() -> None:
    servers = pd(heartbeat_s=10.0)
    prefill, decode = servers.pair(prompt=prompt(20_000))
    servers.run(until=1.0)
    servers["p"].kill()
    servers.run()
    assert prefill.losses == 1
    assert "Lost connection with prefill instance" in decode.reason["message"]
    assert decode.ended_at == 11.0


def test_decode_streams_on_when_prefill_dies_after_the_transfer() -> None:
    servers = pd()
    _, decode = servers.pair(prompt=PROMPT, max_new_tokens=50, ignore_eos=True)
    servers.run(until=0.1)
    servers["p"].kill()
    servers.run()
    assert decode.reason == {"type": "length", "length": 50}


def test_a_prefill_leg_stays_when_decode_dies_before_the_handshake() -> None:
    servers = pd(bootstrap_timeout_s=300.0)
    servers["d"].kill()
    leg = servers.submit("p", prompt=PROMPT, bootstrap_room=5)
    servers.run(until=299.0)
    assert leg.ends == []
    servers.run()
    assert leg.reason["status_code"] == 500


def test_a_transfer_to_a_dead_decode_server_fails() -> None:
    servers = pd(link_latency_s=0.5)
    prefill, decode = servers.pair(prompt=PROMPT)
    servers.run(until=0.2)
    servers["d"].kill()
    servers.run()
    assert decode.losses == 1
    assert prefill.reason["message"].startswith("Prefill transfer failed")


def test_an_unknown_bootstrap_address_fails_after_the_handshake_retries() -> None:
    servers = pd()
    where: dict[str, Any] = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": 99,
        "bootstrap_room": 5,
    }
    leg = servers.submit("d", prompt=PROMPT, **where)
    servers.run()
    assert leg.reason["message"].startswith("Decode handshake failed")
    assert leg.ended_at == pytest.approx(14.0)


def test_a_prefill_that_comes_up_in_time_is_found() -> None:
    servers = pd()
    servers["p"].kill()
    where: dict[str, Any] = {
        "bootstrap_host": "127.0.0.1",
        "bootstrap_port": 1,
        "bootstrap_room": 5,
    }
    decode = servers.submit("d", prompt=PROMPT, max_new_tokens=2, ignore_eos=True, **where)
    servers.run(until=2.5)
    servers["p"].revive()
    servers.submit("p", prompt=PROMPT, bootstrap_room=5)
    servers.run()
    assert decode.reason == {"type": "length", "length": 2}


def test_a_pair_without_a_room_is_refused() -> None:
    servers = pd()
    legs = [servers.submit(name, prompt=PROMPT) for name in "pd"]
    assert [leg.reason["status_code"] for leg in legs] == [400, 400]
    assert "without bootstrap room id" in legs[0].reason["message"]


def test_room_zero_fails_on_decode() -> None:
    servers = pd()
    _, decode = servers.pair(room=0, prompt=PROMPT)
    assert decode.reason["status_code"] == 500
    assert "(bootstrap_room=0)" in decode.reason["message"]


def test_the_fake_host_answers_but_leaves_nothing_cached() -> None:
    servers = pd()
    where: dict[str, Any] = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 9}
    leg = servers.submit("p", prompt=PROMPT, **where)
    servers.run()
    assert leg.reason["type"] == "length"
    assert servers["p"].machine.kv.cache.tokens == 0


def test_a_decode_server_has_no_prefix_cache() -> None:
    servers = pd()
    servers.pair(prompt=PROMPT, max_new_tokens=5, ignore_eos=True)
    servers.run()
    assert servers["d"].machine.kv.cache.tokens == 0
    assert servers["p"].machine.kv.cache.tokens == 100


def test_retracted_requests_come_back_before_anything_new_is_taken_in() -> None:
    servers = Servers(
        p={"role": Role.PREFILL},
        d={"role": Role.DECODE, "kv_tokens": 300, "reserved_decode_tokens": 1},
    )
    old = [
        servers.pair(f"old{i}", room=i, prompt=prompt(80, 1000 * i), max_new_tokens=120)
        for i in (1, 2, 3)
    ]
    new_at = 0.5
    news = []
    servers.clock.call_at(
        new_at,
        lambda: news.append(servers.pair("new", room=9, prompt=prompt(80, 9000), max_new_tokens=2)),
    )
    servers.run(until=0.45)
    assert servers["d"].machine.counters.retractions > 0
    assert servers["d"].loads()["queues"]["retracted"] > 0
    servers.run()
    assert all(decode.reason["type"] != "abort" for _, decode in [*old, *news])
    assert news[0][1].tokens_at[0] > min(decode.ended_at for _, decode in old)


def test_what_waits_for_memory_gets_what_an_answer_of_one_token_leaves() -> None:
    servers = pd(kv_tokens=150, reserved_decode_tokens=0)
    first = servers.pair("a", room=1, prompt=prompt(100), max_new_tokens=1)
    second = servers.pair("b", room=2, prompt=prompt(100, 5000), max_new_tokens=1)
    servers.run()
    assert [leg.reason["type"] for leg in (*first, *second)] == ["length"] * 4


def test_without_a_backup_a_retracted_request_is_answered_503() -> None:
    servers = Servers(
        p={"role": Role.PREFILL},
        d={
            "role": Role.DECODE,
            "kv_tokens": 300,
            "reserved_decode_tokens": 1,
            "retraction_backup": False,
        },
    )
    legs = [
        servers.pair(f"r{i}", room=i, prompt=prompt(90, 1000 * i), max_new_tokens=120)[1]
        for i in (1, 2, 3)
    ]
    servers.run()
    codes = [leg.reason.get("status_code") for leg in legs]
    assert 503 in codes
    assert None in codes
