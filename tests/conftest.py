"""Settings that must stand before any test module is imported."""

import os

# Triton decides at its first import, which other packages may trigger, whether kernels are interpreted.
os.environ["TRITON_INTERPRET"] = "1"
