"""What is seen of the plug-in, and that docs/engine-plugin.md says what it means."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from backends.engine_words import Heard, states_of
from backends.sglang_plugin.control import HELD, KEYS, PREFIX
from backends.sglang_plugin.plugin import Options, Plugin
from gateway.engine_gauges import EngineGauges
from tests.documents import ROOT, rows

TEXT = (ROOT / "docs" / "engine-plugin.md").read_text()


def section(title: str) -> str:
    return TEXT.split(f"\n### {title}\n")[1].split("\n## ")[0].split("\n### ")[0]


def names(title: str) -> set[str]:
    return {row[0].strip("`") for row in rows(section(title))}


def heard(**counts: object) -> Heard:
    """Of a server of two ranks that say the same."""
    told = states_of({"internal_states": [{"slackwater": {"mode": "slack", **counts}}] * 2})
    assert told is not None
    return told


def test_what_a_server_said_of_itself_is_seen() -> None:
    registry = CollectorRegistry()
    registry.register(EngineGauges({"w": heard(views=3, parked=1, displaced=2, aside=1)}))
    lines = generate_latest(registry).decode().splitlines()
    for line in (
        'slackwater_worker_engine_mode{mode="slack",worker="w"} 1.0',
        'slackwater_worker_engine_views_total{worker="w"} 6.0',
        'slackwater_worker_engine_parked{worker="w"} 2.0',
        'slackwater_worker_engine_displaced_total{worker="w"} 4.0',
        'slackwater_worker_engine_aside{worker="w"} 2.0',
    ):
        assert line in lines


def test_counts_that_make_no_sense_are_none() -> None:
    odd = heard(views=-1, parked="3", displaced=True)
    assert (odd.views, odd.parked, odd.displaced) == (0, 0, 0)


def test_the_metrics_of_engines_are_told() -> None:
    families = EngineGauges({}).collect()
    told = {one.name + ("_total" if one.type == "counter" else "") for one in families}
    assert names("Metrics") == told | {"slackwater_worker_engine"}


def test_each_field_of_the_state_is_told() -> None:
    assert names("The state in /server_info") == set(Plugin(Options(), {}, lambda: 0.0).state())


def test_each_setting_that_a_server_takes_is_told() -> None:
    drill = {PREFIX + name for name in ("share", *HELD)}
    assert names("Settings") == set(KEYS) - drill
