//! The method on the CPU: language-context patch selection (LPS), semantic-spatial calibration (SPC) and sparse
//! patch-word alignment (SPA) of the LAPS paper (Fu et al., CVPR 2024), for all image x text pairs at once.

mod align;
mod calibrate;
mod gradient;
mod max_sim;
mod noise;
mod options;
mod prepare;
mod real;
mod select;
mod simd;
mod similarity;
mod stages;

pub use gradient::{Gradients, GradientsMut, similarity_backward};
pub use max_sim::max_sim;
#[cfg(feature = "python")]
pub(crate) use options::shape;
pub use options::{Directions, Options, PairInput, Pairs, Sampling, Score, Selection, Sizes};
pub use real::Real;
pub use select::{select_patches, selection_scores};
pub use simd::Level;
pub use similarity::{Saved, Similarity, similarity};
pub use stages::{align_patches_words, calibrate_patches};
