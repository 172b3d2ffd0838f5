"""python -m fuzz.corpus FOLDER, in tests/: small saved networks of every kind of node, for tests/native/hostile_files.

They have no checksum, which would refuse each altered byte before anything else looks at it.
"""

import json
import sys
from pathlib import Path

import networks
import torch
from safetensors.torch import load, save
from torch import nn

import qcfs_fast


class Every(nn.Module):
    """Image beside spikes, a pool, a concatenation, a residual, groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, groups=2)
        self.c, self.d = nn.Conv2d(1, 2, 1), nn.Conv2d(4, 2, (1, 2), (1, 2))
        self.pool, self.out = nn.AvgPool2d(2, 1, 1), nn.Linear(2, 2)

    def forward(self, x):
        y = torch.relu(self.a(x))
        z = torch.relu(self.b(self.pool(y)[..., 1:, 1:]) + y + self.c(x))
        return self.out(torch.relu(self.d(torch.cat([y, z], 1))).mean((2, 3)))


SHAPES = {
    Every: (1, 4, 4),
    lambda: nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)): (3,),
    lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 2, 1), nn.ReLU()): (1, 6, 5),
}


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, (build, shape) in enumerate(SHAPES.items()):
        for bits, neuron in ((16, "plain"), (8, "offset"), (24, "signed"), (8, "sum"), (16, "masked")):
            model = networks.lively(networks.randomize(build(), seed=i), shape)
            snn = qcfs_fast.convert(model, T=2, weight_bits=bits, neuron=neuron, input_shape=shape, progress=False)
            if bits == 16:
                snn.input_shape = shape
            snn.save(folder / "net")
            data = (folder / "net").read_bytes()
            header = json.loads(
                json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["qcfs_fast"]
            )
            del header["crc32"]
            text = json.dumps(header, separators=(",", ":"))
            (folder / f"{i}-{neuron}").write_bytes(save(load(data), {"qcfs_fast": text}))
            (folder / "net").unlink()


if __name__ == "__main__":
    main()
