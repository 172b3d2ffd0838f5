"""The PTX that nvcc makes of the CUDA kernels, run instruction by instruction on the CPU (tests/ptx).

It must return the bytes of plain loops, and no access may race with another or leave its operand. Each mutation of a
wait, a barrier or a fence must be noticed. TEST_CUDA_PTX_THOROUGH=1 runs all units of all architectures.
"""

import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import emulated_cuda
import pytest

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.native,
    pytest.mark.slow,
    pytest.mark.skipif(emulated_cuda.compiler is None, reason="g++ is not installed"),
    pytest.mark.skipif(emulated_cuda.nvcc is None, reason="nvcc is not on the PATH"),
]
THOROUGH = "TEST_CUDA_PTX_THOROUGH" in os.environ
# Architecture, and the steps of the layers with which it is tested; sums have one step only.
RUNS = [("75", 1), ("75", 2), ("80", 1), ("80", 8), ("90", 1), ("90", 4), ("90a", 1), ("90a", 4)]
if THOROUGH:
    RUNS = [(architecture, steps) for architecture in ("75", "80", "90", "90a") for steps in (1, 2, 4, 8, 0)]
MODES = {"plain", "offset", "masked", "signed", "sum"}


def units(steps):
    """The translation units that all of a run's launches come from."""
    return ["cuda", *(f"conv_if_{T}" for T in ([steps] if steps else (1, 2, 4, 8)))]


@pytest.fixture(scope="session")
def program(tmp_path_factory):
    return emulated_cuda.ptx_test(tmp_path_factory.mktemp("program"))


@pytest.fixture(scope="session")
def ptx(tmp_path_factory):
    """Files by unit and architecture."""
    folder = tmp_path_factory.mktemp("ptx")
    wanted = sorted({(unit, architecture) for architecture, steps in RUNS for unit in units(steps)})
    with ThreadPoolExecutor(2) as pool:
        paths = pool.map(lambda w: emulated_cuda.write_ptx(*w, folder), wanted)
    return dict(zip(wanted, paths, strict=True))


def run(program, paths, *arguments):
    environment = {**os.environ, "QCFS_PTX": ":".join(map(str, paths)), "ASAN_OPTIONS": "detect_leaks=1"}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.mark.parametrize(("architecture", "steps"), RUNS)
def test_random_layers(architecture, steps, program, ptx):
    paths = [ptx[unit, architecture] for unit in units(steps)]
    result = run(program, paths, 3, 200 if THOROUGH else 60 if steps == 1 else 30, steps, architecture.rstrip("a"))
    assert result.returncode == 0, result.stdout + result.stderr
    words = result.stdout.split()
    totals = {name: float(value) for name, value in zip(words[0::2], words[1::2], strict=True)}
    assert 0.02 < totals["rate"] < 0.95, "the test is void: silent or saturated neurons"
    modes = MODES if steps in (0, 1) else MODES - {"sum"}
    least = dict.fromkeys(modes, 1) | {"ties": 100, "tensor": 5, "direct": 5, "split": 1, "ptx_launches": 30}
    if architecture.startswith("90"):
        least["clusters"] = 1
    assert {name: totals[name] for name in least if totals[name] < least[name]} == {}
    assert totals["emulated_launches"] == 0


CLUSTER_BARRIER = r"barrier\.cluster\.arrive.*;\s*barrier\.cluster\.wait.*;"
# Architecture, what is replaced by what, at which of its places in each kernel on tensor cores.
MUTATIONS = {
    "a later wait for copies": ("90", r"cp\.async\.wait_group \d;", "cp.async.wait_group 3;", 0),
    "a copy outside of its group": ("90", r"cp\.async\.commit_group;", "", 1),
    "no barrier before the products": ("90", r"bar\.sync.*;", "", 0),
    "no barrier before the epilogue": ("90", r"bar\.sync.*;", "", 1),
    "no barrier before the stores": ("90", r"bar\.sync.*;", "", 2),
    "no barrier within the warp, before reads": ("90", r"bar\.warp\.sync.*;", "", 0),
    "no barrier within the warp, after reads": ("90", r"bar\.warp\.sync.*;", "", 1),
    "no barrier of the cluster before the sums": ("90", CLUSTER_BARRIER, "", 0),
    "no barrier of the cluster before the end": ("90", CLUSTER_BARRIER, "", 1),
    "an arrival that does not release": ("90", r"arrive\.release", "arrive.relaxed", 0),
    "no wait for the launch before": ("90", r"griddepcontrol\.wait;", "", 0),
    "no fence between the proxies": ("90a", r"fence\.proxy\.async.*;", "", 0),
    "no fence before the products": ("90a", r"wgmma\.fence.*;", "", 0),
    "products outside of their group": ("90a", r"wgmma\.commit_group.*;", "", 0),
    "no wait for the products": ("90a", r"wgmma\.wait_group.*;", "", 0),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_mutations_are_noticed(mutation, program, ptx, tmp_path):
    architecture, pattern, by, which = MUTATIONS[mutation]
    start, *kernels = re.split(r"(?=\.entry \w*conv_if_kernel)", ptx["conv_if_1", architecture].read_text())
    changed = [start]
    for kernel in kernels:
        places = list(re.finditer(pattern, kernel))
        assert len(places) > which, f"{mutation}: the instruction to mutate is gone; choose another"
        first, end = places[which].span()
        changed.append(kernel[:first] + by + kernel[end:])
    mutated = tmp_path / "mutated.ptx"
    mutated.write_text("".join(changed))
    result = run(program, [mutated, ptx["cuda", architecture]], 3, 200, 1, 90)  # ends where it notices
    assert result.returncode == 1, result.stdout
    assert "FAILED: PTX: " in result.stdout
