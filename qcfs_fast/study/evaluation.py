"""evaluate: accuracy by T and mode of a saved network on many images, in one or several processes, interruptible.

    images -> batches 0, 1, 2, ...         fixed by the data and the batch size, whoever works on them
    rank r of w takes every w-th batch     of those not yet done
    after each batch                       the rank's state file is replaced: batches done, images seen, right answers
    at the end                             sums over all state files; then these are removed, and no other file

One launch at a time works in a folder of state. A state file is written atomically, so a process killed at any moment
leaves the state after some whole batch. The next run, with the same or another number of processes, does the remaining
batches. One pass of the largest T answers for all T (SNN.forward with per_step); sum mode, which has no steps, takes a
pass for each T.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..files import read_json, remove_written, sole_user, write_text_atomically
from ..network.saving import checksum
from ..network.schema import is_int
from ..network.snn import SNN
from ..operators.neuron import Neuron
from .data import Dataset, batch_count, batch_range, check_labels, check_steps

# ------------------------------------------------------------------------------------------------- state


@dataclass
class Progress:
    """What one process has done, over all its runs."""

    batches: list[int]
    seen: int
    right: list[int]  # by mode, in a mode by T


FILES = r"[0-9]+\.json"  # by rank


def _is_state(found: Any) -> bool:
    about, batches = found["fingerprint"], found["batches"]
    columns = len(about["neurons"]) * len(about["steps"])
    whole = all(is_int(n, 0) for n in (*batches, found["seen"], *found["right"]))
    left = [about["data"][1] - number * about["batch"] for number in set(batches)]  # images from there on
    fits = min(left, default=1) > 0 and found["seen"] == sum(min(n, about["batch"]) for n in left)
    fits = fits and isinstance(batches, list) and len(left) == len(batches)
    return whole and fits and len(found["right"]) == columns and max(found["right"]) <= found["seen"]


def _kept(folder: Path) -> dict[int, Any]:
    """What stands in the state files of a folder, by rank; ValueError where a file of such a name is none."""
    own = (path for path in folder.iterdir() if re.fullmatch(FILES, path.name))
    return {int(path.stem): read_json(path, "state of an evaluation", _is_state) for path in own}


class State:
    """A folder of state files, one per process, all of one evaluation."""

    def __init__(self, folder: Path, fingerprint: dict[str, Any], rank: int) -> None:
        self.folder, self.fingerprint, self.rank = folder, fingerprint, rank
        folder.mkdir(parents=True, exist_ok=True)  # on another machine than the first process's
        self.others = {rank: self._read(found) for rank, found in _kept(folder).items()}
        self.before = sorted({b for p in self.others.values() for b in p.batches})  # done by earlier runs
        columns = len(fingerprint["neurons"]) * len(fingerprint["steps"])
        self.own = self.others.pop(rank, Progress([], 0, [0] * columns))

    def _read(self, data: dict[str, Any]) -> Progress:
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


# --------------------------------------------------------------------------------------------- processes


class Processes:
    """The processes of torchrun, or this one alone. What lies on the CPU travels over gloo, what on GPUs over nccl."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        if self.world > 1:
            gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")

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

    @contextlib.contextmanager
    def alone_in(self, folder: Path, option: str) -> Iterator[None]:
        """These processes and no others work in a folder, which the first one holds; at the end they part."""
        try:
            with sole_user(folder, option) if self.rank == 0 else contextlib.nullcontext():
                self.wait()
                yield
        finally:
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
    """Right answers among `images`: right[i][j] by neurons[i] after steps[j].

    `resumed` of the images were counted by earlier, interrupted runs.
    """

    neurons: list[Neuron]
    steps: list[int]
    right: list[list[int]]
    images: int
    resumed: int


def evaluate(
    snn: SNN,
    data: Dataset,
    steps: Sequence[int],
    state: Path,
    neurons: Sequence[Neuron] | None = None,
    batch: int = 64,
    restart: bool = False,
    device: str = "auto",
    progress: bool = True,
) -> Accuracy | None:
    """Accuracy by T of a saved network, in one or several modes of its neurons.

    Args:
        snn: the network, on the CPU.
        data: see open_data. Of images over time, the network sees the first T.
        steps: the T to report; the network runs once, for the largest.
        state: folder for the state.
        neurons: the modes to report; default: the network's own.
        batch: images per batch.
        restart: forget an interrupted run.
        device: "auto", "cpu", "cuda", ...
        progress: a progress bar on stderr.

    Returns:
        The counts, on rank 0; None on the others.

    Raises:
        ValueError: the data does not fit the network or a mode, or the state belongs to another evaluation.
        BlockingIOError: another process evaluates with this state.
        KeyboardInterrupt: interrupted; the state holds every finished batch.
    """
    steps = sorted(set(steps))
    neurons = [snn.neuron] if neurons is None else list(dict.fromkeys(neurons))
    for neuron in neurons:
        _check(_in_mode(snn, neuron), data, max(steps))
    processes = Processes()
    place = device_of(device, processes.local)
    fingerprint = {
        "network": checksum(*snn.saved()),
        "data": [str(data.path.resolve()), len(data), data.content()],
        "steps": steps,
        "neurons": [str(neuron) for neuron in neurons],
        "batch": batch,
        "preprocessing": [getattr(data, "size", None), data.mean and list(data.mean), data.std and list(data.std)],
    }
    snn = snn.to(place)
    with processes.alone_in(state, "--state"):
        if restart and processes.rank == 0 and _kept(state):  # which refuses files of others
            remove_written(state, FILES)
        processes.wait()
        kept = State(state, fingerprint, processes.rank)
        processes.wait()  # everyone has read before anyone writes
        _work([_in_mode(snn, neuron) for neuron in neurons], data, kept, processes, batch, steps, place, progress)
        counts = [kept.own.seen, *kept.own.right]
        if processes.rank == 0:
            for other, done in kept.others.items():
                if other >= processes.world:  # left by a run with more processes
                    counts = [a + b for a, b in zip(counts, [done.seen, *done.right], strict=True)]
        resumed = sum(len(batch_range(data, b, batch)) for b in kept.before)
        counts = processes.sum(counts)
        if processes.rank:
            return None
        remove_written(state, FILES)
        seen, *right = counts
        by_neuron = [right[i : i + len(steps)] for i in range(0, len(right), len(steps))]
        return Accuracy(neurons, steps, by_neuron, seen, resumed)


def _in_mode(snn: SNN, neuron: Neuron) -> SNN:
    """The same network, of the same tensors, with other neurons."""
    other = copy.copy(snn)
    other.neuron = neuron
    return other


def _check(snn: SNN, data: Dataset, T: int) -> None:
    """Raises where the network cannot run on this data for T steps."""
    snn._checked_steps(T)
    if data.steps is not None and snn.neuron.mode == "sum":
        raise ValueError(
            f"{data.path}: its images change with time, but sum mode adds up the steps of one; leave it out"
        )
    check_steps(data, snn.neuron.steps(T))


def _right(snn: SNN, x: Tensor, labels: Tensor, steps: Sequence[int], data: Dataset) -> list[int]:
    """Right answers by T."""
    if snn.neuron.mode == "sum":
        answers = [snn(x, T) for T in steps]
    else:
        T = snn.neuron.steps(max(steps))
        running = snn(x if data.steps is None else x[:T], T, per_step=True)
        answers = [running[t - 1] for t in steps]
    check_labels(labels, answers[0].shape[1], str(data.path))
    return [int((answer.argmax(1).cpu() == labels).sum()) for answer in answers]


def _work(
    networks: Sequence[SNN],
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
            x = x.to(place)
            right = [r for snn in networks for r in _right(snn, x, y, steps, data)]
            kept.own.right = [a + b for a, b in zip(kept.own.right, right, strict=True)]
            kept.own.seen += len(y)
            kept.own.batches.append(number)
            kept.write()
            bar.update()
            bar.set_postfix({f"T={steps[-1]}": f"{kept.own.right[-1] / kept.own.seen:.1%}"})
