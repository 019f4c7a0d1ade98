// Attention over INT8 or FP16 queries, keys and values, of which shared memory holds all of one image and head. Tokens
// of all images stand in rows, [images · tokens, width], 16-byte aligned.
#include "attend.cuh"

namespace vit {
namespace {

constexpr int kLoads = 8;   // of 16 bytes that a thread has under way
constexpr int kSharedBytes = 228 * 1024;  // of a Hopper multiprocessor; where there is less, one block runs at a time

// One image's head in each block. qkv: [images · tokens, heads, 3, kHead]; out: [images · tokens, heads, kHead].
// At most kWarps warps, kBlocks blocks at a time, 16 · kStep keys at a time.
template <typename In, typename Out, int kHead, int kWarps, int kBlocks, int kStep, bool kCausal>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    attention_kernel(int8_t const* qkv, Out* out, int tokens, int heads, float score_scale, float output_scale) {
  using L = Layout<In, kHead>;
  extern __shared__ __align__(16) int8_t memory[];
  int const padded = (tokens + 15) / 16 * 16;
  int8_t* keys = memory;
  half* values = reinterpret_cast<half*>(memory + padded * L::kKeyStride);
  int const head = blockIdx.x, lane = threadIdx.x % 32;
  int64_t const image = static_cast<int64_t>(blockIdx.y) * tokens;
  int const stride = heads * 3 * L::kBytes;
  int8_t const* base = qkv + image * stride + head * 3 * L::kBytes;
  constexpr int kBoth = 2 * L::kLines;  // a token's key and value
  for (int start = threadIdx.x; start < padded * kBoth; start += blockDim.x * kLoads) {
    uint4 bytes[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      int const i = start + j * blockDim.x;
      bytes[j] = make_uint4(0, 0, 0, 0);
      if (i / kBoth < tokens) {
        bytes[j] = *reinterpret_cast<uint4 const*>(base + static_cast<int64_t>(i / kBoth) * stride + L::kBytes +
                                                   i % kBoth * kLine);
      }
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      int const i = start + j * blockDim.x, token = i / kBoth, line = i % kBoth;
      if (token >= padded) continue;
      if (line < L::kLines) {
        *reinterpret_cast<uint4*>(keys + token * L::kKeyStride + line * kLine) = bytes[j];
      } else {
        store_value(values + token * L::kValueStride + (line - L::kLines) * (kLine / static_cast<int>(sizeof(In))),
                    bytes[j], In());
      }
    }
  }
  __syncthreads();
  for (int row = threadIdx.x / 32 * kRows; row < tokens; row += blockDim.x / 32 * kRows) {
    Rows<In, kHead> rows;
    int const mine = row + lane / 4;  // and 8, 16, 24 rows on
    start_rows<In, kHead>(rows, base, stride, mine, tokens);
    int first = 0;
    int const end = kCausal ? min(row + kRows, tokens) : tokens;  // of the keys that any of these queries attends to
    int const clear = kCausal ? row + 1 : tokens;                 // of those that all do
    for (; first + 16 * kStep <= clear; first += 16 * kStep) {
      attend<In, kHead, kStep, Mask::kNone>(rows, keys + first * L::kKeyStride, values + first * L::kValueStride,
                                            first == 0, 0, 0, score_scale);
    }
    for (; first < end; first += 16) {
      attend<In, kHead, 1, kCausal ? Mask::kCausal : Mask::kEnd>(rows, keys + first * L::kKeyStride,
                                                                 values + first * L::kValueStride, first == 0,
                                                                 tokens - first, row - first, score_scale);
    }
    store_rows<In, Out, kHead>(rows, out + (image * heads + head) * kHead, heads, mine, tokens, output_scale);
  }
}

template <typename In, typename Out, int kHead, int kWarps, int kBlocks, int kStep, bool kCausal>
cudaError_t launch(Attention const& p, cudaStream_t stream) {
  int const padded = (p.tokens + 15) / 16 * 16, parts = (p.tokens + kRows - 1) / kRows;
  // No warp has more to do than another needs.
  int const each = (parts + kWarps - 1) / kWarps, warps = (parts + each - 1) / each;
  // An odd number of products of a score reads one line behind the last key: of the values, which follow.
  size_t const bytes = static_cast<size_t>(padded) * Layout<In, kHead>::kPerToken;
  auto const kernel = attention_kernel<In, Out, kHead, kWarps, kBlocks, kStep, kCausal>;
  cudaError_t const error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch is blamed for it
    return error;
  }
  kernel<<<dim3(p.heads, p.images), warps * 32, bytes, stream>>>(static_cast<int8_t const*>(p.qkv),
                                                                 static_cast<Out*>(p.out), p.tokens, p.heads,
                                                                 p.score_scale * 1.44269504088896f, p.output_scale);
  return cudaGetLastError();
}

// Two blocks at a time where shared memory holds both, else tile by tile where there are kernels for that: measured on
// an H200, see benchmarks/gpu/INT8.md.
template <typename In, typename Out, int kHead, bool kCausal = false>
cudaError_t attention(Attention const& p, cudaStream_t stream) {
  int const padded = (p.tokens + 15) / 16 * 16;
  // Of each block the system takes a KiB.
  bool const twice = 2 * (padded * Layout<In, kHead>::kPerToken + 1024) <= kSharedBytes;
  if (twice) return launch<In, Out, kHead, 5, 2, 2, kCausal>(p, stream);
  bool const halves = sizeof(In) == sizeof(half) && sizeof(Out) == sizeof(half);
  return halves && !kCausal ? run_stream(p, stream) : launch<In, Out, kHead, 8, 1, 2, kCausal>(p, stream);
}

}  // namespace

cudaError_t run(Attention const& p, cudaStream_t stream) {
  if (p.causal) {  // of texts, in FP16
    bool const known = p.head == 64 && !p.int8_in && !p.int8_out;
    return known ? attention<half, half, 64, true>(p, stream) : cudaErrorInvalidValue;
  }
  if (p.int8_in && p.head == 64)
    return p.int8_out ? attention<int8_t, int8_t, 64>(p, stream) : attention<int8_t, half, 64>(p, stream);
  if (p.int8_in || (p.int8_out && p.head != 64)) return cudaErrorInvalidValue;
  switch (p.head) {
    case 64: return p.int8_out ? attention<half, int8_t, 64>(p, stream) : attention<half, half, 64>(p, stream);
    case 72: return run_stream(p, stream);
    case 80: return attention<half, half, 80>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace vit

// For tests without TensorRT: the same kernels behind plain pointers; a stream of 0.
extern "C" int vit_attention(void const* qkv, int int8_in, void* out, int int8_out, int images, int tokens, int heads,
                             int head, int causal, float score_scale, float output_scale) {
  vit::Attention const p{qkv,          out,           images,      tokens,      heads,       head,
                         int8_in != 0, int8_out != 0, causal != 0, score_scale, output_scale};
  return static_cast<int>(vit::run(p, nullptr));
}
