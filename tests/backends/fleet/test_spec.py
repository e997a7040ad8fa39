from __future__ import annotations

from pathlib import Path

import pytest

from backends.fleet.spec import DEFAULT_GROUPS, Device, FleetError, FleetSpec, read_spec, spec_of
from policies.types import Pool, Role


def test_an_empty_table_is_one_prefill_two_decode_and_one_unified_server() -> None:
    assert spec_of({}) == FleetSpec()
    assert [group.role for group in DEFAULT_GROUPS] == ["prefill", "decode", "decode", "unified"]


def test_a_file_says_how_many_of_each(tmp_path: Path) -> None:
    file = tmp_path / "fleet.toml"
    file.write_text(
        'model = "smollm2"\ndevice = "cuda"\nflags = ["--tp", "2"]\nstart_timeout_s = 60\n'
        '[env]\nA = "1"\n'
        '[[servers]]\nrole = "decode"\ncount = 2\npool = "strict"\nport = 31000\n'
        'gpus = ["0,1", "2,3"]\n'
    )
    spec = read_spec(file)
    assert (spec.model, spec.device, spec.flags) == ("smollm2", Device.CUDA, ("--tp", "2"))
    assert (spec.start_timeout_s, spec.env) == (60.0, {"A": "1"})
    (group,) = spec.servers
    assert (group.role, group.count, group.pool) == (Role.DECODE, 2, Pool.STRICT)
    assert group.gpus == ("0,1", "2,3")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"modle": "tiny"}, "unknown key modle, expected one of"),
        ({"servers": [{"rol": "decode"}]}, "unknown key servers[0].rol, expected one of"),
        ({"servers": [{}]}, "servers[0].role is missing, expected one of ['prefill'"),
        ({"servers": [{"role": "router"}]}, "servers[0].role must be one of ['prefill'"),
        ({"servers": [{"role": "decode", "count": 0}]}, "servers[0].count must be at least 1"),
        ({"servers": [{"role": "decode", "port": 99_999}]}, "servers[0].port must leave 1 ports"),
        ({"servers": [{"role": "decode", "port": 65_535, "count": 2}]}, "must leave 2 ports"),
        (
            {"servers": [{"role": "decode", "count": True}]},
            "servers[0].count must be a whole number",
        ),
        ({"servers": [{"role": "decode", "gpus": ["0"], "count": 2}]}, "names 1 of 2 servers"),
        ({"servers": [3]}, "servers[0] must be a table"),
        ({"servers": []}, "servers: a fleet needs at least one"),
        ({"servers": "decode"}, "servers must be a list"),
        ({"flags": [1]}, "flags must be a list of strings"),
        ({"device": "tpu"}, "device must be one of ['cpu', 'cuda'], got 'tpu'"),
        ({"kv_tokens": "many"}, "kv_tokens must be a whole number, got 'many'"),
        ({"env": {"A": 1}}, "env: every value must be a string"),
    ],
)
def test_a_wrong_table_is_refused_by_the_name_of_its_key(
    table: dict[str, object], message: str
) -> None:
    with pytest.raises(FleetError) as told:
        spec_of(table)
    assert message in str(told.value)


def test_a_file_that_is_missing_or_no_toml_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.toml"
    broken.write_text("model =")
    with pytest.raises(FleetError, match=r"cannot read .*absent.toml: No such file"):
        read_spec(tmp_path / "absent.toml")
    with pytest.raises(FleetError, match=r"broken.toml: Invalid value"):
        read_spec(broken)
