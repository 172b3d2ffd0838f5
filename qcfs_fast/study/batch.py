"""predict_many: labels and confidences of any number of images, by any number of workers, to Parquet files.

    images 0, 1, 2, ...  ->  chunks 0, 1, 2, ...      fixed by the data and the size of a chunk
    Ray Data             ->  workers                  each an actor that has loaded the network once and keeps it
    a chunk              ->  part-000123.parquet      written beside its target, then renamed

Which images a chunk holds depends on nothing else, and the same images give the same bytes on every worker. So a worker
that dies costs the chunks it was at, which Ray gives to another one; a chunk that is done twice is one file all the
same; and a run that was cut off goes on with the chunks whose file is missing. The folder is all the state there is: on
a cluster it must be one that every worker sees.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..files import read_json, write_text_atomically, written_atomically
from ..network.loading import load
from ..network.saving import checksum
from ..network.snn import SNN
from .about_images import normalise
from .data import MEAN, STD, Dataset, Folder, batch_count, batch_range
from .datasets import open_data

MANIFEST = "manifest.json"


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError("predict_many needs Ray: pip install 'qcfs-fast[ray]'") from error


class Predictor:
    """A warm network for ``Dataset.map_batches`` of Ray Data, or for any loop over batches of arrays.

    A call takes a batch {column: images, ...}, images float [N, C, H, W] as the network takes them, and gives the other
    columns with ``label`` int64 [N] and ``confidence`` float32 [N], the largest of the softmax of the logits.

    Args:
        network: file written by convert or snn.save.
        T: time steps, default the network's.
        neuron: mode of the neurons, default the network's.
        column: where the images are; that column is left out of the result.
    """

    def __init__(self, network: str, T: int | None = None, neuron: str | None = None, column: str = "image") -> None:
        self.snn, self.T, self.column = load(network), T, column
        self.checksum = checksum(*self.snn.saved())
        if neuron is not None:
            self.snn.neuron = neuron
        if torch.cuda.is_available():  # Ray shows a worker the GPUs that it asked for, and no other
            self.snn.to("cuda")

    def answers(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Labels [N] and confidences [N] of images."""
        logits = self.snn(x.to(self.snn.layers["input"].source.device), self.T)
        confidence, label = logits.softmax(1).max(1)
        return label.cpu().numpy(), confidence.cpu().numpy()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        label, confidence = self.answers(torch.from_numpy(np.asarray(batch[self.column])))
        rest = {name: values for name, values in batch.items() if name != self.column}
        return {**rest, "label": label, "confidence": confidence}


class ParquetImages(Folder):
    """Encoded images (PNG, JPEG, ...) in a column of Parquet files: bytes, or a struct that holds them as ``bytes``.

    They are cut and normalised as those of a folder. `path` is a file or a folder of files.
    """

    def __init__(
        self, path: Path, size: int, mean: Sequence[float] | None, std: Sequence[float] | None, column: str = "image"
    ) -> None:
        parquet: Any = importlib.import_module("pyarrow.parquet")
        self.path, self.size, self.column, self.labelled = path, size, column, False
        self.mean, self.std = mean or MEAN, std or STD
        files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        self.files = [(file, 0) for file in files]
        self.groups: list[tuple[Path, int]] = []
        counts = [0]
        for file in files:
            about = parquet.read_metadata(file)
            if column not in about.schema.to_arrow_schema().names:
                raise ValueError(f"{file}: has no column {column!r}")
            for group in range(about.num_row_groups):
                self.groups.append((file, group))
                counts.append(about.row_group(group).num_rows)
        self.first = np.cumsum(counts)
        if not self.groups:
            raise ValueError(f"{path}: has no Parquet files with rows")
        self._held: tuple[int, list[Any]] = (-1, [])

    def __len__(self) -> int:
        return int(self.first[-1])

    def pixels(self, indices: Sequence[int], random: bool = False) -> tuple[Tensor, Tensor]:
        images = [self._read(io.BytesIO(self._bytes(i)), None, f"{self.path}, row {i}") for i in indices]
        return torch.stack(images), torch.zeros(len(images), dtype=torch.int64)

    def _bytes(self, i: int) -> bytes:
        """The encoded image of row i; the row group it is in is kept, since the next row is there too."""
        g = int(np.searchsorted(self.first, i, side="right")) - 1
        if self._held[0] != g:
            parquet: Any = importlib.import_module("pyarrow.parquet")
            file, group = self.groups[g]
            self._held = g, parquet.ParquetFile(file).read_row_group(group, [self.column])[self.column].to_pylist()
        found = self._held[1][i - int(self.first[g])]
        return found["bytes"] if isinstance(found, dict) else found


@dataclass(frozen=True)
class Job:
    """What is to be done; the same in every run that goes on with it. `checksum` is of the network, which may move."""

    network: str
    checksum: str
    data: str
    output: str
    chunk: int
    size: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    T: int | None
    neuron: str | None

    def images(self, snn: SNN) -> Dataset:
        path = Path(self.data)
        parquet = path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))
        data: Dataset
        if parquet:
            data = ParquetImages(path, self.size, self.mean, self.std)
        else:
            data = open_data(path, self.size, self.mean, self.std, labelled=False)
        normalise(data, snn, Path(self.network), self.mean, self.std)
        return data

    def part(self, number: int) -> Path:
        return Path(self.output) / f"part-{number:06d}.parquet"


class _Worker:
    """An actor: the network and the list of images, ready for chunks. It writes a part for each, and says how many."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        self.predictor = Predictor(job.network, job.T, job.neuron)
        if self.predictor.checksum != job.checksum:
            raise ValueError(
                f"{job.network}: is another network than when the job began; put that one back, or name another output"
            )
        self.job, self.data = job, job.images(self.predictor.snn)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        done = [self._part(int(number)) for number in batch["chunk"]]
        return {"images": np.array(done)}

    def _part(self, number: int) -> int:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        indices = batch_range(self.data, number, self.job.chunk)
        path = self.job.part(number)
        if not path.exists():
            label, confidence = self.predictor.answers(self.data.batch(indices)[0])
            columns: dict[str, Any] = {"index": np.asarray(indices), "label": label, "confidence": confidence}
            if isinstance(self.data, Folder) and not isinstance(self.data, ParquetImages):
                columns["file"] = [str(self.data.files[i][0].relative_to(self.data.path)) for i in indices]
            columns["worker"] = [f"{socket.gethostname()}:{os.getpid()}"] * len(indices)
            with written_atomically(path) as temporary:
                parquet.write_table(pyarrow.table(columns), temporary)
        return len(indices)


def predict_many(
    network: Path,
    data: Path,
    output: Path,
    workers: int = 1,
    gpus: float = 0,
    chunk: int = 256,
    size: int = 224,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    T: int | None = None,
    neuron: str | None = None,
) -> int:
    """Predict all images of a data set; an interrupted run goes on where it stopped, by the same call.

    Args:
        network: file written by convert or snn.save.
        data: a folder with a subfolder of images per class, an .npz file, a data set by name, or Parquet with a column
            ``image`` of encoded images (a file, or a folder of files).
        output: folder for the parts, which is made. Columns: index of the image int64, label int64, confidence float32
            (the largest of the softmax), worker, and for folders of images file.
        workers: actors at work. Each has a processor of its own, or `gpus` of a GPU.
        gpus: GPUs of a worker; 0.5 lets two of them share one.
        chunk: images of a part, predicted in one call.
        size: side of a folder's or Parquet's images.
        mean, std: as of ``qcfs-fast eval``: by default as the network's file says.
        T, neuron: default the network's.

    Returns:
        How many images this run predicted.

    Raises:
        ValueError: the folder holds parts of another job; an argument is out of range.
        FileNotFoundError: no such network or data.
        ImportError: Ray or pyarrow is not installed.

    Ray's own start is up to the caller: ``ray.init(address="auto")`` joins a cluster; else one begins on this machine.
    """
    ray = _ray()
    if workers < 1 or chunk < 1:
        raise ValueError(f"predict_many: workers and chunk must be at least 1, got {workers} and {chunk}")
    network_path, output_path = (str(Path(p).resolve()) for p in (network, output))
    data_path = str(Path(data).resolve()) if Path(data).exists() else str(data)  # or a data set by name
    numbers = (None if mean is None else tuple(mean), None if std is None else tuple(std))
    snn = load(network)
    job = Job(network_path, checksum(*snn.saved()), data_path, output_path, chunk, size, *numbers, T, neuron)
    images = job.images(snn)  # damage is reported before anything starts
    _settle(job, images)
    missing = [n for n in range(batch_count(images, chunk)) if not job.part(n).exists()]
    if not missing:
        return 0
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    blocks = min(len(missing), 4 * workers)
    chunks = ray.data.from_items([{"chunk": n} for n in missing], override_num_blocks=blocks)
    done = chunks.map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=0 if gpus else 1,
        num_gpus=gpus,
    )
    return sum(int(row["images"]) for row in done.iter_rows())


def _settle(job: Job, images: Dataset) -> None:
    """The output folder and its manifest; ValueError where the folder belongs to another job."""
    folder = Path(job.output)
    folder.mkdir(parents=True, exist_ok=True)
    about = {**asdict(job), "output": None, "network": None, "images": [len(images), images.content()]}
    wanted = json.loads(json.dumps(about))
    path = folder / MANIFEST
    if not path.exists():
        write_text_atomically(path, json.dumps(wanted, indent=2))
        return
    found = read_json(path, "manifest of predict_many", lambda found: isinstance(found, dict))
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{folder}: holds parts of a job with another {', '.join(different)}; finish it, or name another folder"
        )
