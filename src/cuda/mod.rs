//! The method on NVIDIA GPUs. Nothing of CUDA is needed to build, and nothing is looked for before the first call: the
//! driver and NVRTC are loaded then, the kernels compiled for the device and kept on disk.
//!
//! This module owns no memory, no stream and no synchronisation: callers bring device pointers, a context's device number
//! and a stream, and every launch is asynchronous. What can go wrong is a [`crate::LapsError`], never a panic.

mod compile;
mod driver;
mod libraries;
mod similarity;

pub use compile::{Build, Kernel, Kernels, Nvrtc, compile_all};
pub use driver::{Device, Driver, Function, Stream};
pub use libraries::{Libraries, configure, libraries};
pub use similarity::{
    Address, BackwardCall, Call, Element, Geometry, Selection, backward, forward, geometry,
};
