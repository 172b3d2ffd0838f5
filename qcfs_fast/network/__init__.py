"""network: a converted network, and what can be done with one.

schema.py     what a node holds: fields and tensors, described once
layers.py     the nodes
snn.py        SNN: the graph of nodes, run once for all T steps
stream.py     a run that goes on from call to call
state.py      what one call of it leaves for the next
anytime.py    predict: each sample stops as soon as its answer is clear
recording.py  trace: the spikes of every layer
rehearsal.py  a run without memory: what a network asks of images of one shape
saving.py     one file for a network (docs/format.md)
loading.py    and back, with every field checked
"""
