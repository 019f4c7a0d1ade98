// GroupNorm, the residual addition behind it and ReLU, over channels that are interleaved: [images, pixels, channels]
// half, as convolutions of FP16 read and write them (TensorRT's kHWC8). Statistics are float: deviations from a value
// of the group, merged by their means, so that a large mean costs no digits.
//
// Where some channels of all pixels fit into shared memory, a block reads them once. Else blocks share an image: one
// kernel leaves the statistics of their parts, and a second one reads the image again.
#include "group_norm.cuh"

namespace vit {
namespace {

constexpr int kManyThreads = 512;         // of one that keeps much
constexpr int kMuchBytes = 48 * 1024;     // from here on
constexpr int kKeptBytes = 100 * 1024;    // at most: two such blocks share a Hopper's processor
constexpr int kLittleBytes = 32 * 1024;   // a block keeps at least so much where there are blocks enough
constexpr int kEnoughBlocks = 1024;
constexpr int kWantedBlocks = 2048;       // of the kernels that share images
constexpr int kMostParts = 64;            // of an image

// Statistics of parts of `length` pixels: parts of image y in x, of tensor z. found: [tensors, images, parts, kGroups].
template <int kSlots>
__global__ void __launch_bounds__(kThreads)
    group_norm_parts(Operands of, float2* found, int pixels, int length, int channels, int vectors_of_group) {
  __shared__ float2 parts[kThreads * kSlots];
  Place const at(channels / 8);
  int const image = blockIdx.y, first = blockIdx.x * length, end = min(first + length, pixels);
  half const* const from = blockIdx.z == 0 ? of.x[0] : of.x[1];  // an index would put them into memory
  half const* const x[1] = {from + static_cast<int64_t>(image) * pixels * channels + at.vector * 8};
  Seen<kSlots> seen;
  for_pixels(at, x, channels, first, end, [&](int, uint4 const(&bits)[1]) { seen.add(unpacked(bits[0])); });
  float2* to = found + ((static_cast<int64_t>(blockIdx.z) * gridDim.y + image) * gridDim.x + blockIdx.x) * kGroups;
  merge_block<kSlots>(seen, at, channels / 8, vectors_of_group, end - first, parts,
                      [&](int group, float2 const& all) { to[group] = all; });
}

// What these statistics are for, part by part; the last first, as most of it is still in the cache.
template <int kSlots, int kOperands, int kNormalised>
__global__ void __launch_bounds__(kThreads)
    group_norm_apply(Operands of, float2 const* found, half* out, int pixels, int length, int channels,
                 int vectors_of_group, float epsilon) {
  constexpr int kWarps = kThreads / 32, kAll = kNormalised * kGroups;
  __shared__ float3 by_warp[kWarps][kAll];
  __shared__ float2 statistics[kAll];
  Place const at(channels / 8);
  int const count = gridDim.x, image = gridDim.y - 1 - blockIdx.y, first = (count - 1 - blockIdx.x) * length;
  int const each = channels / kGroups, group = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int k = 0; k < kNormalised; ++k) {  // a warp has every how many-th part, of all groups side by side
    float2 const* from = found + (static_cast<int64_t>(k) * gridDim.y + image) * count * kGroups + group;
    float3 own = make_float3(0.0f, 0.0f, 0.0f);
#pragma unroll 4
    for (int part = warp; part < count; part += kWarps) {
      float2 const one = from[part * kGroups];
      int const values = (min(pixels, (part + 1) * length) - part * length) * each;
      own = joined(own, make_float3(one.x, one.y, static_cast<float>(values)));
    }
    by_warp[warp][k * kGroups + group] = own;
  }
  __syncthreads();
  if (threadIdx.x < kAll) {
    float3 all = by_warp[0][threadIdx.x];
    for (int i = 1; i < kWarps; ++i) all = joined(all, by_warp[i][threadIdx.x]);
    statistics[threadIdx.x] = mean_and_factor(make_float2(all.x, all.y), pixels * each, epsilon);
  }
  __syncthreads();
  if (!at.there) return;
  Affine<kSlots, kOperands, kNormalised> const affine(of, at.vector * 8, statistics, kGroups,
                                                      at.vector * kSlots / vectors_of_group);
  int64_t const base = static_cast<int64_t>(image) * pixels * channels + at.vector * 8;
  half const* x[kOperands];
#pragma unroll
  for (int k = 0; k < kOperands; ++k) x[k] = of.x[k] + base;
  for_pixels(at, x, channels, first, min(first + length, pixels), [&](int pixel, uint4 const(&bits)[kOperands]) {
    store_eight(out + base + static_cast<int64_t>(pixel) * channels, affine(bits));
  });
}

// `vectors` vectors of all pixels of an image in each block, which reads what is to be normalised once.
template <int kSlots, int kOperands, int kNormalised>
__global__ void __launch_bounds__(kManyThreads)
    group_norm_kept(Operands of, half* out, int pixels, int channels, int vectors, int vectors_of_group,
                    float epsilon) {
  extern __shared__ __align__(16) int8_t memory[];
  uint4* kept = reinterpret_cast<uint4*>(memory);  // [kNormalised][pixels][vectors], each place its thread's alone
  float2* parts = reinterpret_cast<float2*>(kept + kNormalised * pixels * vectors);
  float2* statistics = parts + blockDim.x * kSlots;
  Place const at(vectors);
  int const groups = vectors * kSlots / vectors_of_group, channel = (blockIdx.x * vectors + at.vector) * 8;
  int64_t const base = static_cast<int64_t>(blockIdx.y) * pixels * channels + channel;
#pragma unroll
  for (int k = 0; k < kNormalised; ++k) {
    half const* const x[1] = {of.x[k] + base};
    uint4* to = kept + k * pixels * vectors + at.vector;
    Seen<kSlots> seen;
    for_pixels(at, x, channels, 0, pixels, [&](int pixel, uint4 const(&bits)[1]) {
      to[pixel * vectors] = bits[0];
      seen.add(unpacked(bits[0]));
    });
    merge_block<kSlots>(seen, at, vectors, vectors_of_group, pixels, parts, [&](int group, float2 const& all) {
      statistics[k * groups + group] = mean_and_factor(all, pixels * (channels / kGroups), epsilon);
    });
    __syncthreads();
  }
  if (!at.there) return;
  Affine<kSlots, kOperands, kNormalised> const affine(of, channel, statistics, groups,
                                                      at.vector * kSlots / vectors_of_group);
  auto const put = [&](int pixel, uint4 const(&bits)[kOperands]) {
    store_eight(out + base + static_cast<int64_t>(pixel) * channels, affine(bits));
  };
  uint4 const* from = kept + at.vector;
  if constexpr (kOperands > kNormalised) {
    half const* const x[1] = {of.x[1] + base};
    for_pixels(at, x, channels, 0, pixels, [&](int pixel, uint4 const(&bits)[1]) {
      put(pixel, {from[pixel * vectors], bits[0]});
    });
  } else {
    for (int pixel = at.row; pixel < pixels; pixel += at.rows) {
      uint4 bits[kOperands];
#pragma unroll
      for (int k = 0; k < kOperands; ++k) bits[k] = from[(k * pixels + pixel) * vectors];
      put(pixel, bits);
    }
  }
}

struct Launch {
  GroupNorm const& p;
  Operands of;
  cudaStream_t stream;
  int vectors_of_group;  // 1 where a vector has channels of several
};

// How many vectors of all pixels a block keeps: whole groups, 128 bytes of a pixel or more where there are so many.
int kept_vectors(GroupNorm const& p, int vectors_of_group, int normalised) {
  int const all = p.channels / 8;
  auto const bytes = [&](int vectors) { return static_cast<int64_t>(normalised) * p.pixels * vectors * 16; };
  int vectors = vectors_of_group;
  while (all % (2 * vectors) == 0 &&
         (vectors < 8 || (bytes(2 * vectors) <= kLittleBytes && 2 * vectors <= kThreads &&
                          static_cast<int64_t>(p.images) * (all / (2 * vectors)) >= kEnoughBlocks))) {
    vectors *= 2;
  }
  return vectors;
}

template <int kSlots, int kOperands, int kNormalised>
cudaError_t keep(Launch const& to, int vectors) {
  GroupNorm const& p = to.p;
  int const kept = kNormalised * p.pixels * vectors * 16;
  int const threads = kept > kMuchBytes ? kManyThreads : kThreads;
  int const groups = vectors * kSlots / to.vectors_of_group;
  int const bytes = kept + (threads * kSlots + kNormalised * groups) * static_cast<int>(sizeof(float2));
  auto const kernel = group_norm_kept<kSlots, kOperands, kNormalised>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch is blamed for it
    return error;
  }
  kernel<<<dim3(p.channels / 8 / vectors, p.images), threads, bytes, to.stream>>>(
      to.of, static_cast<half*>(p.out), p.pixels, p.channels, vectors, to.vectors_of_group, p.epsilon);
  return cudaGetLastError();
}

template <int kSlots, int kOperands, int kNormalised>
cudaError_t share(Launch const& to) {
  GroupNorm const& p = to.p;
  int const step = kThreads / (p.channels / 8) * kTogether;  // pixels that a block has under way
  int const wanted = min(min((kWantedBlocks + p.images - 1) / p.images, kMostParts), (p.pixels + step - 1) / step);
  int const length = (p.pixels + wanted - 1) / wanted, count = (p.pixels + length - 1) / length;
  float2* found = static_cast<float2*>(p.workspace);
  group_norm_parts<kSlots><<<dim3(count, p.images, kNormalised), kThreads, 0, to.stream>>>(
      to.of, found, p.pixels, length, p.channels, to.vectors_of_group);
  if (cudaError_t const error = cudaGetLastError(); error != cudaSuccess) return error;
  group_norm_apply<kSlots, kOperands, kNormalised><<<dim3(count, p.images), kThreads, 0, to.stream>>>(
      to.of, found, static_cast<half*>(p.out), p.pixels, length, p.channels, to.vectors_of_group, p.epsilon);
  return cudaGetLastError();
}

template <int kSlots, int kOperands, int kNormalised>
cudaError_t launch(Launch const& to) {
  int const vectors = kept_vectors(to.p, to.vectors_of_group, kNormalised);
  if (static_cast<int64_t>(kNormalised) * to.p.pixels * vectors * 16 <= kKeptBytes) {
    // a smaller GPU may not have so much
    if (keep<kSlots, kOperands, kNormalised>(to, vectors) == cudaSuccess) return cudaSuccess;
  }
  return share<kSlots, kOperands, kNormalised>(to);
}

template <int kSlots>
cudaError_t interleaved(GroupNorm const& p, cudaStream_t stream) {
  Launch const to{p,
                  {{static_cast<half const*>(p.x), static_cast<half const*>(p.residual)},
                   {p.gamma, p.residual_gamma},
                   {p.beta, p.residual_beta}},
                  stream,
                  kSlots > 1 ? 1 : p.channels / kGroups / 8};
  if (p.residual == nullptr) return launch<kSlots, 1, 1>(to);
  return p.residual_gamma == nullptr ? launch<kSlots, 2, 1>(to) : launch<kSlots, 2, 2>(to);
}

}  // namespace

size_t group_norm_workspace(int images) {
  size_t const parts = static_cast<size_t>(kWantedBlocks) + images;  // of all images: these rounded up for each
  return 2 * parts * kGroups * sizeof(float2);
}

cudaError_t run(GroupNorm const& p, cudaStream_t stream) {
  int const each = p.channels / kGroups;
  if (p.channels % kGroups != 0 || each < 1 || p.pixels < 1 || p.images < 1 || p.images > 65535) {
    return cudaErrorInvalidValue;
  }
  if (!p.interleaved) return run_planes(p, stream);
  if (p.type != Type::kHalf || !interleaves(p.channels)) return cudaErrorInvalidValue;
  switch (each) {
    case 1: return interleaved<8>(p, stream);
    case 2: return interleaved<4>(p, stream);
    case 4: return interleaved<2>(p, stream);
    default: return interleaved<1>(p, stream);
  }
}

}  // namespace vit

// For tests without TensorRT, as in attention.cu.
extern "C" int vit_group_norm(void const* x, void const* residual, void* out, float const* gamma, float const* beta,
                              float const* residual_gamma, float const* residual_beta, int type, int interleaved,
                              int images, int pixels, int channels, float epsilon, void* workspace) {
  vit::GroupNorm const p{x, residual, out, gamma, beta, residual_gamma, residual_beta, static_cast<vit::Type>(type),
                         interleaved != 0, images, pixels, channels, epsilon, workspace};
  return static_cast<int>(vit::run(p, nullptr));
}

extern "C" long long vit_group_norm_workspace(int images) {
  return static_cast<long long>(vit::group_norm_workspace(images));
}
