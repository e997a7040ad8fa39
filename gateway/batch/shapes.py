"""How files and batches look to a client: OpenAI's fields, and how far it has come in ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

from gateway.batch.objects import Batch, Status, StoredFile
from gateway.batch.progress import KEY, progress_of

_MOMENTS: Final = {
    Status.IN_PROGRESS: "in_progress_at",
    Status.FINALIZING: "finalizing_at",
    Status.COMPLETED: "completed_at",
    Status.FAILED: "failed_at",
    Status.EXPIRED: "expired_at",
    Status.CANCELLING: "cancelling_at",
    Status.CANCELLED: "cancelled_at",
}


def file_shape(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": _s(file.created_us),
        "expires_at": None if file.expires_us is None else _s(file.expires_us),
        "filename": file.name,
        "purpose": file.purpose.value,
        "status": "processed",
        "status_details": None,
    }


def batch_shape(batch: Batch, now_us: int) -> dict[str, Any]:
    moments = {name: _moment(batch, status) for status, name in _MOMENTS.items()}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "model": batch.model or None,
        "errors": _errors(batch),
        "input_file_id": batch.input_file_id,
        "completion_window": batch.window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": _s(batch.created_us),
        "expires_at": _s(batch.deadline_us),
        **moments,
        "request_counts": asdict(batch.counts),
        "usage": _usage(batch),
        "metadata": {**batch.metadata, KEY: progress_of(batch, now_us).as_text()},
    }


def page_shape(items: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": items,
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }


def _errors(batch: Batch) -> dict[str, Any] | None:
    if not batch.problems:
        return None
    return {"object": "list", "data": [asdict(problem) for problem in batch.problems]}


def _usage(batch: Batch) -> dict[str, Any]:
    usage = batch.usage
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
    }


def _moment(batch: Batch, status: Status) -> int | None:
    us = batch.moments_us.get(status)
    return None if us is None else _s(us)


def _s(us: int) -> int:
    return us // 1_000_000
