"""model: what a user brings and trains, and the float network that defines the correct result.

    qcfs.py         the activation QCFS, and what counts as one
    tracing.py      a torch module as a torch.fx graph
    hooks.py        what a module runs besides the forward of its class
    inplace.py      what such a graph changes in place
    graph.py        what its nodes are; the names of its activations
    calibration.py  thresholds from data
    neurons.py      the neuron's modes in floating point
    simulation.py   the spiking network in float64
    biases.py       biases by layer and time step from data

This floor stands beside network: it knows nothing of integers and imports only errors.
"""
