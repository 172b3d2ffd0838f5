"""A model that does not convert is told all that stands in the way, each reason once with its places."""

import json
import re

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
    places = [f"mul in blocks.{i} (test_obstacles.py, line 25)" for i in range(3)]
    assert gate.startswith(f"  {', '.join(places)} (and 2 more): multiplies two activations")
    assert conv.startswith("  d: pads with something else than zeros")
    assert all("Remedy" in line or "cannot be converted" in line for line in lines[1:])
    assert [len(places) for _, places in caught.value.obstacles] == [5, 5, 1]
    with pytest.raises(ConversionError, match=r"^11 obstacles"):
        qcfs_fast.prepare(model)


def test_one_obstacle_is_one_line():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.raises(ConversionError, match=r"^1: SiLU has no spiking counterpart.*Remedy"):
        qcfs_fast.prepare(model)


class Vectors(nn.Module):
    """A linear layer, ReLU, and `wiring` of what follows."""

    def __init__(self, wiring, first=None):
        super().__init__()
        self.first, self.wiring, self.second = first or nn.Linear(12, 8), wiring, nn.Conv2d(2, 3, 1)
        self.map, self.unflat, self.up = (
            nn.Conv2d(1, 8, 1),
            nn.Unflatten(1, (2, 2, 2)),
            nn.ConvTranspose2d(8, 2, (2, 2)),
        )

    def forward(self, x):
        return self.wiring(self, torch.relu(self.first(x)))


class Unnamed(Vectors):
    def forward(self, *args):
        return super().forward(args[0])


class Unread(Vectors):
    def forward(self, x, *args, **options):
        return super().forward(x)


def refused(model, shape=(12,)):
    with pytest.raises(ConversionError) as caught:
        qcfs_fast.convert(qcfs_fast.prepare(model.eval(), check=False), input_shape=shape)
    return str(caught.value)


def test_what_makes_a_map_of_a_vector_is_told_the_way():
    for wiring in (lambda n, y: n.second(y.view(-1, 2, 2, 2)), lambda n, y: n.second(n.unflat(y))):
        assert "makes a map of a vector's features" in refused(Vectors(wiring))
    qcfs_fast.prepare(Vectors(lambda n, y: n.second(n.up(y)), nn.Conv2d(3, 8, 1)))  # the remedy
    flat = refused(Vectors(lambda n, y: y, nn.Sequential(nn.Unflatten(1, (1, 4, 3)), nn.Conv2d(1, 8, 1))))
    assert "makes a map [N, 1, 4, 3] of an image that is a vector. Remedy" in flat


def test_features_of_a_flattened_map_are_not_taken_apart():
    model = Vectors(lambda n, y: y.flatten(1)[:, :4], nn.Conv2d(3, 8, 1))
    assert "takes some features of a flattened map or image" in refused(model, (3, 4, 4))
    both = Vectors(lambda n, y: torch.cat([n.up(y).flatten(1), n.up(y).flatten(1)], 1), nn.Conv2d(3, 8, 1))
    assert "concatenates flattened maps with no activation in between" in refused(both, (3, 4, 4))


def test_an_input_without_a_name():
    assert refused(Unnamed(lambda n, y: y)).startswith(
        "*args in the model's own forward: is what forward takes as *args"
    )
    prepared = qcfs_fast.prepare(Unread(lambda n, y: y).eval())
    assert qcfs_fast.convert(prepared, input_shape=(12,))(torch.rand(2, 12)).shape == (2, 8)


class Gated(nn.Module):
    """What a function could not make may be a constant: a product with it is no attention, and not judged."""

    def __init__(self, gate):
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1), gate

    def forward(self, x):
        return self.b(self.gate(torch.relu(self.a(x))))


def test_a_product_with_what_is_unknown_is_not_judged():
    for gate in (lambda y: y * (y > 0).float(), lambda y: torch.zeros_like(y) * y, lambda y: y / y.std()):
        with pytest.raises(ConversionError) as caught:
            qcfs_fast.prepare(Gated(gate))
        (line,) = str(caught.value).splitlines()
        assert "has no spiking counterpart. Supported" in line
    with pytest.raises(ConversionError, match="multiplies two activations"):
        qcfs_fast.prepare(Gated(lambda y: y * y))


def test_a_place_is_listed_once():
    with pytest.raises(
        ConversionError,
        match=r"^abs in the model's own forward \(test_obstacles\.py, line \d+\): has no spiking counterpart",
    ) as caught:
        qcfs_fast.prepare(Gated(lambda y: y.abs() + (2 * y).abs() + (3 * y).abs()))
    assert [len(places) for _, places in caught.value.obstacles] == [1]


@pytest.mark.slow
@pytest.mark.long
def test_the_zoo_is_tried_and_resumed(tmp_path, capsys, monkeypatch):
    page = tmp_path / "zoo.md"
    arguments = ["zoo", "--check", "--output", str(page), "squeezenet1_1", "efficientnet_b0", "convnext_tiny"]
    assert command_line.main(arguments) == 0
    text = page.read_text()
    assert "**1 of 3 convert as they are, 1 more on request.**" in text
    assert re.search(r"\| efficientnet_b0 \|.*\| SiLU, SqueezeExcitation \|", text)
    assert re.search(r"\| convnext_tiny \| .*LayerNorm has no spiking counterpart \(18\)", text)
    results = json.loads(page.with_suffix(".json").read_text())
    assert all(0 < results[name]["share"] < 1e-4 for name in ("squeezenet1_1", "efficientnet_b0"))
    assert results["squeezenet1_1"]["neurons"] > 1e5
    assert "[2/3] efficientnet_b0" in capsys.readouterr().err

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
