// A CUDA card as the sources see it, on one thread of the CPU: the place of machine.cuh and of what NVRTC defines.
//
// Blocks run one after the other. The threads of a block are fibers that take turns where they wait for each other;
// a barrier that not all of them reach ends the process. Asynchronous copies happen when they are waited for and no
// earlier, so that a missing wait shows. Fragments of matrices lie as the PTX ISA has them (section "Matrix multiply-
// accumulate operation using mma instruction", figures for .m16n8k16; and "ldmatrix").
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <vector>

using std::max;
using std::min;

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef u16 bf16;

#define __device__
#define __forceinline__ inline
#define __global__ __attribute__((visibility("default")))
#define __launch_bounds__(threads)
#define __shared__ static
#define DYNAMIC_SHARED(type, name) type* name = (type*)emulator::dynamic_shared

struct int2 { int x, y; };
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct ushort4 { u16 x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct dim { int x, y, z; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "one size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(u32 bits) { return same_bits<float>(bits); }
inline float __int_as_float(int bits) { return same_bits<float>(bits); }
inline u32 __float_as_uint(float value) { return same_bits<u32>(value); }
inline int __ffs(u32 bits) { return __builtin_ffs((int)bits); }
inline u64 atomicAdd(u64* to, u64 value) { return *to += value, *to - value; }

namespace emulator {

struct Copy {
    bf16* to;
    const bf16* from;
    bool exists;
};

struct Warp {
    alignas(16) unsigned char slots[2][32][32];
    int arrived = 0;
    long generation = 0;
};

struct Fiber {
    ucontext_t context;
    dim thread;
    int lane;
    Warp* warp;
    int turn = 0;
    bool done = false;
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
};

static Fiber* current;
static ucontext_t scheduler;
static dim block_index, block_size, grid_size;
static int running, arrived;
static long generation, progress;
static int votes, last_votes;
alignas(64) static unsigned char dynamic_shared[256 << 10];
static void (*body)(void*);
static void* arguments;

inline void yield() { swapcontext(&current->context, &scheduler); }

inline void warp_barrier() {
    Warp& warp = *current->warp;
    if (++warp.arrived == 32) {
        warp.arrived = 0, warp.generation++, progress++;
        return;
    }
    for (const long before = warp.generation; warp.generation == before;) yield();
}

// What every lane of the warp gave. Two buffers take turns, so that nobody overwrites what another still reads.
template <class T>
const unsigned char (*exchange(const T& value))[32] {
    static_assert(sizeof(T) <= 32, "fits a slot");
    auto* slots = current->warp->slots[current->turn];
    current->turn ^= 1;
    memcpy(slots[current->lane], &value, sizeof value);
    warp_barrier();
    return slots;
}

template <class T>
T lane_value(const unsigned char (*slots)[32], int lane) {
    T value;
    memcpy(&value, slots[lane], sizeof value);
    return value;
}

inline void barrier() {
    if (++arrived == running) {
        arrived = 0, generation++, progress++;
        last_votes = votes, votes = 0;
        return;
    }
    for (const long before = generation; generation == before;) yield();
}

inline void run_fiber() {
    body(arguments);
    current->done = true;
    running--, progress++;
    yield();
}

inline void run_block(int threads) {
    std::vector<Warp> warps((threads + 31) / 32);
    std::vector<Fiber> fibers(threads);
    const size_t stack = 128 << 10;
    static std::vector<char*> stacks;
    while ((int)stacks.size() < threads) stacks.push_back((char*)malloc(stack));
    running = threads, arrived = 0, votes = 0;
    // What a block finds in shared memory is what the one before left; here it is NaN.
    memset(dynamic_shared, 0xff, sizeof dynamic_shared);
    for (int index = 0; index < threads; index++) {
        Fiber& fiber = fibers[index];
        fiber.thread = {index, 0, 0}, fiber.lane = index % 32, fiber.warp = &warps[index / 32];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[index];
        fiber.context.uc_stack.ss_size = stack;
        fiber.context.uc_link = &scheduler;
        makecontext(&fiber.context, run_fiber, 0);
    }
    while (running > 0) {
        const long before = progress;
        for (Fiber& fiber : fibers) {
            if (fiber.done) continue;
            current = &fiber;
            swapcontext(&scheduler, &fiber.context);
        }
        if (progress == before) {
            fprintf(stderr, "block (%d, %d, %d): a barrier that not all threads reach\n", block_index.x,
                    block_index.y, block_index.z);
            abort();
        }
    }
}

}  // namespace emulator

#define threadIdx (emulator::current->thread)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)

inline void __syncthreads() { emulator::barrier(); }
inline int __syncthreads_or(int value) {
    emulator::votes |= value;
    emulator::barrier();
    return emulator::last_votes;
}
template <class T>
T __shfl_sync(u32, T value, int lane) {
    return emulator::lane_value<T>(emulator::exchange(value), lane);
}
template <class T>
T __shfl_xor_sync(u32, T value, int mask) {
    return emulator::lane_value<T>(emulator::exchange(value), emulator::current->lane ^ mask);
}
template <class T>
T __shfl_up_sync(u32, T value, int step) {
    const int lane = emulator::current->lane;
    return emulator::lane_value<T>(emulator::exchange(value), lane < step ? lane : lane - step);
}
inline u32 __ballot_sync(u32, int value) {
    const auto* slots = emulator::exchange(value);
    u32 bits = 0;
    for (int lane = 0; lane < 32; lane++) bits |= (u32)(emulator::lane_value<int>(slots, lane) != 0) << lane;
    return bits;
}

// Round to nearest, ties to even; the sources convert no NaN that matters.
inline bf16 to_bf16(float value) {
    const u32 bits = __float_as_uint(value);
    if (value != value) return 0x7fff;
    return (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | (u32)to_bf16(high) << 16; }

inline void load_matrices(u32 (&to)[4], const bf16* row) {
    const auto* rows = emulator::exchange(row);
    const int lane = emulator::current->lane;
    for (int matrix = 0; matrix < 4; matrix++) {
        const bf16* from = emulator::lane_value<const bf16*>(rows, matrix * 8 + lane / 4) + lane % 4 * 2;
        if ((uintptr_t)from % 4) abort();
        to[matrix] = from[0] | (u32)from[1] << 16;
    }
}
inline void load_transposed(u32 (&to)[4], const bf16* row) {
    const auto* rows = emulator::exchange(row);
    const int lane = emulator::current->lane;
    for (int matrix = 0; matrix < 4; matrix++) {
        const int first = matrix * 8 + lane % 4 * 2;
        const bf16 low = emulator::lane_value<const bf16*>(rows, first)[lane / 4];
        to[matrix] = low | (u32)emulator::lane_value<const bf16*>(rows, first + 1)[lane / 4] << 16;
    }
}
struct Operands {
    u32 a[4], b[2];
};
inline void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    const auto* lanes = emulator::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = emulator::current->lane;
    for (int at = 0; at < 4; at++) {
        const int row = lane / 4 + at / 2 * 8, column = lane % 4 * 2 + at % 2;
        for (int k = 0; k < 16; k++) {
            const Operands left = emulator::lane_value<Operands>(lanes, row % 8 * 4 + k % 8 / 2);
            const Operands right = emulator::lane_value<Operands>(lanes, column * 4 + k % 8 / 2);
            const u32 x = left.a[row / 8 + k / 8 * 2] >> k % 2 * 16, y = right.b[k / 8] >> k % 2 * 16;
            c[at] += __uint_as_float(x << 16) * __uint_as_float(y << 16);
        }
    }
}

inline void copy_16_bytes(bf16* to, const bf16* from, bool exists) {
    if ((uintptr_t)to % 16 || (exists && (uintptr_t)from % 16)) abort();
    emulator::current->open.push_back({to, from, exists});
}
inline void commit_copies() {
    emulator::current->groups.push_back(std::move(emulator::current->open));
    emulator::current->open.clear();
}
template <int PENDING>
void wait_for_copies() {
    auto& groups = emulator::current->groups;
    while (groups.size() > PENDING) {
        for (const auto& copy : groups.front()) {
            if (copy.exists) memcpy(copy.to, copy.from, 16);
            else memset(copy.to, 0, 16);
        }
        groups.erase(groups.begin());
    }
}

// Calls `body` for every thread of every block.
extern "C" __attribute__((visibility("default"))) void launch(void (*body)(void*), void* arguments, const int* grid,
                                                              int threads) {
    emulator::body = body, emulator::arguments = arguments;
    emulator::grid_size = {grid[0], grid[1], grid[2]}, emulator::block_size = {threads, 1, 1};
    for (int z = 0; z < grid[2]; z++)
        for (int y = 0; y < grid[1]; y++)
            for (int x = 0; x < grid[0]; x++) {
                emulator::block_index = {x, y, z};
                emulator::run_block(threads);
            }
}
