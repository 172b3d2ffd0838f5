// Spiking layers, launches of at most 8 time steps.
#include "cuda/kernels/conv_if_direct.h"
#include "cuda/kernels/conv_if_tensor.h"
#include "cuda/kernels/step_kernels.h"

namespace qcfs::cuda {

const StepKernels steps_8 = {launch_conv_if<8>, launch_direct<8>, launch_epilogue<8>};

}    // namespace qcfs::cuda
