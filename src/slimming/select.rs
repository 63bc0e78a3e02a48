//! LPS: which patches a pair keeps (laps.md, "language-context patch selection").

use ndarray::{Array3, ArrayView1, ArrayView3, Axis};
use num_traits::{PrimInt, Zero};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::noise::PairNoise;
use super::options::{Options, Sampling, Score, Selection, check_words, shape};
use super::prepare::{Lengths, PreparedImage, TextBlock, min_max};
use super::real::Real;
use super::simd::{Buffer, Level};
use super::{PairInput, Pairs};
use crate::error::LapsError;

/// The clamp of m_i before its logarithm.
const CLAMP: f64 = 1e-6;

/// What decides a pair's selection: one row of a [`Selection`].
#[derive(Clone, Copy)]
pub(crate) enum PairSelection<'a, T> {
    Scores,
    KeepProbability { probability: ArrayView1<'a, T>, noise: Option<PairNoise> },
    Mask(ArrayView1<'a, bool>),
    SoftMask(ArrayView1<'a, T>),
}

impl<'a, T: Real> PairSelection<'a, T> {
    pub(crate) fn of(selection: &Selection<'a, T>, pairs: Pairs, image: usize, text: usize) -> Self {
        let column = if pairs == Pairs::All { text } else { 0 };
        match *selection {
            Selection::Scores => PairSelection::Scores,
            Selection::KeepProbability { probability, seed } => PairSelection::KeepProbability {
                probability: probability.index_axis_move(Axis(0), image),
                noise: seed.map(|seed| PairNoise::new(seed, image, text)),
            },
            Selection::Mask(mask) => PairSelection::Mask(row(mask, image, column)),
            Selection::SoftMask(mask) => PairSelection::SoftMask(row(mask, image, column)),
        }
    }

    /// Whether the pair's own input is finite (the image's and the text's are checked once each).
    pub(crate) fn finite(&self) -> bool {
        match self {
            PairSelection::SoftMask(mask) => mask.iter().all(|d| d.is_finite()),
            _ => true,
        }
    }
}

fn row<T>(mask: ArrayView3<'_, T>, image: usize, column: usize) -> ArrayView1<'_, T> {
    mask.index_axis_move(Axis(0), image).index_axis_move(Axis(0), column)
}

/// A pair's selection, with buffers that are used again for the next pair.
#[derive(Default)]
pub(crate) struct Decision<T: Real> {
    /// s_i
    pub scores: Vec<T>,
    /// D_i, hard unless the caller gave soft values.
    pub values: Vec<T>,
    /// Patches with D_i > 0, ascending.
    pub kept: Vec<u32>,
    /// Patches with D_i < 1, ascending.
    pub dropped: Vec<u32>,
    /// mean_i D_i
    pub fraction: T,
    keys: Vec<T::Key>,
    context: Vec<T>,
}

impl<T: Real> Decision<T> {
    /// Decides for one pair: `text_scores` are its b_i. `saved` are the bits of an earlier decision, taken as they are.
    pub(crate) fn decide(
        &mut self,
        image: &PreparedImage<'_, T>,
        text_scores: &[T],
        selection: &PairSelection<'_, T>,
        options: &Options,
        saved: Option<&[u8]>,
    ) {
        let n = text_scores.len();
        self.score(image, text_scores, selection, options);
        self.values.clear();
        self.values.resize(n, T::zero());
        match (selection, saved) {
            (PairSelection::Mask(mask), _) => {
                self.values.iter_mut().zip(mask).filter(|(_, m)| **m).for_each(|(d, _)| *d = T::one());
            }
            (PairSelection::SoftMask(mask), _) => {
                self.values.iter_mut().zip(mask).for_each(|(d, &m)| *d = m);
            }
            (_, Some(bits)) => {
                for (i, d) in self.values.iter_mut().enumerate() {
                    *d = if bits[i / 8] >> (i % 8) & 1 == 1 { T::one() } else { T::zero() };
                }
            }
            (PairSelection::Scores, None) => {
                top_k(&self.scores, options.kept(n), &mut self.keys, &mut self.values);
            }
            (PairSelection::KeepProbability { noise, .. }, None) => match (noise, options.sampling) {
                (None, _) => top_k(&self.scores, options.kept(n), &mut self.keys, &mut self.values),
                (Some(noise), sampling) => {
                    self.context.clear();
                    self.context.extend(
                        self.scores.iter().enumerate().map(|(i, &s)| log_odds(s) + T::of(noise.logistic(i))),
                    );
                    match sampling {
                        Sampling::TopK => {
                            top_k(&self.context, options.kept(n), &mut self.keys, &mut self.values);
                        }
                        Sampling::Gumbel => self
                            .values
                            .iter_mut()
                            .zip(&self.context)
                            .filter(|(_, z)| **z > T::zero())
                            .for_each(|(d, _)| *d = T::one()),
                    }
                }
            },
        }
        self.list();
    }

    /// Takes a selection and scores as they are.
    pub(crate) fn given(&mut self, mask: ArrayView1<'_, bool>, scores: ArrayView1<'_, T>) {
        self.scores.clear();
        self.scores.extend(scores);
        self.values.clear();
        self.values.extend(mask.iter().map(|&m| if m { T::one() } else { T::zero() }));
        self.list();
    }

    /// s_i of the pair.
    fn score(
        &mut self,
        image: &PreparedImage<'_, T>,
        text_scores: &[T],
        selection: &PairSelection<'_, T>,
        options: &Options,
    ) {
        let a = &image.self_scores;
        self.scores.clear();
        let PairSelection::KeepProbability { probability, .. } = selection else {
            if options.language_context {
                self.scores.extend(a.iter().zip(text_scores).map(|(&a, &b)| a + b));
            } else {
                self.scores.extend_from_slice(a);
            }
            return;
        };
        let beta = T::of(options.attention_weight);
        let predicted = T::of(1.0 - options.attention_weight);
        self.context.clear();
        if options.language_context {
            self.context.extend_from_slice(text_scores);
            min_max(&mut self.context);
            let half = T::of(0.5);
            self.context.iter_mut().zip(a).for_each(|(c, &a)| *c = half * (a + *c));
        } else {
            self.context.extend_from_slice(a);
        }
        let blend = probability.iter().zip(&self.context).map(|(&p, &c)| predicted * p + beta * c);
        self.scores.extend(blend);
    }

    fn list(&mut self) {
        let n = self.values.len();
        let (mut kept, mut dropped) = (0, 0);
        self.kept.resize(n, 0);
        self.dropped.resize(n, 0);
        // Without branches: selections are as good as random to a predictor.
        for (i, &d) in self.values.iter().enumerate() {
            self.kept[kept] = i as u32;
            self.dropped[dropped] = i as u32;
            kept += usize::from(d > T::zero());
            dropped += usize::from(d < T::one());
        }
        self.kept.truncate(kept);
        self.dropped.truncate(dropped);
        self.fraction = self.values.iter().copied().sum::<T>() / T::of(n as f64);
    }

    /// The kept patches as bits, the lowest index in the lowest bit.
    pub(crate) fn write_bits(&self, bits: &mut [u8]) {
        bits.fill(0);
        for &i in &self.kept {
            bits[i as usize / 8] |= 1 << (i % 8);
        }
    }
}

/// log s - log(1 - s) of the clamped score.
fn log_odds<T: Real>(s: T) -> T {
    let s = s.max(T::of(CLAMP)).min(T::of(1.0 - CLAMP));
    s.ln() - (-s).ln_1p()
}

/// dD_i/ds_i of the straight-through estimator: y (1 - y) / tau / (s (1 - s)), y the soft value (eqs. 4, 5).
pub(crate) fn straight_through<T: Real>(s: T, noise: Option<f64>, temperature: f64) -> T {
    if s < T::of(CLAMP) || s > T::of(1.0 - CLAMP) {
        return T::zero();
    }
    let z = (log_odds(s) + T::of(noise.unwrap_or(0.0))) / T::of(temperature);
    let y = (T::one() + (-z).exp()).recip();
    let off = (T::one() + z.exp()).recip();
    y * off / T::of(temperature) / (s * (T::one() - s))
}

/// Marks the `k` highest scores with 1 in `marks` (zeros before); ties go to the lower index.
///
/// The k-th highest key is found bit by bit: every step counts with whole vectors, and most calls end after about ten.
fn top_k<T: Real>(scores: &[T], k: usize, keys: &mut Vec<T::Key>, marks: &mut [T]) {
    keys.clear();
    keys.extend(scores.iter().map(|s| s.key()));
    let mut threshold = T::Key::zero();
    for bit in (0..8 * size_of::<T::Key>()).rev() {
        let candidate = threshold | (T::Key::one_bit(bit));
        let count = keys.iter().map(|&x| u32::from(x >= candidate)).sum::<u32>() as usize;
        if count >= k {
            threshold = candidate;
            if count == k {
                break;
            }
        }
    }
    let above = keys.iter().map(|&x| u32::from(x > threshold)).sum::<u32>() as usize;
    let mut ties = k - above.min(k);
    for (mark, &key) in marks.iter_mut().zip(keys.iter()) {
        let tie = key == threshold && ties > 0;
        ties -= usize::from(tie);
        *mark = if key > threshold || tie { T::one() } else { T::zero() };
    }
}

trait OneBit: PrimInt {
    fn one_bit(bit: usize) -> Self {
        Self::one() << bit
    }
}

impl<K: PrimInt> OneBit for K {}

/// Scores s_i of every image x text pair, (B_v, B_t, N): `a_i + b_i`, or `a_i` without the language context.
///
/// `patches` (B_v, N, C) and `words` (B_t, L, C) are raw; `word_lengths` (B_t,) lie in 1..=L. Source: laps.md, LPS,
/// released form. Pairs with non-finite input hold NaN. Errors name the argument that does not fit.
pub fn selection_scores<T: Real>(
    patches: ArrayView3<'_, T>,
    words: ArrayView3<'_, T>,
    word_lengths: ArrayView1<'_, i64>,
    language_context: bool,
    score: Score,
) -> Result<Array3<T>, LapsError> {
    scored_pairs("selection_scores", patches, words, word_lengths, language_context, score)
}

fn scored_pairs<T: Real>(
    operation: &'static str,
    patches: ArrayView3<'_, T>,
    words: ArrayView3<'_, T>,
    word_lengths: ArrayView1<'_, i64>,
    language_context: bool,
    score: Score,
) -> Result<Array3<T>, LapsError> {
    let (images, n, channels) = patches.dim();
    if images == 0 || n == 0 || channels == 0 {
        let got = shape(patches.shape());
        return Err(LapsError::shape(operation, "patches", "(B_v >= 1, N >= 1, C >= 1)", got));
    }
    check_words(operation, &words, &word_lengths, channels)?;
    let level = Level::current()?;
    let none = ArrayView3::from_shape((images, 0, channels), &[]).expect("an empty view");
    let flat = [T::zero()];
    let flat = ArrayView1::from(&flat);
    let logits = flat.broadcast((images, n, 1)).expect("a scalar broadcasts");
    let input = PairInput {
        patches,
        prefix: none,
        words,
        word_lengths,
        // Not looked at: only rows and self scores of the prepared image are used.
        logits,
        selection: Selection::Scores,
        pairs: Pairs::All,
        interrupt: None,
    };
    let sizes = input.check(operation)?;
    let options = Options { score, language_context, ..Options::default() };
    let block = TextBlock::new(&input, 0..sizes.texts, &options);
    let mut out = Array3::zeros((images, sizes.texts, n));
    out.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(i, mut rows)| {
        let image = PreparedImage::new(level, &input, &sizes, i, &options, Lengths::Direct);
        if !image.finite {
            return rows.fill(T::nan());
        }
        let text_scores = level.dispatch(TextScores { image: &image, block: &block });
        let mut decision = Decision::default();
        for (t, mut row) in rows.rows_mut().into_iter().enumerate() {
            if block.texts[t].finite {
                let text_scores = &text_scores[t * image.gram_stride..][..n];
                decision.score(&image, text_scores, &PairSelection::Scores, &options);
                row.iter_mut().zip(&decision.scores).for_each(|(o, &s)| *o = s);
            } else {
                row.fill(T::nan());
            }
        }
    });
    Ok(out)
}

struct TextScores<'a, 'i, T: Real> {
    image: &'a PreparedImage<'i, T>,
    block: &'a TextBlock<T>,
}

impl<T: Real> WithSimd for TextScores<'_, '_, T> {
    type Output = Buffer<T>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) -> Buffer<T> {
        self.image.text_scores(simd, &self.block.directions)
    }
}

/// Indices of the kept patches of every image x text pair, (B_v, B_t, k), ascending; `k = ceil(selection_ratio N)`.
///
/// Ties go to the lower index. Arguments and errors as [`selection_scores`]; a pair with non-finite input keeps what
/// comparing its NaN scores as the highest gives, so look at the scores where that matters.
pub fn select_patches<T: Real>(
    patches: ArrayView3<'_, T>,
    words: ArrayView3<'_, T>,
    word_lengths: ArrayView1<'_, i64>,
    selection_ratio: f64,
    language_context: bool,
    score: Score,
) -> Result<Array3<i64>, LapsError> {
    let options = Options { selection_ratio, ..Options::default() };
    options.check("select_patches")?;
    let scores = scored_pairs("select_patches", patches, words, word_lengths, language_context, score)?;
    let (images, texts, n) = scores.dim();
    let k = options.kept(n);
    let mut out = Array3::zeros((images, texts, k));
    out.axis_iter_mut(Axis(0)).into_par_iter().zip(scores.axis_iter(Axis(0))).for_each(
        |(mut chosen, scores)| {
            let (mut keys, mut marks) = (Vec::new(), vec![T::zero(); n]);
            for (mut chosen, scores) in chosen.rows_mut().into_iter().zip(scores.rows()) {
                top_k(scores.as_slice().expect("contiguous"), k, &mut keys, &mut marks);
                let kept = marks.iter().enumerate().filter(|(_, m)| **m > T::zero());
                chosen.iter_mut().zip(kept).for_each(|(o, (i, _))| *o = i as i64);
            }
        },
    );
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_index() {
        let mut marks = vec![0.0; 6];
        top_k(&[1.0, 2.0, 1.0, 1.0, -0.0, 0.0], 3, &mut Vec::new(), &mut marks);
        assert_eq!(marks, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]);
        top_k(&[1.0, 2.0, 1.0, 1.0, -0.0, 0.0], 5, &mut Vec::new(), &mut marks);
        assert_eq!(marks, [1.0, 1.0, 1.0, 1.0, 1.0, 0.0]);
    }

    #[test]
    fn top_k_equals_a_stable_sort() {
        let mut state = 1u64;
        for n in 1..40 {
            // Few distinct values, so that ties abound.
            let scores: Vec<f64> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((state >> 33) % 7) as f64 - 3.0
                })
                .collect();
            for k in 1..=n {
                let mut order: Vec<usize> = (0..n).collect();
                order.sort_by(|&i, &j| scores[j].total_cmp(&scores[i]));
                let mut expected = vec![0.0; n];
                order[..k].iter().for_each(|&i| expected[i] = 1.0);
                let mut marks = vec![0.0; n];
                top_k(&scores, k, &mut Vec::new(), &mut marks);
                assert_eq!(marks, expected, "n={n} k={k}");
            }
        }
    }
}
