// Halves and floats as INT8.
#pragma once

#include <cstdint>

namespace vit {

__device__ inline unsigned to_int8(float x) {  // nearest even, saturated
  int y;
  asm("cvt.rni.sat.s8.f32 %0, %1;" : "=r"(y) : "f"(x));
  return static_cast<unsigned>(y) & 0xffu;
}

__device__ inline unsigned pack_int8(float a, float b, float c, float d) {
  return to_int8(a) | to_int8(b) << 8 | to_int8(c) << 16 | to_int8(d) << 24;
}

}  // namespace vit
