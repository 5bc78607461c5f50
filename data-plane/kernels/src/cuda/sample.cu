// Sampling, one block a row. The order of steps is the CPU sampler's: penalties, bias, grammar, min_tokens,
// log-probability, temperature, top-k, min-p, top-p, draw. Greedy where the temperature is 0; the lowest id wins a tie.
//
// Nothing is sorted. "The k likeliest", "the likeliest whose weights reach a mass" and "the one where the running sum
// passes a number" are all found by fixing eight bits of the logit at a time. Weights are summed as integers (units of
// 2^-40), so that the order in which threads add does not matter: the same row draws the same token always.

#define THREADS 1024
#define WARPS (THREADS / 32)
#define UNIT 1099511627776.0f
#define NONE 0xffffffffu
// Stop tokens of a row, at most.
#define MAX_STOPS 64

struct Row {
    // In [0, 1).
    double uniform;
    float temperature;
    float top_p;
    // Candidates lie above the largest logit by this times the temperature: ln(min_p), or where f32 weights vanish.
    float floor;
    float repetition, presence, frequency;
    u32 top_k;
    // Ranges of `entries`: tokens seen, with their count in the reply; biases; stop tokens that may not come yet.
    u32 seen_start, seen_len, bias_start, bias_len, stop_start, stop_len;
    // First word of the grammar's mask, or NONE.
    u32 mask_start;
    // Whether the log-probability is wanted.
    u32 logprob;
    u32 reserved;
};

// A larger logit has a larger key.
__device__ __forceinline__ u32 key_of(float logit) {
    const u32 bits = __float_as_uint(logit);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Candidates: larger keys, and those with this key up to an id.
struct Limit {
    u32 key, id;
};

struct View {
    const float* logits;
    u32 vocab;
    float largest, temperature;
    Limit limit;
};

__device__ __forceinline__ bool is_candidate(const View& view, u32 id, u32 key) {
    return key > view.limit.key || (key == view.limit.key && id <= view.limit.id);
}

__device__ __forceinline__ u64 weight_of(const View& view, float logit) {
    return (u64)(expf((logit - view.largest) / view.temperature) * UNIT);
}

// What is summed: candidates, their weights, or candidates that have one key.
enum Measure { COUNT, WEIGHT, HAS_KEY };

__device__ __forceinline__ u64 measure_of(const View& view, Measure measure, u32 id, u32 wanted) {
    const float logit = view.logits[id];
    const u32 key = key_of(logit);
    if (!is_candidate(view, id, key)) return 0;
    if (measure == WEIGHT) return weight_of(view, logit);
    return measure == COUNT || key == wanted;
}

__device__ __forceinline__ u64 warp_sum_u64(u64 value) {
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}

__device__ u64 block_sum_u64(u64 value) {
    __shared__ u64 parts[WARPS];
    value = warp_sum_u64(value);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_sum_u64(parts[threadIdx.x % 32]);
    __syncthreads();
    return value;
}

__device__ u64 total_of(const View& view, Measure measure, u32 wanted) {
    u64 sum = 0;
    for (u32 id = threadIdx.x; id < view.vocab; id += THREADS) sum += measure_of(view, measure, id, wanted);
    return block_sum_u64(sum);
}

// The key, from the largest down, at which the running sum passes `target`; `before`: the sum of larger keys.
__device__ u32 select_key(const View& view, Measure measure, u64 target, u64* before) {
    __shared__ u64 sums[256];
    __shared__ u32 chosen;
    __shared__ u64 passed;
    u32 prefix = 0;
    u64 above = 0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        if (threadIdx.x < 256) sums[threadIdx.x] = 0;
        __syncthreads();
        for (u32 id = threadIdx.x; id < view.vocab; id += THREADS) {
            const u32 key = key_of(view.logits[id]);
            if (shift < 24 && key >> (shift + 8) != prefix) continue;
            const u64 part = measure_of(view, measure, id, 0);
            if (part) atomicAdd(&sums[key >> shift & 255], part);
        }
        __syncthreads();
        if (threadIdx.x == 0) {
            u64 sum = above;
            int digit = 255;
            while (digit > 0 && sum + sums[digit] <= target) sum += sums[digit--];
            chosen = digit;
            passed = sum;
        }
        __syncthreads();
        prefix = prefix << 8 | chosen;
        above = passed;
        __syncthreads();
    }
    *before = above;
    return prefix;
}

// The id, from 0 up, at which the running sum passes `target`; NONE if none does. Each warp takes a range of ids.
__device__ u32 select_id(const View& view, Measure measure, u64 target, u32 wanted) {
    __shared__ u64 parts[WARPS];
    __shared__ u32 chosen;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, share = (view.vocab + WARPS - 1) / WARPS;
    const u32 start = warp * share, end = min(view.vocab, start + share);
    u64 sum = 0;
    for (u32 id = start + lane; id < end; id += 32) sum += measure_of(view, measure, id, wanted);
    sum = warp_sum_u64(sum);
    if (lane == 0) parts[warp] = sum;
    if (threadIdx.x == 0) chosen = NONE;
    __syncthreads();
    u64 before = 0;
    for (u32 other = 0; other < warp; other++) before += parts[other];
    if (before <= target && target < before + sum) {
        for (u32 first = start; first < end; first += 32) {
            const u32 id = first + lane;
            u64 running = id < end ? measure_of(view, measure, id, wanted) : 0;
            for (int step = 1; step < 32; step *= 2) {
                const u64 other = __shfl_up_sync(0xffffffffu, running, step);
                if (lane >= step) running += other;
            }
            const u32 passed = __ballot_sync(0xffffffffu, before + running > target);
            if (passed) {
                if (lane == 0) chosen = first + __ffs(passed) - 1;
                break;
            }
            before += __shfl_sync(0xffffffffu, running, 31);
        }
    }
    __syncthreads();
    const u32 id = chosen;
    __syncthreads();
    return id;
}

// Index of the largest logit; NONE where there is a NaN or nothing finite.
__device__ u32 argmax(const float* logits, u32 vocab, float* largest) {
    __shared__ u64 parts[WARPS];
    // The key above the complement of the id: of equal logits the lowest id is the largest.
    u64 best = 0;
    bool is_nan = false;
    for (u32 id = threadIdx.x; id < vocab; id += THREADS) {
        const float logit = logits[id];
        is_nan |= logit != logit;
        // Both zeros are one number.
        best = max(best, (u64)key_of(logit + 0.0f) << 32 | ~id);
    }
    for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = best;
    is_nan = __syncthreads_or(is_nan);
    best = parts[threadIdx.x % 32];
    for (int step = 16; step > 0; step /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, step));
    __syncthreads();
    const u32 id = ~(u32)best;
    if (is_nan || id >= vocab) return NONE;
    *largest = logits[id];
    return fabsf(*largest) < INFINITY_F ? id : NONE;
}

// Penalties, bias and grammar.
__device__ void edit(float* logits, const Row& row, const uint2* entries, const u32* masks, u32 vocab) {
    for (u32 at = threadIdx.x; at < row.seen_len; at += THREADS) {
        const uint2 seen = entries[row.seen_start + at];
        if (seen.x >= vocab) continue;
        float logit = logits[seen.x];
        logit = logit > 0.0f ? logit / row.repetition : logit * row.repetition;
        if (seen.y > 0) logit -= row.presence + row.frequency * (float)seen.y;
        logits[seen.x] = logit;
    }
    __syncthreads();
    // One thread, because an id may have several biases, which add up.
    if (threadIdx.x == 0)
        for (u32 at = 0; at < row.bias_len; at++) {
            const uint2 bias = entries[row.bias_start + at];
            if (bias.x < vocab) logits[bias.x] += __uint_as_float(bias.y);
        }
    __syncthreads();
    if (row.mask_start != NONE)
        for (u32 id = threadIdx.x; id < vocab; id += THREADS)
            if (!(masks[row.mask_start + id / 32] >> id % 32 & 1)) logits[id] = -INFINITY_F;
    __syncthreads();
}

// The likeliest token, stop tokens taken out where it is too early for them and there is another.
__device__ u32 likeliest(float* logits, const Row& row, const uint2* entries, u32 vocab, float* largest) {
    __shared__ float saved[MAX_STOPS];
    const u32 sound = argmax(logits, vocab, largest);
    if (row.stop_len == 0 || sound == NONE) return sound;
    const float sound_largest = *largest;
    const u32 at = threadIdx.x;
    const u32 stop = at < row.stop_len ? entries[row.stop_start + at].x : NONE;
    if (stop < vocab) saved[at] = logits[stop];
    __syncthreads();
    if (stop < vocab) logits[stop] = -INFINITY_F;
    __syncthreads();
    const u32 best = argmax(logits, vocab, largest);
    if (best != NONE) return best;
    // The grammar has ended.
    if (stop < vocab) logits[stop] = saved[at];
    __syncthreads();
    *largest = sound_largest;
    return sound;
}

// ln of the sum of all powers, as a difference to the largest logit.
__device__ float log_sum(const float* logits, u32 vocab, float largest) {
    __shared__ double parts[WARPS];
    double sum = 0.0;
    for (u32 id = threadIdx.x; id < vocab; id += THREADS) sum += (double)expf(logits[id] - largest);
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = parts[threadIdx.x % 32];
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    __syncthreads();
    return (float)log(sum);
}

// Keeps the candidates down to the one at which the running sum passes `target`.
__device__ void keep(View& view, Measure measure, u64 target) {
    u64 before;
    const u32 key = select_key(view, measure, target, &before);
    u64 index = target - before;
    if (measure == WEIGHT) {
        // All that share a key share a weight.
        const u32 any = select_id(view, HAS_KEY, 0, key);
        const u64 weight = any == NONE ? 0 : weight_of(view, view.logits[any]);
        index = weight ? index / weight : 0;
    }
    const u32 id = select_id(view, HAS_KEY, index, key);
    view.limit = {key, id};
}

// Draws by weight from what top-k, min-p and top-p leave.
__device__ u32 draw(View& view, const Row& row) {
    view.limit = {key_of(view.largest + row.floor * row.temperature), NONE};
    if (row.top_k > 0 && total_of(view, COUNT, 0) > row.top_k) keep(view, COUNT, row.top_k - 1);
    u64 total = total_of(view, WEIGHT, 0);
    if (row.top_p >= 1.0f) {
        const u64 target = min((u64)(row.uniform * (double)total), total - 1);
        return select_id(view, WEIGHT, target, 0);
    }
    const u64 mass = (u64)ceil((double)row.top_p * (double)total);
    keep(view, WEIGHT, mass > 0 ? min(mass, total) - 1 : 0);
    total = total_of(view, WEIGHT, 0);
    // Likeliest first: the candidate where the sum passes is the last that `keep` would leave.
    keep(view, WEIGHT, min((u64)(row.uniform * (double)total), total - 1));
    return view.limit.id;
}

// Grid: rows. `logits` ([rows][vocab]) change in place. A token of NONE: the logits are not numbers.
extern "C" __global__ void __launch_bounds__(THREADS)
    sample(u32* tokens, float* logprobs, float* logits, const Row* rows, const uint2* entries, const u32* masks,
           u32 vocab) {
    const Row row = rows[blockIdx.x];
    logits += (u64)blockIdx.x * vocab;
    edit(logits, row, entries, masks, vocab);
    float largest = 0.0f;
    u32 token = likeliest(logits, row, entries, vocab, &largest);
    const u32 best = token;
    if (best != NONE && row.temperature > 0.0f) {
        View view = {logits, vocab, largest, row.temperature, {0, NONE}};
        token = draw(view, row);
    }
    float logprob = 0.0f;
    if (best != NONE && row.logprob) logprob = logits[token] - (largest + log_sum(logits, vocab, largest));
    if (threadIdx.x == 0) {
        tokens[blockIdx.x] = token;
        logprobs[blockIdx.x] = logprob;
    }
}
