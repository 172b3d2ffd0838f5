"""Cases that go wrong, to see that the harness tells them."""

import ctypes
import time


def run(case):
    if case == 2:
        ctypes.string_at(0)
    if case == 4:
        time.sleep(100)
    assert case != 5
    return "fine"
