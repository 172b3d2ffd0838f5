"""torchvision's models, also beside a CPU build of torch (qcfs_fast/study/zoo.py says how)."""

from qcfs_fast.study import zoo

models = zoo.torchvision_models()
