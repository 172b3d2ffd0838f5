"""The main job: a network trained on real scans keeps its labels at every T."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import qcfs_fast
from qcfs_fast.study import demo


@pytest.fixture(scope="module")
def trained():
    data = demo.digits()
    return data, demo.train(data, progress=False)


@pytest.mark.slow
def test_trained_network_agrees_with_float64_at_every_T(trained):
    data, model = trained
    snn = qcfs_fast.convert(model, T=4)
    ours = snn(data.test_x, T=32, per_step=True)
    meaning = qcfs_fast.simulate(model, data.test_x, 32)
    for T in demo.STEPS:
        a, b = ours[T - 1].argmax(1), meaning[T - 1].argmax(1)
        assert (a == b).float().mean() >= 0.995
        accuracy = [float((v == data.test_y).float().mean()) for v in (a, b)]
        assert abs(accuracy[0] - accuracy[1]) <= 0.003


@pytest.mark.slow
def test_accuracy_reaches_the_ann(trained):
    data, model = trained
    snn = qcfs_fast.convert(model, T=4)
    with torch.no_grad():
        ann = float((model(data.test_x).argmax(1) == data.test_y).float().mean())
    accuracy = {T: float((snn(data.test_x, T=T).argmax(1) == data.test_y).float().mean()) for T in (1, 4, 16)}
    assert ann > 0.97
    assert accuracy[1] > 0.8
    assert accuracy[4] > ann - 0.02
    assert accuracy[16] > ann - 0.01


@pytest.mark.slow
def test_anytime_use_keeps_the_accuracy_in_fewer_steps(trained):
    data, model = trained
    snn = qcfs_fast.convert(model, T=16)
    p = demo.report(snn, data, progress=False)
    full = p.accuracy_by_step[-1]
    points = {q["confidence"]: q for q in p.anytime}
    assert points[0.99]["mean_steps"] < 4
    assert points[0.99]["accuracy"] > full - 0.005
    assert points[0.5]["mean_steps"] <= points[0.9]["mean_steps"] < points[0.99]["mean_steps"]
    for confidence in (0.5, 0.9, 0.99):
        found = snn.predict(data.test_x, confidence)
        assert float(found.steps.double().mean()) == points[confidence]["mean_steps"]
        assert float((found.labels == data.test_y).double().mean()) == points[confidence]["accuracy"]
    text = demo._anytime(p)
    assert f"{points[0.9]['mean_steps']:.2f} steps on average, accuracy {points[0.9]['accuracy']:.2%}" in text
    assert text.endswith(f"accuracy {full:.2%}")


@pytest.mark.slow
def test_eight_bits_keep_the_labels(trained):
    data, model = trained
    labels = [qcfs_fast.convert(model, T=8, weight_bits=b)(data.test_x).argmax(1) for b in (8, 16)]
    assert (labels[0] == labels[1]).float().mean() > 0.99


def differing(model, snn, x, T):
    """The share of spikes that differ from float64 on the same input of each layer."""
    spikes = qcfs_fast.trace(snn, x, T)
    forced = qcfs_fast.simulate(model, x, T, spikes=True, force=spikes)
    return sum(int((spikes[k] != v).sum()) for k, v in forced.spikes.items()) / sum(v.numel() for v in spikes.values())


@pytest.mark.slow
def test_bytes_rounded_by_data_follow_float64_more_closely(trained):
    """Spikes and outputs; labels change on some images of a thousand either way."""
    data, model = trained
    x, steps = data.test_x, (1, 2, 4)
    meaning = qcfs_fast.simulate(model, x, 4)
    labels, outputs, spikes = [], [], []
    for options in ({}, {"data": data.train_x[:300].split(100), "progress": False}):
        snn = qcfs_fast.convert(model, T=4, weight_bits=8, **options)
        out = snn(x, per_step=True)
        labels.append(
            np.mean([float((out[T - 1].argmax(1) == meaning[T - 1].argmax(1)).double().mean()) for T in steps])
        )
        outputs.append(np.mean([float((out[T - 1] - meaning[T - 1]).norm()) for T in steps]))
        spikes.append(np.mean([differing(model, snn, x, T) for T in steps]))
    assert labels[1] >= labels[0] - 0.004
    assert outputs[1] < outputs[0]
    assert spikes[1] < 0.75 * spikes[0]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run of the command: its folder, its rows, what it printed."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    data = demo.digits()
    fewer = dataclasses.replace(data, test_x=data.test_x[:200], test_y=data.test_y[:200])  # all: the tests above
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(demo, "digits", lambda: fewer)
        rows = demo.demo(folder, epochs=2, progress=False, as_json=True)
    return folder, rows, out.getvalue()


@pytest.mark.slow
def test_command(ran):
    folder, rows, text = ran
    printed = json.loads(text)
    assert [r["T"] for r in printed] == list(demo.STEPS)
    assert [r.accuracy for r in rows] == [r["accuracy"] for r in printed]
    assert all(r["snn_time"] > 0 and 0 < r["firing_rate"] < 1 for r in printed)
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "accuracy after 16 steps" in (folder / "report.html").read_text()
    snn = qcfs_fast.load(folder / "digits.safetensors")
    assert snn(demo.digits().test_x[:5]).shape == (5, 10)


@pytest.mark.slow
def test_what_it_prints_fits_80_columns(ran, tmp_path, monkeypatch, capsys):
    """Of a network trained anew; the rows, which take most of the time, are those of the run above."""
    monkeypatch.setattr(demo, "evaluate", lambda *_, **__: ran[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    demo.demo(Path("demo-output"), epochs=1, progress=False)
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if len(line) > 80] == []
    assert "..." not in printed
    assert "\u2026" not in printed
    assert (tmp_path / "demo-output" / "fashion.png").exists()


def test_table(capsys):
    from rich.console import Console

    row = demo.Row(4, 0.99, 0.993, 0.998, 1e-5, 0.18, 4e-5, 3e-5, 1e-4)
    Console(width=120).print(demo._table([row]))
    text = capsys.readouterr().out
    for cell in ("99.00%", "99.30%", "99.80%", "1e-05", "18.0%", "40.0", "30.0", "100.0", "2.5"):
        assert cell in text
