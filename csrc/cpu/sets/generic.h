// The CPU algorithms, written once over vectors of `lanes` int32 and included by one file for each instruction set,
// inside that file's unnamed namespace. Each part says what the including file must define before.
// clang-format off: the order matters
#include "cpu/vector.h"
#include "cpu/events/add_rows.h"
#include "cpu/events/list.h"
#include "cpu/events/merge.h"
#include "cpu/events/fire.h"
#include "cpu/events/grouped.h"
#if defined(QCFS_TILES)
#include "cpu/dense/dense_tiles.h"
#else
#include "cpu/dense/dense_vector.h"
#endif
#include "cpu/dense/dense.h"
#include "cpu/ends/image.h"
#include "cpu/ends/elementwise.h"
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
