//! Pretrained encoders as the Hugging Face hub keeps them: config.json and model.safetensors, or its shards.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::Result;
use super::backbone::{Text, TextConfig, Vision, VisionConfig};
use super::files::{read_json, read_tensors};
use super::layers::resize_grid;
use super::source::{Scope, Stored};
use crate::error::LapsError;

const OPERATION: &str = "encoder";
/// Parts of the names of tensors that an encoder's tokens do not depend on.
const UNUSED: [&str; 4] = ["pooler.", "embeddings.mask_token", "position_ids", "relative_position_index"];

pub(super) fn unused(name: &str) -> bool {
    UNUSED.iter().any(|part| name.contains(part))
}

/// Half of a checkpoint that may hold both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Vision,
    Text,
}

impl Half {
    fn name(self) -> &'static str {
        match self {
            Half::Vision => "vision",
            Half::Text => "text",
        }
    }

    /// The names of CLIP's other half, and of what only both together need.
    fn foreign(self) -> &'static [&'static str] {
        match self {
            Half::Vision => &["text_model.", "text_projection.", "logit_scale"],
            Half::Text => &["vision_model.", "visual_projection.", "logit_scale"],
        }
    }
}

/// A configuration, and the tensors that belong to the encoder which it describes, under that encoder's names.
#[derive(Debug)]
pub struct Checkpoint {
    /// The file that an error should name.
    pub file: String,
    pub half: Half,
    pub config: Value,
    pub tensors: Vec<(String, Tensor)>,
}

impl Checkpoint {
    /// Reads a folder as transformers writes it.
    ///
    /// A model for a task keeps its encoder under a name of its own; that prefix goes, and so does what is outside of it.
    /// `image_size` in pixels, if it is not the checkpoint's, interpolates the position embeddings.
    pub fn read(folder: impl AsRef<Path>, half: Half, image_size: Option<i64>) -> Result<Self> {
        let folder = folder.as_ref();
        let mut config =
            read_json(OPERATION, &folder.join("config.json"), "the config.json of a checkpoint")?;
        // Old checkpoints of CLIP keep the values that count under this name; those that it lacks are the defaults.
        let older = config.get(format!("{}_config_dict", half.name())).filter(|value| value.is_object());
        if let Some(nested) = older.or_else(|| config.get(format!("{}_config", half.name()))) {
            let mut nested = nested.clone();
            if let Value::Object(values) = &mut nested {
                let kind = format!("clip_{}_model", half.name());
                values.entry("model_type").or_insert(kind.into());
            }
            config = nested;
        }
        let (file, tensors) = read_weights(folder)?;
        let tensors = own(tensors, config["model_type"].as_str().unwrap_or_default(), half);
        let mut checkpoint = Checkpoint { file, half, config, tensors };
        if let (Half::Vision, Some(size)) = (half, image_size) {
            checkpoint.resize(size)?;
        }
        Ok(checkpoint)
    }

    /// The image encoder, with float32 weights on the CPU.
    pub fn vision(self) -> Result<(VisionConfig, Vision)> {
        let config = VisionConfig::from_json(&self.config)?;
        let vision = self.fit(|at| Vision::new(at, &config))?;
        Ok((config, vision))
    }

    /// The text encoder, with float32 weights on the CPU.
    pub fn text(self) -> Result<(TextConfig, Text)> {
        let config = TextConfig::from_json(&self.config)?;
        let text = self.fit(|at| Text::new(at, &config))?;
        Ok((config, text))
    }

    fn fit<M>(self, build: impl FnOnce(Scope<'_>) -> Result<M>) -> Result<M> {
        let mut stored = Stored::new(self.tensors, Device::Cpu, Kind::Float);
        let module = build(Scope::root(&mut stored))?;
        stored.finish(&self.file)?;
        Ok(module)
    }

    fn resize(&mut self, image_size: i64) -> Result<()> {
        let old = VisionConfig::from_json(&self.config)?;
        if old.image_size() == image_size {
            return Ok(());
        }
        self.config["image_size"] = image_size.into();
        let new = VisionConfig::from_json(&self.config)?;
        let Some(name) = new.positions() else { return Ok(()) };
        let prefix = new.prefix_tokens();
        for (_, tensor) in self.tensors.iter_mut().filter(|(n, _)| n == name) {
            let shape = tensor.size();
            let table = tensor.f_reshape([-1, *shape.last().unwrap_or(&1)])?;
            let rows = table.size()[0];
            if rows != prefix + old.position_side().pow(2) {
                let expected = format!("{} rows", prefix + old.position_side().pow(2));
                return Err(LapsError::shape(OPERATION, "position embeddings", expected, rows));
            }
            let grid = resize_grid(&table.f_narrow(0, prefix, rows - prefix)?, new.position_side())?;
            let table = Tensor::f_cat(&[table.f_narrow(0, 0, prefix)?, grid], 0)?;
            *tensor = if shape.len() == 3 { table.f_unsqueeze(0)? } else { table };
        }
        Ok(())
    }
}

/// Every tensor of `model.safetensors` or of the shards that its index names.
fn read_weights(folder: &Path) -> Result<(String, Vec<(String, Tensor)>)> {
    let whole = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if whole.exists() || !index.exists() {
        return Ok((whole.display().to_string(), read_tensors(OPERATION, &whole)?));
    }
    let expected = "an index of safetensors shards";
    let listed = read_json(OPERATION, &index, expected)?;
    let broken = || LapsError::file(OPERATION, &index, "has no usable weight_map", expected);
    let map = listed.get("weight_map").and_then(Value::as_object).ok_or_else(broken)?;
    let shards =
        map.values().map(|file| file.as_str().ok_or_else(broken)).collect::<Result<BTreeSet<_>>>()?;
    let mut tensors = Vec::new();
    for shard in shards {
        // A shard lies beside its index and nowhere else.
        if Path::new(shard).file_name() != Some(shard.as_ref()) {
            return Err(broken());
        }
        tensors.extend(read_tensors(OPERATION, &folder.join(shard))?);
    }
    Ok((index.display().to_string(), tensors))
}

/// The tensors that are the encoder's, under its own names.
fn own(tensors: Vec<(String, Tensor)>, model_type: &str, half: Half) -> Vec<(String, Tensor)> {
    let prefix = format!("{model_type}.");
    let within = tensors.iter().any(|(name, _)| name.starts_with(&prefix));
    let own = tensors.into_iter().filter_map(|(name, tensor)| {
        let name = if within { name.strip_prefix(&prefix)?.to_owned() } else { name };
        if half.foreign().iter().any(|part| name.starts_with(part)) || unused(&name) {
            return None;
        }
        // BERT's first checkpoints, which the hub still serves, have TensorFlow's names.
        let name =
            name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias");
        Some((name, tensor))
    });
    own.collect()
}
