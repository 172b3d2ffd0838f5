// The executor in the CPU module, for qcfs_fast/network/executor.py.
#pragma once

#include <pybind11/pybind11.h>

namespace qcfs::network {

void bind(pybind11::module_& m);

}    // namespace qcfs::network
