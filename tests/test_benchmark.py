"""The benchmark on a tiny network: contenders agree, results are kept, tables and plots say what they hold."""

import copy
import json
import math
import re
import time

import networks
import pytest
import torch

import qcfs_fast
from qcfs_fast.study.benchmark import comparison, contenders, measure
from qcfs_fast.study.benchmark.cases import (
    LATENCY_ROUNDS,
    NETWORKS,
    OURS,
    TINY,
    LayerCase,
    NetworkCases,
    batches,
    spiking_macs,
)
from qcfs_fast.study.benchmark.contenders import STREAM
from qcfs_fast.study.benchmark.measure import (
    Clock,
    Effort,
    interleaved,
    live_bytes,
    percentiles,
    share_outside,
    take_turns,
)
from qcfs_fast.study.benchmark.results import KIND, Results, read

CPU = torch.device("cpu")
EFFORT = Effort(rounds=4, seconds=0.01)


@pytest.fixture(scope="module")
def tiny():
    """The benchmark's NetworkCases around a network of a few thousand weights."""
    torch.manual_seed(0)
    made = object.__new__(NetworkCases)
    made.label, made.shape, made.device, made.compiled = "tiny 12", (3, 12, 12), CPU, False
    made.model = qcfs_fast.prepare(networks.randomize(networks.Small()), levels=4)
    qcfs_fast.calibrate(made.model, [torch.rand(8, 3, 12, 12)], progress=False)
    for module in contenders.activations(made.model).values():
        module.thresh.data.mul_(1.4)
    made.snns = {
        name: qcfs_fast.convert(made.model, T=4, weight_bits=bits, neuron=neuron)
        for name, (neuron, bits) in OURS.items()
    }
    with torch.no_grad():
        yield made


def test_contenders_compute_the_same_and_faults_are_found(tiny):
    images = torch.rand(3, 3, 12, 12)
    peers = contenders.Contenders(tiny.model, tiny.snns, images, compiled=False)
    found = tiny.check(peers, images)
    assert "T-loop fp32, apart" in found
    assert "ANN QCFS fp32, apart" in found
    assert 0 < found["T-loop bf16, apart"] < 0.05  # zero: nothing was compared
    loop = peers.networks["T-loop fp32"]
    neuron = next(m for m in loop.modules() if isinstance(m, contenders._StepNeuron))
    neuron.theta *= 1.1
    with pytest.raises(AssertionError, match="T-loop fp32, apart"):
        tiny.check(peers, images)
    neuron.theta /= 1.1
    qcfs = next(m for m in peers.networks["ANN QCFS fp32"].modules() if isinstance(m, contenders._Qcfs))
    qcfs.up *= 1.1
    with pytest.raises(AssertionError, match="ANN QCFS fp32, apart"):
        tiny.check(peers, images)


@pytest.mark.parametrize("library", ["spikingjelly", "snntorch"])
def test_peers_fire_as_ours(tiny, library):
    """Thresholds hit exactly included: snnTorch compares with >, SpikingJelly with >=."""
    pytest.importorskip(library)
    theta, T = 0.75, 6
    make = (
        contenders._SpikingJelly(theta, True)
        if library == "spikingjelly"
        else contenders._SnnTorch(theta, torch.float32)
    )
    currents = torch.arange(-4, 21).float()[None] * (theta / 8)
    make.restart(T)
    got = (
        make(currents).unflatten(0, (T, 1))
        if library == "spikingjelly"
        else torch.stack([make(currents) for _ in range(T)])
    )
    step = contenders._StepNeuron(theta)
    step.v = torch.zeros_like(currents)
    step.restart(T)
    want = torch.stack([step(currents) for _ in range(T)])
    assert ((theta / 2 + currents) == theta).any()
    assert torch.equal(got.reshape(want.shape), want)
    assert 0.05 < (want > 0).float().mean() < 0.95


def test_a_missing_peer_is_listed(tiny, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(f"No module named '{name}'")

    monkeypatch.setattr(contenders.importlib, "import_module", absent)
    peers = contenders.Contenders(tiny.model, tiny.snns, torch.rand(1, 3, 12, 12), compiled=False)
    assert peers.errors["snnTorch fp32"] == "ModuleNotFoundError: No module named 'snntorch'"
    assert "SpikingJelly fp32" in peers.errors
    assert "qcfs_fast 16-bit" in peers.calls


@pytest.fixture(scope="module")
def results(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "results.json"
    file = Results(path, CPU)
    for batch in (1, 2):
        for case in tiny.cases(batch, (2, 4), EFFORT):
            file.add(case)
    file.add(LayerCase("3x3 7x7 512->512").case(EFFORT))
    return path


def test_cases(results):
    data = read(results)
    assert len(data["cases"]) == 5
    assert {"cpu", "threads", "kernels", "versions"} <= set(data["machine"])
    for case in data["cases"]:
        assert 0.08 <= case["firing rate"] <= 0.18
        rows = case["contenders"]
        ours = {"qcfs_fast 16-bit", "qcfs_fast 8-bit"} if case["kind"] == "layer" else {*OURS, STREAM}
        assert {*ours, "T-loop fp32", "T-loop bf16"} <= {name for name, row in rows.items() if "error" not in row}
        for row in rows.values():
            assert "error" in row or row["least"] <= row["seconds"]
            assert "error" in row or 3 <= row["rounds"] <= (LATENCY_ROUNDS if case["batch"] == 1 else 4)
        outside = {name: row["outside"] for name, row in rows.items() if "outside" in row}
        assert set(outside) == (set() if case["kind"] == "layer" else set(OURS))
        assert all(0 < share < 1 for share in outside.values())
    four = [c for c in data["cases"] if c["kind"] == "network" and c["T"] == 4]
    assert [c["live bytes"]["float32"] for c in four] == [c["batch"] * four[0]["live bytes"]["float32"] for c in four]


@pytest.mark.parametrize("label", [label for label, (name, _) in NETWORKS.items() if name in TINY])
def test_the_tiny_networks(label):
    """Their rates are those of the others, and all contenders agree on them."""
    network = NetworkCases(label, CPU, compiled=False)
    with torch.no_grad():
        (case,) = network.cases(1, (4,), EFFORT, only="qcfs_fast")
    assert 0.15 < case["firing rate"] < 0.18
    assert {name for name, row in case["contenders"].items() if "error" not in row} == {*OURS, STREAM}
    apart = {name: share for name, share in case["check"].items() if "float64" in name}
    assert {name.removesuffix(", spikes apart from float64") for name in apart} == {
        "qcfs_fast 16-bit", "qcfs_fast 24-bit", "qcfs_fast offset 16-bit"
    }  # fmt: skip
    assert max(apart.values()) < 1e-2


def test_a_wrong_network_of_ours_is_found(tiny, monkeypatch):
    for name in ("qcfs_fast 24-bit", "qcfs_fast offset 16-bit"):
        other = copy.deepcopy(tiny.snns[name])
        next(m for n, m in other.layers.items() if "threshold" in dict(m.named_buffers())).threshold.mul_(2)
        monkeypatch.setitem(tiny.snns, name, other)
        with pytest.raises(AssertionError, match=f"{name} and float64"):
            tiny.check_ours(name)


def test_a_stream_is_timed_where_it_goes_on(tiny):
    """Each call takes up the one before, until max_T; its first answer is compared with that of one call."""
    images = torch.rand(2, 3, 12, 12)
    peers = contenders.Contenders(tiny.model, tiny.snns, images, compiled=False)
    whole = tiny.snns["qcfs_fast 16-bit"](images, T=8)
    answers = [peers.calls[STREAM](4) for _ in range(2)]
    assert torch.equal(answers[1], whole)
    assert not torch.equal(answers[0], whole)
    for _ in range(tiny.snns["qcfs_fast 16-bit"].max_T // 4 - 1):
        again = peers.calls[STREAM](4)
    assert torch.equal(again, answers[0])
    tiny.check(peers, images)
    first = next(m for m in peers.ours["qcfs_fast 16-bit"].layers.values() if "threshold" in dict(m.named_buffers()))
    first.threshold.mul_(2)
    with pytest.raises(AssertionError, match="stream 16-bit: differs from qcfs_fast 16-bit"):
        tiny.check(peers, images)


def test_batches():
    assert batches("resnet20 32") == (1, 8, 32, 128)
    assert batches("resnet18 224") == (1, 8, 32)


def test_percentiles_need_readings():
    assert percentiles([1.0]) == percentiles([1.0, 2.0]) == {}
    assert percentiles([float(i) for i in range(11)]) == {"p90": 9.0}
    found = percentiles([float(i) for i in range(101)])
    assert (found["p90"], round(found["p99"], 9)) == (90.0, 99.0)


def test_the_share_outside_of_the_native_call(tiny):
    snn, x = copy.deepcopy(tiny.snns["qcfs_fast 16-bit"]), torch.rand(64, 3, 12, 12)
    whole = share_outside(snn, lambda: snn(x), 3)
    assert 0 < whole < 1
    assert share_outside(snn, lambda: (time.sleep(1), snn(x)), 3) > 0.5  # a call takes milliseconds
    assert type(snn._executor._native._network).__name__ == "Network"  # no clock is left
    assert share_outside(snn, lambda: qcfs_fast.trace(snn, x), 3) is None  # operators run


def test_each_case_on_so_many_threads(tmp_path, monkeypatch, capsys):
    from qcfs_fast.study.benchmark import cases
    from qcfs_fast.study.command_line import main

    usual, found = torch.get_num_threads(), []
    plain = cases.interleaved
    monkeypatch.setattr(cases, "interleaved", lambda *a: found.append(torch.get_num_threads()) or plain(*a))
    results = tmp_path / "results.json"
    few = ["--rounds", "3", "--seconds", "0.01", "--no-compile", "--only", "qcfs_fast", "--output", str(results)]
    what = ["bench", "--networks", "demo 8", "--batches", "1", "--steps", "4"]
    assert main([*what, "--threads", "1", "2", "3", *few]) == 0
    assert "demo 8, batch 1, T=4, 3 threads, firing rate" in capsys.readouterr().err
    assert found == [1, 2, 3]
    assert torch.get_num_threads() == usual
    assert main([*what, *few]) == 0  # the machine's threads: replaces that case, or adds it
    measured = [c.get("threads", usual) for c in read(results)["cases"]]
    assert sorted(measured) == sorted({1, 2, 3, usual})
    assert main(["compare", str(results)]) == 0
    shown = capsys.readouterr().out
    assert "3 threads" in shown
    assert re.search(r"outside the native call, 16-bit\W+[\d.]+%", shown)


def test_live_bytes_by_hand():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3, padding=1), qcfs_fast.QCFS(4, 1.0), torch.nn.Conv2d(4, 8, 1), qcfs_fast.QCFS(4, 1.0),
        torch.nn.Conv2d(8, 2, 1), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
    ).eval()  # fmt: skip
    for m in (model[1], model[3]):
        m.thresh.data.fill_(0.5)
    snn = qcfs_fast.convert(model, T=4)
    pixels = 2 * 5 * 5
    found = live_bytes(snn, torch.rand(2, 1, 5, 5), 4)
    assert found == {"qcfs_fast": (4 + 8) * pixels, "float32": 4 * 4 * (4 + 8) * pixels}
    assert spiking_macs(snn, torch.rand(2, 1, 5, 5), 4) == {"macs": 4 * pixels * 4 * 8}


def test_results_are_replaced_and_kept_apart(results, tiny):
    before = read(results)
    (case,) = tiny.cases(1, (4,), EFFORT, only="qcfs_fast")
    Results(results, CPU).add({**case, "firing rate": 0.123})
    after = read(results)
    assert len(after["cases"]) == len(before["cases"])
    assert sum(c["firing rate"] == 0.123 for c in after["cases"]) == 1
    results.write_text(json.dumps(before))
    other = results.with_name("other.json")
    other.write_text(json.dumps({**before, "machine": {**before["machine"], "threads": 77}}))
    with pytest.raises(ValueError, match=r"other conditions \(threads differ\)"):
        Results(other, CPU)
    for text, message in (
        ("{", "is no result file of qcfs-fast bench; remove"),
        ("{}", "is no result file"),
        ('{"format": "qcfs_fast benchmark"}', "version"),
        ('{"format": "qcfs_fast benchmark", "version": 1}', "is no result file"),
        (json.dumps({**before, "machine": []}), "is no result file"),
        (json.dumps({**before, "cases": [1]}), "is no result file"),
        (json.dumps({**before, "cases": [{**before["cases"][0], "kind": None}, *before["cases"]]}), "is no result"),
    ):
        other.write_text(text)
        with pytest.raises(ValueError, match=message):
            read(other)


def test_results_go_to_a_folder_that_exists(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*none does not exist; create it first"):
        Results(tmp_path / "none" / "r.json", CPU)


def test_slow_and_failing_contenders_are_listed():
    def broken():
        raise RuntimeError("no such device")

    rows = interleaved({"slow": lambda: None, "broken": broken, "good": lambda: None}, EFFORT, CPU, {"slow": 99})
    assert "about 99 s" in rows["slow"]["error"]
    assert rows["broken"]["error"] == "RuntimeError: no such device"
    assert rows["good"]["rounds"] == 4


def test_a_short_call_is_repeated_unread():
    calls = {"short": 0, "long": 0}

    def call(name, seconds):
        calls[name] += 1
        time.sleep(seconds)

    effort = Effort(rounds=3, seconds=math.inf, lead=0.02)
    contenders = {"short": lambda: call("short", 0.004), "long": lambda: call("long", 0.03)}
    found, errors = take_turns(contenders, effort, Clock(CPU))
    assert not errors
    assert [len(found[n]) for n in calls] == [3, 3]
    assert calls["long"] == 3 + 3
    assert 3 + 3 < calls["short"] <= 3 + 3 * (5 + 1)
    assert effort.calls_of(1e-9) == (50, 1)


def test_a_reading_waits_for_calls_that_went_unread(monkeypatch):
    """On a GPU calls only queue work: here one millisecond each, done when somebody waits."""
    now, done = [0.0], [0.0]

    def call():
        done[0] = max(now[0], done[0]) + 1e-3
        now[0] += 1e-5

    def wait(device):
        now[0] = max(now[0], done[0])

    monkeypatch.setattr(measure, "synchronize", wait)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    found, _ = take_turns({"a": call}, Effort(rounds=3, seconds=math.inf, lead=0.02), Clock(CPU))
    assert found["a"] == pytest.approx([1e-3] * 3)


def test_compare(results, tmp_path, capsys):
    from qcfs_fast.study.command_line import main

    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{comparison.MARK[0]}\nthe last table\n{comparison.MARK[1]}\nbelow\n")
    for _ in range(2):  # the second time over its own output
        assert main(["compare", str(results), "--plots", str(tmp_path / "plots"), "--readme", str(readme)]) == 0
    out = capsys.readouterr().out
    data = read(results)
    case = next(c for c in data["cases"] if c["kind"] == "network" and c["T"] == 4)
    shown = comparison._milliseconds(case["contenders"]["T-loop fp32"]["seconds"])
    text = readme.read_text()
    assert shown in out
    assert comparison._milliseconds(comparison.fastest(case, "T-loop.*")) in text
    for place in (out, text):
        assert data["machine"]["device"] in place
        assert f"{case['firing rate']:.1%}" in place
    assert text.startswith("above\n")
    assert text.endswith("\nbelow\n")
    assert "the last table" not in text
    rows = [line for line in text.splitlines() if line.startswith("| " + comparison.title(case).split(" px")[0])]
    assert [row.count("|") for row in rows] == [len(comparison.README_COLUMNS) + 2] * 2  # two batches
    names = {p.stem for p in (tmp_path / "plots").iterdir()}
    assert names == {"latency-by-T", "latency-by-batch", "latency-by-network", "memory-by-T"}
    assert all(p.stat().st_size > 5000 for p in (tmp_path / "plots").iterdir())
    readme.write_text("no marks")
    assert main(["compare", str(results), "--readme", str(readme)]) == 1
    assert "needs the lines" in capsys.readouterr().err


def test_compare_of_altered_results(results, tmp_path, capsys):
    """One line that names the file, also where a table or a plot alone misses something; texts are shown as text."""
    from qcfs_fast.study.command_line import main

    whole, path = json.loads(results.read_text()), tmp_path / "results.json"
    altered = []
    for part in ("peak", "machine"):
        for key in whole[part]:
            altered += [{**whole, part: {k: v for k, v in whole[part].items() if k != key}}]
            altered += [{**whole, part: {**whole[part], key: value}} for value in (None, [], {}, 0)]
    for i, case in enumerate(whole["cases"]):
        for key in case:
            for changed in ({k: v for k, v in case.items() if k != key}, *({**case, key: v} for v in (None, [], 0))):
                altered.append({**whole, "cases": [*whole["cases"][:i], changed, *whole["cases"][i + 1 :]]})
    refused = 0
    for data in altered:
        path.write_text(json.dumps(data))
        code, err = main(["compare", str(path)]), capsys.readouterr().err
        assert code == 0 or err == f"qcfs-fast: error: {path}: is no {KIND}; remove the file to start anew, or name " \
            "another place\n"  # fmt: skip
        refused += code
    assert refused > len(altered) // 4
    case = whole["cases"][0]
    name = "\x1b]0;owned\x07[/][bold]"
    case["contenders"] |= {name: next(iter(case["contenders"].values())), f"{name} 2": {"error": name}}
    path.write_text(json.dumps(whole))
    assert main(["compare", str(path)]) == 0
    out = capsys.readouterr().out
    assert r"\x1b]0;owned\x07[/][bold]" in out
    assert "\x1b" not in out


def test_compare_shows_percentiles(results, tmp_path, capsys):
    from qcfs_fast.study.command_line import main

    data = read(results)
    (case,) = [c for c in data["cases"] if c["kind"] == "network" and (c["batch"], c["T"]) == (1, 4)]
    for row in case["contenders"].values():
        row.pop("p90", None), row.pop("p99", None)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(data))
    assert main(["compare", str(path)]) == 0
    assert "p99" not in capsys.readouterr().out  # too few readings
    case["contenders"]["qcfs_fast 16-bit"] |= {"seconds": 0.00125, "p90": 0.0032, "p99": 0.0456}
    path.write_text(json.dumps(data))
    assert main(["compare", str(path)]) == 0
    table = capsys.readouterr().out.partition("batch 1, T = 4: milliseconds, median / p90 / p99")[2]
    assert "1.25 / 3.20 / 45.6" in table
    loop = comparison._milliseconds(case["contenders"]["T-loop fp32"]["seconds"])
    assert re.search(rf"T-loop fp32 +\S +{loop} ", table)  # the median alone
