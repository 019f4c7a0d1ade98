// Residual addition and LayerNorm that writes INT8, over rows [images · tokens, width] that are 16-byte aligned.
#include <cstdint>

#include "eight.cuh"
#include "encoder.h"
#include "pack.cuh"

namespace vit {
namespace {

__device__ inline Eight load_eight(int8_t const* p) {
  uint2 const bits = *reinterpret_cast<uint2 const*>(p);
  int8_t const* bytes = reinterpret_cast<int8_t const*>(&bits);
  Eight y;
#pragma unroll
  for (int i = 0; i < 8; ++i) y.x[i] = static_cast<float>(bytes[i]);
  return y;
}

__device__ inline void store_eight(int8_t* p, Eight const& y) {
  *reinterpret_cast<uint2*>(p) =
      make_uint2(pack_int8(y.x[0], y.x[1], y.x[2], y.x[3]), pack_int8(y.x[4], y.x[5], y.x[6], y.x[7]));
}

// One row in each warp. branch (may be null), residual, sum (null without a branch): [rows, width]; out: (sum
// normalised · gamma + beta) / scale.
template <int kVectors, typename In, typename Out>
__global__ void __launch_bounds__(256)
    norm_kernel(In const* branch, half const* residual, half* sum, Out* out, float const* gamma, float const* beta,
                int rows, int width, float branch_scale, float output_scale, float epsilon) {
  int64_t const row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  int const lane = threadIdx.x % 32;
  Eight x[kVectors];
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = (i * 32 + lane) * 8;
    if (column < width) {
      x[i] = load_eight(residual + row * width + column);
      if (branch != nullptr) {
        Eight const y = load_eight(branch + row * width + column);
#pragma unroll
        for (int j = 0; j < 8; ++j) x[i].x[j] = fmaf(y.x[j], branch_scale, x[i].x[j]);
        store_eight(sum + row * width + column, x[i]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) total += x[i].x[j];
    }
  }
  float const mean = sum_over_warp(total) / width;
  float squares = 0.0f;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if ((i * 32 + lane) * 8 < width) {
#pragma unroll
      for (int j = 0; j < 8; ++j) squares += (x[i].x[j] - mean) * (x[i].x[j] - mean);
    }
  }
  float const factor = rsqrtf(sum_over_warp(squares) / width + epsilon) * output_scale;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    int const column = (i * 32 + lane) * 8;
    if (column < width) {
      Eight const g = load_eight(gamma + column), b = load_eight(beta + column);
      Eight y;
#pragma unroll
      for (int j = 0; j < 8; ++j) y.x[j] = fmaf((x[i].x[j] - mean) * factor, g.x[j], b.x[j] * output_scale);
      store_eight(out + row * width + column, y);
    }
  }
}

template <typename In, typename Out>
cudaError_t norm(Norm const& p, cudaStream_t stream) {
  int const vectors = (p.width + 255) / 256, blocks = (p.rows + 7) / 8;
  auto const launch = [&](auto kernel) {
    kernel<<<blocks, 256, 0, stream>>>(static_cast<In const*>(p.branch), static_cast<half const*>(p.residual),
                                       static_cast<half*>(p.sum), static_cast<Out*>(p.out), p.gamma, p.beta, p.rows,
                                       p.width, p.branch_scale, p.output_scale, p.epsilon);
    return cudaGetLastError();
  };
  switch (vectors) {
    case 1: return launch(norm_kernel<1, In, Out>);
    case 2: return launch(norm_kernel<2, In, Out>);
    case 3: return launch(norm_kernel<3, In, Out>);
    case 4: return launch(norm_kernel<4, In, Out>);
    case 5: return launch(norm_kernel<5, In, Out>);
    case 6: return launch(norm_kernel<6, In, Out>);
    case 7: return launch(norm_kernel<7, In, Out>);
    case 8: return launch(norm_kernel<8, In, Out>);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace

cudaError_t run(Norm const& p, cudaStream_t stream) {
  switch (p.branch_type) {
    case Type::kFloat: return p.int8_out ? norm<float, int8_t>(p, stream) : norm<float, half>(p, stream);
    case Type::kHalf: return p.int8_out ? norm<half, int8_t>(p, stream) : norm<half, half>(p, stream);
    case Type::kInt8: return p.int8_out ? norm<int8_t, int8_t>(p, stream) : norm<int8_t, half>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vit

// For tests without TensorRT, as in attention.cu.
extern "C" int vit_norm(void const* branch, int branch_type, void const* residual, void* sum, void* out, int int8_out,
                        float const* gamma, float const* beta, int rows, int width, float branch_scale,
                        float output_scale, float epsilon) {
  vit::Norm const p{branch, static_cast<vit::Type>(branch_type), residual, sum, out, int8_out != 0, gamma, beta, rows,
                    width, branch_scale, output_scale, epsilon};
  return static_cast<int>(vit::run(p, nullptr));
}
