"""evaluate: accuracy by T of a saved network on many images, in one or several processes, interruptible.

    images -> batches 0, 1, 2, ...         fixed by the data and the batch size, whoever works on them
    rank r of w takes every w-th batch     of those not yet done
    after each batch                       the rank's state file is replaced: batches done, images seen, right by T
    at the end                             sums over all state files; then the state is removed

A state file is written atomically, so a process killed at any moment leaves the state after some whole batch. The next
run, with the same or another number of processes, does the remaining batches. One pass of the largest T answers for
all T (SNN.forward with per_step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..files import write_text_atomically
from ..network.loading import load
from ..network.snn import SNN
from .data import Dataset, batch_count, batch_range

# ------------------------------------------------------------------------------------------------- state


@dataclass
class Progress:
    """What one process has done, over all its runs."""

    batches: list[int]
    seen: int
    right: list[int]


class State:
    """A folder of state files, one per process, all of one evaluation."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rank: int) -> None:
        self.folder, self.fingerprint, self.rank = folder, fingerprint, rank
        folder.mkdir(parents=True, exist_ok=True)
        self.others: dict[int, Progress] = {}
        for path in folder.glob("*.json"):
            self.others[int(path.stem)] = self._read(path)
        self.before = sorted({b for p in self.others.values() for b in p.batches})  # done by earlier runs
        self.own = self.others.pop(rank, Progress([], 0, [0] * len(fingerprint["steps"])))

    def _read(self, path: Path) -> Progress:
        data = json.loads(path.read_text())
        differing = [k for k, v in self.fingerprint.items() if data["fingerprint"].get(k) != v]
        if differing:
            raise ValueError(
                f"{self.folder}: belongs to an evaluation with another {', '.join(differing)}; finish that one, or "
                "start anew with --restart"
            )
        return Progress(data["batches"], data["seen"], data["right"])

    def done(self) -> set[int]:
        """The batches that some process has finished."""
        return {b for p in (self.own, *self.others.values()) for b in p.batches}

    def write(self) -> None:
        own = self.own
        state = {"fingerprint": self.fingerprint, "batches": own.batches, "seen": own.seen, "right": own.right}
        write_text_atomically(self.folder / f"{self.rank}.json", json.dumps(state))

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------- processes


class Processes:
    """The processes of torchrun, or this one alone. Counts are summed over gloo, on the CPU."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world > 1:
            torch.distributed.init_process_group("gloo")

    def sum(self, counts: list[int]) -> list[int]:
        """Counts summed over all processes."""
        if self.world == 1:
            return counts
        total = torch.tensor(counts)
        torch.distributed.all_reduce(total)
        return [int(c) for c in total]

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        if self.world > 1:
            torch.distributed.destroy_process_group()


def device_of(name: str, local_rank: int) -> torch.device:
    """The device of that name; "auto" is this process's GPU where there is one."""
    if name == "auto":
        name = f"cuda:{local_rank % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: torch sees no GPU here")
    return device


@dataclass(frozen=True)
class Accuracy:
    """Right answers by T among `images`; `resumed` of them were counted by earlier, interrupted runs."""

    steps: list[int]
    right: list[int]
    images: int
    resumed: int

    def shares(self) -> list[float]:
        """Accuracy by T."""
        return [r / self.images for r in self.right]


def evaluate(
    network: Path,
    data: Dataset,
    steps: Sequence[int],
    batch: int = 64,
    state: Path | None = None,
    restart: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Accuracy | None:
    """Accuracy by T of a saved network.

    Args:
        network: file written by snn.save.
        data: see open_data.
        steps: the T to report; the network runs once, for the largest.
        batch: images per batch.
        state: folder for the state; default: the network's path with ".eval" appended.
        restart: forget an interrupted run.
        device: "auto", "cpu", "cuda", ...
        progress: a progress bar on stderr.

    Returns:
        The counts, on rank 0; None on the others.

    Raises:
        ValueError: the data does not fit the network, or the state belongs to another evaluation.
        KeyboardInterrupt: interrupted; the state holds every finished batch.
    """
    steps = sorted(set(steps))
    snn = load(network)
    snn._checked_steps(max(steps))
    processes = Processes()
    place = device_of(device, processes.local)
    snn = snn.to(place)
    folder = state or network.with_name(network.name + ".eval")
    if restart and processes.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait()
    fingerprint = {
        "network": hashlib.sha256(network.read_bytes()).hexdigest(),
        "data": [str(data.path.resolve()), len(data)],
        "steps": steps,
        "batch": batch,
        "preprocessing": [getattr(data, "size", None), data.mean and list(data.mean), data.std and list(data.std)],
    }
    try:
        kept = State(folder, fingerprint, processes.rank)
        processes.wait()  # everyone has read before anyone writes
        _work(snn, data, kept, processes, batch, steps, place, progress)
        counts = [kept.own.seen, *kept.own.right]
        if processes.rank == 0:
            for other, done in kept.others.items():
                if other >= processes.world:  # left by a run with more processes
                    counts = [a + b for a, b in zip(counts, [done.seen, *done.right], strict=True)]
        resumed = sum(len(batch_range(data, b, batch)) for b in kept.before)
        counts = processes.sum(counts)
        if processes.rank:
            return None
        kept.remove()
        return Accuracy(list(steps), counts[1:], counts[0], resumed)
    finally:
        processes.close()


def _work(
    snn: SNN,
    data: Dataset,
    kept: State,
    processes: Processes,
    batch: int,
    steps: Sequence[int],
    place: torch.device,
    progress: bool,
) -> None:
    """This process's share of the batches that nobody has done."""
    count = batch_count(data, batch)
    done = kept.done()
    mine = [b for b in range(count) if b not in done][processes.rank :: processes.world]
    bar = tqdm(total=count if processes.world == 1 else len(mine), initial=len(done) if processes.world == 1 else 0,
               desc="evaluating", unit="batch", disable=not progress or processes.rank > 0)  # fmt: skip
    with bar, torch.no_grad():
        for number in mine:
            x, y = data.batch(batch_range(data, number, batch))
            out = snn(x.to(place), T=max(steps), per_step=True)
            labels = out.argmax(2).cpu()
            kept.own.right = [r + int((labels[t - 1] == y).sum()) for r, t in zip(kept.own.right, steps, strict=True)]
            kept.own.seen += len(y)
            kept.own.batches.append(number)
            kept.write()
            bar.update()
            bar.set_postfix({f"T={steps[-1]}": f"{kept.own.right[-1] / kept.own.seen:.1%}"})
