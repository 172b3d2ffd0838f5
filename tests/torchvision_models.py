"""torchvision's models beside a CPU build of torch.

torchvision from PyPI registers fake kernels for two operators of its binary part, which does not load beside
such a build; declaring their schemas first makes the models importable. For tests only.
"""

import torch

try:
    import torchvision
except RuntimeError:
    _library = torch.library.Library("torchvision", "DEF")
    _library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

models = torchvision.models
