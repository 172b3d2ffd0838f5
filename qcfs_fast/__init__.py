"""qcfs_fast: exact and fast spiking inference for networks converted from QCFS-trained ANNs.

model = qcfs_fast.prepare(torchvision.models.resnet18(), levels=4)   # ReLU -> QCFS, MaxPool -> AvgPool
...                                                                  # train it as any network
snn = qcfs_fast.convert(model, T=4)
logits = snn(images)
"""

from .backend.cuda_graph import CudaGraph, cuda_graph
from .backend.information import info
from .conversion.builder import convert
from .conversion.preparation import prepare
from .errors import ConversionError, FormatError
from .exchange.integers import integer_program
from .exchange.nir import from_nir, to_nir
from .exchange.spikingjelly import from_spikingjelly, to_spikingjelly
from .model.biases import step_biases
from .model.calibration import calibrate
from .model.qcfs import QCFS
from .model.simulation import Simulation, simulate
from .network.loading import load
from .network.recording import trace
from .network.snn import SNN
from .network.stream import Stream
from .operators.neuron import Neuron
from .study.profiling.measure import profile
from .study.profiling.report import Profile
from .study.training import Recipe, train
from .version import __version__

__all__ = [
    "QCFS",
    "SNN",
    "ConversionError",
    "CudaGraph",
    "FormatError",
    "Neuron",
    "Profile",
    "Recipe",
    "Simulation",
    "Stream",
    "__version__",
    "calibrate",
    "convert",
    "cuda_graph",
    "from_nir",
    "from_spikingjelly",
    "info",
    "integer_program",
    "load",
    "prepare",
    "profile",
    "simulate",
    "step_biases",
    "to_nir",
    "to_spikingjelly",
    "trace",
    "train",
]
