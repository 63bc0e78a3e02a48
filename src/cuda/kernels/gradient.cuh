// The parts of similarity_backward.cu. One warp, one pair.

struct BackwardCall {
    Call call;
    const float* grad_scores;    // (B_v, B_t)
    const float* grad_fraction;  // (B_v, B_t), or null
    Element* grad_products;      // as call.products
    Element* tokens;             // (images, texts, slots, stride): a_m; (images, slots, stride) for the diagonal
    Element* shrunk_tokens;      // h_m a_m
    float* grad_weights;         // (images, warps_per_image, slots, stride): sum_t D_k da_mk, added to
    float* grad_keep;            // (images, warps_per_image, N), added to; or null
    float* grad_mask;            // as call.mask; or null
    u8* poisoned_images;         // (images): set where gradient came to a pair without a score
    u8* poisoned_texts;          // (texts)
    i64 warps_per_image;         // at least as many as work on an image
};

struct GradientMemory {
    Element* by_word;   // (16, slots): x_mj of 16 words
    Element* by_token;  // (slots, 16)
    float* shrink;      // (slots): h_m
    float* values;      // (stride): dD_k, of the soft form
    float* scores;      // (stride): ds_k, likewise
};

DEVICE int gradient_bytes(const Call& call) {
    return 32 * call.slots * (int)sizeof(Element) + align16(4 * call.slots) + (call.soft ? 8 * call.stride : 0);
}

DEVICE GradientMemory gradient_memory(const Call& call, u8* memory) {
    GradientMemory scratch;
    scratch.by_word = (Element*)memory;
    scratch.by_token = scratch.by_word + 16 * call.slots;
    memory += 32 * call.slots * (int)sizeof(Element);
    scratch.shrink = (float*)memory;
    memory += align16(4 * call.slots);
    scratch.values = (float*)memory;
    scratch.scores = scratch.values + call.stride;
    return scratch;
}

// Where this warp adds up what belongs to its image.
struct GradientSums {
    float* weights;
    float* keep;
};

DEVICE GradientSums gradient_sums(const BackwardCall& backward, int image) {
    const Call& call = backward.call;
    const int warp = (int)(threadIdx.x >> 5), warps = (int)(blockDim.x >> 5);
    const i64 place = call.diagonal ? image : image * backward.warps_per_image + blockIdx.x * warps + warp;
    GradientSums sums;
    sums.weights = backward.grad_weights + place * call.slots * call.stride;
    sums.keep = backward.grad_keep ? backward.grad_keep + place * call.patches : 0;
    return sums;
}

// Zeros for a pair to which no gradient came.
DEVICE void leave_nothing(const BackwardCall& backward, const Image& image, const Text& text, i64 place, int t) {
    const Call& call = backward.call;
    const Element zero = to_element(0.0f);
    for (int w = 0; w < text.count; ++w) {
        Element* row = backward.grad_products + (text.first + w) * call.product_pitch + image.index * call.product_image;
        for (int k = lane_id(); k < call.stride; k += 32) row[k] = zero;
    }
    const i64 size = (i64)call.slots * call.stride;
    for (i64 i = lane_id(); i < size; i += 32) {
        backward.tokens[place * size + i] = zero;
        backward.shrunk_tokens[place * size + i] = zero;
    }
    if (backward.grad_mask) {
        float* row = backward.grad_mask + image.index * call.mask_pitch + (i64)(call.diagonal ? 0 : t) * call.patches;
        for (int i = lane_id(); i < call.patches; i += 32) row[i] = 0.0f;
    }
}

// dt_mj.
DEVICE float cosine_gradient(
    const Call& call, const PairMemory& pair, const Text& text, const Pair& at, float grad, int m, int w, float cosine) {
    const int count = token_count(call, pair);
    if (m >= count || w >= text.count) return 0.0f;
    float share = 0.0f;
    if (call.word_to_patch > 0.0f && at.best_token[w] == m) share += call.word_to_patch / (float)text.count;
    if (call.patch_to_word > 0.0f && at.best_word[m] == w) share += call.patch_to_word / (float)count;
    return grad * share * (cosine > 0.0f ? 1.0f : call.negative_slope);
}

// a_m and h_m a_m of all tokens, for the gradient of G.
DEVICE void write_tokens(const BackwardCall& backward, const Image& image, const PairMemory& pair,
    const GradientMemory& scratch, i64 place) {
    const Call& call = backward.call;
    Element* tokens = backward.tokens + place * call.slots * call.stride;
    Element* shrunk = backward.shrunk_tokens + place * call.slots * call.stride;
    const int quads = call.stride / 4;
    for (int i = lane_id(); i < call.slots * quads; i += 32) {
        const int m = i / quads, k = 4 * (i % quads);
        const bool fused = m == fused_slot(call);
        const Quad from = load_quad(fused ? pair.fused : image.weights + (i64)m * call.pitch, k);
        const float h = scratch.shrink[m];
        float values[4], times[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            values[e] = quad_value(from, e) * (fused ? 1.0f : decision(call, pair, k + e));
            times[e] = values[e] * h;
        }
        *(Quad*)(tokens + (i64)m * call.stride + k) = quad_of(values);
        *(Quad*)(shrunk + (i64)m * call.stride + k) = quad_of(times);
    }
}

// With `first_pass`, h_m = sum_j dt_mj t_mj / |q_m|^2 of all tokens, whatever `word` is. Without, x_mj of all tokens and the
// words `word` .. + 15, in both orders. One function, so that the cosines are in the code once.
__device__ __noinline__ void cosine_gradients(const Call& call, const Image& image, const PairMemory& pair,
    const Text& text, const Pair& at, const GradientMemory& scratch, float grad, bool first_pass, int word) {
    const int g = lane_id() >> 2, q = lane_id() & 3;
    const int begin = first_pass ? 0 : word, end = first_pass ? text.count : word + 1;
    for (int first = 0; first < call.slots; first += TOKEN_BLOCK) {
        float along[TILES][2] = {};
        for (int w = begin; w < end; w += 16) {
            float cosines[TILES][2][4];
            cosine_block(call, image, pair, text, first, w, cosines);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int m = first + 16 * tile + 8 * half + g, column = 8 * j + 2 * q + e;
                            const float t = cosines[tile][j][2 * half + e];
                            float x = cosine_gradient(call, pair, text, at, grad, m, w + column, t);
                            along[tile][half] += x * t;
                            if (first_pass || m >= call.slots) continue;
                            if (x != 0.0f) x *= fabsf(pair.inverse[m]) * call.word_inverse[text.first + w + column];
                            const Element stored = to_element(x);
                            scratch.by_word[column * call.slots + m] = stored;
                            scratch.by_token[m * 16 + column] = stored;
                        }
        }
        if (!first_pass) continue;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int m = first + 16 * tile + 8 * half + g;
                const float sum = sum_of_four(along[tile][half]);
                if (q == 0 && m < call.slots) scratch.shrink[m] = sum * pair.inverse[m] * pair.inverse[m];
            }
    }
    __syncwarp();
}

// dP^T of the words `word` .. + 15: sums (16 words x 16 rows) over all tokens.
__device__ __noinline__ void write_products(const BackwardCall& backward, const Image& image, const PairMemory& pair, const Text& text,
    const GradientMemory& scratch, int word) {
    const Call& call = backward.call;
    const int g = lane_id() >> 2, q = lane_id() & 3;
    Element* out = backward.grad_products + text.first * call.product_pitch + image.index * call.product_image;
    for (int n = 0; n < call.stride; n += 16) {
        float sums[2][4] = {};
        for (int m = 0; m < call.slots; m += 16) {
            const Quad low = load_quad(scratch.by_word + g * call.slots, m + 4 * q);
            const Quad high = load_quad(scratch.by_word + (g + 8) * call.slots, m + 4 * q);
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int k = n + 8 * j + g;
                const float kept = decision(call, pair, k);
                float values[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int token = m + 4 * q + e;
                    values[e] = token == fused_slot(call) ? to_float(pair.fused[k])
                                                          : kept * to_float(image.weights[(i64)token * call.pitch + k]);
                }
                mma(sums[j], low, high, quad_of(values));
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int w = word + 8 * half + g;
                if (w >= text.count) continue;
                Element* to = out + w * call.product_pitch + n + 8 * j + 2 * q;
                to[0] = to_element(sums[j][2 * half]);
                to[1] = to_element(sums[j][2 * half + 1]);
            }
    }
}

// dD_k from the kept fraction; ds_k from nothing yet.
DEVICE void begin_selection_gradient(const Call& call, const GradientMemory& scratch, float grad_fraction) {
    for (int k = lane_id(); k < call.stride; k += 32) {
        scratch.values[k] = k < call.patches ? grad_fraction / (float)call.patches : 0.0f;
        scratch.scores[k] = 0.0f;
    }
    __syncwarp();
}

// da_mk of all tokens and rows, as far as the words `word` .. + 15 bring it; - h_m (G a_m)_k comes with the first.
__device__ __noinline__ void add_weights(const Call& call, const Image& image, const PairMemory& pair, const Text& text,
    const GradientMemory& scratch, const GradientSums& sums_of_image, int word) {
    const int g = lane_id() >> 2, q = lane_id() & 3;
    for (int first = 0; first < call.slots; first += TOKEN_BLOCK) {
        const int tiles = tiles_of(call, first);
        const TokenRows rows = token_rows(call, image, pair, first);
        for (int n = 0; n < call.stride; n += 8 * SPAN) {
            const bool wide = SPAN > 2 && n + 16 < call.stride;
            float sums[TILES][SPAN][4];
            clear(sums);
            if (word == 0) {
                for (int k = 0; k < call.stride; k += 16) gram_step(call, image, pair, rows, tiles, k, n, wide, sums);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        const int m = min(first + 16 * tile + 8 * half + g, call.slots - 1);
                        const float h = scratch.shrink[m];
#pragma unroll
                        for (int j = 0; j < SPAN; ++j)
#pragma unroll
                            for (int e = 0; e < 2; ++e) sums[tile][j][2 * half + e] *= -h;
                    }
            }
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                if (j >= 2 && !wide) break;
                float values[4];
#pragma unroll
                for (int e = 0; e < 4; ++e) {
                    const int w = min(word + 4 * q + e, text.count - 1);
                    values[e] = to_float(text.products[w * call.product_pitch + n + 8 * j + g]);
                }
                const Quad products = quad_of(values);
#pragma unroll
                for (int tile = 0; tile < TILES; ++tile) {
                    if (tile >= tiles) break;
                    const Element* row = scratch.by_token + (first + 16 * tile + g) * 16;
                    mma(sums[tile][j], load_quad(row, 4 * q), load_quad(row + 8 * 16, 4 * q), products);
                }
            }
#pragma unroll
            for (int j = 0; j < SPAN; ++j) {
                if (j >= 2 && !wide) break;
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int k = n + 8 * j + 2 * q + e;
                    const bool patch = k < call.patches, mean = call.soft && k == call.patches;
                    const float kept = patch ? decision(call, pair, k) : 0.0f;
                    const float open = call.soft && patch && pair.has_fused
                        ? expf(fminf(pair.scores[k] - pair.highest_dropped, 80.0f)) : 0.0f;
                    float value = 0.0f;
#pragma unroll
                    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                        for (int half = 0; half < 2; ++half) {
                            const int m = first + 16 * tile + 8 * half + g;
                            const float y = sums[tile][j][2 * half + e];
                            if (!(patch || mean) || m < call.prefix || m > fused_slot(call)) continue;
                            if (m < fused_slot(call)) {
                                // Of this warp alone, so nothing races.
                                add_at(&sums_of_image.weights[(i64)m * call.stride + k], mean ? y : kept * y);
                                if (call.soft && patch) value += y * to_float(image.weights[(i64)m * call.pitch + k]);
                            } else if (call.soft && patch) {
                                value -= y * open;
                                scratch.scores[k] += y * open * (1.0f - kept);
                            }
                        }
                    if (call.soft) {
#pragma unroll
                        for (int step = 4; step < 32; step <<= 1) value += __shfl_xor_sync(FULL, value, step);
                        if (g == 0 && patch) scratch.values[k] += value;
                    }
                }
            }
        }
    }
    __syncwarp();
}

// dD_i/ds_i of the straight-through estimator: y (1 - y) / tau / (s (1 - s)), y the soft value (eqs. 4, 5).
DEVICE float straight_through(const Call& call, float s, float noise) {
    if (s < SCORE_CLAMP || s > 1.0f - SCORE_CLAMP) return 0.0f;
    const float z = (log_odds(s) + noise) / call.temperature;
    const float y = 1.0f / (1.0f + expf(-z)), off = 1.0f / (1.0f + expf(z));
    return y * off / call.temperature / (s * (1.0f - s));
}

// From dD_i and ds_i to the keep probability or the caller's mask.
DEVICE void end_selection_gradient(const BackwardCall& backward, const Image& image, const PairMemory& pair,
    const GradientMemory& scratch, const GradientSums& sums, int t) {
    const Call& call = backward.call;
    if (backward.grad_mask) {
        float* row = backward.grad_mask + image.index * call.mask_pitch + (i64)(call.diagonal ? 0 : t) * call.patches;
        for (int i = lane_id(); i < call.patches; i += 32) row[i] = scratch.values[i];
    }
    if (sums.keep) {
        const u64 noise = pair_noise(call.seed, call.first_image + image.index, call.first_text + t);
        for (int i = lane_id(); i < call.patches; i += 32) {
            const float steep = straight_through(call, pair.scores[i], call.seeded ? logistic(noise, i) : 0.0f);
            sums.keep[i] += (1.0f - call.attention_weight) * (scratch.scores[i] + scratch.values[i] * steep);
        }
    }
}
