"""Runs numbered cases in a child process: a crash or a hang ends the child, the case is named, the next one begins."""

import collections
import importlib
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback

MEMORY = 6 * 2**30
HANG = 120  # seconds of computing; ten times as many of waiting, which a busy machine makes longer
SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")  # make fuzz SANITIZE=1
BAD = {"CRASH", "HANG", "WRONG"}


def work(kind, first, last, deadline, hang, place, results):
    """In the child: cases first .. last - 1 of a module's `run`. `place` tells the parent which one is running."""
    if not SANITIZED:  # whose shadow memory is terabytes; ASAN_OPTIONS has a limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    run = importlib.import_module(f"fuzz.{kind}").run
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    for case in range(first, last):
        if time.time() > deadline:
            break
        place.value = case
        for clock, seconds in ((signal.ITIMER_PROF, hang), (signal.ITIMER_REAL, 10 * hang)):
            signal.setitimer(clock, seconds)  # without a handler: it ends the child, whatever runs
        try:
            results.put((case, run(case)))
        except Exception:
            print(f"{kind} case {case}:\n{traceback.format_exc()}", flush=True)
            results.put((case, "WRONG"))
    for clock in (signal.ITIMER_PROF, signal.ITIMER_REAL):
        signal.setitimer(clock, 0)


def fuzz(kind, first, cases, seconds=1e9):
    """How many cases had each outcome; "CRASH" and "HANG" are those that ended their process."""
    context = multiprocessing.get_context("spawn")
    place, seen = context.RawValue("q", first), collections.Counter()
    deadline, last = time.time() + seconds, first + cases
    while first < last and time.time() < deadline:
        results = context.SimpleQueue()
        place.value = first
        child = context.Process(target=work, args=(kind, first, last, deadline, HANG, place, results))
        child.start()
        while child.is_alive() or not results.empty():
            if results.empty():
                child.join(0.02)
            else:
                case, found = results.get()
                first = case + 1
                seen[found] += 1
        if child.exitcode == 0:
            break
        name = "HANG" if -child.exitcode in (signal.SIGPROF, signal.SIGALRM) else "CRASH"
        print(f"{kind} case {place.value}: {name} (exit status {child.exitcode})", flush=True)
        seen[name] += 1
        first = place.value + 1
    return dict(seen)
