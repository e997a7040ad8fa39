"""Stands in for `sglang.launch_server`: an emulated server that takes its flags; fails on cue."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

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
    parser.add_argument("--moods", type=Path)
    given = parser.parse_args(argv)
    role = given.disaggregation_mode
    mood = json.loads(given.moods.read_text()).get(role.value, "well")
    if mood == "dies":
        raise SystemExit("weights do not fit")
    if mood == "hangs":
        time.sleep(600)
    engine = EngineConfig(name="emulated", role=role)
    bootstrap_port = given.disaggregation_bootstrap_port
    spec = ServerSpec(
        engine=engine, port=given.port, bootstrap_port=bootstrap_port, host=given.host
    )
    asyncio.run(serve([spec], lambda loop: loop))


if __name__ == "__main__":
    main(sys.argv[1:])
