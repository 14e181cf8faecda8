"""The guide says what the stored runs say."""

from pathlib import Path

import numpy as np
import pytest

from drift_merge import guides
from tests.benchmarks.study import report
from tests.benchmarks.study.runs import best_rate
from tests.benchmarks.study.stored import interval, load
from tests.benchmarks.study.worlds import WORLDS

STUDY = Path(__file__).parent


@pytest.mark.parametrize("name", WORLDS)
def test_the_tables_of_the_guide_are_those_of_the_runs(name):
    world = WORLDS[name]
    stored = load(STUDY / world.results)
    rate = best_rate(stored)
    text = guides.text_of("evidence")
    assert report.markdown(report.table(stored, rate, world.rows), report.COLUMNS) in text
    found = report.comparisons(report.tests_of(stored, rate))
    rows = {row.name for row in world.rows}
    assert len(found) == sum(rows.issuperset(both) for both in report.PRIMARY)
    assert report.markdown(found, report.COMPARED) in text
    assert (STUDY / world.results / "table.md").read_text() in report.text_of(stored, world.rows)


def test_an_interval_is_of_paired_differences():
    rng = np.random.default_rng(1)
    other = [rng.random(300) < 0.3 for _ in range(10)]
    one = [right | (rng.random(300) < 0.2) for right in other]  # 14 points more, never one less
    mean, low, high = interval(one, other)
    assert abs(mean - 0.14) < 0.02
    assert 0.10 < low < mean < high < 0.18
    mean, low, high = interval(other, other)
    assert (mean, low, high) == (0, 0, 0)
