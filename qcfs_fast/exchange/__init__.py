"""exchange: converted networks in the formats and simulators of others, with the same spikes.

    integers.py       integer_program: for C without libraries and for hardware; integers.c runs it
    nir.py            to_nir, from_nir: the Neuromorphic Intermediate Representation
    simulators.py     such a graph in snnTorch, sinabs, Norse or SpikingJelly, with neurons that are set right
    spikingjelly.py   from_spikingjelly, to_spikingjelly

The packages of the others are optional; each is imported when it is asked for.
"""

from .simulators import Simulation, in_simulator

__all__ = ["Simulation", "in_simulator"]
