// Spiking layers, launches of at most 1 time step.
#include "cuda/kernels/conv_if_direct.h"
#include "cuda/kernels/conv_if_tensor.h"
#include "cuda/kernels/step_kernels.h"

namespace qcfs::cuda {

const StepKernels steps_1 = {launch_conv_if<1>, launch_direct<1>, launch_epilogue<1>};

}    // namespace qcfs::cuda
