"""What /separate_reasoning and /parse_function_call make of a text, for the commonest formats."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

_ALWAYS_THINK = frozenset({"deepseek-r1", "qwen3-thinking"})
_MAY_THINK = frozenset({"qwen3"})
_CALL = re.compile(r"<tool_call>\n(.*?)\n</tool_call>", re.DOTALL)
_CALL_PARSERS = frozenset({"qwen", "qwen25", "hermes"})


def separate(text: str, parser: str) -> tuple[str, str]:
    """Reasoning and answer; an unknown parser is a ValueError."""
    if parser not in _ALWAYS_THINK | _MAY_THINK:
        raise ValueError(f"Unsupported model type: {parser}")
    if parser in _MAY_THINK and "<think>" not in text:
        return "", text
    reasoning, _, answer = text.removeprefix("<think>").partition("</think>")
    return reasoning.strip(), answer.strip()


def calls(text: str, tools: Sequence[Any], parser: str) -> tuple[str, list[dict[str, Any]]]:
    """What is no call, and the calls; an unknown parser is a ValueError."""
    if parser not in _CALL_PARSERS:
        raise ValueError(f"Unsupported tool_call_parser: {parser}")
    names = [tool["function"]["name"] for tool in tools]
    if not names or "<tool_call>" not in text:
        return text, []
    found = []
    for match in _CALL.finditer(text):
        call = orjson.loads(match[1])
        if call.get("name") in names:
            told = {
                "tool_index": names.index(call["name"]),
                "name": call["name"],
                "parameters": orjson.dumps(call.get("arguments", {})).decode(),
            }
            found.append(told)
    return text[: text.index("<tool_call>")].strip(), found
