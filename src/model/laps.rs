//! The whole model: encoders, head, objective, and the folder that it is kept in.

use std::path::Path;

use tch::nn::VarStore;
use tch::{Device, Kind, Tensor};

use super::Result;
use super::backbone::{Text, TextConfig, Vision, VisionConfig, check_size};
use super::captions::CaptionTokenizer;
use super::checkpoint::{Checkpoint, Half, unused};
use super::config::LapsConfig;
use super::files::{read_json, read_tensors, replace_all};
use super::head::{ImageFeatures, LapsHead, Scores, TextFeatures};
use super::images::ImageTransform;
use super::layers::Linear;
use super::loss::{Objective, check_integers};
use super::source::{Adopted, Random, Scope, Stored};
use crate::error::LapsError;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TRANSFORM: &str = "transform.json";
const TOKENIZER: &str = "tokenizer.json";

/// Optimizer groups: the head and the projections, and the backbones.
const HEAD_GROUP: usize = 0;
pub const BACKBONE_GROUP: usize = 1;

/// A batch of pairs: image i with caption i; several may show the same image.
#[derive(Debug)]
pub struct Batch {
    /// (B, 3, S, S), normalised
    pub pixels: Tensor,
    /// (B, L), int64
    pub ids: Tensor,
    /// (B,), int64
    pub lengths: Tensor,
    /// (B,), int64: which image each pair shows
    pub images: Tensor,
}

#[derive(Debug)]
struct Modules {
    vision: Vision,
    image_projection: Option<Linear>,
    text: Text,
    text_projection: Option<Linear>,
    head: LapsHead,
    objective: Objective,
}

/// Image-text retrieval with patches and words.
#[derive(Debug)]
pub struct Laps {
    config: LapsConfig,
    max_length: i64,
    vocab_size: i64,
    modules: Modules,
    /// Image files to pixels.
    pub transform: ImageTransform,
    /// Captions to ids.
    pub tokenizer: Option<CaptionTokenizer>,
    /// Holds every parameter under the name that it has in the file; for optimizers, devices and dtypes.
    pub variables: VarStore,
}

impl Laps {
    /// A model with random weights, in f32, drawn from torch's default generator; without a tokenizer.
    pub fn new(config: LapsConfig, device: Device) -> Result<Self> {
        let mut source = Random::new(device, Kind::Float);
        let modules = Modules::new(Scope::root(&mut source), &config)?;
        Self::assemble(config, modules, source.made, device)
    }

    /// The model that [`Laps::save_pretrained`], or Python's, kept in a folder; in f32.
    pub fn from_pretrained(folder: impl AsRef<Path>, device: Device) -> Result<Self> {
        let folder = folder.as_ref();
        let (file, operation) = (folder.join(CONFIG), "Laps::from_pretrained");
        let json = read_json(operation, &file, "the config.json of a laps model")?;
        let config = LapsConfig::from_json(json, &file)?;
        let path = folder.join(WEIGHTS);
        let tensors = read_tensors(operation, &path)?;
        let needed =
            tensors.into_iter().filter(|(name, _)| !(name.contains("_encoder.backbone.") && unused(name)));
        let mut source = Stored::new(needed, device, Kind::Float);
        let modules = Modules::new(Scope::root(&mut source), &config)?;
        let made = source.finish(&path.display().to_string())?;
        let mut model = Self::assemble(config, modules, made, device)?;
        let file = folder.join(TRANSFORM);
        model.transform = ImageTransform::read(&file)?;
        if i64::from(model.transform.image_size) != model.config.image_size {
            let problem = format!("has image_size {}", model.transform.image_size);
            return Err(LapsError::file(operation, file, problem, "the image_size of config.json"));
        }
        let file = folder.join(TOKENIZER);
        if file.exists() {
            model.tokenizer = Some(CaptionTokenizer::from_file(file, model.max_length as usize)?);
        }
        Ok(model)
    }

    /// A model around pretrained encoders; projections and head are new, in f32, drawn from torch's default generator.
    ///
    /// `config` is [`LapsConfig::new`] of the checkpoints' configurations, with any options changed. Then set `transform`
    /// to what the image encoder was trained with, and `tokenizer` to that of the text encoder:
    ///
    /// ```no_run
    /// use laps::model::{CaptionTokenizer, Checkpoint, Half, ImageTransform, Laps, LapsConfig};
    ///
    /// let image = Checkpoint::read("vit-base", Half::Vision, None)?;
    /// let text = Checkpoint::read("bert-base", Half::Text, None)?;
    /// let config = LapsConfig::new(image.config.clone(), text.config.clone(), 512)?;
    /// let mut model = Laps::from_checkpoints(config, image, text, tch::Device::Cpu)?;
    /// model.transform = ImageTransform::from_preprocessor("vit-base/preprocessor_config.json")?;
    /// model.tokenizer = Some(CaptionTokenizer::from_file("bert-base/tokenizer.json", 512)?);
    /// # Ok::<(), laps::LapsError>(())
    /// ```
    pub fn from_checkpoints(
        config: LapsConfig,
        image: Checkpoint,
        text: Checkpoint,
        device: Device,
    ) -> Result<Self> {
        let sides =
            [(&config.image_encoder, &image, Half::Vision), (&config.text_encoder, &text, Half::Text)];
        for (stated, checkpoint, half) in sides {
            if checkpoint.half != half {
                let got = format!("{:?} of {}", checkpoint.half, checkpoint.file);
                return Err(LapsError::value(
                    "Laps::from_checkpoints",
                    "checkpoints",
                    format!("{half:?}"),
                    got,
                ));
            }
            if *stated != checkpoint.config {
                let expected = format!("the configuration of {}", checkpoint.file);
                return Err(LapsError::value(
                    "Laps::from_checkpoints",
                    "config",
                    expected,
                    "another encoder's",
                ));
            }
        }
        let stored = |tensors| Stored::new(tensors, device, Kind::Float);
        let parts = vec![
            ("image_encoder.backbone.", stored(image.tensors)),
            ("text_encoder.backbone.", stored(text.tensors)),
        ];
        let mut source = Adopted::new(parts, Random::new(device, Kind::Float));
        let modules = Modules::new(Scope::root(&mut source), &config)?;
        let made = source.finish(&[&image.file, &text.file])?;
        Self::assemble(config, modules, made, device)
    }

    fn assemble(
        mut config: LapsConfig,
        modules: Modules,
        tensors: Vec<(String, Tensor)>,
        device: Device,
    ) -> Result<Self> {
        // What is kept in a file says what it means.
        config.loss.max_score.get_or_insert(config.head_options.max_score());
        let variables = VarStore::new(device);
        for (name, tensor) in tensors {
            let group = if name.contains("_encoder.backbone.") { BACKBONE_GROUP } else { HEAD_GROUP };
            let mut parts: Vec<&str> = name.split('.').collect();
            let last = parts.pop().unwrap_or_default();
            let path = parts.into_iter().fold(variables.root().set_group(group), |path, part| path.sub(part));
            // The store keeps the same tensor that the modules have.
            let _ = path.add(last, tensor, true);
        }
        let text = TextConfig::from_json(&config.text_encoder)?;
        let (max_length, vocab_size) = (text.max_length(), text.vocab_size());
        let transform = ImageTransform { image_size: config.image_size as u32, ..ImageTransform::default() };
        Ok(Laps { config, max_length, vocab_size, modules, transform, tokenizer: None, variables })
    }

    /// Writes the model's files; what stood there stays whole until all of them are complete.
    pub fn save_pretrained(&self, folder: impl AsRef<Path>) -> Result<()> {
        let operation = "Laps::save_pretrained";
        self.check_inputs()?;
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (name, tensor) in self.variables.variables() {
            tensors.push((name, tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?));
        }
        tensors.sort_by(|a, b| a.0.cmp(&b.0));
        let json = |value: serde_json::Result<serde_json::Value>| match value {
            Ok(value) => Ok(format!("{value:#}\n")),
            Err(error) => Err(LapsError::value(operation, "config", "values that JSON holds", error)),
        };
        let mut texts = vec![
            (CONFIG, json(serde_json::to_value(&self.config))?),
            (TRANSFORM, json(serde_json::to_value(&self.transform))?),
        ];
        texts.extend(self.tokenizer.as_ref().map(|tokenizer| (TOKENIZER, tokenizer.json.clone())));
        let names: Vec<&str> = texts.iter().map(|(name, _)| *name).chain([WEIGHTS]).collect();
        replace_all(operation, folder.as_ref(), &names, |place| {
            let refused = |name: &str, error: &dyn std::fmt::Display| {
                let problem = format!("cannot be written: {error}");
                LapsError::file(operation, folder.as_ref().join(name), problem, "room and permission")
            };
            for (name, text) in &texts {
                std::fs::write(place(name), text).map_err(|error| refused(name, &error))?;
            }
            Tensor::write_safetensors(&tensors, place(WEIGHTS)).map_err(|error| refused(WEIGHTS, &error))
        })?;
        if self.tokenizer.is_none() {
            // One that was there belonged to another model.
            let _ = std::fs::remove_file(folder.as_ref().join(TOKENIZER));
        }
        Ok(())
    }

    /// Refuses a transform or a tokenizer that the model cannot take.
    fn check_inputs(&self) -> Result<()> {
        self.transform.check()?;
        if i64::from(self.transform.image_size) != self.config.image_size {
            let expected = format!("the model's {}", self.config.image_size);
            return Err(LapsError::value(
                "Laps",
                "transform.image_size",
                expected,
                self.transform.image_size,
            ));
        }
        match self.tokenizer.as_ref().map(CaptionTokenizer::vocab_size) {
            Some(size) if size > self.vocab_size => {
                let expected = format!("at most the text encoder's {} tokens", self.vocab_size);
                Err(LapsError::value("Laps", "tokenizer", expected, size))
            }
            _ => Ok(()),
        }
    }

    pub fn config(&self) -> &LapsConfig {
        &self.config
    }

    pub fn head(&self) -> &LapsHead {
        &self.modules.head
    }

    pub fn head_mut(&mut self) -> &mut LapsHead {
        &mut self.modules.head
    }

    /// What [`Laps::loss`] computes from scores; by itself for scores of [`Laps::similarity`], in an evaluation.
    pub fn objective(&self) -> &Objective {
        &self.modules.objective
    }

    pub fn device(&self) -> Device {
        self.variables.device()
    }

    /// The most tokens of a caption.
    pub fn max_length(&self) -> i64 {
        self.max_length
    }

    /// Pixels (B_v, 3, S, S), normalised, to everything about images that no caption changes. `train` switches dropout on.
    pub fn encode_image(&self, pixels: &Tensor, train: bool) -> Result<ImageFeatures> {
        let side = self.config.image_size;
        if pixels.dim() != 4 || pixels.size()[0] < 1 || pixels.size()[1..] != [3, side, side] {
            let expected = format!("(B_v >= 1, 3, {side}, {side})");
            return Err(LapsError::shape("encode_image", "pixels", expected, format!("{:?}", pixels.size())));
        }
        if !pixels.is_floating_point() {
            let got = format!("{:?}", pixels.kind());
            return Err(LapsError::type_("encode_image", "pixels", "floating", got));
        }
        let Modules { vision, image_projection, head, .. } = &self.modules;
        let tokens = vision.forward(&pixels.f_to_device(self.device())?, train)?;
        head.encode_image(&projected(image_projection, tokens)?)
    }

    /// Ids (B_t, L) and lengths (B_t,), both int64, to everything about captions that no image changes.
    pub fn encode_text(&self, ids: &Tensor, lengths: &Tensor, train: bool) -> Result<TextFeatures> {
        let (captions, longest) = ids.size2()?;
        if lengths.size() != [captions] || longest > self.max_length {
            let expected = format!("(B_t, L <= {}) and (B_t,)", self.max_length);
            let got = format!("{:?} and {:?}", ids.size(), lengths.size());
            return Err(LapsError::shape("encode_text", "ids and lengths", expected, got));
        }
        check_integers("encode_text", "ids", ids)?;
        check_integers("encode_text", "lengths", lengths)?;
        let within = |argument, tensor: &Tensor, least: i64, most: i64| -> Result<()> {
            // A GPU would have to be waited for.
            if tensor.device() != Device::Cpu || tensor.numel() == 0 {
                return Ok(());
            }
            let ends = (tensor.f_min()?.f_int64_value(&[])?, tensor.f_max()?.f_int64_value(&[])?);
            if ends.0 >= least && ends.1 <= most {
                return Ok(());
            }
            let got = format!("{} to {}", ends.0, ends.1);
            Err(LapsError::value("encode_text", argument, format!("{least} to {most}"), got))
        };
        within("lengths", lengths, 1, longest)?;
        within("ids", ids, 0, self.vocab_size - 1)?;
        let Modules { text, text_projection, .. } = &self.modules;
        let words = text.forward(&ids.f_to_device(self.device())?, lengths, train)?;
        Ok(TextFeatures { words: projected(text_projection, words)?, lengths: lengths.shallow_clone() })
    }

    /// Features of image files, without gradient, `batch` at a time.
    pub fn encode_files<P: AsRef<Path>>(&self, files: &[P], batch: usize) -> Result<ImageFeatures> {
        check_batch("encode_files", "files", files.len(), batch)?;
        self.check_inputs()?;
        let parts = files.chunks(batch).map(|part| {
            let pixels = part.iter().map(|file| self.transform.load(file)).collect::<Result<Vec<_>>>()?;
            tch::no_grad(|| self.encode_image(&Tensor::f_stack(&pixels, 0)?, false))
        });
        ImageFeatures::cat(&parts.collect::<Result<Vec<_>>>()?)
    }

    /// Features of sentences, without gradient, `batch` at a time. Longer ones than [`Laps::max_length`] are cut.
    pub fn encode_captions<S: AsRef<str>>(&self, captions: &[S], batch: usize) -> Result<TextFeatures> {
        check_batch("encode_captions", "captions", captions.len(), batch)?;
        self.check_inputs()?;
        let Some(tokenizer) = &self.tokenizer else {
            return Err(LapsError::value("encode_captions", "the model", "a tokenizer.json", "none"));
        };
        let parts = captions.chunks(batch).map(|part| {
            let (ids, lengths) = tokenizer.encode(part)?;
            tch::no_grad(|| self.encode_text(&ids, &lengths, false))
        });
        TextFeatures::cat(&parts.collect::<Result<Vec<_>>>()?)
    }

    /// Scores (B_v, B_t) of every image with every caption, without gradient.
    pub fn similarity(&self, images: &ImageFeatures, texts: &TextFeatures) -> Result<Tensor> {
        Ok(self.modules.head.similarity(images, texts)?.scores)
    }

    /// The loss of a batch, a number; its `backward` reaches every parameter. See [`Objective::loss`] for `warmup`.
    ///
    /// The scores come from kernels that the graph does not see. Their gradient is computed here and tied to the features,
    /// so one backward pass is right and a second-order one is not to be had.
    pub fn loss(&self, batch: &Batch, warmup: Option<f64>) -> Result<Tensor> {
        let counts = [&batch.pixels, &batch.ids, &batch.lengths, &batch.images]
            .map(|tensor| tensor.size().first().copied().unwrap_or(0));
        if counts.iter().any(|&count| count != counts[0]) {
            let expected = "as many pixels as ids, lengths and images";
            return Err(LapsError::shape("Laps::loss", "batch", expected, format!("{counts:?}")));
        }
        let images = self.encode_image(&batch.pixels, true)?;
        let texts = self.encode_text(&batch.ids, &batch.lengths, true)?;
        let Modules { head, objective, .. } = &self.modules;
        let (scored, Scores { scores, kept_fraction }) = head.training_scores(&images, &texts)?;
        let sampled = head.options().has_score_net();
        let parameter = objective.parameter().filter(|parameter| parameter.requires_grad());
        // The small graph from scores to loss is needed whatever the caller has switched off.
        let (loss, grads) = tch::with_grad(|| -> Result<_> {
            let scores = scores.f_set_requires_grad(true)?;
            let fraction = kept_fraction.f_set_requires_grad(sampled)?;
            let kept = sampled.then_some((&fraction, head.options().selection_ratio));
            let loss = objective.loss(&scores, &batch.images, warmup, kept)?;
            let mut leaves = vec![&scores];
            leaves.extend(sampled.then_some(&fraction));
            leaves.extend(parameter);
            let grads = Tensor::f_run_backward(&[&loss], &leaves, false, false)?;
            Ok((loss.f_detach()?, grads))
        })?;
        let mut tied = scored.carry(&grads[0], sampled.then(|| &grads[1]))?;
        if let Some((parameter, grad)) = parameter.zip(grads.last()) {
            let still = parameter.f_sub(&parameter.f_detach()?)?;
            tied = tied.f_add(&still.f_mul(grad)?.f_to_device(tied.device())?.f_to_kind(tied.kind())?)?;
        }
        // The value of the loss, and the gradient of what is tied to it, whose value is zero.
        Ok(tied.f_add(&loss.f_to_device(tied.device())?)?)
    }
}

fn check_batch(operation: &'static str, argument: &'static str, count: usize, batch: usize) -> Result<()> {
    for (argument, size) in [(argument, count), ("batch", batch)] {
        if size == 0 {
            return Err(LapsError::value(operation, argument, "at least one", 0));
        }
    }
    Ok(())
}

fn projected(projection: &Option<Linear>, tokens: Tensor) -> Result<Tensor> {
    match projection {
        None => Ok(tokens),
        Some(projection) => projection.forward(&tokens),
    }
}

impl Modules {
    fn new(mut at: Scope<'_>, config: &LapsConfig) -> Result<Self> {
        let vision = VisionConfig::from_json(&config.image_encoder)?;
        let text = TextConfig::from_json(&config.text_encoder)?;
        check_size("embed_dim", config.embed_dim)?;
        if vision.channels() != 3 {
            return Err(LapsError::value("LapsConfig", "num_channels", 3, vision.channels()));
        }
        let sizes = [
            ("num_prefix_tokens", config.num_prefix_tokens, vision.prefix_tokens()),
            ("num_patches", config.num_patches, vision.side() * vision.side()),
            ("image_size", config.image_size, vision.image_size()),
        ];
        for (name, stated, own) in sizes {
            if stated != own {
                return Err(LapsError::value("LapsConfig", name, format!("the encoder's {own}"), stated));
            }
        }
        let projection = |at: Scope<'_>, from: i64, wanted: bool, side| -> Result<Option<Linear>> {
            if !wanted && from != config.embed_dim {
                let expected = format!("the {side} encoder's {from}, without a projection");
                return Err(LapsError::value("LapsConfig", "embed_dim", expected, config.embed_dim));
            }
            wanted.then(|| Linear::uniform(at, from, config.embed_dim)).transpose()
        };
        Ok(Modules {
            image_projection: projection(
                at.sub("image_encoder.projection"),
                vision.width(),
                config.image_projection,
                "image",
            )?,
            vision: Vision::new(at.sub("image_encoder.backbone"), &vision)?,
            text_projection: projection(
                at.sub("text_encoder.projection"),
                text.width(),
                config.text_projection,
                "text",
            )?,
            text: Text::new(at.sub("text_encoder.backbone"), &text)?,
            head: LapsHead::new(
                at.sub("head"),
                config.embed_dim,
                config.num_patches,
                config.num_prefix_tokens,
                &config.head_options,
            )?,
            objective: Objective::new(at.sub("objective"), &config.loss, config.head_options.max_score())?,
        })
    }
}
