from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from backends.step_tables import Origin, TableError, read_table
from policies.roofline import decode_batch, prefill_batch

HEAD = "system,model,tp,phase,batch_size,ctx_len,latency_ms,cached_len\n"
ROWS = "h100_sxm,org/M,4,prefill,2,512,30.5,100\nh100_sxm,org/M,4,decode,8,1024,7.25,\n"


@pytest.mark.parametrize("compressed", [False, True])
def test_rows_become_samples_by_origin(tmp_path: Path, compressed: bool) -> None:  # noqa: FBT001
    path = tmp_path / ("t.csv.gz" if compressed else "t.csv")
    data = (HEAD + ROWS).encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    (origin, samples), *rest = read_table(path).items()
    assert origin == Origin(system="h100_sxm", model="org/M", tp=4)
    assert [s.batch for s in samples] == [prefill_batch([(512, 100)] * 2), decode_batch(8, 8192)]
    assert [s.seconds for s in samples] == pytest.approx([0.0305, 0.00725])
    assert not rest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("phase,batch_size\n", r"lacks.*ctx_len.*latency_ms"),
        (HEAD, "no rows"),
        (HEAD + "h,m,1,decode,0,5,1.0,\n", "line 2.*batch of 0"),
        (
            HEAD + ROWS + "h,m,1,idle,1,5,1.0,\n",
            "line 4: phase must be one of .*, got 'idle'",
        ),
        (HEAD + "h,m,1,decode,1,5,soon,\n", "line 2: latency_ms must be a number, got 'soon'"),
        (HEAD + "h,m,1,decode,1,5\n", "line 2: latency_ms must be a number, got ''"),
        (HEAD + "h,m,1,decode,1.5,5,1\n", "line 2: batch_size must be a whole number, got '1.5'"),
    ],
)
def test_a_broken_table_says_where(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TableError, match=reason):
        read_table(path)


def test_the_shortest_table_has_four_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("phase,batch_size,ctx_len,latency_ms\ndecode,1,10,5\n")
    assert list(read_table(path)) == [Origin()]
