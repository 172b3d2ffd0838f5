"""conversion: from a QCFS-trained model to a network of integers.

preparation.py  prepare: a ReLU network becomes a QCFS network that can be trained
lowering.py     the traced model, read as signals and currents (values.py): which neuron integrates what
units.py        the integer grid of each layer, as fine as 32 bits allow
builder.py      convert: the nodes of the network
"""
