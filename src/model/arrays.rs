//! tch tensors as ndarray views, for the kernels on the CPU. The only `unsafe` of this module's neighbours is here.

use ndarray::{ArrayView, ArrayViewMut, Dimension, IntoDimension};
use tch::{Device, Tensor, kind};

use super::Result;
use crate::error::LapsError;
use crate::slimming::Real;

/// An element type of the kernels that torch has too.
pub(super) trait Element: Real + kind::Element {}
impl Element for f32 {}
impl Element for f64 {}

fn checked<T: kind::Element, D: Dimension>(tensor: &Tensor) -> Result<D> {
    let facts = (tensor.kind(), tensor.device(), tensor.is_contiguous());
    let expected = (T::KIND, Device::Cpu, true);
    if facts != expected {
        let (expected, got) = (format!("{expected:?}"), format!("{facts:?}"));
        return Err(LapsError::type_("similarity", "a tensor (kind, device, contiguous)", expected, got));
    }
    if let Some(rank) = D::NDIM.filter(|&rank| rank != tensor.dim()) {
        let (expected, got) = (format!("rank {rank}"), format!("{:?}", tensor.size()));
        return Err(LapsError::shape("similarity", "a tensor", expected, got));
    }
    let mut shape = D::zeros(tensor.dim());
    for (to, &from) in shape.slice_mut().iter_mut().zip(&tensor.size()) {
        *to = from as usize;
    }
    Ok(shape.into_dimension())
}

/// The elements of a contiguous CPU tensor, which nothing may write to while the view lives.
pub(super) fn view<T: kind::Element, D: Dimension>(tensor: &Tensor) -> Result<ArrayView<'_, T, D>> {
    let shape = checked::<T, D>(tensor)?;
    if shape.size() == 0 {
        // torch has no address for nothing.
        return Ok(ArrayView::from_shape(shape, &[]).expect("no elements"));
    }
    // SAFETY: the tensor is on the CPU, of this element and contiguous, so that its memory holds the elements of `shape` in
    // row-major order, and it lives as long as the borrow. Callers pass detached features, which nobody writes to.
    Ok(unsafe { ArrayView::from_shape_ptr(shape, tensor.data_ptr().cast::<T>()) })
}

/// The same, to be written to: `tensor` must not share its memory with another.
pub(super) fn view_mut<T: kind::Element, D: Dimension>(
    tensor: &mut Tensor,
) -> Result<ArrayViewMut<'_, T, D>> {
    let shape = checked::<T, D>(tensor)?;
    if shape.size() == 0 {
        return Ok(ArrayViewMut::from_shape(shape, &mut []).expect("no elements"));
    }
    // SAFETY: as in `view`; the caller made the tensor, so that the borrow is the only way to its memory.
    Ok(unsafe { ArrayViewMut::from_shape_ptr(shape, tensor.data_ptr().cast::<T>()) })
}
