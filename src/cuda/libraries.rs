//! The two libraries behind everything here, found once per process.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use super::compile::Nvrtc;
use super::driver::Driver;
use crate::error::LapsError;

/// What a process has loaded.
pub struct Libraries {
    pub driver: Driver,
    pub nvrtc: Nvrtc,
}

static PLACES: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());
static LOADED: OnceLock<Result<Libraries, LapsError>> = OnceLock::new();

/// Where to look for NVRTC before the system's own places, best first. Without effect once the libraries are loaded.
pub fn configure(nvrtc: Vec<PathBuf>) {
    *PLACES.lock().unwrap_or_else(PoisonError::into_inner) = nvrtc;
}

/// Driver and NVRTC, loaded at the first call. `LAPS_CUDA_DRIVER` and `LAPS_NVRTC` name other files than the usual ones.
pub fn libraries() -> Result<&'static Libraries, LapsError> {
    let load = || {
        let named = |variable| std::env::var_os(variable).filter(|name| !name.is_empty()).map(PathBuf::from);
        let driver = Driver::load(&named("LAPS_CUDA_DRIVER").unwrap_or_else(|| "libcuda.so.1".into()))?;
        let places = match named("LAPS_NVRTC") {
            Some(path) => vec![path],
            None => {
                let mut places = PLACES.lock().unwrap_or_else(PoisonError::into_inner).clone();
                places.extend(["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"].map(PathBuf::from));
                places
            }
        };
        Ok(Libraries { driver, nvrtc: first(&places)? })
    };
    LOADED.get_or_init(load).as_ref().map_err(Clone::clone)
}

/// The first of these files that is an NVRTC.
pub(super) fn first(places: &[PathBuf]) -> Result<Nvrtc, LapsError> {
    let mut reasons = Vec::new();
    for place in places {
        match Nvrtc::load(place) {
            Ok(nvrtc) => return Ok(nvrtc),
            Err(reason) => reasons.push(reason),
        }
    }
    let names: Vec<String> = places.iter().map(|place: &PathBuf| shown(place)).collect();
    let expected = format!("one of {} (part of torch's CUDA packages)", names.join(", "));
    Err(LapsError::device("cuda", "no NVRTC", expected, reasons.join("; ")))
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
