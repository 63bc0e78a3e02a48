//! All pairs, fused: selection, calibration and alignment of a pair follow each other in cache, and nothing pair-sized
//! but the score reaches memory.

use std::ops::Range;

use ndarray::{Array2, Array3};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::align::Alignment;
use super::calibrate::PairTokens;
use super::options::{Options, PairInput, Pairs, Sizes};
use super::prepare::{Lengths, PreparedImage, PreparedText, TextBlock};
use super::real::{Real, padded};
use super::select::{Decision, PairSelection};
use super::simd::Level;
use crate::error::LapsError;

/// What the backward pass needs of the forward pass: nothing but bits and indices.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// (B_v, B_t, ceil(N / 8)): the selection, patch i in bit i % 8 of byte i / 8.
    pub selection: Array3<u8>,
    /// (B_v, B_t, L): the token that each word matches best.
    pub best_token: Array3<i16>,
    /// (B_v, B_t, P + N_c + 1): the word that each token matches best.
    pub best_word: Array3<i16>,
}

/// Result of [`similarity`]. With [`Pairs::Diagonal`], B_t is 1 in all of it: image i with text i.
#[derive(Clone, Debug)]
pub struct Similarity<T> {
    /// (B_v, B_t)
    pub scores: Array2<T>,
    /// (B_v, B_t): mean_i D_i
    pub kept_fraction: Array2<T>,
    /// For [`super::similarity_backward`], if asked for.
    pub saved: Option<Saved>,
}

/// Buffers of one worker.
pub(crate) struct PairScratch<T: Real> {
    pub decision: Decision<T>,
    pub tokens: PairTokens<T>,
    pub alignment: Alignment<T>,
}

impl<T: Real> PairScratch<T> {
    pub(crate) fn new() -> Self {
        PairScratch {
            decision: Decision::default(),
            tokens: PairTokens::new(),
            alignment: Alignment::default(),
        }
    }
}

/// Bytes of scratch memory, unless a call sets them.
const CHUNK: usize = 24 << 20;

/// How a call is cut into blocks that fit its memory budget.
pub(crate) struct Blocks {
    pub lengths: Lengths,
    pub texts: usize,
    pub images: usize,
}

impl Blocks {
    /// Blocks for the forward pass or, where a pair leaves `pair_bytes` behind until its block is done, for the backward.
    pub(crate) fn new<T: Real>(
        sizes: &Sizes,
        pairs: Pairs,
        longest: usize,
        pair_bytes: Option<usize>,
        chunk: Option<usize>,
    ) -> Self {
        let chunk = chunk.unwrap_or(CHUNK);
        let lengths = Lengths::for_texts_per_image(sizes.columns(pairs));
        let row = padded::<T>(sizes.channels) * size_of::<T>();
        // The words, in the backward pass their gradients too, and the direction twice.
        let per_text = (longest * if pair_bytes.is_some() { 2 } else { 1 } + 2) * row;
        let texts = (chunk / 2 / per_text).clamp(1, sizes.texts);
        let weights = (sizes.patches + 1) * padded::<T>(sizes.aggregated);
        let gram = match lengths {
            Lengths::Gram => (sizes.patches + 1) * padded::<T>(sizes.patches + 1),
            Lengths::Direct => 0,
        };
        let columns = if pairs == Pairs::All { texts } else { 1 };
        let per_image = (sizes.patches + 1 + sizes.prefix) * row
            + (weights + gram) * size_of::<T>()
            + columns * pair_bytes.unwrap_or(0);
        // As many for one thread as for another: a block ends when its last image does. Sums run in the images' order
        // whatever the blocks, so that the threads change no result.
        let threads = rayon::current_num_threads();
        let images = (chunk.saturating_sub(texts * per_text) / per_image / threads).max(1) * threads;
        Blocks { lengths, texts, images: images.min(sizes.images) }
    }

    /// The text blocks of a call.
    pub(crate) fn text_ranges(&self, texts: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        ranges(0..texts, self.texts)
    }

    /// The image blocks that meet a text block.
    pub(crate) fn image_ranges(
        &self,
        images: usize,
        pairs: Pairs,
        texts: &Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let all = if pairs == Pairs::All { 0..images } else { texts.clone() };
        ranges(all, self.images)
    }
}

fn ranges(all: Range<usize>, step: usize) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(step).map(move |start| start..(start + step).min(end))
}

/// The texts of a block that image `image` meets, as indices into the block.
pub(crate) fn met(pairs: Pairs, image: usize, texts: &Range<usize>) -> Range<usize> {
    match pairs {
        Pairs::All => 0..texts.len(),
        Pairs::Diagonal => image - texts.start..image - texts.start + 1,
    }
}

/// Scores of all image x text pairs, (B_v, B_t), or of image i with text i ([`Pairs::Diagonal`]).
///
/// `S = mean_j max_m A_mj + mean_m max_j A_mj`, `A_mj = leaky_relu(u_m . l2(w_j))`, with the tokens u that the pair's
/// selection gives (laps.md). Per pair about `2 C (N + (k + P + 1) l) + 2 k N_c l + k^2 N_c` FLOPs, once per image
/// `N^2 C` more; scratch memory stays within `options.chunk` where that holds one text, and one image per thread. Works
/// on the current rayon pool; the result does not depend on its size. A pair with non-finite input scores NaN. Errors
/// name the argument that does not fit.
///
/// ```
/// use laps::slimming::{Options, PairInput, Pairs, Selection, similarity};
/// use ndarray::{Array3, array};
///
/// let value = |(i, j, k)| ((7 * i + 5 * j + 3 * k) % 11) as f32 - 5.0;
/// let patches = Array3::from_shape_fn((2, 9, 8), value); // 2 images, 9 patches
/// let words = Array3::from_shape_fn((3, 4, 8), value); // 3 texts of at most 4 words
/// let logits = Array3::from_shape_fn((2, 9, 2), value); // 2 aggregated tokens
/// let lengths = array![4, 2, 3];
/// let input = PairInput {
///     patches: patches.view(),
///     prefix: patches.slice(ndarray::s![.., ..0, ..]), // no prefix tokens
///     words: words.view(),
///     word_lengths: lengths.view(),
///     logits: logits.view(),
///     selection: Selection::Scores,
///     pairs: Pairs::All,
///     interrupt: None,
/// };
/// let result = similarity(&input, &Options::default(), false)?;
/// assert_eq!(result.scores.dim(), (2, 3));
/// # Ok::<(), laps::LapsError>(())
/// ```
pub fn similarity<T: Real>(
    input: &PairInput<'_, T>,
    options: &Options,
    save: bool,
) -> Result<Similarity<T>, LapsError> {
    let operation = "similarity";
    options.check(operation)?;
    let sizes = input.check(operation)?;
    let level = Level::current()?;
    let columns = sizes.columns(input.pairs);
    let pairs = (sizes.images, columns);
    let mut result = Similarity {
        scores: Array2::zeros(pairs),
        kept_fraction: Array2::zeros(pairs),
        saved: save.then(|| Saved {
            selection: Array3::zeros((pairs.0, pairs.1, sizes.patches.div_ceil(8))),
            best_token: Array3::zeros((pairs.0, pairs.1, sizes.words)),
            best_word: Array3::zeros((pairs.0, pairs.1, sizes.tokens())),
        }),
    };
    let longest = super::prepare::longest(input.word_lengths);
    let blocks = Blocks::new::<T>(&sizes, input.pairs, longest, None, options.chunk);
    for texts in blocks.text_ranges(sizes.texts) {
        let block = TextBlock::new(input, texts.clone(), options);
        for images in blocks.image_ranges(sizes.images, input.pairs, &texts) {
            input.check_interrupt(operation)?;
            let task = ScoreTiles { input, sizes: &sizes, options, lengths: blocks.lengths, block: &block };
            let done: Vec<Tile<T>> = match blocks.lengths {
                // Few texts: a worker scores an image while it has it in its cache.
                Lengths::Direct => images
                    .into_par_iter()
                    .map_init(
                        || (PreparedImage::empty(), PairScratch::new()),
                        |(image, scratch), i| {
                            image.prepare(level, input, &sizes, i, options, blocks.lengths);
                            let tile = met(input.pairs, i, &texts);
                            level.dispatch(Dispatched { task, image, tile, save, scratch })
                        },
                    )
                    .collect(),
                Lengths::Gram => {
                    let prepared: Vec<_> = images
                        .into_par_iter()
                        .map(|i| PreparedImage::new(level, input, &sizes, i, options, blocks.lengths))
                        .collect();
                    // Tiles of texts, so that few images keep all threads busy.
                    let tiles = (4 * rayon::current_num_threads()).div_ceil(prepared.len());
                    let tasks: Vec<_> = prepared
                        .iter()
                        .flat_map(|image| {
                            let met = met(input.pairs, image.index, &texts);
                            let step = met.len().div_ceil(tiles).max(1);
                            ranges(met, step).map(move |tile| (image, tile))
                        })
                        .collect();
                    tasks
                        .into_par_iter()
                        .map_init(PairScratch::new, |scratch, (image, tile)| {
                            level.dispatch(Dispatched { task, image, tile, save, scratch })
                        })
                        .collect()
                }
            };
            for tile in done {
                let first = if input.pairs == Pairs::All { texts.start } else { 0 };
                tile.store(first, &mut result);
            }
        }
    }
    Ok(result)
}

/// What one image and one tile of texts give.
struct Tile<T> {
    image: usize,
    /// Index into the text block; 0 for the diagonal.
    column: usize,
    scores: Vec<T>,
    fractions: Vec<T>,
    selection: Vec<u8>,
    best_token: Vec<i16>,
    best_word: Vec<i16>,
}

impl<T: Real> Tile<T> {
    fn store(self, first: usize, result: &mut Similarity<T>) {
        let (i, column, pairs) = (self.image, first + self.column, self.scores.len());
        for p in 0..pairs {
            result.scores[[i, column + p]] = self.scores[p];
            result.kept_fraction[[i, column + p]] = self.fractions[p];
        }
        if let Some(saved) = &mut result.saved {
            copy_rows(&self.selection, pairs, &mut saved.selection, i, column);
            copy_rows(&self.best_token, pairs, &mut saved.best_token, i, column);
            copy_rows(&self.best_word, pairs, &mut saved.best_word, i, column);
        }
    }
}

fn copy_rows<E: Copy>(from: &[E], pairs: usize, to: &mut Array3<E>, image: usize, column: usize) {
    let (_, columns, width) = to.dim();
    let start = (image * columns + column) * width;
    to.as_slice_mut().expect("contiguous")[start..start + pairs * width].copy_from_slice(from);
}

#[derive(Clone, Copy)]
struct ScoreTiles<'a, 'i, T: Real> {
    input: &'a PairInput<'i, T>,
    sizes: &'a Sizes,
    options: &'a Options,
    lengths: Lengths,
    block: &'a TextBlock<T>,
}

struct Dispatched<'a, 'i, T: Real> {
    task: ScoreTiles<'a, 'i, T>,
    image: &'a PreparedImage<'i, T>,
    tile: Range<usize>,
    save: bool,
    scratch: &'a mut PairScratch<T>,
}

impl<T: Real> WithSimd for Dispatched<'_, '_, T> {
    type Output = Tile<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Tile<T> {
        self.task.run(simd, self.image, self.tile, self.save, self.scratch)
    }
}

impl<T: Real> ScoreTiles<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        simd: S,
        image: &PreparedImage<'_, T>,
        tile: Range<usize>,
        save: bool,
        scratch: &mut PairScratch<T>,
    ) -> Tile<T> {
        let ScoreTiles { input, sizes, block, .. } = *self;
        let (n, count) = (sizes.patches, tile.len());
        let saved = |width: usize| if save { count * width } else { 0 };
        let mut out = Tile {
            image: image.index,
            column: if input.pairs == Pairs::All { tile.start } else { 0 },
            scores: vec![T::nan(); count],
            fractions: vec![T::nan(); count],
            selection: vec![0; saved(n.div_ceil(8))],
            best_token: vec![0; saved(sizes.words)],
            best_word: vec![0; saved(sizes.tokens())],
        };
        if !image.finite {
            return out;
        }
        let directions = &block.directions[tile.start * image.stride..][..count * image.stride];
        let text_scores = image.text_scores(simd, directions);
        for (p, text) in block.texts[tile].iter().enumerate() {
            let selection = PairSelection::of(&input.selection, input.pairs, image.index, text.index);
            if !text.finite || !selection.finite() {
                continue;
            }
            let text_scores = &text_scores[p * image.gram_stride..][..n];
            let (score, fraction) = self.score_pair(simd, image, text, text_scores, &selection, scratch);
            out.scores[p] = if score.is_finite() { score } else { T::nan() };
            out.fractions[p] = fraction;
            if save {
                let PairScratch { decision, tokens, alignment } = &*scratch;
                let width = n.div_ceil(8);
                decision.write_bits(&mut out.selection[p * width..][..width]);
                let words = &mut out.best_token[p * sizes.words..][..text.length];
                words.copy_from_slice(&alignment.best_token[..text.length]);
                let slots = &mut out.best_word[p * sizes.tokens()..][..tokens.count];
                slots.copy_from_slice(&alignment.best_word);
            }
        }
        out
    }

    #[inline(always)]
    fn score_pair<S: Simd>(
        &self,
        simd: S,
        image: &PreparedImage<'_, T>,
        text: &PreparedText<T>,
        text_scores: &[T],
        selection: &PairSelection<'_, T>,
        scratch: &mut PairScratch<T>,
    ) -> (T, T) {
        let PairScratch { decision, tokens, alignment } = scratch;
        let soft = self.input.selection.soft();
        decision.decide(image, text_scores, selection, self.options, None);
        tokens.compute(simd, image, text, decision, self.options, self.lengths, soft, false);
        alignment.find(&mut tokens.cosines, tokens.count, text.length, text.lanes);
        (alignment.score(text.length, self.options), decision.fraction)
    }
}
