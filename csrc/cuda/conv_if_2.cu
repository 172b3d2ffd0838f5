// Spiking layers, groups of at most 2 time step(s).
#include "cuda/kernels/conv_if.h"
#include "cuda/kernels/direct.h"
#include "cuda/kernels/groups.h"

namespace qcfs::cuda {

const GroupKernels group_2 = {launch_conv_if<2>, launch_direct<2>, launch_finish<2>};

}    // namespace qcfs::cuda
