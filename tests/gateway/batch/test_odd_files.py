"""Files that nobody should send: each ends as it should, and the gateway goes on."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.config import Key
from tests.gateway.batch.served import ENDPOINT, Served, jsonl, row, served
from tests.gateway.batch.test_bad_uploads import form, headers

pytestmark = pytest.mark.real_time

KEY = Key(key="one", tenant="one")
LONG = 17 * 2**20
ODD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty_batch"),
    "lines without anything": (b"\n\r\n \n\n", "empty_batch"),
    "one long line": (b'{"custom_id": "' + b"x" * LONG + b'"}', "invalid_request"),
    "a long line of nothing": (b" " * LONG, "empty_batch"),
    "zeros": (b"\0" * 999, "invalid_json_line"),
    "another encoding": (jsonl(row(1)).decode().strip().encode("utf-16"), "invalid_encoding"),
    "brackets": (b"[" * 99_999, "invalid_json_line"),
    "half a character": (jsonl(row(1))[:-3] + b"\xe2\x82", "invalid_encoding"),
}


async def validated(site: Served, data: bytes) -> dict[str, Any]:
    status, file = await site.ask("POST", "/v1/files", data=form(BytesIO(data)), headers=headers())
    assert status == 200, file
    asked = {"input_file_id": file["id"], "endpoint": ENDPOINT, "completion_window": "24h"}
    status, batch = await site.ask("POST", "/v1/batches", json=asked, headers=headers())
    assert status == 200, batch

    async def look() -> dict[str, Any] | None:
        path = f"/v1/batches/{batch['id']}"
        found: dict[str, Any] = (await site.ask("GET", path, headers=headers()))[1]
        return None if found["status"] == "validating" else found

    return await site.until(look)


async def test_an_odd_file_fails_its_batch_and_says_why(tmp_path: Path) -> None:
    async with served(tmp_path, KEY, files_mb_per_s=10_000.0) as site:
        for what, (data, code) in ODD.items():
            batch = await validated(site, data)
            found = [problem["code"] for problem in batch["errors"]["data"]]
            assert (batch["status"], found) == ("failed", [code]), what
            assert batch["request_counts"]["total"] == 0, what


async def test_any_script_and_the_ends_of_lines_of_windows_are_welcome(tmp_path: Path) -> None:
    lines = [
        orjson.dumps(row(n) | {"custom_id": name}) for n, name in enumerate(("日本語-é", "🎉"))
    ]
    async with served(tmp_path, KEY) as site:
        batch = await validated(site, b"\xef\xbb\xbf" + b"\r\n".join(lines))
        assert (batch["status"], batch["request_counts"]["total"]) == ("in_progress", 2)
