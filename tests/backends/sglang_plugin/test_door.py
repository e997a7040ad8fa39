"""What the plug-in checks before it hooks anything, and that it does nothing unasked."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from backends.sglang_plugin import door
from backends.sglang_plugin.plugin import Options, Plugin
from backends.sglang_plugin.targets import BATCH, CONTROL, NEEDS, SCHEDULER, Feature, unfit, why_not
from tests.test_architecture import ROOT

FITTING = {
    "tp_size": 1,
    "pp_size": 1,
    "attn_cp_size": 1,
    "enable_dp_attention": False,
    "speculative_algorithm": None,
    "enable_pdmux": False,
    "enable_two_batch_overlap": False,
    "enable_lora": None,
    "enable_hisparse": False,
    "enable_hierarchical_cache": False,
    "enable_lmcache": False,
    "dllm_algorithm": None,
    "disaggregation_decode_enable_radix_cache": False,
    "disable_overlap_schedule": True,
    "disaggregation_mode": "null",
}


def sglang(need: Any) -> dict[str, Any]:
    """Targets as the feature wants them."""
    targets: dict[str, Any] = {}
    for target, names in need.parameters.items():
        scope: dict[str, Any] = {}
        exec(f"def target({', '.join(names)}): ...", scope)
        targets[target] = scope["target"]
    for target, names in need.fields.items():
        targets[target] = SimpleNamespace(__dataclass_fields__=dict.fromkeys(names))
    return targets


def missing(targets: dict[str, Any]) -> Any:
    def resolve(name: str) -> Any:
        if name not in targets:
            raise AttributeError(name)
        return targets[name]

    return resolve


@pytest.mark.parametrize("feature", Feature)
def test_a_feature_is_on_where_all_is_as_it_was_tested(feature: Feature) -> None:
    need = NEEDS[feature]
    assert why_not(need, "0.5.23", untested=False, resolve=missing(sglang(need))) == ""


@pytest.mark.parametrize("feature", Feature)
def test_a_target_that_is_gone_or_takes_something_else_is_named(feature: Feature) -> None:
    need = NEEDS[feature]
    for target in need.parameters:
        gone = sglang(need)
        del gone[target]
        assert target in why_not(need, "0.5.23", untested=False, resolve=missing(gone))
        other = {**sglang(need), target: lambda self, more: None}
        assert "takes self, more" in why_not(need, "0.5.23", untested=False, resolve=missing(other))


def test_a_field_that_is_gone_is_named() -> None:
    need = NEEDS[Feature.DECODE]
    targets = sglang(need)
    del targets[BATCH].__dataclass_fields__["seq_lens_cpu"]
    assert "seq_lens_cpu" in why_not(need, "0.5.23", untested=False, resolve=missing(targets))


def test_on_another_version_only_what_looks_on_is_tried() -> None:
    whys = {
        feature: why_not(need, "0.6.0", untested=False, resolve=missing(sglang(need)))
        for feature, need in NEEDS.items()
    }
    assert [feature for feature, why in whys.items() if not why] == [Feature.REPORTS]
    need = NEEDS[Feature.DECODE]
    assert why_not(need, "0.6.0", untested=True, resolve=missing(sglang(need))) == ""


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tp_size", 2, "tensor parallel"),
        ("pp_size", 4, "pipeline"),
        ("tp_size", None, "does not tell"),
        ("enable_dp_attention", True, "data-parallel attention"),
        ("speculative_algorithm", "EAGLE", "speculative"),
        ("enable_lora", True, "LoRA"),
    ],
)
def test_servers_of_a_kind_that_was_not_tested_are_refused(
    key: str, value: object, words: str
) -> None:
    settings = {**FITTING, key: value}
    for feature in (Feature.DECODE, Feature.PREFILL):
        assert words in unfit(feature, settings)
    assert unfit(Feature.REPORTS, settings) == ""


def test_a_fitting_server_is_taken_and_a_silent_one_is_not() -> None:
    assert unfit(Feature.DECODE, FITTING) == unfit(Feature.PREFILL, FITTING) == ""
    assert unfit(Feature.DECODE, {}) != ""


def test_a_prefill_server_with_overlap_displaces_nobody() -> None:
    told = {**FITTING, "disaggregation_mode": "prefill", "disable_overlap_schedule": False}
    assert "overlap" in unfit(Feature.PREFILL, told)


def test_features_are_named_and_unknown_names_switch_nothing_on() -> None:
    assert door.options_of({}).features == frozenset(Feature)
    assert door.options_of({"SLACKWATER_PLUGIN": ""}).features == frozenset()
    told = door.options_of({"SLACKWATER_PLUGIN": "decode, speed"})
    assert told == Options(features=frozenset({Feature.DECODE}), unknown=("speed",))


def test_a_server_that_was_asked_for_nothing_but_unknown_names_is_there_to_say_so() -> None:
    told = door.options_of({"SLACKWATER_PLUGIN": "decod"})
    assert door.is_wanted(told)
    assert not door.is_wanted(door.options_of({"SLACKWATER_PLUGIN": ""}))
    refused = door.refusals(told, "0.5.23")
    assert door.targets_of(refused) == [*CONTROL.parameters]
    assert Plugin(told, refused, lambda: 0.0).state()["unknown"] == ["decod"]


def test_what_stays_off_is_hooked_nowhere() -> None:
    hooked = door.targets_of({Feature.DECODE: "so", Feature.PREFILL: "so"})
    assert hooked == [SCHEDULER + "process_batch_result", *CONTROL.parameters]


def test_it_waits_to_be_named() -> None:
    assert not door.is_named({})
    assert not door.is_named({"SGLANG_PLUGINS": "other,slackwater-too"})
    assert door.is_named({"SGLANG_PLUGINS": "other, slackwater"})


def test_nothing_heavy_is_imported_in_an_engines_processes() -> None:
    code = (
        "import sys, os; os.environ['SGLANG_PLUGINS'] = 'slackwater'\n"
        "from backends.sglang_plugin import register; register()\n"
        "own = {'backends', 'policies'}\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names - set(sys.stdlib_module_names) - own - {'__main__'}))"
    )
    told = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "[]"
