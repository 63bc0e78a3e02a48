//! `laps._laps.checksum`, `read_records` and `unpack_records`.

use ndarray::{Ix1, Ix2};
use pyo3::prelude::*;

use super::gate;
use super::tensors::Tensor;
use crate::error::LapsError;
use crate::records::{self, Damage, Place, Stored};
use crate::slimming::shape;

#[pyfunction]
pub(super) fn checksum(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<u32> {
    let tensor = Tensor::import(data, "checksum", "data")?;
    gate::run(py, 1, 0.0, |_| {
        let view = tensor.input::<u8, Ix1>()?;
        Ok(view.as_slice().map_or_else(|| records::checksum(&view.to_vec()), records::checksum))
    })
}

/// None, or the position of the first damaged record and why: an error number, 0 for the file's end, -1 for other content.
#[pyfunction]
pub(super) fn read_records(
    py: Python<'_>,
    files: &Bound<'_, PyAny>,
    offsets: &Bound<'_, PyAny>,
    checksums: &Bound<'_, PyAny>,
    num_threads: usize,
    out_records: &Bound<'_, PyAny>,
) -> PyResult<Option<(usize, i32)>> {
    let operation = "read_records";
    let import = |object, name| Tensor::import(object, operation, name);
    let (files, offsets) = (import(files, "files")?, import(offsets, "offsets")?);
    let (checksums, mut out) = (import(checksums, "checksums")?, import(out_records, "out_records")?);
    gate::run(py, num_threads, 0.0, |_| {
        let files = files.input::<i64, Ix1>()?;
        let offsets = offsets.input::<i64, Ix1>()?;
        let checksums = checksums.input::<i64, Ix1>()?;
        let mut rows = out.output::<u8, Ix2>()?;
        for (argument, count) in
            [("offsets", offsets.len()), ("checksums", checksums.len()), ("out_records", rows.nrows())]
        {
            if count != files.len() {
                let expected = format!("{} rows, as files has", files.len());
                return Err(LapsError::shape(operation, argument, expected, count));
            }
        }
        let place = |i: usize| -> Option<Place> {
            Some(Place {
                file: files[i].try_into().ok()?,
                offset: offsets[i].try_into().ok()?,
                checksum: checksums[i].try_into().ok()?,
            })
        };
        let places = (0..files.len()).map(place).collect::<Option<Vec<_>>>().ok_or_else(|| {
            let expected = "file descriptors, offsets >= 0 and checksums of 32 bits";
            LapsError::value(operation, "files, offsets or checksums", expected, "others")
        })?;
        let rows = rows.as_slice_mut().expect("contiguous");
        Ok(match records::read(&places, rows) {
            Ok(()) => None,
            Err((at, Damage::Unreadable(number))) => Some((at, number.max(1))),
            Err((at, Damage::Short)) => Some((at, 0)),
            Err((at, Damage::Altered)) => Some((at, -1)),
        })
    })
}

/// Widens one field of every record to float32: `width` numbers of an int8 field share a scale.
#[pyfunction]
pub(super) fn unpack_records(
    py: Python<'_>,
    records: &Bound<'_, PyAny>,
    start: usize,
    dtype: &str,
    width: usize,
    num_threads: usize,
    out: &Bound<'_, PyAny>,
) -> PyResult<()> {
    let operation = "unpack_records";
    let from = Tensor::import(records, operation, "records")?;
    let mut out = Tensor::import(out, operation, "out")?;
    gate::run(py, num_threads, 0.0, |_| {
        let from = from.input::<u8, Ix2>()?;
        let size = from.ncols();
        let from = from
            .as_slice()
            .ok_or_else(|| LapsError::type_(operation, "records", "a contiguous array", "a strided one"))?;
        let mut to = out.output::<f32, Ix2>()?;
        let (rows, count) = to.dim();
        let stored = match dtype {
            "float16" => Stored::F16,
            "float32" => Stored::F32,
            "int8" => Stored::I8 { width },
            got => return Err(LapsError::value(operation, "dtype", "float16, float32 or int8", got)),
        };
        if width == 0 || !count.is_multiple_of(width) {
            let expected = format!("a divisor of {count}");
            return Err(LapsError::value(operation, "width", expected, width));
        }
        let end = start.saturating_add(stored.bytes(count));
        if rows != from.len() / size.max(1) || end > size {
            let expected = format!("({}, a field that ends within {size} bytes)", from.len() / size.max(1));
            return Err(LapsError::shape(operation, "out", expected, shape(&[rows, count])));
        }
        records::widen(from, size, start, stored, to.as_slice_mut().expect("contiguous"), count);
        Ok(())
    })
}
