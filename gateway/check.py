"""`slackwater check`: asks every server of a configuration whether it fits, before users do."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, default=Path("config.toml"), metavar="FILE")


def run_check(given: argparse.Namespace) -> int:
    return 0
