"""A model that does not convert is told all that stands in the way, each reason once with its places."""

import json

import pytest
import torch
import torchvision_models  # noqa: F401 - makes torchvision importable here
from torch import nn

import qcfs_fast
from qcfs_fast import ConversionError
from qcfs_fast.study import command_line, zoo, zoo_table


class Block(nn.Module):
    """Squeeze-and-excitation, a SiLU, and a ReLU at which judging starts again."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate, self.act = (nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.SiLU())

    def forward(self, x):
        y = self.b(self.act(self.a(x)))
        return torch.relu(x + y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3), nn.ModuleList(Block() for _ in range(5))
        self.c, self.d, self.head = nn.Conv2d(6, 6, 3), nn.ConstantPad2d(1, 0.5), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.head(torch.relu(self.d(self.c(x))))


@pytest.mark.parametrize("known", [False, True])
def test_all_obstacles_are_listed(known):
    model = Several().eval()
    prepared = qcfs_fast.prepare(model, check=False)
    if known:
        prepared(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConversionError) as caught:
        qcfs_fast.convert(prepared)
    lines = str(caught.value).splitlines()
    assert lines[0] == "11 obstacles"
    silu, gate, conv = lines[1:]
    assert silu.startswith("  blocks.0.act, blocks.1.act, blocks.2.act (and 2 more): SiLU has no spiking counterpart")
    assert gate.startswith(
        "  mul in blocks.0, mul in blocks.1, mul in blocks.2 (and 2 more): multiplies two activations"
    )
    assert conv.startswith("  d: pads with something else than zeros")
    assert all("Remedy" in line or "cannot be converted" in line for line in lines[1:])
    assert [len(places) for _, places in caught.value.obstacles] == [5, 5, 1]
    with pytest.raises(ConversionError, match=r"^11 obstacles"):
        qcfs_fast.prepare(model)


def test_one_obstacle_is_one_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ConversionError, match=r"^1: SiLU has no spiking counterpart.*Remedy"):
        qcfs_fast.prepare(model)


@pytest.mark.slow
@pytest.mark.long
def test_the_zoo_is_tried_and_resumed(tmp_path, capsys, monkeypatch):
    page = tmp_path / "zoo.md"
    arguments = ["zoo", "--check", "--output", str(page), "squeezenet1_1", "efficientnet_b0"]
    assert command_line.main(arguments) == 0
    text = page.read_text()
    assert "**1 of 2 convert.**" in text
    assert "| efficientnet_b0 | SiLU has no spiking counterpart (49); multiplies two activations" in text
    results = json.loads(page.with_suffix(".json").read_text())
    assert 0 < results["squeezenet1_1"]["share"] < 1e-4
    assert results["squeezenet1_1"]["neurons"] > 1e5
    assert "[2/2] efficientnet_b0" in capsys.readouterr().err

    monkeypatch.setattr(zoo_table, "tried_apart", lambda name: pytest.fail(f"{name} was tried before"))
    assert command_line.main(arguments) == 0
    assert page.read_text() == text
    assert command_line.main(["zoo", "--check", "nosuchnet"]) == 1
    assert "no classifier 'nosuchnet'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{broken", '{"a": 3}', "[1]", '{"a": {"obstacles": 7}}'])
def test_results_of_the_zoo_that_are_none(text, tmp_path, capsys):
    (tmp_path / "zoo.json").write_text(text)
    assert command_line.main(["zoo", "--check", "--output", str(tmp_path / "zoo.md"), "squeezenet1_1"]) == 1
    assert capsys.readouterr().err.startswith(
        f"qcfs-fast: error: {tmp_path / 'zoo.json'}: is no result of zoo --check; remove the file to start anew"
    )


def test_the_zoo_lists_names(capsys):
    assert command_line.main(["zoo"]) == 0
    assert capsys.readouterr().out.split() == zoo.classifiers()
    assert {"resnet18", "shufflenet_v2_x1_0", "densenet121"} <= set(zoo.classifiers())
