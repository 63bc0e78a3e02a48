// SPC: kept patches merged into aggregated tokens, dropped ones fused into one (laps.md, "semantic-spatial
// calibration"). A token is a row of weights over the image's rows, and is never formed: its products with words are
// sums over P, its squared length is e^T G e (identities 2 and 3). One warp, one pair.

// Tokens are worked on in blocks of 3 x 16, and columns of G in blocks of 8 SPAN: as many as the registers hold sums of.
#define TILES 3
#if LAPS_ELEMENT != LAPS_BF16
#define SPAN 2
#else
#define SPAN 4
#endif
#define TOKEN_BLOCK (16 * TILES)

// Below this share of (sum e |v|)^2, e^T G e has lost too many digits to cancellation; and below the second one even
// where patches in all directions make it small without cancelling (e^T G e near sum (e |v|)^2).
#if LAPS_ELEMENT == LAPS_F32 && !LAPS_TF32
#define GRAM_FLOOR 1e-2f
#define LOW_FLOOR 1e-3f
#else
#define GRAM_FLOOR 5e-2f
#define LOW_FLOOR 1e-3f
#endif
// Rows are scaled to about 1, so where terms reach less than this, weights have underflown, or lost digits on the way.
// And where an inverse length is more than this, gradients would overflow: such a token has a score, but no gradient.
#if LAPS_ELEMENT == LAPS_F16
#define SMALLEST_REACH 0.1f
#else
#define SMALLEST_REACH 1e-15f
#endif
#define MOST_INVERSE 1e15f
// A sum this much shorter than its terms together is rounding noise, not a direction.
#define NOISE 1e-12
#define EPSILON 1e-6

// The image of a block: where its weights and G lie, and its place among the images of the launch.
struct Image {
    const Element* weights;
    const Element* gram;
    int index;
};

// D_i of a patch or row.
DEVICE float decision(const Call& call, const PairMemory& pair, int i) {
    if (SOFT_MASK) return pair.values[i];
    return is_kept(pair, i) ? 1.0f : 0.0f;
}

// Weights e^{s_i - max s} (1 - D_i) of the fused token over all rows.
DEVICE void fuse_dropped(const Call& call, PairMemory& pair) {
    const int n = call.patches;
    float highest = -INFINITY_F;
    for (int i = lane_id(); i < n; i += 32) {
        if (decision(call, pair, i) < 1.0f) highest = fmaxf(highest, pair.scores[i]);
    }
    highest = warp_max(highest);
    pair.highest_dropped = highest;
    pair.has_fused = call.fusion && highest > -INFINITY_F;
    for (int i = lane_id(); i < call.stride; i += 32) {
        float weight = 0.0f;
        if (i < n && pair.has_fused) {
            const float open = 1.0f - decision(call, pair, i);
            if (open > 0.0f) weight = open * expf(pair.scores[i] - highest);
        }
        pair.fused[i] = to_element(weight);
    }
    __syncwarp();
}

DEVICE int fused_slot(const Call& call) { return call.prefix + call.aggregated; }
DEVICE int token_count(const Call& call, const PairMemory& pair) { return fused_slot(call) + (pair.has_fused ? 1 : 0); }

// The rows of weights that a lane holds of a block of tokens: those of tokens first + g + 8 i, i = 2 tile + half.
struct TokenRows {
    const Element* weights;
    const Element* fused;
    int step;      // elements from one to the next
    int fused_at;  // which i is the fused token; -1 for none
};

DEVICE TokenRows token_rows(const Call& call, const Image& image, const PairMemory& pair, int first) {
    const int m = first + (lane_id() >> 2), distance = fused_slot(call) - m;
    TokenRows rows;
    rows.weights = image.weights + (i64)m * call.pitch;
    rows.fused = pair.fused;
    rows.step = 8 * call.pitch;
    rows.fused_at = distance >= 0 && distance % 8 == 0 ? distance / 8 : -1;
    return rows;
}

// The tiles of a block that hold tokens at all.
DEVICE int tiles_of(const Call& call, int first) { return min(TILES, (call.slots - first + 15) / 16); }

// What of a Quad of weights the pair keeps.
struct Keep {
#if SOFT_MASK
    const float* factors;
#elif LAPS_ELEMENT == LAPS_F32
    u32 mask[4];
#else
    u32 mask[2];
#endif
};

// Of the rows k + 4 q .. + 3.
DEVICE Keep keep_quad(const PairMemory& pair, int k) {
    Keep keep;
#if SOFT_MASK
    keep.factors = pair.values + k + 4 * (lane_id() & 3);
#else
    const u32 bits = pair.kept[k >> 5] >> ((k & 16) + 4 * (lane_id() & 3));
#if LAPS_ELEMENT == LAPS_F32
#pragma unroll
    for (int i = 0; i < 4; ++i) keep.mask[i] = bits >> i & 1 ? 0xFFFFFFFFu : 0u;
#else
    keep.mask[0] = pair_mask(bits);
    keep.mask[1] = pair_mask(bits >> 2);
#endif
#endif
    return keep;
}

// Weights of one token over the rows k + 4 q .. + 3 that the pair keeps; the fused token's are masked already. With masks,
// one load whichever token it is, so that lanes do not part; with factors, that would take more registers than there are.
DEVICE Quad token_quad(const PairMemory& pair, const TokenRows& rows, int tile, int half, int k, const Keep& keep) {
    const int column = k + 4 * (lane_id() & 3), i = 2 * tile + half;
    const bool fused = rows.fused_at == i;
#if SOFT_MASK
    if (fused) return load_quad(rows.fused, column);
    return scaled(load_quad(rows.weights + i * rows.step, column), keep.factors);
#else
    Quad quad = load_quad(fused ? rows.fused : rows.weights + i * rows.step, column);
    const u32 all = fused ? 0xFFFFFFFFu : 0u;
#if LAPS_ELEMENT == LAPS_F32
#pragma unroll
    for (int e = 0; e < 4; ++e) quad.x[e] = __uint_as_float(__float_as_uint(quad.x[e]) & (keep.mask[e] | all));
#else
#pragma unroll
    for (int e = 0; e < 2; ++e) quad.x[e] &= keep.mask[e] | all;
#endif
    return quad;
#endif
}

// Weights of one token over two rows, of which the pair keeps `kept`.
DEVICE void token_pair(const PairMemory& pair, const TokenRows& rows, int tile, int half, int k, const float (&kept)[2],
    float (&out)[2]) {
    const int i = 2 * tile + half;
    const bool fused = rows.fused_at == i;
    load_pair(fused ? rows.fused : rows.weights + i * rows.step, k, out);
#pragma unroll
    for (int e = 0; e < 2; ++e) out[e] *= fused ? 1.0f : kept[e];
}

DEVICE float sum_of_four(float x) {
    x += __shfl_xor_sync(FULL, x, 1);
    return x + __shfl_xor_sync(FULL, x, 2);
}

// sums += A (48 x 16) G (16 x 8 SPAN): tokens of a block, columns from n, rows k .. k + 15.
DEVICE void gram_step(const Call& call, const Image& image, const PairMemory& pair, const TokenRows& rows, int tiles,
    int k, int n, bool wide, float (&sums)[TILES][SPAN][4]) {
    const int g = lane_id() >> 2, q = lane_id() & 3;
    const Keep keep = keep_quad(pair, k);
    Quad b[SPAN];
#pragma unroll
    for (int j = 0; j < SPAN; ++j) {
        if (j < 2 || wide) b[j] = load_quad(image.gram + (i64)(n + 8 * j + g) * call.pitch, k + 4 * q);
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        if (tile >= tiles) break;
        const Quad low = token_quad(pair, rows, tile, 0, k, keep);
        const Quad high = token_quad(pair, rows, tile, 1, k, keep);
#pragma unroll
        for (int j = 0; j < SPAN; ++j) {
            if (j < 2 || wide) mma(sums[tile][j], low, high, b[j]);
        }
    }
}

DEVICE void clear(float (&sums)[TILES][SPAN][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int j = 0; j < SPAN; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[tile][j][c] = 0.0f;
}

DEVICE void scale(float (&sums)[TILES][SPAN][4], float factor) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int j = 0; j < SPAN; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) sums[tile][j][c] *= factor;
}

// Inverse lengths of all tokens, in pair.inverse; -1 for those that must be computed exactly.
DEVICE void measure_tokens(const Call& call, const Image& image, PairMemory& pair) {
    const int g = lane_id() >> 2, q = lane_id() & 3;
    const float* norms = call.norms + (i64)image.index * call.stride;
    for (int first = 0; first < call.slots; first += TOKEN_BLOCK) {
        const int tiles = tiles_of(call, first);
        const TokenRows rows = token_rows(call, image, pair, first);
        float square[TILES][2] = {}, reach[TILES][2] = {}, spread[TILES][2] = {};
        for (int n = 0; n < call.stride; n += 8 * SPAN) {
            const bool wide = SPAN > 2 && n + 16 < call.stride;
            float sums[TILES][SPAN][4];
            clear(sums);
            // e^T G e by one triangle: what lies beside the diagonal block counts twice.
            const int end = min(n + 8 * SPAN, call.stride);
            for (int k = 0; k < end; k += 16) {
                if (k == n) scale(sums, 2.0f);
                gram_step(call, image, pair, rows, tiles, k, n, wide, sums);
            }
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                if (j >= 2 && !wide) break;
                const int column = n + 8 * j + 2 * q;
                const float norm[2] = {norms[column], norms[column + 1]};
                const float kept[2] = {decision(call, pair, column), decision(call, pair, column + 1)};
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    if (tile >= tiles) break;
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        float weight[2];
                        token_pair(pair, rows, tile, half, column, kept, weight);
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const float term = weight[e] * norm[e];
                            square[tile][half] += weight[e] * sums[tile][j][2 * half + e];
                            reach[tile][half] += term;
                            spread[tile][half] += term * term;
                        }
                    }
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float s = sum_of_four(square[tile][half]);
                const float r = sum_of_four(reach[tile][half]);
                const float d = sum_of_four(spread[tile][half]);
                const int m = first + 16 * tile + 8 * half + g;
                const float floor = s >= 0.5f * d ? LOW_FLOOR : GRAM_FLOOR;
                const bool sound = s >= floor * r * r && r > SMALLEST_REACH;
                if (q == 0 && m < call.slots) {
                    const bool exists = m < token_count(call, pair);
                    // A prefix token is one row of unit length, or zero.
                    const bool lost = exists && !sound && m >= call.prefix;
                    pair.inverse[m] = lost ? -1.0f : exists && s > 0.0f ? 1.0f / sqrtf(s) : 0.0f;
                }
            }
        }
    }
    __syncwarp();
}

// A token computed from its definition, in double precision, where the Gram form or the shared exponentials lost too
// many digits: its cosines with `words` <= 16 words from `word`, in pair.exact. Returns its inverse length in the scale of
// `weights`. Zeros where its terms cancel.
DEVICE float exact_token(const Call& call, int image, const PairMemory& pair, int m, i64 word, int words) {
    const int n = call.patches, lane = lane_id();
    const int aggregated = m - call.prefix;
    const bool fused = m == fused_slot(call);
    const float* logits = call.logits + (i64)image * n * call.aggregated + aggregated;
    const float* norms = call.norms + (i64)image * call.stride;
    const Element* rows = call.rows + (i64)image * call.stride * call.channels;
    // The stable form fixes the maximum over all patches; the hard one may take that of the kept ones.
    float highest = -INFINITY_F, of_all = -INFINITY_F;
    for (int i = lane; i < n && !fused; i += 32) {
        const float logit = logits[(i64)i * call.aggregated];
        of_all = fmaxf(of_all, logit);
        if (call.soft || is_kept(pair, i)) highest = fmaxf(highest, logit);
    }
    highest = warp_max(highest);
    of_all = warp_max(of_all);
    const int last = call.soft && !fused ? n + 1 : n;
    double square = 0.0, reach = 0.0, dots[16];
#pragma unroll
    for (int j = 0; j < 16; ++j) dots[j] = 0.0;
    for (int start = 0; start < call.channels; start += 128) {
        double sums[4] = {0.0, 0.0, 0.0, 0.0};
        for (int i = 0; i < last; ++i) {
            double weight;
            if (i == n) {
                weight = EPSILON;
            } else {
                const float d = decision(call, pair, i);
                if ((fused ? 1.0f - d : d) == 0.0f) continue;
                weight = fused ? (1.0 - d) * exp((double)pair.scores[i] - (double)pair.highest_dropped)
                               : d * exp((double)logits[(i64)i * call.aggregated] - (double)highest);
            }
            if (start == 0) reach += weight * norms[i];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const int channel = start + 32 * c + lane;
                if (channel < call.channels) sums[c] += weight * to_float(rows[(i64)i * call.channels + channel]);
            }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int channel = start + 32 * c + lane;
            square += sums[c] * sums[c];
#pragma unroll
            for (int j = 0; j < 16; ++j) {
                if (channel < call.channels && j < words)
                    dots[j] += sums[c] * to_float(call.words[(word + j) * call.channels + channel]);
            }
        }
    }
    for (int step = 16; step > 0; step >>= 1) square += __shfl_xor_sync(FULL, square, step);
    const double length = sqrt(square);
    const double inverse = length > NOISE * reach ? 1.0 / length : 0.0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        for (int step = 16; step > 0; step >>= 1) dots[j] += __shfl_xor_sync(FULL, dots[j], step);
        if (lane == j) pair.exact[j] = j < words ? (float)(dots[j] * inverse) * call.word_inverse[word + j] : 0.0f;
    }
    __syncwarp();
    return fused ? (float)inverse : (float)(inverse * exp((double)of_all - (double)highest));
}

// The same, out of line, as it is rare.
#if PAIR_HAS_ADDRESS
__device__ __noinline__ float exact_cosines(
    const Call& call, const Image& image, const PairMemory& pair, int m, i64 word, int words) {
    return exact_token(call, image.index, pair, m, word, words);
}
#else
// By value, all of it: what a call takes by reference has to lie in local memory, and so every pointer in it would be
// loaded from there wherever it is used.
__device__ __noinline__ float exact_cosines_at(
    const Call& call, int image, u8* memory, float highest_dropped, int m, i64 word, int words) {
    PairMemory pair = pair_memory(call, memory);
    pair.highest_dropped = highest_dropped;
    return exact_token(call, image, pair, m, word, words);
}

DEVICE float exact_cosines(const Call& call, const Image& image, const PairMemory& pair, int m, i64 word, int words) {
    return exact_cosines_at(call, image.index, (u8*)pair.fused, pair.highest_dropped, m, word, words);
}
#endif

// Inverse lengths of the tokens that measure_tokens marks, negative, so that the mark stays.
DEVICE void find_lost_lengths(const Call& call, const Image& image, PairMemory& pair, i64 word) {
    for (int start = 0; start < call.slots; start += 32) {
        const int m = start + lane_id();
        u32 lost = __ballot_sync(FULL, m < call.slots && pair.inverse[m] < 0.0f);
        while (lost) {
            const int token = start + __ffs(lost) - 1;
            lost &= lost - 1;
            const float inverse = exact_cosines(call, image, pair, token, word, 0);
            if (lane_id() == 0) pair.inverse[token] = inverse < MOST_INVERSE ? -inverse : 0.0f;
            __syncwarp();
        }
    }
}
