"""libqcfs: built with CMake, linked by a C program, compared with Python, and fed with damaged files."""

import ctypes
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
from pathlib import Path

import networks
import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

import qcfs_fast

pytestmark = [pytest.mark.native, pytest.mark.slow]
SOURCE = Path(__file__).resolve().parent.parent
DATA = sorted((SOURCE / "tests" / "data").glob("*.safetensors"))
# The kernels for instruction sets have tests of their own and take minutes to compile: these builds leave them out.
PORTABLE = ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=portable")

PROGRAM = r"""
#include <qcfs.h>
#include <stdio.h>
#include <stdlib.h>

int main(int argc, char** argv) { /* FILE N C H W < float32 images > float32 answers */
  qcfs_error error;
  qcfs_network* network;
  qcfs_images images = {NULL, 0, atol(argv[2]), atol(argv[3]), atol(argv[4]), atol(argv[5])};
  size_t size = (size_t)(images.batch * images.channels * images.height * images.width);
  float* pixels = malloc(size * sizeof(float));
  if (argc != 6 || fread(pixels, sizeof(float), size, stdin) != size) return 2;
  images.data = pixels;
  qcfs_shape shape;
  if (qcfs_load_file(argv[1], &network, &error) != QCFS_OK ||
      qcfs_answer_shape(network, &images, NULL, &shape, &error) != QCFS_OK) {
    fputs(error.text, stderr);
    return 1;
  }
  float* answer = malloc(shape.count * sizeof(float));
  if (qcfs_run(network, &images, NULL, answer, shape.count, &error) != QCFS_OK) return 1;
  fwrite(answer, sizeof(float), shape.count, stdout);
  qcfs_free(network);
  free(answer);
  free(pixels);
  return 0;
}
"""
PROJECT = """
cmake_minimum_required(VERSION 3.18)
project(program LANGUAGES C CXX)
find_package(qcfs 0.1 REQUIRED)
add_executable(shared program.c)
target_link_libraries(shared PRIVATE qcfs::qcfs)
add_executable(static program.c)
target_link_libraries(static PRIVATE qcfs::qcfs_static)
"""


def call(*command, **options):
    done = subprocess.run([*map(str, command)], capture_output=True, timeout=1800, **options)
    assert done.returncode == 0, done.stdout[-3000:].decode() + done.stderr[-3000:].decode()
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where libqcfs is installed: built as its page says, but for the kernels."""
    folder = tmp_path_factory.mktemp("libqcfs")
    prefix = folder / "prefix"
    options = ("-DQCFS_FAST_LIBQCFS=ON", "-DQCFS_FAST_WERROR=ON", f"-DCMAKE_INSTALL_PREFIX={prefix}")
    call("cmake", "-S", SOURCE, "-B", folder / "build", *options, *PORTABLE)
    call("cmake", "--build", folder / "build", "-j2")
    call("cmake", "--install", folder / "build")
    return prefix


def cases():
    """Saved networks with images for them."""
    for path in DATA:
        snn = qcfs_fast.load(path)
        yield path, snn, networks.images(snn.input_shape or (snn.layers["input"].config.channels,))


def answers_of(program, path, x):
    sizes = (*x.shape, 1, 1)[:4]
    out = call(program, path, *sizes, input=x.numpy().tobytes())
    return np.frombuffer(out, np.float32)


def test_c_programs_give_the_bytes_of_python(installed, tmp_path):
    (tmp_path / "program.c").write_text(PROGRAM)
    (tmp_path / "CMakeLists.txt").write_text(PROJECT)
    call("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={installed}")
    call("cmake", "--build", tmp_path / "build")
    for path, snn, x in cases():
        expected = snn(x).numpy()
        assert len(np.unique(expected)) > 5
        for name in ("shared", "static"):
            assert np.array_equal(answers_of(tmp_path / "build" / name, path, x), expected.ravel())


@pytest.mark.skipif(shutil.which("pkg-config") is None, reason="needs pkg-config")
def test_pkg_config(installed, tmp_path):
    (tmp_path / "program.c").write_text(PROGRAM)
    (folder,) = installed.glob("lib*/pkgconfig")
    flags = call("pkg-config", "--cflags", "--libs", "qcfs", env={**os.environ, "PKG_CONFIG_PATH": str(folder)})
    program = tmp_path / "program"
    warnings = ("-std=c99", "-Wall", "-Wextra", "-Werror")
    path_to_it = f"-Wl,-rpath,{folder.parent}"
    call("cc", *warnings, tmp_path / "program.c", "-o", program, *flags.decode().split(), path_to_it)
    path, snn, x = next(cases())
    assert np.array_equal(answers_of(program, path, x), snn(x).numpy().ravel())


def test_only_the_interface_is_exported(installed):
    (library,) = installed.glob("lib*/libqcfs.so")
    names = re.findall(r" [A-Z] (\w+)", call("nm", "-D", "--defined-only", library).decode())
    declared = re.findall(r"QCFS_API [\w ]+?\*?(qcfs_\w+)\(", (SOURCE / "csrc" / "libqcfs" / "qcfs.h").read_text())
    assert sorted(names) == sorted(declared)


def test_command(installed, tmp_path):
    program = installed / "bin" / "qcfs-run"
    for path, snn, x in cases():
        np.save(tmp_path / "x.npy", x.numpy())
        lines = call(program, path, tmp_path / "x.npy").decode().splitlines()
        assert [int(line.partition(":")[0]) for line in lines] == snn(x).argmax(1).tolist()
        values = np.array([line.split()[1:] for line in lines], np.float32)
        assert np.array_equal(values, snn(x).numpy())
        np.save(tmp_path / "x.npy", x[0].double().numpy())
        out = tmp_path / "y.npy"
        call(program, path, tmp_path / "x.npy", "--steps", 3, "--threads", 2, "--out", out)
        assert np.array_equal(np.load(out), snn(x[:1], T=3).numpy())
        assert f"T={snn.T}" in call(program, path).decode()
    done = subprocess.run([program, __file__], capture_output=True, text=True)
    assert done.returncode == 1
    assert "not a complete safetensors file" in done.stderr


def test_what_the_command_cannot_write(installed, tmp_path):
    """A limit, a full device, a folder that is not there: a message, a code, and the old file."""
    program, (path, snn, x) = installed / "bin" / "qcfs-run", next(iter(cases()))
    np.save(tmp_path / "x.npy", np.repeat(x.numpy(), 300, 0))
    out = tmp_path / "y.npy"
    out.write_text("old")
    (tmp_path / "link").symlink_to(out)
    before = sorted(os.listdir(tmp_path))

    def run(*words, **options):
        command = [*map(str, (program, path, tmp_path / "x.npy", *words))]
        options = {"stdout": subprocess.PIPE, **options}
        done = subprocess.run(command, stderr=subprocess.PIPE, timeout=60, **options)
        assert done.returncode == 1
        return done.stderr.decode()

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    assert run("--out", out, preexec_fn=limited) == f"qcfs-run: {out} cannot be written: File too large\n"
    assert out.read_text() == "old"
    assert "cannot be written: No such file" in run("--out", tmp_path / "no" / "y.npy")
    assert "cannot be written: Is a directory" in run("--out", tmp_path)
    if Path("/dev/full").exists():
        assert "cannot be written: No space left" in run("--out", "/dev/full")
        with open("/dev/full", "wb") as full:
            assert "the answers cannot be written: No space left" in run(stdout=full)
    assert sorted(os.listdir(tmp_path)) == before
    call(program, path, tmp_path / "x.npy", "--out", tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert np.array_equal(np.load(out)[::300], snn(x).numpy())
    call(program, path, tmp_path / "x.npy", "--out", "/dev/stdout")


def npy(header, values=b"", version=1):
    """A file with this text as its header."""
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + values


def test_arrays_that_the_command_does_not_take(installed, tmp_path):
    """A sentence with the file's name and what to do, code 1, and little memory, whatever the header promises."""
    program, (path, _, x) = installed / "bin" / "qcfs-run", next(iter(cases()))
    array = tmp_path / "x.npy"

    def limited():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

    def run(data):
        array.write_bytes(data)
        return subprocess.run([program, path, array], capture_output=True, text=True, timeout=60, preexec_fn=limited)

    shape = tuple(x.shape)
    sound, values = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}", x.numpy().tobytes()
    for version in (1, 2, 3):
        done = run(npy(sound + " \n", values, version))
        assert done.returncode == 0, done.stderr
    whole = npy(sound, values)
    start = len(whole) - len(values)
    damaged = [whole[:length] for length in (*range(start), start + 1, len(whole) - 1)]
    damaged += [npy(sound[:length], values) for length in range(len(sound))]
    damaged += [npy(sound.replace(str(shape), other), values) for other in SHAPES_THAT_ARE_NONE]
    damaged += [npy(sound.replace("<f4", other), values) for other in (">f4", "<f2", "|O", "<i8", "")]
    damaged += [npy(sound.replace("False", other), values) for other in ("True", "", "None")]
    damaged += [npy(sound, values, 0), npy(sound, values, 4), npy(" " * (1 << 21), values, 2)]
    for data in damaged:
        done = run(data)
        assert done.returncode == 1, data[:100]
        assert done.stderr.startswith(f"qcfs-run: {array} holds no array of images ("), done.stderr
        assert "write it with numpy.save(" in done.stderr
    done = run(npy(sound.replace(str(shape), "(1, 1, 1)"), values))
    assert (done.returncode, done.stderr.startswith(f"qcfs-run: {array}: ")) == (1, True)
    from_pipe = subprocess.run([program, path, "/dev/stdin"], input=whole, capture_output=True, timeout=60)
    assert from_pipe.returncode == 0


SHAPES_THAT_ARE_NONE = (
    "(16777216, 2048, 1)", "(16777216, 4096, 1)", "(16777217, 0)", "(99999999999999999999, 3)", "(1", "(1,", "1)", "",
    "(1 2, 3)", "(1; 2)", "(-1, 3, 8, 8)", "(1.5,)", "[1, 3, 8, 8]", "(1L, 3L)", "None", "(3, ",
)  # fmt: skip


# ----------------------------------------------------------------------------------------- through ctypes


class Images(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(n, ctypes.c_int64) for n in ("steps", "batch", "channels", "h", "w")]


class Options(ctypes.Structure):
    _fields_ = [
        ("steps", ctypes.c_int64), ("skip", ctypes.c_int64), ("per_step", ctypes.c_int), ("threads", ctypes.c_int),
        ("max_bytes", ctypes.c_uint64),
    ]  # fmt: skip


class Shape(ctypes.Structure):
    _fields_ = [("rank", ctypes.c_int), ("sizes", ctypes.c_int64 * 5), ("count", ctypes.c_size_t)]


class Library:
    """The shared library; a failed call raises ValueError with its code and text."""

    def __init__(self, prefix):
        (path,) = prefix.glob("lib*/libqcfs.so")
        self._c = ctypes.CDLL(str(path))
        for name in ("qcfs_free", "qcfs_stream_free", "qcfs_stream_reset"):
            getattr(self._c, name).restype = None

    def check(self, name, *arguments):
        error = ctypes.create_string_buffer(256)
        code = getattr(self._c, name)(*arguments, error)
        if code:
            raise ValueError(f"{code} {error.value.decode()}")

    def load(self, data):
        network = ctypes.c_void_p()
        self.check("qcfs_load_memory", data, ctypes.c_size_t(len(data)), ctypes.byref(network))
        return network

    def free(self, network):
        self._c.qcfs_free(network)

    def run(self, network, x, stream=None, over_time=False, **options):
        steps, *sizes = x.shape if over_time else (0, *x.shape)
        images = Images(x.data_ptr(), steps, *sizes, *[1] * (4 - len(sizes)))
        asked = Options(**options)
        shape = Shape()
        self.check("qcfs_answer_shape", network, ctypes.byref(images), ctypes.byref(asked), ctypes.byref(shape))
        out = torch.empty(tuple(shape.sizes[: shape.rank]))
        if stream is None:
            target, given = ("qcfs_run", network), ctypes.byref(images)
        else:
            target, given = ("qcfs_stream_run", stream), ctypes.byref(images)
        self.check(*target, given, ctypes.byref(asked), ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(out.numel()))
        return out


@pytest.fixture(scope="module")
def library(installed):
    return Library(installed)


def saved(snn, tmp_path):
    snn.save(tmp_path / "net")
    return (tmp_path / "net").read_bytes()


@pytest.mark.parametrize("neuron", ["plain", "offset", "masked", "signed", "sum"])
def test_every_mode(library, neuron, tmp_path):
    for kind, bits in ((networks.Small, 16), (networks.Pools, 8), (networks.Perceptron, 24)):
        snn, x = networks.converted(kind, T=4, weight_bits=bits, neuron=neuron)
        network = library.load(saved(snn, tmp_path))
        assert torch.equal(library.run(network, x), snn(x))
        if neuron != "sum":
            assert torch.equal(library.run(network, x, steps=3, per_step=1), snn(x, 3, per_step=True))
            assert torch.equal(library.run(network, x, skip=2, threads=2), snn(x, skip=2))
        library.free(network)


def test_lines_are_maps_of_one_row(library, tmp_path):
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(6 * 19, 5))
    snn, x = qcfs_fast.convert(networks.lively(model, (2, 40)), T=4), networks.images((2, 40))
    network = library.load(saved(snn, tmp_path))
    assert torch.equal(library.run(network, x.unsqueeze(2)), snn(x))
    library.free(network)


@pytest.mark.parametrize("neuron", ["plain", "signed"])
@pytest.mark.parametrize("kind", [networks.Small, networks.Image], ids=lambda k: k.__name__)
def test_streams(library, kind, neuron, tmp_path):
    snn, x = networks.converted(kind, T=4, max_T=32, neuron=neuron)
    frames = torch.stack([networks.images(networks.SHAPES[kind], seed=t) for t in range(3)])
    network = library.load(saved(snn, tmp_path))
    stream, expected = ctypes.c_void_p(), snn.stream()
    library.check("qcfs_stream_new", network, ctypes.byref(stream))

    def go(x, **options):
        return library.run(network, x, stream, **options)

    for _ in range(2):
        assert torch.equal(go(x, steps=2), expected(x, steps=2))
        assert torch.equal(go(x[[1, 2, 0]], steps=3, per_step=1), expected(x[[1, 2, 0]], steps=3, per_step=True))
        assert torch.equal(go(frames, over_time=True), expected(frames))
        bad = x.clone()
        bad[0, 0, 0, 0] = float("inf")
        with pytest.raises(ValueError, match=r"^5 .*NaN or infinity"):
            go(bad)
        with pytest.raises(ValueError, match=r"^4 .*another shape"):
            go(x[:1])
        out, asked = torch.empty(3, 5), Options(steps=9)
        again = (None, ctypes.byref(asked), ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(15))
        with pytest.raises(ValueError, match=r"^1 which images"):
            library.check("qcfs_stream_run", stream, *again)
        go(x)
        expected(x)
        library.check("qcfs_stream_run", stream, *again)
        assert torch.equal(out, expected(steps=9))
        with pytest.raises(ValueError, match="beyond this network's bound"):
            go(x, steps=snn.max_T)
        library._c.qcfs_stream_reset(stream)
        expected.reset()
    library._c.qcfs_stream_free(stream)
    library.free(network)


def test_what_a_stream_refuses_leaves_it_as_it_was(library, tmp_path):
    """Too little `max_bytes` is refused before it runs. tests/native/allocations.cpp ends a run in its middle."""
    snn, x = networks.converted(networks.Small, T=4, max_T=32)
    network, stream, expected = library.load(saved(snn, tmp_path)), ctypes.c_void_p(), snn.stream()
    library.check("qcfs_stream_new", network, ctypes.byref(stream))
    library._c.qcfs_stream_steps.restype = ctypes.c_int64
    assert torch.equal(library.run(network, x, stream, steps=2), expected(x, steps=2))
    out = torch.empty(3, 5)
    for options in (Options(max_bytes=1), Options(steps=-1), Options(steps=1000)):
        arguments = (None, ctypes.byref(options), ctypes.c_void_p(out.data_ptr()), ctypes.c_size_t(15))
        with pytest.raises(ValueError, match=rf"^{6 if options.max_bytes else 1} "):
            library.check("qcfs_stream_run", stream, *arguments)
        assert library._c.qcfs_stream_steps(stream) == 2
    assert torch.equal(library.run(network, x, stream, steps=2), expected(x, steps=2))
    library._c.qcfs_stream_free(stream)
    library.free(network)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="counts in glibc's malloc")
def test_later_runs_allocate_nothing(installed, tmp_path):
    """From the second call at a shape on, whatever the engine; and a run that finds no memory resets its stream."""
    (library,) = installed.glob("lib*/libqcfs.a")
    program = tmp_path / "allocations"
    source = SOURCE / "tests" / "native" / "allocations.cpp"
    options = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{SOURCE / 'csrc'}")
    call(os.environ.get("CXX", "c++"), *options, source, library, "-lpthread", "-o", program)
    files = [*DATA, *sorted((SOURCE / "tests" / "native" / "corpus").iterdir())]
    for kind in (networks.Image, networks.Groups, networks.UNet):  # the last two answer with maps
        snn, x = networks.converted(kind, T=4)
        snn.input_shape = tuple(x.shape[1:])
        files.append(tmp_path / kind.__name__)
        snn.save(files[-1])
    lines = call(program, *files).decode().splitlines()
    assert len(lines) == len(files)
    engines = set()
    for line in lines:
        calls, allocated, names = re.fullmatch(r"calls (\d+) allocated (\d+) engines(.*)", line).groups()
        assert (int(calls) >= 16, int(allocated)) == (True, 0)
        engines |= set(names.split())
    assert engines == {"events", "dense", "table", "grouped", "depthwise"}


def test_reasons_of_what_only_python_loads(library, tmp_path):
    """Several outputs, a tail, text that is none, nesting without end: what it is, and what to do."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1))
    snn = qcfs_fast.convert(networks.lively(networks.randomize(model), (1, 6, 6)), T=2)
    text, tensors = snn.saved()
    header = json.loads(text)
    header.pop("crc32", None)

    def refusal(change, text="{}"):
        altered = json.loads(json.dumps(header))
        change(altered)
        library.load(save(tensors, {"qcfs_fast": json.dumps(altered).replace('"HERE"', text)}))

    with pytest.raises(ValueError, match=r"^3 ends with a function of its logits \(tail\)"):
        refusal(lambda h: h.update(tail=[["sigmoid"]]))
    with pytest.raises(ValueError, match=r"^3 JSON: values nested deeper than 64 \(make the metadata flatter"):
        refusal(lambda h: h.update(metadata={"a": "HERE"}), "[" * 80 + "]" * 80)
    with pytest.raises(ValueError, match=r"^3 JSON: half of a surrogate pair, which is no text \(rename"):
        refusal(lambda h: h.update(metadata={"a": "HERE"}), r'"\ud800"')
    several = qcfs_fast.convert(
        networks.lively(networks.randomize(TwoOutputs()), (1, 6, 6)), T=2, input_shape=(1, 6, 6)
    )
    with pytest.raises(ValueError, match=r"^3 has 2 outputs; libqcfs runs networks with one output\. Remedy: convert"):
        library.load(saved(several, tmp_path))


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return self.b(x), self.c(x)


def test_refusals(library):
    path, _, x = next(cases())
    network = library.load(path.read_bytes())
    with pytest.raises(ValueError, match=r"^4 the images have 2 channels"):
        library.run(network, x[:, :2])
    with pytest.raises(ValueError, match=r"^4 .*smaller than the"):
        library.run(network, x[..., :1, :1].contiguous())
    with pytest.raises(ValueError, match=r"^1 T=99999 is not within"):
        library.run(network, x, steps=99999)
    with pytest.raises(ValueError, match=r"^6 a run needs \d+ bytes"):
        library.run(network, x, max_bytes=100)
    with pytest.raises(ValueError, match=r"^5 .*NaN or infinity"):
        library.run(network, x * float("nan"))
    with pytest.raises(ValueError, match=r"^1 network is NULL"):
        library.check("qcfs_run", None, None, None, None, ctypes.c_size_t(0))
    with pytest.raises(ValueError, match=r"^2 .*cannot be opened"):
        library.check("qcfs_load_file", b"/nowhere", ctypes.byref(ctypes.c_void_p()))
    library.free(network)


# ------------------------------------------------------------------------------------------ damaged files


def damaged(data, numbers):
    """A copy of a file whose header says something else, or with a byte that does."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].decode()
    if numbers.random() < 0.3:
        at = numbers.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << numbers.randrange(8)]) + data[at + 1 :]
    values = [m.span() for m in re.finditer(r"-?\d+|true|false|null", header)]
    first, last = numbers.choice(values)
    new = numbers.choice(["0", "1", "2", "3", "5", "8", "24", "64", "300", "-1", "1.5", "null", "true", "2147483648"])
    header = (header[:first] + new + header[last:]).encode()
    return len(header).to_bytes(8, "little") + header + data[end:]


@pytest.mark.parametrize("path", DATA, ids=lambda p: p.stem)
def test_what_python_refuses_is_refused(library, path, tmp_path):
    """And what both take gives the same bytes."""
    data, numbers = path.read_bytes(), random.Random(1)
    x = networks.images(qcfs_fast.load(path).input_shape, 2)
    both = neither = 0
    for _ in range(400):
        changed = damaged(data, numbers)
        (tmp_path / "net").write_bytes(changed)
        try:
            snn = qcfs_fast.load(tmp_path / "net")
            snn.T = min(snn.T, 8)
        except qcfs_fast.FormatError:
            snn = None
        try:
            network = library.load(changed)
        except ValueError:
            neither += snn is None
            continue
        assert snn is not None, "C takes what Python refuses"
        try:
            answer = library.run(network, x, steps=snn.T, max_bytes=1 << 28)
        except ValueError:
            answer = None
        if answer is not None:
            assert torch.equal(answer, snn(x))
            both += 1
        library.free(network)
    assert both > 40
    assert neither > 40


def test_header_is_read_as_json_is(library):
    """Names that escape, bytes that are no UTF-8, names that stand twice."""
    path, _, _ = next(cases())
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:end])

    def written(text):
        text = text if isinstance(text, bytes) else text.encode()
        return len(text).to_bytes(8, "little") + text + data[end:]

    library.free(library.load(written(json.dumps(entries, indent=2))))
    escaped = json.dumps(entries).replace("weight", "\\u0077eight")
    library.free(library.load(written(escaped)))
    for bad in (
        json.dumps(entries)[:-1] + ', "__metadata__": {}}',
        json.dumps(entries).encode() + b"x",
        b"[" * 100000,
        json.dumps(entries).encode().replace(b"weight", b"\xc0\xafeight", 1),
        json.dumps(entries).replace("weight", "\\ud800eight", 1),
    ):
        with pytest.raises(ValueError, match=r"^3 "):
            library.load(written(bad))
