// CUDA on the processor, as far as the kernels under test go: blocks one after the other, a block's threads as
// coroutines that take turns at barriers and shuffles. A barrier that not all reach, memory beyond what a launch asked
// for and a shuffle of half a warp end the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __align__(n) alignas(n)
#define __shared__ static
#define __launch_bounds__(...)

using half = _Float16;
using std::max;
using std::min;

struct float2 { float x, y; };
struct float3 { float x, y, z; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct half2 { half x, y; };
struct dim3 {
  int x, y, z;
  dim3(int x, int y = 1, int z = 1) : x(x), y(y), z(z) {}
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float2 __half22float2(half2 a) { return {static_cast<float>(a.x), static_cast<float>(a.y)}; }
inline half2 __floats2half2_rn(float a, float b) { return {static_cast<half>(a), static_cast<half>(b)}; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

namespace on_cpu {

inline int shared_bytes = 227 * 1024;  // that a block may have
inline int launches = 0;
inline dim3 thread_index{0}, block_index{0}, block_size{0}, grid_size{0};
inline char* shared = nullptr;

[[noreturn]] inline void fail(char const* why) {
  std::fprintf(stderr, "%s\n", why);
  std::abort();
}

struct Barrier {
  int threads = 0, waiting = 0, round = 0;
};

class Block {
 public:
  static constexpr int kStack = 64 * 1024;

  void run(int threads, std::function<void()> const& body) {
    body_ = &body;
    threads_ = std::vector<ucontext_t>(threads);
    done_ = std::vector<char>(threads, 0);
    if (static_cast<int>(stacks_.size()) < threads * kStack) stacks_.resize(threads * kStack);
    slots_.assign(threads, 0.0f);
    whole_ = {threads};
    warps_.assign((threads + 31) / 32, {32});
    for (int i = 0; i < threads; ++i) {
      getcontext(&threads_[i]);
      threads_[i].uc_stack.ss_sp = stacks_.data() + static_cast<size_t>(i) * kStack;
      threads_[i].uc_stack.ss_size = kStack;
      threads_[i].uc_link = &main_;
      makecontext(&threads_[i], &Block::start, 0);
    }
    for (int left = threads, moved = 1; left > 0;) {
      if (!moved) fail("a barrier that not all threads reach");
      moved = 0;
      for (current_ = 0; current_ < threads; ++current_) {
        if (done_[current_]) continue;
        thread_index = dim3(current_);
        moved_ = false;
        swapcontext(&main_, &threads_[current_]);
        moved += moved_;
        left -= done_[current_];
      }
    }
  }

  void wait(Barrier& barrier) {
    int const round = barrier.round;
    moved_ = true;
    if (++barrier.waiting == barrier.threads) {
      barrier.waiting = 0;
      ++barrier.round;
      return;
    }
    while (barrier.round == round) {
      int const me = current_;
      swapcontext(&threads_[me], &main_);
    }
    moved_ = true;
  }

  void wait_for_all() { wait(whole_); }

  float exchanged(float x, int distance) {
    int const me = current_;
    slots_[me] = x;
    wait(warps_[me / 32]);
    float const other = slots_[me ^ distance];
    wait(warps_[me / 32]);
    return other;
  }

 private:
  static void start();
  std::function<void()> const* body_ = nullptr;
  std::vector<ucontext_t> threads_;
  std::vector<char> done_, stacks_;
  std::vector<float> slots_;
  std::vector<Barrier> warps_;
  Barrier whole_;
  ucontext_t main_;
  int current_ = 0;
  bool moved_ = false;
};

inline Block block;

inline void Block::start() {
  (*block.body_)();
  block.moved_ = true;
  block.done_[block.current_] = 1;
}

constexpr int kGuard = 4096;  // bytes behind shared memory

// What `kernel<<<grid, threads, bytes, stream>>>` becomes, before its arguments.
template <typename Kernel>
auto launch(Kernel kernel, dim3 grid, dim3 threads, int bytes, cudaStream_t) {
  return [=](auto... arguments) {
    ++launches;
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || threads.x < 1 || threads.x > 1024) {
      fail("a launch that CUDA refuses");
    }
    std::vector<uint4> memory((bytes + kGuard) / sizeof(uint4) + 1);
    shared = reinterpret_cast<char*>(memory.data());
    grid_size = grid;
    block_size = threads;
    for (int z = 0; z < grid.z; ++z) {
      for (int y = 0; y < grid.y; ++y) {
        for (int x = 0; x < grid.x; ++x) {
          std::memset(shared, 0xff, bytes + kGuard);  // NaN
          block_index = dim3(x, y, z);
          block.run(threads.x, [&] { kernel(arguments...); });
          for (int i = bytes; i < bytes + kGuard; ++i) {
            if (shared[i] != static_cast<char>(0xff)) fail("shared memory that the launch did not ask for");
          }
        }
      }
    }
  };
}

}  // namespace on_cpu

#define threadIdx on_cpu::thread_index
#define blockIdx on_cpu::block_index
#define blockDim on_cpu::block_size
#define gridDim on_cpu::grid_size

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int bytes) {
  return bytes <= on_cpu::shared_bytes ? cudaSuccess : cudaErrorInvalidValue;
}
inline void __syncthreads() { on_cpu::block.wait_for_all(); }
inline float __shfl_xor_sync(unsigned, float x, int distance) { return on_cpu::block.exchanged(x, distance); }

extern "C" inline __attribute__((used)) void on_cpu_shared_bytes(int bytes) { on_cpu::shared_bytes = bytes; }
extern "C" inline __attribute__((used)) int on_cpu_launches() { return on_cpu::launches; }
