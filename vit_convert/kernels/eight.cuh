// Eight values at a time, 16 bytes of halves.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace vit {
namespace {

struct Eight {
  float x[8];
};

__device__ inline Eight load_eight(float const* p) {
  float4 const a = reinterpret_cast<float4 const*>(p)[0], b = reinterpret_cast<float4 const*>(p)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__device__ inline Eight unpacked(uint4 bits) {
  half2 const* pairs = reinterpret_cast<half2 const*>(&bits);
  Eight y;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 const pair = __half22float2(pairs[i]);
    y.x[2 * i] = pair.x;
    y.x[2 * i + 1] = pair.y;
  }
  return y;
}

__device__ inline Eight load_eight(half const* p) { return unpacked(*reinterpret_cast<uint4 const*>(p)); }

__device__ inline void store_eight(half* p, Eight const& y) {
  uint4 bits;
  half2* pairs = reinterpret_cast<half2*>(&bits);
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(y.x[2 * i], y.x[2 * i + 1]);
  *reinterpret_cast<uint4*>(p) = bits;
}

__device__ inline float sum_over_warp(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

}  // namespace
}  // namespace vit
