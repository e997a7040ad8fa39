"""What a configuration lacks for its actuator: `check` and `serve` refuse it with one line."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from backends.actuators.settings import Webhook
from gateway import actuator_demands
from gateway.__main__ import main
from gateway.actuation import Actuation
from gateway.config import Cost, RatioSettings
from gateway.settings import ConfigError
from policies.types import Role
from tests.documents import ROOT
from tests.gateway.actuated import FOUR, by, switched
from tests.gateway.gateway_under_test import standing

KUBERNETES = 'kubernetes = { prefill = "p", decode = "d", kubeconfig = "/nowhere/config" }'
LACKING = [
    ('actuator = "webhook"', "ratio.webhook.url is missing"),
    (
        'actuator = "webhook"\nwebhook = { url = "switcher:80" }',
        "ratio.webhook.url must be http://HOST:PORT/PATH, got 'switcher:80'",
    ),
    (
        'actuator = "webhook"\nwebhook = { url = "http://switcher:port" }',
        "ratio.webhook.url: Port could not be cast to integer value as 'port'",
    ),
    (
        'actuator = "kubernetes"',
        "ratio.kubernetes.prefill and ratio.kubernetes.decode are missing",
    ),
    (
        'actuator = "kubernetes"\nkubernetes = { prefill = "a", decode = "a" }',
        "ratio.kubernetes.prefill and ratio.kubernetes.decode are both 'a': "
        "each role has a workload of its own",
    ),
    (
        f'actuator = "kubernetes"\n{KUBERNETES}',
        "ratio.kubernetes.kubeconfig: there is no file /nowhere/config",
    ),
    ('actuator = "ray"', "ratio.ray.command is missing"),
    (
        'actuator = "ray"\nray = { command = "python3 -m \'sglang" }',
        "ratio.ray.command: no closing quotation",
    ),
    (
        'actuator = "relaunch"',
        'ratio.actuator "relaunch" needs a fleet: `slackwater serve --fleet FLEET.toml`, or '
        "ratio.relaunch.control and `slackwater fleet --control SOCKET`",
    ),
]


def written(path: Path, ratio: str, policy: str = "dopd+") -> Path:
    file = path / "config.toml"
    file.write_text(
        '[server]\nport = 0\n[cost]\nmodel = "Llama-3.1-8B"\ndevice = "h100"\n'
        f'[ratio]\npolicy = "{policy}"\n{ratio}\n'
        '[[worker]]\nurl = "http://127.0.0.1:1"\nrole = "decode"\n'
    )
    return file


@pytest.mark.parametrize(("ratio", "line"), LACKING)
def test_check_refuses_what_serve_refuses_with_the_same_line(
    ratio: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(written(tmp_path, ratio))
    for command in ("check", "serve"):
        assert main([command, "--config", config]) == 2
        assert capsys.readouterr().err == f"slackwater: {line}\n"


@pytest.mark.parametrize(("actuator", "module"), [("ray", "ray"), ("kubernetes", "kubernetes")])
def test_an_extra_that_is_not_installed_is_named_with_its_command(
    actuator: str,
    module: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(actuator_demands, "find_spec", lambda _: None)
    more = 'ray = { command = "serve" }' if actuator == "ray" else KUBERNETES
    config = str(written(tmp_path, f'actuator = "{actuator}"\n{more}'))
    for command in ("check", "serve"):
        assert main([command, "--config", config]) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert module in told
        assert f"pip install 'slackwater[{actuator}]'" in told


def test_a_cluster_that_is_not_there_ends_a_check_as_it_ends_serve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its servers would not be known."""
    workloads = 'actuator = "kubernetes"\nkubernetes = { prefill = "p", decode = "d" }'
    config = str(written(tmp_path, workloads))
    assert main(["check", "--config", config]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    words = [sys.executable, "-m", "gateway", "serve", "--config", config]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (2, told)
    assert told.startswith("slackwater: no way to the Kubernetes API: ")


def test_what_only_a_change_would_need_is_not_asked_of_a_static_fleet() -> None:
    for actuator in (Actuation.WEBHOOK, Actuation.RELAUNCH):
        actuator_demands.demand(RatioSettings(actuator=actuator), has_fleet=False)
        with pytest.raises(ConfigError):
            actuator_demands.demand(
                RatioSettings(actuator=actuator, policy="dopd+"), has_fleet=False
            )
    for actuator in (Actuation.KUBERNETES, Actuation.RAY):
        with pytest.raises(ConfigError):
            actuator_demands.demand(RatioSettings(actuator=actuator), has_fleet=False)


async def test_who_asks_an_actuator_that_lacks_something_is_told_what() -> None:
    ratio = by(Actuation.WEBHOOK)
    async with standing(FOUR, ratio=ratio) as site:
        why = "ratio.webhook.url is missing"
        assert await switched(site, "d2", Role.PREFILL) == [("failed", why)]
        cost = Cost(model="Llama-3.1-8B", device="h100")
        hooked = replace(ratio, policy="dopd+", webhook=Webhook(url="http://127.0.0.1:9/"))
        config = replace(site.config, cost=cost, ratio=hooked)
        with pytest.raises(ConfigError, match=why):
            site.gateway.adopt(config)
