//! The extension module `laps._laps`: checks, converts, releases the GIL and calls; no algorithm here.

#[cfg(feature = "cuda")]
mod cuda;
mod dlpack;
mod gate;
mod options;
#[cfg(unix)]
mod records;
mod similarity;
mod stages;
mod tensors;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::slimming::Level;

/// Facts about this build: version, instruction set in use, and those that the processor offers.
#[pyfunction]
fn build_info(py: Python<'_>) -> PyResult<Bound<'_, PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("simd", Level::current()?.name())?;
    let available: Vec<&str> = Level::available().into_iter().map(Level::name).collect();
    info.set_item("simd_available", available)?;
    let features: &[&str] = if cfg!(feature = "cuda") { &["python", "cuda"] } else { &["python"] };
    info.set_item("features", features)?;
    Ok(info)
}

#[pymodule]
mod _laps {
    #[pymodule_export]
    use super::build_info;
    #[cfg(feature = "cuda")]
    #[pymodule_export]
    use super::cuda::{
        cuda_backward, cuda_compile, cuda_configure, cuda_forward, cuda_info, cuda_warps_per_image,
    };
    #[pymodule_export]
    use super::options::SimilarityOptions;
    #[cfg(unix)]
    #[pymodule_export]
    use super::records::{checksum, read_records, unpack_records};
    #[pymodule_export]
    use super::similarity::{similarity_backward, similarity_forward};
    #[pymodule_export]
    use super::stages::{align_patches_words, calibrate_patches, max_sim, select_patches, selection_scores};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
