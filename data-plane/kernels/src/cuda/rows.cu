// Kernels that treat each row by itself: gathers, RMSNorm, SwiGLU, and the copy of pages.
// Activations between products are f32; what a product reads is bf16. Widths are multiples of 8.

// stream[row] = table[ids[row]]. Grid: rows.
extern "C" __global__ void embed(float* stream, const bf16* table, const u32* ids, int width) {
    const bf16* from = table + (u64)ids[blockIdx.x] * width;
    float* to = stream + (u64)blockIdx.x * width;
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
        const ushort4 values = *(const ushort4*)(from + at);
        *(float4*)(to + at) = make_float4(to_f32(values.x), to_f32(values.y), to_f32(values.z), to_f32(values.w));
    }
}

// target[row] = source[indices[row]]. Grid: rows.
extern "C" __global__ void gather_rows(bf16* target, const bf16* source, const u32* indices, int width) {
    const bf16* from = source + (u64)indices[blockIdx.x] * width;
    bf16* to = target + (u64)blockIdx.x * width;
    for (int at = 8 * threadIdx.x; at < width; at += 8 * blockDim.x) *(uint4*)(to + at) = *(const uint4*)(from + at);
}

// Writes the row scaled to a mean square of 1, times the weight.
__device__ __forceinline__ void write_normed(bf16* y, const float* x, const float* weight, float squares, float eps,
                                             int width) {
    const float scale = 1.0f / sqrtf(block_sum(squares) / (float)width + eps);
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
        const float4 value = *(const float4*)(x + at), factor = *(const float4*)(weight + at);
        *(uint2*)(y + at) = make_uint2(pack_bf16(value.x * scale * factor.x, value.y * scale * factor.y),
                                       pack_bf16(value.z * scale * factor.z, value.w * scale * factor.w));
    }
}

// y = x / sqrt(mean(x^2) + eps) * weight. Grid: rows.
extern "C" __global__ void rms_norm(bf16* y, const float* x, const float* weight, float eps, int width) {
    x += (u64)blockIdx.x * width;
    float squares = 0.0f;
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
        const float4 value = *(const float4*)(x + at);
        squares += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    }
    write_normed(y + (u64)blockIdx.x * width, x, weight, squares, eps, width);
}

// x += delta (+ bias), then as rms_norm. Grid: rows. A thread reads back only what it wrote itself.
extern "C" __global__ void add_rms_norm(bf16* y, float* x, const float* delta, const float* bias, const float* weight,
                                        float eps, int width) {
    x += (u64)blockIdx.x * width;
    delta += (u64)blockIdx.x * width;
    float squares = 0.0f;
    for (int at = 4 * threadIdx.x; at < width; at += 4 * blockDim.x) {
        float4 value = *(const float4*)(x + at);
        const float4 more = *(const float4*)(delta + at);
        value.x += more.x, value.y += more.y, value.z += more.z, value.w += more.w;
        if (bias) {
            const float4 shift = *(const float4*)(bias + at);
            value.x += shift.x, value.y += shift.y, value.z += shift.z, value.w += shift.w;
        }
        *(float4*)(x + at) = value;
        squares += value.x * value.x + value.y * value.y + value.z * value.z + value.w * value.w;
    }
    write_normed(y + (u64)blockIdx.x * width, x, weight, squares, eps, width);
}

__device__ __forceinline__ float gated(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

// y = silu(gate) * up over rows of [gate, up], each `width` wide. Grid: (parts of a row, rows).
extern "C" __global__ void swiglu(bf16* y, const float* gate_up, const float* bias, int width) {
    const float* gates = gate_up + (u64)blockIdx.y * 2 * width;
    const int at = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    if (at >= width) return;
    float4 gate = *(const float4*)(gates + at), up = *(const float4*)(gates + width + at);
    if (bias) {
        const float4 first = *(const float4*)(bias + at), second = *(const float4*)(bias + width + at);
        gate.x += first.x, gate.y += first.y, gate.z += first.z, gate.w += first.w;
        up.x += second.x, up.y += second.y, up.z += second.z, up.w += second.w;
    }
    *(uint2*)(y + (u64)blockIdx.y * width + at) =
        make_uint2(pack_bf16(gated(gate.x, up.x), gated(gate.y, up.y)),
                   pack_bf16(gated(gate.z, up.z), gated(gate.w, up.w)));
}

// Copies pages within a pool of `gridDim.z` parts (keys and values of each layer), each `part` elements.
// Pairs are (from, to); no page is both. Grid: (pairs, parts of a page, parts of the pool).
extern "C" __global__ void copy_pages(bf16* pool, const uint2* pairs, u64 part, u64 page) {
    const uint2 pair = pairs[blockIdx.x];
    bf16* base = pool + blockIdx.z * part;
    const u64 step = 8ull * blockDim.x * gridDim.y;
    for (u64 at = 8ull * (blockIdx.y * blockDim.x + threadIdx.x); at < page; at += step)
        *(uint4*)(base + pair.y * page + at) = *(const uint4*)(base + pair.x * page + at);
}
