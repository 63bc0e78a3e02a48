//! What a similarity call is given: the arrays, and how to select, fuse and align.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{ArrayView1, ArrayView2, ArrayView3};

use super::real::Real;
use crate::error::LapsError;

/// Patches, words and tokens are counted in 16 bits where selections and arg-maxes are kept.
const MOST: usize = 16384;

/// Which way patches (tokens) and words look for their best match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directions {
    /// `mean_j max_m A_mj + mean_m max_j A_mj`, or half of it with [`Options::mean_of_directions`].
    Both,
    /// Each token looks for its best word: `mean_m max_j A_mj`.
    PatchToWord,
    /// Each word looks for its best token: `mean_j max_m A_mj`.
    WordToPatch,
}

/// How a patch is compared with the image's and the text's mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// Cosines, as the released code does.
    Cosine,
    /// Products of raw vectors over C, as eq. 2 prints.
    Dot,
}

/// How the paper variant draws its selection when it is given a seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sampling {
    /// Each patch by itself: kept where its perturbed log odds are positive (eqs. 4, 5).
    Gumbel,
    /// The k patches with the highest perturbed log odds.
    TopK,
}

/// The settings of a similarity call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// rho: the share of patches that is kept, `k = ceil(rho N)`.
    pub selection_ratio: f64,
    pub directions: Directions,
    /// With both directions: their mean instead of their sum.
    pub mean_of_directions: bool,
    /// Slope of the leaky ReLU below zero; 1 for none.
    pub negative_slope: f64,
    /// Whether the dropped patches are fused into one token.
    pub fusion: bool,
    /// Whether the text takes part in the selection.
    pub language_context: bool,
    /// beta of eq. 3, the weight of the attentive scores beside the predicted keep probability.
    pub attention_weight: f64,
    pub score: Score,
    pub sampling: Sampling,
    /// tau of the Gumbel-softmax.
    pub temperature: f64,
    /// Budget of scratch memory in bytes; one text, and one image per thread, are always held. None: 24 MiB.
    pub chunk: Option<usize>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            selection_ratio: 0.5,
            directions: Directions::Both,
            mean_of_directions: false,
            negative_slope: 0.1,
            fusion: true,
            language_context: true,
            attention_weight: 0.8,
            score: Score::Cosine,
            sampling: Sampling::Gumbel,
            temperature: 1.0,
            chunk: None,
        }
    }
}

impl Options {
    /// Refuses values outside their ranges, naming the first.
    pub fn check(&self, operation: &'static str) -> Result<(), LapsError> {
        let check = |ok: bool, argument, expected: &str, got: f64| {
            if ok { Ok(()) } else { Err(LapsError::value(operation, argument, expected, got)) }
        };
        let rho = self.selection_ratio;
        check(rho > 0.0 && rho <= 1.0, "selection_ratio", "0 < selection_ratio <= 1", rho)?;
        let slope = self.negative_slope;
        check((0.0..=1.0).contains(&slope), "negative_slope", "0 <= negative_slope <= 1", slope)?;
        let beta = self.attention_weight;
        check((0.0..=1.0).contains(&beta), "attention_weight", "0 <= attention_weight <= 1", beta)?;
        let tau = self.temperature;
        check(tau > 0.0 && tau.is_finite(), "temperature", "0 < temperature < inf", tau)?;
        check(self.chunk != Some(0), "chunk", "at least 1 byte", 0.0)
    }

    /// k, the number of patches kept of `patches`.
    pub fn kept(&self, patches: usize) -> usize {
        ((patches as f64 * self.selection_ratio).ceil() as usize).clamp(1, patches)
    }
}

/// What decides which patches a pair keeps.
#[derive(Clone, Copy, Debug)]
pub enum Selection<'a, T> {
    /// The k patches with the highest scores (released).
    Scores,
    /// The paper variant: a predicted keep probability (B_v, N) takes part, and carries gradient. With a seed the
    /// selection is drawn (training), without one it is the top k (inference).
    KeepProbability { probability: ArrayView2<'a, T>, seed: Option<u64> },
    /// The caller's own selection, (B_v, B_t, N), or (B, 1, N) for the diagonal.
    Mask(ArrayView3<'a, bool>),
    /// The caller's own selection with values in [0, 1], shaped as [`Selection::Mask`]; carries gradient.
    SoftMask(ArrayView3<'a, T>),
}

impl<T> Selection<'_, T> {
    /// Whether weights are of the stable form, in which dropped patches keep a gradient.
    pub fn soft(&self) -> bool {
        matches!(self, Selection::KeepProbability { .. } | Selection::SoftMask(_))
    }
}

/// Which pairs are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// Every image with every text.
    All,
    /// Image i with text i.
    Diagonal,
}

/// The arrays of a similarity call, checked once by [`PairInput::check`].
#[derive(Clone, Copy, Debug)]
pub struct PairInput<'a, T> {
    /// (B_v, N, C), raw
    pub patches: ArrayView3<'a, T>,
    /// (B_v, P, C), raw; P may be 0
    pub prefix: ArrayView3<'a, T>,
    /// (B_t, L, C), raw
    pub words: ArrayView3<'a, T>,
    /// (B_t,), between 1 and L
    pub word_lengths: ArrayView1<'a, i64>,
    /// (B_v, N, N_c)
    pub logits: ArrayView3<'a, T>,
    pub selection: Selection<'a, T>,
    pub pairs: Pairs,
    /// Set by another thread to end a long call at its next block, with [`LapsError::Interrupted`].
    pub interrupt: Option<&'a AtomicBool>,
}

/// The sizes of a checked call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub images: usize,
    pub texts: usize,
    /// N
    pub patches: usize,
    /// P
    pub prefix: usize,
    /// L, padded
    pub words: usize,
    /// C
    pub channels: usize,
    /// N_c
    pub aggregated: usize,
}

impl Sizes {
    /// Token slots of a pair: prefix, aggregated, fused.
    pub fn tokens(&self) -> usize {
        self.prefix + self.aggregated + 1
    }

    /// Columns of the result: texts, or 1 for the diagonal.
    pub fn columns(&self, pairs: Pairs) -> usize {
        match pairs {
            Pairs::All => self.texts,
            Pairs::Diagonal => 1,
        }
    }
}

/// `words` and `word_lengths` alone, for the operations that take no more.
pub(crate) fn check_words<T: Real>(
    operation: &'static str,
    words: &ArrayView3<'_, T>,
    word_lengths: &ArrayView1<'_, i64>,
    channels: usize,
) -> Result<(), LapsError> {
    let (texts, length, c) = words.dim();
    if texts == 0 || length == 0 {
        return Err(LapsError::shape(operation, "words", "(B_t >= 1, L >= 1, C)", shape(words.shape())));
    }
    if c != channels {
        let got = format!("C={c}, but patches has C={channels}");
        return Err(LapsError::value(operation, "words", "equal C", got));
    }
    if word_lengths.len() != texts {
        return Err(LapsError::shape(
            operation,
            "word_lengths",
            shape(&[texts]),
            shape(word_lengths.shape()),
        ));
    }
    for (t, &l) in word_lengths.iter().enumerate() {
        if l < 1 || l as usize > length {
            let got = format!("{l} at caption {t}");
            return Err(LapsError::value(operation, "word_lengths", format!("1 to L={length}"), got));
        }
    }
    Ok(())
}

pub(crate) fn shape(dimensions: &[usize]) -> String {
    format!("({})", dimensions.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
}

impl<T: Real> PairInput<'_, T> {
    /// Checks every size and length, and that each mask keeps a patch; nothing is checked again inside.
    pub fn check(&self, operation: &'static str) -> Result<Sizes, LapsError> {
        let (images, patches, channels) = self.patches.dim();
        let got = || shape(self.patches.shape());
        if images == 0 || patches == 0 || channels == 0 {
            return Err(LapsError::shape(operation, "patches", "(B_v >= 1, N >= 1, C >= 1)", got()));
        }
        if patches > MOST {
            return Err(LapsError::shape(operation, "patches", format!("N <= {MOST}"), got()));
        }
        check_words(operation, &self.words, &self.word_lengths, channels)?;
        let (texts, words, _) = self.words.dim();
        if words > MOST {
            return Err(LapsError::shape(
                operation,
                "words",
                format!("L <= {MOST}"),
                shape(self.words.shape()),
            ));
        }
        if self.pairs == Pairs::Diagonal && images != texts {
            let expected = format!("one text per image, B_t={images}");
            return Err(LapsError::shape(operation, "words", expected, shape(self.words.shape())));
        }
        let (b, prefix, c) = self.prefix.dim();
        if b != images || c != channels {
            let expected = format!("({images}, P, {channels})");
            return Err(LapsError::shape(operation, "prefix", expected, shape(self.prefix.shape())));
        }
        let (b, n, aggregated) = self.logits.dim();
        if b != images || n != patches || aggregated == 0 || prefix + aggregated > MOST {
            let expected = format!("({images}, {patches}, N_c) with 1 <= N_c and P + N_c <= {MOST}");
            return Err(LapsError::shape(operation, "logits", expected, shape(self.logits.shape())));
        }
        let sizes = Sizes { images, texts, patches, prefix, words, channels, aggregated };
        self.check_selection(operation, &sizes)?;
        Ok(sizes)
    }

    pub(crate) fn check_interrupt(&self, operation: &'static str) -> Result<(), LapsError> {
        match self.interrupt {
            Some(flag) if flag.load(Ordering::Relaxed) => Err(LapsError::Interrupted { operation }),
            _ => Ok(()),
        }
    }

    fn check_selection(&self, operation: &'static str, sizes: &Sizes) -> Result<(), LapsError> {
        let Sizes { images, patches, .. } = *sizes;
        let expected = [images, sizes.columns(self.pairs), patches];
        let check_mask = |got: &[usize], rows: &mut dyn Iterator<Item = (bool, bool)>| {
            if got != expected {
                return Err(LapsError::shape(operation, "mask", shape(&expected), shape(got)));
            }
            for (row, (in_range, kept)) in rows.enumerate() {
                let pair = format!("image {}, caption {}", row / expected[1], row % expected[1]);
                if !in_range {
                    let got = format!("another value at {pair}");
                    return Err(LapsError::value(operation, "mask", "values in [0, 1]", got));
                }
                if !kept {
                    let got = format!("none at {pair}");
                    return Err(LapsError::value(operation, "mask", "a kept patch for every pair", got));
                }
            }
            Ok(())
        };
        match &self.selection {
            Selection::Scores => Ok(()),
            Selection::KeepProbability { probability, .. } => {
                if probability.shape() != [images, patches] {
                    let got = shape(probability.shape());
                    return Err(LapsError::shape(operation, "keep_prob", shape(&[images, patches]), got));
                }
                let slack = T::of(1e-3);
                match probability.iter().find(|&&p| p < -slack || p > T::one() + slack) {
                    Some(p) => {
                        Err(LapsError::value(operation, "keep_prob", "values in [0, 1]", format!("{p:?}")))
                    }
                    None => Ok(()),
                }
            }
            Selection::Mask(mask) => check_mask(
                mask.shape(),
                &mut mask.rows().into_iter().map(|row| (true, row.iter().any(|&d| d))),
            ),
            // NaN passes: such a pair's score is NaN.
            Selection::SoftMask(mask) => check_mask(
                mask.shape(),
                &mut mask.rows().into_iter().map(|row| {
                    let outside = row.iter().any(|&d| d < T::zero() || d > T::one());
                    (!outside, row.iter().any(|&d| d != T::zero()))
                }),
            ),
        }
    }
}
