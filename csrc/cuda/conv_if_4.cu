// Spiking layers, groups of at most 4 time step(s).
#include "cuda/kernels/conv_if.h"
#include "cuda/kernels/direct.h"
#include "cuda/kernels/groups.h"

namespace qcfs::cuda {

const GroupKernels group_4 = {launch_conv_if<4>, launch_direct<4>, launch_finish<4>};

}    // namespace qcfs::cuda
