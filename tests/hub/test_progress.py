"""The bytes that arrive in a folder, counted from outside."""

import time

from drift_merge.hub import progress


def test_every_byte_is_counted_once_also_if_a_part_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_PERIOD_SECONDS", 0.01)
    (tmp_path / "before").write_bytes(b"x" * 1000)
    seen = []
    with progress.watched(tmp_path, seen.append):
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub/a.incomplete").write_bytes(b"x" * 300)
        wait_for(lambda: sum(seen) == 300)
        (tmp_path / "sub/a.incomplete").unlink()
        time.sleep(0.05)
        (tmp_path / "sub/a.incomplete").write_bytes(b"x" * 500)
        wait_for(lambda: sum(seen) == 500)
        (tmp_path / "b").write_bytes(b"x" * 7)
    assert sum(seen) == 507
    assert all(count > 0 for count in seen)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_no_progress_takes_what_it_is_given():
    with progress.no_progress("Fetching", 10) as advance:
        advance(10)
