//! The full model on tch: encoders, head, loss, files; what the Python package has, for programs without Python. Both
//! read and write the same folders.
//!
//! ```no_run
//! use laps::model::Laps;
//!
//! let model = Laps::from_pretrained("out/demo/laps", tch::Device::Cpu)?;
//! let texts = model.encode_captions(&["a red circle", "a blue square"], 64)?;
//! let images = model.encode_files(&["photo.jpg"], 8)?;
//! model.similarity(&images, &texts)?.print(); // (1, 2)
//! # Ok::<(), laps::LapsError>(())
//! ```
//!
//! A program of your own depends on the clone, and finds libtorch in an environment with torch 2.11:
//!
//! ```toml
//! [dependencies]
//! laps-rs = { path = "../laps-rs", features = ["torch"] }
//! serde_json = "1" # for the configurations of encoders
//! tch = "0.24"
//! ```
//!
//! ```sh
//! export LIBTORCH_USE_PYTORCH=1
//! export LD_LIBRARY_PATH=$(python3 -c 'import torch; print(torch.__path__[0] + "/lib")')
//! cargo run --release
//! ```
//!
//! `examples/train.rs` trains one. The encoders work on any device of torch's. The head's kernels run where the features
//! are: those of [`crate::slimming`] on the CPU; with the feature `cuda` those of `cuda` on GPUs (not yet run on one), but for
//! f64, for which features come to the CPU, as they do without that feature.

mod arrays;
mod backbone;
mod bert;
mod captions;
mod checkpoint;
mod clip;
mod config;
mod files;
#[cfg(feature = "cuda")]
mod gpu;
mod head;
mod images;
mod laps;
mod layers;
mod loss;
pub mod source;
mod swin;
mod vit;

use crate::error::LapsError;

pub use backbone::{Text, TextConfig, Vision, VisionConfig};
pub use bert::BertConfig;
pub use captions::CaptionTokenizer;
pub use checkpoint::{Checkpoint, Half};
pub use clip::{ClipTextConfig, ClipVisionConfig};
pub use config::{DirectionReduction, HeadOptions, LapsConfig, LossName, LossOptions, SelectBy, Variant};
pub use head::{ImageFeatures, LapsHead, Scored, Scores, TextFeatures};
pub use images::{ImageTransform, Interpolation};
pub use laps::{BACKBONE_GROUP, Batch, Laps};
pub use loss::Objective;
pub use swin::SwinConfig;
pub use vit::VitConfig;

type Result<T> = std::result::Result<T, LapsError>;
