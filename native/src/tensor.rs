//! torch tensors between Python and tch: the same `TensorImpl` on both sides, so autograd, hooks and devices go along.

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use tch::Tensor;

/// A tensor that came from Python, or goes there.
pub struct PyTensor(pub Tensor);

impl<'a, 'py> FromPyObject<'a, 'py> for PyTensor {
    type Error = PyErr;

    fn extract(object: Borrowed<'a, 'py, PyAny>) -> PyResult<Self> {
        // SAFETY: `object` is a live Python object, and the GIL is held.
        let tensor = unsafe { Tensor::pyobject_unpack(object.as_ptr().cast()) };
        match tensor {
            Ok(Some(tensor)) => Ok(PyTensor(tensor)),
            Ok(None) => {
                let got = object.get_type().name()?;
                Err(PyTypeError::new_err(format!("encoder: expected a torch.Tensor, got {got}")))
            }
            Err(error) => Err(laps::LapsError::from(error).into()),
        }
    }
}

impl<'py> IntoPyObject<'py> for PyTensor {
    type Target = PyAny;
    type Output = Bound<'py, PyAny>;
    type Error = PyErr;

    fn into_pyobject(self, py: Python<'py>) -> PyResult<Self::Output> {
        let pointer = self.0.pyobject_wrap().map_err(laps::LapsError::from)?;
        // SAFETY: `pyobject_wrap` returns a new reference, or null with Python's error set.
        unsafe { Bound::from_owned_ptr_or_err(py, pointer.cast()) }
    }
}
