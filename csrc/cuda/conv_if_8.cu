// Spiking layers, groups of at most 8 time step(s).
#include "cuda/kernels/conv_if.h"
#include "cuda/kernels/direct.h"
#include "cuda/kernels/groups.h"

namespace qcfs::cuda {

const GroupKernels group_8 = {launch_conv_if<8>, launch_direct<8>, launch_finish<8>};

}    // namespace qcfs::cuda
