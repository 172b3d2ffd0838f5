"""python -m fuzz.corpus FOLDER, in tests/: small saved networks of every kind of node, for tests/native/hostile_files.

tests/native/corpus is what it writes; those of NEWER came later, and the others there are of the format of their time.

They have no checksum, which would refuse each altered byte before anything else looks at it.
"""

import json
import sys
from pathlib import Path

import networks
import torch
from safetensors.torch import save
from torch import nn

import qcfs_fast
from qcfs_fast.network import saving


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


# Lines, and what came with later formats: pools that spread pixels, borders that are no zeros, images that move.
NEWER = {
    "line": (
        lambda: nn.Sequential(nn.Conv1d(2, 3, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(9, 2)),
        (2, 8),
    ),
    "spread": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Upsample(scale_factor=2), nn.Conv2d(2, 2, 1), nn.ReLU(),
            nn.Conv2d(2, 2, 1),
        ),
        (1, 5, 4),
    ),
    "border": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 1), nn.ReLU(), nn.ReflectionPad2d(1), nn.Conv2d(2, 2, 3), nn.ReLU(), nn.CircularPad2d(1),
            nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1),
        ),
        (1, 5, 4),
    ),
    "moves": (
        lambda: nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1)),
        (1, 5, 4),
    ),
}  # fmt: skip


def converted(build, shape, seed=0, **options):
    model = networks.lively(networks.randomize(build(), seed=seed), shape)
    return qcfs_fast.convert(model, T=2, input_shape=shape, progress=False, **options)


def write(snn, path):
    """The network's file, without its checksum."""
    snn.save(path)
    text, tensors = saving.read(path)
    header = json.loads(text)
    del header["crc32"]
    path.write_bytes(save(tensors, {saving.FORMAT: json.dumps(header, separators=(",", ":"))}))


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for i, (build, shape) in enumerate(SHAPES.items()):
        for bits, neuron in ((16, "plain"), (8, "offset"), (24, "signed"), (8, "sum"), (16, "masked")):
            snn = converted(build, shape, i, weight_bits=bits, neuron=neuron)
            if bits == 16:
                snn.input_shape = shape
            write(snn, folder / f"{i}-{neuron}")
    for name, (build, shape) in NEWER.items():
        snn = converted(build, shape)
        snn.input_shape = shape
        write(snn, folder / name)


if __name__ == "__main__":
    main()
