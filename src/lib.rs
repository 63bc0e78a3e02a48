//! LAPS, Linguistic-Aware Patch Slimming (Fu et al., CVPR 2024): how well does an image fit a caption?
//!
//! An image is a set of patches, a caption a set of words. LAPS keeps the patches that image and caption call significant
//! (LPS), merges them into a few tokens and fuses the rest into one (SPC), and lets tokens and words find their best match
//! in each other (SPA). [`slimming`] computes that for all image x text pairs at once, forward and backward, on the CPU,
//! in `f32` or `f64`, with the widest vectors that the processor has. Neither Python nor torch is needed.
//!
//! ```
//! use laps::slimming::{Gradients, Options, PairInput, Pairs, Selection, similarity, similarity_backward};
//! use ndarray::{Array1, Array2, Array3};
//!
//! let value = |(i, j, k): (usize, usize, usize)| ((7 * i + 5 * j + 3 * k) % 11) as f32 - 5.0;
//! let patches = Array3::from_shape_fn((2, 49, 16), value); // 2 images of 49 patches, 16 channels
//! let prefix = Array3::from_shape_fn((2, 1, 16), value); // their [CLS] tokens
//! let logits = Array3::from_shape_fn((2, 49, 9), value); // 9 aggregated tokens per image
//! let words = Array3::from_shape_fn((3, 6, 16), value); // 3 captions of at most 6 words
//! let word_lengths = Array1::from_vec(vec![6, 4, 5]);
//! let input = PairInput {
//!     patches: patches.view(),
//!     prefix: prefix.view(),
//!     words: words.view(),
//!     word_lengths: word_lengths.view(),
//!     logits: logits.view(),
//!     selection: Selection::Scores,
//!     pairs: Pairs::All,
//!     interrupt: None,
//! };
//! let options = Options { selection_ratio: 0.5, ..Options::default() };
//! let forward = similarity(&input, &options, true)?;
//! assert_eq!(forward.scores.dim(), (2, 3));
//!
//! let grad_scores = Array2::ones((2, 3));
//! let mut grads = Gradients::zeros(&input);
//! let saved = forward.saved.as_ref().unwrap();
//! similarity_backward(&input, &options, saved, grad_scores.view(), None, &mut grads.view_mut())?;
//! assert_eq!(grads.patches.dim(), patches.dim());
//! # Ok::<(), laps::LapsError>(())
//! ```
//!
//! Features: `python` builds the extension module of the Python package `laps`; `cuda` adds the kernels for NVIDIA GPUs,
//! which need nothing of CUDA to build; `index` adds the `records` module, which reads what `laps.Index` stores (on Unix);
//! `torch` adds the `model` module, the full model on libtorch. Building that one needs torch 2.11: in a Python environment
//! (with `LIBTORCH_USE_PYTORCH=1`, which this repository's `.cargo/config.toml` sets), or as the folder `LIBTORCH`.

#[cfg(feature = "cuda")]
pub mod cuda;
mod error;
#[cfg(feature = "torch")]
pub mod model;
#[cfg(feature = "python")]
mod python;
#[cfg(feature = "python-errors")]
mod python_errors;
#[cfg(all(feature = "index", unix))]
pub mod records;
pub mod slimming;

pub use error::LapsError;
