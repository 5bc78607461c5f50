// What all sources share. It includes no header, so that a machine needs no toolkit to compile them: NVRTC alone.

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
// bfloat16 as its bits.
typedef u16 bf16;

__device__ __forceinline__ float to_f32(bf16 value) { return __uint_as_float((u32)value << 16); }

__device__ __forceinline__ bf16 to_bf16(float value) {
    bf16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

// Two values, the first in the lower half.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
    u32 bits;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
    return bits;
}

__device__ __forceinline__ float warp_sum(float value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

// The sum over a block of at most 1,024 threads, for every thread. The order of the sum depends on the block's size
// alone, so that a row's result does not depend on its company.
__device__ __forceinline__ float block_sum(float value) {
    __shared__ float parts[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = (blockDim.x + 31) / 32;
    value = warp_sum(value);
    if (lane == 0) parts[warp] = value;
    __syncthreads();
    value = warp_sum(lane < warps ? parts[lane] : 0.0f);
    __syncthreads();
    return value;
}

#define INFINITY_F __int_as_float(0x7f800000)
