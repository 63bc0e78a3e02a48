// LPS: which patches a pair keeps (laps.md, "language-context patch selection"). One warp, one pair.

#define FULL 0xFFFFFFFFu
#define INFINITY_F __uint_as_float(0x7F800000u)

DEVICE int lane_id() { return (int)(threadIdx.x & 31); }

DEVICE float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, step));
    return x;
}

DEVICE float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL, x, step);
    return x;
}

// A key that sorts as the number does; both zeros share one key.
DEVICE u32 sort_key(float x) {
    u32 bits = __float_as_uint(x + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// Counter-based noise, a function of (seed, image, caption, patch): the same as src/slimming/noise.rs.
DEVICE u64 mix(u64 z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

DEVICE u64 absorb(u64 h, u64 index) { return mix(h + (index + 1) * 0x9E3779B97F4A7C15ull); }

DEVICE u64 pair_noise(u64 seed, int image, int text) {
    return absorb(absorb(mix(seed + 0x9E3779B97F4A7C15ull), (u64)image), (u64)text);
}

// log u - log(1 - u) of u = (draw + 1/2) 2^-53. The complement is formed of integers: near 1, u itself has no digits.
DEVICE float logistic(u64 pair, int patch) {
    u64 draw = absorb(pair, (u64)patch) >> 11;
    // In (0, 1): logarithms of numbers near 2^53 would lose the digits of their difference.
    const double unit = 1.1102230246251565e-16;  // 2^-53
    double u = ((double)draw + 0.5) * unit, off = ((double)(0x1FFFFFFFFFFFFFull - draw) + 0.5) * unit;
    return logf((float)u) - logf((float)off);
}

#define SCORE_CLAMP 1e-6f

DEVICE float log_odds(float s) {
    s = fminf(fmaxf(s, SCORE_CLAMP), 1.0f - SCORE_CLAMP);
    return logf(s) - log1pf(-s);
}

// What a warp keeps of its pair in shared memory.
struct PairMemory {
    float* scores;    // (N): s_i
    u32* keys;        // (N), and until the selection is made, other values of the patches
    u32* kept;        // (stride / 32 + 1): bits of the rows that aggregated tokens sum over
    float* values;    // (stride): D_i, of SELECT_SOFT only
    Element* fused;   // (stride): weights of the fused token; all of the memory begins here
    float* inverse;   // (slots): 1 / |token|
    float* best;      // (slots): highest cosine of each token
    int* best_word;   // (slots)
    float* exact;     // (16): cosines of a token that is computed exactly
    float fraction;   // mean_i D_i
    float highest_dropped;  // the maximum of s_i over the dropped patches
    bool has_fused;
    bool is_empty;          // whether a mask keeps no patch
};

// Bytes of shared memory that a warp needs; the host computes the same (src/cuda/similarity.rs).
DEVICE int align16(int bytes) { return (bytes + 15) & ~15; }

DEVICE int warp_bytes(const Call& call) {
    return align16(call.stride * (int)sizeof(Element)) + align16(8 * call.patches) +
        align16(4 * (call.stride / 32 + 1)) + align16(12 * call.slots) + 64 +
        (SOFT_MASK ? align16(4 * call.stride) : 0);
}

DEVICE PairMemory pair_memory(const Call& call, u8* memory) {
    PairMemory pair;
    pair.fused = (Element*)memory;
    memory += align16(call.stride * (int)sizeof(Element));
    pair.scores = (float*)memory;
    pair.keys = (u32*)memory + call.patches;
    memory += align16(8 * call.patches);
    pair.kept = (u32*)memory;
    memory += align16(4 * (call.stride / 32 + 1));
    pair.inverse = (float*)memory;
    pair.best = pair.inverse + call.slots;
    pair.best_word = (int*)(pair.best + call.slots);
    memory += align16(12 * call.slots);
    pair.exact = (float*)memory;
    memory += 64;
    pair.values = (float*)memory;
    pair.fraction = 0.0f;
    pair.highest_dropped = 0.0f;
    pair.has_fused = false;
    pair.is_empty = false;
    return pair;
}

DEVICE bool is_kept(const PairMemory& pair, int i) { return pair.kept[i >> 5] >> (i & 31) & 1; }

// s_i of the pair, in pair.scores. `products` are v_i . direction.
DEVICE void score_patches(const Call& call, int image, const float* products, PairMemory& pair) {
    const int n = call.patches;
    const float* self = call.self_scores + (i64)image * n;
    const float* factor = call.text_factor + (i64)image * n;
    float low = INFINITY_F, high = -INFINITY_F;
    for (int i = lane_id(); i < n; i += 32) {
        float context = call.language_context ? products[i] * factor[i] : 0.0f;
        low = fminf(low, context);
        high = fmaxf(high, context);
        pair.scores[i] = call.paper ? context : self[i] + context;
    }
    if (!call.paper) {
        __syncwarp();
        return;
    }
    low = -warp_max(-low);
    high = warp_max(high);
    const float range = high - low;
    // What is constant but for rounding becomes 0.
    const bool constant = range <= 16.0f * 1.1920929e-7f * fmaxf(high, -low);
    const float* keep_prob = call.keep_prob + (i64)image * n;
    const float beta = call.attention_weight;
    for (int i = lane_id(); i < n; i += 32) {
        float context = self[i];
        if (call.language_context) {
            float text = constant ? 0.0f : (pair.scores[i] - low) / range;
            context = 0.5f * (context + text);
        }
        pair.scores[i] = (1.0f - beta) * keep_prob[i] + beta * context;
    }
    __syncwarp();
}

// The bits of the k patches with the highest keys; ties go to the lower index. The k-th highest key is found bit by bit.
DEVICE void keep_top(const Call& call, PairMemory& pair) {
    const int n = call.patches, lane = lane_id();
    const u32 k = (u32)call.kept;
    u32 threshold = 0;
    for (int bit = 31; bit >= 0; --bit) {
        const u32 candidate = threshold | 1u << bit;
        u32 count = 0;
        for (int i = lane; i < n; i += 32) count += pair.keys[i] >= candidate;
        count = __reduce_add_sync(FULL, count);
        if (count >= k) {
            threshold = candidate;
            if (count == k) break;
        }
    }
    u32 above = 0;
    for (int i = lane; i < n; i += 32) above += pair.keys[i] > threshold;
    above = __reduce_add_sync(FULL, above);
    u32 ties = k - min(above, k);
    for (int start = 0; start < n; start += 32) {
        const int i = start + lane;
        const u32 key = i < n ? pair.keys[i] : 0;
        const u32 equal = __ballot_sync(FULL, i < n && key == threshold);
        const u32 before = __popc(equal & ((1u << lane) - 1));
        const bool keep = i < n && (key > threshold || (key == threshold && before < ties));
        const u32 bits = __ballot_sync(FULL, keep);
        if (lane == 0) pair.kept[start >> 5] = bits;
        ties -= min(ties, (u32)__popc(equal));
    }
}

// The bits of the patches for which `keep(i)` holds.
template <typename Keep>
DEVICE void keep_where(int n, PairMemory& pair, Keep keep) {
    for (int start = 0; start < n; start += 32) {
        const int i = start + lane_id();
        const u32 bits = __ballot_sync(FULL, i < n && keep(i));
        if (lane_id() == 0) pair.kept[start >> 5] = bits;
    }
}

// The pair's selection: bits, values, fraction. `global_image` and `global_text` key the noise and the saved bits.
DEVICE void select_patches(const Call& call, int image, int text, PairMemory& pair) {
    const int n = call.patches, lane = lane_id();
    const int global_image = call.first_image + image, global_text = call.first_text + text;
    const i64 at = (i64)global_image * call.columns + (call.diagonal ? 0 : global_text);
    const i64 column = call.diagonal ? 0 : text;
    float sum = 0.0f;
    switch (call.selection_mode) {
    case SELECT_SAVED: {
        const u8* bits = call.selection + at * ((n + 7) / 8);
        keep_where(n, pair, [&](int i) { return bits[i >> 3] >> (i & 7) & 1; });
        break;
    }
    case SELECT_MASK: {
        const u8* mask = (const u8*)call.mask + image * call.mask_pitch + column * n;
        keep_where(n, pair, [&](int i) { return mask[i] != 0; });
        break;
    }
#if SOFT_MASK
    case SELECT_SOFT: {
        const float* mask = (const float*)call.mask + image * call.mask_pitch + column * n;
        for (int i = lane; i < n; i += 32) {
            pair.values[i] = mask[i];
            sum += mask[i];
        }
        for (int i = n + lane; i < call.stride; i += 32) pair.values[i] = 1.0f;
        keep_where(n, pair, [&](int i) { return mask[i] > 0.0f; });
        break;
    }
#endif
    case SELECT_GUMBEL: {
        const u64 noise = pair_noise(call.seed, global_image, global_text);
        keep_where(n, pair, [&](int i) { return log_odds(pair.scores[i]) + logistic(noise, i) > 0.0f; });
        break;
    }
    default: {
        const bool perturbed = call.selection_mode == SELECT_PERTURBED;
        const u64 noise = pair_noise(call.seed, global_image, global_text);
        for (int i = lane; i < n; i += 32) {
            const float s = pair.scores[i];
            pair.keys[i] = sort_key(perturbed ? log_odds(s) + logistic(noise, i) : s);
        }
        __syncwarp();
        keep_top(call, pair);
    }
    }
    __syncwarp();
    if (SOFT_MASK) {
        pair.fraction = warp_sum(sum) / (float)n;
    } else {
        u32 count = 0;
        for (int word = lane; word * 32 < n; word += 32) count += __popc(pair.kept[word]);
        pair.fraction = (float)__reduce_add_sync(FULL, count) / (float)n;
    }
    // On a device nobody could refuse it.
    pair.is_empty = (SOFT_MASK || call.selection_mode == SELECT_MASK) && pair.fraction == 0.0f;
    // The mean and the prefix tokens are always there; beyond the rows all weights are zero.
    const int words = call.stride / 32 + 1;
    __syncwarp();
    for (int word = lane; word < words; word += 32) {
        const int from = n - word * 32;
        const u32 open = from <= 0 ? FULL : from >= 32 ? 0u : FULL << from;
        // Words past the patches' were not written.
        pair.kept[word] = from <= 0 ? FULL : pair.kept[word] | open;
    }
    __syncwarp();
}
