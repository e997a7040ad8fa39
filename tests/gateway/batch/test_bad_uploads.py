"""What bad input to /v1/files and /v1/batches gets: the documented error, and nothing is left."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.config import Key
from tests.gateway.batch.served import ENDPOINT, Served, jsonl, row, served

pytestmark = [pytest.mark.real_time, pytest.mark.usefixtures("_sweeps_often")]

KEYS = (Key(key="one", tenant="one"), Key(key="two", tenant="two", open_batches=1))


def headers(key: str = "one") -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def form(
    data: Any = b"", *, name: str | None = "a.jsonl", **fields: str
) -> aiohttp.MultipartWriter:
    """As a client writes it, good or bad."""
    made = aiohttp.MultipartWriter("form-data")
    for key, value in {"purpose": "batch", **fields}.items():
        made.append(value).set_content_disposition("form-data", name=key)
    if name is not None:
        part = made.append(data)
        part.set_content_disposition("form-data", quote_fields=False, name="file", filename=name)
    return made


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, *KEYS, max_file_mb=0.01, stored_gb=0.00002) as site:
        yield site
        await kept(site)


async def kept(site: Served) -> list[str]:
    """Blobs that a file is made of; what else lies there is swept up within a moment."""
    store, _ = site.service.opened()
    files = [*(await store.files("one", limit=99))[0], *(await store.files("two", limit=99))[0]]
    blobs = sorted(file.blob for file in files)

    async def is_swept() -> bool:
        return site.stored() == blobs

    await site.until(is_swept)
    return blobs


async def upload(site: Served, data: Any, key: str = "one") -> tuple[int, Any]:
    return await site.ask("POST", "/v1/files", data=data, headers=headers(key))


async def uploaded(site: Served, key: str = "one") -> str:
    status, body = await upload(site, form(jsonl(row(1))), key)
    assert status == 200, body
    return str(body["id"])


async def submit(site: Served, file_id: str, key: str = "one", **more: Any) -> tuple[int, Any]:
    asked = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    return await site.ask("POST", "/v1/batches", json=asked | more, headers=headers(key))


UPLOADS: dict[str, tuple[Any, int, str, str]] = {
    "another purpose": (form(purpose="fine-tune"), 400, "invalid_request", "purpose"),
    "no file": (form(name=None), 400, "invalid_request", "file"),
    "a path": (form(name="../../etc/passwd"), 400, "invalid_request", "file"),
    "a path of Windows": (form(name="..\\\\x"), 400, "invalid_request", "file"),
    "a long name": (form(name="x" * 256), 400, "invalid_request", "file"),
    "another field": (form(colour="red"), 400, "unknown_parameter", "'colour'"),
    "a long field": (form(purpose="x" * 999), 400, "invalid_request", "purpose"),
    "half an expiry": (
        form(**{"expires_after[seconds]": "9"}), 400, "invalid_request", "expires_after.anchor",
    ),
    "a short expiry": (
        form(**{"expires_after[anchor]": "created_at", "expires_after[seconds]": "9"}),
        400, "invalid_request", "expires_after.seconds",
    ),
    "a large file": (form(b"x" * 20_000), 413, "body_too_large", "file"),
    "a very large file": (form(b"x" * 200_000), 413, "body_too_large", "file"),
    "no form": (b'{"purpose": "batch"}', 400, "invalid_request", ""),
}  # fmt: skip


async def test_uploads_that_are_refused_leave_nothing(site: Served) -> None:
    for what, (data, status, code, param) in UPLOADS.items():
        told, body = await upload(site, data)
        assert (told, body["error"]["code"]) == (status, code), what
        assert (body["error"]["param"] or "") == param, what


@pytest.mark.parametrize("missing", [1, 30, 2_000])
async def test_a_form_without_its_end_is_refused(site: Served, missing: int) -> None:
    """All the bytes that were promised have come, but they are not a whole form."""
    text = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    text += b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    text += b"x" * 3_000 + b"\r\n--b--"
    status, body = await site.ask(
        "POST",
        "/v1/files",
        data=text[:-missing],
        headers=headers() | {"content-type": "multipart/form-data; boundary=b"},
    )
    assert (status, body["error"]["code"]) == (400, "invalid_request")


async def test_an_upload_that_is_cut_off_leaves_nothing(site: Served) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", site.gateway.port)
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer one\r\n"
        b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 9000\r\n\r\n"
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n' + b"x" * 500
    )
    await writer.drain()

    async def has_begun() -> bool:
        return bool(site.stored())

    await site.until(has_begun)
    writer.close()
    assert await kept(site) == []


async def test_one_tenants_files_and_batches_are_invisible_to_another(site: Served) -> None:
    file_id = await uploaded(site)
    batch_id = (await submit(site, file_id))[1]["id"]
    pages = [
        ("GET", f"/v1/files/{file_id}"),
        ("GET", f"/v1/files/{file_id}/content"),
        ("DELETE", f"/v1/files/{file_id}"),
        ("GET", f"/v1/batches/{batch_id}"),
        ("POST", f"/v1/batches/{batch_id}/cancel"),
        ("GET", f"/v1/files?after={file_id}"),
    ]
    for method, path in pages:
        told = await site.ask(method, path, headers=headers("two"))
        assert (told[0], told[1]["error"]["code"]) == (404, "not_found"), path
        assert (await site.ask(method, path))[0] == 401, path
    assert (await submit(site, file_id, "two"))[0] == 404


BATCHES: dict[str, tuple[dict[str, Any], str]] = {
    "another endpoint": ({"endpoint": "/v1/images/generations"}, "endpoint"),
    "no window": ({"completion_window": None}, "completion_window"),
    "a window that is none": ({"completion_window": "soon"}, "completion_window"),
    "a window of nothing": ({"completion_window": "0h"}, "completion_window"),
    "a window of years": ({"completion_window": "900d"}, "completion_window"),
    "no file": ({"input_file_id": None}, "input_file_id"),
    "metadata that is no text": ({"metadata": {"a": 1}}, "metadata"),
    "much metadata": ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
    "our metadata": ({"metadata": {"slackwater": ""}}, "metadata"),
    "an expiry that is none": ({"output_expires_after": 3600}, "output_expires_after"),
    "an anchor that is none": (
        {"output_expires_after": {"anchor": "now", "seconds": 3600}}, "output_expires_after.anchor",
    ),
}  # fmt: skip


async def test_batches_that_are_refused_leave_nothing(site: Served) -> None:
    file_id = await uploaded(site)
    for what, (more, param) in BATCHES.items():
        status, body = await submit(site, file_id, **more)
        assert (status, body["error"]["param"]) == (400, param), what
    status, body = await submit(site, file_id, colour="red")
    assert (status, body["error"]["code"]) == (400, "unknown_parameter")
    status, body = await submit(site, "file-unknown")
    assert (status, body["error"]["param"]) == (404, "input_file_id")
    assert (await site.ask("GET", "/v1/batches", headers=headers()))[1]["data"] == []


async def test_a_refusal_says_what_was_sent_and_what_there_is(site: Served) -> None:
    told = (await upload(site, form(purpose="fine-tune")))[1]["error"]["message"]
    assert told == "purpose is 'fine-tune'; the one that there is here is 'batch'"
    for window, words in {
        "soon": "'soon', which is no duration: 24h, 90m, 1h30m and 7d are some",
        "900d": "'900d', and may be 30d at most",
        "\n" * 999: "...', which is no duration",
        "²h": "which is no duration",
    }.items():
        told = (await submit(site, "file-1", completion_window=window))[1]["error"]["message"]
        assert words in told, window
        assert len(told) < 300, window


async def test_quotas_are_those_of_the_key(site: Served) -> None:
    file_id = await uploaded(site, "two")
    assert (await submit(site, file_id, "two"))[0] == 200
    status, body = await submit(site, file_id, "two")
    assert (status, body["error"]["code"]) == (429, "quota_exceeded")
    for _ in range(2):
        assert (await upload(site, form(b"x" * 9_000)))[0] == 200
    status, body = await upload(site, form(b"x" * 9_000))
    assert (status, body["error"]["code"]) == (429, "quota_exceeded")


async def test_an_id_that_cannot_be_one_is_nothing_to_look_for(site: Served) -> None:
    for path in ("/v1/files/%00", "/v1/batches/a%0Ab", f"/v1/files/{'x' * 65}/content"):
        status, body = await site.ask("GET", path, headers=headers())
        assert (status, body["error"]["code"]) == (404, "not_found"), path
    for path in ("/v1/files?after=%00", "/v1/batches?after=%00"):
        status, body = await site.ask("GET", path, headers=headers())
        assert (status, body["error"]["param"]) == (400, "after"), path


async def test_content_comes_in_ranges(site: Served) -> None:
    file_id = await uploaded(site)
    whole = jsonl(row(1))
    path = f"{site.url}/v1/files/{file_id}/content"
    for given, status, part in [
        ("bytes=0-4", 206, whole[:5]),
        ("bytes=5-", 206, whole[5:]),
        ("bytes=-3", 206, whole[-3:]),
        ("bytes=2-99999", 206, whole[2:]),
        ("bytes=4-2", 200, whole),
        ("lines=1-2", 200, whole),
    ]:
        async with site.http.get(path, headers=headers() | {"range": given}) as response:
            assert (response.status, await response.read()) == (status, part), given
    async with site.http.get(path, headers=headers() | {"range": "bytes=9999-"}) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (
            416,
            "range_not_satisfiable",
        )
    async with site.http.head(path, headers=headers()) as response:
        assert response.headers["content-length"] == str(len(whole))


async def test_what_is_in_use_is_not_deleted_and_what_has_ended_not_cancelled(
    site: Served,
) -> None:
    file_id = await uploaded(site)
    batch_id = (await submit(site, file_id))[1]["id"]
    status, body = await site.ask("DELETE", f"/v1/files/{file_id}", headers=headers())
    assert (status, body["error"]["code"]) == (409, "file_in_use")
    cancel = f"/v1/batches/{batch_id}/cancel"
    assert (await site.ask("POST", cancel, headers=headers()))[0] == 200

    async def has_ended() -> bool:
        found = (await site.ask("GET", f"/v1/batches/{batch_id}", headers=headers()))[1]
        return bool(found["status"] == "cancelled")

    await site.until(has_ended)
    status, body = await site.ask("POST", cancel, headers=headers())
    assert (status, body["error"]["code"]) == (409, "batch_has_ended")
    assert (await site.ask("DELETE", f"/v1/files/{file_id}", headers=headers()))[0] == 200


async def test_bytes_that_are_gone_are_told_of(site: Served) -> None:
    file_id = await uploaded(site)
    store, _ = site.service.opened()
    blob = (await store.file("one", file_id)).blob
    os.rename(site.folder / "files" / blob, site.folder / "aside")
    status, body = await site.ask("GET", f"/v1/files/{file_id}/content", headers=headers())
    assert (status, body["error"]["code"]) == (404, "not_found")
    os.rename(site.folder / "aside", site.folder / "files" / blob)
