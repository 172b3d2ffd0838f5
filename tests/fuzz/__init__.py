"""Many odd cases of one kind, each reproduced by its number: `python -m fuzz KIND` in tests/, or `make fuzz`.

operators.py   calls of operators
files.py       saved networks that somebody altered
models.py      models as training never gives them
harness.py     runs cases in a child process, so that a crash or a hang ends the child alone
"""
