"""qcfs-fast inspect: the facts of a file, without a run; damage is an error as of load."""

import json

import networks
import pytest

import qcfs_fast
from qcfs_fast.network.layers import Layer
from qcfs_fast.study import command_line


@pytest.fixture
def saved(tmp_path):
    snn, _ = networks.converted(networks.Small, T=5, weight_bits=8, neuron="offset")
    snn.save(tmp_path / "net.safetensors")
    return snn, tmp_path / "net.safetensors"


def test_facts(saved, capsys):
    snn, path = saved
    assert command_line.main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == path.stat().st_size
    assert (facts["written by"], facts["format"]) == (qcfs_fast.__version__, 2)
    assert (facts["T"], facts["max_T"], facts["weight_bits"]) == (5, snn.max_T, 8)
    assert facts["neuron"] == str(snn.neuron)
    assert [n["name"] for n in facts["nodes"]] == list(snn.layers)
    stored = sum(b.numel() * b.element_size() for b in snn.buffers())
    assert sum(n["bytes"] for n in facts["nodes"]) == stored
    assert facts["layers"]["stem.2"]["theta"] == snn.details["stem.2"]["theta"]


def test_text(saved, capsys):
    snn, path = saved
    assert command_line.main(["inspect", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{path}: ")
    assert "8-bit weights; neurons: offset" in lines[1]
    assert [line.split()[0] for line in lines[4:]] == list(snn.layers)


def test_nothing_is_run(saved, monkeypatch, capsys):
    def on_shapes_alone(forward):  # which loading does, to know that the network can run
        def run(layer, values, how):
            assert values["<image>"].is_meta, "a node was run"
            return forward(layer, values, how)

        return run

    for kind in Layer.__subclasses__():
        monkeypatch.setattr(kind, "forward", on_shapes_alone(kind.forward))
    assert command_line.main(["inspect", str(saved[1])]) == 0
    assert "SpikingLayer" in capsys.readouterr().out


def test_long_metadata_is_cut(saved, capsys):
    snn, path = saved
    names = [f"class {i}" for i in range(1000)]
    snn.save(path, metadata={"classes": names})
    assert command_line.main(["inspect", str(path)]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("classes: "))
    assert line.endswith(" ... (whole with --json)")
    assert len(line) < 500
    assert command_line.main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {"classes": names}


def test_metadata(saved, capsys):
    snn, path = saved
    snn.save(path, metadata={"dataset": "digits", "accuracy": 0.9})
    assert command_line.main(["inspect", str(path)]) == 0
    assert 'dataset: "digits"\naccuracy: 0.9\n' in capsys.readouterr().out
    assert command_line.main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {"dataset": "digits", "accuracy": 0.9}


def test_a_damaged_file(saved, capsys):
    path = saved[1]
    path.write_bytes(path.read_bytes()[:-100])
    assert command_line.main(["inspect", str(path)]) == 1
    assert "not a complete safetensors file" in capsys.readouterr().err
    assert command_line.main(["inspect", str(path) + ".none"]) == 1
    assert "no file" in capsys.readouterr().err
