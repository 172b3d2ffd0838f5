"""Cases that go wrong, to see that the harness tells them."""

import ctypes


def run(case):
    if case == 2:
        ctypes.string_at(0)
    while case == 4:
        pass
    assert case != 5
    return "fine"
