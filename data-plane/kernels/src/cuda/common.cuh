// What all sources share, on top of machine.cuh.

#define INFINITY_F __int_as_float(0x7f800000)

__device__ __forceinline__ float to_f32(bf16 value) { return __uint_as_float((u32)value << 16); }

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
