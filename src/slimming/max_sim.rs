//! Late interaction without selection: the sum over words of the best patch.

use ndarray::{Array2, ArrayView1, ArrayView3, Axis};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::options::{check_words, shape};
use super::real::{Real, lanes, padded};
use super::simd::{Buffer, Level, highest_products, zeros};
use crate::error::LapsError;

/// `S = sum_{j <= l} max_i v_i . w_j` for every image (document) and text (query), (B_v, B_t).
///
/// `patches` (B_v, N, C) and `words` (B_t, L, C) are taken as they are: normalise them first for cosines. `2 N C l` FLOPs
/// per pair, no memory but the words' transposed copy (and one of patches that are strided). A pair with non-finite input
/// scores NaN.
/// Source: ColBERT (Khattab and Zaharia 2020), eq. 3. Errors name the argument that does not fit.
pub fn max_sim<T: Real>(
    patches: ArrayView3<'_, T>,
    words: ArrayView3<'_, T>,
    word_lengths: ArrayView1<'_, i64>,
) -> Result<Array2<T>, LapsError> {
    let operation = "max_sim";
    let (images, n, channels) = patches.dim();
    if images == 0 || n == 0 || channels == 0 {
        let got = shape(patches.shape());
        return Err(LapsError::shape(operation, "patches", "(B_v >= 1, N >= 1, C >= 1)", got));
    }
    check_words(operation, &words, &word_lengths, channels)?;
    let level = Level::current()?;
    let patches = patches.as_standard_layout();
    let flat = patches.as_slice().expect("in standard layout");
    let panels: Vec<Panel<T>> = words
        .axis_iter(Axis(0))
        .into_par_iter()
        .zip(word_lengths.axis_iter(Axis(0)))
        .map(|(words, length)| Panel::new(words, *length.first().expect("a scalar") as usize))
        .collect();
    let mut scores = Array2::zeros((images, panels.len()));
    // Tiles of texts, so that few images keep all threads busy.
    let tiles = (4 * rayon::current_num_threads()).div_ceil(images);
    let step = panels.len().div_ceil(tiles);
    let rows = scores.as_slice_mut().expect("contiguous").par_chunks_exact_mut(panels.len());
    rows.zip(flat.par_chunks_exact(n * channels)).for_each(|(scores, image)| {
        let finite = image.iter().fold(true, |all, x| all & x.is_finite());
        scores.par_chunks_mut(step).zip(panels.par_chunks(step)).for_each_init(
            Vec::new,
            |best, (scores, panels)| {
                let task = ScoreTexts { image, channels, finite, panels, scores, best };
                level.dispatch(task);
            },
        );
    });
    Ok(scores)
}

/// A text's words, transposed: (C, l) of stride `lanes`.
struct Panel<T: Real> {
    length: usize,
    finite: bool,
    lanes: usize,
    values: Buffer<T>,
}

impl<T: Real> Panel<T> {
    fn new(words: ndarray::ArrayView2<'_, T>, length: usize) -> Self {
        let lanes = padded::<T>(length);
        let mut values = zeros(words.dim().1 * lanes);
        let mut finite = true;
        for (j, word) in words.rows().into_iter().enumerate().take(length) {
            for (c, &x) in word.iter().enumerate() {
                values[c * lanes + j] = x;
                finite &= x.is_finite();
            }
        }
        Panel { length, finite, lanes, values }
    }
}

struct ScoreTexts<'a, T: Real> {
    image: &'a [T],
    channels: usize,
    finite: bool,
    panels: &'a [Panel<T>],
    scores: &'a mut [T],
    best: &'a mut Vec<T>,
}

impl<T: Real> WithSimd for ScoreTexts<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows: Vec<*const T> = self.image.chunks_exact(self.channels).map(<[T]>::as_ptr).collect();
        for (score, panel) in self.scores.iter_mut().zip(self.panels) {
            if !(self.finite && panel.finite) {
                *score = T::nan();
                continue;
            }
            let width = panel.length.next_multiple_of(lanes::<S, T>());
            self.best.resize(panel.lanes, T::zero());
            // SAFETY: each row has C elements, the panel C rows of `lanes` >= width elements, best as many.
            unsafe {
                let (values, best) = (panel.values.as_ptr(), self.best.as_mut_ptr());
                highest_products(simd, &rows, values, self.channels, panel.lanes, best, width);
            }
            let sum: T = self.best[..panel.length].iter().copied().sum();
            // What overflows is no hit.
            *score = if sum.is_finite() { sum } else { T::nan() };
        }
    }
}
