// SPA: tokens and words find their best match in each other (laps.md, "sparse patch-word alignment"). One warp, one
// pair, 16 words at a time.

// One pair's words.
struct Text {
    int index;           // among the texts of the launch
    i64 first;           // row of `words` and `word_inverse`
    int count;
    const Element* products;  // P^T of the pair: word j, row k at j * product_pitch + k
};

DEVICE float leaky(float x, float slope) { return x > 0.0f ? x : x * slope; }

// The better of two candidates; ties go to the lower index.
DEVICE void improve(float& value, int& index, float other, int other_index) {
    if (other > value || (other == value && other_index < index)) {
        value = other;
        index = other_index;
    }
}

DEVICE void improve_across(float& value, int& index, int step) {
    const float other = __shfl_xor_sync(FULL, value, step);
    const int other_index = __shfl_xor_sync(FULL, index, step);
    improve(value, index, other, other_index);
}

// Cosines u_m . w_j of a block of tokens with words `word` .. + 15. Lane (g, q) holds, of tile, half h, column block j,
// e in 0, 1: token first + 16 tile + 8 h + g, word + 8 j + 2 q + e.
DEVICE void cosine_block(const Call& call, const Image& image, const PairMemory& pair, const Text& text, int first,
    int word, float (&cosines)[TILES][2][4]) {
    const int g = lane_id() >> 2, q = lane_id() & 3;
    const int tiles = tiles_of(call, first);
    const TokenRows rows = token_rows(call, image, pair, first);
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int c = 0; c < 4; ++c) cosines[tile][j][c] = 0.0f;
    const Element* column[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        column[j] = text.products + min(word + 8 * j + g, text.count - 1) * call.product_pitch;
    }
    // P comes from far: the next columns are under way while these are multiplied.
    Quad next[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) next[j] = load_quad(column[j], 4 * q);
    for (int k = 0; k < call.stride; k += 16) {
        const Keep keep = keep_quad(pair, k);
        const Quad b[2] = {next[0], next[1]};
        const int after = min(k + 16, call.stride - 16);
#pragma unroll
        for (int j = 0; j < 2; ++j) next[j] = load_quad(column[j], after + 4 * q);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            if (tile >= tiles) break;
            const Quad low = token_quad(pair, rows, tile, 0, k, keep);
            const Quad high = token_quad(pair, rows, tile, 1, k, keep);
#pragma unroll
            for (int j = 0; j < 2; ++j) mma(cosines[tile][j], low, high, b[j]);
        }
    }
    float inverse[2][2];
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int w = min(word + 8 * j + 2 * q + e, text.count - 1);
            inverse[j][e] = call.word_inverse[text.first + w];
        }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int m = min(first + 16 * tile + 8 * half + g, call.slots - 1);
            const float length = pair.inverse[m];
#pragma unroll
            for (int j = 0; j < 2; ++j)
#pragma unroll
                for (int e = 0; e < 2; ++e) cosines[tile][j][2 * half + e] *= length * inverse[j][e];
        }
    }
    // Tokens whose length is marked as lost: every lane has to take part.
    const int end = min(first + TOKEN_BLOCK, call.slots);
    for (int start = first; start < end; start += 32) {
        const int m = start + lane_id();
        u32 lost = __ballot_sync(FULL, m < end && pair.inverse[m] < 0.0f);
        while (lost) {
            const int token = start + __ffs(lost) - 1;
            lost &= lost - 1;
            exact_cosines(call, image, pair, token, text.first + word, min(16, text.count - word));
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e)
                            if (token == first + 16 * tile + 8 * half + g)
                                cosines[tile][j][2 * half + e] = pair.exact[8 * j + 2 * q + e];
            // Before the next one writes there.
            __syncwarp();
        }
    }
}

// The pair's score; writes its best matches to `best_token` (L) and `best_word` (M), where these are not null.
DEVICE float align_pair(const Call& call, const Image& image, PairMemory& pair, const Text& text, short* best_token,
    short* best_word) {
    const int lane = lane_id(), g = lane >> 2, q = lane & 3;
    const int count = token_count(call, pair);
    for (int m = lane; m < call.slots; m += 32) {
        pair.best[m] = -INFINITY_F;
        pair.best_word[m] = 0;
    }
    __syncwarp();
    float of_words = 0.0f;
    for (int word = 0; word < text.count; word += 16) {
        float best[2][2];
        int token[2][2];
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                best[j][e] = -INFINITY_F;
                token[j][e] = 0;
            }
        for (int first = 0; first < count; first += TOKEN_BLOCK) {
            float cosines[TILES][2][4];
            cosine_block(call, image, pair, text, first, word, cosines);
#pragma unroll
            for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int m = first + 16 * tile + 8 * half + g;
                    float value = -INFINITY_F;
                    int index = 0x7FFF;
#pragma unroll
                    for (int j = 0; j < 2; ++j)
#pragma unroll
                        for (int e = 0; e < 2; ++e) {
                            const int w = word + 8 * j + 2 * q + e;
                            const float x = cosines[tile][j][2 * half + e];
                            if (m < count && w < text.count) {
                                improve(value, index, x, w);
                                improve(best[j][e], token[j][e], x, m);
                            }
                        }
                    improve_across(value, index, 1);
                    improve_across(value, index, 2);
                    // Earlier words win ties.
                    if (q == 0 && m < count && value > pair.best[m]) {
                        pair.best[m] = value;
                        pair.best_word[m] = index;
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int step = 4; step < 32; step <<= 1) improve_across(best[j][e], token[j][e], step);
                const int w = word + 8 * j + 2 * q + e;
                if (g == 0 && w < text.count) {
                    of_words += leaky(best[j][e], call.negative_slope);
                    if (best_token) best_token[w] = (short)token[j][e];
                }
            }
    }
    __syncwarp();
    float of_tokens = 0.0f;
    for (int m = lane; m < count; m += 32) {
        of_tokens += leaky(pair.best[m], call.negative_slope);
        if (best_word) best_word[m] = (short)pair.best_word[m];
    }
    float score = 0.0f;
    if (call.word_to_patch > 0.0f) score += call.word_to_patch * (warp_sum(of_words) / (float)text.count);
    if (call.patch_to_word > 0.0f) score += call.patch_to_word * (warp_sum(of_tokens) / (float)count);
    return score;
}
