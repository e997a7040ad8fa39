"""The first that runs beside the gateway: an interpreter without Ray says so in one line."""

from __future__ import annotations

import importlib
import json
import sys


def main(argv: list[str]) -> None:
    try:
        owner = importlib.import_module("backends.ray.owner")
    except ModuleNotFoundError as error:
        why = f"{sys.executable} has no {error.name}: pip install 'slackwater[ray]' there"
        sys.stdout.write(json.dumps({"event": "lost", "why": why}) + "\n")
        return
    owner.main(argv)
