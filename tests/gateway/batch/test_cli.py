"""`slackwater batch` against a gateway that runs."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from rich.console import Console

from gateway.__main__ import main
from gateway.batch import board
from tests.gateway.batch.living import FLEET, Living, lines, living
from tests.gateway.gateway_under_test import chat

pytestmark = pytest.mark.real_time
CHAT = "/v1/chat/completions"


async def say(it: Living, *words: str) -> int:
    """In a thread: the command has a loop of its own."""
    return await asyncio.to_thread(main, ["batch", *words, "--url", it.url])


def write(folder: Path, rows: int = 5, tokens: int = 4) -> str:
    path = folder / "asked.jsonl"
    bodies = [chat(tokens, model="emulated", user=str(i)) for i in range(rows)]
    path.write_bytes(lines([*bodies], CHAT))
    return str(path)


async def test_a_file_is_submitted_watched_and_downloaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with living(tmp_path, FLEET[:2]) as it:
        path = write(tmp_path)
        assert await say(it, "submit", path, "--watch", "--metadata", "who=me") == 0
        shown = capsys.readouterr()
        assert "5 of 5 rows done" in shown.out
        assert "who=me" in shown.out
        assert await say(it, "list", "--json") == 0
        batch = json.loads(capsys.readouterr().out)
        assert await say(it, "status", batch["id"]) == 0
        assert "completed" in capsys.readouterr().out
        assert await say(it, "download", batch["id"]) == 0
        answers = (tmp_path / f"{batch['id']}.jsonl").read_text().splitlines()
        assert [json.loads(one)["custom_id"] for one in answers] == [f"row-{i}" for i in range(5)]
        assert await say(it, "download", batch["id"]) == 2
        assert "--force" in capsys.readouterr().err
        assert await say(it, "download", batch["id"], "-o", "-", "--json") == 0
        assert capsys.readouterr().out.splitlines() == answers


async def test_rows_that_fail_are_told_by_the_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        path = tmp_path / "asked.jsonl"
        path.write_bytes(lines([chat(4, model="emulated"), {"model": "emulated"}], CHAT))
        assert await say(it, "submit", str(path), "--watch", "--json") == 1
        batch = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert batch["request_counts"] == {"total": 2, "completed": 1, "failed": 1}


async def test_a_file_that_cannot_run_is_explained_line_by_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        path = tmp_path / "asked.jsonl"
        path.write_bytes(lines([chat(4, model="emulated")], CHAT) + b"not json\n")
        assert await say(it, "submit", str(path), "--watch") == 1
        assert "line 2:" in capsys.readouterr().out


async def test_a_batch_that_is_refused_leaves_no_file_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        assert await say(it, "submit", write(tmp_path), "--window", "9999d") == 2
        assert "completion_window" in capsys.readouterr().err
        async with aiohttp.ClientSession() as http, http.get(f"{it.url}/v1/files") as response:
            assert (await response.json())["data"] == []


async def test_what_is_stored_is_for_nobody_else_to_read(tmp_path: Path) -> None:
    async with living(tmp_path, FLEET[:2]):
        assert rights_of_others(tmp_path) == {0}


def rights_of_others(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o077 for path in folder.rglob("*.sqlite*")}


async def test_a_batch_can_be_cancelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        assert await say(it, "submit", write(tmp_path, 40, 5000), "--json") == 0
        batch = json.loads(capsys.readouterr().out)
        assert await say(it, "cancel", batch["id"]) == 0
        assert "cancel" in capsys.readouterr().out
        assert await say(it, "watch", batch["id"]) == 1


WRONG = {
    "nobody there": (["status", "batch_1", "--url", "http://127.0.0.1:9"], "refused"),
    "no such file": (["submit", "nowhere.jsonl"], "no such file"),
    "metadata": (["submit", "pyproject.toml", "--metadata", "x"], "KEY=VALUE"),
}


@pytest.mark.parametrize(("words", "why"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_words(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["batch", *words]) == 2
    assert why in capsys.readouterr().err


def test_help_teaches_how_a_file_looks(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["batch", "--help"])
    shown = capsys.readouterr().out
    assert "custom_id" in shown
    assert "Exit codes" in shown


@pytest.fixture
def batch() -> dict[str, Any]:
    progress = {"rows_per_s": 2.0, "tokens_per_s": 100.0, "finish_at": 1_700_000_000}
    return {
        "id": "batch_1",
        "status": "in_progress",
        "request_counts": {"total": 10, "completed": 4, "failed": 1},
        "metadata": {"slackwater": json.dumps(progress)},
    }


def test_a_batch_in_short_tells_rows_rates_and_when(batch: dict[str, Any]) -> None:
    words = board.in_short(batch)
    assert words.startswith("4 of 10 rows done, 1 failed, 2.0 rows/s, 100 tokens/s, done by 2023-")


@pytest.mark.parametrize("metadata", [None, {}, {"slackwater": "{"}, {"slackwater": "[]"}])
def test_a_gateway_that_tells_no_progress_is_borne(
    batch: dict[str, Any], metadata: dict[str, str] | None
) -> None:
    assert board.in_short(batch | {"metadata": metadata}) == "4 of 10 rows done, 1 failed"


def test_on_a_terminal_a_bar_shows_how_far_it_is(batch: dict[str, Any]) -> None:
    out = io.StringIO()
    with board.watching(Console(file=out, force_terminal=True, width=160), quiet=False) as show:
        show(batch)
    assert "in_progress" in out.getvalue()
    assert "5 of 10" in out.getvalue()
    assert "100 tokens/s" in out.getvalue()


def test_a_pipe_gets_a_line_now_and_then(batch: dict[str, Any]) -> None:
    out = io.StringIO()
    with board.watching(Console(file=out, width=160), quiet=False) as show:
        for _ in range(20):
            show(batch)
    assert len(out.getvalue().splitlines()) == 2
