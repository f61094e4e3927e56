// What the kernels of one .cu file take from CUDA, on a CPU: a thread for every thread of a block, one block after the
// other. Takes the place of csrc/cuda_rows.h; the launches are rewritten by cuda_on_cpu.py.
#pragma once

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __shared__ static
#define MIMDET_CUDA_API extern "C"

using std::min;
using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
inline int cudaGetLastError() { return cudaSuccess; }

struct Place {
  unsigned x;
};
static thread_local Place threadIdx, blockIdx;
static pthread_barrier_t block_barrier, warp_barriers[32];
static std::atomic<unsigned> any, ballots[32];

inline void __syncthreads() { pthread_barrier_wait(&block_barrier); }
inline int __syncthreads_or(int flag) {
  if (threadIdx.x == 0) any = 0;
  __syncthreads();
  if (flag) any = 1;
  __syncthreads();
  const int result = any;
  __syncthreads();
  return result;
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto wait = [=] { pthread_barrier_wait(warp_barriers + warp); };
  if (lane == 0) ballots[warp] = 0;
  wait();
  if (flag) ballots[warp] |= 1u << lane;
  wait();
  const unsigned result = ballots[warp];
  wait();
  return result;
}
inline void atomicOr(unsigned long long* p, unsigned long long bits) { __atomic_fetch_or(p, bits, __ATOMIC_SEQ_CST); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

template <class F>
void launch(unsigned blocks, unsigned threads, F kernel) {
  pthread_barrier_t end_of_block;
  pthread_barrier_init(&end_of_block, nullptr, threads);
  pthread_barrier_init(&block_barrier, nullptr, threads);
  for (unsigned w = 0; w < threads / 32; ++w) pthread_barrier_init(warp_barriers + w, nullptr, 32);
  std::vector<std::thread> all;
  for (unsigned t = 0; t < threads; ++t) {
    all.emplace_back([=, &end_of_block] {
      threadIdx.x = t;
      for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        kernel();
        pthread_barrier_wait(&end_of_block);
      }
    });
  }
  for (auto& thread : all) thread.join();
}
