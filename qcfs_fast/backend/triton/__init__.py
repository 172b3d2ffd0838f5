"""triton: the operators for GPUs without a compiler of ours.

kernels.py  the kernels
launch.py   launches them on torch tensors
tiles.py    chooses tile shapes, by time
"""
