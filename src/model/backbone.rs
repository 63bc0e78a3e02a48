//! The encoders that this crate has, chosen by the `model_type` of a Hugging Face configuration.

use serde::de::DeserializeOwned;
use serde_json::Value;
use tch::{Kind, Tensor};

use super::Result;
use super::bert::{Bert, BertConfig};
use super::clip::{ClipText, ClipTextConfig, ClipVision, ClipVisionConfig};
use super::source::Scope;
use super::swin::{Swin, SwinConfig};
use super::vit::{Vit, VitConfig};
use crate::error::LapsError;

/// Configuration of an image encoder.
#[derive(Clone, Debug)]
pub enum VisionConfig {
    Vit(VitConfig),
    Swin(SwinConfig),
    Clip(ClipVisionConfig),
}

/// Configuration of a text encoder.
#[derive(Clone, Debug)]
pub enum TextConfig {
    Bert(BertConfig),
    Clip(ClipTextConfig),
}

impl VisionConfig {
    /// Of the JSON object that transformers writes.
    pub fn from_json(json: &Value) -> Result<Self> {
        check_values(json)?;
        let config = match model_type(json)? {
            "vit" => VisionConfig::Vit(parse(json)?),
            "swin" => VisionConfig::Swin(parse(json)?),
            "clip_vision_model" => VisionConfig::Clip(parse(json)?),
            other => {
                let expected = "vit, swin or clip_vision_model";
                return Err(LapsError::value("encoder config", "model_type", expected, other));
            }
        };
        match &config {
            VisionConfig::Vit(config) => config.check()?,
            VisionConfig::Swin(config) => config.check()?,
            VisionConfig::Clip(config) => config.check()?,
        }
        Ok(config)
    }

    /// S in pixels.
    pub fn image_size(&self) -> i64 {
        match self {
            VisionConfig::Vit(config) => config.image_size,
            VisionConfig::Swin(config) => config.image_size,
            VisionConfig::Clip(config) => config.image_size,
        }
    }

    /// P.
    pub fn prefix_tokens(&self) -> i64 {
        match self {
            VisionConfig::Vit(_) | VisionConfig::Clip(_) => 1,
            VisionConfig::Swin(_) => 0,
        }
    }

    /// Patches along a side of the image; N is its square.
    pub fn side(&self) -> i64 {
        match self {
            VisionConfig::Vit(config) => config.side(),
            VisionConfig::Swin(config) => config.side(),
            VisionConfig::Clip(config) => config.side(),
        }
    }

    /// 3 for colours.
    pub fn channels(&self) -> i64 {
        match self {
            VisionConfig::Vit(config) => config.num_channels,
            VisionConfig::Swin(config) => config.num_channels,
            VisionConfig::Clip(config) => config.num_channels,
        }
    }

    /// D of the tokens.
    pub fn width(&self) -> i64 {
        match self {
            VisionConfig::Vit(config) => config.hidden_size,
            VisionConfig::Swin(config) => config.width(),
            VisionConfig::Clip(config) => config.projection_dim,
        }
    }

    /// Positions along a side of the table of position embeddings.
    pub(crate) fn position_side(&self) -> i64 {
        match self {
            VisionConfig::Swin(config) => config.image_size / config.patch_size,
            _ => self.side(),
        }
    }

    /// The table of position embeddings, if the resolution decides its size.
    pub(crate) fn positions(&self) -> Option<&'static str> {
        match self {
            VisionConfig::Vit(_) => Some("embeddings.position_embeddings"),
            VisionConfig::Clip(_) => Some("vision_model.embeddings.position_embedding.weight"),
            VisionConfig::Swin(config) => {
                config.use_absolute_embeddings.then_some("embeddings.position_embeddings")
            }
        }
    }
}

impl TextConfig {
    /// Of the JSON object that transformers writes.
    pub fn from_json(json: &Value) -> Result<Self> {
        check_values(json)?;
        let config = match model_type(json)? {
            "bert" => TextConfig::Bert(parse(json)?),
            "clip_text_model" => TextConfig::Clip(parse(json)?),
            other => {
                let expected = "bert or clip_text_model";
                return Err(LapsError::value("encoder config", "model_type", expected, other));
            }
        };
        match &config {
            TextConfig::Bert(config) => config.check()?,
            TextConfig::Clip(config) => config.check()?,
        }
        Ok(config)
    }

    /// The most tokens of a caption.
    pub fn max_length(&self) -> i64 {
        match self {
            TextConfig::Bert(config) => config.max_position_embeddings,
            TextConfig::Clip(config) => config.max_position_embeddings,
        }
    }

    pub fn vocab_size(&self) -> i64 {
        match self {
            TextConfig::Bert(config) => config.vocab_size,
            TextConfig::Clip(config) => config.vocab_size,
        }
    }

    /// D of the tokens.
    pub fn width(&self) -> i64 {
        match self {
            TextConfig::Bert(config) => config.hidden_size,
            TextConfig::Clip(config) => config.projection_dim,
        }
    }
}

fn model_type(json: &Value) -> Result<&str> {
    json.get("model_type").and_then(Value::as_str).ok_or_else(|| {
        LapsError::value("encoder config", "model_type", "a string, such as vit or bert", "nothing")
    })
}

fn parse<T: DeserializeOwned>(json: &Value) -> Result<T> {
    serde_json::from_value(json.clone())
        .map_err(|error| LapsError::value("encoder config", "a value", "those of the encoders here", error))
}

/// Refuses what would change the computation elsewhere and is not known here, and numbers outside their ranges.
fn check_values(json: &Value) -> Result<()> {
    let heads = || {
        Some(
            json.get("hidden_size")?
                .as_i64()?
                .checked_div(json.get("num_attention_heads")?.as_i64()?)?
                .into(),
        )
    };
    let looks_back = model_type(json)? == "clip_text_model";
    let usual = [
        ("is_causal", Some(Value::from(looks_back))),
        ("is_decoder", Some(false.into())),
        ("add_cross_attention", Some(false.into())),
        ("position_embedding_type", Some("absolute".into())),
        ("head_dim", heads()),
        ("pruned_heads", Some(Value::Object(serde_json::Map::new()))),
    ];
    let given = |name: &str| json.get(name).filter(|value| !value.is_null());
    for (name, expected) in usual {
        if let Some(got) = given(name).filter(|&got| Some(got) != expected.as_ref()) {
            let expected = expected.map_or("none".to_owned(), |value| value.to_string());
            return Err(LapsError::value("encoder config", name, expected, got));
        }
    }
    let shares =
        ["hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout", "drop_path_rate"];
    let sizes = ["layer_norm_eps", "initializer_range", "initializer_factor"];
    let ranges = shares.map(|name| (name, 1.0, "0 to 1")).into_iter();
    for (name, most, expected) in ranges.chain(sizes.map(|name| (name, f64::MAX, "0 or more"))) {
        if let Some(got) = given(name).and_then(Value::as_f64).filter(|got| !(0.0..=most).contains(got)) {
            return Err(LapsError::value("encoder config", name, expected, got));
        }
    }
    Ok(())
}

/// Refuses sizes that no model has, before memory is asked for.
pub(super) fn check_size(name: &'static str, size: i64) -> Result<()> {
    const MOST: i64 = 1 << 24;
    if (1..=MOST).contains(&size) {
        return Ok(());
    }
    Err(LapsError::value("encoder config", name, format!("1 to {MOST}"), size))
}

pub(super) fn check_layers(layers: usize, hidden: i64) -> Result<()> {
    check_size("intermediate_size", hidden)?;
    if layers > 1 << 10 {
        return Err(LapsError::value("encoder config", "num_hidden_layers", "at most 1024", layers));
    }
    Ok(())
}

/// Refuses an image without patches, or with more than attention could take.
pub(super) fn check_image(image_size: i64, patch_size: i64, channels: i64) -> Result<()> {
    const MOST: i64 = 1 << 14;
    check_size("num_channels", channels)?;
    if patch_size < 1 || image_size < patch_size || image_size > MOST {
        let expected = format!("1 <= patch_size <= image_size <= {MOST}");
        let got = format!("{image_size} and patch_size {patch_size}");
        return Err(LapsError::value("encoder config", "image_size", expected, got));
    }
    Ok(())
}

/// Refuses images of another size than the positions are for.
pub(super) fn check_pixels(pixels: &Tensor, image_size: i64) -> Result<()> {
    if pixels.dim() != 4 || pixels.size()[2..] != [image_size, image_size] {
        let expected = format!("(B, 3, {image_size}, {image_size})");
        return Err(LapsError::shape("encoder", "pixels", expected, format!("{:?}", pixels.size())));
    }
    Ok(())
}

/// Refuses a size that the heads of an attention cannot share.
pub(super) fn check_heads(size: i64, heads: i64) -> Result<()> {
    check_size("hidden_size", size)?;
    if size < 1 || heads < 1 || size % heads != 0 {
        let expected = format!("a divisor of the hidden size {size}");
        return Err(LapsError::value("encoder config", "num_attention_heads", expected, heads));
    }
    Ok(())
}

/// Pixels to tokens.
#[derive(Debug)]
pub enum Vision {
    Vit(Vit),
    Swin(Swin),
    Clip(ClipVision),
}

impl Vision {
    pub fn new(at: Scope<'_>, config: &VisionConfig) -> Result<Self> {
        Ok(match config {
            VisionConfig::Vit(config) => Vision::Vit(Vit::new(at, config)?),
            VisionConfig::Swin(config) => Vision::Swin(Swin::new(at, config)?),
            VisionConfig::Clip(config) => Vision::Clip(ClipVision::new(at, config)?),
        })
    }

    /// Pixels (B, 3, S, S) to tokens (B, P + N, D), prefix first. `train` switches dropout and stochastic depth on.
    pub fn forward(&self, pixels: &Tensor, train: bool) -> Result<Tensor> {
        match self {
            Vision::Vit(vit) => vit.forward(pixels, train),
            Vision::Swin(swin) => swin.forward(pixels, train),
            Vision::Clip(clip) => clip.forward(pixels, train),
        }
    }
}

/// Token ids to tokens.
#[derive(Debug)]
pub enum Text {
    Bert(Bert),
    Clip(ClipText),
}

impl Text {
    pub fn new(at: Scope<'_>, config: &TextConfig) -> Result<Self> {
        Ok(match config {
            TextConfig::Bert(config) => Text::Bert(Bert::new(at, config)?),
            TextConfig::Clip(config) => Text::Clip(ClipText::new(at, config)?),
        })
    }

    /// Ids (B, L) and lengths (B,), int64, to tokens (B, L, D). Rows past a length are undefined. `train` switches
    /// dropout on.
    pub fn forward(&self, ids: &Tensor, lengths: &Tensor, train: bool) -> Result<Tensor> {
        let (_, longest) = ids.size2()?;
        let lengths = lengths.f_to_device(ids.device())?.f_unsqueeze(1)?;
        let mask = Tensor::f_arange(longest, (Kind::Int64, ids.device()))?.f_lt_tensor(&lengths)?;
        self.forward_masked(ids, Some(&mask), train)
    }

    /// The same with a mask (B, L), bool, true where a token may be looked at; None where all may. CLIP's tokens look back
    /// only: it takes no notice of a mask, which must be padding at the end.
    pub fn forward_masked(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        match self {
            Text::Bert(bert) => bert.forward(ids, mask, train),
            Text::Clip(clip) => clip.forward(ids, train),
        }
    }

    /// Whether tokens look back only.
    pub fn is_causal(&self) -> bool {
        matches!(self, Text::Clip(_))
    }
}
