//! `laps_native._native`: the encoders of `laps::model` for Python, whose tensors they compute with. Bindings only.

mod tensor;

use std::path::PathBuf;

use laps::LapsError;
use laps::model::source::{Declared, Lent, Random, Scope};
use laps::model::{Checkpoint, Half, Text, TextConfig, Vision, VisionConfig};
use pyo3::prelude::*;
use tch::{Device, Kind};

use tensor::PyTensor;

enum Config {
    Vision(VisionConfig),
    Text(TextConfig),
}

enum Module {
    Vision(Vision),
    Text(Text),
}

impl Config {
    fn build(&self, at: Scope<'_>) -> Result<Module, LapsError> {
        Ok(match self {
            Config::Vision(config) => Module::Vision(Vision::new(at, config)?),
            Config::Text(config) => Module::Text(Text::new(at, config)?),
        })
    }
}

type Named = Vec<(String, PyTensor)>;

fn named(tensors: Vec<(String, tch::Tensor)>) -> Named {
    tensors.into_iter().map(|(name, tensor)| (name, PyTensor(tensor))).collect()
}

fn half(name: &str) -> Result<Half, LapsError> {
    match name {
        "vision" => Ok(Half::Vision),
        "text" => Ok(Half::Text),
        other => Err(LapsError::value("encoder", "part", "vision or text", other)),
    }
}

fn json(text: &str) -> Result<serde_json::Value, LapsError> {
    serde_json::from_str(text).map_err(|error| LapsError::value("encoder", "config", "JSON", error))
}

/// An encoder without weights: its parameters are Python's, and come with every call.
#[pyclass(frozen, module = "laps_native._native")]
struct Encoder {
    config: Config,
    /// What made it, for copy and pickle.
    made_of: (String, String),
}

#[pymethods]
impl Encoder {
    /// `part` is "vision" or "text", `config` the JSON object that transformers writes.
    #[new]
    fn new(part: String, config: String) -> PyResult<Self> {
        let made_of = (part, config);
        let parsed = json(&made_of.1)?;
        let config = match half(&made_of.0)? {
            Half::Vision => Config::Vision(VisionConfig::from_json(&parsed)?),
            Half::Text => Config::Text(TextConfig::from_json(&parsed)?),
        };
        // Sizes that do not fit each other are refused here and not at the first call.
        config.build(Scope::root(&mut Declared::default()))?;
        Ok(Encoder { config, made_of })
    }

    fn __getnewargs__(&self) -> (String, String) {
        self.made_of.clone()
    }

    /// Names and initial values of the parameters, in the same order, drawn from torch's default generator.
    fn random(&self) -> PyResult<Named> {
        let mut source = Random::new(Device::Cpu, Kind::Float);
        self.config.build(Scope::root(&mut source))?;
        Ok(named(source.made))
    }

    /// Names and shapes of the parameters, in the order in which `forward` takes them.
    fn parameters(&self) -> PyResult<Vec<(String, Vec<i64>)>> {
        let mut source = Declared::default();
        self.config.build(Scope::root(&mut source))?;
        Ok(source.tensors)
    }

    /// Tokens of `inputs`: pixels (B, 3, S, S), or ids (B, L) with a mask (B, L), bool, or None. `parameters` are in the
    /// order of `Encoder.parameters`.
    #[pyo3(signature = (parameters, inputs, mask, train))]
    fn forward(
        &self,
        py: Python<'_>,
        parameters: Vec<PyTensor>,
        inputs: PyTensor,
        mask: Option<PyTensor>,
        train: bool,
    ) -> PyResult<PyTensor> {
        let parameters: Vec<_> = parameters.into_iter().map(|tensor| tensor.0).collect();
        let (input, mask) = (inputs.0, mask.map(|tensor| tensor.0));
        let tokens =
            py.detach(move || match self.config.build(Scope::root(&mut Lent::new(&parameters)))? {
                Module::Vision(vision) => vision.forward(&input, train),
                Module::Text(text) => text.forward_masked(&input, mask.as_ref(), train),
            })?;
        Ok(PyTensor(tokens))
    }

    /// S in pixels; None for text.
    #[getter]
    fn image_size(&self) -> Option<i64> {
        match &self.config {
            Config::Vision(config) => Some(config.image_size()),
            Config::Text(_) => None,
        }
    }

    /// P; None for text.
    #[getter]
    fn num_prefix_tokens(&self) -> Option<i64> {
        match &self.config {
            Config::Vision(config) => Some(config.prefix_tokens()),
            Config::Text(_) => None,
        }
    }

    /// The most tokens of a caption; None for images.
    #[getter]
    fn max_length(&self) -> Option<i64> {
        match &self.config {
            Config::Vision(_) => None,
            Config::Text(config) => Some(config.max_length()),
        }
    }

    /// None for images.
    #[getter]
    fn vocab_size(&self) -> Option<i64> {
        match &self.config {
            Config::Vision(_) => None,
            Config::Text(config) => Some(config.vocab_size()),
        }
    }
}

/// The configuration (JSON) and tensors of a folder as transformers writes it; see `laps::model::Checkpoint::read`.
#[pyfunction]
#[pyo3(signature = (folder, part, image_size=None))]
fn read_checkpoint(
    py: Python<'_>,
    folder: PathBuf,
    part: &str,
    image_size: Option<i64>,
) -> PyResult<(String, String, Named)> {
    let half = half(part)?;
    let checkpoint = py.detach(|| Checkpoint::read(&folder, half, image_size))?;
    Ok((checkpoint.file, checkpoint.config.to_string(), named(checkpoint.tensors)))
}

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::{Encoder, read_checkpoint};

    #[pymodule_export]
    #[allow(non_upper_case_globals)]
    const __version__: &str = env!("CARGO_PKG_VERSION");
}
