"""What operators apply names only what the gateway has."""

from __future__ import annotations

import asyncio
import json
import re
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from backends.actuators.kubernetes import rights_of, workloads_of
from backends.kubernetes.api import Api
from gateway.config import Config, check, workers_of
from gateway.errors import Code
from gateway.planning import Mode
from gateway.settings import decode
from policies.events import SwitchWanted
from policies.types import Role
from tests.documents import ROOT
from tests.gateway.gateway_under_test import OFFLINE, UNIFIED, chat, standing
from tests.gateway.test_live_switching import BUSY_PREFILLS, answers, controlled

DEPLOY = ROOT / "deploy"
FILES = sorted(path for path in DEPLOY.iterdir() if path.is_file())
KUBERNETES = (DEPLOY / "kubernetes.yaml").read_text()
SCALING = (DEPLOY / "kubernetes-ratio.yaml").read_text()


async def test_every_metric_named_in_deploy_stands_on_the_metrics_page() -> None:
    async with standing(UNIFIED) as site:
        await site.ask("/v1/chat/completions", chat(4, stream=True))
        await site.ask("/v1/chat/completions", chat(4, stream=True), OFFLINE)
        page = (await site.get("/metrics")).raw.decode()
    async with standing(BUSY_PREFILLS, **controlled(Mode.ACT)) as site:
        await answers(site, 60, 30, 0.1)
        site.gateway.driver.post(SwitchWanted("p3", Role.DECODE, "asked for"))
        await asyncio.sleep(5.0)
        page += (await site.get("/metrics")).raw.decode()
    shown = set(re.findall(r"^(slackwater_\w+)", page, re.MULTILINE))
    named = {n for path in FILES for n in re.findall(r"slackwater_[a-z_]+", path.read_text())}
    assert len(named) > 10
    assert named - shown == {"slackwater_retries_total"}  # nothing had to be tried again
    assert "# TYPE slackwater_retries_total counter" in page


def test_the_outcomes_that_alerts_look_for_are_codes() -> None:
    found = re.findall(r'outcome=~"([^"]+)"', (DEPLOY / "alerts.yml").read_text())
    outcomes = {name for group in found for name in group.split("|")}
    assert len(outcomes) > 5
    assert outcomes - {code.value for code in Code} == set()


def test_the_dashboard_is_json_and_each_panel_asks_for_something() -> None:
    panels = json.loads((DEPLOY / "grafana.json").read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(target["expr"] for panel in panels for target in panel["targets"])


def test_the_configuration_in_the_kubernetes_manifest_is_valid() -> None:
    block = KUBERNETES.split("config.toml: |\n")[1].split("\n---")[0]
    config = decode(Config, tomllib.loads(block.replace("\n    ", "\n").removeprefix("    ")))
    assert len(workers_of(config)) == 3
    grace = re.search(r"terminationGracePeriodSeconds: (\d+)", KUBERNETES)
    assert grace is not None
    assert int(grace[1]) > config.server.drain_s


def test_the_example_that_scales_has_the_rights_that_are_asked_for_and_no_others() -> None:
    block = SCALING.split("config.toml: |\n")[1].split("\n---")[0]
    config = check(decode(Config, tomllib.loads(textwrap.dedent(block))))
    told = config.ratio.kubernetes
    assert f"name: {told.prefill}\n" in SCALING
    assert f"name: {told.decode}\n" in SCALING
    api = cast(Api, SimpleNamespace(namespace=""))
    wanted = {(verb, group, name) for verb, group, name in rights_of(workloads_of(told, api))}
    rules = re.findall(
        r"^  - \{apiGroups: \[(.*)\], resources: \[(.*)\], verbs: \[(.*)\]\}", SCALING, re.MULTILINE
    )
    granted = {
        (verb, group.strip('"'), name) for group, name, verbs in rules for verb in verbs.split(", ")
    }
    assert granted == wanted


async def test_the_probes_ask_for_pages_that_there_are() -> None:
    paths = set(re.findall(r"httpGet: \{path: (\S+),", KUBERNETES))
    async with standing(UNIFIED) as site:
        answers = {path: (await site.get(path)).status for path in paths}
    assert answers == {"/liveness": 200, "/readiness": 200}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_commands_in_deploy_use_flags_that_there_are(path: Path) -> None:
    used = re.findall(r'(?:slackwater (?:serve|check)|CMD \["serve")[^\n]*', path.read_text())
    flags = {flag for line in used for flag in re.findall(r"--[a-z-]+", line)}
    assert flags <= {"--config", "--host", "--timeout-s"}


def test_a_service_may_take_longer_to_stop_than_it_drains() -> None:
    unit = (DEPLOY / "slackwater.service").read_text()
    found = re.search(r"TimeoutStopSec=(\d+)", unit)
    assert found is not None
    assert int(found[1]) > Config().server.drain_s
