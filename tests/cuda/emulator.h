// CUDA's threads on the CPU, for tests of the kernels where there is no GPU: every thread of a block is a fiber, and
// runs until it waits for the others of its warp or block. Instructions of the whole warp (shuffles, ballots, the tensor
// cores' products) exchange their operands by the layouts that PTX documents. The order in which fibers run can be
// changed, to bring out code that relies on one.

#pragma once

#include <ucontext.h>

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define DEVICE static inline
#define KERNEL extern "C" void
#define __device__ static
#define __noinline__ __attribute__((noinline))
#define __grid_constant__
#define __restrict__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) u8* const name = emulator::block->shared.data()

namespace emulator {

struct Index {
    unsigned x, y, z;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Index thread;
    bool done;
    // Of the warp: operands of the instruction that it waits for.
    u32 operands[10];
};

struct Meeting {
    unsigned arrived = 0, generation = 0;
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Meeting> warps;
    Meeting all;
    std::vector<u8> shared;
    Index block, threads, blocks;
    ucontext_t scheduler;
    Fiber* current = nullptr;
    std::function<void()> body;
    bool progressed = false;
};

inline thread_local Block* block = nullptr;

inline void yield() { swapcontext(&block->current->context, &block->scheduler); }

inline void meet(Meeting& meeting, unsigned members) {
    const unsigned generation = meeting.generation;
    if (++meeting.arrived == members) {
        meeting.arrived = 0;
        ++meeting.generation;
        block->progressed = true;
        return;
    }
    while (meeting.generation == generation) yield();
}

inline unsigned warp_of(const Fiber* fiber) { return fiber->thread.x / 32; }
inline void meet_warp() { meet(block->warps[warp_of(block->current)], 32); }
inline Fiber& lane(unsigned index) { return block->fibers[warp_of(block->current) * 32 + index]; }
inline unsigned lane_index() { return block->current->thread.x % 32; }

// Every lane offers its operands, then `read`s those of the others.
template <typename Read>
inline auto exchange(const u32* operands, int count, Read read) {
    memcpy(block->current->operands, operands, 4 * count);
    meet_warp();
    auto result = read();
    meet_warp();
    return result;
}

inline void run_fiber() {
    block->body();
    block->current->done = true;
    block->progressed = true;
    swapcontext(&block->current->context, &block->scheduler);
}

// Runs a kernel; 0, or 1 where its threads wait for each other forever.
template <typename Body>
inline int launch(Index blocks, Index threads, size_t shared, Body body) {
    const char* order = getenv("LAPS_EMULATOR_ORDER");
    unsigned long long random = 88172645463325252ull;
    for (unsigned z = 0; z < blocks.z; ++z)
        for (unsigned y = 0; y < blocks.y; ++y)
            for (unsigned x = 0; x < blocks.x; ++x) {
                Block now;
                block = &now;
                now.block = {x, y, z};
                now.blocks = blocks;
                now.threads = threads;
                // What a kernel does not write is garbage.
                now.shared.assign(shared, 0xA5);
                now.body = body;
                const unsigned count = threads.x;
                now.fibers.resize(count);
                now.warps.resize((count + 31) / 32);
                for (unsigned i = 0; i < count; ++i) {
                    Fiber& fiber = now.fibers[i];
                    fiber.thread = {i, 0, 0};
                    fiber.done = false;
                    fiber.stack.resize(256 << 10);
                    getcontext(&fiber.context);
                    fiber.context.uc_stack.ss_sp = fiber.stack.data();
                    fiber.context.uc_stack.ss_size = fiber.stack.size();
                    fiber.context.uc_link = nullptr;
                    makecontext(&fiber.context, run_fiber, 0);
                }
                unsigned left = count;
                while (left) {
                    now.progressed = false;
                    left = 0;
                    for (unsigned i = 0; i < count; ++i) {
                        unsigned at = i;
                        if (order && !strcmp(order, "reverse")) at = count - 1 - i;
                        if (order && !strcmp(order, "random")) {
                            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
                            at = (i + random % count) % count;
                        }
                        Fiber& fiber = now.fibers[at];
                        if (!fiber.done) {
                            now.current = &fiber;
                            swapcontext(&now.scheduler, &fiber.context);
                        }
                    }
                    for (const Fiber& fiber : now.fibers) left += !fiber.done;
                    if (left && !now.progressed && !(order && !strcmp(order, "random"))) {
                        fprintf(stderr, "emulator: %u threads wait forever\n", left);
                        block = nullptr;
                        return 1;
                    }
                }
                block = nullptr;
            }
    return 0;
}

}  // namespace emulator

#define threadIdx (emulator::block->current->thread)
#define blockIdx (emulator::block->block)
#define blockDim (emulator::block->threads)
#define gridDim (emulator::block->blocks)

struct uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};

// Between blocks nothing runs at once here.
static inline void add_at(float* to, float value) { *to += value; }

static inline float __uint_as_float(u32 x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
static inline u32 __float_as_uint(float f) {
    u32 x;
    memcpy(&x, &f, 4);
    return x;
}
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline int __ffs(u32 x) { return __builtin_ffs((int)x); }
template <typename T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
static inline T max(T a, T b) { return a < b ? b : a; }

static inline void __syncthreads() { emulator::meet(emulator::block->all, (unsigned)emulator::block->fibers.size()); }
static inline void __syncwarp(u32 = 0xFFFFFFFFu) { emulator::meet_warp(); }

template <typename T>
static inline T __shfl_xor_sync(u32, T value, int step) {
    u32 words[2] = {};
    memcpy(words, &value, sizeof(T));
    return emulator::exchange(words, 2, [&] {
        T other;
        memcpy(&other, emulator::lane(emulator::lane_index() ^ (unsigned)step).operands, sizeof(T));
        return other;
    });
}
static inline u32 __ballot_sync(u32, int predicate) {
    const u32 word = predicate != 0;
    return emulator::exchange(&word, 1, [] {
        u32 bits = 0;
        for (unsigned i = 0; i < 32; ++i) bits |= emulator::lane(i).operands[0] << i;
        return bits;
    });
}
static inline int __all_sync(u32 mask, int predicate) { return __ballot_sync(mask, predicate) == 0xFFFFFFFFu; }
static inline u32 __reduce_add_sync(u32, u32 value) {
    return emulator::exchange(&value, 1, [] {
        u32 sum = 0;
        for (unsigned i = 0; i < 32; ++i) sum += emulator::lane(i).operands[0];
        return sum;
    });
}

// ---- halves and TF32

static inline u32 to_tf32(float x) { return (__float_as_uint(x) + 0x1000u) & ~0x1FFFu; }

#if LAPS_ELEMENT == LAPS_BF16
static inline u16 float_to_half(float x) {
    const u32 bits = __float_as_uint(x);
    if (x != x) return 0x7FFF;
    return (u16)((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}
static inline float half_to_float(u16 x) { return __uint_as_float((u32)x << 16); }
#else
static inline u16 float_to_half(float x) {
    _Float16 half = (_Float16)x;
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
static inline float half_to_float(u16 x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
}
#endif
static inline u32 pack_halves(float low, float high) {
    return (u32)float_to_half(low) | (u32)float_to_half(high) << 16;
}

// c + terms as tensor cores add: aligned to the largest, of which two bits more than a float has are kept, rounded toward
// zero. Measured so by Fasi et al., Numerical behavior of NVIDIA tensor cores (2021).
static inline float tensor_add(float c, const double* terms, int count) {
    int highest = -1000, exponent;
    if (c != 0.0f) frexp((double)c, &highest);
    for (int i = 0; i < count; ++i)
        if (terms[i] != 0.0) {
            frexp(terms[i], &exponent);
            highest = exponent > highest ? exponent : highest;
        }
    if (highest == -1000) return 0.0f;
    double sum = 0.0;
    for (int i = 0; i < count; ++i) sum += terms[i];
    if (!(fabs(sum + c) < 1e38)) return (float)(sum + c);
    const double quantum = ldexp(1.0, highest - 26);
    sum = trunc((double)c / quantum) * quantum;
    for (int i = 0; i < count; ++i) sum += trunc(terms[i] / quantum) * quantum;
    const float rounded = (float)sum;
    return fabs((double)rounded) > fabs(sum) ? nextafterf(rounded, 0.0f) : rounded;
}

// PTX, "Matrix Fragments for mma.m16n8k16": a0 (g, 2q..), a1 (g + 8, 2q..), a2 (g, 2q + 8..), a3 (g + 8, 2q + 8..);
// b0 (2q.., g), b1 (2q + 8.., g); c0, c1 (g, 2q..), c2, c3 (g + 8, 2q..).
static inline void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
    emulator::exchange(operands, 6, [&] {
        const unsigned g = emulator::lane_index() / 4, q = emulator::lane_index() % 4;
        for (int i = 0; i < 4; ++i) {
            const unsigned column = 2 * q + i % 2;
            double terms[16];
            for (unsigned k = 0; k < 16; ++k) {
                const unsigned q_of = k % 8 / 2, shift = k % 2 * 16, late = k / 8;
                const u32 a = emulator::lane(4 * g + q_of).operands[i / 2 + 2 * late];
                const u32 b = emulator::lane(4 * column + q_of).operands[4 + late];
                terms[k] = (double)half_to_float((u16)(a >> shift)) * half_to_float((u16)(b >> shift));
            }
            c[i] = tensor_add(c[i], terms, 16);
        }
        return 0;
    });
}

// PTX, "Matrix Fragments for mma.m16n8k8" of .tf32: a0 (g, q), a1 (g + 8, q), a2 (g, q + 4), a3 (g + 8, q + 4);
// b0 (q, g), b1 (q + 4, g); c as above. The lower 13 bits are not looked at.
static inline void mma_tf32(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
    const u32 operands[6] = {a0, a1, a2, a3, b0, b1};
    emulator::exchange(operands, 6, [&] {
        const unsigned g = emulator::lane_index() / 4, q = emulator::lane_index() % 4;
        for (int i = 0; i < 4; ++i) {
            const unsigned column = 2 * q + i % 2;
            double terms[8];
            for (unsigned k = 0; k < 8; ++k) {
                const u32 a = emulator::lane(4 * g + k % 4).operands[i / 2 + 2 * (k / 4)];
                const u32 b = emulator::lane(4 * column + k % 4).operands[4 + k / 4];
                terms[k] = (double)__uint_as_float(a & ~0x1FFFu) * __uint_as_float(b & ~0x1FFFu);
            }
            c[i] = tensor_add(c[i], terms, 8);
        }
        return 0;
    });
}
