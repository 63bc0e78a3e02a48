// What a launch is given. `src/cuda/similarity.rs` has the same structure; a test compares their layouts.
//
// An image has `rows` = N + s + P rows: its patches, scaled by a power of two; in the soft form (s = 1) their mean;
// its prefix tokens, of unit length. They are padded with zeros to `stride`, a multiple of 16, and rows of weights
// and of G to `pitch`, which is 16 more than a multiple of 32, so that no two lanes want the same bank.
// A pair has M = P + N_c + 1 token slots, prefix first, fused last, padded to `slots`, a multiple of 16. Tokens are
// rows of weights over the image's rows: a prefix token is one 1, an aggregated token E = exp(l - max l) (with eps at
// the mean), and the row of the fused token, which differs by pair, is made in the kernel.

// How a pair's patches are selected.
enum Selection {
    SELECT_TOP = 0,        // the k highest scores
    SELECT_GUMBEL = 1,     // where the perturbed log odds are positive
    SELECT_PERTURBED = 2,  // the k highest perturbed log odds
    SELECT_MASK = 3,       // given, bytes
    SELECT_SOFT = 4,       // given, floats in [0, 1]: kernels built with SOFT_MASK, and they for nothing else
    SELECT_SAVED = 5       // the bits of an earlier call
};

struct Call {
    // Of the images of this launch.
    const Element* weights;      // (images, slots, pitch)
    const Element* gram;         // (images, stride, pitch)
    const Element* rows;         // (images, stride, C)
    const float* norms;          // (images, stride): |row|; of the mean, the mean of the patches' lengths
    const float* self_scores;    // (images, N): a_i, min-max scaled in the paper variant
    const float* text_factor;    // (images, N)
    const float* keep_prob;      // (images, N), or null
    const float* logits;         // (images, N, N_c)
    const u8* image_finite;      // (images)
    // Of the texts of this launch.
    const Element* words;        // (words, C), scaled by a power of two
    const float* word_inverse;   // (words): 1 / |word|, 0 for a zero word
    const i64* first_word;       // (texts)
    const i64* word_count;       // (texts)
    const u8* text_finite;       // (texts)
    // Of their pairs.
    const Element* products;     // P^T: word j, image b, row k at j * product_pitch + b * product_image + k
    const float* text_products;  // v_i . direction: text t at t * text_pitch + b * text_image + i
    const void* mask;            // (images, texts, N) of SELECT_MASK (bytes) and SELECT_SOFT (floats)
    // Results of all pairs, of which this launch computes a part: row `first_image + b`, column `first_text + t`.
    float* scores;               // (B_v, B_t)
    float* fraction;             // (B_v, B_t)
    u8* selection;               // (B_v, B_t, ceil(N / 8)), or null
    short* best_token;           // (B_v, B_t, L), or null
    short* best_word;            // (B_v, B_t, M), or null
    i64 word_offset;             // of `first_word`, where the words of this launch begin
    i64 product_pitch;
    i64 product_image;
    i64 text_pitch;
    i64 text_image;
    i64 mask_pitch;              // elements of `mask` from one image to the next
    u64 seed;
    int images, texts;           // of this launch
    int first_image, first_text;
    int columns;                 // B_t of the results; 1 for the diagonal
    int diagonal;                // whether image b meets text b alone
    int patches;                 // N
    int stride, pitch;
    int slots;
    int aggregated;              // N_c
    int prefix;                  // P
    int channels;                // C
    int max_words;               // L
    int kept;                    // k
    int selection_mode;          // Selection
    int soft;                    // whether weights are of the stable form
    int seeded;                  // whether the selection was drawn with noise
    int paper;                   // whether scores are of the paper variant
    int language_context;
    int fusion;
    int shared;                  // whether the block's shared memory holds the image's weights and G
    float attention_weight;      // beta
    float temperature;           // tau
    float negative_slope;
    float word_to_patch;         // shares of the two directions in the score
    float patch_to_word;
};
