// Element types, and the tensor cores' m16n8k16 product of them. No header of CUDA is needed: halves are raw bits.
//
// Fragments. A lane (g = lane / 4, q = lane % 4) of a warp holds four consecutive elements k0 + 4 q .. + 3 of a row, a
// Quad, in one load. The instruction wants the columns 2 q, 2 q + 1, 2 q + 8, 2 q + 9 there; since a sum does not
// depend on its order, columns may be renamed as long as both factors rename them alike, and both do.

#if LAPS_ELEMENT == LAPS_F32

typedef float Element;

struct alignas(16) Quad {
    float x[4];
};

DEVICE float to_float(Element x) { return x; }
DEVICE Element to_element(float x) { return x; }

DEVICE float quad_value(const Quad& quad, int i) { return quad.x[i]; }

// Zero where the bit of `keep` is not set.
DEVICE Quad quad_of(const float (&values)[4]) {
    Quad out;
#pragma unroll
    for (int i = 0; i < 4; ++i) out.x[i] = values[i];
    return out;
}

// c += a b over 16 columns. Unless torch allows TF32, each factor is a sum of two TF32 numbers, and only the product of
// the two small parts is left out: about 21 bits.
DEVICE void mma(float (&c)[4], const Quad& low, const Quad& high, const Quad& b) {
    // Tensor cores add without rounding to nearest: a long sum in them drifts towards zero. So only 16 columns are theirs.
#if LAPS_TF32
    float (&sum)[4] = c;
#else
    float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#endif
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
        float from[6] = {low.x[i], high.x[i], low.x[i + 1], high.x[i + 1], b.x[i], b.x[i + 1]};
        u32 big[6];
#pragma unroll
        for (int j = 0; j < 6; ++j) big[j] = to_tf32(from[j]);
#if !LAPS_TF32
        u32 small[6];
#pragma unroll
        for (int j = 0; j < 6; ++j) small[j] = to_tf32(from[j] - __uint_as_float(big[j]));
        mma_tf32(sum, small[0], small[1], small[2], small[3], big[4], big[5]);
        mma_tf32(sum, big[0], big[1], big[2], big[3], small[4], small[5]);
#endif
        mma_tf32(sum, big[0], big[1], big[2], big[3], big[4], big[5]);
    }
#if !LAPS_TF32
#pragma unroll
    for (int i = 0; i < 4; ++i) c[i] += sum[i];
#endif
}

// Two consecutive elements, the first of even index.
DEVICE void load_pair(const Element* row, int k, float (&out)[2]) {
    const float2 pair = *(const float2*)(row + k);
    out[0] = pair.x;
    out[1] = pair.y;
}

#else

typedef u16 Element;

struct alignas(8) Quad {
    u32 x[2];
};

DEVICE float to_float(Element x) { return half_to_float(x); }
DEVICE Element to_element(float x) { return (Element)(pack_halves(x, 0.0f) & 0xFFFFu); }

DEVICE float quad_value(const Quad& quad, int i) { return to_float((Element)(quad.x[i >> 1] >> (i & 1) * 16)); }

DEVICE void load_pair(const Element* row, int k, float (&out)[2]) {
    const u32 pair = *(const u32*)(row + k);
    out[0] = to_float((Element)(pair & 0xFFFFu));
    out[1] = to_float((Element)(pair >> 16));
}

DEVICE u32 pair_mask(u32 bits) { return (bits & 1 ? 0x0000FFFFu : 0u) | (bits & 2 ? 0xFFFF0000u : 0u); }

DEVICE Quad quad_of(const float (&values)[4]) {
    Quad out;
    out.x[0] = pack_halves(values[0], values[1]);
    out.x[1] = pack_halves(values[2], values[3]);
    return out;
}

DEVICE void mma(float (&c)[4], const Quad& low, const Quad& high, const Quad& b) {
    mma_half(c, low.x[0], high.x[0], low.x[1], high.x[1], b.x[0], b.x[1]);
}

#endif

DEVICE Quad load_quad(const Element* row, int k) { return *(const Quad*)(row + k); }

DEVICE Quad scaled(const Quad& quad, const float* factors) {
    float values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = quad_value(quad, i) * factors[i];
    return quad_of(values);
}
