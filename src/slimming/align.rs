//! SPA: tokens and words find their best match in each other (laps.md, "sparse patch-word alignment").

use super::options::{Directions, Options};
use super::real::Real;

/// How the two directions of the alignment add up to the score.
#[derive(Clone, Copy)]
pub(crate) struct DirectionWeights {
    pub word_to_patch: f64,
    pub patch_to_word: f64,
}

impl DirectionWeights {
    pub(crate) fn of(options: &Options) -> Self {
        let both = if options.mean_of_directions { 0.5 } else { 1.0 };
        let (word_to_patch, patch_to_word) = match options.directions {
            Directions::Both => (both, both),
            Directions::WordToPatch => (1.0, 0.0),
            Directions::PatchToWord => (0.0, 1.0),
        };
        DirectionWeights { word_to_patch, patch_to_word }
    }
}

/// Best matches of one pair, with buffers that are used again for the next pair.
#[derive(Default)]
pub(crate) struct Alignment<T> {
    /// Highest cosine of each word, before the leaky ReLU.
    pub word_best: Vec<T>,
    /// The token that gives it.
    pub best_token: Vec<i16>,
    /// Highest cosine of each token.
    pub token_best: Vec<T>,
    /// The word that gives it.
    pub best_word: Vec<i16>,
}

pub(crate) fn leaky<T: Real>(x: T, slope: T) -> T {
    if x > T::zero() { x } else { x * slope }
}

impl<T: Real> Alignment<T> {
    /// Finds the best matches in `cosines`, `count` rows of stride `stride` with `length` words each; the columns beyond
    /// are overwritten. Ties go to the lower index. Identity 4: the leaky ReLU is monotone and waits for the maxima.
    #[inline(always)]
    pub(crate) fn find(&mut self, cosines: &mut [T], count: usize, length: usize, stride: usize) {
        self.word_best.clear();
        self.word_best.resize(stride, T::neg_infinity());
        self.best_token.clear();
        self.best_token.resize(stride, 0);
        self.token_best.clear();
        self.best_word.clear();
        for (m, row) in cosines.chunks_exact_mut(stride).take(count).enumerate() {
            row[length..].fill(T::neg_infinity());
            for ((&mut x, best), token) in row.iter_mut().zip(&mut self.word_best).zip(&mut self.best_token) {
                let better = x > *best;
                *best = if better { x } else { *best };
                *token = if better { m as i16 } else { *token };
            }
            // Lane by lane first, so that it runs as whole vectors.
            let mut lanes = [T::neg_infinity(); 16];
            let lanes = &mut lanes[..T::PAD];
            for block in row.chunks_exact(lanes.len()) {
                lanes.iter_mut().zip(block).for_each(|(l, &x)| *l = if x > *l { x } else { *l });
            }
            let best = lanes.iter().fold(T::neg_infinity(), |b, &x| if x > b { x } else { b });
            self.token_best.push(best);
            // Of real words only: a row of NaN has no best one, and padding must not be it.
            let first = row[..length].iter().position(|&x| x == best);
            self.best_word.push(first.unwrap_or(0) as i16);
        }
    }

    /// S = mean_j max_m A_mj + mean_m max_j A_mj, weighted by direction.
    pub(crate) fn score(&self, length: usize, options: &Options) -> T {
        let weights = DirectionWeights::of(options);
        let slope = T::of(options.negative_slope);
        let mean = |best: &[T]| best.iter().map(|&x| leaky(x, slope)).sum::<T>() / T::of(best.len() as f64);
        let mut score = T::zero();
        if weights.word_to_patch > 0.0 {
            score += T::of(weights.word_to_patch) * mean(&self.word_best[..length]);
        }
        if weights.patch_to_word > 0.0 {
            score += T::of(weights.patch_to_word) * mean(&self.token_best);
        }
        score
    }
}
