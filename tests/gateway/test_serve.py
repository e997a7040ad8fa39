from __future__ import annotations

import argparse
import socket
from pathlib import Path
from random import Random

import pytest
import structlog

from backends.fleet import interpreter
from backends.fleet.spec import FleetSpec
from gateway import serve
from gateway.__main__ import main
from gateway.config import Config, WorkerEntry
from gateway.settings import ConfigError
from policies.clock import VirtualClock
from policies.types import Pool, Role


def configured(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.configuration(parser.parse_args(words))


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_default_configuration() -> None:
    assert configured() == Config()


def test_the_words_of_sglangs_router_make_the_same_fleet_here() -> None:
    config = configured(
        *("--pd-disaggregation", "--host", "0.0.0.0", "--port", "8000", "--policy", "round_robin"),
        *("--prefill", "http://p1:30000", "9001", "--prefill", "http://p2:30000", "none"),
        *("--decode", "http://d1:30000", "--decode", "http://d2:30000"),
    )
    assert [(w.url, w.role, w.bootstrap_port) for w in config.worker] == [
        ("http://p1:30000", Role.PREFILL, 9001),
        ("http://p2:30000", Role.PREFILL, 0),
        ("http://d1:30000", Role.DECODE, 0),
        ("http://d2:30000", Role.DECODE, 0),
    ]
    assert (config.server.host, config.server.port) == ("0.0.0.0", 8000)
    assert config.policies.place == "round-robin"


def test_worker_urls_are_unified_servers_of_the_strict_pool() -> None:
    workers = configured("--worker-urls", "http://a:1", "http://b:2").worker
    assert [(w.role, w.pool) for w in workers] == [(Role.UNIFIED, Pool.STRICT)] * 2


def test_a_key_goes_to_every_server_that_a_flag_names() -> None:
    words = ("--prefill", "http://p:1", "--decode", "http://d:1", "--worker-urls", "http://u:1")
    assert {w.api_key for w in configured(*words, "--api-key", "secret").worker} == {"secret"}


@pytest.mark.parametrize("values", [("8998", "8999"), ("port",), ("-",)])
def test_a_prefill_with_anything_but_one_port_is_refused(values: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--prefill takes a URL and at most one port"):
        configured("--prefill", "http://p:1", *values)


@pytest.mark.parametrize(
    ("given", "place"),
    [
        ("cache_aware", "cache-aware"),
        ("power_of_two", "power-of-two"),
        ("round_robin", "round-robin"),
        ("random", "power-of-two"),
        ("round-robin", "round-robin"),
        ("least_work", "least-work"),
    ],
)
def test_a_policy_goes_by_our_name_and_by_the_routers(given: str, place: str) -> None:
    assert configured("--policy", given).policies.place == place


@pytest.mark.parametrize("given", ["manual", "cache-awareness", ""])
def test_an_unknown_policy_is_refused_with_the_known_ones(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--policy: .* is not known.*cache-aware.*cache_aware"):
        configured("--policy", given)


def told_of(*words: str) -> list[dict[str, object]]:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    with structlog.testing.capture_logs() as lines:
        serve._say_flags(parser.parse_args(words))
    return [dict(line) for line in lines]


def test_flags_of_the_router_that_do_nothing_here_are_said_in_one_line() -> None:
    words = ("--prometheus-port", "29000", "--prefill-policy", "random", "--decode", "http://d:1")
    (line,) = told_of(*words)
    assert line["flags"] == ["--prefill-policy", "--prometheus-port"]
    assert told_of("--decode", "http://d:1", "--policy", "cache_aware") == []


def test_a_policy_that_stands_in_for_another_is_said() -> None:
    (line,) = told_of("--policy", "random")
    assert (line["asked"], line["policy"]) == ("random", "power-of-two")


def test_the_routers_word_for_a_level_is_understood() -> None:
    assert configured("--log-level", "warn").log.level == "warning"


def test_a_flag_that_nobody_knows_is_refused_with_the_usage_of_its_command(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serve", "--service-discovery"])
    told = capsys.readouterr().err
    assert told.startswith("usage: slackwater serve ")
    assert "unrecognized arguments: --service-discovery" in told


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        '[server]\nhost = "::1"\nport = 1\n[log]\nlevel = "error"\n[timeouts]\ntotal_s = 5.0\n'
        '[[worker]]\nurl = "http://file:1"\n',
    )
    config = configured(
        *("--config", path, "--port", "2", "--log-level", "debug"),
        *("--request-timeout-secs", "9", "--worker-urls", "http://flag:1"),
    )
    assert (config.server.host, config.server.port, config.log.level) == ("::1", 2, "debug")
    assert config.timeouts.total_s == 9.0
    assert [worker.url for worker in config.worker] == ["http://flag:1"]


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--port", "99999", "server.port must be at most 65535"),
        ("--port", "-1", "server.port must be at least 0"),
        ("--request-timeout-secs", "0", "timeouts.total_s must be at least 0.01"),
    ],
)
def test_a_flag_has_the_limits_of_its_key(flag: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(flag, value)


@pytest.mark.parametrize("flag", ["--prefill", "--decode", "--worker-urls"])
def test_an_address_that_is_none_is_told_of_by_its_flag(flag: str) -> None:
    with pytest.raises(ConfigError) as refused:
        configured("--worker-urls", "http://fine:1", flag, "ftp://a:1")
    assert str(refused.value) == f"{flag} must be http://HOST:PORT, got 'ftp://a:1'"


def test_two_flags_that_name_one_server_are_refused() -> None:
    with pytest.raises(ConfigError, match="two workers are called d:1"):
        configured("--decode", "http://d:1", "--decode", "http://d:1")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[policies]\norder = 'best'", "policies.order must be one of ['edf', 'fcfs', 'hrrn',"),
        ("[server]\nprot = 1", "unknown key server.prot, expected one of ['admin_key',"),
        ("[limits]\nmax_queued = 0", "limits.max_queued must be at least 1, got 0"),
    ],
)
def test_a_mistake_in_the_file_ends_the_start_with_2_and_names_the_key(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "--config", written(tmp_path, text)]) == 2
    assert words in capsys.readouterr().err


def test_a_file_that_is_not_there_ends_the_start_with_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["serve", "--config", "/nowhere/config.toml"]) == 2
    assert "cannot read /nowhere/config.toml: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "check", "emulate", "fleet", "predict", "calibrate"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    assert f"usage: slackwater {command}" in capsys.readouterr().out


EMULATED = (WorkerEntry(url="http://127.0.0.1:1", name="made-up"),)
A_SERVER = '[[worker]]\nurl = "http://file:1"\n'


def given(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("text", "urls", "is_emulated"),
    [("", ["http://127.0.0.1:1"], True), (A_SERVER, ["http://file:1"], False)],
)
def test_the_emulated_servers_stand_in_for_as_long_as_the_file_names_none(
    text: str, urls: list[str], *, is_emulated: bool, tmp_path: Path
) -> None:
    reading = serve._read_or_emulate(given("--config", written(tmp_path, text)), EMULATED)
    assert [worker.url for worker in reading.config.worker] == urls
    assert reading.is_emulated is is_emulated


@pytest.mark.parametrize(("text", "hidden"), [("", False), (A_SERVER, True)])
def test_flags_that_hide_the_files_servers_are_told_of(
    text: str, *, hidden: bool, tmp_path: Path
) -> None:
    words = ("--config", written(tmp_path, text), "--worker-urls", "http://flag:1")
    assert serve._read(given(*words)).flags_hide_workers is hidden


async def test_a_taken_address_is_told_before_a_fleet_is_started() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        fleet = FleetSpec(model="/nowhere")  # that would be told next
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            await serve._run_over_fleet(given("--port", port), fleet, VirtualClock(), Random(1))


@pytest.mark.parametrize("words", [["fleet"], ["serve", "--port", "0", "--fleet"]])
def test_a_fleet_that_cannot_be_started_ends_every_command_with_the_same_status(
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.collector.run_rarely", lambda: None)
    monkeypatch.setattr(interpreter, "missing_library", lambda: None)
    fleet = tmp_path / "fleet.toml"
    fleet.write_text(f'model = "{tmp_path}/absent"\n')
    assert main([*words, str(fleet)]) == 2
    assert f"{tmp_path}/absent" in capsys.readouterr().err


def test_a_started_fleet_stands_beside_the_servers_of_the_file(tmp_path: Path) -> None:
    reading = serve._read_beside(given("--config", written(tmp_path, A_SERVER)), EMULATED)
    assert [worker.url for worker in reading.config.worker] == [
        "http://127.0.0.1:1",
        "http://file:1",
    ]
