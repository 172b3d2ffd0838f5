"""benchmark: latencies of converted networks beside the ANN and the usual simulators.

Each file imports only those above it.

measure.py      the one timing harness (calls in turns), memory, and the facts of the machine
contenders.py   one network run in every usual way, and a check that all compute the same
cases.py        what is measured: networks and single layers
results.py      the result file
comparison.py   tables, plots and the README's section from a result file
"""
