// Gradients of similarity.cu. Each pair is computed again from its selection bits and arg-maxes (laps.md, identity 5).
//
// With token q_m = sum_k a_mk v_k, cosines t_mj = q_m . w_j / (|q_m| |w_j|) and their gradients dt (zero but for what won
// a maximum): x_mj = dt_mj / (|q_m| |w_j|), h_m = sum_j dt_mj t_mj / |q_m|^2. Then
// - P: dP_kj = sum_m a_mk x_mj, written for the products with W and V that follow;
// - G: dV -= (sum h_m a_m a_m^T) V over all pairs of an image: a_m and h_m a_m are written, and multiplied afterwards;
// - weights: da_mk = sum_j x_mj P_kj - h_m (G a_m)_k, summed over the texts that a warp meets, in their order: nothing
//   is added by two warps at once, so the result is the same in every run.

// Whether a PairMemory goes to functions out of line by reference, and so lies in local memory.
#define PAIR_HAS_ADDRESS 1
#include "device.cuh"
#include "element.cuh"
#include "call.cuh"
#include "select.cuh"
#include "tokens.cuh"
#include "align.cuh"
#include "pair.cuh"
#include "gradient.cuh"

KERNEL similarity_backward(const __grid_constant__ BackwardCall backward) {
    const Call& call = backward.call;
    SHARED_MEMORY(memory);
    const Work work = take_work(call, memory, gradient_bytes(call));
    PairMemory pair = work.pair;
    const GradientMemory scratch = gradient_memory(call, work.rest);
    const GradientSums sums = gradient_sums(backward, work.image.index);
    for (int t = work.first; t < work.last; t += work.step) {
        Text text;
        const Pair at = find_pair(call, work.image.index, t, text);
        const float grad = backward.grad_scores[at.index];
        const float grad_fraction = backward.grad_fraction ? backward.grad_fraction[at.index] : 0.0f;
        const i64 place = (i64)work.image.index * (call.diagonal ? 1 : call.texts) + (call.diagonal ? 0 : t);
        if (!at.finite || (grad == 0.0f && grad_fraction == 0.0f)) {
            const bool poisoned = grad != 0.0f || grad_fraction != 0.0f;
            if (poisoned && lane_id() == 0) {
                backward.poisoned_images[work.image.index] = 1;
                backward.poisoned_texts[t] = 1;
            }
            leave_nothing(backward, work.image, text, place, t);
            continue;
        }
        score_patches(call, work.image.index, at.text_products, pair);
        select_patches(call, work.image.index, t, pair);
        if (pair.is_empty) {
            if (lane_id() == 0) {
                backward.poisoned_images[work.image.index] = 1;
                backward.poisoned_texts[t] = 1;
            }
            leave_nothing(backward, work.image, text, place, t);
            __syncwarp();
            continue;
        }
        fuse_dropped(call, pair);
        measure_tokens(call, work.image, pair);
        find_lost_lengths(call, work.image, pair, text.first);
        if (call.soft) begin_selection_gradient(call, scratch, grad_fraction);
        cosine_gradients(call, work.image, pair, text, at, scratch, grad, true, 0);
        write_tokens(backward, work.image, pair, scratch, place);
        for (int word = 0; word < text.count; word += 16) {
            cosine_gradients(call, work.image, pair, text, at, scratch, grad, false, word);
            write_products(backward, work.image, pair, text, scratch, word);
            add_weights(call, work.image, pair, text, scratch, sums, word);
        }
        if (call.soft) end_selection_gradient(backward, work.image, pair, scratch, sums, t);
        __syncwarp();
    }
}
