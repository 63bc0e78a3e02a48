//! config.json of a LAPS model, as the Python package writes it.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Result;
use crate::error::LapsError;
use crate::slimming::{Directions, Options, Sampling, Score};

const FORMAT: u32 = 1;

/// Everything but the weights, the tokenizer and the transform.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LapsConfig {
    laps_format: u32,
    /// The values of a transformers configuration.
    pub image_encoder: Value,
    pub text_encoder: Value,
    /// C
    pub embed_dim: i64,
    /// P
    pub num_prefix_tokens: i64,
    /// N
    pub num_patches: i64,
    /// S in pixels
    pub image_size: i64,
    /// Whether a linear map leads from the image backbone's own size to C.
    #[serde(default = "yes")]
    pub image_projection: bool,
    #[serde(default = "yes")]
    pub text_projection: bool,
    #[serde(default = "laps")]
    head: String,
    #[serde(default)]
    pub head_options: HeadOptions,
    #[serde(default)]
    pub loss: LossOptions,
}

fn yes() -> bool {
    true
}

/// What a file that does not say means.
fn two() -> Option<f64> {
    Some(2.0)
}

fn laps() -> String {
    "laps".to_owned()
}

impl LapsConfig {
    /// Of encoders (the values of their transformers configurations), with the published head and loss.
    pub fn new(image_encoder: Value, text_encoder: Value, embed_dim: i64) -> Result<Self> {
        let vision = super::VisionConfig::from_json(&image_encoder)?;
        Ok(LapsConfig {
            laps_format: FORMAT,
            image_encoder,
            text_encoder,
            embed_dim,
            num_prefix_tokens: vision.prefix_tokens(),
            num_patches: vision.side() * vision.side(),
            image_size: vision.image_size(),
            image_projection: true,
            text_projection: true,
            head: laps(),
            head_options: HeadOptions::default(),
            loss: LossOptions::default(),
        })
    }

    /// Of the JSON object; `file` is for errors.
    pub(super) fn from_json(json: Value, file: &std::path::Path) -> Result<Self> {
        let expected = "the config.json of a laps model";
        if json.get("laps_format").and_then(Value::as_u64) != Some(u64::from(FORMAT)) {
            let problem = format!("has no \"laps_format\": {FORMAT}");
            return Err(LapsError::file("LapsConfig", file, problem, expected));
        }
        let config: LapsConfig = serde_json::from_value(json)
            .map_err(|error| LapsError::file("LapsConfig", file, format!("is wrong: {error}"), expected))?;
        if config.head != "laps" {
            return Err(LapsError::value("LapsConfig", "head", "laps, the head that Rust has", config.head));
        }
        Ok(config)
    }
}

/// What patches are selected by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SelectBy {
    /// The image and the caption.
    Text,
    /// The image alone.
    Image,
    /// Nothing: all are kept, and there is no fused token.
    None,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// What the published code computes.
    Released,
    /// What the paper describes: a score net takes part in the selection, which is sampled in training.
    Paper,
}

/// The options of the head, under the names and with the defaults of `laps.nn.LAPSHead`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadOptions {
    pub selection_ratio: f64,
    pub aggregation_ratio: f64,
    pub variant: Variant,
    #[serde(with = "Direction")]
    pub directions: Directions,
    pub direction_reduction: DirectionReduction,
    /// None: 0.1 released, 1 paper.
    pub negative_slope: Option<f64>,
    pub selection: SelectBy,
    pub fusion: bool,
    pub attention_weight: f64,
    #[serde(with = "Likeness")]
    pub score: Score,
    #[serde(with = "Draw")]
    pub sampling: Sampling,
    pub temperature: f64,
}

impl Default for HeadOptions {
    fn default() -> Self {
        HeadOptions {
            selection_ratio: 0.5,
            aggregation_ratio: 0.4,
            variant: Variant::Released,
            directions: Directions::Both,
            direction_reduction: DirectionReduction::Sum,
            negative_slope: None,
            selection: SelectBy::Text,
            fusion: true,
            attention_weight: 0.8,
            score: Score::Cosine,
            sampling: Sampling::Gumbel,
            temperature: 1.0,
        }
    }
}

impl HeadOptions {
    /// As the kernels take them.
    pub fn kernel_options(&self) -> Options {
        let slope = if self.variant == Variant::Paper { 1.0 } else { 0.1 };
        Options {
            selection_ratio: if self.selection == SelectBy::None { 1.0 } else { self.selection_ratio },
            directions: self.directions,
            mean_of_directions: self.direction_reduction == DirectionReduction::Mean,
            negative_slope: self.negative_slope.unwrap_or(slope),
            fusion: self.fusion,
            language_context: self.selection == SelectBy::Text,
            attention_weight: self.attention_weight,
            score: self.score,
            sampling: self.sampling,
            temperature: self.temperature,
            ..Options::default()
        }
    }

    /// Whether a score net takes part in the selection.
    pub fn has_score_net(&self) -> bool {
        self.variant == Variant::Paper && self.selection != SelectBy::None
    }

    /// Refuses values outside their ranges, naming the first.
    pub fn check(&self) -> Result<()> {
        let ratio = self.aggregation_ratio;
        if !(ratio > 0.0 && ratio <= 1.0) {
            let expected = "0 < aggregation_ratio <= 1";
            return Err(LapsError::value("LapsHead", "aggregation_ratio", expected, ratio));
        }
        self.kernel_options().check("LapsHead")
    }

    /// The bound of the scores: two directions summed, or one cosine.
    pub fn max_score(&self) -> f64 {
        let summed = self.direction_reduction == DirectionReduction::Sum;
        if self.directions == Directions::Both && summed { 2.0 } else { 1.0 }
    }

    /// N_c of `patches` patches.
    pub fn aggregated(&self, patches: i64) -> Result<i64> {
        // The order of this product is part of the definition: another one rounds to another N_c.
        let count = (patches as f64 * self.aggregation_ratio * self.selection_ratio) as i64;
        if count < 1 {
            let got = format!("int({patches} * {} * {})", self.aggregation_ratio, self.selection_ratio);
            return Err(LapsError::value("LapsHead", "aggregation_ratio", "N_c >= 1", got));
        }
        Ok(count)
    }
}

/// What becomes of the two directions of the alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DirectionReduction {
    Sum,
    Mean,
}

// The kernels' own enums, which know nothing of JSON, under Python's names.

#[derive(Serialize, Deserialize)]
#[serde(remote = "Directions", rename_all = "snake_case")]
enum Direction {
    Both,
    PatchToWord,
    WordToPatch,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Score", rename_all = "snake_case")]
enum Likeness {
    Cosine,
    Dot,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Sampling")]
enum Draw {
    #[serde(rename = "gumbel")]
    Gumbel,
    #[serde(rename = "topk")]
    TopK,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LossName {
    /// Against the hardest negative.
    Hinge,
    /// Against a negative that is drawn by its distance.
    Triplet,
    InfoNce,
}

/// The options of the loss, under the names and with the defaults of `laps.objective.Objective`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossOptions {
    pub name: LossName,
    /// Of hinge and triplet; None: 0.2.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
    /// The initial one of InfoNCE; None: 0.07.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// Of triplet: the distance beyond which no negative is drawn; None: 1.7.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cutoff: Option<f64>,
    /// Of the ratio loss (paper variant).
    pub ratio_weight: f64,
    /// The bound of the scores; None: [`HeadOptions::max_score`].
    #[serde(default = "two")]
    pub max_score: Option<f64>,
}

impl LossOptions {
    /// Refuses values outside their ranges, and what the loss does not have, naming the first.
    pub fn check(&self) -> Result<()> {
        let refuse =
            |argument, expected: &str, got| Err(LapsError::value("Objective", argument, expected, got));
        let contrastive = self.name == LossName::InfoNce;
        match (self.margin, self.temperature) {
            (Some(margin), _) if contrastive => {
                return refuse("margin", "another loss than InfoNCE, or none", margin);
            }
            (Some(margin), _) if !(margin >= 0.0 && margin.is_finite()) => {
                return refuse("margin", "0 <= margin < inf", margin);
            }
            (_, Some(temperature)) if !contrastive => {
                return refuse("temperature", "the loss InfoNCE, or none", temperature);
            }
            (_, Some(temperature)) if !(temperature > 0.0 && temperature.is_finite()) => {
                return refuse("temperature", "0 < temperature < inf", temperature);
            }
            _ => {}
        }
        match self.cutoff {
            Some(cutoff) if self.name != LossName::Triplet => {
                return refuse("cutoff", "the loss triplet, or none", cutoff);
            }
            // Distances have a floor of 0.5, at which all weights would end.
            Some(cutoff) if !(cutoff > 0.5 && cutoff <= 2.0) => {
                return refuse("cutoff", "0.5 < cutoff <= 2", cutoff);
            }
            _ => {}
        }
        if !(self.ratio_weight >= 0.0 && self.ratio_weight.is_finite()) {
            return refuse("ratio_weight", "0 <= ratio_weight < inf", self.ratio_weight);
        }
        match self.max_score {
            Some(most) if !(most > 0.0 && most.is_finite()) => {
                refuse("max_score", "0 < max_score < inf", most)
            }
            _ => Ok(()),
        }
    }
}

impl Default for LossOptions {
    fn default() -> Self {
        LossOptions {
            name: LossName::Hinge,
            margin: None,
            temperature: None,
            cutoff: None,
            ratio_weight: 1.0,
            max_score: None,
        }
    }
}
