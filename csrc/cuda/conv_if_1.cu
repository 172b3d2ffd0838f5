// Spiking layers, groups of at most 1 time step(s).
#include "cuda/kernels/conv_if.h"
#include "cuda/kernels/direct.h"
#include "cuda/kernels/groups.h"

namespace qcfs::cuda {

const GroupKernels group_1 = {launch_conv_if<1>, launch_direct<1>, launch_finish<1>};

}    // namespace qcfs::cuda
