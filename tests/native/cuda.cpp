// Runs the CUDA backend's kernels on the CPU (csrc/cuda/emulation) and compares every byte with plain loops over int64
// and double. Every operand is a heap block of exactly its size, so that ASan sees an index that strays.
//
// Usage: emulation_test SEED SPIKING_LAYERS [T [CAPABILITY]]. T = 0: any; CAPABILITY: of the GPU to imitate, without it
// now one, now another. Prints one line of totals, which say what the random layers covered.
#include "cuda/cuda.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "cuda/emulation/emulation.h"
#include "cuda/kernels/tensor_layout.h"
#include "layers.h"

namespace {

using namespace qcfs;
using cuda::Path;
using cuda::TileKind;
using namespace layers;

// A block of exactly `count` elements, aligned as device memory is, or off by some bytes.
template <typename T>
class Block {
 public:
  explicit Block(i64 count, i64 offset = 0)
      : count_(count), offset_(offset), bytes_(static_cast<char*>(std::malloc(size()))) {
    // malloc aligns to 16; no rounding up, so that ASan's red zone begins where the operand ends.
    for (i64 i = 0; i < count; ++i) (*this)[i] = T{};
  }
  T* data() const { return reinterpret_cast<T*>(bytes_.get() + offset_ * static_cast<i64>(sizeof(T))); }
  T& operator[](i64 i) const { return data()[i]; }
  i64 count() const { return count_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::size_t size() const { return static_cast<std::size_t>(count_ + offset_) * sizeof(T) + (count_ + offset_ == 0); }
  i64 count_, offset_;
  std::unique_ptr<char, Free> bytes_;
};

struct Totals {
  Evidence evidence;
  i64 layers = 0, neurons = 0;
  i64 tensor = 0, direct = 0, split = 0, clusters = 0, several = 0, long_runs = 0, counted = 0, extreme = 0, images = 0,
      other = 0;
  i64 tiles[3] = {0, 0, 0}, modes[5] = {0, 0, 0, 0, 0}, states = 0, alone = 0;
} totals;

cuda::Launch launch_settings() {
  cuda::Device d;
  cuda::query_device(0, &d);
  d.multiprocessors = static_cast<int>(any_of<i64>({1, 4, 30, 132}));
  if (cuda::emulation::capability < 80) d.shared_bytes = 64 * 1024;
  return {nullptr, d};
}

// A plain layer of one product, without operands.
ConvIf layer_of(i64 N, i64 OH, i64 OW, i64 O, i64 T, const Product& product) {
  ConvIf a{};
  a.batch = N;
  a.out_h = OH;
  a.out_w = OW;
  a.out_channels = O;
  a.steps = T;
  a.products = &product;
  a.product_count = 1;
  return a;
}

void spiking_layer(i64 steps) {
  const RandomLayer<Block> layer(steps, totals.evidence);
  ConvIf a = layer.a;
  const Block<std::uint8_t> got(layer.out_bytes(), chance(0.1) ? 3 : 0);
  const Block<std::int32_t> state(layer.state_words());
  a.out = got.data();
  if (a.state != nullptr) a.state_out = state.data();
  const cuda::Launch launch = launch_settings();
  cuda::Plan plan = cuda::plan_conv_if(a, launch.device);
  const int compiled = cuda::compiled_steps(std::min<i64>(a.steps, 8));
  std::vector<Block<std::int8_t>> packed;
  std::vector<const std::int8_t*> packed_data;
  if (plan.path == Path::tensor_cores) {
    // Every tile and every split must give the same bytes, not only the one that the model prefers.
    if (chance(0.6) && plan.tile != TileKind::counts) plan.tile = chance(0.5) ? TileKind::wide : TileKind::small;
    i64 stages = 0;
    for (const Product& p : layer.products) {
      const i64 C = p.x.channels, O = a.out_channels;
      stages += cuda::stages_of(p.g.kernel_h * p.g.kernel_w, C);
      const auto& to = packed.emplace_back(static_cast<i64>(cuda::packed_bytes(p.g, C, O, p.weight_bytes, false)));
      if (cuda::pack_weight(p.g, C, O, p.weight_bytes, false, p.weight, to.data(), launch) != 0) fail("packing");
      packed_data.push_back(to.data());
    }
    if (chance(0.5)) plan.splits = static_cast<int>(std::min(stages, uniform(1, 6)));
    plan.splits = static_cast<int>(cuda::ceil_div(stages, cuda::ceil_div(stages, plan.splits)));
    // Partial sums in a cluster's shared memory or, anywhere, in a workspace.
    const bool cluster = plan.splits <= launch.device.max_cluster && chance(0.6);
    plan.slices = plan.splits > 1 && !cluster ? plan.splits : 0;
    plan.partial_bytes = plan.slices * std::min<i64>(a.steps, 8) * layer.outputs() * 4;
  }
  const Block<std::int32_t> workspace(plan.workspace_bytes() / 4);
  for (i64 i = 0; i < workspace.count(); ++i) workspace[i] = 0x5a5a5a5a;
  const int code = cuda::conv_if(a, packed_data.data(), plan, workspace.data(), launch);
  if (code != 0) fail(std::string("conv_if: ") + cuda::describe(code));
  layer.check(got, state,
              "conv_if, path " + std::to_string(static_cast<int>(plan.path)) + " tile " +
                  std::to_string(static_cast<int>(plan.tile)) + " splits " + std::to_string(plan.splits));
  ++totals.layers;
  totals.neurons += layer.outputs();
  totals.long_runs += a.steps > 8;
  totals.extreme += layer.extreme;
  totals.states += a.state != nullptr;
  totals.alone += image_alone(a);
  ++totals.modes[static_cast<int>(a.neuron.mode)];
  for (const Product& p : layer.products) totals.counted += p.x.coding == Coding::count && a.steps > 1;
  if (plan.path == Path::tensor_cores) {
    ++totals.tensor;
    totals.split += plan.slices > 1;
    totals.clusters += plan.cluster() > 1;
    totals.several += a.product_count > 1;
    ++totals.tiles[compiled == 1 && plan.tile == TileKind::counts ? 0 : static_cast<int>(plan.tile)];
  } else {
    ++totals.direct;
  }
}

template <typename T>
void expect_equal(const Block<T>& want, const Block<T>& got, const char* what) {
  for (i64 i = 0; i < want.count(); ++i) {
    if (want[i] != got[i]) {
      fail(std::string(what) + ": element " + std::to_string(i) + " is " + std::to_string(got[i]) + ", not " +
           std::to_string(want[i]));
    }
  }
  ++totals.other;
}

void analog_layer() {
  // K of one stage to many: the image kernel knows the pieces of eight at a time.
  const i64 kernel_w = any_of<i64>({1, 3, 5, 7, 13, 13}), more = kernel_w > 5 ? 9 : 0;
  const i64 groups = any_of<i64>({1, 1, 1, 1, 1, 3}), C = groups * (chance(0.2) ? uniform(5, 9) : uniform(1, 4));
  const i64 O = groups * any_of<i64>({1, 5, 8, 13, 16, 64, 70});
  const Geometry g{uniform(1, 3) + more, kernel_w, uniform(1, 2), uniform(1, 3), uniform(0, 2), uniform(0, 2),
                   uniform(1, 2),        1,        groups};
  const i64 N = uniform(1, 3), H = uniform(5, 9) + 2 * more, W = uniform(5, 11) + 2 * more;
  const i64 OH = out_size(H, g.kernel_h, g.stride_h, g.pad_h, g.dilation_h);
  const i64 OW = out_size(W, g.kernel_w, g.stride_w, g.pad_w, g.dilation_w);
  const i64 T = any_of<i64>({0, 1, 4, 8, 11}), outputs = N * OH * OW * O, planes = planes_of(Coding::mask, T);
  const Block<std::int16_t> weight(g.kernel_h * g.kernel_w * C / groups * O);
  const Block<std::int32_t> x(N * H * W * C), exponent(N), low(O), high(O), threshold(O);
  const Block<double> gain(O), offset(O);
  const i64 largest = any_of<i64>({127, 32767, 8388607});
  for (i64 i = 0; i < x.count(); ++i) {
    x[i] = static_cast<std::int32_t>(chance(0.1) ? any_of({-largest, largest}) : uniform(-largest, largest));
  }
  for (i64 i = 0; i < weight.count(); ++i) weight[i] = static_cast<std::int16_t>(uniform(-32639, 32639));
  for (i64 n = 0; n < N; ++n) exponent[n] = static_cast<std::int32_t>(uniform(-20, 3));
  for (i64 o = 0; o < O; ++o) {
    // Powers of two leave sums on half units, which must go to even.
    gain[o] = chance(0.5) ? std::ldexp(1.0, -18) : 1e-6 * static_cast<double>(uniform(1, 99)) / 7;
    offset[o] = chance(0.3) ? 0.5 : static_cast<double>(uniform(-1000, 1000)) / 3;
    low[o] = static_cast<std::int32_t>(uniform(-3000000, -10));
    high[o] = static_cast<std::int32_t>(uniform(10, 3000000));
    threshold[o] = static_cast<std::int32_t>(2 * uniform(1, 300000));
  }
  const Block<std::int32_t> want(outputs), got(T == 0 ? outputs : 0);
  const Block<std::uint8_t> want_mask(planes * outputs), got_mask(planes * outputs);
  for (i64 index = 0; index < outputs; ++index) {
    const i64 o = index % O, ow = index / O % OW, oh = index / O / OW % OH, n = index / O / OW / OH;
    i64 sum = 0;
    for (i64 kh = 0; kh < g.kernel_h; ++kh) {
      for (i64 kw = 0; kw < g.kernel_w; ++kw) {
        const i64 r = oh * g.stride_h - g.pad_h + kh * g.dilation_h, c = ow * g.stride_w - g.pad_w + kw * g.dilation_w;
        if (r < 0 || r >= H || c < 0 || c >= W) continue;
        for (i64 k = 0; k < C / groups; ++k) {
          sum += static_cast<i64>(x[((n * H + r) * W + c) * C + o / (O / groups) * (C / groups) + k]) *
                 weight[((kh * g.kernel_w + kw) * (C / groups) + k) * O + o];
        }
      }
    }
    const double product = static_cast<double>(sum) * (gain[o] * std::ldexp(1.0, exponent[n]));
    const double z = std::nearbyint(product + offset[o]);
    want[index] = static_cast<std::int32_t>(std::clamp<double>(z, low[o], high[o]));
    i64 v = threshold[o] / 2;
    for (i64 t = 0; t < T; ++t) {
      v += want[index];
      if (v < threshold[o]) continue;
      v -= threshold[o];
      want_mask[t / 8 * outputs + index] |= static_cast<std::uint8_t>(1 << (t % 8));
    }
  }
  const AnalogConv a{N,
                     H,
                     W,
                     C,
                     OH,
                     OW,
                     O,
                     T,
                     x.data(),
                     exponent.data(),
                     weight.data(),
                     g,
                     gain.data(),
                     offset.data(),
                     low.data(),
                     high.data(),
                     T > 0 ? threshold.data() : nullptr,
                     T > 0 ? got_mask.data() : nullptr,
                     T > 0 ? nullptr : got.data()};
  Block<std::int8_t> packed(0);
  if (cuda::analog_on_tensor_cores(g, C, O) && chance(0.8)) {
    packed = Block<std::int8_t>(static_cast<i64>(cuda::packed_bytes(g, C, O, 2, true)));
    if (cuda::pack_weight(g, C, O, 2, true, weight.data(), packed.data(), launch_settings()) != 0) fail("packing");
    ++totals.images;
  }
  if (cuda::analog(a, packed.count() > 0 ? packed.data() : nullptr, launch_settings()) != 0) fail("analog");
  if (T == 0) {
    expect_equal(want, got, "analog current");
  } else {
    expect_equal(want_mask, got_mask, "analog encoding");
  }
}

std::vector<i64> windows(i64 size, bool divided) {
  std::vector<i64> w;
  for (i64 i = uniform(1, 4); i > 0; --i) {
    const i64 first = uniform(0, size - 1), end = uniform(first + 1, std::min(size, first + 3));
    w.insert(w.end(), {first, end, divided ? end - first : 1});
  }
  return w;
}

void pooling() {
  const i64 N = uniform(1, 2), H = uniform(1, 7), W = uniform(1, 7), C = any_of<i64>({1, 3, 4, 5, 8, 17});
  const i64 T = any_of<i64>({1, 2, 4, 8, 9, 17}), kind = uniform(0, 3);
  const Pooling pooling = kind == 3 ? Pooling::largest : kind == 2 ? Pooling::any : Pooling::sum;
  const Coding coding = kind % 2 == 1 ? Coding::count : Coding::mask;
  const i64 multiple = chance(0.5) ? 36 : 0;    // divisible by all window sizes up to 3 x 3
  const std::vector<i64> rows = windows(H, multiple != 0), cols = windows(W, multiple != 0);
  const i64 OH = static_cast<i64>(rows.size()) / 3, OW = static_cast<i64>(cols.size()) / 3;
  const Block<std::uint8_t> x(planes_of(coding, T) * N * H * W * C, chance(0.2) ? 1 : 0);
  fill_spikes(x, coding, 0.4, pooling == Pooling::largest ? 255 : 3);
  const i64 planes = pooling == Pooling::any ? planes_of(coding, T) : T, outputs = N * OH * OW * C;
  const Block<std::uint8_t> want(planes * outputs), got(planes * outputs);
  for (i64 p = 0; p < planes; ++p) {
    for (i64 index = 0; index < outputs; ++index) {
      const i64 c = index % C, ow = index / C % OW, oh = index / C / OW % OH, n = index / C / OW / OH;
      const i64 *h = rows.data() + 3 * oh, *w = cols.data() + 3 * ow;
      i64 sum = 0;
      for (i64 r = h[0]; r < h[1]; ++r) {
        for (i64 k = w[0]; k < w[1]; ++k) {
          const i64 at = ((n * H + r) * W + k) * C + c;
          if (pooling == Pooling::any)
            sum |= x[p * N * H * W * C + at];
          else if (pooling == Pooling::largest)
            sum = std::max<i64>(sum, x[p * N * H * W * C + at]);
          else
            sum += value_of(x.data(), coding, N * H * W * C, at, p);
        }
      }
      if (pooling == Pooling::sum && multiple != 0) sum *= multiple / (h[2] * w[2]);
      want[p * outputs + index] = static_cast<std::uint8_t>(sum);
    }
  }
  const Pool a{N,        H,         W,       C,           OH,          OW,
               T,        coding,    pooling, rows.data(), cols.data(), pooling == Pooling::sum ? multiple : 0,
               x.data(), got.data()};
  if (cuda::pool(a, launch_settings()) != 0) fail("pool");
  expect_equal(want, got, "pool");
}

void counting() {
  const i64 n = uniform(1, 700), T = any_of<i64>({1, 2, 5, 8, 9, 20});
  const Coding coding = chance(0.4) ? Coding::count : Coding::mask;
  const bool prefix = chance(0.5);
  const Block<std::uint8_t> x(planes_of(coding, T) * n);
  fill_spikes(x, coding, 0.3, 255);
  const i64 first = chance(0.5) ? 0 : uniform(0, T - 1), last = chance(0.5) ? T : uniform(first + 1, T);
  const i64 rows = prefix ? last - first : 1;
  const Block<std::int32_t> want(rows * n), got(rows * n);
  for (i64 i = 0; i < n; ++i) {
    i64 sum = 0;
    for (i64 t = first; t < last; ++t) {
      sum += value_of(x.data(), coding, n, i, t);
      if (prefix) want[(t - first) * n + i] = static_cast<std::int32_t>(sum);
    }
    if (!prefix) want[i] = static_cast<std::int32_t>(sum);
  }
  if (cuda::count({n, T, first, last, coding, prefix, x.data(), got.data()}, launch_settings()) != 0) fail("count");
  expect_equal(want, got, "count");
}

void pooling_counts() {
  const i64 images = uniform(1, 3), H = uniform(1, 7), W = uniform(1, 7), C = uniform(1, 20);
  const i64 multiple = chance(0.5) ? 36 : 0;
  const std::vector<i64> rows = windows(H, true), cols = windows(W, true);
  const i64 OH = static_cast<i64>(rows.size()) / 3, OW = static_cast<i64>(cols.size()) / 3;
  const Block<std::int32_t> x(images * H * W * C), want(images * OH * OW * C), got(images * OH * OW * C);
  for (i64 i = 0; i < x.count(); ++i) x[i] = static_cast<std::int32_t>(uniform(0, 100000));
  for (i64 index = 0; index < want.count(); ++index) {
    const i64 c = index % C, ow = index / C % OW, oh = index / C / OW % OH, n = index / C / OW / OH;
    const i64 *h = rows.data() + 3 * oh, *w = cols.data() + 3 * ow;
    i64 sum = 0;
    for (i64 r = h[0]; r < h[1]; ++r) {
      for (i64 k = w[0]; k < w[1]; ++k) sum += x[((n * H + r) * W + k) * C + c];
    }
    want[index] = static_cast<std::int32_t>(sum * (multiple == 0 ? 1 : multiple / (h[2] * w[2])));
  }
  const PoolCounts a{images, H, W, C, OH, OW, rows.data(), cols.data(), multiple, x.data(), got.data()};
  if (cuda::pool_counts(a, launch_settings()) != 0) fail("pool_counts");
  expect_equal(want, got, "pool_counts");
}

void reading_out() {
  const i64 samples = uniform(1, 2), T = uniform(1, 5), images = chance(0.5) ? samples : samples * T;
  const i64 O = any_of<i64>({1, 10, 32, 45}), OH = uniform(1, 2), OW = uniform(1, 3), terms = uniform(1, 3);
  struct Term {
    Block<std::int32_t> counts;
    Block<std::int16_t> weight;
    Block<double> gain;
    i64 H, W, C, multiple;
    Geometry g;
  };
  std::vector<std::unique_ptr<Term>> t;
  const Block<double> offset(O);
  for (i64 o = 0; o < O; ++o) offset[o] = static_cast<double>(uniform(-100, 100)) / 7;
  for (i64 i = 0; i < terms; ++i) {
    const bool identity = chance(0.25);
    const i64 k = identity ? 1 : uniform(1, 2), groups = identity || O % 5 != 0 ? 1 : any_of<i64>({1, 5});
    const i64 C = identity ? O : groups * uniform(1, 21), H = OH + k - 1, W = OW + k - 1;
    t.push_back(std::make_unique<Term>(Term{Block<std::int32_t>(images * H * W * C),
                                            Block<std::int16_t>(identity ? 0 : k * k * C / groups * O),
                                            Block<double>(O),
                                            H,
                                            W,
                                            C,
                                            any_of<i64>({1, 49}),
                                            {k, k, 1, 1, 0, 0, 1, 1, groups}}));
    Term& term = *t.back();
    for (i64 j = 0; j < term.counts.count(); ++j) term.counts[j] = static_cast<std::int32_t>(uniform(0, 400));
    for (i64 j = 0; j < term.weight.count(); ++j) term.weight[j] = static_cast<std::int16_t>(uniform(-32639, 32639));
    for (i64 o = 0; o < O; ++o) term.gain[o] = 1.0 / static_cast<double>(uniform(3, 9999));
  }
  const Block<float> want(images * OH * OW * O), got(images * OH * OW * O);
  for (i64 index = 0; index < want.count(); ++index) {
    const i64 o = index % O, ow = index / O % OW, oh = index / O / OW % OH, image = index / O / OW / OH;
    const i64 steps = images == samples ? T : image / samples + 1;
    double sum = 0;
    for (const auto& term : t) {
      i64 acc = 0;
      if (term->weight.count() == 0) {
        acc = term->counts[index];
      } else {
        const i64 per_group = term->C / term->g.groups, first = o / (O / term->g.groups) * per_group;
        for (i64 kh = 0; kh < term->g.kernel_h; ++kh) {
          for (i64 kw = 0; kw < term->g.kernel_w; ++kw) {
            for (i64 c = 0; c < per_group; ++c) {
              acc += static_cast<i64>(term->weight[((kh * term->g.kernel_w + kw) * per_group + c) * O + o]) *
                     term->counts[((image * term->H + oh + kh) * term->W + ow + kw) * term->C + first + c];
            }
          }
        }
      }
      sum += static_cast<double>(acc) * term->gain[o] / static_cast<double>(steps * term->multiple);
    }
    want[index] = static_cast<float>(sum + offset[o]);
  }
  std::vector<ReadoutTerm> list;
  for (const auto& term : t) {
    list.push_back({term->counts.data(), term->H, term->W, term->C,
                    term->weight.count() == 0 ? nullptr : term->weight.data(), term->g, term->gain.data(),
                    term->multiple});
  }
  const Readout a{images, samples, OH, OW, O, T, list.data(), static_cast<int>(terms), offset.data(), got.data()};
  if (cuda::readout(a, launch_settings()) != 0) fail("readout");
  expect_equal(want, got, "readout");
}

void quantizing() {
  const i64 N = uniform(1, 4), H = uniform(1, 9), W = uniform(1, 9), from = uniform(1, 4), C = uniform(1, 5);
  const bool channels_last = chance(0.5);
  const Block<float> x(N * H * W * from), scale(C), shift(C);
  const Block<i64> source(C);
  for (i64 i = 0; i < x.count(); ++i) x[i] = static_cast<float>(uniform(-1000000, 1000000)) / 77777.0f;
  for (i64 c = 0; c < C; ++c) {
    source[c] = uniform(0, from - 1);
    scale[c] = chance(0.5) ? 1.0f : static_cast<float>(uniform(1, 1000)) / 333.0f;
    shift[c] = chance(0.5) ? 0.0f : static_cast<float>(uniform(-1000, 1000)) / 333.0f;
  }
  const i64 special = uniform(0, 3), sample = uniform(0, N - 1);
  const i64 image = H * W * from;
  if (special == 1) x[sample * image + uniform(0, image - 1)] = chance(0.5) ? NAN : -INFINITY;
  if (special == 2) {
    for (i64 i = 0; i < image; ++i) x[sample * image + i] = 0;
  }
  const auto largest = static_cast<std::int32_t>((i64{1} << (any_of<i64>({2, 8, 16, 24}) - 1)) - 1);
  if (special == 3) {    // a power of two times the largest: the smaller exponent
    x[sample * image] = static_cast<float>(largest) * 4;
  }
  const i64 sn = image, sc = channels_last ? 1 : H * W, sh = channels_last ? W * from : W,
            sw = channels_last ? from : 1;
  const Block<std::int32_t> want(N * H * W * C), got(N * H * W * C), want_e(N), got_e(N);
  bool bad = false;
  for (i64 n = 0; n < N; ++n) {
    std::vector<double> z;
    bool finite = true;
    for (i64 i = 0; i < H * W * C; ++i) {
      const i64 c = i % C, w = i / C % W, h = i / C / W;
      const float value = x[n * sn + source[c] * sc + h * sh + w * sw] * scale[c];
      z.push_back(static_cast<double>(value + shift[c]));
      finite &= std::isfinite(z.back());
    }
    double top = 0;
    for (const double v : z) top = std::max(top, std::abs(v));
    bad |= !finite;
    int e = 0;
    if (finite && top > 0) {
      e = -200;
      while (top > std::ldexp(largest, e)) ++e;
    }
    want_e[n] = e;
    for (i64 i = 0; i < H * W * C; ++i) {
      want[n * H * W * C + i] =
          finite ? static_cast<std::int32_t>(std::nearbyint(std::ldexp(z[static_cast<std::size_t>(i)], -e))) : 0;
    }
  }
  const Block<std::uint32_t> workspace(N + 1);
  for (i64 i = 0; i <= N; ++i) workspace[i] = 77;
  const Quantize a{
      N,          H,           W, C, largest, x.data(), sn, sc, sh, sw, source.data(), scale.data(), shift.data(),
      got.data(), got_e.data()};
  if (cuda::quantize(a, workspace.data(), launch_settings()) != 0) fail("quantize");
  if (workspace[N] != static_cast<std::uint32_t>(bad)) fail("quantize: the flag for NaN and infinity is wrong");
  expect_equal(want, got, "quantize");
  expect_equal(want_e, got_e, "quantize, exponent");
}

// An input of more than 2^32 bytes, of which a few pixels are read: the rest of the mapping is never touched.
void large_input(Path path) {
  const i64 W = 40000, C = path == Path::direct ? 65536 : 32768, N = path == Path::direct ? 2 : 4, O = 16;
  const i64 bytes = N * W * C, groups = path == Path::direct ? O : 1;
  void* map = mmap(nullptr, static_cast<std::size_t>(bytes), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) fail("no address space");
  auto* x = static_cast<std::uint8_t*>(map);
  const Geometry g{1, 1, 1, W - 1, 0, 0, 1, 1, groups};
  const Block<std::int8_t> weight(C / groups * O);
  for (i64 i = 0; i < weight.count(); ++i) weight[i] = static_cast<std::int8_t>(uniform(-9, 9));
  const Block<std::int32_t> bias(O), threshold(O);
  const Block<std::uint8_t> want(N * 2 * O), got(N * 2 * O);
  for (i64 o = 0; o < O; ++o) threshold[o] = 512 * 80;
  for (i64 pixel = 0; pixel < 2 * N; ++pixel) {
    std::uint8_t* at = x + (pixel / 2 * W + pixel % 2 * (W - 1)) * C;
    for (i64 c = 0; c < C; ++c) at[c] = chance(0.1);
    for (i64 o = 0; o < O; ++o) {
      const i64 first = o / (O / groups) * (C / groups);
      i64 sum = threshold[o] / 2;
      for (i64 c = 0; c < C / groups; ++c) sum += 256 * at[first + c] * weight[c * O + o];
      want[pixel * O + o] = sum >= threshold[o];
    }
  }
  const Product product{{x, Coding::mask, 1, W, C}, weight.data(), 1, 256, g};
  ConvIf a = layer_of(N, 1, 2, O, 1, product);
  a.bias = bias.data();
  a.threshold = threshold.data();
  a.out = got.data();
  const cuda::Launch launch = launch_settings();
  const cuda::Plan plan = cuda::plan_conv_if(a, launch.device);
  if (plan.path != path) fail("the large input took another path");
  Block<std::int8_t> packed(static_cast<i64>(cuda::packed_bytes(g, C, O, 1, false)));
  if (path == Path::tensor_cores && cuda::pack_weight(g, C, O, 1, false, weight.data(), packed.data(), launch) != 0)
    fail("packing");
  const std::int8_t* packed_data = packed.data();
  const Block<std::int32_t> workspace(plan.workspace_bytes() / 4);
  if (cuda::conv_if(a, &packed_data, plan, workspace.data(), launch) != 0) fail("large input");
  munmap(map, static_cast<std::size_t>(bytes));
  i64 spikes = 0;
  for (i64 i = 0; i < want.count(); ++i) spikes += want[i];
  if (spikes == 0 || spikes == want.count()) fail("large input: the test is void");
  expect_equal(want, got, "large input");
}

// What the kernels' counters and parameter arrays cannot hold is refused before any launch, and so is a plan that was
// made for another layer.
void refusals() {
  const auto refused = [](int code, int want, const char* what) {
    if (code != want) fail(std::string(what) + " were not refused, or with another code");
  };
  const Product product{{nullptr, Coding::mask, 1, 1, 64}, nullptr, 2, 1, {1, 1, 1, 1, 0, 0, 1, 1, 1}};
  const ConvIf layer = layer_of(1, 2, 2, 64, 4, product);
  const auto conv_if = [](const ConvIf& a, const cuda::Plan& plan) {
    return cuda::conv_if(a, nullptr, plan, nullptr, {});
  };
  ConvIf a = layer;
  a.batch = 1 << 28;
  refused(conv_if(a, {}), cuda::unsupported, "2^30 pixels");
  Product deep = product;
  deep.x.channels = i64{1} << 30;
  a = layer;
  a.products = &deep;
  refused(conv_if(a, {}), cuda::unsupported, "2^30 inputs");
  const std::vector<Product> many(cuda::max_launch_products + 1, product);
  a.products = many.data();
  a.product_count = cuda::max_launch_products + 1;
  refused(conv_if(a, {}), cuda::unsupported, "too many products");
  Product mixed[2] = {product, product};
  mixed[1].weight_bytes = 1;
  a.products = mixed;
  a.product_count = 2;
  refused(conv_if(a, {}), cuda::unsupported, "weights of two widths");
  const std::vector<Residual> residuals(cuda::max_launch_residuals + 1, Residual{nullptr, Coding::mask, nullptr});
  a = layer;
  a.residuals = residuals.data();
  a.residual_count = cuda::max_launch_residuals + 1;
  refused(conv_if(a, {}), cuda::unsupported, "too many residuals");

  const cuda::Device device = launch_settings().device;
  const cuda::Plan plan = cuda::plan_conv_if(layer, device);
  if (plan.path != Path::tensor_cores) fail("the layer of the refusals takes another path");
  cuda::Plan wrong = plan;
  wrong.splits = wrong.slices = 0;
  refused(conv_if(layer, wrong), cuda::wrong_plan, "no splits");
  wrong.splits = wrong.slices = 2;    // the layer has one stage
  wrong.partial_bytes = 1 << 20;
  refused(conv_if(layer, wrong), cuda::wrong_plan, "splits without work");
  wrong = plan;
  wrong.splits = 16;
  refused(conv_if(layer, wrong), cuda::wrong_plan, "a cluster beyond the largest");
  a = layer;
  a.steps = 9;
  refused(conv_if(a, plan), cuda::wrong_plan, "membranes without memory");
  a = layer;
  a.out_channels = 4;
  refused(conv_if(a, plan), cuda::wrong_plan, "too few outputs for tensor cores");

  const int capability = cuda::emulation::capability;
  cuda::emulation::capability = 90;
  for (const char* without : {"clusters", "dependent-launches"}) {
    cuda::Device d;
    setenv("QCFS_FAST_CUDA_WITHOUT", without, 1);
    cuda::query_device(0, &d);
    unsetenv("QCFS_FAST_CUDA_WITHOUT");
    if ((d.max_cluster > 1) == (without[0] == 'c') || d.dependent == (without[0] == 'd')) fail("not left out");
  }
  cuda::emulation::capability = capability;

  const std::vector<ReadoutTerm> terms(cuda::max_launch_terms + 1, ReadoutTerm{});
  const Readout readout{1, 1, 1, 1, 10, 4, terms.data(), cuda::max_launch_terms + 1, nullptr, nullptr};
  refused(cuda::readout(readout, {}), cuda::unsupported, "too many terms");
  const i64 largest = i64{1} << 30;
  refused(cuda::pack_weight(product.g, largest, 64, 2, false, nullptr, nullptr, {}), cuda::unsupported,
          "2^30 inputs to pack");
  AnalogConv image{};
  image.batch = image.out_h = image.out_w = image.in_h = image.in_w = 1;
  image.in_channels = largest;
  image.out_channels = 64;
  image.g = product.g;
  const std::int8_t packed = 0;
  refused(cuda::analog(image, &packed, {}), cuda::unsupported, "2^30 inputs of an image");
}

// The cost model must keep every plan inside the device: shared memory, no empty split.
void plans() {
  for (const int capability : {75, 80, 86, 89, 90, 100, 120}) {
    const cuda::Device d{capability == 75 ? 40 : 108, capability, capability == 75 ? 65536 : 101376,
                         capability >= 90 ? 8 : 1, false};
    for (const i64 steps : {1, 2, 3, 4, 5, 8}) {
      for (const bool counts : {false, true}) {
        for (const i64 pixels : {1, 49, 12544, 802816}) {
          const cuda::Work w{pixels,     any_of<i64>({16, 64, 512}), any_of<i64>({1, 9, 72}), steps, 2, counts,
                             chance(0.3)};
          const cuda::Choice c = cuda::choose_tile(w, d);
          const auto shape = cuda::tile_shape(cuda::compiled_steps(steps), c.tile);
          const int T = cuda::compiled_steps(steps);
          if (cuda::shared_bytes(shape, T, c.cluster) > static_cast<std::size_t>(d.shared_bytes))
            fail("a tile beyond shared memory");
          if ((c.splits - 1) * cuda::ceil_div(w.stages, c.splits) >= w.stages) fail("a split without work");
          if (c.cluster != (c.splits > 1 && capability >= 90))
            fail("a cluster where there is none, or none where one is");
          if (w.any_width && c.tile == TileKind::wide) fail("a tile that does not take narrow copies");
          if (pixels >= 802816 && c.splits > 1) fail("split-K where the grid fills the GPU many times over");
          if (pixels == 1 && w.stages == 72 && w.out_channels <= 64 && c.splits == 1)
            fail("no split-K for one pixel and a long K");
        }
      }
    }
  }
}

}    // namespace

int main(int argc, char** argv) {
  const auto seed = static_cast<std::uint64_t>(argc > 1 ? std::atoll(argv[1]) : 1);
  const i64 layers = argc > 2 ? std::atoll(argv[2]) : 50, steps = argc > 3 ? std::atoll(argv[3]) : 0;
  const int capability = argc > 4 ? std::atoi(argv[4]) : 0;
  generator.seed(seed);
  cuda::emulation::schedule_seed = seed * 2 + 1;
  if (capability != 0) cuda::emulation::capability = capability;
  plans();
  refusals();
  if (steps == 0) {
    large_input(Path::tensor_cores);
    large_input(Path::direct);
  }
  for (i64 i = 0; i < layers; ++i) {
    cuda::emulation::capability = capability != 0 ? capability : i % 5 == 4 ? 75 : 90;
    spiking_layer(steps);
    analog_layer();
    switch (i % 5) {
      case 0:
        pooling();
        break;
      case 1:
        counting();
        break;
      case 2:
        pooling_counts();
        break;
      case 3:
        reading_out();
        break;
      default:
        quantizing();
    }
  }
  std::printf(
      "layers %lld neurons %lld rate %.4f ties %lld tensor %lld direct %lld split %lld clusters %lld several %lld long "
      "%lld counted "
      "%lld "
      "extreme %lld wide %lld small %lld counts %lld images %lld other %lld states %lld alone %lld plain %lld offset "
      "%lld masked %lld signed %lld sum %lld\n",
      static_cast<long long>(totals.layers), static_cast<long long>(totals.neurons), totals.evidence.rate(),
      static_cast<long long>(totals.evidence.ties), static_cast<long long>(totals.tensor),
      static_cast<long long>(totals.direct), static_cast<long long>(totals.split),
      static_cast<long long>(totals.clusters), static_cast<long long>(totals.several),
      static_cast<long long>(totals.long_runs), static_cast<long long>(totals.counted),
      static_cast<long long>(totals.extreme), static_cast<long long>(totals.tiles[0]),
      static_cast<long long>(totals.tiles[1]), static_cast<long long>(totals.tiles[2]),
      static_cast<long long>(totals.images), static_cast<long long>(totals.other),
      static_cast<long long>(totals.states), static_cast<long long>(totals.alone),
      static_cast<long long>(totals.modes[0]), static_cast<long long>(totals.modes[1]),
      static_cast<long long>(totals.modes[2]), static_cast<long long>(totals.modes[3]),
      static_cast<long long>(totals.modes[4]));
  return 0;
}
