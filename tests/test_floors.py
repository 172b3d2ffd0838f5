"""The package is a house of floors, and an import may only go down.

    __init__, __main__            the public names and the command; they may import everything
    study                         profiles, benchmarks, evaluates: it looks on
    exchange                      networks in the formats and simulators of others
    conversion                    from a trained model to integers
    network    model              what runs; beside it, what a user brings and trains
    backend                       who runs an operator
    operators                     what each operator means
    files                         how a file is written
    errors, version               the ground

A reader can therefore understand a floor from itself and from those below. The modules are parsed and not imported, so
an import inside of a function or under TYPE_CHECKING counts as well: whoever reads the one module must know the other.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "qcfs_fast"
FLOORS = (
    {"__init__", "__main__"},
    {"study"},
    {"exchange"},
    {"conversion"},
    {"network", "model"},
    {"backend"},
    {"operators"},
    {"files"},
    {"errors", "version"},
)
# A room that may use less than its floor allows.
ONLY = {"model": {"errors"}}
NATIVE = {"_cpu", "_cuda"}  # compiled modules: they import nothing


def read(package):
    """Dotted name -> (parsed file, whether it is a package's __init__) of every module in a folder."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        name = ".".join(parts[:-1] if is_package else parts)
        found[name] = ast.parse(path.read_text(encoding="ascii")), is_package
    return found


def imported(name, modules):
    """The modules of the tree that one module imports, anywhere in its file."""
    tree, is_package = modules[name]
    own_package = name if is_package else name.rpartition(".")[0]
    root = name.partition(".")[0]

    def package_above(level):
        return ".".join(own_package.split(".")[: len(own_package.split(".")) - (level - 1)])

    def module(full):
        """The longest part of a dotted name that is a module: what follows are names inside of it."""
        while full and full not in modules:
            full = full.rpartition(".")[0]
        return full

    targets = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package_above(node.level) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            targets |= {f"{base}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "import_module"):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                text = literal.value.lstrip(".")
                level = len(literal.value) - len(text)
                targets.add(f"{package_above(level)}.{text}" if level else text)
    ours = {t for t in targets if t.partition(".")[0] == root and t.rpartition(".")[2] not in NATIVE}
    return {module(t) for t in ours} - {name}


def graph_of(modules):
    return {name: imported(name, modules) for name in modules}


def room(name):
    """The folder or module directly below the package in which a module lies."""
    return name.split(".")[1] if "." in name else "__init__"


def against_the_order(graph):
    """Imports that do not go down, and rooms that stand on no floor."""
    floor = {r: i for i, rooms in enumerate(FLOORS) for r in rooms}
    faults = [f"{name}: no floor is stated for {room(name)!r}" for name in graph if room(name) not in floor]
    for name, targets in graph.items():
        for target in sorted(targets):
            a, b = room(name), room(target)
            if a == b or a not in floor or b not in floor or "__main__" in (a, b):
                continue
            if floor[b] <= floor[a]:
                faults.append(f"{name} imports {target}, which is not below it")
            elif b not in ONLY.get(a, {b}):
                faults.append(f"{name} imports {target}, but {a} may import {', '.join(ONLY[a])} alone")
    return faults


def circles(graph):
    """One circle of imports, if there is any."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


def hidden_names(modules):
    """Names of a package that one of its own modules would hide.

    Importing `package.profile` sets the attribute `profile` of the package, over a function of that name.
    """
    faults = []
    for name, (tree, is_package) in modules.items():
        if not is_package:
            continue
        children = {m.rpartition(".")[2] for m in modules if m.rpartition(".")[0] == name}
        bound = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not (node.level == 1 and node.module is None):
                bound |= {alias.asname or alias.name for alias in node.names}
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                bound.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                bound.add(node.id)
        faults += [f"the module {name}.{child} hides {child} of {name}" for child in sorted(children & bound)]
    return faults


@pytest.fixture(scope="module")
def modules():
    found = read(PACKAGE)
    assert {"qcfs_fast", "qcfs_fast.__main__", "qcfs_fast.errors"} <= set(found)
    return found


def test_imports_only_go_down(modules):
    graph = graph_of(modules)
    assert sum(len(targets) for targets in graph.values()) > len(graph)  # imports were found
    assert against_the_order(graph) == []


def test_every_floor_is_lived_in(modules):
    assert {room(name) for name in modules} == set().union(*FLOORS)


def test_no_modules_import_each_other(modules):
    assert circles(graph_of(modules)) == []


def test_no_module_hides_a_public_name(modules):
    assert hidden_names(modules) == []


# ------------------------------------------------------------------- the rules, broken one at a time


def house(folder, files):
    """A made-up package of the given texts by path; folders get an empty __init__.py where none is given."""
    package = folder / "house"
    for name, text in files.items():
        path = package / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for parent in {package, *(p.parent for p in package.rglob("*.py"))}:
        (parent / "__init__.py").touch()
    return read(package)


def test_a_house_in_order(tmp_path):
    modules = house(
        tmp_path,
        {
            "__init__": "from .network.snn import SNN as Network\nfrom .study.profiling.measure import profile\n",
            "__main__": "from .study import command_line\n",
            "study/command_line": "def main():\n    from ..network.snn import SNN\n",
            "study/profiling/measure": "from ...network import snn\nfrom . import page\n",
            "study/profiling/page": "import numpy.linalg\n",
            "network/snn": "import importlib\nfrom ..errors import Bad\nimportlib.import_module('house._cpu')\n",
            "errors": "",
        },
    )
    graph = graph_of(modules)
    assert graph["house"] == {"house.network.snn", "house.study.profiling.measure"}
    assert graph["house.study.command_line"] == {"house.network.snn"}
    assert graph["house.study.profiling.measure"] == {"house.network.snn", "house.study.profiling.page"}
    assert graph["house.study.profiling.page"] == set()
    assert graph["house.network.snn"] == {"house.errors"}
    assert (against_the_order(graph), circles(graph), hidden_names(modules)) == ([], [], [])


@pytest.mark.parametrize(
    "statement",
    [
        "from ..conversion.builder import convert",
        "from ..conversion import builder",
        "import house.conversion.builder",
        "import house.conversion.builder as b",
        "def late():\n    from ..conversion.builder import convert",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..conversion import builder",
        "import importlib\nimportlib.import_module('house.conversion.builder')",
        "from importlib import import_module\nimport_module('..conversion.builder', __package__)",
    ],
)
def test_an_import_that_goes_up_is_found(statement, tmp_path):
    graph = graph_of(house(tmp_path, {"network/snn": statement, "conversion/builder": ""}))
    assert against_the_order(graph) == ["house.network.snn imports house.conversion.builder, which is not below it"]


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"network/snn": "from .. import SNN"}, "house.network.snn imports house, which is not below it"),
        ({"network/snn": "from ..model import qcfs", "model/qcfs": ""}, "imports house.model.qcfs, which is not"),
        ({"model/qcfs": "from ..operators import masks", "operators/masks": ""}, "model may import errors alone"),
        ({"errors": "from . import version", "version": ""}, "house.errors imports house.version, which is not below"),
        ({"attic/box": ""}, "house.attic: no floor is stated for 'attic'"),
    ],
)
def test_a_room_out_of_place_is_found(files, fault, tmp_path):
    assert fault in against_the_order(graph_of(house(tmp_path, files)))[0]


@pytest.mark.parametrize(
    "files",
    [
        {"study/a": "from . import b", "study/b": "from .a import f"},
        {"study/a": "def f():\n    from . import b", "study/b": "from . import a"},
        {"study/a": "if TYPE_CHECKING:\n    from .b import B", "study/b": "from .a import f"},
        {"study/a": "from . import b", "study/b": "from .deep import c", "study/deep/c": "from ..a import f"},
        {"study/__init__": "from .a import f", "study/a": "from . import g"},
    ],
)
def test_a_circle_is_found(files, tmp_path):
    (circle,) = circles(graph_of(house(tmp_path, files)))
    assert circle.count("house.study.a") >= 1
    ring = circle.split(" -> ")
    assert ring[0] == ring[-1]
    assert len(ring) >= 3


@pytest.mark.parametrize(
    "files",
    [
        {"__init__": "from .study.measure import profile", "study/measure": "", "profile/page": ""},
        {"__init__": "def profile(): ...", "profile": ""},
        {"study/__init__": "from .measure import profile", "study/measure": "", "study/profile": ""},
        {"study/__init__": "from .profile import profile", "study/profile": ""},
    ],
)
def test_a_hidden_name_is_found(files, tmp_path):
    (fault,) = hidden_names(house(tmp_path, files))
    assert fault in (
        "the module house.profile hides profile of house", "the module house.study.profile hides profile of house.study"
    )  # fmt: skip
