"""qcfs_fast: exact and fast spiking inference for networks converted from QCFS-trained ANNs.

model = qcfs_fast.prepare(torchvision.models.resnet18(), levels=4)   # ReLU -> QCFS, MaxPool -> AvgPool
...                                                                  # train it as any network
snn = qcfs_fast.convert(model, T=4)
logits = snn(images)
"""

from .calibration import calibrate
from .conversion import convert
from .cuda_backend import CudaGraph, cuda_graph
from .errors import ConversionError, FormatError
from .information import info
from .preparation import prepare
from .profiling import Profile, profile
from .qcfs import QCFS
from .recording import trace
from .serialize import load
from .simulation import Simulation, simulate
from .snn import SNN
from .version import __version__

__all__ = [
    "QCFS",
    "SNN",
    "ConversionError",
    "CudaGraph",
    "FormatError",
    "Profile",
    "Simulation",
    "__version__",
    "calibrate",
    "convert",
    "cuda_graph",
    "info",
    "load",
    "prepare",
    "profile",
    "simulate",
    "trace",
]
