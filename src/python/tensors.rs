//! Tensors across the border, by DLPack.
//!
//! The exporter owns the memory. [`Tensor`] holds its reference from import to drop, on the thread that holds the GIL, and
//! gives it back by the exporter's deleter; views borrow from the `Tensor`. Nothing is trusted: kind of device, element,
//! rank, shape, strides, alignment and null data are checked before a slice exists.

use std::ffi::CStr;
use std::ptr::NonNull;

use ndarray::{Array, ArrayView, ArrayViewMut, CowArray, Dimension, IntoDimension, ShapeBuilder};
use pyo3::exceptions::{PyAttributeError, PyTypeError};
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyDict};

use super::dlpack::{self, BFLOAT, BOOL, COMPLEX, FLOAT, INT, UINT};
use crate::error::LapsError;
use crate::slimming;

const VERSIONED: &CStr = c"dltensor_versioned";
const USED_VERSIONED: &CStr = c"used_dltensor_versioned";
const UNVERSIONED: &CStr = c"dltensor";
const USED_UNVERSIONED: &CStr = c"used_dltensor";
const EXCHANGE: &CStr = c"dlpack_exchange_api";

/// An element that arrays of this library have.
pub(super) trait Element: Copy + Send + Sync + 'static {
    const CODE: u8;
    const NAME: &'static str;
}

impl Element for f32 {
    const CODE: u8 = FLOAT;
    const NAME: &'static str = "float32";
}

impl Element for f64 {
    const CODE: u8 = FLOAT;
    const NAME: &'static str = "float64";
}

impl Element for i64 {
    const CODE: u8 = INT;
    const NAME: &'static str = "int64";
}

impl Element for i16 {
    const CODE: u8 = INT;
    const NAME: &'static str = "int16";
}

impl Element for u8 {
    const CODE: u8 = UINT;
    const NAME: &'static str = "uint8";
}

enum Managed {
    Versioned(NonNull<dlpack::ManagedTensorVersioned>),
    Unversioned(NonNull<dlpack::ManagedTensor>),
}

/// An imported tensor, on the CPU unless [`Tensor::import_on`] said otherwise.
pub(super) struct Tensor {
    managed: Managed,
    operation: &'static str,
    argument: &'static str,
}

// SAFETY: the struct behind the pointer is only read, and its memory may be read from any thread; the binding functions
// own every Tensor and lend it to the pool, so it is dropped on the thread that imported it.
unsafe impl Send for Tensor {}
unsafe impl Sync for Tensor {}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: the pointer came from the exporter, is dropped once, and calling its deleter is how DLPack hands it back.
        unsafe {
            match self.managed {
                Managed::Versioned(tensor) => {
                    if let Some(delete) = tensor.as_ref().deleter {
                        delete(tensor.as_ptr());
                    }
                }
                Managed::Unversioned(tensor) => {
                    if let Some(delete) = tensor.as_ref().deleter {
                        delete(tensor.as_ptr());
                    }
                }
            }
        }
    }
}

impl Tensor {
    /// Imports `object`: by torch's C exchange API where its type has one, by `__dlpack__` otherwise.
    pub(super) fn import(
        object: &Bound<'_, PyAny>,
        operation: &'static str,
        argument: &'static str,
    ) -> PyResult<Self> {
        Self::import_on(object, operation, argument, (dlpack::CPU, 0))
    }

    /// As [`Tensor::import`], from a device: kind and number, as DLPack has them. What is on a device other than the CPU
    /// has an [`Tensor::address`] and nothing else.
    pub(super) fn import_on(
        object: &Bound<'_, PyAny>,
        operation: &'static str,
        argument: &'static str,
        device: (i32, i32),
    ) -> PyResult<Self> {
        let exchanged = exchange(object).map_err(|error| refused(object, operation, argument, error))?;
        let managed = match exchanged {
            Some(managed) => managed,
            None => export(object).map_err(|error| refused(object, operation, argument, error))?,
        };
        let tensor = Tensor { managed, operation, argument };
        tensor.check(device)?;
        Ok(tensor)
    }

    /// The address of its elements, which must be contiguous, of this type and at least `elements` many.
    pub(super) fn address(&self, element: (u8, u8), elements: usize) -> Result<u64, LapsError> {
        let dlpack::DataType { code, bits, lanes } = self.raw().dtype;
        if (code, bits, lanes) != (element.0, element.1, 1) {
            return Err(self.wrong_type(format!("DLPack type {}:{}", element.0, element.1), self.dtype()));
        }
        let shape = self.shape();
        let in_order =
            self.strides().iter().zip(contiguous(&shape)).zip(&shape).all(|((&s, e), &d)| s == e || d <= 1);
        if !in_order {
            return Err(self.wrong_type("a contiguous tensor", "another"));
        }
        if shape.iter().product::<usize>() < elements {
            let expected = format!("{elements} elements");
            return Err(LapsError::shape(self.operation, self.argument, expected, slimming::shape(&shape)));
        }
        Ok(self.data::<u8>() as u64)
    }

    fn raw(&self) -> &dlpack::Tensor {
        // SAFETY: valid until the deleter runs, in drop.
        unsafe {
            match &self.managed {
                Managed::Versioned(tensor) => &tensor.as_ref().tensor,
                Managed::Unversioned(tensor) => &tensor.as_ref().tensor,
            }
        }
    }

    fn read_only(&self) -> bool {
        match &self.managed {
            // SAFETY: as in `raw`.
            Managed::Versioned(tensor) => unsafe { tensor.as_ref().flags & dlpack::READ_ONLY != 0 },
            Managed::Unversioned(_) => false,
        }
    }

    fn wrong_type(&self, expected: impl ToString, got: impl ToString) -> LapsError {
        LapsError::type_(self.operation, self.argument, expected, got)
    }

    fn check(&self, (kind, index): (i32, i32)) -> Result<(), LapsError> {
        let raw = self.raw();
        if raw.device.kind != kind || (kind != dlpack::CPU && raw.device.index != index) {
            let name = |kind, index| match kind {
                dlpack::CPU => "a CPU tensor".to_string(),
                dlpack::CUDA => format!("a tensor on GPU {index}"),
                kind => format!("DLPack device type {kind}"),
            };
            return Err(self.wrong_type(name(kind, index), name(raw.device.kind, raw.device.index)));
        }
        if raw.ndim < 0 || (raw.ndim > 0 && raw.shape.is_null()) {
            return Err(self.wrong_type("a shape", "none"));
        }
        let bytes = self.shape().iter().try_fold(raw.dtype.bits as usize / 8, |n, &d| n.checked_mul(d));
        match bytes {
            None => Err(self.wrong_type("a tensor that fits memory", format!("{:?}", self.shape()))),
            Some(0) => Ok(()),
            Some(_) if raw.data.is_null() => {
                Err(self.wrong_type("a tensor with data", "one without (a FakeTensor?)"))
            }
            Some(_) => Ok(()),
        }
    }

    pub(super) fn shape(&self) -> Vec<usize> {
        let raw = self.raw();
        // SAFETY: a DLPack shape has ndim elements; for none it may be null.
        let shape = match raw.ndim {
            0 => &[][..],
            n => unsafe { std::slice::from_raw_parts(raw.shape, n as usize) },
        };
        shape.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect()
    }

    /// The name of the element type, in NumPy's and torch's words.
    pub(super) fn dtype(&self) -> String {
        let dlpack::DataType { code, bits, lanes } = self.raw().dtype;
        match (code, lanes) {
            (BOOL, 1) => "bool".to_string(),
            (INT, 1) => format!("int{bits}"),
            (UINT, 1) => format!("uint{bits}"),
            (FLOAT, 1) => format!("float{bits}"),
            (BFLOAT, 1) => format!("bfloat{bits}"),
            (COMPLEX, 1) => format!("complex{bits}"),
            _ => format!("DLPack type {code}:{bits}x{lanes}"),
        }
    }

    pub(super) fn is_bool(&self) -> bool {
        let dtype = self.raw().dtype;
        dtype.code == BOOL && dtype.bits == 8 && dtype.lanes == 1
    }

    fn strides(&self) -> Vec<isize> {
        let raw = self.raw();
        if raw.strides.is_null() || raw.ndim == 0 {
            return contiguous(&self.shape());
        }
        // SAFETY: DLPack strides, where given, have ndim elements, in elements.
        unsafe { std::slice::from_raw_parts(raw.strides, raw.ndim as usize) }
            .iter()
            .map(|&s| s as isize)
            .collect()
    }

    /// First element; aligned or not.
    fn data<E>(&self) -> *mut E {
        let raw = self.raw();
        raw.data.cast::<u8>().wrapping_add(raw.byte_offset as usize).cast()
    }

    fn expect<E: Element>(&self) -> Result<(), LapsError> {
        let dtype = self.raw().dtype;
        if (dtype.code, dtype.bits as usize, dtype.lanes) == (E::CODE, 8 * size_of::<E>(), 1) {
            Ok(())
        } else {
            Err(self.wrong_type(E::NAME, self.dtype()))
        }
    }

    fn dimension<D: Dimension>(&self) -> Result<D, LapsError> {
        let shape = self.shape();
        let rank = D::NDIM.expect("a fixed rank");
        if shape.len() != rank {
            let got = slimming::shape(&shape);
            return Err(LapsError::shape(self.operation, self.argument, format!("rank {rank}"), got));
        }
        let mut dimension = D::zeros(rank);
        dimension.slice_mut().copy_from_slice(&shape);
        Ok(dimension)
    }

    /// Whether its elements can be a slice as they stand.
    fn is_slice<E>(&self) -> bool {
        let shape = self.shape();
        let expected = contiguous(&shape);
        let in_order = self.strides().iter().zip(expected).zip(&shape).all(|((&s, e), &d)| s == e || d <= 1);
        self.data::<E>().is_aligned() && in_order
    }

    /// Its elements where they are, strided as they are; copied if they are not aligned or run backwards.
    fn elements<E: Element, D: Dimension>(&self) -> Result<CowArray<'_, E, D>, LapsError> {
        let dimension = self.dimension::<D>()?;
        if dimension.size() == 0 {
            return Ok(Array::from_shape_vec(dimension, Vec::new()).expect("no elements").into());
        }
        let (data, strides) = (self.data::<E>(), self.strides());
        if data.is_aligned() && strides.iter().all(|&s| s >= 0) {
            let mut steps = D::zeros(strides.len());
            steps.slice_mut().iter_mut().zip(&strides).for_each(|(step, &s)| *step = s as usize);
            // SAFETY: not null (`check`) and aligned; shape and strides are the exporter's, so every index is one of its
            // initialised elements; they live as long as self and are only read. Any bits are a value of E.
            let view = unsafe { ArrayView::from_shape_ptr(dimension.strides(steps), data) };
            return Ok(view.into());
        }
        let array = Array::from_shape_fn(dimension, |index| {
            let index = index.into_dimension();
            let offset: isize = index.slice().iter().zip(&strides).map(|(&i, &s)| i as isize * s).sum();
            // SAFETY: the index is inside the shape, so the element is the exporter's.
            unsafe { data.offset(offset).read_unaligned() }
        });
        Ok(array.into())
    }

    /// Its values, of a given element type and rank.
    pub(super) fn input<E: Element, D: Dimension>(&self) -> Result<CowArray<'_, E, D>, LapsError> {
        self.expect::<E>()?;
        self.elements()
    }

    /// Its values as booleans.
    pub(super) fn booleans<D: Dimension>(&self) -> Result<Array<bool, D>, LapsError> {
        if !self.is_bool() {
            return Err(self.wrong_type("bool", self.dtype()));
        }
        Ok(self.elements::<u8, D>()?.mapv(|b| b != 0))
    }

    /// Its memory, to be written: contiguous, aligned and writable.
    pub(super) fn output<E: Element, D: Dimension>(&mut self) -> Result<ArrayViewMut<'_, E, D>, LapsError> {
        self.expect::<E>()?;
        let dimension = self.dimension::<D>()?;
        if self.read_only() {
            return Err(self.wrong_type("a writable tensor", "a read-only one"));
        }
        if dimension.size() == 0 {
            return Ok(ArrayViewMut::from_shape(dimension, &mut []).expect("no elements"));
        }
        if !self.is_slice::<E>() {
            return Err(self.wrong_type("a contiguous tensor", "a strided one"));
        }
        // SAFETY: as in `elements`; `&mut self` and the binding, which passes each output once, make it the only view.
        let elements = unsafe { std::slice::from_raw_parts_mut(self.data::<E>(), dimension.size()) };
        Ok(ArrayViewMut::from_shape(dimension, elements).expect("as many elements as the shape says"))
    }

    /// The range of its bytes, for overlap checks.
    pub(super) fn span(&self) -> std::ops::Range<usize> {
        let shape = self.shape();
        let start = self.data::<u8>() as usize;
        if shape.contains(&0) {
            return start..start;
        }
        let bytes = self.raw().dtype.bits as usize / 8;
        let (mut below, mut above) = (0, 0);
        for (&d, s) in shape.iter().zip(self.strides()) {
            let reach = (d - 1) * s.unsigned_abs() * bytes;
            if s < 0 { below += reach } else { above += reach }
        }
        start.saturating_sub(below)..start.saturating_add(above + bytes)
    }

    pub(super) fn argument(&self) -> &'static str {
        self.argument
    }
}

fn contiguous(shape: &[usize]) -> Vec<isize> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis].max(1) as isize;
    }
    strides
}

/// Import by `type(object).__dlpack_c_exchange_api__`, if there is one (torch >= 2.10).
fn exchange(object: &Bound<'_, PyAny>) -> PyResult<Option<Managed>> {
    let Ok(capsule) = object.get_type().getattr("__dlpack_c_exchange_api__") else { return Ok(None) };
    let Ok(capsule) = capsule.cast_into::<PyCapsule>() else { return Ok(None) };
    let Ok(pointer) = capsule.pointer_checked(Some(EXCHANGE)) else { return Ok(None) };
    let api = pointer.cast::<dlpack::ExchangeApi>();
    let mut out = std::ptr::null_mut();
    // SAFETY: a capsule of this name holds an ExchangeApi that lives as long as its type; major version 1 fixes its layout.
    // The function takes a borrowed object and sets a Python error when it returns anything but 0.
    let status = unsafe {
        let api = api.as_ref();
        let Some(import) = api.managed_tensor_from_py_object.filter(|_| api.header.version.major == 1) else {
            return Ok(None);
        };
        import(object.as_ptr().cast(), &mut out)
    };
    match NonNull::new(out) {
        Some(tensor) if status == 0 => Ok(Some(Managed::Versioned(tensor))),
        _ => Err(PyErr::fetch(object.py())),
    }
}

/// An exporter's refusal as an error of ours: by type for what is no tensor, by its first line for a tensor.
fn refused(
    object: &Bound<'_, PyAny>,
    operation: &'static str,
    argument: &'static str,
    error: PyErr,
) -> PyErr {
    let py = object.py();
    let got = if error.is_instance_of::<PyAttributeError>(py) {
        object.get_type().name().map_or_else(|_| "an object".to_string(), |name| name.to_string())
    } else {
        let message = error.value(py).to_string();
        format!("one that cannot be exported: {}", message.lines().next().unwrap_or_default())
    };
    LapsError::type_(operation, argument, "a CPU tensor or array", got).into()
}

/// Import by the method `__dlpack__`.
fn export(object: &Bound<'_, PyAny>) -> PyResult<Managed> {
    let py = object.py();
    let options = PyDict::new(py);
    options.set_item("max_version", (1, 0))?;
    let capsule = match object.call_method("__dlpack__", (), Some(&options)) {
        // Exporters older than DLPack 1.0 do not know the keyword.
        Err(error) if error.is_instance_of::<PyTypeError>(py) => object.call_method0("__dlpack__"),
        result => result,
    }?;
    let capsule =
        capsule.cast_into::<PyCapsule>().map_err(|_| PyTypeError::new_err("__dlpack__ gave no capsule"))?;
    // SAFETY: a capsule of one of these names holds such a struct; renaming it tells that we own the struct from now on.
    unsafe {
        if let Ok(pointer) = capsule.pointer_checked(Some(VERSIONED)) {
            pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), USED_VERSIONED.as_ptr());
            let managed = pointer.cast::<dlpack::ManagedTensorVersioned>();
            if managed.as_ref().version.major != 1 {
                // Another major version promises only the fields that its deletion needs.
                if let Some(delete) = managed.as_ref().deleter {
                    delete(managed.as_ptr());
                }
                return Err(PyTypeError::new_err("its DLPack is not of version 1"));
            }
            return Ok(Managed::Versioned(managed));
        }
        if let Ok(pointer) = capsule.pointer_checked(Some(UNVERSIONED)) {
            pyo3::ffi::PyCapsule_SetName(capsule.as_ptr(), USED_UNVERSIONED.as_ptr());
            return Ok(Managed::Unversioned(pointer.cast()));
        }
    }
    Err(PyTypeError::new_err("its DLPack capsule is already used"))
}
