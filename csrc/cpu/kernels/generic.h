// The CPU algorithms, written once over vectors of `lanes` int32 and included by one file for each instruction set,
// inside that file's unnamed namespace. Each part says what the including file must define before.
// clang-format off: the order matters
#include "cpu/kernels/vector.h"
#include "cpu/kernels/add_rows.h"
#include "cpu/kernels/events.h"
#if defined(QCFS_TILES)
#include "cpu/kernels/dense_tiles.h"
#else
#include "cpu/kernels/dense_vector.h"
#endif
#include "cpu/kernels/dense.h"
#include "cpu/kernels/analog.h"
#include "cpu/kernels/elementwise.h"
// clang-format on

constexpr KernelSet make_kernel_set(const char* name, std::uint32_t isa) {
  return {name,
          isa,
          pack_events,
          list_events,
          merge_events_workspace,
          merge_events,
          fire_events_workspace,
          fire_events,
          fire_grouped_workspace,
          fire_grouped,
          fire_depthwise,
          dense_shape,
          pack_dense,
          expand,
          fire_dense_workspace,
          fire_dense,
          matrix_loop,
          pack_analog_bytes,
          pack_analog,
          analog_workspace,
          analog,
          encode,
          pool,
          pool_counts,
          count,
          readout,
          largest,
          quantize};
}
