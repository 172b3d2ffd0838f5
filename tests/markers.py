"""Which cases of a test are left to the full run."""

import pytest


def slow_but(quick, cases, *marks):
    """All cases; `make quick` runs those in `quick`, which stand for the others. Those have these marks, too."""
    return [case if case in quick else pytest.param(case, marks=[pytest.mark.slow, *marks]) for case in cases]
