from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.transcript import Kind, Progress, Splicer, Transcript, resumed_body

DONE = b"data: [DONE]\n\n"
PROMPT = [900, 901, 902]
KINDS = list(Kind)
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass
class Model:
    """A greedy model with a fixed answer, behind a server that streams as SGLang does."""

    answer: list[bytes]
    """The bytes of each token; token i of the answer has id i."""
    kind: Kind
    stop: str = ""
    withholds: bool = True
    step: int = 1

    def body(self, limit: int) -> dict[str, Any]:
        stop = [self.stop] if self.stop else None
        if self.kind is Kind.COMPLETIONS:
            options = {"include_usage": True}
            fixed = {"return_token_ids": True, "stream": True, "stream_options": options}
            return {"prompt": PROMPT, "max_tokens": limit, "stop": stop, **fixed}
        params = {"max_new_tokens": limit, "stop": stop, "min_new_tokens": 2}
        return {"text": "a prompt", "sampling_params": params, "stream": True}

    def serve(self, body: dict[str, Any], name: str) -> bytes:
        params = body if self.kind is Kind.COMPLETIONS else body["sampling_params"]
        limit = params["max_tokens" if self.kind is Kind.COMPLETIONS else "max_new_tokens"]
        given = body.get("prompt") or body.get("input_ids") or PROMPT
        writer = _Writer(self, name, given, limit)
        return b"".join(writer.events())

    def decoded(self, count: int) -> str:
        return b"".join(self.answer[:count]).decode(errors="replace")


@dataclass
class _Writer:
    model: Model
    name: str
    prompt: list[int]
    limit: int
    shown: int = 0
    sent: int = 0
    clean: int = 0

    def events(self) -> Iterator[bytes]:
        model, start = self.model, len(self.prompt) - len(PROMPT)
        skipped = len(model.decoded(start))
        last = min(len(model.answer), start + self.limit)
        for made in range(start + 1, last + 1):
            text = model.decoded(made)[skipped:]
            if model.stop and model.stop in text:
                reason = {"type": "stop", "matched": model.stop}
                yield self.event(text[: text.index(model.stop)], start, made, reason)
                break
            if made == last:
                yield self.event(text, start, made, {"type": "length", "length": made - start})
            elif (made - start) % model.step == 0:
                yield self.event(self.printable(text), start, made, None)
        if model.kind is Kind.COMPLETIONS:
            yield self.usage(made - start)
        yield DONE

    def printable(self, text: str) -> str:
        if text.endswith("\ufffd"):
            fresh = text[self.clean :]
            text = text[: self.clean] + fresh[: fresh.rfind(" ") + 1]
        else:
            self.clean = len(text)
        ends = range(len(text), max(0, len(text) - len(self.model.stop)), -1)
        held = [n for n in ends if self.model.stop.startswith(text[n - 1 :])]
        return text[: min(held) - 1] if held and self.model.withholds else text

    def event(self, text: str, start: int, made: int, reason: Any) -> bytes:
        whole = self.model.kind is Kind.CUMULATIVE
        ids = list(range(start if whole else start + self.sent, made))
        shown = text if whole else text[self.shown :]
        self.sent, self.shown = made - start, max(self.shown, len(text))
        if self.model.kind is Kind.COMPLETIONS:
            return self.chunk(ids, shown, reason)
        meta = {
            "id": self.name,
            "finish_reason": reason,
            "prompt_tokens": len(self.prompt),
            "completion_tokens": made - start,
            "cached_tokens": len(self.prompt) - 1,
        }
        return _event({"text": shown, "output_ids": ids, "meta_info": meta})

    def chunk(self, ids: list[int], text: str, reason: Any) -> bytes:
        choice = {"index": 0, "text": text, "token_ids": ids}
        if self.sent == len(ids):
            choice["prompt_token_ids"] = self.prompt
        choice["finish_reason"] = reason and reason["type"]
        return _event({"id": self.name, "created": 1, "choices": [choice], "usage": None})

    def usage(self, made: int) -> bytes:
        counts = {"prompt_tokens": len(self.prompt), "completion_tokens": made}
        total = {"total_tokens": len(self.prompt) + made}
        return _event({"id": self.name, "created": 1, "choices": [], "usage": counts | total})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(value) + b"\n\n"


def transcript(stream: bytes, cuts: tuple[int, ...] = ()) -> Transcript:
    kept = Transcript()
    for piece in cut_up(stream, cuts):
        kept.feed(piece)
    return kept


def cut_up(stream: bytes, cuts: tuple[int, ...]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(stream) + 1) for cut in cuts), len(stream)]
    return [stream[a:b] for a, b in pairwise(bounds)]


def whole_events(stream: bytes) -> bytes:
    return stream[: stream.rfind(b"\n\n") + 2] if b"\n\n" in stream else b""


def interrupted(model: Model, limit: int, cut: int, cuts: tuple[int, ...] = ()) -> bytes:
    """What the client gets when the first server dies after `cut` bytes."""
    body = model.body(limit)
    seen = whole_events(model.serve(body, "first")[:cut])
    kept = Transcript.of(body)
    kept.feed(seen)
    progress = kept.state().settled()
    splicer = Splicer(body, progress)
    for piece in cut_up(model.serve(resumed_body(body, PROMPT, progress), "second"), cuts):
        seen += splicer.feed(piece)
    return seen


def summary(progress: Progress) -> tuple[Any, ...]:
    counted = progress.last_meta.get("completion_tokens", progress.last_meta.get("usage"))
    return (
        *(progress.output_ids, progress.text, progress.finish_reason, progress.prompt_tokens),
        *(progress.last_meta["id"], counted),
    )


def first_token_at(stream: bytes) -> int:
    return stream.index(b"\n\n") + 2


letters = st.sampled_from([b"a", b" b", b" ", b"\n", b"\xc3\xa9", b"ST", b"OP", b"\xe4\xbd\xa0"])
halves = st.sampled_from([b" \xf0\x9f", b"\x98\x80", b"\xe4\xbd", b"\xa0"])
emoji = st.just([b" \xf0\x9f", b"\x98\x80"])
answers = st.lists(letters.map(lambda one: [one]) | emoji, min_size=1, max_size=12).map(
    lambda parts: [token for part in parts for token in part]
)
cuts = st.lists(st.integers(0, 100_000), max_size=6).map(tuple)
kinds = st.sampled_from(KINDS)


@given(answers, kinds, st.integers(0, 100_000), cuts)
def test_a_resumed_stream_equals_the_undisturbed_one(
    answer: list[bytes], kind: Kind, cut: int, cuts: tuple[int, ...]
) -> None:
    model = Model(answer, kind)
    stream = model.serve(model.body(40), "first")
    cut = first_token_at(stream) + cut % len(stream)
    if transcript(stream[:cut]).state().finish_reason is not None:
        return
    resumed = transcript(interrupted(model, 40, cut, cuts)).state()

    assert summary(resumed) == summary(transcript(stream).state())
    assert resumed.text == model.decoded(len(answer))


@given(answer=answers, kind=kinds, cut=st.integers(0, 100_000), withholds=st.booleans())
def test_a_stop_string_across_the_seam_ends_the_answer(
    answer: list[bytes], kind: Kind, cut: int, *, withholds: bool
) -> None:
    if kind is not Kind.CUMULATIVE:
        withholds = True
    model = Model([*answer, b"ST", b"O", b"P", b"never"], kind, "STOP", withholds)
    stream = model.serve(model.body(40), "first")
    cut = first_token_at(stream) + cut % len(stream)
    if transcript(stream[:cut]).state().finish_reason is not None:
        return
    resumed = transcript(interrupted(model, 40, cut)).state()

    assert summary(resumed) == summary(transcript(stream).state())


@given(answers, kinds, st.lists(st.integers(0, 100_000), min_size=2, max_size=4))
def test_an_answer_may_be_resumed_again_and_again(
    answer: list[bytes], kind: Kind, deaths: list[int]
) -> None:
    model = Model(answer, kind)
    body = model.body(40)
    stream = model.serve(body, "first")
    seen = stream[: first_token_at(stream)]
    for attempt, death in enumerate(deaths):
        progress = transcript(seen).state().settled()
        if progress.finish_reason is not None:
            break
        later = model.serve(resumed_body(body, PROMPT, progress), f"again {attempt}")
        seen += Splicer(body, progress).feed(later[: death % len(later)])
    progress = transcript(seen).state().settled()
    if progress.finish_reason is None:
        seen += Splicer(body, progress).feed(
            model.serve(resumed_body(body, PROMPT, progress), "last")
        )

    found, wanted = transcript(seen).state(), transcript(stream).state()
    assert (found.output_ids, found.text) == (wanted.output_ids, wanted.text)


@given(answers, kinds, cuts, st.integers(1, 3))
def test_any_cut_gives_the_same_transcript(
    answer: list[bytes], kind: Kind, cuts: tuple[int, ...], step: int
) -> None:
    model = Model(answer, kind, step=step)
    stream = model.serve(model.body(40), "r")

    assert transcript(stream, cuts).state() == transcript(stream).state()
    assert transcript(stream, cuts).state().output_ids == list(range(len(answer)))


@given(answers, kinds, st.integers(0, 100_000))
def test_a_torn_last_event_counts_for_nothing(answer: list[bytes], kind: Kind, cut: int) -> None:
    model = Model(answer, kind)
    stream = model.serve(model.body(40), "r")
    stream = stream[: cut % len(stream)]

    assert transcript(stream).state() == transcript(whole_events(stream)).state()


@every_kind
def test_looking_in_between_changes_nothing(kind: Kind) -> None:
    model = Model([b"a", b" b", b" c"], kind)
    stream, looked = model.serve(model.body(9), "r"), Transcript()
    for at in range(len(stream)):
        looked.feed(stream[at : at + 1])
        looked.state()

    assert looked.state() == transcript(stream).state()


@every_kind
def test_a_long_transcript_stays_small(kind: Kind) -> None:
    model = Model([b" word"] * 1_000, kind)
    stream, kept = model.serve(model.body(1_000), "r"), Transcript()
    sizes = []
    for piece in cut_up(stream, tuple(range(0, len(stream), 1_000))):
        kept.feed(piece)
        sizes.append(kept._kept_bytes)

    assert max(sizes) < 200_000
    assert kept.state().text == " word" * 1_000


@pytest.mark.parametrize("kind", [Kind.CUMULATIVE, Kind.INCREMENTAL])
def test_the_unary_answer_is_assembled_from_the_stream(kind: Kind) -> None:
    model = Model([b"a", b" b"], kind)
    answer = orjson.loads(transcript(model.serve(model.body(9), "r")).final_answer())

    assert (answer["text"], answer["output_ids"]) == ("a b", [0, 1])
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 2}


def test_slices_of_log_probabilities_are_joined() -> None:
    def event(made: int, **lists: Any) -> bytes:
        meta = {"completion_tokens": made, **lists}
        return _event({"text": "x", "output_ids": [made], "meta_info": meta})

    first = event(1, output_token_logprobs=[[-1, 1]], input_token_logprobs=[[-9, 0]])
    second = event(2, output_token_logprobs=[[-2, 2]], input_token_logprobs=[])
    answer = orjson.loads(transcript(first + second + DONE).final_answer())

    assert answer["meta_info"]["output_token_logprobs"] == [[-1, 1], [-2, 2]]
    assert answer["meta_info"]["input_token_logprobs"] == [[-9, 0]]


def test_an_answer_that_never_began_cannot_be_assembled() -> None:
    with pytest.raises(ValueError, match="no answer"):
        transcript(b": ping\n\n").final_answer()


def test_an_error_in_the_stream_is_kept() -> None:
    model = Model([b"a", b"b", b"c"], Kind.INCREMENTAL)
    stream = model.serve(model.body(9), "r")[: -len(DONE)]
    state = transcript(stream + _event({"error": {"message": "queue full"}}) + DONE).state()

    assert state.error == {"message": "queue full"}
    assert state.output_ids == [0, 1, 2]


def test_the_body_that_resumes_asks_for_the_rest_only() -> None:
    model = Model([b"a", b"b", b"c", b"d"], Kind.CUMULATIVE)
    progress = transcript(model.serve(model.body(3), "r")).state()
    resumed = resumed_body(model.body(10), PROMPT, progress)

    assert resumed["input_ids"] == [*PROMPT, 0, 1, 2]
    assert resumed["sampling_params"]["max_new_tokens"] == 7
    assert (resumed["sampling_params"]["min_new_tokens"], "text" in resumed) == (0, False)


def test_an_answer_without_a_limit_has_none_when_it_is_resumed() -> None:
    model = Model([b"a", b"b"], Kind.CUMULATIVE)
    progress = transcript(model.serve(model.body(2), "r")).state()
    unlimited = resumed_body({"sampling_params": {"max_new_tokens": None}}, PROMPT, progress)
    default = resumed_body({"text": "a"}, PROMPT, progress)

    assert unlimited["sampling_params"]["max_new_tokens"] is None
    assert default["sampling_params"]["max_new_tokens"] == 126


def test_an_echoed_completion_is_not_resumed() -> None:
    model = Model([b"a", b"b"], Kind.COMPLETIONS)
    progress = transcript(model.serve(model.body(2), "r")).state()

    with pytest.raises(ValueError, match="echo"):
        resumed_body(model.body(5) | {"echo": True}, PROMPT, progress)


@every_kind
def test_a_server_that_died_after_the_last_token_adds_none(kind: Kind) -> None:
    """The next attempt must make one token at least, which the client must not see."""
    model = Model([b"a", b" b", b" c"], kind)
    longer = whole_events(model.serve(model.body(3), "r"))
    seen = longer[: longer.index(b"\n\n", first_token_at(longer)) + 2]
    progress = transcript(seen).state()
    splicer = Splicer(model.body(2), progress)
    seen += splicer.feed(model.serve(resumed_body(model.body(2), PROMPT, progress), "second"))
    found = transcript(seen).state()

    assert (found.text, found.output_ids, splicer.finished) == ("a b", [0, 1], True)
    assert found.finish_reason in ({"type": "length", "length": 2}, "length")


def test_errors_and_comments_pass_through_a_splice() -> None:
    model = Model([b"a", b"b", b"c"], Kind.CUMULATIVE)
    progress = transcript(model.serve(model.body(2), "r")).state()
    stream = b": ping\n\n" + _event({"error": {"message": "full"}}) + DONE

    assert Splicer(model.body(9), progress).feed(stream) == stream


def test_a_cumulative_server_can_go_on_for_an_incremental_one() -> None:
    first = Model([b"a", b" b", b" c", b" d"], Kind.INCREMENTAL)
    stream = first.serve(first.body(9), "first")
    seen = stream[: stream.index(b"\n\n", first_token_at(stream)) + 2]
    progress = transcript(seen).state().settled()
    second = Model(first.answer, Kind.CUMULATIVE)
    seen += Splicer(first.body(9), progress).feed(
        second.serve(resumed_body(first.body(9), PROMPT, progress), "second")
    )

    assert summary(transcript(seen).state()) == summary(transcript(stream).state())


odd = st.none() | st.integers(-1, 9) | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=3)
odd_meta = st.dictionaries(
    st.sampled_from(["completion_tokens", "prompt_tokens", "finish_reason", "id"]), odd
)
odd_events = st.fixed_dictionaries(
    {},
    optional={
        "text": odd,
        "output_ids": odd,
        "meta_info": odd | odd_meta,
        "choices": odd | st.lists(st.dictionaries(st.sampled_from(["text", "token_ids"]), odd)),
        "usage": odd | st.dictionaries(st.sampled_from(["prompt_tokens_details", "x"]), odd),
        "error": odd,
    },
)


@given(st.lists(odd_events, max_size=5), kinds)
def test_no_event_breaks_a_transcript_or_a_splice(sent: list[dict[str, Any]], kind: Kind) -> None:
    stream = b"".join(map(_event, sent))
    model = Model([b"a", b"b", b"c"], kind)
    progress = transcript(model.serve(model.body(2), "r")).state()

    assert transcript(stream).state().prompt_tokens >= -1
    assert Splicer(model.body(9), progress).feed(stream).count(b"\n\n") >= min(1, len(sent))


@every_kind
def test_an_attempt_that_never_answered_is_known_for_what_it_was(kind: Kind) -> None:
    incremental = {Kind.INCREMENTAL: True, Kind.CUMULATIVE: False}.get(kind)
    progress = Transcript.of(Model([], kind).body(5), incremental=incremental).state()

    assert (progress.kind, progress.output_ids, progress.text) == (kind, [], "")
    assert progress.settled() == progress


@pytest.mark.parametrize(
    ("answer", "stops", "settled"),
    [
        ([b"a", b" b"], (), 2),
        ([b"a", b"\xe4", b"\xbd"], (), 1),
        ([b"a", b" \xf0\x9f"], (), 1),
        ([b"a", b"b", b"c"], ("STOP",), 2),
        ([b"a", b"S"], ("STOP",), 0),
        ([b"a", b"S", b"x", b"y"], ("STOP",), 3),
    ],
)
@every_kind
def test_only_text_that_surely_is_whole_is_settled(
    kind: Kind, answer: list[bytes], stops: tuple[str, ...], settled: int
) -> None:
    model = Model([*answer, b"never"], kind, "".join(stops))
    stream = model.serve(model.body(9), "r")
    kept = Transcript(kind, stops=stops)
    for event in stream.split(b"\n\n")[: len(answer)]:
        kept.feed(event + b"\n\n")

    assert kept.state().settled_tokens == settled
    assert kept.state().settled().text == model.decoded(settled)
