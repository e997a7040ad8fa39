from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from gateway.config import RatioSettings
from gateway.simulate import add_arguments, run_simulate
from gateway.simulation.moves import MOST_TOLD, Moved, idle_note, move_note
from tests.gateway.simulation.test_simulate import SCENARIO

SWITCHING = """
name = "answers"
seeds = [1]
duration_s = 40.0
[[fleet]]
server = [
    { role = "prefill", kv_tokens = 6000, count = 3 },
    { role = "decode", kv_tokens = 6000 },
]
[[workload]]
name = "chat"
rate = 15.0
input_median = 200
input_max = 2000
output_median = 300.0
output_max = 400
ttft_ms = 500.0
tpot_ms = 9.0
[[policy]]
name = "acts"
cost = { model = "Llama-3.1-8B", device = "h100" }
ratio = { policy = "dopd+", mode = "act", interval_s = 5.0, lease_s = 60.0 }
"""


def simulated(path: Path, *flags: str) -> str:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    out = Console(file=io.StringIO(), width=400)
    words = [str(path), "--quiet", "--processes", "1", *flags]
    assert run_simulate(parser.parse_args(words), out) == 0
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def test_a_run_tells_who_was_switched_when_and_what_did_nothing(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SWITCHING)
    answer: dict[str, Any] = json.loads(simulated(path, "--json"))
    (run,) = answer["runs"]
    done = [it for it in run["switches"] if it["outcome"] == "done"]
    assert len(done) == run["switched"] > 0
    assert all(it["role"] == "decode" and 0 < it["began_s"] < 60 for it in done)
    (moved,) = [note for note in answer["notes"] if note.startswith("switches of acts (load 1")]
    assert f"{done[0]['began_s']:.0f} s {done[0]['worker']} becomes decode in " in moved
    assert "settings of acts that do nothing in a simulation: ratio.lease_s" in answer["notes"]


def test_a_run_without_a_controller_tells_of_no_switches(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    assert "switches of" not in simulated(path)


def test_a_long_list_is_cut_and_says_so() -> None:
    moved = Moved(began_s=3.0, worker="d1", role="", outcome="not_empty_in_time", took_s=1.0)
    (note,) = move_note("x", [moved] * (MOST_TOLD + 2))
    assert note.count("3 s d1 is given back in 1.0 s (not_empty_in_time)") == MOST_TOLD
    assert note.endswith("; and 2 more")
    assert [*idle_note("x", RatioSettings(policy="dopd+", band=0.5))] == []
