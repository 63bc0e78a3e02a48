//! Where the tensors of a module come from. A module states each of its tensors once, by name, shape and initial value, when
//! it is built; what a [`Source`] makes of that decides whether the module is new, read from a file, or lent by Python.

use std::collections::HashMap;
use std::fmt::Display;

use tch::nn::{Init, init::f_init};
use tch::{Device, Kind, Tensor};

use super::Result;
use crate::error::LapsError;

/// The value of a tensor in a new model.
#[derive(Clone, Copy, Debug)]
pub struct Initial {
    init: Init,
    /// The row of an embedding that is zero.
    zero_row: Option<i64>,
}

impl From<Init> for Initial {
    fn from(init: Init) -> Self {
        Initial { init, zero_row: None }
    }
}

impl Initial {
    /// But for this row, which is zero.
    pub fn with_zero_row(init: Init, row: Option<i64>) -> Self {
        Initial { init, zero_row: row }
    }
}

/// Gives a module the tensors that it asks for, in the order in which it asks.
pub trait Source {
    /// The tensor of this name and shape; `initial` is its value in a new model.
    fn tensor(&mut self, name: String, shape: &[i64], initial: Initial) -> Result<Tensor>;
}

/// A place among the names of a model, such as `encoder.layer.3`.
pub struct Scope<'a> {
    source: &'a mut dyn Source,
    path: String,
}

impl<'a> Scope<'a> {
    /// The place where names have no prefix.
    pub fn root(source: &'a mut dyn Source) -> Self {
        Scope { source, path: String::new() }
    }

    /// A place below this one; `name` may have several parts.
    pub fn sub(&mut self, name: impl Display) -> Scope<'_> {
        let path = self.join(name);
        Scope { source: self.source, path }
    }

    pub fn tensor(&mut self, name: &str, shape: &[i64], initial: impl Into<Initial>) -> Result<Tensor> {
        let name = self.join(name);
        self.source.tensor(name, shape, initial.into())
    }

    fn join(&self, name: impl Display) -> String {
        if self.path.is_empty() { name.to_string() } else { format!("{}.{name}", self.path) }
    }
}

/// New tensors, drawn from torch's default generator, and kept under their names.
pub struct Random {
    pub device: Device,
    pub kind: Kind,
    pub made: Vec<(String, Tensor)>,
}

impl Random {
    pub fn new(device: Device, kind: Kind) -> Self {
        Random { device, kind, made: Vec::new() }
    }
}

impl Source for Random {
    fn tensor(&mut self, name: String, shape: &[i64], initial: Initial) -> Result<Tensor> {
        let tensor = f_init(initial.init, shape, self.device, self.kind)?;
        if let Some(row) = initial.zero_row {
            let _ = tensor.f_select(0, row)?.f_zero_()?;
        }
        self.made.push((name, tensor.shallow_clone()));
        Ok(tensor)
    }
}

/// Names and shapes alone: the tensors have no elements to speak of.
#[derive(Default)]
pub struct Declared {
    pub tensors: Vec<(String, Vec<i64>)>,
}

impl Source for Declared {
    fn tensor(&mut self, name: String, shape: &[i64], _: Initial) -> Result<Tensor> {
        self.tensors.push((name, shape.to_vec()));
        Ok(Tensor::f_zeros([0], (Kind::Float, Device::Cpu))?)
    }
}

/// Tensors in the order of their declaration, as Python lends them for a call.
pub struct Lent<'a> {
    tensors: std::slice::Iter<'a, Tensor>,
}

impl<'a> Lent<'a> {
    pub fn new(tensors: &'a [Tensor]) -> Self {
        Lent { tensors: tensors.iter() }
    }
}

impl Source for Lent<'_> {
    fn tensor(&mut self, name: String, shape: &[i64], _: Initial) -> Result<Tensor> {
        let Some(tensor) = self.tensors.next() else {
            return Err(LapsError::value("encoder", "parameters", "one for each name", "too few"));
        };
        if tensor.size() != shape {
            let got = format!("{name} of shape {:?}", tensor.size());
            return Err(LapsError::shape("encoder", "parameters", format!("{shape:?}"), got));
        }
        Ok(tensor.shallow_clone())
    }
}

/// Tensors of a file, copied to a device and dtype. What is missing or has another shape is noted, and replaced by nothing,
/// so that one error can name everything that does not fit: see [`Stored::finish`].
pub struct Stored {
    device: Device,
    kind: Kind,
    given: HashMap<String, Tensor>,
    missing: Vec<String>,
    mismatched: Vec<String>,
    pub made: Vec<(String, Tensor)>,
}

impl Stored {
    pub fn new(given: impl IntoIterator<Item = (String, Tensor)>, device: Device, kind: Kind) -> Self {
        let given = given.into_iter().collect();
        Stored { device, kind, given, missing: Vec::new(), mismatched: Vec::new(), made: Vec::new() }
    }

    /// The tensors under their names, or an error that lists every name that the model or the file lacks.
    pub fn finish(self, file: &str) -> Result<Vec<(String, Tensor)>> {
        let unexpected: Vec<String> = self.given.into_keys().collect();
        if self.missing.is_empty() && self.mismatched.is_empty() && unexpected.is_empty() {
            return Ok(self.made);
        }
        Err(LapsError::weights(file, self.missing, unexpected, self.mismatched))
    }
}

impl Source for Stored {
    fn tensor(&mut self, name: String, shape: &[i64], _: Initial) -> Result<Tensor> {
        let tensor = match self.given.remove(&name) {
            Some(tensor) if tensor.size() == shape => {
                // Always a copy: parameters must not share the memory of what they were read from.
                tensor.f_to_device_(self.device, self.kind, false, true)?
            }
            Some(tensor) => {
                self.mismatched.push(format!("{name} {:?}, not {shape:?}", tensor.size()));
                Tensor::f_zeros([0], (self.kind, self.device))?
            }
            None => {
                self.missing.push(name.clone());
                Tensor::f_zeros([0], (self.kind, self.device))?
            }
        };
        self.made.push((name, tensor.shallow_clone()));
        Ok(tensor)
    }
}

/// Pretrained parts of a model whose other tensors are new. Each part is what lies behind a prefix.
pub struct Adopted {
    parts: Vec<(&'static str, Stored)>,
    rest: Random,
    /// All tensors, in the order in which they were asked for.
    pub made: Vec<(String, Tensor)>,
}

impl Adopted {
    pub fn new(parts: Vec<(&'static str, Stored)>, rest: Random) -> Self {
        Adopted { parts, rest, made: Vec::new() }
    }

    /// The tensors under their names, or [`Stored::finish`]'s error of the first part that does not fit. `files` are the
    /// parts'.
    pub fn finish(self, files: &[&str]) -> Result<Vec<(String, Tensor)>> {
        for ((_, part), file) in self.parts.into_iter().zip(files) {
            part.finish(file)?;
        }
        Ok(self.made)
    }
}

impl Source for Adopted {
    fn tensor(&mut self, name: String, shape: &[i64], initial: Initial) -> Result<Tensor> {
        let part = self.parts.iter_mut().find_map(|(prefix, part)| Some((name.strip_prefix(*prefix)?, part)));
        let tensor = match part {
            Some((own, part)) => part.tensor(own.to_owned(), shape, initial)?,
            None => self.rest.tensor(name.clone(), shape, initial)?,
        };
        self.made.push((name, tensor.shallow_clone()));
        Ok(tensor)
    }
}
