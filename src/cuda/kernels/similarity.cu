// Scores of image x text pairs: selection, calibration and alignment of a pair by one warp, one after the other, with
// nothing pair-sized but the score (and what the backward pass needs) written to memory.

// Whether a PairMemory goes to functions out of line by reference, and so lies in local memory.
#define PAIR_HAS_ADDRESS 0
#include "device.cuh"
#include "element.cuh"
#include "call.cuh"
#include "select.cuh"
#include "tokens.cuh"
#include "align.cuh"
#include "pair.cuh"

// Grid: (splits of the texts, images), or (images / warps) for the diagonal.
KERNEL similarity_forward(const __grid_constant__ Call call) {
    SHARED_MEMORY(memory);
    const Work work = take_work(call, memory, 0);
    PairMemory pair = work.pair;
    for (int t = work.first; t < work.last; t += work.step) {
        Text text;
        const Pair at = find_pair(call, work.image.index, t, text);
        float score = NAN_F, fraction = NAN_F;
        if (at.finite) {
            score_patches(call, work.image.index, at.text_products, pair);
            select_patches(call, work.image.index, t, pair);
            fuse_dropped(call, pair);
            measure_tokens(call, work.image, pair);
            score = align_pair(call, work.image, pair, text, at.best_token, at.best_word);
            fraction = pair.fraction;
        }
        if (lane_id() == 0) {
            call.scores[at.index] = fabsf(score) < INFINITY_F && !pair.is_empty ? score : NAN_F;
            call.fraction[at.index] = fraction;
        }
        save_rest(call, pair, at, text);
        __syncwarp();
    }
}
