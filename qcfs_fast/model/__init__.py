"""model: what a user brings and trains, and the float network that defines the correct result.

    qcfs.py         the activation QCFS, and what counts as one
    graph.py        a torch module as a torch.fx graph; the names of its activations
    calibration.py  thresholds from data
    simulation.py   the spiking network step by step in float64

This floor stands beside network: it knows nothing of integers and imports only errors.
"""
