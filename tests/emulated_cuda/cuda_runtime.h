// Just enough of CUDA to run csrc/cuda/*.cu on a CPU, one block after another. The threads of a block are fibers that
// give way to each other at barriers, so the code between two barriers runs in an order no GPU would choose: thread 0
// first, to its end. Test code only.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local  // one copy for all fibers, which share one thread

using std::isinf;
using std::min;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct float2 {
    float x, y;
};
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float value);
};
struct __half {
    _Float16 value;
    __half() = default;
    explicit __half(float x) : value(static_cast<_Float16>(x)) {}
};

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline __nv_bfloat16::__nv_bfloat16(float value) {
    const uint32_t word = __float_as_uint(value);
    bits = std::isnan(value) ? 0x7fc0 : (word + 0x7fff + (word >> 16 & 1)) >> 16;  // to nearest, ties to even
}
inline float __bfloat162float(__nv_bfloat16 x) {
    return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
    return __nv_bfloat16(x);
}
inline __half __float2half(float x) {
    return __half(x);
}
inline float __half2float(__half x) {
    return static_cast<float>(x.value);
}

// ---- Host calls

using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };

inline int processors = 4;  // the test sets it

inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
    *value = processors;
    return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, int, int) {
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
    return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) {
    return "an emulated error";
}

// ---- Blocks and threads

inline dim3 threadIdx, blockIdx, gridDim;

namespace emulated {

constexpr int kThreads = 256;  // every kernel here has this many
constexpr size_t kStack = 1 << 17;

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
};
struct Barrier {
    int arrived = 0, generation = 0;
};

inline Fiber fibers[kThreads];
inline ucontext_t scheduler;
inline int current;
inline std::function<void()> kernel;
inline Barrier block_barrier, warp_barriers[kThreads / 32];

inline void give_way() {
    swapcontext(&fibers[current].context, &scheduler);
}
inline void wait(Barrier& barrier, int threads) {
    const int generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
    }
    while (barrier.generation == generation) give_way();
}
inline void wait_for_warp() {
    wait(warp_barriers[current / 32], 32);
}
inline void run_fiber() {
    kernel();
    fibers[current].done = true;
    while (true) give_way();
}

// Every lane of a warp gives `mine` and sees all 32; the reference is good until the next exchange.
template <typename T>
const T (&exchange(const T& mine))[32] {
    static T slots[2][kThreads / 32][32];
    static int turn[kThreads];
    const int warp = current / 32, lane = current % 32;
    auto& slot = slots[turn[current] ^= 1][warp];  // two copies, so that nobody overwrites what another still reads
    slot[lane] = mine;
    wait_for_warp();
    return slot;
}

template <typename Function>
void launch(dim3 grid, Function function) {
    gridDim = grid;
    kernel = function;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
            for (Fiber& fiber : fibers) {
                fiber.done = false;
                fiber.stack.resize(kStack);
                getcontext(&fiber.context);
                fiber.context.uc_stack.ss_sp = fiber.stack.data();
                fiber.context.uc_stack.ss_size = kStack;
                makecontext(&fiber.context, run_fiber, 0);
            }
            for (int running = kThreads; running > 0;) {
                running = 0;
                for (current = 0; current < kThreads; ++current) {
                    if (fibers[current].done) continue;
                    threadIdx.x = current;
                    swapcontext(&scheduler, &fibers[current].context);
                    running += !fibers[current].done;
                }
            }
        }
    }
}

}  // namespace emulated

inline void __syncthreads() {
    emulated::wait(emulated::block_barrier, emulated::kThreads);
}
inline float __fadd_rn(float x, float y) {
    return x + y;
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, int offset) {
    return emulated::exchange(x)[emulated::current % 32 ^ offset];
}
