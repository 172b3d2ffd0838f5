"""make bench: every case of qcfs_fast/study/benchmark as a pytest benchmark, with its check inside.

    pytest benchmarks --benchmark-only                        a selection of about ten minutes
    pytest benchmarks --benchmark-only --full                 all networks, batches and T (hours on two cores)
    pytest benchmarks --benchmark-only -k "resnet18" --results results.json

Results are added to the file of --results, whose table and plots `python -m qcfs_fast compare` makes.
"""

import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qcfs_fast.study.benchmark.cases import NetworkCases
from qcfs_fast.study.benchmark.measure import Effort
from qcfs_fast.study.benchmark.results import Results, summary


def pytest_addoption(parser):
    group = parser.getgroup("qcfs_fast")
    group.addoption("--full", action="store_true", help="all networks, batches and T")
    group.addoption("--steps", type=int, nargs="+", default=None, metavar="T", help="only these T, for all networks")
    group.addoption("--seconds", type=float, default=1.0, help="per contender and case (default 1)")
    group.addoption("--no-compile", action="store_true", help="leave out the contenders under torch.compile")
    group.addoption("--results", type=Path, default=Path("benchmark-results.json"), help="result file to add to")


@pytest.fixture(scope="session")
def options(request):
    get = request.config.getoption
    return SimpleNamespace(
        full=get("--full"),
        steps=None if get("--steps") is None else tuple(get("--steps")),
        effort=Effort(seconds=get("--seconds")),
        compiled=not get("--no-compile"),
    )


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def results(request, device):
    return Results(request.config.getoption("--results").resolve(), device)


@pytest.fixture(scope="session")
def network(device, options):
    """network(label) makes each network once; the last one is kept."""
    return functools.lru_cache(maxsize=1)(lambda label: NetworkCases(label, device, options.compiled))


@pytest.fixture
def collect(results, capsys):
    """collect(benchmark, cases, ours): runs and prints the cases, adds them to the file, and times ours once more."""

    def run(benchmark, cases, ours):
        with torch.no_grad():
            for case in cases:
                results.add(case)
                with capsys.disabled():
                    print("\n" + summary(case), flush=True)
                seconds = {n: r.get("seconds") for n, r in case["contenders"].items()}
                benchmark.extra_info[f"T={case['T']}"] = {"firing rate": case["firing rate"], "seconds": seconds}
            benchmark.pedantic(ours, rounds=5, warmup_rounds=1)

    return run
