mod error;
#[cfg(feature = "python")]
mod python;
pub mod slimming;

pub use error::LapsError;
