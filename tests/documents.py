"""Tables of the documents that follow from the code; `python -m tests.documents` writes them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from backends.actuators import settings as actuator_settings
from gateway import actuation, plugin_settings
from gateway import config as settings
from gateway.batch import settings as batch_settings
from gateway.config import Config
from gateway.scenario import PolicyEntry, Scenario
from gateway.simulation.budget import BudgetEntry

ROOT = Path(__file__).parent.parent
_MODULES = (settings, actuation, actuator_settings, batch_settings, plugin_settings)
README = ROOT / "README.md"
CONFIG = ROOT / "config.toml"
SIMULATOR = ROOT / "docs" / "simulator.md"

# Fields whose name says it all have no docstring; an operator still gets a line for each.
_PLAIN = {
    "server.host": "The address to listen on.",
    "server.port": "The port to listen on; 0: any free one.",
    "server.body_timeout_s": "A client sends its body within this time after the headers.",
    "worker.url": "`http://HOST:PORT` of the server. Required.",
    "worker.role": "What it was started as; what the server says of itself goes before this.",
    "worker.pool": "Under `policies.pools`: strict servers decode online work, relaxed ones "
    "offline work.",
    "worker.api_key": "Sent to this server as `Authorization: Bearer`.",
    "timeouts.between_tokens_s": "The longest pause inside a stream.",
    "timeouts.connect_s": "For a connection to a server.",
    "timeouts.first_token_offline_s": "The same for offline requests.",
    "retry.offline_attempts": "All tries of one offline job, the first included.",
    "breaker.cooldown_max_ms": "The pause doubles with each failed try, up to this.",
    "telemetry.timeout_ms": "For one answer to a probe.",
    "key.key": "What clients send: `Authorization: Bearer KEY` or `x-api-key: KEY`. Required.",
    "key.tenant": "Whose key it is: it stands in the log, and nobody can abort another's requests. "
    "Required.",
    "log.level": "What is logged besides; above `info`, requests are not.",
}

_SECTIONS = {
    "server": "The socket that clients connect to. A change needs a restart; all else is reloaded.",
    "policies": "Which rules decide; README.md, Policies, has them all.",
    "classes": "Who waits for an answer, and how long.",
    "classes.online": "A person waits: the first token is due, and then each further one.",
    "classes.offline": "Nobody waits: it fills what online work leaves free.",
    "colocation": "Offline work beside online work, under policies.pools = latency.",
    "plugin": "Servers that have the plug-in: docs/engine-plugin.md. Others go on without.",
    "admission": "How much work a server is given at once.",
    "limits": "What one client, and all of them together, may ask for.",
    "chat": "Offline chats that can go on elsewhere: docs/operations.md.",
    "timeouts": "How long each phase may take before its servers are given up.",
    "retry": "Failed attempts are made again, within a budget of prompt tokens.",
    "breaker": "When a server that fails is left alone.",
    "telemetry": "How servers are watched.",
    "cost": "What the servers are, so that step times can be predicted: docs/cost-model.md.",
    "ratio": "How many servers prefill and how many decode, and who changes that: docs/ratio.md.",
    "ratio.relaunch": "For ratio.actuator = relaunch.",
    "ratio.webhook": "For ratio.actuator = webhook.",
    "ratio.kubernetes": "For ratio.actuator = kubernetes, and the extra of that name.",
    "ratio.ray": "For ratio.actuator = ray, and the extra of that name.",
    "batch": "The OpenAI Batch and Files API: docs/batch.md. A change needs a restart.",
    "log": "What goes to standard error.",
}

EXAMPLE = """\
# ---- Servers ---------------------------------------------------------------------------------
# One [[worker]] for each; without any, `slackwater serve` starts an emulated fleet. To have this
# example, take away the first two characters of each line from here on.

# [[worker]]
# name = "prefill-1"
# url = "http://10.0.0.1:30000"
# role = "prefill"                  # prefill | decode | unified
# pool = "relaxed"                  # strict | relaxed
# bootstrap_port = 8998

# [[worker]]
# name = "decode-1"
# url = "http://10.0.0.2:30000"
# role = "decode"
# pool = "strict"                   # decodes online requests

# [[worker]]
# name = "decode-2"
# url = "http://10.0.0.3:30000"
# role = "decode"
# pool = "relaxed"                  # decodes offline requests
# api_key = "what this server was started with"

# ---- Keys ------------------------------------------------------------------------------------
# Without any [[key]], everybody may call.

# [[key]]
# key = "a long random string"
# tenant = "chat"
# kind = "online"

# [[key]]
# key = "another one"
# tenant = "nightly"
# kind = "offline"                  # whatever it asks for, its requests are offline
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    key: str
    default: Any
    allowed: str
    meaning: str


def docstrings() -> dict[tuple[str, str], str]:
    """The string below a field, by class and field."""
    found = {}
    for node in (node for module in _MODULES for node in ast.parse(inspect.getsource(module)).body):
        if not isinstance(node, ast.ClassDef):
            continue
        for field, after in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                text = _text(after)
                if text:
                    found[node.name, field.target.id] = text
    return found


def _text(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def options(cls: type[Any] = Config, prefix: str = "") -> Iterator[Option]:
    """Every key that has a value, in the order of the code."""
    told, hints = docstrings(), get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], prefix + field.name
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
        if dataclasses.is_dataclass(kind):
            yield from options(kind, f"{key}.")  # type: ignore[arg-type]  # a class
        else:
            meaning = _PLAIN.get(key) or told.get((cls.__name__, field.name), "")
            yield Option(key, field.default, _allowed(kind, field.metadata), meaning)


def plain_keys() -> set[str]:
    return set(_PLAIN)


def _allowed(kind: Any, metadata: Any) -> str:
    if choices := metadata.get("choices"):
        return ", ".join(f"`{name}`" for name in choices)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    low, high = metadata.get("low"), metadata.get("high")
    if low is None:
        return "`true`, `false`" if kind is bool else "text"
    unit = "" if kind is float else "whole, "
    return f"{unit}{low:g} to {high:g}" if high is not None else f"{unit}from {low:g}"


def toml_value(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:_}" if isinstance(value, int) else str(value)


def options_table() -> str:
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for option in options():
        required = option.default is dataclasses.MISSING
        default = "" if required else f"`{toml_value(option.default)}`"
        rows.append(f"| `{option.key}` | {default} | {option.allowed} | {option.meaning} |")
    return "\n".join(rows)


def scenario_keys(cls: type[Any] = Scenario, prefix: str = "") -> Iterator[Option]:
    """Every key of a scenario but those that a policy has in common with config.toml."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, key = hints[field.name], prefix + field.name
        is_list = get_origin(kind) is tuple
        kind = get_args(kind)[0] if is_list else kind
        if not dataclasses.is_dataclass(kind):
            allowed = _allowed(kind, field.metadata)
            yield Option(key, field.default, "list" if is_list else allowed, "")
        elif cls is not PolicyEntry or kind is BudgetEntry:
            yield from scenario_keys(kind, f"{key}.")  # type: ignore[arg-type]  # a class


def scenario_table() -> str:
    rows = ["| key | default | allowed |", "|---|---|---|"]
    for option in scenario_keys():
        required = option.default is dataclasses.MISSING
        default = "required" if required else f"`{toml_value(option.default)}`"
        rows.append(f"| `{option.key}` | {default} | {option.allowed} |")
    return "\n".join(rows)


def config_text() -> str:
    lines = [
        "# All that Slackwater can be told, with its defaults: an empty file means the same.",
        "# `slackwater serve --config config.toml` watches this file: a change is taken over",
        "# within a second or two, without dropping a request; a file with a mistake is",
        "# refused, and the log says why.",
        "# Made by `python -m tests.documents` from gateway/config.py.",
    ]
    section = ""
    for option in options():
        table, _, name = option.key.rpartition(".")
        if table in ("worker", "key"):
            continue
        if table != section:
            section = table
            lines += ["", f"[{section}]", f"# {_SECTIONS[section]}"]
        note = option.meaning.replace("`", "")
        if not option.allowed.startswith(("text", "`true`")):
            note += f" ({option.allowed.replace('`', '')})"
        wrapped = textwrap.wrap(note.strip(), 96, initial_indent="# ", subsequent_indent="# ")
        lines += ["", *wrapped, f"{name} = {toml_value(option.default)}"]
    return "\n".join(lines) + "\n\n" + EXAMPLE


def between(text: str, name: str) -> str:
    """What stands between the marks of that name."""
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", text, re.DOTALL)
    if found is None:
        raise ValueError(f"no part is marked {name}")
    return found[1]


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def main() -> None:
    CONFIG.write_text(config_text())
    _renew(README, "options", options_table())
    _renew(SIMULATOR, "keys", scenario_table())


def _renew(path: Path, name: str, table: str) -> None:
    before, mark, rest = path.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    path.write_text(f"{before}{mark}{table}\n{end}{after}")


if __name__ == "__main__":
    main()
