// The end of a tile of a spiking layer: from the accumulators of the tensor cores to mask bytes.
//
// Simple layers (epilogue.h) end on the accumulators as they lie: a lane has two neighbouring channels of a pixel. The
// mask bytes pass through shared memory so that a store has 16 of them. Any other layer's accumulators go through
// shared memory a few channels at a time, and its neurons end one by one in a loop.
//
// Split K: from sm_90 on the blocks of a tile are a cluster. Each leaves its accumulators in its shared memory and ends
// a share of the tile's neurons on the sums of all. Before, they go to a workspace, and a second launch ends the layer.
#pragma once

#include <cstdint>

#include "cuda/cost_model.h"
#include "cuda/device.h"
#include "cuda/kernels/epilogue.h"
#include "cuda/kernels/parameters.h"

namespace qcfs::cuda {

// T, parts, cols and warps as in ConvTile (conv_if_tensor.h).
template <int T, int parts, int cols, int warps>
struct TileEnd {
  static constexpr int rows = 16 * parts * warps, threads = 32 * warps;
  static constexpr int pairs = cols / 16;    // of 8-channel fragments

  using Accumulators = std::int32_t[T][parts][2 * pairs][4];

  template <typename Change>
  QCFS_DEVICE static void for_each(Accumulators& acc, Change&& change) {
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int j = 0; j < 2 * pairs; ++j) {
          QCFS_UNROLL
          for (int r = 0; r < 4; ++r) change(acc[t][i][j][r]);
        }
      }
    }
  }

 private:
  // In a 16 x 8 accumulator fragment lane l holds rows l/4 and l/4 + 8, channels 2*(l%4) and 2*(l%4) + 1: two pairs of
  // neighbouring channels. Calls see(pair, row, column) with the pair's row and its first column within the tile.
  template <typename See>
  QCFS_DEVICE static void for_each_pair(See&& see) {
    const std::int32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    QCFS_UNROLL
    for (int j = 0; j < 2 * pairs; ++j) {
      QCFS_UNROLL
      for (int i = 0; i < parts; ++i) {
        QCFS_UNROLL
        for (int half = 0; half < 2; ++half) {
          see(Pair{i, j, half}, 16 * (parts * warp + i) + 8 * half + lane / 4, 8 * j + lane % 4 * 2);
        }
      }
    }
  }
  struct Pair {
    int i, j, half;
    QCFS_DEVICE void of(const Accumulators& acc, std::int32_t (&currents)[T][2]) const {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        currents[t][0] = acc[t][i][j][2 * half];
        currents[t][1] = acc[t][i][j][2 * half + 1];
      }
    }
    // To the place `by` fragments before, in ascending order of fragments.
    QCFS_DEVICE void move_down(Accumulators& acc, int by) const {
      if (j < by) return;
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        acc[t][i][j - by][2 * half] = acc[t][i][j][2 * half];
        acc[t][i][j - by][2 * half + 1] = acc[t][i][j][2 * half + 1];
      }
    }
  };

  // Bytes from one row of the mask bytes in shared memory to the next: the pairs of a fragment fall into different
  // banks, and 16 bytes stay aligned.
  static constexpr int mask_row = cols == 16 ? 16 : cols + 16;

  // Ends a simple layer's neurons on the accumulators as they lie. Mask bytes go to `masks` [rows, mask_row] in shared
  // memory; those of pixels and channels that do not exist are never read.
  template <bool has_residual, bool has_state>
  QCFS_DEVICE static void end_pairs(const LayerParams& p, const Accumulators& acc, unsigned char* masks,
                                    std::int32_t first_pixel, std::int32_t first_channel) {
    std::uint32_t residual[2 * pairs][parts][2];    // all asked for before any is used
    for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
      const std::int32_t pixel = first_pixel + row, o = first_channel + col;
      const bool asked = has_residual && p.residual_count > 0 && pixel < p.pixels && o < p.out_channels;
      const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
      residual[at.j][at.i][at.half] = asked ? load_bytes<2>(p.residuals[0].data + index) : 0;
    });
    QCFS_UNROLL
    for (int j = 0; j < 2 * pairs; ++j) {
      const std::int32_t o = first_channel + 8 * j + threadIdx.x % 4 * 2;
      const ChannelPair channels(p, o < p.out_channels ? o : 0);
      for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
        if (at.j != j) return;
        std::int32_t currents[T][2];
        at.of(acc, currents);
        const std::int32_t pixel = first_pixel + row;
        if (has_state && (pixel >= p.pixels || o >= p.out_channels)) return;
        const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
        const std::uint32_t bits = fire_pair<T, has_residual, has_state>(
            p, channels, index, has_residual ? residual[j][at.i][at.half] : 0, currents);
        store_bytes<2>(masks + row * mask_row + col, bits);
      });
    }
  }

  // The mask bytes of a tile, 16 a store where the output is so aligned.
  QCFS_DEVICE static void store_masks(const LayerParams& p, const unsigned char* masks, std::int32_t first_pixel,
                                      std::int32_t first_channel) {
    for (std::int32_t i = threadIdx.x * 16; i < rows * cols; i += threads * 16) {
      const std::int32_t at = first_pixel + i / cols, o = first_channel + i % cols;
      if (at >= p.pixels) continue;
      const unsigned char* from = masks + i / cols * mask_row + i % cols;
      std::uint8_t* to = p.out + static_cast<std::int64_t>(at) * p.out_channels + o;
      if (p.wide_out && o < p.out_channels) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      } else {
        for (int j = 0; j < 16 && o + j < p.out_channels; ++j) to[j] = from[j];
      }
    }
  }

  // Partial sums of a split K, for a second launch.
  QCFS_DEVICE static void store_partial(const LayerParams& p, const Accumulators& acc, std::int32_t first_pixel,
                                        std::int32_t first_channel) {
    const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
    for_each_pair([&](Pair at, std::int32_t row, std::int32_t col) {
      const std::int32_t pixel = first_pixel + row, o = first_channel + col;
      if (pixel >= p.pixels || o >= p.out_channels) return;
      std::int32_t* to =
          p.partial + blockIdx.z * p.steps * plane + static_cast<std::int64_t>(pixel) * p.out_channels + o;
      std::int32_t currents[T][2];
      at.of(acc, currents);
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) {
        if (t >= p.steps) break;
        if (p.out_channels % 2 == 0) {    // four lanes fill a sector
          store_values<2>(to + t * plane, currents[t]);
        } else {
          to[t * plane] = currents[t][0];
          if (o + 1 < p.out_channels) to[t * plane + 1] = currents[t][1];
        }
      }
    });
  }

  // Accumulators of `height` pixels x `width` channels in shared memory, int32 [T, height, row].
  template <int height, int width>
  struct SharedCurrents {
    static constexpr int row = currents_row(width), words = T * height * row;
    std::int32_t* memory;
    std::int32_t blocks;    // of the cluster: a neuron's currents are the sums of theirs; 1: of this block alone

    QCFS_DEVICE static int at(int t, std::int32_t y, std::int32_t x) { return (t * height + y) * row + x; }

    QCFS_DEVICE void load(std::int32_t y, std::int32_t x, std::int32_t (&sums)[T][2]) const {
      QCFS_UNROLL
      for (int t = 0; t < T; ++t) load_values(sums[t], memory + at(t, y, x));
#if defined(QCFS_HAS_CLUSTERS)
      for (std::int32_t block = 1; block < blocks; ++block) {
        // Each block begins with itself and goes round, so that not all ask the same one.
        const std::int32_t rank = (static_cast<std::int32_t>(blockIdx.z) + block) % blocks;
        const SharedAddress from = in_block(shared_address(memory), rank);
        QCFS_UNROLL
        for (int t = 0; t < T; ++t) {
          std::int32_t value[2];
          load_remote(value, from + at(t, y, x) * 4);
          sums[t][0] = wrapping_add(sums[t][0], value[0]);
          sums[t][1] = wrapping_add(sums[t][1], value[1]);
        }
      }
#endif
    }

    // Ends the neurons: pairs `first`, `first` + `stride`, .. of them. The first one is at pixel and channel given.
    QCFS_DEVICE void end(const LayerParams& p, std::int32_t first, std::int32_t stride, std::int32_t first_pixel,
                         std::int32_t first_channel) const {
      QCFS_ROLLED
      for (std::int32_t i = first; i < height * width / 2; i += stride) {
        const std::int32_t y = i / (width / 2), x = i % (width / 2) * 2;
        const std::int32_t pixel = first_pixel + y, o = first_channel + x;
        if (pixel >= p.pixels || o >= p.out_channels) continue;
        const std::int64_t index = static_cast<std::int64_t>(pixel) * p.out_channels + o;
        std::int32_t sums[T][2];
        load(y, x, sums);
        if (p.simple) {
          const ChannelPair channels(p, o);
          const std::uint32_t residual = p.residual_count > 0 ? load_bytes<2>(p.residuals[0].data + index) : 0;
          const std::uint32_t bits = fire_pair<T, true, true>(p, channels, index, residual, sums);
          store_bytes<2>(p.out + index, bits);
          continue;
        }
        std::uint32_t bytes = 0;
        QCFS_ROLLED
        for (int k = 0; k < 2 && o + k < p.out_channels; ++k) {
          std::int32_t currents[T];
          QCFS_UNROLL
          for (int t = 0; t < T; ++t) currents[t] = k == 0 ? sums[t][0] : sums[t][1];
          bytes |= static_cast<std::uint32_t>(end_neuron<T>(p, index + k, o + k, currents)) << 8 * k;
        }
        if (p.wide_out) {
          store_bytes<2>(p.out + index, bytes);
        } else {
          for (int k = 0; k < 2 && o + k < p.out_channels; ++k)
            p.out[index + k] = static_cast<std::uint8_t>(bytes >> 8 * k);
        }
      }
    }
  };

  template <int height, int width>
  QCFS_DEVICE static void put_pair(const SharedCurrents<height, width>& to, const Accumulators& acc, Pair pair,
                                   std::int32_t y, std::int32_t x) {
    std::int32_t currents[T][2];
    pair.of(acc, currents);
    QCFS_UNROLL
    for (int t = 0; t < T; ++t) store_values<2>(to.memory + to.at(t, y, x), currents[t]);
  }

  static constexpr int chunk_channels = T == 8 ? 8 : 16;    // that end_by_warps takes at a time

  // Ends neurons of any mode, a few channels of a warp's pixels at a time.
  QCFS_DEVICE static void end_by_warps(const LayerParams& p, Accumulators& acc, unsigned char* shared,
                                       std::int32_t first_pixel, std::int32_t first_channel) {
    constexpr int width = chunk_channels, height = 16 * parts;
    using Currents = SharedCurrents<height, width>;
    const std::int32_t lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * height;
    const Currents currents{reinterpret_cast<std::int32_t*>(shared) + threadIdx.x / 32 * Currents::words, 1};
    QCFS_ROLLED
    for (std::int32_t first = 0; first < cols; first += width) {
      for_each_pair([&](Pair pair, std::int32_t row, std::int32_t col) {
        if (pair.j < width / 8) put_pair(currents, acc, pair, row - first_row, col);
        pair.move_down(acc, width / 8);    // registers have no index
      });
      sync_warp();
      currents.end(p, lane, 32, first_pixel + first_row, first_channel + first);
      sync_warp();
    }
  }

#if defined(QCFS_HAS_CLUSTERS)
  // Ends this block's share of the neurons of the cluster's tile.
  QCFS_DEVICE static void end_in_cluster(const LayerParams& p, const Accumulators& acc, unsigned char* shared,
                                         std::int32_t first_pixel, std::int32_t first_channel) {
    const SharedCurrents<rows, cols> currents{reinterpret_cast<std::int32_t*>(shared), p.cluster};
    for_each_pair([&](Pair pair, std::int32_t row, std::int32_t col) { put_pair(currents, acc, pair, row, col); });
    cluster_barrier();
    currents.end(p, blockIdx.z * threads + threadIdx.x, p.cluster * threads, first_pixel, first_channel);
    leave_cluster();    // not while others read from it
  }
#endif

 public:
  // What the end needs of shared memory in one block; clusters need room for all accumulators (cost_model.h).
  static constexpr int chunk_bytes = warps * SharedCurrents<16 * parts, chunk_channels>::words * 4;
  static constexpr int mask_bytes = rows * mask_row;
  static constexpr int shared_bytes = chunk_bytes > mask_bytes ? chunk_bytes : mask_bytes;

  // Ends a block's share of the layer. Everyone has left `shared`, which holds `shared_bytes` or more.
  QCFS_DEVICE static void end(const LayerParams& p, Accumulators& acc, unsigned char* shared, std::int32_t first_pixel,
                              std::int32_t first_channel) {
#if defined(QCFS_HAS_CLUSTERS)
    if (p.cluster > 1) return end_in_cluster(p, acc, shared, first_pixel, first_channel);
#endif
    if (p.partial != nullptr) return store_partial(p, acc, first_pixel, first_channel);
    if (!p.simple) return end_by_warps(p, acc, shared, first_pixel, first_channel);
    if (p.state_in != nullptr || p.state_out != nullptr) {
      end_pairs<true, true>(p, acc, shared, first_pixel, first_channel);
    } else if (p.residual_count > 0) {
      end_pairs<true, false>(p, acc, shared, first_pixel, first_channel);
    } else {
      end_pairs<false, false>(p, acc, shared, first_pixel, first_channel);
    }
    __syncthreads();
    store_masks(p, shared, first_pixel, first_channel);
  }
};

}    // namespace qcfs::cuda
