"""A short run of each kind of case in tests/fuzz; `make fuzz` runs more. test_odd_calls.py has the operators."""

from fuzz import harness


def test_altered_files():
    """Python and the native reader refuse the same, and what they accept runs."""
    seen = harness.fuzz("files", 0, 250)
    assert sum(seen.values()) == 250
    assert not harness.BAD & set(seen)
    assert seen["refused"] > 100
    assert seen["ran"] > 15


def test_odd_models():
    seen = harness.fuzz("models", 0, 30)
    assert sum(seen.values()) == 30
    assert not harness.BAD & set(seen)
    assert seen["refused"] > 5
    assert seen["equal"] > 10


def test_the_harness_sees_crashes_hangs_and_wrong_answers(monkeypatch):
    monkeypatch.setattr(harness, "HANG", 2)
    seen = harness.fuzz("broken", 0, 8)
    assert seen == {"fine": 5, "CRASH": 1, "HANG": 1, "WRONG": 1}
