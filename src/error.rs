//! What can go wrong, as data: every error names the operation, the argument, what was expected and what came.

use thiserror::Error;

/// An argument that an operation cannot take.
#[derive(Debug, Clone, PartialEq, Error)]
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
