"""What a release would hold: the source distribution, the wheel built from it, and that wheel in a clean environment.

pip installs as for a user, but without the network: torch is that of the environment in which the tests run. The wheel
is the one that `make` built there from the source distribution. Without it pip builds one here, with the build tools of
that environment and without the CUDA module.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from qcfs_fast import __version__

SOURCE = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--isolated"]
# The converted network runs on the native kernels, and gives the bytes of the reference.
CODE = """
import json, torch, qcfs_fast
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), qcfs_fast.QCFS(4), nn.Flatten(), nn.Linear(576, 5)).eval()
images = torch.randn(4, 3, 8, 8)
qcfs_fast.calibrate(model, [images], progress=False)
snn = qcfs_fast.convert(model, T=4)
native = snn(images, per_step=True)
rate = float(sum(s.float().mean() for s in qcfs_fast.trace(snn, images).values()))
with qcfs_fast.backend.force(reference=True):
    same = torch.equal(native, snn(images, per_step=True))
print(json.dumps([qcfs_fast.__file__, qcfs_fast.backend.describe(), rate, same]))
"""


def run(command, folder=None, **environment):
    """What a command prints; it sees neither this source tree nor the settings of this process."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("QCFS_FAST_")}
    env.update(environment)
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env, cwd=folder)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_what_make_installs_is_pinned_and_hashed():
    """With all that comes along."""
    sections = re.split(r"^# (\w+): .*\n", (SOURCE / "constraints.txt").read_text(), flags=re.M)[1:]
    pins = {}
    for step, text in zip(sections[::2], sections[1::2], strict=True):
        versions = dict(line.split("==") for line in text.splitlines())
        locked = re.split(r"^(\S+)==(\S+)", (SOURCE / f"requirements/{step}.txt").read_text(), flags=re.M)[1:]
        assert dict(zip(locked[::3], locked[1::3], strict=True)) == versions, f"make lock has not followed: {step}"
        assert all(re.search(r"--hash=sha256:[0-9a-f]{64}\b", hashes) for hashes in locked[2::3])
        pins |= versions
    assert {"torch", "pytest", "ruff"} <= set(pins)
    assert list(map(plain, pins)) == list(pins)
    makefile = (SOURCE / "Makefile").read_text().replace("\\\n", "")
    for line in re.findall(r"PIP\) (?:install|wheel)\b.*", makefile):  # LOCKED is what takes hashes
        other = "uv==|triton-|-c constraints.txt torch$"
        assert re.search(rf"--no-index|--no-deps .*({re.escape('$(DIST)/*')}|\.$)|{other}", line), line
    looked_into = 0
    for name in set(pins) - {"spikingjelly", "snntorch", "torchvision"}:  # installed without what they bring along
        with contextlib.suppress(metadata.PackageNotFoundError):
            found = metadata.distribution(name)
            if found.version.partition("+")[0] == pins[name]:
                looked_into += 1
                brings = [r for r in map(Requirement, found.requires or ()) if not r.marker or r.marker.evaluate()]
                assert {plain(r.name) for r in brings} <= set(pins), name
    if not looked_into:
        pytest.skip("other versions than those of constraints.txt are installed")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    """Built from a copy of what git would know, so that nothing is written beside the sources."""
    folder = tmp_path_factory.mktemp("sdist")
    patterns = (SOURCE / ".gitignore").read_text().split()
    ignored = [pattern.rstrip("/") for pattern in patterns if not pattern.startswith("/")]
    shutil.copytree(SOURCE, folder / "source", symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    build = "import setuptools.build_meta as b; b.build_sdist('..')"
    run([sys.executable, "-c", build], folder / "source")
    (path,) = folder.glob("*.tar.gz")
    assert path.name == f"qcfs_fast-{__version__}.tar.gz"
    return path


@pytest.fixture(scope="module")
def wheel(sdist):
    """The one that `make` built from the source distribution and installed; elsewhere it is built here."""
    built = [*(Path(sys.prefix) / "dist").glob("qcfs_fast-*.whl")]
    if not built:
        options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(sdist.parent)]
        run([*PIP, "wheel", *options, str(sdist)], sdist.parent, QCFS_FAST_CUDA="off")
        built = [*sdist.parent.glob("*.whl")]
    (path,) = built
    return path


def test_sdist_holds_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    assert {"CMakeLists.txt", "setup.py", "csrc/core/contract.h", "qcfs_fast/py.typed", "tests/oracle.py"} <= held
    assert not [name for name in held if name.endswith((".so", ".pyc"))]
    if not (SOURCE / ".git").exists() or shutil.which("git") is None:
        pytest.skip("without git the list of files is not known")
    tracked = run(["git", "ls-files"], SOURCE).splitlines()
    assert sorted({name for name in tracked if (SOURCE / name).exists()} - held) == []


@pytest.mark.slow
@pytest.mark.native
def test_wheel_holds_the_package_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    folders = {name.partition("/")[0] for name in held}
    assert folders == {"qcfs_fast", f"qcfs_fast-{__version__}.dist-info"}
    modules = {p.relative_to(SOURCE).as_posix() for p in (SOURCE / "qcfs_fast").rglob("*.py")}
    shipped = {p.relative_to(SOURCE).as_posix() for p in (SOURCE / "qcfs_fast" / "study" / "fashion").iterdir()}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    cuda = {f"qcfs_fast/_cuda{suffix}"} & held  # where nvcc was found
    assert {name for name in held if name.startswith("qcfs_fast/")} == {
        *modules,
        *shipped,
        "qcfs_fast/exchange/integers.c",
        "qcfs_fast/py.typed",
        f"qcfs_fast/_cpu{suffix}",
        *cuda,
    }
    licences = {f"LICENSES/{p.name}" for p in (SOURCE / "LICENSES").iterdir()} | {"LICENSE"}
    travel = f"qcfs_fast-{__version__}.dist-info/licenses/"
    assert {name.removeprefix(travel) for name in held if name.startswith(travel)} == licences


@pytest.mark.slow
@pytest.mark.native
def test_wheel_from_the_sdist_runs_in_a_clean_environment(wheel, tmp_path):
    python = str(tmp_path / "venv" / "bin" / "python")
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], tmp_path)
    # First the package, into an environment without any other; then torch and the rest, by a path.
    run([*PIP, "--python", python, "install", "--no-index", "--no-deps", str(wheel)], tmp_path)
    site = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))"], tmp_path).strip())
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "requirements.pth").write_text("\n".join(sorted(paths)))
    file, kernels, rate, same = json.loads(run([python, "-c", CODE], tmp_path))
    assert Path(file).is_relative_to(site)
    facts = json.loads(run([python, "-m", "qcfs_fast", "info", "--json"], tmp_path))
    assert facts["qcfs_fast"] == __version__
    assert facts["native module"] == "loaded"
    assert kernels != "reference"
    assert kernels in facts["kernel sets this processor runs"]
    assert 0.05 < rate < 0.95
    assert same
    assert run([str(Path(python).parent / "qcfs-fast"), "info"], tmp_path)
