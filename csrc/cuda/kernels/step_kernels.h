// The launchers of a spiking layer, compiled for T = 1, 2, 4 and 8 time steps: one translation unit for each T, because
// each takes long to compile.
#pragma once

#include "cuda/cost_model.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

struct StepKernels {
  int (*tensor)(const LayerParams& p, TileKind tile, int splits, const Launch& launch);
  int (*direct)(const LayerParams& p, const Launch& launch);
  int (*epilogue)(const LayerParams& p, const Launch& launch);
};

extern const StepKernels steps_1, steps_2, steps_4, steps_8;

}    // namespace qcfs::cuda
