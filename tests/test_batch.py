"""predict_many on a local Ray of two workers: a worker that is killed loses nothing, and nothing is there twice."""

import os
import signal
import threading
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast.study import shipped
from qcfs_fast.study.batch import Predictor, predict_many
from qcfs_fast.study.datasets import open_data

ray = pytest.importorskip("ray")
parquet = pytest.importorskip("pyarrow.parquet")
pyarrow = pytest.importorskip("pyarrow")
Image = pytest.importorskip("PIL.Image")

IMAGES, CHUNK, SIZE = 240, 4, 128  # large enough that a chunk takes longer than a look at the folder
CHUNKS = IMAGES // CHUNK


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network, a folder of images in three classes, the same images in Parquet, and what the network says of them."""
    folder = tmp_path_factory.mktemp("batch")
    snn, _ = networks.converted(networks.Small, T=32)
    snn.save(folder / "net.safetensors")
    grey = shipped.images().images[:IMAGES, 0]
    names = []
    for i, image in enumerate(grey):
        path = folder / "images" / "abc"[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack([image, image.T, 255 - image], -1)).resize((36, 36)).save(path)
        names.append(path)
    names.sort()
    table = pyarrow.table({"image": [path.read_bytes() for path in names]})
    parquet.write_table(table, folder / "images.parquet", row_group_size=50)
    x = open_data(folder / "images", SIZE).batch(range(IMAGES))[0]
    logits = torch.cat([snn(part) for part in x.split(CHUNK)])
    return folder, names, logits


@pytest.fixture(scope="module", autouse=True)
def local_ray(place):
    """Its workers find the package and these tests where this process does."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    paths = (Path(qcfs_fast.__file__).parent.parent, os.environ.get("PYTHONPATH"))
    source = os.pathsep.join(str(p) for p in paths if p)
    options = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False}
    ray.init(num_cpus=3, runtime_env={"env_vars": {"PYTHONPATH": source}}, object_store_memory=10**8, **options)
    yield
    ray.shutdown()


def read(output):
    """All rows of the parts, by column, in order of the images."""
    table = pyarrow.concat_tables(parquet.read_table(path) for path in sorted(output.glob("part-*.parquet")))
    return table.sort_by("index").to_pydict()


def assert_complete(found, logits):
    assert found["index"] == list(range(IMAGES))  # nothing lost, nothing twice
    assert found["label"] == logits.argmax(1).tolist()
    assert len(set(found["confidence"])) > IMAGES // 2  # the images do differ
    assert np.array_equal(np.array(found["confidence"], np.float32), logits.softmax(1).amax(1).numpy())


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(place, tmp_path):
    folder, names, logits = place
    output, killed = tmp_path / "out", []

    def kill():
        while len(parts := sorted(output.glob("part-*.parquet"))) < 2:
            time.sleep(0.005)
        pid = int(parquet.read_table(parts[0])["worker"][0].as_py().split(":")[1])
        os.kill(pid, signal.SIGKILL)
        killed.append((pid, len(parts)))

    killer = threading.Thread(target=kill)
    killer.start()
    predict_many(folder / "net.safetensors", folder / "images", output, workers=2, chunk=CHUNK, size=SIZE)
    killer.join()
    assert killed[0][1] < CHUNKS  # it was killed in the middle
    found = read(output)
    assert_complete(found, logits)
    assert found["file"] == [str(p.relative_to(folder / "images")) for p in names]
    assert len(set(found["worker"])) > 1
    assert sorted(p.name for p in output.glob("part-*.parquet")) == [f"part-{n:06d}.parquet" for n in range(CHUNKS)]


@pytest.mark.slow
def test_a_run_goes_on_with_what_is_missing(place, tmp_path):
    folder, _, logits = place
    arguments = (folder / "net.safetensors", folder / "images.parquet", tmp_path)
    settings = {"workers": 2, "chunk": CHUNK, "size": SIZE}
    assert predict_many(*arguments, **settings) == IMAGES
    assert_complete(read(tmp_path), logits)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("part-*")}
    lost = ["part-000003.parquet", "part-000041.parquet"]
    for name in lost:
        (tmp_path / name).unlink()
    assert predict_many(*arguments, **settings) == 2 * CHUNK
    after = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("part-*")}
    assert {name for name in after if after[name] != before[name]} == set(lost)
    assert_complete(read(tmp_path), logits)
    assert predict_many(*arguments, **settings) == 0
    with pytest.raises(ValueError, match="holds parts of a job with another chunk"):
        predict_many(*arguments, **{**settings, "chunk": 5})
    with pytest.raises(ValueError, match="holds parts of a job with another T"):
        predict_many(*arguments, **settings, T=1)


def test_predictor_takes_and_gives_columns(place):
    folder, _, _ = place
    snn = qcfs_fast.load(folder / "net.safetensors")
    x = networks.images((3, 10, 12), 5)
    predictor = Predictor(str(folder / "net.safetensors"), T=2, neuron="offset")
    out = predictor({"image": x.numpy(), "name": np.array(list("abcde"))})
    snn.neuron = "offset"
    assert list(out) == ["name", "label", "confidence"]
    assert out["label"].tolist() == snn(x, 2).argmax(1).tolist()
    assert np.array_equal(out["confidence"], snn(x, 2).softmax(1).amax(1).numpy())


def test_errors_come_before_ray(place, tmp_path):
    folder, _, _ = place
    with pytest.raises(ValueError, match="workers and chunk must be at least 1"):
        predict_many(folder / "net.safetensors", folder / "images", tmp_path, workers=0)
    with pytest.raises(FileNotFoundError, match="no data at"):
        predict_many(folder / "net.safetensors", folder / "none", tmp_path)
    with pytest.raises(FileNotFoundError, match="no file"):
        predict_many(folder / "none", folder / "images", tmp_path)
    parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="has no column 'image'"):
        predict_many(folder / "net.safetensors", tmp_path / "x.parquet", tmp_path / "out")
