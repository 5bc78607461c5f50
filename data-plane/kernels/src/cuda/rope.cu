// The norm of the heads of q and k (where the family has one), the rotary embedding (half-split), and the write of k
// and v into the paged cache, in one pass over a row of [q, k, v].
//
// Keys lie as [pages][kv_heads][page_size][head_dim], and values likewise.

// Grid: rows; 8 warps, of which each takes every eighth head. Rows whose slot is ~0 are padding: nothing is kept.
extern "C" __global__ void rope_store(bf16* queries, bf16* keys, bf16* values, const float* qkv, const float* bias,
                                      const float* angles, const u32* positions, const u32* slots, const float* norms,
                                      float eps, int heads, int kv_heads, int head_dim, int page_size) {
    const int row = blockIdx.x, lane = threadIdx.x % 32, half = head_dim / 2;
    const u32 slot = slots[row];
    if (slot == ~0u) return;
    const float* cosines = angles + (u64)positions[row] * head_dim;
    const float* sines = cosines + half;
    for (int head = threadIdx.x / 32; head < heads + 2 * kv_heads; head += blockDim.x / 32) {
        const float* from = qkv + ((u64)row * (heads + 2 * kv_heads) + head) * head_dim;
        const float* shift = bias ? bias + head * head_dim : nullptr;
        const bool is_query = head < heads, is_value = head >= heads + kv_heads;
        bf16* to = queries + ((u64)row * heads + head) * head_dim;
        if (!is_query) {
            const int kv_head = is_value ? head - heads - kv_heads : head - heads;
            const u64 page = slot / page_size, offset = slot % page_size;
            to = (is_value ? values : keys) + ((page * kv_heads + kv_head) * page_size + offset) * head_dim;
        }
        const float* weight = is_query || !norms ? norms : norms + head_dim;
        float scale = 1.0f;
        if (weight && !is_value) {
            float squares = 0.0f;
            for (int at = lane; at < head_dim; at += 32) {
                const float value = from[at] + (shift ? shift[at] : 0.0f);
                squares += value * value;
            }
            scale = 1.0f / sqrtf(warp_sum(squares) / (float)head_dim + eps);
        }
        for (int at = lane; at < half; at += 32) {
            float low = from[at], high = from[at + half];
            if (shift) low += shift[at], high += shift[at + half];
            if (!is_value) {
                if (weight) low *= scale * weight[at], high *= scale * weight[at + half];
                const float cosine = cosines[at], sine = sines[at];
                const float turned = low * cosine - high * sine;
                high = high * cosine + low * sine;
                low = turned;
            }
            to[at] = to_bf16(low);
            to[at + half] = to_bf16(high);
        }
    }
}
