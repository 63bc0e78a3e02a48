//! The method on NVIDIA GPUs. Nothing of CUDA is needed to build, and nothing is looked for before the first call: the
//! driver and NVRTC are loaded then, the kernels compiled for the device and kept on disk.
//!
//! This module owns no memory, no stream and no synchronisation: callers bring device pointers, a context's device number
//! and a stream, and every launch is asynchronous. What can go wrong is a [`crate::LapsError`], never a panic.

/// Declares a table of functions and how it is read from a library.
macro_rules! functions {
    ($table:ident { $($field:ident = $symbol:literal: fn($($argument:ty),*) -> Status;)* }) => {
        struct $table { $($field: unsafe extern "C" fn($($argument),*) -> Status,)* }

        impl $table {
            fn load(library: &Library) -> Result<Self, &'static str> {
                // SAFETY: the signatures are those of the CUDA headers (cuda.h, nvrtc.h); the library outlives the table, since
                // both are kept for good.
                unsafe {
                    Ok($table { $($field: *library.get($symbol.as_bytes()).map_err(|_| $symbol)?,)* })
                }
            }
        }
    };
}

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
