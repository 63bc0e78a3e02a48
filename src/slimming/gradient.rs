//! Backward of the fused similarity: each pair is computed again from its selection bits and arg-maxes (laps.md,
//! identity 5), and only the entries that won a maximum carry gradient.
//!
//! With q_m = sum_i w_im v_i the unnormalised token and t_mj = q_m . w_j / |q_m| its cosines, a gradient dt gives
//! `dq_m = sum_j x_mj w_j - h_m q_m`, `x_mj = dt_mj / |q_m|`, `h_m = sum_j dt_mj t_mj / |q_m|^2`. No q_m is formed:
//! - patches: `dv_i += sum_j (sum_m w_im x_mj) w_j` now, and `- sum_i' H_ii' v_i'` once per image, H = sum_m h_m w_m w_m^T;
//! - words: `dw_j += sum_i (sum_m w_im x_mj) v_i`, over all images of a block in their order, whatever the threads do;
//! - weights: `dw_im = v_i . dq_m = sum_j x_mj P_ij - h_m (G w_m)_i`.

use std::ops::Range;

use ndarray::{Array2, Array3, ArrayView2, ArrayViewMut1, ArrayViewMut2, ArrayViewMut3, Axis};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::align::DirectionWeights;
use super::noise::PairNoise;
use super::options::{Options, PairInput, Pairs, Selection, Sizes, shape};
use super::prepare::{Lengths, PreparedImage, PreparedText, TextBlock, longest};
use super::real::{Real, lanes, padded};
use super::select::{PairSelection, straight_through};
use super::simd::{Buffer, GatherRows, Level, Strided, combine, dot, reserve, row_products, zeros};
use super::similarity::{Blocks, PairScratch, Saved, met};
use crate::error::LapsError;

/// Where the gradients of [`similarity_backward`] go; each has the shape of its input, and is overwritten.
#[derive(Debug)]
pub struct GradientsMut<'a, T> {
    pub patches: ArrayViewMut3<'a, T>,
    pub prefix: ArrayViewMut3<'a, T>,
    pub words: ArrayViewMut3<'a, T>,
    pub logits: ArrayViewMut3<'a, T>,
    /// Needed with [`Selection::KeepProbability`].
    pub keep_probability: Option<ArrayViewMut2<'a, T>>,
    /// Wanted with [`Selection::SoftMask`], of its shape.
    pub mask: Option<ArrayViewMut3<'a, T>>,
}

/// Gradients of [`super::similarity`] with respect to all its floating input.
///
/// `saved` comes from the forward call on the same input and options; `grad_scores` and `grad_fraction` (of the kept
/// fraction, used in the soft forms) are (B_v, B_t), or (B, 1) for the diagonal. Selection scores carry no gradient except
/// through the keep probability (straight-through, eqs. 4 and 5) or the caller's soft mask. Work and memory are about
/// three times the forward's; sums run in a fixed order, so the result does not depend on the threads. Errors name the
/// argument that does not fit.
pub fn similarity_backward<T: Real>(
    input: &PairInput<'_, T>,
    options: &Options,
    saved: &Saved,
    grad_scores: ArrayView2<'_, T>,
    grad_fraction: Option<ArrayView2<'_, T>>,
    out: &mut GradientsMut<'_, T>,
) -> Result<(), LapsError> {
    let operation = "similarity_backward";
    options.check(operation)?;
    let sizes = input.check(operation)?;
    check(operation, input, &sizes, saved, grad_scores, grad_fraction, out)?;
    let (mut image_outs, word_out) = split(out);
    let element = size_of::<T>();
    let level = Level::current()?;
    let longest = longest(input.word_lengths);
    let pair_rows = match input.selection {
        Selection::Scores => options.kept(sizes.patches),
        _ => sizes.patches,
    };
    let pair_bytes = (pair_rows + sizes.prefix + 2) * (padded::<T>(longest) * element + 4)
        + padded::<T>(sizes.channels) * element;
    let blocks = Blocks::new::<T>(&sizes, input.pairs, longest, Some(pair_bytes), options.chunk);
    let lengths = blocks.lengths;
    for texts in blocks.text_ranges(sizes.texts) {
        let block = TextBlock::new(input, texts.clone(), options);
        let stride = padded::<T>(sizes.channels);
        let mut word_grads: Vec<WordGrad<T>> = block
            .texts
            .iter()
            .map(|text| WordGrad { rows: zeros(text.length * stride), poisoned: false })
            .collect();
        for images in blocks.image_ranges(sizes.images, input.pairs, &texts) {
            input.check_interrupt(operation)?;
            let done: Vec<ImageRecords<'_, T>> = image_outs[images.clone()]
                .par_iter_mut()
                .zip(images)
                .map_init(Scratch::new, |scratch, (out, i)| {
                    let mut image = PreparedImage::new(level, input, &sizes, i, options, lengths);
                    let task = ImageTask {
                        input,
                        sizes: &sizes,
                        options,
                        lengths,
                        image: &image,
                        block: &block,
                        saved,
                        grad_scores,
                        grad_fraction,
                        met: met(input.pairs, i, &texts),
                        first: input.pairs == Pairs::Diagonal || texts.start == 0,
                    };
                    let pairs = level.dispatch(Dispatched { task, out, scratch });
                    image.keep_rows_only();
                    ImageRecords { image, pairs }
                })
                .collect();
            // A few texts at a time: an image's rows stay in cache for all of them.
            let group = block.texts.len().div_ceil(4 * rayon::current_num_threads()).min(8);
            let groups = word_grads.par_chunks_mut(group).zip(block.texts.par_chunks(group)).enumerate();
            groups.for_each(|(g, (grads, texts))| {
                level.dispatch(WordTask { texts, first: g * group, done: &done, grads });
            });
        }
        let mut outs = word_out.slice_mut(ndarray::s![texts, .., ..]);
        let outs = outs.axis_iter_mut(Axis(0)).into_par_iter();
        outs.zip(&block.texts).zip(&word_grads).for_each(|((mut rows, text), grads)| {
            for (j, mut row) in rows.rows_mut().into_iter().enumerate() {
                if j >= text.length {
                    row.fill(T::zero());
                } else if grads.poisoned {
                    row.fill(T::nan());
                } else {
                    let unit = &text.rows[j * stride..][..sizes.channels];
                    let grad = &grads.rows[j * stride..][..sizes.channels];
                    through_unit(unit, grad, text.inverse[j], |c, x| row[c] = x);
                }
            }
        });
    }
    Ok(())
}

/// Gradient through x / |x|: `(g - u (u . g)) / |x|`, for each element c.
fn through_unit<T: Real>(unit: &[T], grad: &[T], inverse: T, mut write: impl FnMut(usize, T)) {
    let along: T = unit.iter().zip(grad).map(|(&u, &g)| u * g).sum();
    for (c, (&u, &g)) in unit.iter().zip(grad).enumerate() {
        write(c, (g - u * along) * inverse);
    }
}

fn check<T: Real>(
    operation: &'static str,
    input: &PairInput<'_, T>,
    sizes: &Sizes,
    saved: &Saved,
    grad_scores: ArrayView2<'_, T>,
    grad_fraction: Option<ArrayView2<'_, T>>,
    out: &GradientsMut<'_, T>,
) -> Result<(), LapsError> {
    let columns = sizes.columns(input.pairs);
    let pair = |width: usize| vec![sizes.images, columns, width];
    let same = |argument: &'static str, got: &[usize], expected: &[usize]| {
        if got == expected {
            Ok(())
        } else {
            Err(LapsError::shape(operation, argument, shape(expected), shape(got)))
        }
    };
    same("selection", saved.selection.shape(), &pair(sizes.patches.div_ceil(8)))?;
    same("best_token", saved.best_token.shape(), &pair(sizes.words))?;
    same("best_word", saved.best_word.shape(), &pair(sizes.tokens()))?;
    same("grad_scores", grad_scores.shape(), &[sizes.images, columns])?;
    if let Some(grad) = grad_fraction {
        same("grad_kept_fraction", grad.shape(), &[sizes.images, columns])?;
    }
    same("grad_patches", out.patches.shape(), input.patches.shape())?;
    same("grad_prefix", out.prefix.shape(), input.prefix.shape())?;
    same("grad_words", out.words.shape(), input.words.shape())?;
    same("grad_logits", out.logits.shape(), input.logits.shape())?;
    match (&input.selection, &out.keep_probability) {
        (Selection::KeepProbability { probability, .. }, Some(grad)) => {
            same("grad_keep_prob", grad.shape(), probability.shape())?;
        }
        (Selection::KeepProbability { .. }, None) => {
            return Err(LapsError::value(operation, "grad_keep_prob", "an output", "none"));
        }
        _ => {}
    }
    if let Some(grad) = &out.mask {
        same("grad_mask", grad.shape(), &pair(sizes.patches))?;
    }
    let in_range = |argument, indices: &Array3<i16>, limit: usize| match indices
        .iter()
        .find(|&&i| i < 0 || i as usize >= limit)
    {
        Some(i) => Err(LapsError::value(operation, argument, format!("0 to {}", limit - 1), i)),
        None => Ok(()),
    };
    in_range("best_token", &saved.best_token, sizes.tokens())?;
    in_range("best_word", &saved.best_word, sizes.words)
}

/// The parts of the outputs that belong to one image.
struct ImageOut<'a, T> {
    patches: ArrayViewMut2<'a, T>,
    prefix: ArrayViewMut2<'a, T>,
    logits: ArrayViewMut2<'a, T>,
    keep_probability: Option<ArrayViewMut1<'a, T>>,
    mask: Option<ArrayViewMut2<'a, T>>,
}

/// Splits the outputs into those of each image and that of the words; zeroes what pairs add to one by one.
fn split<'a, 'v, T: Real>(
    out: &'a mut GradientsMut<'v, T>,
) -> (Vec<ImageOut<'a, T>>, &'a mut ArrayViewMut3<'v, T>) {
    let GradientsMut { patches, prefix, words, logits, keep_probability, mask } = out;
    keep_probability.iter_mut().for_each(|k| k.fill(T::zero()));
    mask.iter_mut().for_each(|m| m.fill(T::zero()));
    let mut keep = keep_probability.as_mut().map(|k| k.axis_iter_mut(Axis(0)));
    let mut mask = mask.as_mut().map(|m| m.axis_iter_mut(Axis(0)));
    let rows = patches.axis_iter_mut(Axis(0)).zip(prefix.axis_iter_mut(Axis(0)));
    let images = rows
        .zip(logits.axis_iter_mut(Axis(0)))
        .map(|((patches, prefix), logits)| ImageOut {
            patches,
            prefix,
            logits,
            keep_probability: keep.as_mut().and_then(Iterator::next),
            mask: mask.as_mut().and_then(Iterator::next),
        })
        .collect();
    (images, words)
}

/// What a pair leaves for the gradient of its words: `dw_j += sum_r coefficients[r][j] row_r`.
enum PairRecord<T: Real> {
    /// No gradient came to the pair.
    Nothing,
    /// Gradient came to a pair whose score is NaN.
    Poisoned,
    Rows {
        /// Rows of the image.
        rows: Vec<u32>,
        /// (rows, lanes)
        coefficients: Buffer<T>,
        /// Rows of the pair's own: the fused token and tokens computed exactly, each with its (lanes) coefficients.
        own: Vec<(Buffer<T>, Buffer<T>)>,
    },
}

struct ImageRecords<'i, T: Real> {
    image: PreparedImage<'i, T>,
    /// One per text of the block, or the one text of the diagonal.
    pairs: (Range<usize>, Vec<PairRecord<T>>),
}

/// The gradient of one text's unit words, (l, stride).
struct WordGrad<T: Real> {
    rows: Buffer<T>,
    /// Whether gradient came to a pair whose score is NaN.
    poisoned: bool,
}

/// The gradients of a few texts over the images of a block, in the images' order.
struct WordTask<'a, 'i, T: Real> {
    texts: &'a [PreparedText<T>],
    /// Index of the first of them in the text block.
    first: usize,
    done: &'a [ImageRecords<'i, T>],
    grads: &'a mut [WordGrad<T>],
}

impl<T: Real> WithSimd for WordTask<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let WordTask { texts, first, done, grads } = self;
        for ImageRecords { image, pairs: (met, records) } in done {
            for (t, (text, grad)) in texts.iter().zip(grads.iter_mut()).enumerate() {
                if !met.contains(&(first + t)) {
                    continue;
                }
                let (rows, coefficients, own) = match &records[first + t - met.start] {
                    PairRecord::Nothing => continue,
                    PairRecord::Poisoned => {
                        grad.poisoned = true;
                        continue;
                    }
                    PairRecord::Rows { rows, coefficients, own } => (rows, coefficients, own),
                };
                let stride = image.stride;
                // SAFETY: grad has `stride` elements per word, each coefficient row `lanes` >= words, and the indices are
                // rows of the image; each own vector is one row.
                unsafe {
                    let to = grad.rows.as_mut_ptr();
                    let to: Vec<*mut T> = (0..text.length).map(|j| to.add(j * stride)).collect();
                    let columns = |c: &Buffer<T>| -> Vec<*const T> {
                        let c = c.as_ptr();
                        (0..text.length).map(|j| c.add(j)).collect()
                    };
                    let steps = GatherRows { index: rows, coefficient: text.lanes, stride };
                    combine(simd, &columns(coefficients), image.rows.as_ptr(), steps, &to, stride, true);
                    for (vector, coefficients) in own {
                        let once = Strided { count: 1, coefficient: 0, row: 0 };
                        combine(simd, &columns(coefficients), vector.as_ptr(), once, &to, stride, true);
                    }
                }
            }
        }
    }
}

/// Buffers of one worker.
struct Scratch<T: Real> {
    pair: PairScratch<T>,
    /// dt, then x_mj, of all tokens.
    x: Buffer<T>,
    /// The same for aggregated tokens, transposed: (l, N_c).
    x_transposed: Buffer<T>,
    /// -h_m of the aggregated tokens.
    shrink: Buffer<T>,
    /// dw_im of the rows of `products`.
    weight_grads: Buffer<T>,
    /// h_m w_im: (N_c, summed) for the Gram form, (summed, N_c) for the direct one.
    shrunk: Buffer<T>,
    /// Rows of H.
    square: Buffer<T>,
    /// dr, the gradient of the fused token.
    fused: Buffer<T>,
    /// dD_i and ds_i.
    values: Vec<T>,
    scores: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new() -> Self {
        Scratch {
            pair: PairScratch::new(),
            x: zeros(0),
            x_transposed: zeros(0),
            shrink: zeros(0),
            weight_grads: zeros(0),
            shrunk: zeros(0),
            square: zeros(0),
            fused: zeros(0),
            values: Vec::new(),
            scores: Vec::new(),
        }
    }
}

/// Sums over the texts of one image.
struct ImageSums<T: Real> {
    /// Gradient of the image's rows: scaled patches, their mean, unit prefix tokens.
    rows: Buffer<T>,
    /// Gradient of the logits, (N, N_c) of stride `weight_stride`.
    logits: Buffer<T>,
    /// -H, lower triangle; empty for the direct form.
    gram: Buffer<T>,
    poisoned: bool,
}

/// One image and the texts that it meets.
struct ImageTask<'a, 'i, T: Real> {
    input: &'a PairInput<'i, T>,
    sizes: &'a Sizes,
    options: &'a Options,
    lengths: Lengths,
    image: &'a PreparedImage<'i, T>,
    block: &'a TextBlock<T>,
    saved: &'a Saved,
    grad_scores: ArrayView2<'a, T>,
    grad_fraction: Option<ArrayView2<'a, T>>,
    met: Range<usize>,
    /// Whether this is the image's first block of texts: outputs hold nothing yet.
    first: bool,
}

struct Dispatched<'a, 'i, 'o, 's, T: Real> {
    task: ImageTask<'a, 'i, T>,
    out: &'s mut ImageOut<'o, T>,
    scratch: &'s mut Scratch<T>,
}

impl<T: Real> WithSimd for Dispatched<'_, '_, '_, '_, T> {
    type Output = (Range<usize>, Vec<PairRecord<T>>);

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
        let records = self.task.run(simd, self.out, self.scratch);
        (self.task.met, records)
    }
}

impl<T: Real> ImageTask<'_, '_, T> {
    #[inline(always)]
    fn run<S: Simd>(
        &self,
        simd: S,
        out: &mut ImageOut<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Vec<PairRecord<T>> {
        let ImageTask { input, sizes, image, block, .. } = self;
        let mut sums = ImageSums {
            rows: zeros(image.rows.len()),
            logits: zeros(sizes.patches * image.weight_stride),
            gram: zeros(image.gram.len()),
            poisoned: false,
        };
        let mut text_scores = zeros(0);
        if image.finite {
            let directions = &block.directions[self.met.start * image.stride..self.met.end * image.stride];
            text_scores = image.text_scores(simd, directions);
        }
        let mut records = Vec::with_capacity(self.met.len());
        for (p, text) in block.texts[self.met.clone()].iter().enumerate() {
            let column = if input.pairs == Pairs::All { text.index } else { 0 };
            let at = (image.index, column);
            let grad_score = self.grad_scores[at];
            let grad_fraction = match self.grad_fraction {
                Some(grad) if input.selection.soft() => grad[at],
                _ => T::zero(),
            };
            let selection = PairSelection::of(&input.selection, input.pairs, image.index, text.index);
            records.push(if grad_score == T::zero() && grad_fraction == T::zero() {
                PairRecord::Nothing
            } else if !(image.finite && text.finite && selection.finite()) {
                sums.poisoned = true;
                PairRecord::Poisoned
            } else {
                let text_scores = &text_scores[p * image.gram_stride..][..sizes.patches];
                let bits = self.saved.selection.slice(ndarray::s![at.0, at.1, ..]).to_vec();
                scratch.pair.decision.decide(image, text_scores, &selection, self.options, Some(&bits));
                self.pair(simd, text, at, (grad_score, grad_fraction), out, &mut sums, scratch)
            });
        }
        self.finish(simd, sums, out);
        records
    }

    /// One pair: its part of the image's sums and outputs, and its record for the words.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    fn pair<S: Simd>(
        &self,
        simd: S,
        text: &PreparedText<T>,
        at: (usize, usize),
        (grad_score, grad_fraction): (T, T),
        out: &mut ImageOut<'_, T>,
        sums: &mut ImageSums<T>,
        scratch: &mut Scratch<T>,
    ) -> PairRecord<T> {
        let (image, options) = (self.image, self.options);
        let soft = self.input.selection.soft();
        let n = self.sizes.patches;
        let PairScratch { decision, tokens, .. } = &mut scratch.pair;
        tokens.compute(simd, image, text, decision, options, self.lengths, soft, true);
        if soft {
            scratch.values.clear();
            scratch.values.resize(n, grad_fraction / T::of(n as f64));
            scratch.scores.clear();
            scratch.scores.resize(n, T::zero());
        }
        self.cosine_grads(text, at, grad_score, scratch);
        let mut own = Vec::new();
        self.exact_tokens(simd, text, sums, scratch, &mut own);
        let coefficients = self.row_grads(simd, text, sums, scratch);
        self.fused_token(simd, text, sums, scratch, &mut own);
        self.weight_grads(simd, text, sums, scratch);
        self.length_grads(simd, sums, scratch);
        if soft {
            self.selection_grads(at, out, scratch);
        }
        let tokens = &scratch.pair.tokens;
        let first_prefix = image.norms.len() as u32;
        let prefix = first_prefix..first_prefix + self.sizes.prefix as u32;
        let rows = tokens.summed.iter().copied().chain(prefix).collect();
        PairRecord::Rows { rows, coefficients, own }
    }

    /// x_mj of all tokens (for prefix tokens, of length 1, dt itself) and -h_m of the aggregated ones.
    #[inline(always)]
    fn cosine_grads(&self, text: &PreparedText<T>, at: (usize, usize), grad: T, scratch: &mut Scratch<T>) {
        let (sizes, lanes) = (self.sizes, text.lanes);
        let tokens = &scratch.pair.tokens;
        let count = tokens.count;
        let slope = T::of(self.options.negative_slope);
        let directions = DirectionWeights::of(self.options);
        reserve(&mut scratch.x, sizes.tokens() * lanes);
        let x = &mut scratch.x;
        x[..sizes.tokens() * lanes].fill(T::zero());
        let mut add = |m: usize, j: usize, share: f64| {
            let steep = if tokens.cosines[m * lanes + j] > T::zero() { T::one() } else { slope };
            x[m * lanes + j] += grad * T::of(share) * steep;
        };
        if directions.word_to_patch > 0.0 {
            for j in 0..text.length {
                let m = self.saved.best_token[[at.0, at.1, j]] as usize;
                // Within bounds for honest input; a token that this pair lacks cannot be a best one.
                add(m.min(count - 1), j, directions.word_to_patch / text.length as f64);
            }
        }
        if directions.patch_to_word > 0.0 {
            for m in 0..count {
                let j = self.saved.best_word[[at.0, at.1, m]] as usize;
                add(m, j.min(text.length - 1), directions.patch_to_word / count as f64);
            }
        }
        let stride = self.image.weight_stride;
        reserve(&mut scratch.shrink, stride);
        scratch.shrink[..stride].fill(T::zero());
        for m in 0..sizes.aggregated {
            let inverse = tokens.inverse[m];
            let row = &mut scratch.x[(sizes.prefix + m) * lanes..][..text.length];
            let cosines = &tokens.cosines[(sizes.prefix + m) * lanes..];
            let along: T = row.iter().zip(cosines).map(|(&d, &t)| d * t).sum();
            scratch.shrink[m] = -along * inverse * inverse;
            row.iter_mut().for_each(|d| *d *= inverse);
        }
    }

    /// Tokens that were computed exactly: their gradient goes through the token itself, and leaves the fast path.
    #[inline(always)]
    fn exact_tokens<S: Simd>(
        &self,
        simd: S,
        text: &PreparedText<T>,
        sums: &mut ImageSums<T>,
        scratch: &mut Scratch<T>,
        own: &mut Vec<(Buffer<T>, Buffer<T>)>,
    ) {
        let (image, n) = (self.image, self.sizes.patches);
        let (stride, lanes) = (image.stride, text.lanes);
        let soft = self.input.selection.soft();
        let tokens = &mut scratch.pair.tokens;
        for token in std::mem::take(&mut tokens.exact) {
            let m = token.slot;
            let x = &mut scratch.x[(self.sizes.prefix + m) * lanes..][..lanes];
            let mut coefficients = zeros(lanes);
            coefficients.copy_from_slice(x);
            x.fill(T::zero());
            let shrink = std::mem::replace(&mut scratch.shrink[m], T::zero());
            let mut grad = zeros(stride);
            grad.iter_mut().zip(token.vector.iter()).for_each(|(g, &q)| *g = shrink * q);
            for (j, &x) in coefficients.iter().enumerate().take(text.length) {
                let word = &text.rows[j * stride..][..stride];
                grad.iter_mut().zip(word).for_each(|(g, &w)| *g += x * w);
            }
            for (&i, &weight) in tokens.summed.iter().zip(&token.weights) {
                let at = i as usize * stride;
                let to = &mut sums.rows[at..][..stride];
                to.iter_mut().zip(grad.iter()).for_each(|(r, &g)| *r += weight * g);
                if (i as usize) < n {
                    let along = weight * dot(simd, &image.rows[at..][..stride], &grad);
                    sums.logits[i as usize * image.weight_stride + m] += along;
                }
            }
            if soft {
                let logit = |i: usize| image.logits[[i, m]].wide();
                let highest = (0..n).map(logit).fold(f64::NEG_INFINITY, f64::max);
                for i in 0..n {
                    let along = dot(simd, &image.rows[i * stride..][..stride], &grad).wide();
                    scratch.values[i] += T::saturating((logit(i) - highest).exp() * token.scale * along);
                }
            }
            own.push((token.vector, coefficients));
        }
    }

    /// `dv_i += sum_j (sum_m w_im x_mj) w_j`; returns the inner sums, which the words need too.
    #[inline(always)]
    fn row_grads<S: Simd>(
        &self,
        simd: S,
        text: &PreparedText<T>,
        sums: &mut ImageSums<T>,
        scratch: &Scratch<T>,
    ) -> Buffer<T> {
        let (image, lanes, prefix) = (self.image, text.lanes, self.sizes.prefix);
        let tokens = &scratch.pair.tokens;
        let (summed, stride) = (tokens.summed.len(), image.stride);
        let rows = summed + prefix;
        let mut coefficients = zeros(rows * lanes);
        coefficients[summed * lanes..].copy_from_slice(&scratch.x[..prefix * lanes]);
        let first_prefix = image.norms.len();
        // SAFETY: weights has a row per summed row, x a row per token after the prefix, coefficients a row per row; summed
        // indices and the prefix rows are rows of the image, so of the sums, and differ from each other.
        unsafe {
            let weights = tokens.weights.as_ptr();
            let from: Vec<*const T> = (0..summed).map(|s| weights.add(s * image.weight_stride)).collect();
            let out = coefficients.as_mut_ptr();
            let to: Vec<*mut T> = (0..summed).map(|s| out.add(s * lanes)).collect();
            let steps = Strided { count: self.sizes.aggregated, coefficient: 1, row: lanes };
            let width = text.length.next_multiple_of(super::real::lanes::<S, T>());
            combine(simd, &from, scratch.x.as_ptr().add(prefix * lanes), steps, &to, width, false);

            let from: Vec<*const T> = (0..rows).map(|r| coefficients.as_ptr().add(r * lanes)).collect();
            let indices = tokens.summed.iter().map(|&i| i as usize);
            let out = sums.rows.as_mut_ptr();
            let indices = indices.chain(first_prefix..first_prefix + prefix);
            let to: Vec<*mut T> = indices.map(|i| out.add(i * stride)).collect();
            let steps = Strided { count: text.length, coefficient: 1, row: stride };
            combine(simd, &from, text.rows.as_ptr(), steps, &to, stride, true);
        }
        coefficients
    }

    /// The fused token r = sum_i f_i v_i: `dr = sum_j x_rj w_j - h_r r`, `dv_i += f_i dr`, and in the soft forms
    /// `df_i = v_i . dr` through f_i = e^{s_i} (1 - D_i).
    #[inline(always)]
    fn fused_token<S: Simd>(
        &self,
        simd: S,
        text: &PreparedText<T>,
        sums: &mut ImageSums<T>,
        scratch: &mut Scratch<T>,
        own: &mut Vec<(Buffer<T>, Buffer<T>)>,
    ) {
        let PairScratch { decision, tokens, .. } = &scratch.pair;
        if !tokens.has_fused {
            return;
        }
        let (image, lanes) = (self.image, text.lanes);
        let stride = image.stride;
        let inverse = tokens.fused_inverse;
        let cosines = &tokens.cosines[(tokens.count - 1) * lanes..][..text.length];
        let x = &scratch.x[(tokens.count - 1) * lanes..][..text.length];
        let along: T = x.iter().zip(cosines).map(|(&d, &t)| d * t).sum();
        let shrink = -along * inverse * inverse;
        let mut coefficients = zeros(lanes);
        coefficients.iter_mut().zip(x).for_each(|(c, &d)| *c = d * inverse);
        reserve(&mut scratch.fused, stride);
        let grad = &mut scratch.fused;
        grad[..stride].iter_mut().zip(tokens.fused.iter()).for_each(|(g, &r)| *g = shrink * r);
        // SAFETY: the text has l rows of `stride`, grad one; dropped indices are patches, rows of the sums; fused_weights
        // has one element for each.
        unsafe {
            let steps = Strided { count: text.length, coefficient: 1, row: stride };
            let to = [grad.as_mut_ptr()];
            combine(simd, &[coefficients.as_ptr()], text.rows.as_ptr(), steps, &to, stride, true);
            let weights = tokens.fused_weights.as_ptr();
            let from: Vec<*const T> = (0..decision.dropped.len()).map(|d| weights.add(d)).collect();
            let out = sums.rows.as_mut_ptr();
            let to: Vec<*mut T> = decision.dropped.iter().map(|&i| out.add(i as usize * stride)).collect();
            let once = Strided { count: 1, coefficient: 0, row: 0 };
            combine(simd, &from, grad.as_ptr(), once, &to, stride, true);
        }
        if self.input.selection.soft() {
            let dropped = decision.dropped.iter().map(|&i| decision.scores[i as usize]);
            let highest = dropped.fold(T::neg_infinity(), T::max);
            for i in 0..self.sizes.patches {
                let row = &image.rows[i * stride..][..stride];
                let factor = (decision.scores[i] - highest).wide().exp() * tokens.fused_scale;
                let along = T::saturating(factor * dot(simd, row, &grad[..stride]).wide());
                scratch.values[i] += -along;
                scratch.scores[i] += along * (T::one() - decision.values[i]);
            }
        }
        let mut vector = zeros(stride);
        vector.copy_from_slice(&tokens.fused[..stride]);
        own.push((vector, coefficients));
    }

    /// `dw_im = sum_j x_mj P_ij - h_m v_i . q_m`, into the logits (w_im dw_im) and the soft values (E_im dw_im).
    #[inline(always)]
    fn weight_grads<S: Simd>(
        &self,
        simd: S,
        text: &PreparedText<T>,
        sums: &mut ImageSums<T>,
        scratch: &mut Scratch<T>,
    ) {
        let (image, aggregated) = (self.image, self.sizes.aggregated);
        let tokens = &scratch.pair.tokens;
        let (stride, row_stride) = (image.weight_stride, image.stride);
        let rows = tokens.summed.len() + tokens.others.len();
        let width = aggregated.next_multiple_of(lanes::<S, T>());
        let indices = || tokens.summed.iter().chain(&tokens.others).map(|&i| i as usize);
        reserve(&mut scratch.weight_grads, rows * stride);
        reserve(&mut scratch.x_transposed, text.length * stride);
        for j in 0..text.length {
            let row = &mut scratch.x_transposed[j * stride..][..stride];
            for (m, x) in row.iter_mut().enumerate().take(aggregated) {
                *x = scratch.x[(self.sizes.prefix + m) * text.lanes + j];
            }
        }
        // SAFETY: indices are rows of the image; there are N_c token vectors; products and weight_grads one per
        // index, x_transposed one per word.
        unsafe {
            let out = scratch.weight_grads.as_mut_ptr();
            let to: Vec<*mut T> = (0..rows).map(|r| out.add(r * stride)).collect();
            if self.lengths == Lengths::Direct {
                let base = image.rows.as_ptr();
                let from: Vec<*const T> = indices().map(|i| base.add(i * row_stride)).collect();
                row_products(simd, &from, tokens.vectors.as_ptr(), aggregated, row_stride, &to);
                for row in scratch.weight_grads.chunks_exact_mut(stride).take(rows) {
                    row.iter_mut().zip(scratch.shrink.iter()).for_each(|(y, &h)| *y *= h);
                }
            } else {
                let from = tokens.gram_rows.chunks_exact(stride).take(rows);
                for (row, from) in scratch.weight_grads.chunks_exact_mut(stride).zip(from) {
                    let scaled = from.iter().zip(scratch.shrink.iter()).map(|(&y, &h)| y * h);
                    row.iter_mut().zip(scaled).for_each(|(o, y)| *o = y);
                }
            }
            let products = tokens.products.as_ptr();
            let from: Vec<*const T> = (0..rows).map(|r| products.add(r * text.lanes)).collect();
            let steps = Strided { count: text.length, coefficient: 1, row: stride };
            combine(simd, &from, scratch.x_transposed.as_ptr(), steps, &to, width, true);
        }
        let n = self.sizes.patches;
        for (s, i) in tokens.summed.iter().map(|&i| i as usize).enumerate().filter(|&(_, i)| i < n) {
            let to = &mut sums.logits[i * stride..][..aggregated];
            let weights = &tokens.weights[s * stride..];
            let grads = &scratch.weight_grads[s * stride..];
            to.iter_mut().zip(weights).zip(grads).for_each(|((l, &w), &g)| *l += w * g);
        }
        if self.input.selection.soft() {
            for (r, i) in indices().enumerate().filter(|&(_, i)| i < n) {
                let weights = &image.weights[i * stride..][..aggregated];
                let grads = &scratch.weight_grads[r * stride..];
                scratch.values[i] += weights.iter().zip(grads).map(|(&e, &g)| e * g).sum();
            }
        }
    }

    /// `- sum_m h_m w_m w_m^T`, collected in -H or given to the rows at once.
    #[inline(always)]
    fn length_grads<S: Simd>(&self, simd: S, sums: &mut ImageSums<T>, scratch: &mut Scratch<T>) {
        let (image, aggregated) = (self.image, self.sizes.aggregated);
        let tokens = &scratch.pair.tokens;
        let (summed, stride) = (tokens.summed.len(), image.weight_stride);
        match self.lengths {
            Lengths::Direct => {
                reserve(&mut scratch.shrunk, summed * stride);
                let scaled = scratch.shrunk.chunks_exact_mut(stride).zip(tokens.weights.chunks_exact(stride));
                for (to, from) in scaled.take(summed) {
                    let shrink = scratch.shrink.iter();
                    to.iter_mut().zip(from).zip(shrink).for_each(|((t, &w), &h)| *t = w * h);
                }
                // SAFETY: shrunk has a row per summed row, whose indices are rows of the sums; vectors N_c rows.
                unsafe {
                    let shrunk = scratch.shrunk.as_ptr();
                    let from: Vec<*const T> = (0..summed).map(|s| shrunk.add(s * stride)).collect();
                    let out = sums.rows.as_mut_ptr();
                    let to: Vec<*mut T> =
                        tokens.summed.iter().map(|&i| out.add(i as usize * image.stride)).collect();
                    let steps = Strided { count: aggregated, coefficient: 1, row: image.stride };
                    combine(simd, &from, tokens.vectors.as_ptr(), steps, &to, image.stride, true);
                }
            }
            Lengths::Gram => {
                let columns = padded::<T>(summed);
                reserve(&mut scratch.shrunk, aggregated * columns);
                let transposed = scratch.shrunk.chunks_exact_mut(columns).zip(scratch.shrink.iter());
                for (m, (row, &h)) in transposed.enumerate().take(aggregated) {
                    let weights = tokens.weights.chunks_exact(stride).take(summed);
                    row.iter_mut().zip(weights).for_each(|(o, w)| *o = w[m] * h);
                }
                const BLOCK: usize = 12;
                reserve(&mut scratch.square, BLOCK * columns);
                for start in (0..summed).step_by(BLOCK) {
                    let end = (start + BLOCK).min(summed);
                    let width = end.next_multiple_of(lanes::<S, T>());
                    // SAFETY: weights has a row of N_c elements per summed row, shrunk N_c rows of `columns`.
                    unsafe {
                        let weights = tokens.weights.as_ptr();
                        let from: Vec<*const T> = (start..end).map(|s| weights.add(s * stride)).collect();
                        let out = scratch.square.as_mut_ptr();
                        let to: Vec<*mut T> = (0..end - start).map(|b| out.add(b * columns)).collect();
                        let steps = Strided { count: aggregated, coefficient: 1, row: columns };
                        combine(simd, &from, scratch.shrunk.as_ptr(), steps, &to, width, false);
                    }
                    for s in start..end {
                        let row = &scratch.square[(s - start) * columns..][..=s];
                        let to = &mut sums.gram[tokens.summed[s] as usize * image.gram_stride..];
                        for (&h, &i) in row.iter().zip(&tokens.summed) {
                            to[i as usize] += h;
                        }
                    }
                }
            }
        }
    }

    /// From dD_i and ds_i to the keep probability or the caller's mask.
    #[inline(always)]
    fn selection_grads(&self, at: (usize, usize), out: &mut ImageOut<'_, T>, scratch: &Scratch<T>) {
        let decision = &scratch.pair.decision;
        match self.input.selection {
            Selection::SoftMask(_) => {
                if let Some(mask) = &mut out.mask {
                    mask.row_mut(at.1).iter_mut().zip(&scratch.values).for_each(|(m, &d)| *m = d);
                }
            }
            Selection::KeepProbability { seed, .. } => {
                let Some(keep) = &mut out.keep_probability else { return };
                let text = if self.input.pairs == Pairs::All { at.1 } else { at.0 };
                let noise = seed.map(|seed| PairNoise::new(seed, at.0, text));
                let predicted = T::of(1.0 - self.options.attention_weight);
                for (i, p) in keep.iter_mut().enumerate() {
                    let noise = noise.map(|noise| noise.logistic(i));
                    let steep = straight_through(decision.scores[i], noise, self.options.temperature);
                    *p += predicted * (scratch.scores[i] + scratch.values[i] * steep);
                }
            }
            _ => {}
        }
    }

    /// The stable form fixes the scale of E = exp(l - max l) against eps, so its maximum carries gradient too.
    fn through_highest_logit(&self, sums: &mut ImageSums<T>) {
        let stride = self.image.weight_stride;
        for (m, logits) in self.image.logits.columns().into_iter().enumerate() {
            let total: T = sums.logits.iter().skip(m).step_by(stride).copied().sum();
            let mut highest = 0;
            for (i, &l) in logits.iter().enumerate() {
                if l > logits[highest] {
                    highest = i;
                }
            }
            sums.logits[highest * stride + m] += -total;
        }
    }

    /// From the sums to the image's outputs.
    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, mut sums: ImageSums<T>, out: &mut ImageOut<'_, T>) {
        let (image, sizes) = (self.image, self.sizes);
        if self.first {
            out.patches.fill(T::zero());
            out.prefix.fill(T::zero());
            out.logits.fill(T::zero());
        }
        if sums.poisoned {
            out.patches.fill(T::nan());
            out.prefix.fill(T::nan());
            out.logits.fill(T::nan());
            out.keep_probability.iter_mut().for_each(|k| k.fill(T::nan()));
        }
        if sums.poisoned || !image.finite {
            return;
        }
        let (n, stride, channels) = (sizes.patches, image.stride, sizes.channels);
        let summed = image.norms.len();
        if self.lengths == Lengths::Gram {
            for i in 0..summed {
                for j in 0..i {
                    sums.gram[j * image.gram_stride + i] = sums.gram[i * image.gram_stride + j];
                }
            }
            // SAFETY: -H has `summed` rows of at least `summed` elements; image and sums hold as many rows.
            unsafe {
                let gram = sums.gram.as_ptr();
                let from: Vec<*const T> = (0..summed).map(|i| gram.add(i * image.gram_stride)).collect();
                let rows = sums.rows.as_mut_ptr();
                let to: Vec<*mut T> = (0..summed).map(|i| rows.add(i * stride)).collect();
                let steps = Strided { count: summed, coefficient: 1, row: stride };
                combine(simd, &from, image.rows.as_ptr(), steps, &to, stride, true);
            }
        }
        if self.input.selection.soft() {
            self.through_highest_logit(&mut sums);
        }
        let share = T::of(1.0 / n as f64);
        let (patch_rows, rest) = sums.rows.split_at(n * stride);
        let mean = if summed > n { &rest[..channels] } else { &[] };
        for (mut row, grad) in out.patches.rows_mut().into_iter().zip(patch_rows.chunks_exact(stride)) {
            match row.as_slice_mut() {
                Some(row) => row.iter_mut().zip(grad).for_each(|(o, &g)| *o += g * image.scale),
                None => row.iter_mut().zip(grad).for_each(|(o, &g)| *o += g * image.scale),
            }
            row.iter_mut().zip(mean).for_each(|(o, &g)| *o += g * share * image.scale);
        }
        for (p, mut row) in out.prefix.rows_mut().into_iter().enumerate() {
            let at = (summed + p) * stride;
            let (unit, grad) = (&image.rows[at..][..channels], &sums.rows[at..][..channels]);
            through_unit(unit, grad, image.prefix_inverse[p], |c, x| row[c] += x);
        }
        for (mut row, grad) in out.logits.rows_mut().into_iter().zip(sums.logits.chunks(image.weight_stride))
        {
            row.iter_mut().zip(grad).for_each(|(o, &g)| *o += g);
        }
    }
}

/// The gradients of [`similarity_backward`], allocated.
#[derive(Clone, Debug)]
pub struct Gradients<T> {
    pub patches: Array3<T>,
    pub prefix: Array3<T>,
    pub words: Array3<T>,
    pub logits: Array3<T>,
    /// With [`Selection::KeepProbability`].
    pub keep_probability: Option<Array2<T>>,
    /// With [`Selection::SoftMask`].
    pub mask: Option<Array3<T>>,
}

impl<T: Real> Gradients<T> {
    /// Zeros of the shapes of `input`.
    pub fn zeros(input: &PairInput<'_, T>) -> Self {
        Gradients {
            patches: Array3::zeros(input.patches.dim()),
            prefix: Array3::zeros(input.prefix.dim()),
            words: Array3::zeros(input.words.dim()),
            logits: Array3::zeros(input.logits.dim()),
            keep_probability: match &input.selection {
                Selection::KeepProbability { probability, .. } => Some(Array2::zeros(probability.dim())),
                _ => None,
            },
            mask: match &input.selection {
                Selection::SoftMask(mask) => Some(Array3::zeros(mask.dim())),
                _ => None,
            },
        }
    }

    pub fn view_mut(&mut self) -> GradientsMut<'_, T> {
        GradientsMut {
            patches: self.patches.view_mut(),
            prefix: self.prefix.view_mut(),
            words: self.words.view_mut(),
            logits: self.logits.view_mut(),
            keep_probability: self.keep_probability.as_mut().map(|k| k.view_mut()),
            mask: self.mask.as_mut().map(|m| m.view_mut()),
        }
    }
}
