"""What a gateway needs to answer a chat from token ids: the template, and the parsers."""

from __future__ import annotations

from typing import Any

import pytest

from tests.conformance.under_test import Client, FleetUnderTest

MESSAGES = [{"role": "user", "content": "Name a river"}]
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
CALL = 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'


async def test_a_chat_is_generated_from_the_ids_that_its_messages_are_tokenized_to(
    client: Client, fleet: FleetUnderTest
) -> None:
    _, told = await client.post(fleet.unified + "/v1/tokenize", {"messages": MESSAGES})
    leg = await client.generated(fleet.unified, told["tokens"], 12)
    sampling = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
    chat = {"model": "tiny", "messages": MESSAGES, **sampling}
    _, answer = await client.post(fleet.unified + "/v1/chat/completions", chat)
    assert answer["choices"][0]["message"]["content"] == leg.last["text"]
    assert answer["usage"]["prompt_tokens"] == len(told["tokens"])


@pytest.mark.parametrize(
    ("parser", "text", "parts"),
    [
        ("deepseek-r1", "hm</think>Sure", ["hm", "Sure"]),
        ("qwen3-thinking", "hm</think>Sure", ["hm", "Sure"]),
        ("qwen3", "<think>hm</think>Sure", ["hm", "Sure"]),
        ("qwen3", "Sure", ["", "Sure"]),
        ("deepseek-r1", "cut off", ["cut off", ""]),
    ],
)
async def test_reasoning_is_separated_from_the_answer(
    client: Client, fleet: FleetUnderTest, parser: str, text: str, parts: list[str]
) -> None:
    asked = {"text": text, "reasoning_parser": parser}
    status, told = await client.post(fleet.decode + "/separate_reasoning", asked)
    assert status == 200
    assert [told["reasoning_text"], told["text"]] == parts


async def test_tool_calls_are_found_in_the_answer(client: Client, fleet: FleetUnderTest) -> None:
    asked: dict[str, Any] = {"text": CALL, "tools": [TOOL], "tool_call_parser": "qwen25"}
    status, told = await client.post(fleet.decode + "/parse_function_call", asked)
    (call,) = told["calls"]
    assert (status, told["normal_text"], call["name"]) == (200, "Let me look.", "weather")
    assert call["parameters"].replace(" ", "") == '{"city":"Bern"}'


async def test_an_answer_without_a_call_is_left_as_it_is(
    client: Client, fleet: FleetUnderTest
) -> None:
    asked = {"text": " Sure. ", "tools": [TOOL], "tool_call_parser": "qwen25"}
    _, told = await client.post(fleet.decode + "/parse_function_call", asked)
    assert told == {"normal_text": " Sure. ", "calls": []}


async def test_a_server_says_what_its_chats_depend_on(
    client: Client, fleet: FleetUnderTest
) -> None:
    _, info = await client.get(fleet.decode + "/server_info")
    _, model = await client.get(fleet.decode + "/model_info")
    assert info["sampling_defaults"] in ("model", "openai")
    assert {"reasoning_parser", "tool_call_parser", "chat_template"} <= info.keys()
    assert {"skip_tokenizer_init", "enable_cache_report"} <= info.keys()
    assert "stream_response_default_include_usage" in info
    assert model["model_type"] == "llama"
