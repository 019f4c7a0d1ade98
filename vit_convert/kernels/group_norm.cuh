// Parts of GroupNorm over interleaved channels: what a thread sees, how that is merged, and what becomes of a value.
#pragma once

#include <cstdint>

#include "eight.cuh"
#include "encoder.h"

namespace vit {
namespace {

constexpr int kThreads = 256;  // of a block
constexpr int kTogether = 4;   // loads of a thread under way at a time

// Of two tensors whose sum is wanted the second has no gamma where it is added as it is.
struct Operands {
  half const* x[2];
  float const* gamma[2];
  float const* beta[2];
};

// A thread's eight channels, and every how many-th pixel is its own.
struct Place {
  int vector, row, rows;
  bool there;  // else the block has more threads than places

  __device__ explicit Place(int vectors)
      : vector(threadIdx.x % vectors),
        row(threadIdx.x / vectors),
        rows(blockDim.x / vectors),
        there(row < rows) {}
};

__device__ inline int pixels_of_row(int pixels, int row, int rows) { return (pixels - row + rows - 1) / rows; }

// What a thread has seen of the kSlots groups that its eight channels belong to.
template <int kSlots>
struct Seen {
  static constexpr int kEach = 8 / kSlots;
  float shift[kSlots] = {}, sum[kSlots] = {}, squares[kSlots] = {};
  int pixels = 0;

  __device__ inline void add(Eight const& x) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      shift[slot] = pixels == 0 ? x.x[slot * kEach] : shift[slot];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        float const d = x.x[slot * kEach + i] - shift[slot];
        sum[slot] += d;
        squares[slot] = fmaf(d, d, squares[slot]);
      }
    }
    ++pixels;
  }

  // The mean, and the sum of squared deviations from it.
  __device__ inline float2 part(int slot) const {
    if (pixels == 0) return make_float2(0.0f, 0.0f);
    float const mean = sum[slot] / (pixels * kEach);
    return make_float2(shift[slot] + mean, squares[slot] - sum[slot] * mean);
  }
};

// The same of all values of some parts, by one warp. part(i): {mean, squared deviations, values}.
template <typename Part>
__device__ inline float2 merged(int count, Part part) {
  int const lane = threadIdx.x % 32;
  float values = 0.0f, total = 0.0f;
  for (int i = lane; i < count; i += 32) {
    float3 const p = part(i);
    values += p.z;
    total = fmaf(p.z, p.x, total);
  }
  float const mean = sum_over_warp(total) / sum_over_warp(values);
  float squares = 0.0f;
  for (int i = lane; i < count; i += 32) {
    float3 const p = part(i);
    float const d = p.x - mean;
    squares += fmaf(p.z * d, d, p.y);
  }
  return make_float2(mean, sum_over_warp(squares));
}

// The same of all values of two parts: {mean, squared deviations, values}.
__device__ inline float3 joined(float3 const& a, float3 const& b) {
  float const values = a.z + b.z, d = b.x - a.x, share = b.z / fmaxf(values, 1.0f);
  return make_float3(fmaf(d, share, a.x), a.y + fmaf(d * d, a.z * share, b.y), values);
}

// Merges what the threads of a block have seen of `vectors` vectors of `pixels` pixels; done(group, {mean, squared
// deviations}) is called once for each group. parts: [blockDim · kSlots] in shared memory, free for others after the
// next barrier.
template <int kSlots, typename Done>
__device__ inline void merge_block(Seen<kSlots> const& seen, Place const& at, int vectors, int vectors_of_group,
                                   int pixels, float2* parts, Done done) {
  int const count = at.rows * vectors_of_group;  // of parts of a group
  if (at.there) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      int const group = at.vector * kSlots / vectors_of_group + slot;
      parts[group * count + at.vector % vectors_of_group * at.rows + at.row] = seen.part(slot);
    }
  }
  __syncthreads();
  for (int group = threadIdx.x / 32; group < vectors * kSlots / vectors_of_group; group += blockDim.x / 32) {
    float2 const found = merged(count, [&](int i) {
      float2 const part = parts[group * count + i];
      int const values = pixels_of_row(pixels, i % at.rows, at.rows) * Seen<kSlots>::kEach;
      return make_float3(part.x, part.y, static_cast<float>(values));
    });
    if (threadIdx.x % 32 == 0) done(group, found);
  }
}

__device__ inline float2 mean_and_factor(float2 const& found, int values, float epsilon) {
  return make_float2(found.x, rsqrtf(fmaxf(found.y, 0.0f) / values + epsilon));
}

// relu(Σ (x - mean) · factor + offset) of a thread's eight channels: the difference first, as a small spread makes a
// large factor.
template <int kSlots, int kOperands, int kNormalised>
struct Affine {
  static constexpr int kEach = 8 / kSlots;
  float mean[kNormalised][kSlots], factor[kNormalised][8], offset[8] = {};

  // statistics: [kNormalised][groups] {mean, factor}, of the block's groups; channel and group: the thread's first
  __device__ inline Affine(Operands const& of, int channel, float2 const* statistics, int groups, int group) {
#pragma unroll
    for (int k = 0; k < kNormalised; ++k) {
      Eight const gamma = load_eight(of.gamma[k] + channel), beta = load_eight(of.beta[k] + channel);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float2 const s = statistics[k * groups + group + i / kEach];
        mean[k][i / kEach] = s.x;
        factor[k][i] = s.y * gamma.x[i];
        offset[i] += beta.x[i];
      }
    }
  }

  __device__ inline Eight operator()(uint4 const (&bits)[kOperands]) const {
    Eight y;
#pragma unroll
    for (int i = 0; i < 8; ++i) y.x[i] = offset[i];
#pragma unroll
    for (int k = 0; k < kOperands; ++k) {
      Eight const x = unpacked(bits[k]);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (k < kNormalised) {
          y.x[i] = fmaf(x.x[i] - mean[k % kNormalised][i / kEach], factor[k % kNormalised][i], y.x[i]);
        } else {
          y.x[i] += x.x[i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) y.x[i] = y.x[i] < 0.0f ? 0.0f : y.x[i];  // and NaN stays NaN
    return y;
  }
};

// Calls use(pixel, 16 bytes of each tensor) for a thread's pixels from `first` to `end`; several loads are under way
// at a time.
template <int kTensors, typename Use>
__device__ inline void for_pixels(Place const& at, half const* const (&x)[kTensors], int channels, int first, int end,
                                  Use use) {
  if (!at.there) return;
  for (int start = first + at.row; start < end; start += at.rows * kTogether) {
    uint4 bits[kTogether][kTensors];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      int const pixel = start + i * at.rows;
#pragma unroll
      for (int k = 0; k < kTensors; ++k) {
        if (pixel < end) bits[i][k] = *reinterpret_cast<uint4 const*>(x[k] + static_cast<int64_t>(pixel) * channels);
      }
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      if (start + i * at.rows < end) use(start + i * at.rows, bits[i]);
    }
  }
}

}  // namespace
}  // namespace vit
