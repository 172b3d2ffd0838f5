"""Interrupts and disks: whatever stops a command, its output is the old file or the new one, with nothing beside it.

A signal comes at the worst moment, when a file is written and not yet in its place; a disk is full for all that is
written (a limit of 0 on files, which is also what a quota is).
"""

import contextlib
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast import FormatError, files
from qcfs_fast.files import write_text_atomically
from qcfs_fast.study import command_line, zoo_table
from qcfs_fast.study.trained import load_trained

resource = pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
TRAIN = "--network cifar-resnet20 --width 0.25 --epochs 2 --batch 8 --size 16 --threshold 2 --rate 0.02 --quiet"
# Each command, and the files that it writes; {} is the folder with the inputs.
COMMANDS = {
    "convert": ("convert {}/model.safetensors --output new/net", ["net"]),
    "eval": ("eval {}/net {}/data.npz --steps 1 2 --batch 4 --state new", ["0.json"]),
    "profile": ("profile {}/net {}/data.npz --images 8 --html new/page.html", ["page.html"]),
    "export": ("export {}/net --format c-header --input-shape 3 16 16 --output new/net.h", ["net.c", "net.h"]),
    "train": (f"train {{}}/pictures {TRAIN} --output new", ["state.pt"]),
    "study": (
        "study {}/model.safetensors {}/pictures --steps 1 --firing 4 --latency 1 --no-compile --output new",
        ["results.json"],
    ),
    "bench": (
        "bench --networks mlp_28 --batches 1 --steps 1 --no-compile --rounds 3 --seconds 0.01 --only qcfs_fast "
        "--output new/results.json",
        ["results.json"],
    ),
    "zoo": ("zoo --check efficientnet_b0 --output new/zoo.md", ["zoo.json"]),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A trained network, a converted one, and images."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("a", "b"):
            (folder / "pictures" / split / kind).mkdir(parents=True)
            for i in range(8):
                pixels = rng.integers(0, 250, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "pictures" / split / kind / f"{i}.png")
    run = folder / "run"
    assert command_line.main(["train", str(folder / "pictures"), *TRAIN.split(), "--output", str(run)]) == 0
    shutil.move(run / "model.safetensors", folder / "model.safetensors")
    qcfs_fast.convert(load_trained(folder / "model.safetensors")[0]).save(folder / "net")
    images = rng.normal(size=(16, 3, 16, 16)).astype(np.float32)
    np.savez(folder / "data.npz", images=images, labels=np.arange(16) % 2)
    return folder


@pytest.fixture
def started(inputs, tmp_path, monkeypatch):
    """Runs a command in an empty folder. What becomes of a network of the zoo is test_obstacles'."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo_table, "tried_apart", lambda name: {"obstacles": [["SiLU has no counterpart", 49]]})
    Path("new").mkdir()

    def start(name):
        text, _ = COMMANDS[name]
        words = [w.replace("mlp_28", "mlp 28") for w in text.replace("{}", str(inputs)).split()]
        return command_line.main(words)

    return start


@contextlib.contextmanager
def full_disk():
    """No byte can be written to a file; `ulimit -f 0`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def full_tmpfs():
    """A file system of a megabyte in the place of the folder, with no room left."""
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", "new"], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    try:
        with open("new/ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(4096))
        yield
    finally:
        subprocess.run(["umount", "new"], check=True)


ENDS = {".html": b"</html>\n", ".png": b"IEND\xaeB`\x82", ".md": b"\n"}
CASES = [(name, how) for name in COMMANDS for how in ("SIGINT", "full disk")]
CASES += [(name, "SIGTERM") for name in COMMANDS]
CASES += [(name, "full tmpfs") for name in ("convert", "export", "eval", "study")]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), CASES)
def test_commands(name, how, started, monkeypatch, capsys):
    """The message, the exit code, and no file but whole ones; then the same command does its work."""
    before = set(os.listdir("new"))
    if how == "full disk":
        with full_disk():
            code = started(name)
        assert code == 1
    elif how == "full tmpfs":
        with full_tmpfs():
            code = started(name)
            assert os.listdir("new") == ["ballast"]
        assert code == 1
    else:
        synchronise = os.fsync

        def interrupted(handle):
            monkeypatch.setattr(files.os, "fsync", synchronise)
            os.kill(os.getpid(), signal.Signals[how])
            time.sleep(10)

        monkeypatch.setattr(files.os, "fsync", interrupted)
        handler = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background of a shell it is ignored
        try:
            code = started(name)
        finally:
            signal.signal(signal.SIGINT, handler)
        assert code == (130 if how == "SIGINT" else 143)
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qcfs-fast: ")]
    if how in ("full disk", "full tmpfs"):
        assert message.startswith("qcfs-fast: error: ")
        assert os.strerror(errno.EFBIG if how == "full disk" else errno.ENOSPC) in message
        assert f"new{os.sep}" in message
    else:
        assert message.startswith("qcfs-fast: interrupted" if how == "SIGINT" else "qcfs-fast: terminated")
    assert set(os.listdir("new")) <= before | set(COMMANDS[name][1])
    assert started(name) == 0
    assert not list(Path().rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bench", "profile", "study", "zoo"])
def test_killed_while_it_writes(name, started):
    """By SIGKILL at its first write, then at its second, and so on, each run going on from the files of the one before.

    Each file is the old one or the new one.
    """

    def whole():
        found = {p.name: p.read_bytes() for p in Path("new").iterdir() if p.suffix != ".part"}
        for file, data in found.items():
            assert json.loads(data) if file.endswith(".json") else data.endswith(ENDS[Path(file).suffix])
        return found

    def killed_at(write):
        """The exit status of the command, run by a child of this process."""
        child = os.fork()
        if child == 0:
            code = 99
            try:
                torch.set_num_threads(1)
                writes, synchronise = itertools.count(1), os.fsync
                files.os.fsync = lambda f: os.kill(os.getpid(), 9) if next(writes) == write else synchronise(f)
                code = started(name)
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert killed_at(1) == -signal.SIGKILL
    assert not whole()
    assert list(Path("new").glob("*.part"))
    write = 2
    while (code := killed_at(write)) == -signal.SIGKILL:
        assert whole()
        write += 1
    assert code == 0
    before = whole()
    assert set(before) >= set(COMMANDS[name][1])
    assert killed_at(1) == (0 if name == "zoo" else -signal.SIGKILL)  # where all is tried there is nothing to do
    assert whole() == before


# ------------------------------------------------------------------------------------- saved networks

SAVER = """
import os, signal, sys
import qcfs_fast
from qcfs_fast import files
snn = qcfs_fast.load(sys.argv[1])
print("ready", flush=True)
if sys.argv[3] == "killed":
    files.os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
for _ in range(100):
    snn.save(sys.argv[2])
"""


def saver(source, target, how=""):
    command = [sys.executable, "-c", SAVER, str(source), str(target), how]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(qcfs_fast.__file__).parent.parent)}
    process = subprocess.Popen(command, cwd=Path(source).parent, stdout=subprocess.PIPE, text=True, env=here)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two networks that differ, and their files."""
    folder, made = tmp_path_factory.mktemp("pair"), []
    for i in range(2):
        model = qcfs_fast.prepare(networks.randomize(networks.Small(), seed=i), levels=4)
        made.append(qcfs_fast.convert(model, check=False))
        made[-1].save(folder / f"{i}")
    return folder, [bytes((folder / f"{i}").read_bytes()) for i in range(2)], made


@pytest.mark.slow
def test_two_processes_write_what_a_third_reads(pair, tmp_path):
    folder, wanted, _ = pair
    target = tmp_path / "net"
    shutil.copy(folder / "0", target)
    writers = [saver(folder / f"{i}", target) for i in range(2)]
    read = []
    while any(w.poll() is None for w in writers):
        read.append(target.read_bytes())
        qcfs_fast.load(target)
    assert [w.returncode for w in writers] == [0, 0]
    assert set(read) == set(wanted)  # never half of one, never a mixture
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.slow
def test_killed_while_it_saves(pair, tmp_path):
    """The old file stays. What was written beside it cannot be taken away by the dead, and harms nobody."""
    folder, wanted, (_, second) = pair
    target = tmp_path / "net"
    shutil.copy(folder / "0", target)
    assert saver(folder / "1", target, "killed").wait(60) == -signal.SIGKILL
    assert target.read_bytes() == wanted[0]
    assert sorted(p.suffix for p in tmp_path.iterdir()) == ["", ".part"]
    second.save(target)
    assert target.read_bytes() == wanted[1]


def test_a_loaded_network_has_let_go_of_its_file(pair, tmp_path):
    """Who overwrites a file in place, as cp does, changes no network that was read from it, and ends no process."""
    folder, wanted, (first, _) = pair
    target = tmp_path / "net"
    shutil.copy(folder / "0", target)
    snn = qcfs_fast.load(target)
    with open(target, "rb+") as file:
        file.seek(len(wanted[0]) // 2)
        file.write(bytes(len(wanted[0]) // 4))
    open(target, "wb").close()
    assert all(torch.equal(a, b) for a, b in zip(snn.state_dict().values(), first.state_dict().values(), strict=True))
    with pytest.raises(FormatError, match="net: not a complete safetensors file"):
        qcfs_fast.load(target)


def test_a_pipe_gets_the_file(pair, tmp_path):
    _, wanted, (first, _) = pair
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        first.save(tmp_path / "pipe")
        (tmp_path / "copy").write_bytes(reader.communicate(timeout=60)[0])
    assert (tmp_path / "pipe").is_fifo()
    assert str(qcfs_fast.load(tmp_path / "copy")) == str(first)
    assert len((tmp_path / "copy").read_bytes()) == len(wanted[0])


def test_quota(pair, tmp_path):
    """A limit that is met in the middle of a file: nothing of it stays, and what stood there does."""
    folder, wanted, (_, second) = pair
    target = tmp_path / "net"
    shutil.copy(folder / "0", target)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(wanted[0]) // 2, hard[1]))
    try:
        with pytest.raises(OSError, match=rf"net: could not be written .*{os.strerror(errno.EFBIG)}"):
            second.save(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, hard)
    assert target.read_bytes() == wanted[0]
    assert os.listdir(tmp_path) == ["net"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_device(pair, tmp_path):
    link = tmp_path / "link"
    link.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as caught:
        write_text_atomically("/dev/full", "page" * 9999)
    assert caught.value.errno == errno.ENOSPC
    folder, _, (first, _) = pair
    with pytest.raises(OSError, match=f"No space left on device: '{link}'"):
        first.save(link)  # not the device itself: a writer that replaces its target would replace it for all
    assert link.is_symlink()
    assert Path("/dev/full").is_char_device()
    here = {**os.environ, "PYTHONPATH": str(Path(qcfs_fast.__file__).parent.parent)}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "qcfs_fast", "inspect", str(folder / "0")]
        done = subprocess.run(command, cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, env=here)
    assert done.returncode == 1
    assert done.stderr == "qcfs-fast: error: [Errno 28] No space left on device\n"


def test_read_only_folder(pair):
    _, _, (first, _) = pair
    folder = Path(tempfile.mkdtemp())  # not below pytest's, which others cannot enter
    try:
        folder.chmod(0o555)
        mine = os.geteuid()
        if mine == 0:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(PermissionError, match=f"Permission denied: '{folder}/net'"):
                first.save(folder / "net")
        finally:
            os.seteuid(mine)
        assert not list(folder.iterdir())
    finally:
        folder.chmod(0o755)
        folder.rmdir()
