"""torchvision's models; after this import torchvision itself imports too, also beside a torch of another build."""

from qcfs_fast.study import zoo

models = zoo.torchvision_models()
