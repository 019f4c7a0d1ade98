// GroupNorm as group_norm.cu has it, where every channel is a plane of its own: for engines that are not of FP16
// throughout. A group's values lie behind each other.
#include "group_norm.cuh"

namespace vit {
namespace {

__device__ inline float sum_over_block(float x) {
  __shared__ float sums[kThreads / 32];
  x = sum_over_warp(x);
  __syncthreads();  // of an earlier sum all is read
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  float total = 0.0f;
  for (int i = 0; i < kThreads / 32; ++i) total += sums[i];
  return total;
}

// Of values that lie behind each other: {mean, factor}.
template <typename T>
__device__ inline float2 statistics_of(T const* x, int values, float epsilon) {
  float const shift = static_cast<float>(x[0]);
  float sum = 0.0f, squares = 0.0f;
  for (int i = threadIdx.x; i < values; i += kThreads) sum += static_cast<float>(x[i]) - shift;
  float const mean = shift + sum_over_block(sum) / values;
  for (int i = threadIdx.x; i < values; i += kThreads) {
    float const d = static_cast<float>(x[i]) - mean;
    squares = fmaf(d, d, squares);
  }
  return mean_and_factor(make_float2(mean, sum_over_block(squares)), values, epsilon);
}

// A group of an image in each block, where channels are not interleaved: for engines that are not of FP16 throughout.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    group_norm_planes(GroupNorm p) {
  int const each = p.channels / kGroups, values = each * p.pixels;
  int64_t const base = (static_cast<int64_t>(blockIdx.y) * kGroups + blockIdx.x) * values;
  T const *x = static_cast<T const*>(p.x) + base, *residual = static_cast<T const*>(p.residual) + base;
  float2 const own = statistics_of(x, values, p.epsilon);
  float2 const other = p.residual_gamma != nullptr ? statistics_of(residual, values, p.epsilon) : own;
  for (int i = threadIdx.x; i < values; i += kThreads) {
    int const channel = blockIdx.x * each + i / p.pixels;
    float y = fmaf((static_cast<float>(x[i]) - own.x) * own.y, p.gamma[channel], p.beta[channel]);
    if (p.residual_gamma != nullptr) {
      y += fmaf((static_cast<float>(residual[i]) - other.x) * other.y, p.residual_gamma[channel],
                p.residual_beta[channel]);
    } else if (p.residual != nullptr) {
      y += static_cast<float>(residual[i]);
    }
    (static_cast<T*>(p.out) + base)[i] = static_cast<T>(y < 0.0f ? 0.0f : y);
  }
}

}  // namespace

cudaError_t run_planes(GroupNorm const& p, cudaStream_t stream) {
  if (p.type == Type::kInt8) return cudaErrorInvalidValue;
  auto const kernel = p.type == Type::kFloat ? group_norm_planes<float> : group_norm_planes<half>;
  kernel<<<dim3(kGroups, p.images), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace vit
