"""What nvcc made of the kernels, without a GPU: no spills, every architecture, the instructions that should be there.

The module of the installed package is taken apart, so nothing is compiled here; without nvcc there is none.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from qcfs_fast.study.benchmark import cases

ROOT = Path(__file__).resolve().parent.parent


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tools/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cuda_report, roofline = tool("cuda_report"), tool("roofline")

pytestmark = [pytest.mark.cuda, pytest.mark.native]
needs_module = pytest.mark.skipif(
    cuda_report.find_module() is None, reason="the package was built without nvcc, so it has no CUDA module"
)
needs_cuobjdump = pytest.mark.skipif(
    cuda_report.find_cuobjdump() is None, reason="cuobjdump is in neither the CUDA toolkit nor Triton"
)


@pytest.fixture(scope="session")
def report():
    """QCFS_FAST_CUDA_REPORT names a file to keep it in."""
    result = cuda_report.make_report(cuda_report.find_module(), cuda_report.find_cuobjdump())
    if kept := os.environ.get("QCFS_FAST_CUDA_REPORT"):
        Path(kept).write_text(json.dumps(result, indent=1))
    return result


@needs_module
@needs_cuobjdump
@pytest.mark.slow
def test_every_kernel_is_there_for_every_architecture_without_spills(report):
    rows = report["kernels"]
    kernels = {r["kernel"] for r in rows}
    for name in (
        "conv_if",
        "conv_if_direct",
        "epilogue",
        "image_tensor",
        "image_direct",
        "pool",
        "count",
        "readout",
        "quantize",
        "pack",
    ):
        assert any(k.startswith(f"{name}_kernel") for k in kernels), name
    if "TORCH_CUDA_ARCH_LIST" not in os.environ:
        assert {r["arch"] for r in rows} == set(cuda_report.ARCHITECTURES)
        assert report["ptx"] == [cuda_report.ARCHITECTURES[-1]]
    assert Counter(r["kernel"] for r in rows) == dict.fromkeys(kernels, len({r["arch"] for r in rows}))
    assert all(r["stack"] == r["local"] == 0 for r in rows)
    assert report["problems"] == []


@needs_module
@needs_cuobjdump
@pytest.mark.slow
def test_the_product_loops_multiply_every_step_once(report):
    """A stage is two 32-byte steps of K: T x parts x cols/8 products each, four times as many on Turing."""
    seen = 0
    for row in report["kernels"]:
        if not row["kernel"].startswith("conv_if_kernel") or row["arch"] == "90a":  # wgmma, see below
            continue
        T, parts, cols, _, _, planes, _ = map(int, re.findall(r"\d+", row["kernel"]))
        products = 2 * T * parts * cols // 8 * (4 if row["arch"] == "75" else 1)
        paths = 2 if T > 1 and planes > 1 else 1  # masks, counts
        assert row["loop"]["products"] in (products, paths * products)
        seen += 1
    assert seen > 0


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_hopper_products_of_four_warps_compile(tmp_path):
    """The option QCFS_FAST_WGMMA: asynchronous products from registers, for all T of one load; no spills."""
    unit = tmp_path / "conv_if_4.o"
    command = ["nvcc", "-std=c++17", "-O3", "-Werror=all-warnings", "-DQCFS_FAST_WGMMA", f"-I{ROOT / 'csrc'}"]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-c", str(ROOT / "csrc/cuda/conv_if_4.cu"), "-o", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = cuda_report.make_report(unit, cuda_report.find_cuobjdump())
    assert report["problems"] == []
    loops = {r["kernel"]: r["loop"] for r in report["kernels"] if r["kernel"].startswith("conv_if_kernel")}
    assert len(loops) == 4
    assert all(loop["products"] == 2 * 4 for loop in loops.values())  # two 32-byte steps of K, four time steps


def test_a_missing_instruction_is_a_problem():
    good = Counter({"IMMA.16832.U8.S8": 8, "LDSM.16.M88.4": 4, "LDGSTS.E.BYPASS.128": 2, "STG.E.128": 1})
    key = ("conv_if_kernel<4, 1, 64, 8, 4, 1>", "90")
    assert cuda_report.missing_instructions({key: good}) == []
    for name in good:
        lacking = Counter({k: n for k, n in good.items() if k != name})
        assert len(cuda_report.missing_instructions({key: lacking})) == 1
    assert cuda_report.missing_instructions({key: good + Counter({"STL.64": 1})}) != []


def test_an_exceeded_limit_is_a_problem():
    row = {"kernel": "image_tensor_kernel", "arch": "90", "registers": 128, "loop": {"beside products": 240}}
    assert cuda_report.exceeded_limits([row, {**row, "kernel": "another", "registers": 255}]) == []
    assert len(cuda_report.exceeded_limits([{**row, "registers": 129}])) == 1
    assert len(cuda_report.exceeded_limits([{**row, "loop": {"beside products": 241}}])) == 1
    loop = {"before products": 9, "layer's values": 0}
    row = {"kernel": "conv_if_kernel<4, 1, 64, 4, 4, 1, 0>", "arch": "90", "registers": 255, "loop": loop}
    assert cuda_report.exceeded_limits([row]) == []
    for what in loop:
        assert len(cuda_report.exceeded_limits([{**row, "loop": {**loop, what: 99}}])) == 1
    counts = {**row, "kernel": "conv_if_kernel<4, 1, 64, 4, 3, 4, 1>", "loop": {**loop, "layer's values": 9}}
    assert cuda_report.exceeded_limits([counts]) == []


SASS = """
/*0000*/ MOV R1, c[0x0][0x28] ;
/*0010*/ LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
/*0020*/ @P0 BRA 0x50 ;
/*0030*/ IADD3 R1, R1, 0x1, RZ ;
/*0040*/ IADD3 R2, R2, 0x1, RZ ;
/*0050*/ @!P1 BRA 0x80 ;
/*0060*/ LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64] ;
/*0070*/ BRA 0x90 ;
/*0080*/ IADD3 R3, R3, 0x1, RZ ;
/*0090*/ IMMA.16832.U8.S8 R8, R4.ROW, R6.COL, R8 ;
/*00a0*/ @P2 BRA 0x10 ;
/*00b0*/ EXIT ;
"""


def test_what_a_round_executes():
    """The loop begins at 0x10. An ordinary round skips 0x30 and 0x40, copies at 0x60 and so skips 0x80."""
    code = [cuda_report.instruction(m) for m in map(cuda_report.LINE.search, SASS.splitlines()) if m]
    loop = cuda_report.product_loop(code)
    assert (loop["products"], loop["copies"], loop["arithmetic"], loop["executed"]) == (1, 2, 3, 7)


@pytest.mark.parametrize("label", ["resnet18 224", "resnet20 32"])
def test_the_roofline_counts_the_products_of_the_networks(label):
    name, shape = cases.NETWORKS[label]
    macs = []

    def count(layer, _, out):
        macs.append(out[0].numel() * layer.weight[0].numel())

    network = cases.random_network(name, shape[-1]).eval()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(count)
    network(torch.zeros(1, *shape))
    (estimated,) = (n for n in roofline.NETWORKS if n.lower().replace("-", "").replace(" at", "") == label)
    layers = roofline.convolutions(estimated)
    assert sum(size**2 * out * (9 * c + projected) for size, out, c, projected in layers) == sum(macs[1:])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_the_roofline_asks_the_cost_model(tmp_path):
    arches = [str(gpu.capability) for gpu in roofline.GPUS.values()]
    kernels = ["image_tensor_kernel", "conv_if_kernel<4, 1, 64, 4, 4, 1, 0>", "conv_if_kernel<4, 1, 32, 4, 4, 1, 0>"]
    rows = [{"kernel": k, "arch": a, "loop": {"executed": 200}} for k in kernels for a in arches]
    (tmp_path / "report.json").write_text(json.dumps({"kernels": rows}))
    command = [sys.executable, ROOT / "tools/roofline.py", tmp_path / "report.json", "--layers"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sums = dict(re.findall(r"^(\S.*): .* all ([\d.]+)$", done.stdout, re.MULTILINE))
    assert len(sums) == len(arches) * len(roofline.NETWORKS) * 4
    for what, ms in sums.items():
        assert float(ms) > 0
        if "16 bits" in what:
            assert float(ms) > float(sums[what.replace("16 bits", " 8 bits")])
    for part in re.split(r"^(?=\S)", done.stdout, flags=re.MULTILINE):  # a network's lines
        splits = re.findall(r"512 to 512 at 7: .*K/(\d+) ", part)
        assert all((int(n) > 1) == ("batch   1" in part) for n in splits)  # a deep layer of one image is split over K


def configure(build, *options, **environment):
    """CMake's configuration step alone."""
    pybind11 = pytest.importorskip("pybind11")
    cmake = next((p for p in (Path(sys.executable).parent / "cmake", Path("/usr/bin/cmake")) if p.exists()), None)
    if cmake is None:
        pytest.skip("cmake is not installed")
    command = [cmake, "-G", "Ninja", "-S", ROOT, "-B", build, f"-DPython_EXECUTABLE={sys.executable}"]
    command += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", *options]
    env = {**os.environ, "QCFS_FAST_CUDA": "auto", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.mark.parametrize(("variable", "value", "message"), [
    ("QCFS_FAST_CUDA", "perhaps", "known values: auto, on, off"),
    ("TORCH_CUDA_ARCH_LIST", "ninety", "is not like 8.0"),
])  # fmt: skip
def test_wrong_build_settings_say_so(variable, value, message, tmp_path):
    result = configure(tmp_path, **{variable: value})
    assert result.returncode != 0
    assert message in " ".join(result.stderr.split())


def write_nvcc(home, *lines):
    nvcc = home / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    nvcc.chmod(0o755)


def test_a_broken_nvcc_is_none(tmp_path):
    """`auto` builds without the CUDA module, `on` says what is missing."""
    write_nvcc(tmp_path, "echo 'nvcc: unsupported host compiler' >&2", "exit 1")
    result = configure(tmp_path / "auto", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "building without the CUDA module: no working nvcc was found" in result.stdout
    result = configure(tmp_path / "on", CUDA_HOME=str(tmp_path), QCFS_FAST_CUDA="on")
    assert result.returncode != 0
    assert "no working nvcc was found; set CUDA_HOME" in " ".join(result.stderr.split())


def test_an_old_nvcc_is_none(tmp_path):
    write_nvcc(tmp_path, "echo 'Cuda compilation tools, release 11.4, V11.4.152'")
    result = configure(tmp_path / "auto", CUDA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "without the CUDA module: nvcc 11.4 is older than 11.8, which the CUDA module needs" in result.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize(("listed", "wgmma", "built"), [
    ("7.0 8.0+PTX", "OFF", "8.0+PTX"),  # common in images for torch; the kernels need 7.5
    ("9.0", "ON", "9.0a"),
    ("8.0;9.0+PTX", "ON", "8.0 9.0a+PTX"),
    ("9.0", "OFF", "9.0"),
    ("6.1,7.0", "OFF", None),
])  # fmt: skip
def test_which_architectures_are_built(listed, wgmma, built, tmp_path):
    result = configure(tmp_path, f"-DQCFS_FAST_WGMMA={wgmma}", TORCH_CUDA_ARCH_LIST=listed)
    assert result.returncode == 0, result.stderr
    if built is None:
        assert "without the CUDA module: TORCH_CUDA_ARCH_LIST names no architecture from 7.5 on" in result.stdout
    else:
        assert f"CUDA architectures {built}\n" in result.stdout
        assert ("sm_90a" in (tmp_path / "build.ninja").read_text()) == ("9.0a" in built)
    assert ("7.0 is left out" in result.stdout) == ("7.0" in listed)
