"""docs/batch.md names the metrics of batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.batch.gauges import BatchGauges
from gateway.clock import unix_us
from tests.documents import ROOT, rows
from tests.gateway.batch.living import FLEET, living


@pytest.mark.real_time
async def test_the_metrics_are_those_of_the_gateway(tmp_path: Path) -> None:
    async with living(tmp_path, FLEET[:2]) as it:
        runner = it.gateway.batches._runner  # type: ignore[union-attr]  # it is on
        families = list(BatchGauges(runner, unix_us).collect())
    names = {one.name + ("_total" if one.type == "counter" else "") for one in families}
    text = (ROOT / "docs" / "batch.md").read_text()
    table = rows(text.split("\n## Metrics\n")[1].split("\n## ")[0])
    assert {row[0].strip("`") for row in table} == names
