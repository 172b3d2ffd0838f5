// The launchers of one group of steps, one translation unit for each group size (compile time).
#pragma once

#include "cuda/kernels/layer.h"

namespace qcfs::cuda {

struct GroupKernels {
  int (*conv_if)(const LayerParams& p, Tile tile, int splits, void* stream);
  int (*direct)(const LayerParams& p, void* stream);
  int (*finish)(const LayerParams& p, void* stream);
};

extern const GroupKernels group_1, group_2, group_4, group_8;

}    // namespace qcfs::cuda
