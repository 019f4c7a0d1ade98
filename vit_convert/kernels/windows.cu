// Attention within windows, with a bias for each pair of places, in FP16. Tokens of a window stand in rows, [windows ·
// tokens, width].
#include "attend.cuh"

namespace vit {
namespace {

constexpr int kHeadSize = 32;
constexpr int kMostWarps = 2;
constexpr int kBlocks = 8;  // at a time
constexpr int kStep = 2;    // sixteens of keys at a time

// One window's head in each block. qkv: [windows · tokens, heads, 3, 32]; bias: [own, heads, tokens, columns], for
// every window its own in turn; out: [windows · tokens, heads, 32].
__global__ void __launch_bounds__(kMostWarps * 32, kBlocks)
    windows_kernel(int8_t const* qkv, float const* bias, half* out, int tokens, int heads, int own, float score_scale) {
  using L = Layout<half, kHeadSize>;
  extern __shared__ __align__(16) int8_t memory[];
  int const padded = (tokens + 15) / 16 * 16, columns = tokens + tokens % 2, lane = threadIdx.x % 32;
  int8_t* keys = memory;
  int8_t* values = memory + padded * L::kKeyStride;
  int const head = blockIdx.x % heads, window = blockIdx.x / heads;
  int64_t const image = static_cast<int64_t>(window) * tokens;
  int const stride = heads * 3 * L::kBytes;
  int8_t const* base = qkv + image * stride + head * 3 * L::kBytes;
  constexpr int kBoth = 2 * L::kLines;  // a token's key and value
  for (int i = threadIdx.x; i < padded * kBoth; i += blockDim.x) {
    int const token = i / kBoth, line = i % kBoth;
    bool const there = token < tokens;
    int8_t* to = line < L::kLines ? keys + token * L::kKeyStride + line * kLine
                                  : values + token * L::kValueStride * 2 + (line - L::kLines) * kLine;
    copy_async(to, base + static_cast<int64_t>(there ? token : 0) * stride + L::kBytes + line * kLine, there);
  }
  commit();
  int const first_row = threadIdx.x / 32 * kRows;
  Rows<half, kHeadSize> rows;
  int row = first_row, mine = row + lane / 4;
  start_rows<half, kHeadSize>(rows, base, stride, mine, tokens);
  wait<0>();
  __syncthreads();
  float const* table = bias + static_cast<int64_t>(window % own * heads + head) * tokens * columns;
  while (row < tokens) {
    int first = 0;
    // rows and columns behind the last read what is there, for nothing
    auto const added = [&](int tile, int part, int key) {
      int const at = min(mine + tile * 16 + part * 8, tokens - 1) * columns + min(first + key, columns - 2);
      return __ldg(reinterpret_cast<float2 const*>(table + at));
    };
    for (; first + 16 * kStep <= tokens; first += 16 * kStep) {
      attend<half, kHeadSize, kStep, Mask::kNone>(rows, keys + first * L::kKeyStride,
                                                  reinterpret_cast<half const*>(values) + first * L::kValueStride,
                                                  first == 0, 0, 0, score_scale, added);
    }
    for (; first < tokens; first += 16) {
      attend<half, kHeadSize, 1, Mask::kEnd>(rows, keys + first * L::kKeyStride,
                                             reinterpret_cast<half const*>(values) + first * L::kValueStride,
                                             first == 0, tokens - first, 0, score_scale, added);
    }
    store_rows<half, half, kHeadSize>(rows, out + (image * heads + head) * kHeadSize, heads, mine, tokens, 1.0f);
    row += blockDim.x / 32 * kRows;
    mine = row + lane / 4;
    if (row < tokens) start_rows<half, kHeadSize>(rows, base, stride, mine, tokens);
  }
}

}  // namespace

cudaError_t run(Windows const& p, cudaStream_t stream) {
  if (p.head != kHeadSize || p.tokens < 1 || p.windows % p.own) return cudaErrorInvalidValue;
  int const padded = (p.tokens + 15) / 16 * 16, parts = (p.tokens + kRows - 1) / kRows;
  int const each = (parts + kMostWarps - 1) / kMostWarps, warps = (parts + each - 1) / each;
  size_t const bytes = static_cast<size_t>(padded) * Layout<half, kHeadSize>::kPerToken;
  if (bytes > 48 * 1024) return cudaErrorInvalidValue;
  windows_kernel<<<p.windows * p.heads, warps * 32, bytes, stream>>>(static_cast<int8_t const*>(p.qkv), p.bias,
                                                                     static_cast<half*>(p.out), p.tokens, p.heads,
                                                                     p.own, p.score_scale * 1.44269504088896f);
  return cudaGetLastError();
}

}  // namespace vit

// For tests without TensorRT.
extern "C" int vit_windows(void const* qkv, float const* bias, void* out, int windows, int own, int tokens, int heads,
                           int head, float score_scale) {
  vit::Windows const p{qkv, bias, out, windows, own, tokens, heads, head, score_scale};
  return static_cast<int>(vit::run(p, nullptr));
}
