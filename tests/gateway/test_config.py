from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from gateway.config import (
    Config,
    ConfigError,
    WorkerEntry,
    load,
    patience_of,
    with_workers,
    workers_of,
)
from gateway.rulebook import rules_of
from gateway.settings import decode
from policies.colocation import Colocated
from policies.order import Edf, Fcfs
from policies.place import RoundRobin
from policies.pools import ByLatency, Shared
from policies.preempt import ForSlack
from policies.standstill import Standstill
from policies.types import Pool, Role

Key = tuple[str, ...]


def keys(cls: Any, path: Key = ()) -> Iterator[tuple[Key, Any, dataclasses.Field[Any]]]:
    """Every key of the configuration with its type; lists stand for one entry."""
    hints = get_type_hints(cls)
    for each in dataclasses.fields(cls):
        kind = hints[each.name]
        if dataclasses.is_dataclass(kind):
            yield from keys(kind, (*path, each.name))
        elif get_args(kind):
            yield from keys(get_args(kind)[0], (*path, each.name, "[]"))
        else:
            yield (*path, each.name), kind, each


KEYS = list(keys(Config))
NEEDED = {"worker": {"url": "http://h:1"}, "key": {"key": "k", "tenant": "t"}}


def table_with(path: Key, value: object) -> dict[str, Any]:
    """The smallest configuration that sets this key."""
    if len(path) == 1:
        return {path[0]: value}
    if path[1] == "[]":
        return {path[0]: [NEEDED[path[0]] | table_with(path[2:], value)]}
    return {path[0]: table_with(path[1:], value)}


def read(config: Config, path: Key) -> Any:
    value: Any = config
    for part in path:
        value = value[0] if part == "[]" else getattr(value, part)
    return value


def name_of(path: Key) -> str:
    return ".".join(path).replace(".[]", "[0]")


def some_value(kind: Any, each: dataclasses.Field[Any]) -> Any:
    if choices := each.metadata.get("choices"):
        return sorted(choices)[0]
    if kind in (int, float):
        return kind(each.metadata.get("low") or 1)
    return {str: "text", bool: False}.get(kind) if kind in (str, bool) else list(kind)[-1].value


@pytest.mark.parametrize(("path", "kind", "each"), KEYS, ids=[name_of(k[0]) for k in KEYS])
def test_every_key_can_be_set_and_a_wrong_type_names_it(
    path: Key, kind: Any, each: dataclasses.Field[Any]
) -> None:
    value = some_value(kind, each)
    assert read(decode(Config, table_with(path, value)), path) == value
    with pytest.raises(ConfigError) as caught:
        decode(Config, table_with(path, [value]))
    assert name_of(path) in str(caught.value)


BOUNDED = [k for k in KEYS if k[2].metadata.get("low") is not None]


@pytest.mark.parametrize(("path", "kind", "each"), BOUNDED, ids=[name_of(k[0]) for k in BOUNDED])
def test_every_number_has_bounds_that_are_told(
    path: Key, kind: Any, each: dataclasses.Field[Any]
) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        decode(Config, table_with(path, kind(each.metadata["low"] - 1)))
    if (high := each.metadata["high"]) is not None:
        with pytest.raises(ConfigError, match="must be at most"):
            decode(Config, table_with(path, kind(high + 1)))


def test_every_number_is_bounded() -> None:
    unbounded = [name_of(p) for p, kind, f in KEYS if kind in (int, float) and not f.metadata]
    assert not unbounded


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return path


def test_an_empty_file_is_complete(tmp_path: Path) -> None:
    assert load(written(tmp_path, "")) == Config()


def test_a_file_sets_what_it_names(tmp_path: Path) -> None:
    text = '[policies]\norder = "fcfs"\n[[worker]]\nurl = "http://a:1"\nrole = "prefill"\n'
    config = load(written(tmp_path, text))
    assert isinstance(rules_of(config).order, Fcfs)
    assert workers_of(config)[0].role is Role.PREFILL


def test_a_file_that_can_not_be_read_is_called_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"config\.toml is not TOML: Expected"):
        load(written(tmp_path, "[server"))


def test_a_file_in_another_encoding_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(b'[log]\nlevel = "\xff"\n')
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load(path)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "host:30000",
        "ftp://host:1",
        "http://",
        "http://:80",
        "http://host:port",
        "http://host:99999",
        "http://[::1",
        "http://user:secret@host:1",
        "http://host:1/?a=b",
        "http://ho st:1",
    ],
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"worker\[0\]\.url"):
        with_workers(Config(), (WorkerEntry(url=url),))


@pytest.mark.parametrize(
    ("url", "name", "host"),
    [
        ("http://10.0.0.1:30000/", "10.0.0.1:30000", "10.0.0.1"),
        ("http://[::1]:30000", "[::1]:30000", "[::1]"),
        ("https://gpu.example", "gpu.example", "gpu.example"),
    ],
)
def test_a_server_is_called_by_its_address(url: str, name: str, host: str) -> None:
    (worker,) = workers_of(with_workers(Config(), (WorkerEntry(url=url),)))
    assert (worker.name, worker.bootstrap_host) == (name, host)
    assert not worker.url.endswith("/")


def test_two_servers_of_one_name_are_refused() -> None:
    twice = (WorkerEntry(url="http://a:1", name="x"), WorkerEntry(url="http://b:1", name="x"))
    with pytest.raises(ConfigError, match="two workers are called x"):
        with_workers(Config(), twice)
    with pytest.raises(ConfigError, match="two workers are called a:1"):
        with_workers(Config(), (WorkerEntry(url="http://a:1"), WorkerEntry(url="http://a:1/")))


@pytest.mark.parametrize("secrets", [["k", "k"], [""]])
def test_each_api_key_is_one_of_its_own(tmp_path: Path, secrets: list[str]) -> None:
    entries = "".join(f'[[key]]\nkey = "{each}"\ntenant = "t"\n' for each in secrets)
    with pytest.raises(ConfigError, match="needs a key of its own"):
        load(written(tmp_path, entries))


def test_the_rules_are_those_that_the_configuration_names() -> None:
    table = {
        "policies": {"order": "edf", "place": "round-robin", "pools": "none"},
        "breaker": {"cooldown_ms": 1.5},
        "telemetry": {"stale_ms": 20},
        "limits": {"max_queued": 7},
    }
    rules = rules_of(decode(Config, table))
    assert (rules.order, rules.place, rules.pools) == (Edf(), RoundRobin(), Shared())
    assert (rules.breaker.cooldown_us, rules.load_stale_us, rules.max_queued) == (1500, 20_000, 7)


def test_defaults_of_the_configuration_are_those_of_the_rules() -> None:
    from_config = rules_of(Config())
    own = dataclasses.replace(
        type(from_config)(),
        pools=ByLatency(lends=True),
        admit=Colocated(),
        give_way=ForSlack(),
        standstill=Standstill(),
    )
    assert from_config == own
    assert patience_of(Config().timeouts) == type(patience_of(Config().timeouts))()


def test_pools_and_sizes_reach_the_worker() -> None:
    entry = WorkerEntry(url="http://a:1", pool=Pool.RELAXED, kv_tokens=9, bootstrap_port=0)
    (worker,) = workers_of(with_workers(Config(), (entry,)))
    assert (worker.pool, worker.kv_tokens, worker.bootstrap_port) == (Pool.RELAXED, 9, None)
