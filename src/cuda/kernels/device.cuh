// What the kernels ask of the machine: a few instructions that C++ has no name for. The tests build the kernels for the
// CPU instead and bring these functions, and the threads, along (tests/cuda/emulator.h).

// Of LAPS_ELEMENT.
#define LAPS_F32 0
#define LAPS_F16 1
#define LAPS_BF16 2

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef LAPS_EMULATED
#include "emulator.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define SHARED_MEMORY(name) extern __shared__ uint4 name##_[]; u8* const name = (u8*)name##_

// c += a b, a (16 x 16) and b (16 x 8) of halves, c float.
DEVICE void mma_half(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32."
#if LAPS_ELEMENT == LAPS_BF16
        "bf16.bf16"
#else
        "f16.f16"
#endif
        ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// c += a b, a (16 x 8) and b (8 x 8) of TF32 numbers.
DEVICE void mma_tf32(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The nearest TF32 number, as the bits of a float.
DEVICE unsigned to_tf32(float x) {
    unsigned bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
    return bits;
}

// *to += x in global memory, without waiting for it.
DEVICE void add_at(float* to, float x) {
    asm volatile("red.global.add.f32 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "f"(x) : "memory");
}

// Two halves, the first in the lower bits.
DEVICE unsigned pack_halves(float low, float high) {
    unsigned bits;
#if LAPS_ELEMENT == LAPS_BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
#endif
    return bits;
}

DEVICE float half_to_float(unsigned short bits) {
#if LAPS_ELEMENT == LAPS_BF16
    return __uint_as_float((unsigned)bits << 16);
#else
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
#endif
}

#endif
