// Spiking layers, launches of at most 2 time steps.
#include "cuda/kernels/conv_if_direct.h"
#include "cuda/kernels/conv_if_tensor.h"
#include "cuda/kernels/step_kernels.h"

namespace qcfs::cuda {

const StepKernels steps_2 = {launch_conv_if<2>, launch_direct<2>, launch_epilogue<2>};

}    // namespace qcfs::cuda
