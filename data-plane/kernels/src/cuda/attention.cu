// Causal attention over a paged cache, on tensor cores (mma.sync m16n8k16, bf16 with f32 sums).
//
// Compiled for one head width: HEAD_DIM (a multiple of 8, at most 256), and STAGES buffers in shared memory (1 or 2).
//
// Keys and values go through shared memory in blocks of 64 positions, counted from the sequence's start, while the
// tensor cores work on the block before. The running maximum and sum are those of Milakov and Gimelshein 2018 (arXiv
// 1805.02867), to base 2. The query heads that share a key head are rows of one tile, so that each key is read once
// for all of them. In a prefill, the four warps of a block take 16 rows each and see all keys; in a decode, they have
// the same 16 rows and take 16 keys of a block each, and what they found is merged at the end. A decode's positions
// are split over blocks, so that few sequences fill the card as well (split-KV); combine() puts the splits together.

#define PADDED ((HEAD_DIM + 15) / 16 * 16)
// Elements between rows in shared memory: 16 bytes more than a row, so that eight rows lie in different banks.
#define STRIDE (PADDED + 8)
#define BLOCK 64
#define THREADS 128
#define LOG2_E 1.4426950408889634f
#define STAGE_ELEMENTS (2 * BLOCK * STRIDE)

// One sequence: first row, rows, positions in the cache, first of its pages in the tables.
struct Sequence {
    int query_start, query_len, context_len, page_start;
};

struct Cache {
    const bf16* keys;
    const bf16* values;
    const u32* pages;
    int kv_head, kv_heads, page_size;
};

// Starts the copy of positions first .. first + 64 into a stage: keys, then values. Positions outside of [begin, end)
// become zeros, and neither they nor their pages are read: they may hold anything.
__device__ __forceinline__ void load_block(bf16* stage, const Cache& cache, int first, int begin, int end) {
    constexpr int PARTS = PADDED / 8;
    for (int index = threadIdx.x; index < BLOCK * PARTS; index += THREADS) {
        const int row = index / PARTS, column = index % PARTS * 8, position = first + row;
        const bool exists = position >= begin && position < end && column < HEAD_DIM;
        u64 at = 0;
        if (exists) {
            const u64 page = cache.pages[position / cache.page_size];
            const u64 slot = (page * cache.kv_heads + cache.kv_head) * cache.page_size + position % cache.page_size;
            at = slot * HEAD_DIM + column;
        }
        copy_16_bytes(stage + row * STRIDE + column, cache.keys + at, exists);
        copy_16_bytes(stage + (BLOCK + row) * STRIDE + column, cache.values + at, exists);
    }
    commit_copies();
}

// What a warp knows of its 16 rows. A lane holds parts of rows lane / 4 and lane / 4 + 8.
struct Rows {
    u32 queries[PADDED / 16][4];
    float sums[PADDED / 8][4];
    float largest[2], total[2];
    // The positions that each row sees: from .. to, both included; none where to < from.
    int from[2], to[2];
};

__device__ __forceinline__ void clear(Rows& rows) {
#pragma unroll
    for (int tile = 0; tile < PADDED / 8; tile++)
#pragma unroll
        for (int at = 0; at < 4; at++) rows.sums[tile][at] = 0.0f;
#pragma unroll
    for (int half = 0; half < 2; half++) rows.largest[half] = -INFINITY_F, rows.total[half] = 0.0f;
}

// Loads a row's part of the queries into registers; zeros where there is no row.
__device__ __forceinline__ void load_queries(Rows& rows, int half, const bf16* query) {
    const int pair = threadIdx.x % 4 * 2;
#pragma unroll
    for (int step = 0; step < PADDED / 16; step++) {
        const int column = step * 16 + pair;
        rows.queries[step][half] = query && column < HEAD_DIM ? *(const u32*)(query + column) : 0;
        rows.queries[step][half + 2] = query && column + 8 < HEAD_DIM ? *(const u32*)(query + column + 8) : 0;
    }
}

// Attends to KEYS positions of a stage: those from `offset` on, of which the first is position `first`.
template <int KEYS>
__device__ __forceinline__ void attend(Rows& rows, const bf16* stage, int offset, int first, float scale) {
    const int lane = threadIdx.x % 32, matrix = lane / 8, pair = lane % 4 * 2;
    float scores[KEYS / 8][4];
#pragma unroll
    for (int tile = 0; tile < KEYS / 8; tile++)
#pragma unroll
        for (int at = 0; at < 4; at++) scores[tile][at] = 0.0f;
    const bf16* keys = stage + (offset + matrix / 2 * 8 + lane % 8) * STRIDE + matrix % 2 * 8;
#pragma unroll
    for (int step = 0; step < PADDED / 16; step++)
#pragma unroll
        for (int tile = 0; tile < KEYS / 8; tile += 2) {
            u32 key[4];
            load_matrices(key, keys + tile * 8 * STRIDE + step * 16);
            multiply_add(scores[tile], rows.queries[step], key[0], key[1]);
            multiply_add(scores[tile + 1], rows.queries[step], key[2], key[3]);
        }
    float largest[2] = {rows.largest[0], rows.largest[1]};
#pragma unroll
    for (int tile = 0; tile < KEYS / 8; tile++)
#pragma unroll
        for (int at = 0; at < 4; at++) {
            const int half = at / 2, position = first + tile * 8 + pair + at % 2;
            const bool seen = position >= rows.from[half] && position <= rows.to[half];
            scores[tile][at] = seen ? scores[tile][at] * scale : -INFINITY_F;
            largest[half] = fmaxf(largest[half], scores[tile][at]);
        }
#pragma unroll
    for (int half = 0; half < 2; half++) {
        for (int step = 1; step < 4; step *= 2)
            largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], step));
        // A row that has seen nothing yet has no maximum; any number will do, since its powers are all 0.
        const float base = largest[half] == -INFINITY_F ? 0.0f : largest[half];
        const float shrink = exp2f(rows.largest[half] - base);
        rows.largest[half] = largest[half];
        rows.total[half] *= shrink;
#pragma unroll
        for (int tile = 0; tile < PADDED / 8; tile++)
            rows.sums[tile][2 * half] *= shrink, rows.sums[tile][2 * half + 1] *= shrink;
#pragma unroll
        for (int tile = 0; tile < KEYS / 8; tile++)
#pragma unroll
            for (int at = 2 * half; at < 2 * half + 2; at++) {
                scores[tile][at] = exp2f(scores[tile][at] - base);
                rows.total[half] += scores[tile][at];
            }
    }
    const bf16* values = stage + BLOCK * STRIDE + (offset + matrix % 2 * 8 + lane % 8) * STRIDE + matrix / 2 * 8;
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        const float(&low)[4] = scores[2 * step], (&high)[4] = scores[2 * step + 1];
        const u32 powers[4] = {pack_bf16(low[0], low[1]), pack_bf16(low[2], low[3]), pack_bf16(high[0], high[1]),
                               pack_bf16(high[2], high[3])};
#pragma unroll
        for (int tile = 0; tile < PADDED / 8; tile += 2) {
            u32 value[4];
            load_transposed(value, values + step * 16 * STRIDE + tile * 8);
            multiply_add(rows.sums[tile], powers, value[0], value[1]);
            multiply_add(rows.sums[tile + 1], powers, value[2], value[3]);
        }
    }
}

// Runs `attend` over the blocks first_block .. end_block, while the next block is on its way.
template <int KEYS>
__device__ __forceinline__ void attend_blocks(Rows& rows, bf16* stages, const Cache& cache, int first_block,
                                              int end_block, int begin, int end, int offset, float scale) {
    if (first_block < end_block) load_block(stages, cache, first_block * BLOCK, begin, end);
    for (int block = first_block; block < end_block; block++) {
        const int stage = STAGES == 2 ? (block - first_block) % 2 : 0;
        const bool more = block + 1 < end_block;
        if (STAGES == 2 && more) {
            load_block(stages + (1 - stage) * STAGE_ELEMENTS, cache, (block + 1) * BLOCK, begin, end);
            wait_for_copies<1>();
        } else {
            wait_for_copies<0>();
        }
        __syncthreads();
        attend<KEYS>(rows, stages + stage * STAGE_ELEMENTS, offset, block * BLOCK + offset, scale);
        __syncthreads();
        if (STAGES == 1 && more) load_block(stages, cache, (block + 1) * BLOCK, begin, end);
    }
#pragma unroll
    for (int half = 0; half < 2; half++)
        for (int step = 1; step < 4; step *= 2)
            rows.total[half] += __shfl_xor_sync(0xffffffffu, rows.total[half], step);
}

// Grid: (tiles, kv_heads). A tile is (sequence, first of 64 rows), rows being the sequence's queries times the heads
// of a group. `window`: positions that a token sees, its own included; 0 for all.
extern "C" __global__ void __launch_bounds__(THREADS)
    attend_prefill(bf16* y, const bf16* queries, const bf16* keys, const bf16* values, const Sequence* sequences,
                   const u32* page_tables, const int2* tiles, int heads, int kv_heads, int page_size, int window,
                   float scale) {
    DYNAMIC_SHARED(bf16, stages);
    const int2 tile = tiles[blockIdx.x];
    const Sequence sequence = sequences[tile.x];
    const int group = heads / kv_heads, kv_head = blockIdx.y, all = sequence.query_len * group;
    const int computed = sequence.context_len - sequence.query_len, lane = threadIdx.x % 32;
    const Cache cache = {keys, values, page_tables + sequence.page_start, kv_head, kv_heads, page_size};
    Rows rows;
    clear(rows);
    u64 outputs[2];
    bool exists[2];
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = tile.y + threadIdx.x / 32 * 16 + lane / 4 + 8 * half;
        const int position = computed + row / group, head = kv_head * group + row % group;
        exists[half] = row < all;
        outputs[half] = ((u64)(sequence.query_start + row / group) * heads + head) * HEAD_DIM;
        rows.to[half] = exists[half] ? position : -1;
        rows.from[half] = window ? max(0, position - window + 1) : 0;
        load_queries(rows, half, exists[half] ? queries + outputs[half] : nullptr);
    }
    const int first = computed + tile.y / group, last = computed + (min(tile.y + 64, all) - 1) / group;
    const int begin = window ? max(0, first - window + 1) : 0;
    attend_blocks<BLOCK>(rows, stages, cache, begin / BLOCK, last / BLOCK + 1, begin, last + 1, 0, scale * LOG2_E);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        if (!exists[half]) continue;
        const float factor = 1.0f / rows.total[half];
#pragma unroll
        for (int step = 0; step < PADDED / 8; step++) {
            const int column = step * 8 + lane % 4 * 2;
            if (column < HEAD_DIM)
                *(u32*)(y + outputs[half] + column) =
                    pack_bf16(rows.sums[step][2 * half] * factor, rows.sums[step][2 * half + 1] * factor);
        }
    }
}

// Grid: (splits, kv_heads times tiles of 16 heads of a group, sequences). Sequences of one query each; a context of 0
// is padding. With one split, y is written; else parts ([sequences][splits][heads][HEAD_DIM]) and stats ([sequences]
// [splits][heads] of maximum and sum).
extern "C" __global__ void __launch_bounds__(THREADS)
    attend_decode(bf16* y, float* parts, float2* stats, const bf16* queries, const bf16* keys, const bf16* values,
                  const Sequence* sequences, const u32* page_tables, int heads, int kv_heads, int page_size,
                  int window, float scale) {
    DYNAMIC_SHARED(bf16, stages);
    __shared__ float largest[4][16], totals[4][16];
    const Sequence sequence = sequences[blockIdx.z];
    const int context = sequence.context_len;
    if (context == 0) return;
    const int group = heads / kv_heads, tiles = (group + 15) / 16, kv_head = blockIdx.y / tiles;
    const int first_head = kv_head * group + blockIdx.y % tiles * 16;
    const int count = min(16, group - (int)(blockIdx.y % tiles) * 16);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, splits = gridDim.x, split = blockIdx.x;
    const Cache cache = {keys, values, page_tables + sequence.page_start, kv_head, kv_heads, page_size};
    const int begin = window ? max(0, context - window) : 0, first_block = begin / BLOCK;
    const int blocks = (context + BLOCK - 1) / BLOCK - first_block, share = (blocks + splits - 1) / splits;
    const int from = first_block + min(blocks, split * share), to = first_block + min(blocks, (split + 1) * share);
    Rows rows;
    clear(rows);
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + 8 * half;
        rows.from[half] = begin;
        rows.to[half] = row < count ? context - 1 : -1;
        const bf16* query = queries + ((u64)sequence.query_start * heads + first_head + row) * HEAD_DIM;
        load_queries(rows, half, row < count ? query : nullptr);
    }
    attend_blocks<16>(rows, stages, cache, from, to, begin, context, warp * 16, scale * LOG2_E);
    // The stages are free again: 4 warps times 16 rows of f32 take less than one.
    float* found = (float*)stages;
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = lane / 4 + 8 * half;
        if (lane % 4 == 0) largest[warp][row] = rows.largest[half], totals[warp][row] = rows.total[half];
#pragma unroll
        for (int step = 0; step < PADDED / 8; step++) {
            float* cell = found + (warp * 16 + row) * PADDED + step * 8 + lane % 4 * 2;
            *(float2*)cell = make_float2(rows.sums[step][2 * half], rows.sums[step][2 * half + 1]);
        }
    }
    __syncthreads();
    for (int index = threadIdx.x; index < count * HEAD_DIM; index += THREADS) {
        const int row = index / HEAD_DIM, column = index % HEAD_DIM, head = first_head + row;
        float most = -INFINITY_F, sum = 0.0f, total = 0.0f;
        for (int part = 0; part < 4; part++) most = fmaxf(most, largest[part][row]);
        for (int part = 0; part < 4 && most > -INFINITY_F; part++) {
            const float factor = exp2f(largest[part][row] - most);
            sum += factor * found[(part * 16 + row) * PADDED + column];
            total += factor * totals[part][row];
        }
        if (splits == 1) {
            y[((u64)sequence.query_start * heads + head) * HEAD_DIM + column] = to_bf16(sum / total);
        } else {
            const u64 at = ((u64)blockIdx.z * splits + split) * heads + head;
            parts[at * HEAD_DIM + column] = sum;
            if (column == 0) stats[at] = make_float2(most, total);
        }
    }
}

// Puts the splits of attend_decode together. Grid: (heads, sequences).
extern "C" __global__ void combine(bf16* y, const float* parts, const float2* stats, const Sequence* sequences,
                                   int splits) {
    const Sequence sequence = sequences[blockIdx.y];
    if (sequence.context_len == 0) return;
    const int head = blockIdx.x, heads = gridDim.x;
    const u64 base = (u64)blockIdx.y * splits * heads + head;
    float most = -INFINITY_F, total = 0.0f;
    for (int split = 0; split < splits; split++) most = fmaxf(most, stats[base + split * heads].x);
    for (int split = 0; split < splits; split++) {
        const float2 stat = stats[base + split * heads];
        total += exp2f(stat.x - most) * stat.y;
    }
    for (int column = threadIdx.x; column < HEAD_DIM; column += blockDim.x) {
        float sum = 0.0f;
        for (int split = 0; split < splits; split++) {
            const u64 at = base + split * heads;
            sum += exp2f(stats[at].x - most) * parts[at * HEAD_DIM + column];
        }
        y[((u64)sequence.query_start * heads + head) * HEAD_DIM + column] = to_bf16(sum / total);
    }
}
