// Attention over FP16 queries, keys and values of any number of tokens: keys and values pass through shared memory tile
// by tile, the next on its way while one is computed with. As attention.cu otherwise.
#include "attend.cuh"

namespace vit {
namespace {

constexpr int kTile = 64;    // keys in shared memory at a time, twice
constexpr int kWarps = 4;    // of a block at most
constexpr int kBlocks = 2;   // at a time
constexpr int kStep = 2;     // sixteens of keys at a time

// 32 queries of one image's head in each warp. qkv: [images · tokens, heads, 3, kHead]; out: [images · tokens, heads,
// kHead].
template <int kHead>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    stream_kernel(int8_t const* qkv, half* out, int tokens, int heads, float score_scale, float output_scale) {
  using L = Layout<half, kHead>;
  constexpr int kKeyBytes = kTile * L::kKeyStride, kStage = kTile * L::kPerToken;
  constexpr int kBoth = 2 * L::kLines;  // a token's key and value
  extern __shared__ __align__(16) int8_t memory[];
  int const head = blockIdx.y, lane = threadIdx.x % 32;
  int64_t const image = static_cast<int64_t>(blockIdx.z) * tokens;
  int const stride = heads * 3 * L::kBytes;
  int8_t const* base = qkv + image * stride + head * 3 * L::kBytes;
  int const mine = (blockIdx.x * blockDim.x / 32 + threadIdx.x / 32) * kRows + lane / 4;
  if (L::kPaddedLines > L::kLines) {  // what the copies leave out is multiplied with zeros, and must be no NaN
    for (int i = threadIdx.x; i < 2 * kTile; i += blockDim.x) {
      int8_t* stage = memory + i / kTile * kStage;
      *reinterpret_cast<uint4*>(stage + i % kTile * L::kKeyStride + L::kBytes) = make_uint4(0, 0, 0, 0);
      *reinterpret_cast<uint4*>(stage + kKeyBytes + i % kTile * L::kValueStride * 2 + L::kBytes) =
          make_uint4(0, 0, 0, 0);
    }
  }
  auto const load = [&](int first) {
    int8_t* stage = memory + first / kTile % 2 * kStage;
    for (int i = threadIdx.x; i < kTile * kBoth; i += blockDim.x) {
      int const token = i / kBoth, line = i % kBoth;
      bool const there = first + token < tokens;
      int8_t* to = line < L::kLines ? stage + token * L::kKeyStride + line * kLine
                                    : stage + kKeyBytes + token * L::kValueStride * 2 + (line - L::kLines) * kLine;
      copy_async(to, base + static_cast<int64_t>(there ? first + token : 0) * stride + L::kBytes + line * kLine, there);
    }
    commit();
  };
  load(0);
  Rows<half, kHead> rows;
  start_rows<half, kHead>(rows, base, stride, mine, tokens);
  for (int tile = 0; tile < tokens; tile += kTile) {
    if (tile + kTile < tokens) {
      load(tile + kTile);
      wait<1>();
    } else {
      wait<0>();
    }
    __syncthreads();
    int8_t const* keys = memory + tile / kTile % 2 * kStage;
    half const* values = reinterpret_cast<half const*>(keys + kKeyBytes);
    int const end = min(kTile, tokens - tile);
    int first = 0;
    for (; first + 16 * kStep <= end; first += 16 * kStep) {
      attend<half, kHead, kStep, Mask::kNone>(rows, keys + first * L::kKeyStride, values + first * L::kValueStride,
                                              tile + first == 0, 0, 0, score_scale);
    }
    for (; first < end; first += 16) {
      attend<half, kHead, 1, Mask::kEnd>(rows, keys + first * L::kKeyStride, values + first * L::kValueStride,
                                         tile + first == 0, end - first, 0, score_scale);
    }
    __syncthreads();
  }
  store_rows<half, half, kHead>(rows, out + (image * heads + head) * kHead, heads, mine, tokens, output_scale);
}

template <int kHead>
cudaError_t launch(Attention const& p, cudaStream_t stream) {
  int const parts = (p.tokens + kRows - 1) / kRows, blocks = (parts + kWarps - 1) / kWarps,
            warps = (parts + blocks - 1) / blocks;
  int const bytes = 2 * kTile * Layout<half, kHead>::kPerToken;
  auto const kernel = stream_kernel<kHead>;
  cudaError_t const error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) {
    cudaGetLastError();  // or the next launch is blamed for it
    return error;
  }
  kernel<<<dim3(blocks, p.heads, p.images), warps * 32, bytes, stream>>>(
      static_cast<int8_t const*>(p.qkv), static_cast<half*>(p.out), p.tokens, p.heads,
      p.score_scale * 1.44269504088896f, p.output_scale);
  return cudaGetLastError();
}

}  // namespace

cudaError_t run_stream(Attention const& p, cudaStream_t stream) {
  if (p.int8_in || p.int8_out || p.causal || p.images > 65535) return cudaErrorInvalidValue;
  switch (p.head) {
    case 64: return launch<64>(p, stream);
    case 72: return launch<72>(p, stream);
    case 80: return launch<80>(p, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace vit
