// Launchers of the kernels in attention.cu, stream.cu, windows.cu, norm.cu, group_norm.cu and planes.cu.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace vit {

enum class Type { kFloat = 0, kHalf = 1, kInt8 = 2 };

struct Attention {
  void const* qkv;     // [images · tokens, heads, 3, head] half, or int8
  void* out;           // [images · tokens, heads, head] half, or int8
  int images, tokens, heads, head;  // head: 64, or 72 or 80 where all is half
  bool int8_in, int8_out;
  bool causal;         // a token attends to itself and those before it; heads of 64 in half
  float score_scale;   // from the product of query and key to the exponent
  float output_scale;  // of the values, over the output's where that is int8
};

struct Windows {
  void const* qkv;    // [windows · tokens, heads, 3, head] half
  float const* bias;  // [own, heads, tokens, tokens, one more if these are odd]: added to the product of query and key
  void* out;          // [windows · tokens, heads, head] half
  int windows, own;   // of all images; how many of an image have a bias of their own, or 1
  int tokens, heads, head;  // head: 32
  float score_scale;
};

struct Norm {
  void const* branch;   // [rows, width], null where there is nothing to add
  Type branch_type;
  void const* residual;  // [rows, width] half
  void* sum;             // [rows, width] half
  void* out;             // [rows, width] half, or int8
  bool int8_out;
  float const* gamma;
  float const* beta;     // [width] on the device
  int rows, width;       // width: a multiple of 8, at most 2048
  float branch_scale;    // of an int8 branch, else 1
  float output_scale;    // 1 over the output's scale where that is int8, else 1
  float epsilon;
};

// relu(GroupNorm(x) + residual), where the residual may be absent, or have a GroupNorm of its own; over 32 groups.
struct GroupNorm {
  void const* x;         // [images, pixels, channels] where channels are interleaved, else [images, channels, pixels]
  void const* residual;  // likewise, or null
  void* out;             // likewise
  float const* gamma;
  float const* beta;            // [channels] on the device
  float const* residual_gamma;  // null where the residual is added as it is
  float const* residual_beta;
  Type type;         // of x, residual and out: half, or float where channels are not interleaved
  bool interleaved;  // channels: then as `interleaves` says
  int images, pixels, channels;
  float epsilon;
  void* workspace;  // `group_norm_workspace` bytes where channels are interleaved
};

constexpr int kGroups = 32;
constexpr int kMostGroupNormChannels = 2048;

// Whether there is a kernel for so many channels where they are interleaved.
constexpr bool interleaves(int channels) {
  int const each = channels / kGroups;
  return channels % kGroups == 0 && channels <= kMostGroupNormChannels &&
         (each == 1 || each == 2 || each == 4 || (each > 0 && each % 8 == 0));
}

size_t group_norm_workspace(int images);  // bytes, of as many images or fewer
cudaError_t run(Attention const& p, cudaStream_t stream);
cudaError_t run_stream(Attention const& p,
                       cudaStream_t stream);  // of half alone, without `causal`, for any number of tokens
cudaError_t run(Windows const& p, cudaStream_t stream);
cudaError_t run(Norm const& p, cudaStream_t stream);
cudaError_t run(GroupNorm const& p, cudaStream_t stream);
cudaError_t run_planes(GroupNorm const& p, cudaStream_t stream);  // where channels are not interleaved

}  // namespace vit
