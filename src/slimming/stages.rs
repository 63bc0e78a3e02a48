//! Single stages for all pairs, for explanation and for those who want one stage: aggregated tokens, alignment matrices.

use ndarray::{Array2, Array4, ArrayView1, ArrayView2, ArrayView3, ArrayView4, ArrayViewMut2, Axis, Zip, s};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::align::{Alignment, leaky};
use super::calibrate::PairTokens;
use super::options::{Options, PairInput, Pairs, Score, Selection, Sizes, check_words, shape};
use super::prepare::{Lengths, PreparedImage, PreparedText, unit};
use super::real::{Real, padded};
use super::select::Decision;
use super::simd::Level;
use crate::error::LapsError;

/// The tokens of every image x text pair, l2-normalised, in the order prefix, aggregated, fused: (B_v, B_t, M, C); and how
/// many of them each pair has, (B_v, B_t).
///
/// `patches` (B_v, N, C), `prefix` (B_v, P, C) and `logits` (B_v, N, N_c) are raw; `mask` (B_v, B_t, N) says what each pair
/// keeps, `scores` (B_v, B_t, N) weigh the dropped patches in the fused token. M = P + N_c + 1 if `fusion` is on and any pair
/// drops a patch, else P + N_c; a pair that drops none has a zero row in the last place, not counted. Pairs with
/// non-finite input hold NaN. Source: laps.md, SPC. Errors name the argument that does not fit.
pub fn calibrate_patches<T: Real>(
    patches: ArrayView3<'_, T>,
    prefix: ArrayView3<'_, T>,
    logits: ArrayView3<'_, T>,
    mask: ArrayView3<'_, bool>,
    scores: ArrayView3<'_, T>,
    fusion: bool,
) -> Result<(Array4<T>, Array2<i64>), LapsError> {
    let operation = "calibrate_patches";
    let (images, texts, _) = mask.dim();
    if texts == 0 {
        return Err(LapsError::shape(operation, "mask", "(B_v, B_t >= 1, N)", shape(mask.shape())));
    }
    if scores.dim() != mask.dim() {
        return Err(LapsError::shape(operation, "scores", shape(mask.shape()), shape(scores.shape())));
    }
    let channels = patches.dim().2;
    let zero = [T::zero()];
    let zero = ArrayView1::from(&zero);
    let one = [1];
    let lengths = ArrayView1::from(&one);
    let input = PairInput {
        patches,
        prefix,
        words: zero.broadcast((texts, 1, channels)).expect("a scalar broadcasts"),
        word_lengths: lengths.broadcast(texts).expect("a scalar broadcasts"),
        logits,
        selection: Selection::Mask(mask),
        pairs: Pairs::All,
        interrupt: None,
    };
    let sizes = input.check(operation)?;
    let level = Level::current()?;
    let any_dropped = mask.iter().any(|&kept| !kept);
    let slots = sizes.tokens() - usize::from(!(fusion && any_dropped));
    let mut tokens = Array4::zeros((images, texts, slots, channels));
    let mut counts = Array2::zeros((images, texts));
    // Scores are taken as given, as with products: nothing is recomputed from a text.
    let options = Options { fusion, score: Score::Dot, ..Options::default() };
    tokens.axis_iter_mut(Axis(0)).into_par_iter().zip(counts.axis_iter_mut(Axis(0))).enumerate().for_each(
        |(i, (mut tokens, mut counts))| {
            let image = PreparedImage::new(level, &input, &sizes, i, &options, Lengths::Direct);
            let text = PreparedText::blank(channels);
            let (mut decision, mut pair) = (Decision::default(), PairTokens::new());
            for (t, mut tokens) in tokens.axis_iter_mut(Axis(0)).enumerate() {
                let scores = scores.slice(s![i, t, ..]);
                decision.given(mask.slice(s![i, t, ..]), scores);
                counts[t] =
                    (slots - usize::from(fusion && any_dropped && decision.dropped.is_empty())) as i64;
                if !image.finite || !scores.iter().all(|s| s.is_finite()) {
                    tokens.fill(T::nan());
                    continue;
                }
                level.dispatch(ComputeTokens {
                    pair: &mut pair,
                    image: &image,
                    text: &text,
                    decision: &decision,
                    options: &options,
                });
                write_tokens(&pair, &image, &sizes, &mut tokens);
            }
        },
    );
    Ok((tokens, counts))
}

struct ComputeTokens<'a, 'i, T: Real> {
    pair: &'a mut PairTokens<T>,
    image: &'a PreparedImage<'i, T>,
    text: &'a PreparedText<T>,
    decision: &'a Decision<T>,
    options: &'a Options,
}

impl<T: Real> WithSimd for ComputeTokens<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let ComputeTokens { pair, image, text, decision, options } = self;
        pair.compute(simd, image, text, decision, options, Lengths::Direct, false, false);
    }
}

fn write_tokens<T: Real>(
    pair: &PairTokens<T>,
    image: &PreparedImage<'_, T>,
    sizes: &Sizes,
    out: &mut ArrayViewMut2<'_, T>,
) {
    let stride = image.stride;
    let mut write = |slot: usize, row: &[T], inverse: T| {
        out.row_mut(slot).iter_mut().zip(row).for_each(|(o, &x)| *o = x * inverse);
    };
    for p in 0..sizes.prefix {
        write(p, &image.rows[(image.norms.len() + p) * stride..], T::one());
    }
    for m in 0..sizes.aggregated {
        write(sizes.prefix + m, &pair.vectors[m * stride..], pair.inverse[m]);
    }
    for exact in &pair.exact {
        write(sizes.prefix + exact.slot, &exact.vector, pair.inverse[exact.slot]);
    }
    if pair.has_fused {
        write(sizes.prefix + sizes.aggregated, &pair.fused, pair.fused_inverse);
    }
}

/// Alignment matrices `A_mj = leaky_relu(u_m . l2(w_j))` of every pair, (B_v, B_t, M, L), and the scores that they give,
/// (B_v, B_t).
///
/// `tokens` (B_v, B_t, M, C) are raw or normalised, u_m their unit vectors (0 for the zero vector), with `counts`
/// (B_v, B_t) of them per pair (all of them if not given); `words` (B_t, L, C) raw. A is zero at padding. Options used:
/// directions, mean_of_directions, negative_slope. Source: laps.md, SPA. Errors name the argument that does not fit.
pub fn align_patches_words<T: Real>(
    tokens: ArrayView4<'_, T>,
    counts: Option<ArrayView2<'_, i64>>,
    words: ArrayView3<'_, T>,
    word_lengths: ArrayView1<'_, i64>,
    options: &Options,
) -> Result<(Array2<T>, Array4<T>), LapsError> {
    let operation = "align_patches_words";
    options.check(operation)?;
    let (images, texts, slots, channels) = tokens.dim();
    if images == 0 || slots == 0 || channels == 0 || texts != words.dim().0 {
        let expected = format!("(B_v >= 1, {}, M >= 1, C >= 1)", words.dim().0);
        return Err(LapsError::shape(operation, "tokens", expected, shape(tokens.shape())));
    }
    check_words(operation, &words, &word_lengths, channels)?;
    if let Some(counts) = counts {
        if counts.dim() != (images, texts) {
            let got = shape(counts.shape());
            return Err(LapsError::shape(operation, "token_counts", shape(&[images, texts]), got));
        }
        if let Some(count) = counts.iter().find(|&&c| c < 1 || c as usize > slots) {
            let expected = format!("1 to M={slots}");
            return Err(LapsError::value(operation, "token_counts", expected, count));
        }
    }
    let length = words.dim().1;
    let mut scores = Array2::zeros((images, texts));
    let mut alignment = Array4::zeros((images, texts, slots, length));
    let slope = T::of(options.negative_slope);
    let stride = padded::<T>(length);
    // Text by text, so that the unit words are made once.
    let columns = scores.axis_iter_mut(Axis(1)).into_par_iter().zip(alignment.axis_iter_mut(Axis(1)));
    columns.enumerate().for_each(|(t, (mut scores, mut alignment))| {
        let used = word_lengths[t] as usize;
        let mut unit_words = Array2::zeros((used, channels));
        for (word, mut row) in words.index_axis(Axis(0), t).rows().into_iter().zip(unit_words.rows_mut()) {
            unit(word, row.as_slice_mut().expect("contiguous"));
        }
        let mut unit_tokens = Array2::zeros((slots, channels));
        let mut found = Alignment::default();
        let mut cosines = vec![T::zero(); slots * stride];
        for i in 0..images {
            let count = counts.map_or(slots, |c| c[[i, t]] as usize);
            for (token, mut row) in
                tokens.slice(s![i, t, ..count, ..]).rows().into_iter().zip(unit_tokens.rows_mut())
            {
                unit(token, row.as_slice_mut().expect("contiguous"));
            }
            let products = unit_tokens.slice(s![..count, ..]).dot(&unit_words.t());
            for (m, row) in products.rows().into_iter().enumerate() {
                cosines[m * stride..].iter_mut().zip(row).for_each(|(c, &x)| *c = x);
            }
            let mut to = alignment.index_axis_mut(Axis(0), i);
            Zip::from(to.slice_mut(s![..count, ..used]))
                .and(&products)
                .for_each(|a, &x| *a = leaky(x, slope));
            found.find(&mut cosines, count, used, stride);
            let finite = products.iter().all(|x| x.is_finite());
            scores[i] = if finite { found.score(used, options) } else { T::nan() };
        }
    });
    Ok((scores, alignment))
}
