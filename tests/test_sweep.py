"""study: its counts are those of plain calls, it goes on where it was, and its table, plots and page say the same."""

import copy
import json
import re
from pathlib import Path

import networks
import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast import Neuron
from qcfs_fast.study import sweep_page
from qcfs_fast.study.data import Arrays
from qcfs_fast.study.sweep import Plan, Study, interval
from qcfs_fast.study.trained import Trained

PLAN = Plan(
    steps=(1, 2, 4),
    neurons=(Neuron(), Neuron("offset", 2), Neuron("sum")),
    bits=(16, 8),
    rounding=8,
    firing=6,
    latency=(),
)


@pytest.fixture(scope="module")
def subject():
    """A lively network, and images with labels that it gets right about half of the time."""
    shape = networks.SHAPES[networks.Small]
    model = networks.lively(networks.randomize(networks.Small()), shape).eval()
    x = networks.images(shape, 30)
    labels = model(x).argmax(1)
    labels[::2] = (labels[::2] + 1) % model(x).shape[1]
    tests = Arrays(Path("tests"), x.numpy(), labels.numpy())
    about = Trained("cifar-resnet20", "some images", int(model(x).shape[1]), (*shape,), 4)
    return model, about, tests


def study(subject, output, plan=PLAN):
    model, about, tests = subject
    return Study(model, about, tests, tests, plan, output, batch=7, progress=False)


@pytest.fixture(scope="module")
def results(subject, tmp_path_factory):
    return study(subject, tmp_path_factory.mktemp("study")).run()


def test_counts_are_those_of_plain_calls(subject, results):
    model, _, tests = subject
    x, labels = tests.batch(range(30))
    ann = model(x).argmax(1)
    assert results["ann"]["fp32"] == {"right": int((ann == labels).sum()), "agree": 30}
    assert set(results["cells"]) == {f"{n}, {b} bits" for n in ("plain", "offset (window 2)", "sum") for b in (16, 8)}
    for neuron in PLAN.neurons:
        cell = results["cells"][f"{neuron}, 16 bits"]
        for i, T in enumerate(PLAN.steps):
            snn = qcfs_fast.convert(model, T=4, max_T=4, neuron=neuron)
            answer = snn(x, T=T).argmax(1)
            assert cell["right"][i] == int((answer == labels).sum()), (neuron, T)
            assert cell["agree"][i] == int((answer == ann).sum())
            totals = qcfs_fast.profile(snn, [x[:6]], T, progress=False).totals
            assert cell["rate"][i] == totals["rate"]
            assert cell["accumulates"][i] == totals["accumulates_per_image"]
    assert results["cells"]["sum, 16 bits"]["agree"][2] == 30  # L = 4: the ANN itself


def test_it_goes_on_where_it_was(subject, results, tmp_path, monkeypatch):
    done = []
    cell = Study._cell

    def interrupted(self, neuron, bits, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append((str(neuron), bits))
        return cell(self, neuron, bits, *rest)

    monkeypatch.setattr(Study, "_cell", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study(subject, tmp_path).run()
    monkeypatch.setattr(Study, "_cell", lambda self, n, b, *rest: done.append((str(n), b)) or cell(self, n, b, *rest))
    assert study(subject, tmp_path).run() == results
    assert len(done) == len(set(done)) == 6
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))


def test_another_study_is_refused(subject, tmp_path):
    study(subject, tmp_path, Plan(steps=(1,), latency=())).run()
    with pytest.raises(ValueError, match="another steps; give another folder"):
        study(subject, tmp_path, Plan(steps=(2,), latency=()))
    other = copy.deepcopy(subject[0])
    next(other.parameters()).data.mul_(1.01)
    with pytest.raises(ValueError, match="another weights"):
        study((other, *subject[1:]), tmp_path, Plan(steps=(1,), latency=()))
    whole = json.loads((tmp_path / "results.json").read_text())
    for text in ("{", *(json.dumps({**whole, part: v}) for part in ("cells", "latency") for v in ([], None, {"x": 1}))):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match="is no result of a study"):
            study(subject, tmp_path, Plan(steps=(1,), latency=()))


def test_what_it_cannot_study(subject, tmp_path):
    model, about, tests = subject
    with pytest.raises(ValueError, match="rounding to 8 bits needs training images"):
        Study(model, about, tests, None, PLAN, tmp_path)
    over_time = Arrays(Path("t"), np.zeros((2, 3, 1, 4, 4), np.uint8), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="do not change with time"):
        Study(model, about, over_time, None, PLAN, tmp_path)


def test_a_mode_that_does_not_convert_is_a_result(subject, tmp_path, monkeypatch):
    def refuse(self, neuron, bits):
        raise qcfs_fast.ConversionError("layer x: overflow is possible from T=3 on")

    monkeypatch.setattr(Study, "_converted", refuse)
    found = study(subject, tmp_path, Plan(steps=(1, 4), latency=())).run()
    assert "overflow is possible" in sweep_page.text(found)


@pytest.mark.parametrize(
    ("right", "images", "low", "high"),
    # by hand from the formula with z = 1.96: (p + z2/2n -+ z sqrt(p(1-p)/n + z2/4n2)) / (1 + z2/n)
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (9200, 10000, 0.9145, 0.9252), (10, 10, 0.7225, 1.0)],
)
def test_intervals(right, images, low, high):
    assert interval(right, images) == pytest.approx((low, high), abs=6e-5)


def timed(results):
    """The results with latencies, as a study with `latency` has them."""
    found = copy.deepcopy(results)
    seconds = {"ANN QCFS fp32": 0.002, "ANN QCFS fp32 compiled": 0.001, "ANN QCFS bf16": 0.5, "T-loop fp32, T = 1": 0.1}
    for name in found["cells"]:
        seconds |= {f"{name}, T = {T}": 0.0004 * T for T in (1, 2, 4)}
    machine = {"device": "a processor", "threads": 2, "kernels": "avx2"}
    found["latency"] = {"1": {"machine": machine, "seconds": seconds, "errors": {}}}
    return found


def test_table(results):
    text = sweep_page.text(timed(results))
    assert max(map(len, text.splitlines())) <= 80
    rows = [line.split() for line in text.splitlines() if re.match(r"^ *\d+ +(plain|offset|sum) ", line)]
    assert len(rows) == 18
    plain = results["cells"]["plain, 16 bits"]
    assert rows[2][:4] == ["4", "plain", "16", f"{plain['right'][2] / 30:.2%}"]
    assert rows[2][-1] == "1.60"  # 4 x 0.4 ms beside the fastest ANN, 1 ms
    assert "a processor" in text
    assert sweep_page.fastest_ann(timed(results)["latency"]["1"]["seconds"]) == 0.001


def test_plots_and_page(results, tmp_path):
    pytest.importorskip("matplotlib")
    assert [p.name for p in sweep_page.write_plots(results, tmp_path)] == ["accuracy.png"]
    written = sweep_page.write_plots(timed(results), tmp_path, (".png", ".svg"))
    assert [p.name for p in written] == ["accuracy.png", "accuracy.svg", "latency.png", "latency.svg"]
    found = timed(results)
    found["network"]["network"] = "<script>alert(1)</script>"
    sweep_page.write_page(found, tmp_path / "study.html")
    page = (tmp_path / "study.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert page.count("<tr>") >= 21
    assert page.count("<img") == 2


def test_timing_has_every_contender_and_is_done_again(subject, tmp_path):
    plan = Plan(steps=(1, 2), neurons=(Neuron("offset", 2),), firing=4, latency=(2,), compiled=False)
    found = study(subject, tmp_path, plan).run()["latency"]["2"]
    names = {f"{name}, T = {T}" for name in ("offset (window 2), 16 bits", "T-loop fp32") for T in (1, 2)}
    names |= {"ANN QCFS fp32"}
    assert names <= set(found["seconds"])
    assert all(s > 0 for s in found["seconds"].values())
    assert found["machine"]["threads"] == torch.get_num_threads()
    kept = study(subject, tmp_path, plan)
    kept.results["latency"]["2"]["seconds"] = {}
    assert kept.run()["latency"]["2"]["seconds"] == {}
    again = study(subject, tmp_path, plan)
    again.forget_latency()
    assert names <= set(again.run()["latency"]["2"]["seconds"])
