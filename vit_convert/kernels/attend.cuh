// Parts of attention: how one warp takes 32 queries over some keys and values in shared memory.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "encoder.h"
#include "pack.cuh"

namespace vit {
namespace {


constexpr int kRows = 32;   // queries of one warp at a time
constexpr int kLine = 16;   // bytes that one row of a matrix operand spans

// How queries, keys and values of kHead elements of a type lie in memory and in registers.
template <typename In, int kHead>
struct Layout {
  static constexpr int kBytes = kHead * sizeof(In);  // of one query, key or value
  static constexpr int kLines = kBytes / kLine;
  static constexpr int kPadded = (kHead + 15) / 16 * 16;  // products take sixteen at a time: of 72 the rest is zero
  static constexpr int kPaddedLines = kPadded * sizeof(In) / kLine;
  static constexpr int kSteps = kPaddedLines / 2;                    // products of one score
  static constexpr int kKeyStride = (kPaddedLines + 1) * kLine;  // bytes between keys in shared memory: an odd number
                                                                 // of lines, so that eight rows hit different banks
  static constexpr int kValueStride = kPadded + 8;                   // halves between values in shared memory
  static constexpr int kPerToken = kKeyStride + kValueStride * 2;
};

__device__ inline unsigned shared_address(void const* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

__device__ inline void load_matrices(unsigned (&r)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

__device__ inline void load_transposed(unsigned (&r)[4], void const* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)));
}

__device__ inline void copy_async(void* to, void const* from, bool there) {  // 16 bytes; zeros where there are none
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(there ? 16 : 0));
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;"); }

template <int kLeft>
__device__ inline void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft));
}

__device__ inline void multiply_int8(int (&c)[4], unsigned const (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline void multiply_half(float (&c)[4], unsigned const (&a)[4], unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline unsigned as_unsigned(half2 x) { return *reinterpret_cast<unsigned*>(&x); }

// Four int8 as halves, exactly: 0x64uu is 1024 + u.
__device__ inline uint2 to_halves(unsigned bytes) {
  unsigned const biased = bytes ^ 0x80808080u;
  unsigned const low = __byte_perm(biased, 0x64646464u, 0x4140), high = __byte_perm(biased, 0x64646464u, 0x4342);
  half2 const bias = __halves2half2(__ushort_as_half(0x6480), __ushort_as_half(0x6480));  // 1152
  return {as_unsigned(__hsub2(*reinterpret_cast<half2 const*>(&low), bias)),
          as_unsigned(__hsub2(*reinterpret_cast<half2 const*>(&high), bias))};
}

// 1.5 · 2^23: the float with these bits, plus a small integer added to the bits, is that float plus the integer.
constexpr int kBiasBits = 0x4b400000;
constexpr float kBias = 12582912.0f;
// By how many powers of two a score may exceed the maximum that is taken off before that is raised.
constexpr float kSlack = 8.0f;

// What the products of a type start at, so that a score comes out less the maximum, and what is added to that in the
// result.
template <typename In>
struct Start;

template <>
struct Start<int8_t> {
  static constexpr float kOffset = kBias;
  int value = kBiasBits;
  __device__ inline void raise(float by) { value -= static_cast<int>(by); }
};

template <>
struct Start<half> {
  static constexpr float kOffset = 0.0f;
  float value = 0.0f;
  __device__ inline void raise(float by) { value -= by; }
};

template <typename In, int kHead>
struct Rows {  // of one warp's 32 queries, in two tiles of sixteen, of each of which every thread has parts of two rows
  unsigned query[2][Layout<In, kHead>::kSteps][4];
  float output[2][Layout<In, kHead>::kPadded / 8][4];
  Start<In> start[2][2];
  float sum[2][2];
};

// Scores of eight keys from `row` on: what one thread of four has of each of two rows.
template <int kHead>
__device__ inline void score(float (&scores)[2][4], Rows<int8_t, kHead> const& rows, int8_t const* row) {
  using L = Layout<int8_t, kHead>;
  int products[2][4];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) products[tile][i] = rows.start[tile][i / 2].value;
  }
#pragma unroll
  for (int pair = 0; pair < L::kSteps / 2; ++pair) {
    unsigned key[4];
    load_matrices(key, row + pair * 4 * kLine);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      multiply_int8(products[tile], rows.query[tile][2 * pair], key[0], key[1]);
      multiply_int8(products[tile], rows.query[tile][2 * pair + 1], key[2], key[3]);
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[tile][i] = __int_as_float(products[tile][i]);
  }
}

template <int kHead>
__device__ inline void score(float (&scores)[2][4], Rows<half, kHead> const& rows, int8_t const* row) {
  using L = Layout<half, kHead>;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[tile][i] = rows.start[tile][i / 2].value;
  }
#pragma unroll
  for (int step = 0; step < L::kSteps; step += 2) {
    unsigned key[4];  // the last two of an odd number of steps are those of the line behind, and not used
    load_matrices(key, row + step * 2 * kLine);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      multiply_half(scores[tile], rows.query[tile][step], key[0], key[1]);
      if (step + 1 < L::kSteps) multiply_half(scores[tile], rows.query[tile][step + 1], key[2], key[3]);
    }
  }
}

// Which of some keys a warp's queries attend to.
enum class Mask { kNone, kEnd, kCausal };  // all; those before `end`; those before the query's own end too

struct Nothing {};  // added to scores

// Softmax and product with the values over 16 · kGroups keys, the first of all if kBegin says so. Of the keys those
// before `end` are there; of kCausal those up to `diagonal` + the query's row. `added` is Nothing, or gives what is
// added to the scores of a tile's part and two keys, of which the first is named.
template <typename In, int kHead, int kGroups, Mask kMask, typename Added = Nothing>
__device__ inline void attend(Rows<In, kHead>& rows, int8_t const* keys, half const* values, bool begin, int end,
                              int diagonal, float scale, Added const& added = Added()) {
  using L = Layout<In, kHead>;
  constexpr float kOffset = Start<In>::kOffset;
  int const lane = threadIdx.x % 32;
  float scores[2 * kGroups][2][4];
#pragma unroll
  for (int column = 0; column < 2 * kGroups; ++column) {
    score(scores[column], rows, keys + (column * 8 + lane % 8) * L::kKeyStride + lane / 8 * kLine);
    if constexpr (!std::is_same<Added, Nothing>::value) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          float2 const more = added(tile, part, column * 8 + lane % 4 * 2);
          scores[column][tile][2 * part] += more.x;
          scores[column][tile][2 * part + 1] += more.y;
        }
      }
    }
    if (kMask != Mask::kNone) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const key = column * 8 + lane % 4 * 2 + i % 2;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          bool const there =
              key < end && (kMask != Mask::kCausal || key <= diagonal + lane / 4 + tile * 16 + i / 2 * 8);
          scores[column][tile][i] = there ? scores[column][tile][i] : -INFINITY;
        }
      }
    }
  }
  float largest[2][2];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float x = scores[0][tile][2 * part];
#pragma unroll
      for (int column = 0; column < 2 * kGroups; ++column) {
        x = fmaxf(x, fmaxf(scores[column][tile][2 * part], scores[column][tile][2 * part + 1]));
      }
      largest[tile][part] = x;
    }
  }
  float const most = fmaxf(fmaxf(largest[0][0], largest[0][1]), fmaxf(largest[1][0], largest[1][1]));
  if (begin || __any_sync(~0u, (most - kOffset) * scale > kSlack)) {  // seldom but for the first keys
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        float x = largest[tile][part];
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
        x = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) - kOffset;
        float const raise = begin ? x : fmaxf(x, 0.0f), shrink = begin ? 0.0f : exp2_fast(-raise * scale);
        rows.start[tile][part].raise(raise);
        rows.sum[tile][part] *= shrink;
#pragma unroll
        for (int i = 0; i < L::kPadded / 8; ++i) {
          rows.output[tile][i][2 * part] *= shrink;
          rows.output[tile][i][2 * part + 1] *= shrink;
        }
#pragma unroll
        for (int column = 0; column < 2 * kGroups; ++column) {
          scores[column][tile][2 * part] -= raise;
          scores[column][tile][2 * part + 1] -= raise;
        }
      }
    }
  }
  float const offset = -kOffset * scale;  // rounded, but alike for all scores, so that it cancels
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    unsigned weights[2][4];
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rows i % 2, columns i / 2
        float const* pair = &scores[2 * group + i / 2][tile][i % 2 * 2];
        float const x = exp2_fast(fmaf(pair[0], scale, offset)), y = exp2_fast(fmaf(pair[1], scale, offset));
        rows.sum[tile][i % 2] += x + y;
        weights[tile][i] = as_unsigned(__floats2half2_rn(x, y));
      }
    }
#pragma unroll
    for (int pair = 0; pair < L::kPadded / 16; ++pair) {
      unsigned value[4];
      load_transposed(value, values + (group * 16 + lane % 16) * L::kValueStride + pair * 16 + lane / 16 * 8);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        multiply_half(rows.output[tile][2 * pair], weights[tile], value[0], value[1]);
        multiply_half(rows.output[tile][2 * pair + 1], weights[tile], value[2], value[3]);
      }
    }
  }
}

// A row's values, of which this thread has columns 2 · (lane % 4) + {0, 1} of every eight; each thread of four writes
// 16 of them.
template <int kHead>
__device__ inline void store_row(int8_t* out, float const (&output)[8][4], int part, float scale, bool valid) {
  int const lane = threadIdx.x % 32, quarter = lane % 4;
  unsigned words[4], moved[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    words[i] = pack_int8(output[2 * i][2 * part] * scale, output[2 * i][2 * part + 1] * scale,
                         output[2 * i + 1][2 * part] * scale, output[2 * i + 1][2 * part + 1] * scale);
  }
#pragma unroll
  for (int from = 0; from < 4; ++from) {  // moved[from]: word `quarter` of thread `from` of the four
    unsigned mine = 0;
#pragma unroll
    for (int to = 0; to < 4; ++to) {
      unsigned const word = __shfl_sync(~0u, words[to], lane - quarter + from);
      mine = quarter == to ? word : mine;
    }
    moved[from] = mine;
  }
  if (valid) {
    *reinterpret_cast<uint4*>(out + quarter * 16) =
        make_uint4(__byte_perm(moved[0], moved[1], 0x5410), __byte_perm(moved[2], moved[3], 0x5410),
                   __byte_perm(moved[0], moved[1], 0x7632), __byte_perm(moved[2], moved[3], 0x7632));
  }
}

template <int kHead, int kEights>
__device__ inline void store_row(half* out, float const (&output)[kEights][4], int part, float scale, bool valid) {
  int const quarter = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < kHead / 8; ++i) {
    half2 const pair = __floats2half2_rn(output[i][2 * part] * scale, output[i][2 * part + 1] * scale);
    if (valid) *reinterpret_cast<half2*>(out + i * 8 + quarter * 2) = pair;
  }
}

// One line of a value as halves.
__device__ inline void store_value(half* to, uint4 line, int8_t) {
  uint2 const a = to_halves(line.x), b = to_halves(line.y), c = to_halves(line.z), d = to_halves(line.w);
  reinterpret_cast<uint4*>(to)[0] = make_uint4(a.x, a.y, b.x, b.y);
  reinterpret_cast<uint4*>(to)[1] = make_uint4(c.x, c.y, d.x, d.y);
}

__device__ inline void store_value(half* to, uint4 line, half) { *reinterpret_cast<uint4*>(to) = line; }

// A warp's 32 queries, of which this thread has parts of the rows `mine` and 8, 16 and 24 on, and results of zero.
template <typename In, int kHead>
__device__ inline void start_rows(Rows<In, kHead>& rows, int8_t const* queries, int stride, int mine, int tokens) {
  using L = Layout<In, kHead>;
  int const lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int step = 0; step < L::kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        int const from = mine + tile * 16 + i % 2 * 8, line = step * 2 + i / 2;
        int8_t const* query = queries + static_cast<int64_t>(from) * stride + line * kLine + lane % 4 * 4;
        rows.query[tile][step][i] = from < tokens && line < L::kLines ? *reinterpret_cast<unsigned const*>(query) : 0u;
      }
    }
#pragma unroll
    for (int i = 0; i < L::kPadded / 8; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) rows.output[tile][i][j] = 0.0f;
    }
    rows.sum[tile][0] = rows.sum[tile][1] = 0.0f;
  }
}

// Writes them. out: [images · tokens, heads, kHead] from the image's first token and this head on.
template <typename In, typename Out, int kHead>
__device__ inline void store_rows(Rows<In, kHead> const& rows, Out* out, int heads, int mine, int tokens,
                                  float output_scale) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      float sum = rows.sum[tile][part];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      int const token = mine + tile * 16 + part * 8;
      store_row<kHead>(out + static_cast<int64_t>(token) * heads * kHead, rows.output[tile], part, output_scale / sum,
                       token < tokens);
    }
  }
}

}  // namespace
}  // namespace vit
