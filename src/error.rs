//! What can go wrong, as data: every error names the operation, the argument, what was expected and what came.

use thiserror::Error;

/// An argument that an operation cannot take.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum LapsError {
    /// Sizes that do not fit each other or the operation.
    #[error("{operation}: {argument} has shape {got}, expected {expected}")]
    Shape { operation: &'static str, argument: &'static str, expected: String, got: String },
    /// A value outside its range.
    #[error("{operation}: {argument} is out of range (expected {expected}, got {got})")]
    Value { operation: &'static str, argument: &'static str, expected: String, got: String },
    /// A kind of object or element that is not taken.
    #[error("{operation}: {argument} has the wrong type (expected {expected}, got {got})")]
    Type { operation: &'static str, argument: &'static str, expected: String, got: String },
    /// A device, or the software that drives it, that cannot do what is asked.
    #[error("{operation}: {problem} (expected {expected}, got {got})")]
    Device { operation: &'static str, problem: String, expected: String, got: String },
    /// Weights that are not those of the model.
    #[error("weights: {file} does not fit the model (expected its keys, got {got})")]
    Weights { file: String, got: String },
    /// A file that is missing, broken, or cannot be written.
    #[error("{operation}: {file} {problem} (expected {expected})")]
    File { operation: &'static str, file: String, problem: String, expected: &'static str },
    /// What torch refused, in its own words.
    #[cfg(feature = "torch")]
    #[error("torch: {0}")]
    Torch(String),
    /// Another thread asked the operation to stop.
    #[error("{operation}: interrupted")]
    Interrupted { operation: &'static str },
}

impl LapsError {
    pub fn shape(
        operation: &'static str,
        argument: &'static str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Shape { operation, argument, expected: expected.to_string(), got: got.to_string() }
    }

    pub fn value(
        operation: &'static str,
        argument: &'static str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Value { operation, argument, expected: expected.to_string(), got: got.to_string() }
    }

    pub fn type_(
        operation: &'static str,
        argument: &'static str,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Type { operation, argument, expected: expected.to_string(), got: got.to_string() }
    }

    /// Names of tensors that a file lacks, has beyond the model's, or has in another shape.
    pub fn weights(
        file: impl ToString,
        missing: Vec<String>,
        unexpected: Vec<String>,
        mismatched: Vec<String>,
    ) -> Self {
        let kinds = [("missing", missing), ("unexpected", unexpected), ("of another shape", mismatched)];
        let parts = kinds.into_iter().filter(|(_, names)| !names.is_empty()).map(|(kind, mut names)| {
            names.sort_unstable();
            format!("{kind}: {}", some(&names))
        });
        Self::Weights { file: file.to_string(), got: parts.collect::<Vec<_>>().join("; ") }
    }

    pub fn file(
        operation: &'static str,
        file: impl AsRef<std::path::Path>,
        problem: impl ToString,
        expected: &'static str,
    ) -> Self {
        let file = file.as_ref().display().to_string();
        Self::File { operation, file, problem: problem.to_string(), expected }
    }

    pub fn device(
        operation: &'static str,
        problem: impl ToString,
        expected: impl ToString,
        got: impl ToString,
    ) -> Self {
        Self::Device {
            operation,
            problem: problem.to_string(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

/// The first names of each part of the model, and how many more there are.
fn some(names: &[String]) -> String {
    const MOST: usize = 6;
    let part = |name: &String| name.split('.').next().unwrap_or_default().to_owned();
    let parts = names.chunk_by(|a, b| part(a) == part(b)).map(|names| {
        let first = names[..names.len().min(MOST)].join(", ");
        if names.len() > MOST { format!("{first} and {} more", names.len() - MOST) } else { first }
    });
    parts.collect::<Vec<_>>().join(", ")
}

#[cfg(feature = "torch")]
impl From<tch::TchError> for LapsError {
    fn from(error: tch::TchError) -> Self {
        // torch appends its C++ stack to the first line.
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default();
        // What comes from Python (a hook, a dispatch mode, torch.utils.checkpoint) passes through libtorch without its words.
        let lost = first.trim_end().ends_with("Internal torch error:");
        let reason =
            if lost { "an exception in Python code that torch has called, such as a hook" } else { "" };
        LapsError::Torch(format!("{first}{reason}"))
    }
}
