// Which pairs a warp works on, and where their data lie.

#define NAN_F __uint_as_float(0x7FC00000u)

struct Work {
    Image image;
    PairMemory pair;
    u8* rest;               // of the warp's shared memory
    int first, last, step;  // texts
};

DEVICE void copy_to_shared(u8* to, const void* from, int bytes) {
    const uint4* source = (const uint4*)from;
    for (int i = (int)threadIdx.x; i < bytes / 16; i += (int)blockDim.x) ((uint4*)to)[i] = source[i];
}

// `more`: bytes that a warp needs beside a PairMemory.
DEVICE Work take_work(const Call& call, u8* memory, int more) {
    const int warp = (int)(threadIdx.x >> 5), warps = (int)(blockDim.x >> 5);
    Work work;
    work.image.index = call.diagonal ? (int)blockIdx.x * warps + warp : (int)blockIdx.y;
    const int image = min(work.image.index, call.images - 1);
    work.image.weights = call.weights + (i64)image * call.slots * call.pitch;
    work.image.gram = call.gram + (i64)image * call.stride * call.pitch;
    if (call.shared) {
        const int weights = call.slots * call.pitch * (int)sizeof(Element);
        const int gram = call.stride * call.pitch * (int)sizeof(Element);
        copy_to_shared(memory, work.image.weights, weights);
        copy_to_shared(memory + weights, work.image.gram, gram);
        work.image.weights = (const Element*)memory;
        work.image.gram = (const Element*)(memory + weights);
        memory += weights + gram;
        __syncthreads();
    }
    memory += warp * (warp_bytes(call) + more);
    work.pair = pair_memory(call, memory);
    work.rest = memory + warp_bytes(call);
    if (call.diagonal) {
        work.first = work.image.index;
        work.last = work.image.index < call.images ? work.first + 1 : work.first;
        work.step = 1;
    } else {
        const int share = (call.texts + (int)gridDim.x - 1) / (int)gridDim.x;
        work.first = (int)blockIdx.x * share + warp;
        work.last = min(call.texts, ((int)blockIdx.x + 1) * share);
        work.step = warps;
    }
    return work;
}

// Where a pair's data lie.
struct Pair {
    i64 index;  // in the results
    const float* text_products;
    u8* selection;
    short* best_token;
    short* best_word;
    bool finite;
};

DEVICE Pair find_pair(const Call& call, int image, int t, Text& text) {
    Pair pair;
    pair.index = (i64)(call.first_image + image) * call.columns + (call.diagonal ? 0 : call.first_text + t);
    pair.text_products = call.text_products + t * call.text_pitch + image * call.text_image;
    pair.selection = call.selection ? call.selection + pair.index * ((call.patches + 7) / 8) : 0;
    pair.best_token = call.best_token ? call.best_token + pair.index * call.max_words : 0;
    pair.best_word = call.best_word ? call.best_word + pair.index * (fused_slot(call) + 1) : 0;
    text.index = t;
    text.first = call.first_word[t] - call.word_offset;
    const i64 count = call.word_count[t];
    // Lengths on the device cannot be refused; a wrong one gives NaN.
    const bool honest = count >= 1 && count <= call.max_words;
    text.count = honest ? (int)count : 1;
    text.products = call.products + text.first * call.product_pitch + image * call.product_image;
    pair.finite = honest && call.image_finite[image] && call.text_finite[t];
    if (pair.finite && SOFT_MASK) {
        const float* mask = (const float*)call.mask + image * call.mask_pitch + (i64)(call.diagonal ? 0 : t) * call.patches;
        bool finite = true;
        for (int i = lane_id(); i < call.patches; i += 32) finite = finite && fabsf(mask[i]) < INFINITY_F;
        pair.finite = __all_sync(FULL, finite);
    }
    return pair;
}

// The selection's bits, and zeros where a pair has no word or token.
DEVICE void save_rest(const Call& call, const PairMemory& memory, const Pair& pair, const Text& text) {
    if (!pair.selection) return;
    const int n = call.patches, lane = lane_id();
    for (int byte = lane; byte < (n + 7) / 8; byte += 32) {
        u32 bits = pair.finite ? memory.kept[byte >> 2] >> 8 * (byte & 3) & 255u : 0u;
        if (8 * byte + 8 > n) bits &= (1u << (n - 8 * byte)) - 1u;
        pair.selection[byte] = (u8)bits;
    }
    for (int w = lane + (pair.finite ? text.count : 0); w < call.max_words; w += 32) pair.best_token[w] = 0;
    const int tokens = pair.finite ? token_count(call, memory) : 0;
    for (int m = lane + tokens; m <= fused_slot(call); m += 32) pair.best_word[m] = 0;
}
