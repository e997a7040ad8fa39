"""What README.md, config.toml and .ci/run say is what the code does."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.actuators.sglang import SglangTurn
from gateway import serve
from gateway.app import Gateway
from gateway.config import Config, load, workers_of
from gateway.core import Core, Rules
from gateway.metrics import Metrics
from gateway.ratio_control import RatioControl
from gateway.settings import decode
from policies.clock import VirtualClock
from policies.registry import DISPLACE, GATHER, HOLD, ORDER, PLACE, POOLS, PREEMPT, RATIO
from policies.types import Kind
from tests import documents
from tests.documents import CONFIG, EXAMPLE, README, ROOT, between, rows
from tests.gateway.gateway_under_test import UNIFIED, completion, standing

TEXT = README.read_text()
CI = (ROOT / ".ci" / "run").read_text()
REFRESH = "run: make documents"


def section(title: str) -> str:
    return TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(language: str, text: str = TEXT) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def code_names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# Tables.


def test_the_options_are_those_of_the_code() -> None:
    assert between(TEXT, "options") == documents.options_table(), REFRESH


def test_every_option_says_what_it_means() -> None:
    keys = [option.key for option in documents.options()]
    assert [option.key for option in documents.options() if not option.meaning] == []
    assert documents.plain_keys() <= set(keys)


def test_config_toml_is_the_default_configuration_with_every_key() -> None:
    assert CONFIG.read_text() == documents.config_text(), REFRESH
    assert load(CONFIG) == Config()


def test_the_example_in_config_toml_is_a_fleet_once_its_comments_are_taken_away() -> None:
    plain = "\n".join(line.removeprefix("# ") for line in EXAMPLE.split("\n\n", 1)[1].splitlines())
    plain = "\n".join(line for line in plain.splitlines() if re.match(r"\[|\w+ = ", line))
    config = decode(Config, tomllib.loads(plain))
    assert [worker.role.value for worker in workers_of(config)] == ["prefill", "decode", "decode"]
    assert [key.kind for key in config.key] == [Kind.ONLINE, Kind.OFFLINE]


def test_the_policies_are_those_of_the_registries() -> None:
    told = {tuple(code_names(" ".join(row[:2]))) for row in rows(section("Policies"))}
    known: dict[str, Iterable[str]] = {
        "order": ORDER,
        "displace": DISPLACE,
        "gather": GATHER,
        "hold": HOLD,
        "place": PLACE,
        "pools": POOLS,
        "preempt": PREEMPT,
    }
    keys = {(f"policies.{key}", name) for key, names in known.items() for name in names}
    assert told == keys | {("ratio.policy", name) for name in RATIO}


def test_the_metrics_are_those_of_the_gateway() -> None:
    core, clock = Core(Rules()), VirtualClock()
    control = RatioControl(core, clock, asyncio.TaskGroup(), SglangTurn(clock))
    families = [*Metrics(core, lambda: 0).registry.collect(), *control.collect()]
    names = {f.name + ("_total" if f.type == "counter" else "") for f in families}
    assert {code_names(row[0])[0] for row in rows(section("Metrics"))} == names


async def test_the_log_fields_are_those_of_a_request() -> None:
    async with standing(UNIFIED) as site:
        await site.ask("/v1/completions", completion(2))
    fields = set(site.lines[0]) - {"event", "level"}
    assert {name for row in rows(section("The log")) for name in code_names(row[0])} == fields


async def test_every_route_is_told() -> None:
    async with standing(UNIFIED) as site:
        gateway: Gateway = site.gateway
        pages = gateway.pages()
        paths = {path for _, path, _ in [*gateway.front.routes(), *pages.routes()]}
    told = set(re.findall(r"`(?:GET |POST |DELETE )?(/[a-zA-Z0-9_/]+)", section("Endpoints")))
    assert {path.removesuffix("/*") for path in paths} - told == set()


def test_the_flags_are_those_of_serve() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    serve.add_arguments(parser)
    flags = {action.option_strings[0] for action in parser._actions}
    told = re.findall(r"(--[a-z-]+)", "".join(row[0] for row in rows(section_of_flags())))
    assert set(told) == flags


def section_of_flags() -> str:
    table = section("Put it in front of your servers")
    return table[table.index("| flag |") :]


# Commands.


def test_ci_runs_the_commands_that_the_readme_names_for_testing_and_building() -> None:
    testing = blocks("sh", section("Test it"))
    building = blocks("sh", section("Put it in front of your servers"))
    assert len(testing) == 4
    assert [line for line in testing + building if line.strip() not in CI] == []


def test_the_command_that_runs_the_gateway_is_the_one_that_ci_starts() -> None:
    install = blocks("sh", section("Run it"))[0].strip()
    assert install.endswith(".venv/bin/slackwater serve")
    assert '.venv/bin/slackwater serve --port "$PORT"' in CI


@contextmanager
def serving(*flags: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`slackwater serve` with its emulated servers, and where it listens."""
    command = [sys.executable, "-m", "gateway", "serve", "--port", "0", *flags]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = (json.loads(line) for line in process.stderr if line.startswith("{"))
            port = next(line["port"] for line in lines if line["event"] == "listening")
            yield f"127.0.0.1:{port}", process
        finally:
            process.terminate()
            process.stderr.close()


def curl(command: str, address: str) -> tuple[dict[str, str], str]:
    """What curl would do with these words; a fresh machine may not have it."""
    words = shlex.split(command.split("|")[0].split("#")[0].replace("127.0.0.1:30000", address))
    url = next(word for word in words if word.startswith("http"))
    body = words[words.index("-d") + 1].encode()
    with urllib.request.urlopen(urllib.request.Request(url, body), timeout=20) as answer:
        return dict(answer.headers), answer.read().decode()


def test_curl_and_the_official_client_get_what_the_readme_promises() -> None:
    with serving() as (address, process):
        _, stream = curl(blocks("sh", section("Run it"))[1], address)
        script = blocks("python", section("Run it"))[0].replace("127.0.0.1:30000", address)
        answer = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=40
        )
    assert stream.rstrip().endswith("data: [DONE]")
    assert process.returncode == 0
    whole, streamed = answer.stdout.split("\n")
    assert whole == streamed
    assert len(whole) > 16


def test_a_policy_changed_in_the_file_acts_at_once(tmp_path: Path) -> None:
    block = blocks("", section("Policies"))[1]
    commands = [line.split("  #")[0].strip() for line in block.splitlines()]
    before, after = (line for line in commands if line.startswith("curl"))
    edit = next(line for line in commands if line.startswith("sed"))
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.read_text())
    with serving("--config", str(config)) as (address, process):
        first, _ = curl(before, address)
        _, old, new, _ = shlex.split(edit)[2].split("/")
        config.write_text(re.sub(old, new, config.read_text(), flags=re.MULTILINE))
        assert process.stderr is not None
        next(line for line in process.stderr if "configuration reloaded" in line)
        second, _ = curl(after, address)
    workers = [headers["x-slackwater-worker"] for headers in (first, second)]
    assert workers == ["prefill-1,decode-strict", "prefill-1,decode-relaxed"]
    assert all(pair in section("Policies") for pair in workers)
