// Spiking layers, launches of at most 4 time steps.
#include "cuda/kernels/conv_if_direct.h"
#include "cuda/kernels/conv_if_tensor.h"
#include "cuda/kernels/step_kernels.h"

namespace qcfs::cuda {

const StepKernels steps_4 = {launch_conv_if<4>, launch_direct<4>, launch_epilogue<4>};

}    // namespace qcfs::cuda
