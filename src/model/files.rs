//! JSON and tensors in files: errors name the file, and what is written appears whole or not at all.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;
use tch::Tensor;

use super::Result;
use crate::error::LapsError;

/// The JSON object in a file.
pub(super) fn read_json(operation: &'static str, path: &Path, expected: &'static str) -> Result<Value> {
    let text = fs::read(path).map_err(|error| unreadable(operation, path, expected, &error))?;
    match serde_json::from_slice(&text) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(LapsError::file(operation, path, "holds no JSON object", expected)),
        Err(error) => Err(LapsError::file(operation, path, format!("is broken: {error}"), expected)),
    }
}

/// The tensors of a safetensors file, on the CPU.
pub(super) fn read_tensors(operation: &'static str, path: &Path) -> Result<Vec<(String, Tensor)>> {
    let expected = "a safetensors file";
    // Whether it is there at all, in the system's words rather than the library's.
    File::open(path).map_err(|error| unreadable(operation, path, expected, &error))?;
    Tensor::read_safetensors(path)
        .map_err(|error| LapsError::file(operation, path, format!("cannot be read: {error}"), expected))
}

fn unreadable(
    operation: &'static str,
    path: &Path,
    expected: &'static str,
    error: &std::io::Error,
) -> LapsError {
    let problem = match error.kind() {
        ErrorKind::NotFound => "does not exist".to_owned(),
        _ => format!("cannot be read: {error}"),
    };
    LapsError::file(operation, path, problem, expected)
}

/// Lets `write` fill files beside their places, then renames them all: what stood there before stays whole until the last
/// of the new files is complete.
pub(super) fn replace_all(
    operation: &'static str,
    folder: &Path,
    names: &[&str],
    write: impl FnOnce(&dyn Fn(&str) -> std::path::PathBuf) -> Result<()>,
) -> Result<()> {
    let refused = |path: &Path, error: std::io::Error| {
        LapsError::file(operation, path, format!("cannot be written: {error}"), "room and permission")
    };
    fs::create_dir_all(folder).map_err(|error| refused(folder, error))?;
    let beside = |name: &str| folder.join(format!(".{name}.{}.partial", std::process::id()));
    let result = write(&beside).and_then(|()| {
        for name in names {
            let path = beside(name);
            File::open(&path).and_then(|file| file.sync_all()).map_err(|error| refused(&path, error))?;
        }
        for name in names {
            let path = folder.join(name);
            fs::rename(beside(name), &path).map_err(|error| refused(&path, error))?;
        }
        File::open(folder).and_then(|file| file.sync_all()).map_err(|error| refused(folder, error))
    });
    if result.is_err() {
        for name in names {
            // What was never written is not there to remove.
            let _ = fs::remove_file(beside(name));
        }
    }
    result
}
