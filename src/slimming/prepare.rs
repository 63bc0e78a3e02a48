//! What does not depend on the pair: computed once per image and once per text (laps.md, identities 1 to 3).

use ndarray::{ArrayView1, ArrayView2, Axis};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::options::{Options, PairInput, Score, Selection, Sizes};
use super::real::{Real, padded};
use super::simd::{Buffer, Level, reserve, row_products, zeros};

/// eps of the stable weights (laps.md, paper variant).
pub(crate) const EPSILON: f64 = 1e-6;

/// A sum this much shorter than its terms together is rounding noise, not a direction.
pub(crate) const NOISE: f64 = 1e-12;
/// Epsilons of its largest value that a row of scores must spread to count as more than noise.
const CONSTANT: f64 = 16.0;

/// How the lengths of aggregated tokens are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lengths {
    /// `e^T G e` with G once per image: for many texts per image.
    Gram,
    /// The tokens themselves: for few texts per image, where G would not pay.
    Direct,
}

impl Lengths {
    /// G costs `N^2 C` per image; the tokens cost about `k N_c C` more per pair than `e^T G e` does.
    pub(crate) fn for_texts_per_image(texts: usize) -> Self {
        if texts >= 8 { Lengths::Gram } else { Lengths::Direct }
    }
}

/// One image: rows scaled, scores and weights hoisted out of the pairs.
pub(crate) struct PreparedImage<'a, T: Real> {
    pub index: usize,
    /// Whether all its input is finite; nothing else is computed when it is not.
    pub finite: bool,
    /// The patches times `scale`; then their mean (soft form only); then the unit prefix tokens. Stride `stride`.
    pub rows: Buffer<T>,
    pub stride: usize,
    /// A power of two that brings the largest element near 1: no score depends on it, nothing overflows.
    pub scale: T,
    /// Lengths of the scaled patches (and the mean of these).
    pub norms: Vec<T>,
    /// Inverse raw lengths of the prefix tokens, 0 for a zero token.
    pub prefix_inverse: Vec<T>,
    /// The unit mean of the patches (score cosine), padded.
    pub direction: Buffer<T>,
    /// a_i, min-max scaled in the paper variant.
    pub self_scores: Vec<T>,
    /// What the product of a patch with a text's direction is multiplied with to give b_i.
    pub text_factor: Vec<T>,
    /// E = exp(l - max l), (N, N_c) of stride `weight_stride`; in the soft form a last row of eps for the mean.
    pub weights: Buffer<T>,
    pub weight_stride: usize,
    pub logits: ArrayView2<'a, T>,
    /// G = V V^T over patches (and their mean), stride `gram_stride`; empty unless [`Lengths::Gram`].
    pub gram: Buffer<T>,
    pub gram_stride: usize,
    /// The mean of the scaled patches, and then its direction, in f64.
    wide: Vec<f64>,
}

/// One text.
pub(crate) struct PreparedText<T: Real> {
    pub index: usize,
    pub length: usize,
    pub finite: bool,
    /// Unit words, (l, C) of the images' row stride.
    pub rows: Buffer<T>,
    /// l, padded: the stride of what has a column per word.
    pub lanes: usize,
    /// Inverse raw lengths, 0 for a zero word.
    pub inverse: Vec<T>,
    /// The unit mean of the raw words (score cosine), or the mean over C (dot).
    pub direction: Buffer<T>,
}

/// The largest |x|; infinite or NaN if any value is. Integers, so that contiguous rows run as vectors.
#[inline(always)]
fn largest<T: Real>(values: ArrayView2<'_, T>) -> T {
    let mut bits = T::Key::default();
    for row in values.rows() {
        bits = match row.as_slice() {
            Some(row) => row.iter().fold(bits, |m, x| m.max(x.magnitude())),
            None => row.iter().fold(bits, |m, x| m.max(x.magnitude())),
        };
    }
    T::of_magnitude(bits)
}

/// The power of two that brings values of at most `largest` to [1, 2); 1 for zeros.
fn scale_of<T: Real>(largest: T) -> T {
    if largest > T::zero() { power(-(largest.wide().log2().floor() as i32)) } else { T::one() }
}

fn power<T: Real>(exponent: i32) -> T {
    // Beyond the exponent range of T, stay at its edge: such input only loses the scaling's help.
    let edge = T::max_value().wide().log2().floor() as i32 - 2;
    T::of(2f64.powi(exponent.clamp(-edge, edge)))
}

/// Writes `x / |x|` (0 for the zero vector) and returns `1 / |x|` (0 likewise). Safe for any finite magnitude.
#[inline(always)]
pub(crate) fn unit<T: Real>(x: ArrayView1<'_, T>, out: &mut [T]) -> T {
    let scale = scale_of(largest(x.insert_axis(Axis(0))));
    out.iter_mut().zip(x).for_each(|(o, &x)| *o = x * scale);
    let square = wide_dot(out, out);
    if square == 0.0 {
        return T::zero();
    }
    let inverse = T::of(1.0 / square.sqrt());
    out.iter_mut().for_each(|o| *o *= inverse);
    inverse * scale
}

/// The unit mean of rows given by their sum in f64 and the sum of their lengths; 0 where they cancel.
fn unit_mean<T: Real>(sum: &[f64], reach: f64, out: &mut [T]) {
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    let inverse = if length > NOISE * reach { 1.0 / length } else { 0.0 };
    out.iter_mut().zip(sum).for_each(|(o, &x)| *o = T::of(x * inverse));
}

/// Scales to [0, 1] over the slice; what is constant but for rounding becomes 0.
pub(crate) fn min_max<T: Real>(values: &mut [T]) {
    let low = values.iter().fold(T::infinity(), |m, &x| m.min(x));
    let high = values.iter().fold(T::neg_infinity(), |m, &x| m.max(x));
    let range = high - low;
    let constant = range <= T::of(CONSTANT) * T::epsilon() * high.max(-low);
    for x in values {
        *x = if constant { T::zero() } else { (*x - low) / range };
    }
}

impl<T: Real> PreparedText<T> {
    pub(crate) fn new(input: &PairInput<'_, T>, index: usize, options: &Options) -> Self {
        let length = input.word_lengths[index] as usize;
        let channels = input.words.dim().2;
        let words = input.words.index_axis(Axis(0), index);
        let words = words.slice(ndarray::s![..length, ..]);
        let (stride, lanes) = (padded::<T>(channels), padded::<T>(length));
        let mut text = PreparedText {
            index,
            length,
            finite: largest(words).is_finite(),
            rows: zeros(length * stride),
            lanes,
            inverse: vec![T::zero(); length],
            direction: zeros(stride),
        };
        if !text.finite {
            return text;
        }
        let scale = scale_of(largest(words));
        let (mut sum, mut reach) = (vec![0.0; channels], 0.0);
        for (j, word) in words.rows().into_iter().enumerate() {
            let row = &mut text.rows[j * stride..][..channels];
            text.inverse[j] = unit(word, row);
            sum.iter_mut().zip(word).for_each(|(s, &raw)| *s += (raw * scale).wide());
            if text.inverse[j] > T::zero() {
                reach += (scale / text.inverse[j]).wide();
            }
        }
        match options.score {
            Score::Cosine => unit_mean(&sum, reach, &mut text.direction),
            Score::Dot => {
                let factor = 1.0 / (length as f64 * channels as f64 * scale.wide());
                text.direction.iter_mut().zip(sum).for_each(|(d, x)| *d = T::of(x * factor));
            }
        }
        text
    }
}

impl<T: Real> PreparedText<T> {
    /// A text of one zero word, for stages that need no text.
    pub(crate) fn blank(channels: usize) -> Self {
        let stride = padded::<T>(channels);
        PreparedText {
            index: 0,
            length: 1,
            finite: true,
            rows: zeros(stride),
            lanes: T::PAD,
            inverse: vec![T::zero()],
            direction: zeros(stride),
        }
    }
}

/// `sum_i a[i] * b[i]` in f64, eight sums side by side so that it runs as vectors.
#[inline(always)]
fn wide_dot<T: Real, U: Real>(a: &[T], b: &[U]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(x, y)| x.wide() * y.wide()).sum();
    for (a, b) in a.zip(b) {
        for (sum, (x, y)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += x.wide() * y.wide();
        }
    }
    sums.iter().sum::<f64>() + rest
}

struct Prepare<'a, 'b, T: Real> {
    image: &'b mut PreparedImage<'a, T>,
    input: &'b PairInput<'a, T>,
    sizes: &'b Sizes,
    index: usize,
    options: &'b Options,
    lengths: Lengths,
}

impl<T: Real> WithSimd for Prepare<'_, '_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Prepare { image, input, sizes, index, options, lengths } = self;
        image.prepare_with(simd, input, sizes, index, options, lengths);
    }
}

impl<'a, T: Real> PreparedImage<'a, T> {
    pub(crate) fn new(
        level: Level,
        input: &PairInput<'a, T>,
        sizes: &Sizes,
        index: usize,
        options: &Options,
        lengths: Lengths,
    ) -> Self {
        let mut image = Self::empty();
        image.prepare(level, input, sizes, index, options, lengths);
        image
    }

    /// No image yet: what [`PreparedImage::prepare`] fills.
    pub(crate) fn empty() -> Self {
        PreparedImage {
            index: 0,
            finite: false,
            rows: zeros(0),
            stride: 0,
            scale: T::one(),
            norms: Vec::new(),
            prefix_inverse: Vec::new(),
            direction: zeros(0),
            self_scores: Vec::new(),
            text_factor: Vec::new(),
            weights: zeros(0),
            weight_stride: 0,
            logits: ArrayView2::from_shape((0, 0), &[]).expect("an empty view"),
            gram: zeros(0),
            gram_stride: 0,
            wide: Vec::new(),
        }
    }

    /// Becomes image `index`, in the memory of the one before.
    pub(crate) fn prepare(
        &mut self,
        level: Level,
        input: &PairInput<'a, T>,
        sizes: &Sizes,
        index: usize,
        options: &Options,
        lengths: Lengths,
    ) {
        level.dispatch(Prepare { image: self, input, sizes, index, options, lengths });
    }

    #[inline(always)]
    fn prepare_with<S: Simd>(
        &mut self,
        simd: S,
        input: &PairInput<'a, T>,
        sizes: &Sizes,
        index: usize,
        options: &Options,
        lengths: Lengths,
    ) {
        let Sizes { patches: n, prefix: p, channels, aggregated, .. } = *sizes;
        let patches = input.patches.index_axis_move(Axis(0), index);
        let prefix = input.prefix.index_axis_move(Axis(0), index);
        let soft = input.selection.soft();
        let summed = n + usize::from(soft);
        let keep_finite = match &input.selection {
            Selection::KeepProbability { probability, .. } => {
                probability.row(index).iter().all(|x| x.is_finite())
            }
            _ => true,
        };
        let highest = largest(patches);
        self.index = index;
        self.logits = input.logits.index_axis_move(Axis(0), index);
        self.finite = keep_finite
            && highest.is_finite()
            && [prefix, self.logits].into_iter().all(|x| largest(x).is_finite());
        self.stride = padded::<T>(channels);
        self.weight_stride = padded::<T>(aggregated);
        self.gram_stride = padded::<T>(summed);
        self.scale = scale_of(highest);
        self.norms.resize(summed, T::zero());
        self.prefix_inverse.resize(p, T::zero());
        self.self_scores.resize(n, T::zero());
        self.text_factor.resize(n, T::zero());
        reserve(&mut self.direction, self.stride);
        if self.finite {
            reserve(&mut self.rows, (summed + p) * self.stride);
            reserve(&mut self.weights, summed * self.weight_stride);
            self.fill_rows(patches, prefix, soft);
            self.fill_self_scores(n, channels, options, soft_scaled(&input.selection));
            self.fill_weights(n, aggregated, soft);
            if lengths == Lengths::Gram {
                self.fill_gram(simd, summed);
            }
        }
    }

    /// Frees what the gradient of the words does not need.
    pub(crate) fn keep_rows_only(&mut self) {
        self.gram = zeros(0);
        self.weights = zeros(0);
    }

    #[inline(always)]
    fn fill_rows(&mut self, patches: ArrayView2<'_, T>, prefix: ArrayView2<'_, T>, soft: bool) {
        let (n, channels) = patches.dim();
        let (stride, scale, share) = (self.stride, self.scale, 1.0 / n as f64);
        // What lies between the channels and the stride is multiplied like them.
        if channels < stride {
            let rows = self.rows.chunks_exact_mut(stride).take(self.norms.len() + prefix.nrows());
            rows.for_each(|row| row[channels..].fill(T::zero()));
            self.direction[channels..].fill(T::zero());
        }
        self.wide.clear();
        self.wide.resize(channels, 0.0);
        let (mean, mut reach) = (&mut self.wide[..], 0.0);
        for (i, patch) in patches.rows().into_iter().enumerate() {
            let row = &mut self.rows[i * stride..][..channels];
            match patch.as_slice() {
                Some(patch) => row.iter_mut().zip(patch).for_each(|(r, &x)| *r = x * scale),
                None => row.iter_mut().zip(patch).for_each(|(r, &x)| *r = x * scale),
            }
            mean.iter_mut().zip(&*row).for_each(|(m, r)| *m += r.wide() * share);
            let norm = wide_dot(row, row).sqrt();
            self.norms[i] = T::of(norm);
            reach += norm * share;
        }
        unit_mean(mean, reach, &mut self.direction);
        let mut next = n * stride;
        if soft {
            self.rows[next..].iter_mut().zip(&self.wide).for_each(|(r, &m)| *r = T::of(m));
            // What its terms reach, not its own length: of patches that cancel, that would be noise.
            self.norms[n] = T::of(reach);
            next += stride;
        }
        for (inverse, token) in self.prefix_inverse.iter_mut().zip(prefix.rows()) {
            *inverse = unit(token, &mut self.rows[next..][..channels]);
            next += stride;
        }
    }

    #[inline(always)]
    fn fill_self_scores(&mut self, n: usize, channels: usize, options: &Options, scaled: bool) {
        let mean_length = match options.score {
            Score::Cosine => 1.0,
            Score::Dot => {
                let mean = mean_of_rows(&self.rows, n, self.stride, channels);
                mean.iter().map(|m| m * m).sum::<f64>().sqrt()
            }
        };
        self.wide.clear();
        self.wide.extend(self.direction[..channels].iter().map(|d| d.wide()));
        for i in 0..n {
            let row = &self.rows[i * self.stride..][..channels];
            // In f64: the fused token of opposed patches amplifies errors of the scores.
            let product = wide_dot(row, &self.wide);
            let (a, factor) = match options.score {
                Score::Cosine if self.norms[i] == T::zero() => (0.0, 0.0),
                Score::Cosine => (product / self.norms[i].wide(), 1.0 / self.norms[i].wide()),
                Score::Dot => {
                    let unscale = 1.0 / self.scale.wide();
                    (product * mean_length * unscale * unscale / channels as f64, unscale)
                }
            };
            self.self_scores[i] = T::of(a);
            self.text_factor[i] = T::of(factor);
        }
        if scaled {
            min_max(&mut self.self_scores);
        }
    }

    #[inline(always)]
    fn fill_weights(&mut self, n: usize, aggregated: usize, soft: bool) {
        let stride = self.weight_stride;
        let mut highest = vec![T::neg_infinity(); stride];
        for (i, row) in self.logits.rows().into_iter().enumerate() {
            let to = &mut self.weights[i * stride..][..stride];
            match row.as_slice() {
                Some(row) => to[..aggregated].copy_from_slice(row),
                None => to.iter_mut().zip(row).for_each(|(w, &l)| *w = l),
            }
            to[aggregated..].fill(T::zero());
            highest.iter_mut().zip(&*to).for_each(|(h, &l)| *h = h.max(l));
        }
        for row in self.weights.chunks_exact_mut(stride).take(n) {
            row.iter_mut().zip(&highest).for_each(|(w, &h)| *w = (*w - h).exponential());
            row[aggregated..].fill(T::zero());
        }
        if soft {
            let last = &mut self.weights[n * stride..][..stride];
            last[..aggregated].fill(T::of(EPSILON));
            last[aggregated..].fill(T::zero());
        }
    }

    /// G = V V^T: the lower triangle in blocks of rows, then its mirror.
    #[inline(always)]
    fn fill_gram<S: Simd>(&mut self, simd: S, summed: usize) {
        let (stride, gram_stride) = (self.stride, self.gram_stride);
        reserve(&mut self.gram, summed * gram_stride);
        const ROWS: usize = 24;
        for start in (0..summed).step_by(ROWS) {
            let end = (start + ROWS).min(summed);
            // SAFETY: rows 0..end have `stride` elements, G a row of at least `summed` for each.
            unsafe {
                let (rows, to) = (self.rows.as_ptr(), self.gram.as_mut_ptr());
                let from: Vec<*const T> = (start..end).map(|i| rows.add(i * stride)).collect();
                let to: Vec<*mut T> = (start..end).map(|i| to.add(i * gram_stride)).collect();
                row_products(simd, &from, rows, end, stride, &to);
            }
        }
        for i in 0..summed {
            self.gram[i * gram_stride + summed..(i + 1) * gram_stride].fill(T::zero());
            for j in 0..i {
                self.gram[j * gram_stride + i] = self.gram[i * gram_stride + j];
            }
        }
    }

    /// b_i of every text whose direction is a row of `directions`: (texts, N) of stride `gram_stride`.
    #[inline(always)]
    pub(crate) fn text_scores<S: Simd>(&self, simd: S, directions: &[T]) -> Buffer<T> {
        let n = self.self_scores.len();
        let texts = directions.len() / self.stride;
        let mut out = zeros::<T>(texts * self.gram_stride);
        // SAFETY: directions has a row of `stride` elements per text, the image N of them, `out` a row of at least N per text.
        unsafe {
            let (from, to) = (directions.as_ptr(), out.as_mut_ptr());
            let from: Vec<*const T> = (0..texts).map(|t| from.add(t * self.stride)).collect();
            let to: Vec<*mut T> = (0..texts).map(|t| to.add(t * self.gram_stride)).collect();
            row_products(simd, &from, self.rows.as_ptr(), n, self.stride, &to);
        }
        for row in out.chunks_exact_mut(self.gram_stride) {
            row.iter_mut().zip(&self.text_factor).for_each(|(b, &f)| *b *= f);
        }
        out
    }
}

/// Whether scores are min-max scaled: the paper variant's.
pub(crate) fn soft_scaled<T>(selection: &Selection<'_, T>) -> bool {
    matches!(selection, Selection::KeepProbability { .. })
}

fn mean_of_rows<T: Real>(rows: &[T], n: usize, stride: usize, channels: usize) -> Vec<f64> {
    let mut mean = vec![0.0; channels];
    for row in rows.chunks(stride).take(n) {
        mean.iter_mut().zip(row).for_each(|(m, x)| *m += x.wide() / n as f64);
    }
    mean
}

/// A block of texts, prepared in parallel, with their directions as one matrix for [`PreparedImage::text_scores`].
pub(crate) struct TextBlock<T: Real> {
    pub texts: Vec<PreparedText<T>>,
    pub directions: Buffer<T>,
}

impl<T: Real> TextBlock<T> {
    pub(crate) fn new(input: &PairInput<'_, T>, range: std::ops::Range<usize>, options: &Options) -> Self {
        let texts: Vec<_> = range.into_par_iter().map(|t| PreparedText::new(input, t, options)).collect();
        let stride = padded::<T>(input.words.dim().2);
        let mut directions = zeros(texts.len() * stride);
        for (text, row) in texts.iter().zip(directions.chunks_exact_mut(stride)) {
            row.copy_from_slice(&text.direction);
        }
        TextBlock { texts, directions }
    }
}

/// Lengths of `word_lengths` as a slice of sizes.
pub(crate) fn longest(word_lengths: ArrayView1<'_, i64>) -> usize {
    word_lengths.iter().copied().max().unwrap_or(0) as usize
}
