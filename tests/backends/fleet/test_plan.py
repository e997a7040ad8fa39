from __future__ import annotations

import socket
import tomllib
from dataclasses import replace

import pytest

from backends.fleet.plan import planned
from backends.fleet.spec import Device, FleetError, FleetSpec, Group
from policies.types import Pool, Role


def option(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_every_port_of_a_fleet_is_its_own() -> None:
    servers = planned(FleetSpec(), "/models/tiny")
    ports = [server.port for server in servers]
    bootstrap = [server.bootstrap_port for server in servers if server.bootstrap_port]
    assert len(bootstrap) == 3
    assert len({*ports, *bootstrap}) == 7


def test_each_role_gets_its_flags() -> None:
    prefill, decode, _, unified = planned(FleetSpec(), "/models/tiny")
    assert option(prefill.argv, "--disaggregation-mode") == "prefill"
    assert option(decode.argv, "--disaggregation-mode") == "decode"
    assert option(decode.argv, "--disaggregation-bootstrap-port") == str(decode.bootstrap_port)
    assert "--enable-pd-role-switch" in prefill.argv
    assert not any("disaggregation" in flag for flag in unified.argv)


def test_a_gpu_fleet_gets_no_cpu_flags_and_its_own_gpus() -> None:
    group = Group(role=Role.DECODE, count=2, gpus=("0", "1"), flags=("--tp", "1"))
    servers = planned(FleetSpec(device=Device.CUDA, servers=(group,)), "org/model")
    assert not {"--device", "--attention-backend"} & set(servers[0].argv)
    assert [server.env["CUDA_VISIBLE_DEVICES"] for server in servers] == ["0", "1"]
    assert option(servers[0].argv, "--tp") == "1"


def test_the_worker_tables_read_back() -> None:
    servers = planned(FleetSpec(), "/models/tiny")
    workers = tomllib.loads("\n".join(server.worker_table() for server in servers))["worker"]
    assert [worker["name"] for worker in workers] == [server.name for server in servers]
    assert workers[1] == {
        "name": "decode-0",
        "url": f"http://127.0.0.1:{servers[1].port}",
        "role": "decode",
        "pool": Pool.STRICT,
        "bootstrap_port": servers[1].bootstrap_port,
    }
    assert "bootstrap_port" not in workers[3]


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        spec = FleetSpec(servers=(Group(role=Role.UNIFIED, port=port),))
        with pytest.raises(FleetError, match=f"port {port} is in use"):
            planned(spec, "/models/tiny")


def test_a_port_given_twice_is_named() -> None:
    group = Group(role=Role.UNIFIED, port=28_999)
    with pytest.raises(FleetError, match="port 28999 is given to two servers"):
        planned(replace(FleetSpec(), servers=(group, group)), "/models/tiny")
