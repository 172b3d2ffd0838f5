"""operators: what each operator means. This floor is the contract of csrc/core in Python; it imports no backend.

signature.py  every operator once: operands, checks, shape of the result; the schema follows
checks.py     what the checks are made of
reference.py  every operator in plain torch, slow and exact
neuron.py     the modes of the neuron
geometry.py   the geometry of a convolution
windows.py    the windows of a pool
masks.py      spike masks and count planes
finite.py     what becomes of NaN and infinity in an image
limits.py     every limit, with its reason, and the bound on T
"""
