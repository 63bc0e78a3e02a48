//! One conversion from the library's error to Python's exceptions.

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

use crate::error::LapsError;

impl From<LapsError> for PyErr {
    fn from(error: LapsError) -> PyErr {
        let name = match error {
            LapsError::Shape { .. }
            | LapsError::Value { .. }
            | LapsError::Weights { .. }
            | LapsError::File { .. } => "LapsValueError",
            LapsError::Type { .. } => "LapsTypeError",
            LapsError::Device { .. } | LapsError::Interrupted { .. } => "LapsError",
            #[cfg(feature = "torch")]
            LapsError::Torch(_) => "LapsError",
        };
        #[cfg(feature = "torch")]
        let torch = matches!(error, LapsError::Torch(_));
        let message = error.to_string();
        Python::attach(|py| {
            // A hook that torch called may have raised: its exception comes back out of libtorch without words, but it is
            // still pending, and is what the caller has to see.
            #[cfg(feature = "torch")]
            if let Some(raised) = torch.then(|| PyErr::take(py)).flatten() {
                return raised;
            }
            let class = py.import("laps.errors").and_then(|errors| errors.getattr(name));
            match class.and_then(|class| class.call1((&message,))) {
                Ok(exception) => PyErr::from_value(exception),
                Err(_) => PyRuntimeError::new_err(message),
            }
        })
    }
}
