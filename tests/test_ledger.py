"""Files of results: what a run that was killed left is mended, and every other row stays."""

import json
import os

import pytest

from experiments import record
from experiments.ledger import Ledger


def test_a_row_that_is_half_written_is_mended_before_the_next(tmp_path):
    """By `append` alone, as finetune.py uses it: the new row is whole, and so are those before."""
    path = tmp_path / "results.jsonl"
    record.append(path, {"seed": 0}, {"value": 1})
    whole = path.read_text()
    for left in (whole[: len(whole) // 2], whole[:-1]):
        path.write_text(whole + left)
        record.append(path, {"seed": 1}, {"value": 2})
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert path.read_text().startswith(whole) and rows == record.read(path)
        assert [row["config"]["seed"] for row in rows] == ([0, 1] if left != whole[:-1] else [0, 0, 1])


def test_a_ledger_finds_runs_by_their_settings(tmp_path):
    ledger = Ledger(tmp_path / "runs.jsonl", 1)
    ledger.add({"rate": 0.1, "rows": (1, 2)}, {"value": 3})
    path = tmp_path / "runs.jsonl"
    path.write_text(path.read_text() + path.read_text()[:40])
    again = Ledger(path, 1)
    assert again.find({"rate": 0.1, "rows": (1, 2)}) == {"value": 3}
    assert again.find({"rate": 0.2, "rows": (1, 2)}) is None


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores are given to processes on Linux alone")
def test_a_row_says_on_how_many_cores_it_was_measured(tmp_path):
    allowed, path = os.sched_getaffinity(0), tmp_path / "results.jsonl"
    try:
        for some in (allowed, {min(allowed)}):
            os.sched_setaffinity(0, some)
            record.append(path, {}, {})
    finally:
        os.sched_setaffinity(0, allowed)
    assert [row["device"]["cores"] for row in record.read(path)] == [len(allowed), 1]
