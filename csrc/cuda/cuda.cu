// The native CUDA API: turns the contract's structs into kernel parameters and queues the launches. The same file,
// compiled by g++ over emulation/, runs them on the CPU.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cuda/cuda.h"
#include "cuda/device.h"
#include "cuda/kernels/elementwise.h"
#include "cuda/kernels/image_direct.h"
#include "cuda/kernels/image_tensor.h"
#include "cuda/kernels/parameters.h"
#include "cuda/kernels/readout.h"
#include "cuda/kernels/step_kernels.h"
#include "cuda/kernels/tensor_layout.h"

namespace qcfs::cuda {

namespace {

const StepKernels& step_kernels(int T) {
  switch (T) {
    case 1:
      return steps_1;
    case 2:
      return steps_2;
    case 4:
      return steps_4;
    default:
      return steps_8;
  }
}

// Few inputs or outputs: padding to the tensor cores' 16 x 8 x 32 would be most of the work.
bool suits_tensor_cores(const ConvIf& a) {
  std::int64_t inputs = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    if (p.g.groups != 1) return false;
    if (p.x.channels >= 8) inputs += p.g.kernel_h * p.g.kernel_w * p.x.channels;
  }
  return inputs >= 32 && a.out_channels >= 8;
}

// The kernels count these in 32 bits: pixels, K (inputs x taps), channels. Addresses have 64 bits.
constexpr std::int64_t max_pixels = std::int64_t{1} << 30, max_k = std::int64_t{1} << 30;
constexpr std::int64_t max_channels = std::int64_t{1} << 19;

int piece_of(bool image) { return image ? image_piece : piece_bytes; }

bool fits(const Geometry& g) {
  for (const std::int64_t n :
       {g.kernel_h, g.kernel_w, g.stride_h, g.stride_w, g.pad_h, g.pad_w, g.dilation_h, g.dilation_w, g.groups}) {
    if (n > 0xffff) return false;
  }
  return true;
}

// The arrays of LayerParams, the 32-bit counters, and the one weight width that a launch has.
bool fits(const ConvIf& a) {
  if (a.product_count > max_launch_products || a.residual_count > max_launch_residuals ||
      a.out_channels >= max_channels)
    return false;
  std::int64_t k = 0;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    if (!fits(p.g) || p.weight_bytes != a.products[0].weight_bytes) return false;
    // The factor leaves room for coordinates under taps that lie in the padding.
    if (p.x.height * p.x.width * 4 >= max_pixels) return false;
    k += p.g.kernel_h * p.g.kernel_w * ceil_div(p.x.channels, piece_bytes) * piece_bytes + stage_bytes;
  }
  return a.batch * a.out_h * a.out_w < max_pixels && k < max_k;
}

// int32 values that a neuron carries from launch to launch.
int carried(const ConvIf& a) {
  if (a.steps <= 8) return 0;
  return a.neuron.mode == Mode::masked || a.neuron.mode == Mode::with_sign ? 2 : 1;
}

// Whether the plan is one of this layer's: another layer's could mean too small a workspace or weights in another
// order.
bool fits(const ConvIf& a, const Plan& plan, const Device& device) {
  const std::int64_t outputs = a.batch * a.out_h * a.out_w * a.out_channels, steps = a.steps < 8 ? a.steps : 8;
  std::int64_t stages = 0;
  for (int i = 0; i < a.product_count; ++i) {
    stages += stages_of(a.products[i].g.kernel_h * a.products[i].g.kernel_w, a.products[i].x.channels);
  }
  if (plan.splits < 1 || (plan.slices != 0 && (plan.splits == 1 || plan.slices != plan.splits))) return false;
  if (plan.cluster() > (device.max_cluster > 1 ? device.max_cluster : 1)) return false;
  if (plan.membrane_bytes < carried(a) * outputs * 4) return false;
  if (plan.partial_bytes < plan.slices * steps * outputs * 4) return false;
  if (plan.path == Path::direct) return plan.splits == 1;
  return suits_tensor_cores(a) && (plan.splits - 1) * ceil_div(stages, plan.splits) < stages;    // no split is empty
}

std::uint8_t widest_copy(const void* data, std::int64_t channels) {
  const auto address = reinterpret_cast<std::uintptr_t>(data) | static_cast<std::uintptr_t>(channels);
  return address % 16 == 0 ? 16 : address % 4 == 0 ? 4 : 1;
}

// Whether `width` neighbouring channels are one access in all of these [.., C].
bool are_aligned(int width, std::int64_t channels, std::initializer_list<const std::int32_t*> words,
                 std::initializer_list<const std::uint8_t*> bytes) {
  const auto n = static_cast<std::uintptr_t>(width);
  std::uintptr_t low = static_cast<std::uintptr_t>(channels) % n;
  for (const void* p : words) low |= reinterpret_cast<std::uintptr_t>(p) % (4 * n);
  for (const void* p : bytes) low |= reinterpret_cast<std::uintptr_t>(p) % n;
  return low == 0;
}

// Whether fire_pair may end a launch. In sum mode, which has one step, the residual may be counts.
bool is_simple(const LayerParams& p) {
  if (p.mode != Mode::sum && (p.mode != Mode::plain || p.held)) return false;
  if (p.current != nullptr || p.bias_step != 0) return false;
  if (p.state_out != nullptr && p.steps != compiled_steps(p.steps)) return false;    // it runs all compiled steps
  const ResidualParams r = p.residual_count > 0 ? p.residuals[0] : ResidualParams{};
  if (p.residual_count > 1 || (p.residual_count == 1 && r.count != (p.mode == Mode::sum))) return false;
  return are_aligned(2, p.out_channels, {p.bias, p.threshold, r.amplitude, p.state_in, p.state_out}, {p.out, r.data});
}

}    // namespace

Plan plan_conv_if(const ConvIf& a, const Device& device) {
  Plan plan{Path::direct, TileKind::small, 1, 0, 0, 0};
  const std::int64_t outputs = a.batch * a.out_h * a.out_w * a.out_channels;
  plan.membrane_bytes = carried(a) * outputs * 4;
  if (!suits_tensor_cores(a)) return plan;
  plan.path = Path::tensor_cores;
  Work w{a.batch * a.out_h * a.out_w, a.out_channels, 0, a.steps < 8 ? a.steps : 8, 1, false, false};
  for (int i = 0; i < a.product_count; ++i) {
    const Product& p = a.products[i];
    w.stages += stages_of(p.g.kernel_h * p.g.kernel_w, p.x.channels);
    w.counts |= p.x.coding == Coding::count;
    w.any_width |= p.x.channels % piece_bytes != 0;
    w.digits = p.weight_bytes;
  }
  const Choice c = choose_tile(w, device);
  plan.tile = c.tile;
  plan.splits = c.splits;
  if (c.splits > 1 && !c.cluster) {
    plan.slices = plan.splits;
    plan.partial_bytes = plan.slices * w.steps * outputs * 4;
  }
  return plan;
}

int conv_if(const ConvIf& a, const std::int8_t* const* packed, const Plan& plan, void* workspace,
            const Launch& launch) {
  if (!fits(a)) return unsupported;
  if (!fits(a, plan, launch.device)) return wrong_plan;
  if (a.batch == 0) return ok;
  LayerParams p{};
  p.batch = static_cast<std::int32_t>(a.batch);
  p.out_h = static_cast<std::int32_t>(a.out_h);
  p.out_w = static_cast<std::int32_t>(a.out_w);
  p.out_channels = static_cast<std::int32_t>(a.out_channels);
  p.pixels = p.batch * p.out_h * p.out_w;
  p.product_count = a.product_count;
  p.residual_count = a.residual_count;
  p.digits = a.product_count > 0 ? a.products[0].weight_bytes : 2;
  p.padded_out = static_cast<std::int32_t>(padded_channels(a.out_channels));
  p.mode = a.neuron.mode;
  p.window = a.neuron.window;
  p.iterations = a.neuron.iterations;
  p.levels = a.neuron.levels;
  p.held = image_alone(a);
  if (a.steps > 1) {    // one step has the same operands at every step, which sum mode counts `levels` times
    p.current_step = a.current_step;
    p.bias_step = a.bias_step;
  }
  p.threshold = a.threshold;
  const std::int64_t plane = static_cast<std::int64_t>(p.pixels) * p.out_channels;
  for (int i = 0; i < a.product_count; ++i) {
    const Product& from = a.products[i];
    const Geometry& g = from.g;
    const auto u16 = [](std::int64_t n) { return static_cast<std::uint16_t>(n); };
    ProductParams& q = p.products[i];
    q.height = static_cast<std::int32_t>(from.x.height);
    q.width = static_cast<std::int32_t>(from.x.width);
    q.channels = static_cast<std::int32_t>(from.x.channels);
    q.kernel_h = u16(g.kernel_h);
    q.kernel_w = u16(g.kernel_w);
    q.stride_h = u16(g.stride_h);
    q.stride_w = u16(g.stride_w);
    q.pad_h = u16(g.pad_h);
    q.pad_w = u16(g.pad_w);
    q.dilation_h = u16(g.dilation_h);
    q.dilation_w = u16(g.dilation_w);
    q.groups = u16(g.groups);
    q.count = from.x.coding == Coding::count;
    q.negative = from.scale < 0;
    q.exponent = from.scale == 1 || from.scale == -1 ? 0 : from.scale == 256 || from.scale == -256 ? 1 : 2;
    q.weight = plan.path == Path::tensor_cores ? packed[i] : from.weight;
    p.stages += stages_of(g.kernel_h * g.kernel_w, from.x.channels);
  }
  p.split_stages = static_cast<std::int32_t>(ceil_div(p.stages, plan.splits));
  p.slices = plan.slices;
  p.cluster = plan.cluster();
  std::int32_t* carry = static_cast<std::int32_t*>(workspace);
  std::int32_t* partial = reinterpret_cast<std::int32_t*>(static_cast<char*>(workspace) + plan.membrane_bytes);
  for (std::int64_t t = 0; t < a.steps; t += 8) {
    p.steps = static_cast<std::int32_t>(a.steps - t < 8 ? a.steps - t : 8);
    p.state_in = t > 0 ? carry : a.state;
    p.state_out = t + 8 < a.steps ? carry : a.state_out;
    p.current = a.current == nullptr ? nullptr : a.current + t * a.current_step;
    p.bias = a.bias + t * a.bias_step;
    p.partial = plan.slices > 0 ? partial : nullptr;
    p.out = a.out + t / 8 * plane;
    if (p.mode == Mode::with_sign) p.negative = p.out + ceil_div(a.steps, 8) * plane;
    p.wide_out = widest_copy(p.out, a.out_channels) == 16;
    for (int i = 0; i < a.product_count; ++i) {
      const Spikes& x = a.products[i].x;
      const std::int64_t in_plane = a.batch * x.height * x.width * x.channels;
      p.products[i].x = x.data + (x.coding == Coding::count ? t : t / 8) * in_plane;
      // Every plane of a launch must be as aligned as the first; in_plane is a multiple of C.
      p.products[i].copy_bytes = widest_copy(p.products[i].x, x.channels);
    }
    for (int i = 0; i < a.residual_count; ++i) {
      const Residual& r = a.residuals[i];
      const bool count = r.coding == Coding::count;
      p.residuals[i] = {r.data + (count ? t : t / 8) * plane, r.amplitude, count};
    }
    p.simple = is_simple(p);
    const int T = compiled_steps(p.steps);
    const StepKernels& k = step_kernels(T);
    int code = ok;
    if (a.product_count == 0) {
      code = k.epilogue(p, launch);
    } else if (plan.path == Path::direct) {
      code = k.direct(p, launch);
    } else {
      // The last launch of a layer with counts may have one step. Every tile then loads one plane, and `counts` is
      // none.
      const TileKind tile = T == 1 && plan.tile == TileKind::counts ? TileKind::wide : plan.tile;
      code = k.tensor(p, tile, plan.splits, launch);
      if (code == ok && plan.slices > 0) code = k.epilogue(p, launch);
    }
    if (code != ok) return code;
  }
  return ok;
}

std::size_t packed_bytes(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes,
                         bool image) {
  return static_cast<std::size_t>(weight_bytes * stages_of(g.kernel_h * g.kernel_w, channels, piece_of(image)) *
                                  padded_channels(out_channels) * stage_bytes);
}

int pack_weight(const Geometry& g, std::int64_t channels, std::int64_t out_channels, int weight_bytes, bool image,
                const void* weight, std::int8_t* packed, const Launch& launch) {
  if (!fits(g) || g.kernel_h * g.kernel_w * channels >= max_k || out_channels >= max_k) return unsupported;
  PackParams p{weight,
               packed,
               static_cast<std::int32_t>(g.kernel_h * g.kernel_w),
               static_cast<std::int32_t>(channels),
               static_cast<std::int32_t>(out_channels),
               static_cast<std::int32_t>(padded_channels(out_channels)),
               stages_of(g.kernel_h * g.kernel_w, channels, piece_of(image)),
               weight_bytes,
               piece_of(image)};
  const std::int64_t plane = static_cast<std::int64_t>(p.stages) * p.padded_out * stage_bytes;
  const int code = launch_elements(pack_kernel, plane, launch.stream, p);
  // A spiking layer reads packed weights before the launch before it has ended (conv_if_kernel): let that be this one.
  return code == ok ? launch_kernel(empty_kernel, Grid{1}, 32, 0, launch.stream, Empty{}) : code;
}

bool analog_on_tensor_cores(const Geometry& g, std::int64_t channels, std::int64_t out_channels) {
  const std::int64_t k = g.kernel_h * g.kernel_w * channels;
  return fits(g) && g.groups == 1 && out_channels >= 8 && k >= 8 && k <= max_image_k;
}

int analog(const AnalogConv& a, const std::int8_t* packed, const Launch& launch) {
  if (a.out_channels >= max_k) return unsupported;
  if (packed == nullptr) {
    const ImageDirectParams p{a, ceil_div(a.out_w, direct_pixels),
                              ceil_div(a.out_channels / a.g.groups, direct_channels) * a.g.groups};
    const std::int64_t threads = a.batch * a.out_h * p.col_blocks * p.channel_blocks;
    return launch_kernel(image_direct_kernel, Grid{ceil_div(threads, image_direct_threads)}, image_direct_threads, 0,
                         launch.stream, p, after_launch_before(launch));
  }
  const std::int64_t pixels = a.batch * a.out_h * a.out_w;
  if (!analog_on_tensor_cores(a.g, a.in_channels, a.out_channels)) return unsupported;
  if (pixels >= max_pixels) return unsupported;
  // An offset from a pixel to its farthest tap has 32 bits.
  const std::int64_t reach = (a.in_h + 2 * a.g.pad_h) * (a.in_w + 2 * a.g.pad_w);
  if (reach >= max_pixels || reach * a.in_channels >= max_pixels) return unsupported;
  if (a.batch == 0) return ok;
  const std::int32_t pieces = pieces_per_tap(a.in_channels, image_piece);
  const std::int64_t padded_out = padded_channels(a.out_channels), taps = a.g.kernel_h * a.g.kernel_w;
  const ImageTensorParams p{a,
                            packed,
                            stages_of(taps, a.in_channels, image_piece) * padded_out * stage_bytes,
                            static_cast<std::int32_t>(ceil_div(taps * pieces, image_stage_pieces / 2)),
                            pieces,
                            static_cast<std::int32_t>(padded_out),
                            are_aligned(4, a.out_channels, {a.out_current}, {a.out_mask})};
  const Grid grid{ceil_div(pixels, image_rows), ceil_div(a.out_channels, image_cols)};
  return launch_kernel(image_tensor_kernel, grid, image_tensor_threads, image_shared, launch.stream, p,
                       after_launch_before(launch));
}

int pool(const Pool& a, const Launch& launch) {
  const std::int64_t planes = a.coding == Coding::mask ? ceil_div(a.steps, 8) : a.steps;
  const PoolParams p{a, byte_row(a.channels, a.x, a.out), planes};
  return launch_elements(pool_kernel, planes * a.batch * a.out_h * a.out_w * p.channels.quads, launch.stream, p,
                         after_launch_before(launch));
}

int pool_counts(const PoolCounts& a, const Launch& launch) {
  return launch_elements(pool_counts_kernel, a.images * a.out_h * a.out_w * a.channels, launch.stream, a,
                         after_launch_before(launch));
}

int count(const Count& a, const Launch& launch) {
  const CountParams p{a, byte_row(a.elements, a.x, a.x)};
  return launch_elements(count_kernel, p.row.quads, launch.stream, p, after_launch_before(launch));
}

int readout(const Readout& a, const Launch& launch) {
  if (a.term_count > max_launch_terms) return unsupported;
  ReadoutParams p{};
  p.images = a.images;
  p.samples = a.samples;
  p.out_h = a.out_h;
  p.out_w = a.out_w;
  p.out_channels = a.out_channels;
  p.steps = a.steps;
  p.term_count = a.term_count;
  p.offset = a.offset;
  p.out = a.out;
  for (int i = 0; i < a.term_count; ++i) p.terms[i] = a.terms[i];
  const Grid grid{a.images * a.out_h * a.out_w, ceil_div(a.out_channels, readout_channels)};
  constexpr int threads = readout_channels * readout_parts;
  return launch_kernel(readout_kernel, grid, threads, threads * sizeof(std::int64_t), launch.stream, p,
                       after_launch_before(launch));
}

int quantize(const Quantize& a, std::uint32_t* workspace, const Launch& launch) {
  int size = 0;
  while ((a.largest >> size) != 0) ++size;
  const QuantizeParams p{a, size, workspace};
  const Grid grid{a.batch * ceil_div(a.height * a.width, elementwise_threads)};
  int code = clear_words(workspace, static_cast<std::size_t>(a.batch + 1), launch.stream);
  if (code == ok) {
    constexpr std::size_t shared = elementwise_warps * sizeof(std::uint32_t);
    code = launch_kernel(largest_kernel, grid, elementwise_threads, shared, launch.stream, p);
  }
  if (code == ok)
    code = launch_kernel(quantize_kernel, grid, elementwise_threads, 0, launch.stream, p, after_launch_before(launch));
  return code;
}

const char* describe(int code) {
  if (code == ok) return "no error";
  if (code == unsupported) return "more sources, larger sizes or other weights than the CUDA kernels take";
  if (code == wrong_plan) return "the plan is not one of this layer";
#if defined(__CUDACC__)
  return cudaGetErrorString(static_cast<cudaError_t>(code));
#else
  return "an error of the CUDA runtime";
#endif
}

namespace {

// Whether the environment's list QCFS_FAST_CUDA_WITHOUT names something that a GPU could do.
bool is_left_out(const char* what) {
  const char* list = std::getenv("QCFS_FAST_CUDA_WITHOUT");
  return list != nullptr && std::strstr(list, what) != nullptr;
}

}    // namespace

#if defined(__CUDACC__)

int device_count(int* count) { return cudaGetDeviceCount(count); }

int current_device(int* index) { return cudaGetDevice(index); }

int query_device(int index, Device* device) {
  const auto attribute = [&](cudaDeviceAttr a, int* value) { return cudaDeviceGetAttribute(value, a, index); };
  int major = 0, minor = 0;
  cudaFuncAttributes kernel{};
  cudaError_t e = attribute(cudaDevAttrMultiProcessorCount, &device->multiprocessors);
  if (e == cudaSuccess) e = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &device->shared_bytes);
  if (e == cudaSuccess) e = attribute(cudaDevAttrComputeCapabilityMajor, &major);
  if (e == cudaSuccess) e = attribute(cudaDevAttrComputeCapabilityMinor, &minor);
  if (e == cudaSuccess) e = cudaFuncGetAttributes(&kernel, pack_kernel);    // all kernels have the same architectures
  device->capability = 10 * major + minor;
  // A 9.0 GPU may run PTX of compute_80, which has neither.
  const bool hopper = device->capability >= 90 && kernel.ptxVersion >= 90;
  device->max_cluster = 1;
  if (e == cudaSuccess && hopper && !is_left_out("clusters")) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(1, 1, 8);
    config.blockDim = dim3(128);
    e = cudaOccupancyMaxPotentialClusterSize(&device->max_cluster, pack_kernel, &config);
    if (device->max_cluster > 8) device->max_cluster = 8;
  }
  int driver = 0, runtime = 0;
  if (e == cudaSuccess) e = cudaDriverGetVersion(&driver);
  if (e == cudaSuccess) e = cudaRuntimeGetVersion(&runtime);
  // Graphs have edges for them since 12.3.
  device->dependent = hopper && driver >= 12030 && runtime >= 12030 && !is_left_out("dependent-launches");
  return e;
}

#else

int device_count(int* count) {
  *count = 1;
  return ok;
}

int current_device(int* index) {
  *index = 0;
  return ok;
}

int query_device(int, Device* device) {
  const bool hopper = emulation::capability >= 90;
  *device = {132, emulation::capability, 227 * 1024, 1, false};
  device->max_cluster = hopper && !is_left_out("clusters") ? 8 : 1;
  device->dependent = hopper && !is_left_out("dependent-launches");
  return ok;
}

#endif

}    // namespace qcfs::cuda
