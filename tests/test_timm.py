"""timm's networks by name, where timm is installed."""

import pytest
import torch

import qcfs_fast
from qcfs_fast.study import zoo
from qcfs_fast.study.command_line import main

zoo.torchvision_models()  # timm imports torchvision, which needs this beside a torch of another build
pytest.importorskip("timm")


def test_a_network_of_timm_is_converted_by_its_name(tmp_path, capsys):
    saved = tmp_path / "net.safetensors"
    command = ["convert", "timm:resnet10t", "--classes", "7", "--calibrate", "random", "--size", "32"]
    assert main([*command, "--output", str(saved), "--quiet"]) == 0
    assert qcfs_fast.load(saved)(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_a_name_that_timm_does_not_know():
    with pytest.raises(ValueError, match="timm cannot make no_such_net"):
        zoo.torchvision_network("timm:no_such_net")
