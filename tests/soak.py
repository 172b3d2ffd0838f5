"""Networks made, called in many ways and dropped, for as long as is asked: `make soak MINUTES=60`.

After a tenth of the time everything that is kept once (caches, plans, threads) is there. From then on resident memory
may grow by at most GROWTH, and the numbers of threads and of open files must be those of then.
"""

import argparse
import gc
import os
import random
import tempfile
import threading
import time
from pathlib import Path

import networks
import torch

import qcfs_fast
from qcfs_fast import backend

GROWTH = 96  # MiB
PAGE = os.sysconf("SC_PAGE_SIZE")


def figures():
    """Resident MiB, threads of the process, open files."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20
    return resident, len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))


def round_of(numbers, models, folder):
    """One network: converted or loaded, its modes, shapes and steps, a stream, a few threads."""
    kind = numbers.choice(list(models))
    neuron = numbers.choice(["plain", "plain", "offset", "masked", "signed", "sum"])
    snn = qcfs_fast.convert(
        models[kind], T=numbers.choice([1, 4, 6]), weight_bits=numbers.choice([8, 16, 24]), neuron=neuron,
        progress=False, check=False,
    )  # fmt: skip
    if numbers.random() < 0.5:
        snn.save(folder / "net")
        snn = qcfs_fast.load(folder / "net")
    x = networks.images(networks.SHAPES[kind], numbers.choice([1, 2, 5]), seed=numbers.randrange(99))
    with backend.force(reference=numbers.random() < 0.1 or None):
        out = snn(x)
    for _ in range(numbers.randrange(4)):
        snn(
            x[: numbers.randrange(1, len(x) + 1)].contiguous(), T=None if neuron == "sum" else numbers.choice([4, 5, 9])
        )
    if neuron in ("plain", "signed"):
        stream = snn.stream()
        for _ in range(3):
            stream(x, steps=2)
    callers = [threading.Thread(target=snn, args=(x,)) for _ in range(numbers.choice([0, 0, 3]))]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert torch.equal(snn(x), out), "the same network answers otherwise"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    minutes = parser.parse_args().minutes
    numbers, begun, shown, rounds, settled = random.Random(0), time.monotonic(), 0.0, 0, None
    models = {kind: networks.lively(networks.randomize(kind()), shape) for kind, shape in networks.SHAPES.items()}
    with tempfile.TemporaryDirectory() as folder:
        while (passed := (time.monotonic() - begun) / 60) < minutes:
            round_of(numbers, models, Path(folder))
            rounds += 1
            if passed < shown:
                continue
            shown += minutes / 20
            now = figures()
            print(
                f"{passed:6.1f} min {rounds:7} networks: {now[0]:.0f} MiB, {now[1]} threads, {now[2]} files", flush=True
            )
            if settled is None and passed >= minutes / 10:
                settled = now
            if settled is not None:
                assert now[0] <= settled[0] + GROWTH, "memory grows"
                assert now[1:] == settled[1:], "threads or open files are more than they were"


if __name__ == "__main__":
    main()
