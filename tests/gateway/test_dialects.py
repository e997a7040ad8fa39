from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import ROUTES, Ask, Dialect, Limits, read
from gateway.errors import ApiError, Code
from gateway.prefixes import prefix_keys
from gateway.prompts import MEDIA_TOKENS

LIMITS = Limits(max_tokens=10_000, default_max_tokens=500, max_prompts=8, max_asks=32)
PROMPTS: dict[Dialect, dict[str, Any]] = {
    Dialect.GENERATE: {"text": "hi"},
    Dialect.CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    Dialect.COMPLETIONS: {"prompt": "hi"},
    Dialect.RESPONSES: {"input": "hi"},
    Dialect.MESSAGES: {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5},
    Dialect.EMBEDDINGS: {"input": "hi"},
}
every_dialect = pytest.mark.parametrize("dialect", Dialect)


def ask(dialect: Dialect, **fields: Any) -> Ask:
    body = PROMPTS[dialect] | fields
    return read(dialect, orjson.dumps(body), limits=LIMITS)


def refusal(dialect: Dialect, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(dialect, **fields)
    return caught.value


def tried(dialect: Dialect, raw: bytes) -> Ask | ApiError:
    try:
        return read(dialect, raw, limits=LIMITS)
    except ApiError as error:
        return error


@every_dialect
def test_a_minimal_body_is_accepted_in_every_protocol(dialect: Dialect) -> None:
    found = ask(dialect)

    assert (found.prompts, found.samples, found.prompt_tokens) == (1, 1, 1)
    assert (found.stream, found.model, found.service_tier, found.priority) == (False, "", "", None)


@every_dialect
def test_unknown_fields_pass_through_untouched(dialect: Dialect) -> None:
    extra = {"chat_template_kwargs": {"x": [1, None, {"y": 1.5}]}, "lora_path": 7}

    assert ask(dialect, **extra).body == PROMPTS[dialect] | extra


def test_the_routes_name_each_protocol_once() -> None:
    assert sorted(ROUTES.values()) == sorted(Dialect)


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", Code.INVALID_JSON),
        (b"{", Code.INVALID_JSON),
        (b'{"text": NaN}', Code.INVALID_JSON),
        (b'{"text": "\xff"}', Code.INVALID_JSON),
        (b'{"text": "\\ud800"}', Code.INVALID_JSON),
        (b'{"text":' * 100_000, Code.INVALID_JSON),
        (b"[" * 100_000 + b"]" * 100_000, Code.INVALID_JSON),
        (b"[]", Code.INVALID_REQUEST),
        (b"null", Code.INVALID_REQUEST),
        (b'"text"', Code.INVALID_REQUEST),
        (b'{"text":"a","x":' + b"[" * 300 + b"]" * 300 + b"}", Code.INVALID_REQUEST),
    ],
)
def test_what_is_not_a_json_object_is_refused(raw: bytes, code: Code) -> None:
    with pytest.raises(ApiError) as caught:
        read(Dialect.GENERATE, raw, limits=LIMITS)
    assert (caught.value.code, caught.value.status) == (code, 400)


def test_malformed_json_is_told_where() -> None:
    with pytest.raises(ApiError, match="line 2 column 9"):
        read(Dialect.CHAT, b'{"n": 1,\n"model" x}', limits=LIMITS)


@given(st.integers(1, 400))
def test_whatever_depth_is_read_can_be_written_again(depth: int) -> None:
    raw = b'{"text":"a","x":' + b"[" * depth + b"]" * depth + b"}"
    found = tried(Dialect.GENERATE, raw)

    if isinstance(found, ApiError):
        assert (found.code, depth > 200) == (Code.INVALID_REQUEST, True)
    else:
        assert orjson.dumps(found.body) == raw


@every_dialect
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", 1),
        ("stream", "true"),
        ("model", 5),
        ("model", "a\r\nx-evil: 1"),
        ("model", "m" * 1000),
        ("service_tier", ["flex"]),
        ("priority", 1.5),
        ("priority", True),
        ("priority", 2**63),
        ("seed", "7"),
        ("stop", 5),
        ("stop", ["a", 5]),
        ("stream_options", []),
        ("sampling_params", "hot"),
        ("bootstrap_host", "10.0.0.1"),
        ("bootstrap_port", 8998),
        ("bootstrap_room", 1),
        ("rid", 5),
        ("rid", ""),
        ("rid", "HEALTH_CHECK_1"),
        ("rid", "a\nb"),
        ("rid", "r" * 257),
        ("rid", ["a", "b"]),
    ],
)
def test_a_bad_value_is_refused_by_name(dialect: Dialect, field: str, value: Any) -> None:
    error = refusal(dialect, **{field: value})

    assert (error.status, error.code, error.param) == (400, Code.INVALID_REQUEST, field)
    assert error.message.startswith(field)


@every_dialect
def test_null_stands_for_not_given(dialect: Dialect) -> None:
    names = ("stream", "model", "service_tier", "priority", "rid", "bootstrap_room", "n", "stop")

    assert ask(dialect, **dict.fromkeys(names)).stream is False


@pytest.mark.parametrize("value", [0, -1, 129, True, 1.5, "2", 1e300, [1]])
def test_an_absurd_number_of_samples_is_refused(value: Any) -> None:
    assert refusal(Dialect.CHAT, n=value).param == "n"
    assert refusal(Dialect.GENERATE, sampling_params={"n": value}).param == "sampling_params.n"


@pytest.mark.parametrize("value", [-1, 10_001, True, 0.5, "9", {}, 1e18])
@pytest.mark.parametrize(
    ("dialect", "field"),
    [
        (Dialect.CHAT, "max_tokens"),
        (Dialect.CHAT, "max_completion_tokens"),
        (Dialect.COMPLETIONS, "max_tokens"),
        (Dialect.RESPONSES, "max_output_tokens"),
        (Dialect.MESSAGES, "max_tokens"),
    ],
)
def test_an_absurd_length_is_refused(dialect: Dialect, field: str, value: Any) -> None:
    assert refusal(dialect, **{field: value}).param == field


@pytest.mark.parametrize(
    ("dialect", "fields", "expected"),
    [
        (Dialect.GENERATE, {}, 128),
        (Dialect.GENERATE, {"sampling_params": {"max_new_tokens": None}}, 500),
        (Dialect.GENERATE, {"sampling_params": {"max_new_tokens": 0}}, 0),
        (Dialect.GENERATE, {"text": ["a"], "sampling_params": [{"max_new_tokens": 9}]}, 9),
        (Dialect.CHAT, {}, 500),
        (Dialect.CHAT, {"max_tokens": 7}, 7),
        (Dialect.CHAT, {"max_tokens": 7, "max_completion_tokens": 8}, 8),
        (Dialect.CHAT, {"max_tokens": 16.0}, 16),
        (Dialect.COMPLETIONS, {}, 16),
        (Dialect.RESPONSES, {"max_output_tokens": 3}, 3),
        (Dialect.MESSAGES, {}, 5),
        (Dialect.EMBEDDINGS, {}, 0),
    ],
)
def test_lengths_default_as_the_servers_do(
    dialect: Dialect, fields: dict[str, Any], expected: int
) -> None:
    assert ask(dialect, **fields).max_tokens == expected


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [
        (Dialect.GENERATE, {"text": None}),
        (Dialect.GENERATE, {"input_ids": [1]}),
        (Dialect.GENERATE, {"text": []}),
        (Dialect.GENERATE, {"text": ["a", 1]}),
        (Dialect.GENERATE, {"text": {"a": 1}}),
        (Dialect.GENERATE, {"text": None, "input_ids": []}),
        (Dialect.GENERATE, {"text": None, "input_ids": [[]]}),
        (Dialect.GENERATE, {"text": None, "input_ids": [[1], 2]}),
        (Dialect.GENERATE, {"text": None, "input_ids": [1, True]}),
        (Dialect.GENERATE, {"text": None, "input_ids": [1, -1]}),
        (Dialect.GENERATE, {"text": None, "input_ids": "1"}),
        (Dialect.GENERATE, {"text": None, "input_embeds": [[]]}),
        (Dialect.GENERATE, {"text": ["a"] * 9}),
        (Dialect.GENERATE, {"text": ["a", "b"], "sampling_params": [{}]}),
        (Dialect.GENERATE, {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]}),
        (Dialect.GENERATE, {"text": ["a"] * 8, "sampling_params": {"n": 5}}),
        (Dialect.COMPLETIONS, {"prompt": None}),
        (Dialect.COMPLETIONS, {"prompt": []}),
        (Dialect.COMPLETIONS, {"prompt": 5}),
        (Dialect.CHAT, {"messages": None}),
        (Dialect.CHAT, {"messages": []}),
        (Dialect.CHAT, {"messages": "hi"}),
        (Dialect.CHAT, {"messages": ["hi"]}),
        (Dialect.CHAT, {"messages": [{"content": "hi"}]}),
        (Dialect.CHAT, {"messages": [{"role": "user", "content": 5}]}),
        (Dialect.RESPONSES, {"input": []}),
        (Dialect.RESPONSES, {"input": [1]}),
        (Dialect.EMBEDDINGS, {"input": None}),
        (Dialect.EMBEDDINGS, {"input": [None]}),
    ],
)
def test_a_prompt_of_the_wrong_form_is_refused(dialect: Dialect, fields: dict[str, Any]) -> None:
    error = refusal(dialect, **fields)

    assert (error.status, error.code) == (400, Code.INVALID_REQUEST)
    assert error.param


@pytest.mark.parametrize(
    ("dialect", "fields", "prompts", "batched", "tokens"),
    [
        (Dialect.GENERATE, {"text": "x" * 9}, 1, False, 3),
        (Dialect.GENERATE, {"text": ["x" * 9, "é"]}, 2, True, 4),
        (Dialect.GENERATE, {"text": ["x"]}, 1, True, 1),
        (Dialect.GENERATE, {"text": None, "input_ids": [1, 2, 3]}, 1, False, 3),
        (Dialect.GENERATE, {"text": None, "input_ids": [[1, 2], [3]]}, 2, True, 3),
        (Dialect.GENERATE, {"text": None, "input_embeds": [[0.5, 1.0]] * 4}, 1, False, 4),
        (Dialect.GENERATE, {"text": None, "input_embeds": [[[0.5]] * 4] * 2}, 2, True, 8),
        (Dialect.GENERATE, {"image_data": "a.png"}, 1, False, 1 + MEDIA_TOKENS),
        (Dialect.COMPLETIONS, {"prompt": [[1, 2], [3]]}, 2, True, 3),
        (Dialect.CHAT, {"input_ids": [5, 6]}, 1, False, 2),
        (Dialect.EMBEDDINGS, {"input": ["a", "b"]}, 2, True, 2),
        (Dialect.EMBEDDINGS, {"input": [{"text": "abcd"}, {"image": "x"}]}, 2, True, 1025),
        (Dialect.RESPONSES, {"instructions": "x" * 6}, 1, False, 2),
        (Dialect.MESSAGES, {"system": [{"type": "text", "text": "x" * 78}]}, 1, False, 27),
    ],
)
def test_prompts_are_counted(
    dialect: Dialect, fields: dict[str, Any], prompts: int, *, batched: bool, tokens: int
) -> None:
    found = ask(dialect, **fields)

    assert (found.prompts, found.batched, found.prompt_tokens) == (prompts, batched, tokens)


def test_parts_of_a_conversation_count_by_their_text_and_pictures_by_a_constant() -> None:
    parts = [
        {"type": "text", "text": "x" * 40},
        {"type": "image_url", "image_url": {"url": "data:" + "A" * 9_000}},
        {"type": "tool_result", "content": [{"type": "text", "text": "y" * 20}]},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    found = ask(Dialect.CHAT, messages=[{"role": "user", "content": parts}], tools=tools)

    assert found.prompt_tokens == MEDIA_TOKENS + (60 + len(orjson.dumps(tools)) + 3) // 4


def test_a_batch_may_name_each_request_but_none_twice() -> None:
    assert ask(Dialect.GENERATE, text=["a", "b"], rid=["x", "y"]).prompts == 2
    assert refusal(Dialect.GENERATE, text=["a", "b"], rid=["x", "x"]).code is Code.DUPLICATE_RID


def test_only_best_of_n_itself_is_served() -> None:
    assert ask(Dialect.COMPLETIONS, n=2, best_of=2).samples == 2
    assert refusal(Dialect.COMPLETIONS, n=2, best_of=3).code is Code.UNSUPPORTED


def test_what_goes_to_the_server_in_one_piece_does_not_fan_out() -> None:
    assert not ask(Dialect.EMBEDDINGS, input=["a", "b"]).fans_out
    assert not ask(Dialect.MESSAGES, n=3).fans_out


@pytest.mark.parametrize(
    ("dialect", "fields", "resumable"),
    [
        (Dialect.GENERATE, {}, True),
        (Dialect.GENERATE, {"stream": True, "sampling_params": {"temperature": 0}}, True),
        (Dialect.GENERATE, {"sampling_params": {"repetition_penalty": 1.0}}, True),
        (Dialect.GENERATE, {"sampling_params": {"frequency_penalty": 0.0, "regex": None}}, True),
        (Dialect.GENERATE, {"sampling_params": {"frequency_penalty": 0.1}}, False),
        (Dialect.GENERATE, {"sampling_params": {"repetition_penalty": 1.1}}, False),
        (Dialect.GENERATE, {"sampling_params": {"json_schema": "{}"}}, False),
        (Dialect.GENERATE, {"sampling_params": {"stop_regex": "a+"}}, False),
        (Dialect.GENERATE, {"sampling_params": {"n": 2}}, False),
        (Dialect.GENERATE, {"text": ["a"]}, False),
        (Dialect.GENERATE, {"image_data": "a.png"}, False),
        (Dialect.GENERATE, {"return_logprob": True}, False),
        (Dialect.COMPLETIONS, {"return_token_ids": True, "stream": True}, True),
        (Dialect.COMPLETIONS, {"return_token_ids": True}, False),
        (Dialect.COMPLETIONS, {"stream": True}, False),
        (Dialect.COMPLETIONS, {"return_token_ids": True, "stream": True, "logprobs": 0}, False),
        (Dialect.COMPLETIONS, {"return_token_ids": True, "stream": True, "echo": True}, False),
        (Dialect.CHAT, {"stream": True}, False),
        (Dialect.MESSAGES, {"stream": True}, False),
    ],
)
def test_only_what_token_ids_describe_is_resumable(
    dialect: Dialect, fields: dict[str, Any], *, resumable: bool
) -> None:
    assert ask(dialect, **fields).resumable is resumable


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False)
    | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "n", "stop", "x"]), inner)
    ),
    max_leaves=12,
)
FIELDS = (
    *("model", "stream", "n", "best_of", "seed", "stop", "rid", "priority", "service_tier"),
    *("stream_options", "sampling_params", "text", "input_ids", "input_embeds", "prompt"),
    *("input", "messages", "system", "tools", "instructions", "image_data", "max_tokens"),
    *("max_completion_tokens", "max_output_tokens", "return_token_ids", "logprobs"),
)


@given(st.sampled_from(Dialect), st.dictionaries(st.sampled_from(FIELDS), values, max_size=5))
def test_no_body_raises_anything_but_an_api_error(dialect: Dialect, body: dict[str, Any]) -> None:
    found = tried(dialect, orjson.dumps(PROMPTS[dialect] | body))

    if isinstance(found, ApiError):
        assert 400 <= found.status < 500
    else:
        assert found.prompt_tokens >= 0
        assert not (found.batched and prefix_keys(found))


@given(st.sampled_from(Dialect), st.binary(max_size=200))
def test_no_bytes_raise_anything_but_an_api_error(dialect: Dialect, raw: bytes) -> None:
    with pytest.raises(ApiError):
        read(dialect, b'{"x":' + raw, limits=LIMITS)
