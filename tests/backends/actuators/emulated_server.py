"""Stands in for `sglang.launch_server`: an emulated server that takes its flags; fails on cue."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

from backends.emulator.command import serve
from backends.emulator.fleet import ServerSpec
from backends.engine import EngineConfig
from policies.types import Role


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host")
    parser.add_argument("--port", type=int)
    parser.add_argument("--disaggregation-mode", type=Role)
    parser.add_argument("--disaggregation-bootstrap-port", type=int)
    parser.add_argument("--die-as", type=Role)
    parser.add_argument("--hang-as", type=Role)
    given = parser.parse_args(argv)
    role = given.disaggregation_mode
    if role is given.die_as:
        raise SystemExit("weights do not fit")
    if role is given.hang_as:
        time.sleep(600)
    engine = EngineConfig(name="emulated", role=role)
    bootstrap_port = given.disaggregation_bootstrap_port
    spec = ServerSpec(
        engine=engine, port=given.port, bootstrap_port=bootstrap_port, host=given.host
    )
    asyncio.run(serve([spec], lambda loop: loop))


if __name__ == "__main__":
    main(sys.argv[1:])
