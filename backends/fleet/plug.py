"""How a server finds the plug-in where the interpreter that has SGLang does not have ours."""

from __future__ import annotations

import os
from pathlib import Path

from backends.fleet.interpreter import ROOT

NAME = "slackwater"
PACKAGES = ("backends", "policies")
ENTRY_POINTS = """[sglang.srt.plugins]
slackwater = backends.sglang_plugin:register
"""
METADATA = """Metadata-Version: 2.1
Name: slackwater
Version: 0
"""


def offered(folder: Path) -> dict[str, str]:
    """The environment of a server that loads it; the folder holds links and a distribution's name.

    What else lies beside our packages is not for SGLang's interpreter.
    """
    info = folder / f"{NAME}-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(METADATA)
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    for package in PACKAGES:
        link = folder / package
        if not link.exists():
            link.unlink(missing_ok=True)
            link.symlink_to(Path(ROOT) / package, target_is_directory=True)
    told = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"SGLANG_PLUGINS": NAME, "PYTHONPATH": os.pathsep.join(told)}
