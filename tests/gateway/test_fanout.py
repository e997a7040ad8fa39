from __future__ import annotations

from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import Ask, Dialect, Limits, read
from gateway.errors import ApiError
from gateway.fanout import StreamMerger, merge_answers, split

LIMITS = Limits()
MESSAGES = [{"role": "user", "content": "hi"}]


def ask(dialect: Dialect, **body: Any) -> Ask:
    return read(dialect, orjson.dumps(body), limits=LIMITS)


def events(*values: Any) -> bytes:
    return b"".join(b"data: " + orjson.dumps(value) + b"\n\n" for value in values)


def read_events(stream: bytes) -> list[Any]:
    assert stream.endswith(b"\n\n") or not stream
    lines = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n")[:-1]]
    return ["[DONE]" if line == b"[DONE]" else orjson.loads(line) for line in lines]


# Splitting


def test_each_sample_of_each_prompt_becomes_an_ask_of_its_own() -> None:
    parts = split(ask(Dialect.COMPLETIONS, prompt=["a", "bb" * 4], n=2, stream=True))

    assert [part.body["prompt"] for part in parts] == ["a", "a", "bbbbbbbb", "bbbbbbbb"]
    assert [part.prompt_tokens for part in parts] == [1, 1, 2, 2]
    assert all("n" not in part.body and not part.fans_out and part.stream for part in parts)


def test_splitting_leaves_the_clients_body_alone() -> None:
    whole = ask(Dialect.CHAT, messages=MESSAGES, n=3, seed=5, rid="r")
    before = orjson.dumps(whole.body)
    split(whole)

    assert orjson.dumps(whole.body) == before


def test_samples_have_seeds_of_their_own_and_prompts_share_them() -> None:
    chat = split(ask(Dialect.CHAT, messages=MESSAGES, n=3, seed=2**63 - 2))
    native = split(ask(Dialect.GENERATE, text=["a", "b"], sampling_params={"sampling_seed": 5}))

    assert [part.body["seed"] for part in chat] == [2**63 - 2, 2**63 - 1, 0]
    assert [part.body["sampling_params"]["sampling_seed"] for part in native] == [5, 5]


@pytest.mark.parametrize(
    ("fields", "rids"),
    [
        ({"rid": "x"}, ["x_0_0", "x_0_1", "x_1_0", "x_1_1"]),
        ({"rid": ["x", "y"]}, ["x_0", "x_1", "y_0", "y_1"]),
    ],
)
def test_each_part_has_a_rid_of_its_own(fields: dict[str, Any], rids: list[str]) -> None:
    parts = split(ask(Dialect.GENERATE, text=["a", "b"], sampling_params={"n": 2}, **fields))

    assert [part.body["rid"] for part in parts] == rids


def test_lists_with_an_item_for_each_prompt_are_dealt_out() -> None:
    parts = split(
        ask(
            Dialect.GENERATE,
            input_ids=[[1, 2], [3]],
            sampling_params=[{"max_new_tokens": 4}, {}],
            image_data=[["a", "b"], "c"],
            lora_path="l",
            token_ids_logprob=[[7], [8]],
        )
    )

    assert [part.body["input_ids"] for part in parts] == [[1, 2], [3]]
    assert [part.max_tokens for part in parts] == [4, 128]
    assert [part.body["image_data"] for part in parts] == [["a", "b"], "c"]
    assert [part.body["token_ids_logprob"] for part in parts] == [[7], [8]]
    assert {part.body["lora_path"] for part in parts} == {"l"}


def test_a_list_of_the_wrong_length_is_refused_by_name() -> None:
    with pytest.raises(ApiError) as caught:
        split(ask(Dialect.GENERATE, text=["a", "b"], image_data=["only one"]))
    assert (caught.value.status, caught.value.param) == (400, "image_data")


def test_a_part_can_be_resumed_where_the_whole_cannot() -> None:
    whole = ask(Dialect.GENERATE, text=["a", "b"], sampling_params={"n": 2})

    assert not whole.resumable
    assert all(part.resumable for part in split(whole))


def test_a_batch_of_one_is_still_a_list() -> None:
    whole = ask(Dialect.GENERATE, text=["a"])

    assert whole.fans_out
    assert merge_answers(whole, [b'{"text":"b"}']) == b'[{"text":"b"}]'


@given(st.integers(1, 5), st.integers(1, 5))
def test_what_is_split_asks_for_as_much_as_the_whole(prompts: int, samples: int) -> None:
    whole = ask(Dialect.COMPLETIONS, prompt=["word " * (i + 1) for i in range(prompts)], n=samples)
    parts = split(whole)

    assert len(parts) == prompts * samples
    assert sum(part.prompt_tokens for part in parts) == whole.prompt_tokens * samples


# Unary answers


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "reasoning_tokens": 1,
    }


def completion(name: str, text: str, counts: dict[str, Any] | None) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": "stop"}
    return orjson.dumps({"id": name, "choices": [choice], "usage": counts})


def test_choices_are_numbered_and_usage_adds_up() -> None:
    whole = ask(Dialect.COMPLETIONS, prompt=["p", "q"], n=2)
    parts = [
        completion("a", "0", usage(10, 1, 8)),
        completion("b", "1", usage(10, 2, 8)),
        completion("c", "2", usage(20, 3, 1)),
        completion("d", "3", usage(20, 4, 1)),
    ]
    merged = orjson.loads(merge_answers(whole, parts))

    assert [(one["index"], one["text"]) for one in merged["choices"]] == [
        *((0, "0"), (1, "1"), (2, "2"), (3, "3")),
    ]
    assert merged["id"] == "a"
    assert merged["usage"] == usage(30, 10, 9) | {"reasoning_tokens": 4}


def test_answers_without_usage_are_merged_too() -> None:
    whole = ask(Dialect.CHAT, messages=MESSAGES, n=2)
    merged = orjson.loads(merge_answers(whole, [completion("a", "x", None)] * 2))

    assert merged["usage"] is None
    assert len(merged["choices"]) == 2


def test_embeddings_are_one_list() -> None:
    whole = ask(Dialect.EMBEDDINGS, input=["a", "b"])
    data = {"object": "embedding", "index": 0, "embedding": [0.5]}
    part = orjson.dumps({"data": [data], "usage": {"prompt_tokens": 3, "total_tokens": 3}})
    merged = orjson.loads(merge_answers(whole, [part, part]))

    assert [one["index"] for one in merged["data"]] == [0, 1]
    assert merged["usage"] == {"prompt_tokens": 6, "total_tokens": 6}


def test_a_broken_answer_is_the_servers_fault() -> None:
    with pytest.raises(ApiError) as caught:
        merge_answers(ask(Dialect.CHAT, messages=MESSAGES, n=2), [b'{"choices":[', b"{}"])
    assert caught.value.status == 502


# Streams


def chat_chunk(part: int, text: str, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return {"id": f"chat-{part}", "created": part, "choices": [choice], "usage": None}


def chat_stream(part: int, texts: list[str]) -> bytes:
    chunks = [chat_chunk(part, text) for text in texts]
    last = {"id": f"chat-{part}", "choices": [], "usage": usage(10, len(texts))}
    return events(*chunks, chat_chunk(part, "", "stop"), last) + b"data: [DONE]\n\n"


def chat(n: int, **fields: Any) -> Ask:
    return ask(Dialect.CHAT, messages=MESSAGES, n=n, stream=True, **fields)


WITH_USAGE = {"stream_options": {"include_usage": True}}


def pieces_of(stream: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in pairwise(bounds)]


@given(
    st.lists(st.lists(st.text(max_size=5), max_size=4), min_size=2, max_size=4),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.randoms(use_true_random=False),
)
def test_any_cut_and_any_order_merge_into_one_stream(
    texts: list[list[str]], cuts: list[int], random: Any
) -> None:
    merger = StreamMerger(chat(len(texts), **WITH_USAGE))
    waiting = [pieces_of(chat_stream(i, part), cuts) for i, part in enumerate(texts)]
    out = b""
    while live := [part for part, pieces in enumerate(waiting) if pieces]:
        part = random.choice(live)
        out += merger.feed(part, waiting[part].pop(0))
        if not waiting[part]:
            out += merger.finish(part)
    chunks = read_events(out)

    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"] == []
    assert chunks[-2]["usage"]["prompt_tokens"] == 10
    assert chunks[-2]["usage"]["completion_tokens"] == sum(map(len, texts))
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    for part, expected in enumerate(texts):
        mine = [c["choices"][0] for c in chunks[:-2] if c["choices"][0]["index"] == part]
        assert [choice["delta"]["content"] for choice in mine] == [*expected, ""]


def test_usage_that_was_not_asked_for_is_left_out() -> None:
    merger = StreamMerger(chat(2))
    out = merger.feed(0, chat_stream(0, ["a"])) + merger.finish(0)
    out += merger.feed(1, chat_stream(1, ["b"])) + merger.finish(1)

    assert all(chunk == "[DONE]" or chunk["choices"] for chunk in read_events(out))
    assert out.count(b"[DONE]") == 1


def test_a_batch_of_generate_is_told_apart_by_index() -> None:
    merger = StreamMerger(ask(Dialect.GENERATE, text=["a", "b"], stream=True))
    native = {"text": "x", "output_ids": [1], "meta_info": {"id": "r"}}

    assert read_events(merger.feed(1, events(native))) == [native | {"index": 1}]
    assert merger.finish(1) + merger.finish(1) == b""
    assert merger.finish(0) == b"data: [DONE]\n\n"


def test_one_parts_error_ends_the_whole_stream() -> None:
    merger = StreamMerger(chat(3))
    error = events({"error": {"message": "queue full", "code": 503}})
    out = merger.feed(1, error + events(chat_chunk(1, "late")))

    assert out == error + b"data: [DONE]\n\n"
    assert merger.failed == 1
    assert merger.feed(0, events(chat_chunk(0, "more"))) == b""
    assert b"".join(merger.finish(part) for part in range(3)) == b""


def test_comments_pass_and_a_torn_end_does_not() -> None:
    merger = StreamMerger(chat(2))

    assert merger.feed(0, b': ping\n\ndata: {"torn') == b": ping\n\n"
    assert merger.finish(0) == b""
