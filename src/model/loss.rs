//! Losses over the scores of a batch: the same as `laps.objective.Objective`.

use tch::{Kind, Tensor};

use super::Result;
use super::config::{LossName, LossOptions};
use super::source::Scope;
use crate::error::LapsError;

const MARGIN: f64 = 0.2;
const TEMPERATURE: f64 = 0.07;
/// The highest 1 / temperature.
const MOST_SCALE: f64 = 100.0;
/// Of the distance-weighted draw (Wu et al., 2017): dimension of the sphere, floor of the distance, usual cutoff.
const DIMENSION: f64 = 512.0;
const LEAST_DISTANCE: f64 = 0.5;
const CUTOFF: f64 = 1.7;

/// What a model is trained for.
#[derive(Debug)]
pub struct Objective {
    options: LossOptions,
    max_score: f64,
    /// -log of InfoNCE's temperature.
    log_scale: Option<Tensor>,
}

impl Objective {
    /// `max_score` is the bound of the head's scores, unless the options state one.
    pub fn new(mut at: Scope<'_>, options: &LossOptions, max_score: f64) -> Result<Self> {
        options.check()?;
        let contrastive = options.name == LossName::InfoNce;
        let log_scale = contrastive
            .then(|| {
                let start = -options.temperature.unwrap_or(TEMPERATURE).ln();
                at.tensor("info_nce.log_scale", &[], tch::nn::Init::Const(start))
            })
            .transpose()?;
        Ok(Objective {
            options: options.clone(),
            max_score: options.max_score.unwrap_or(max_score),
            log_scale,
        })
    }

    pub fn options(&self) -> &LossOptions {
        &self.options
    }

    /// The parameter that the loss itself has, if any.
    pub fn parameter(&self) -> Option<&Tensor> {
        self.log_scale.as_ref()
    }

    /// The loss of scores (B, B) whose diagonal are the pairs of the batch; a number.
    ///
    /// `ids` (B,), int64, says which image each pair shows: pairs of the same image are never negatives. `warmup` is, in
    /// the first epoch, the share of its steps that are done: the hinge then sums over all negatives and is scaled by it.
    /// `kept` are the kept fractions (B, B) and the selection ratio that they are held to, in the paper variant.
    pub fn loss(
        &self,
        scores: &Tensor,
        ids: &Tensor,
        warmup: Option<f64>,
        kept: Option<(&Tensor, f64)>,
    ) -> Result<Tensor> {
        let (rows, columns) = scores.size2()?;
        if rows < 1 || rows != columns || ids.size() != [rows] {
            let got = format!("{:?} with ids {:?}", scores.size(), ids.size());
            return Err(LapsError::shape("loss", "scores", "(B, B) with ids (B,), B >= 1", got));
        }
        check_integers("loss", "ids", ids)?;
        if !scores.is_floating_point() {
            let got = format!("{:?}", scores.kind());
            return Err(LapsError::type_("loss", "scores", "floating", got));
        }
        if let Some(share) = warmup.filter(|share| !(0.0..=1.0).contains(share)) {
            return Err(LapsError::value("loss", "warmup", "0 to 1", share));
        }
        let ids = ids.f_to_device(scores.device())?;
        let same = ids.f_unsqueeze(1)?.f_eq_tensor(&ids.f_unsqueeze(0)?)?;
        let margin = self.options.margin.unwrap_or(MARGIN);
        let mut loss = match (self.options.name, &self.log_scale) {
            (LossName::Hinge, _) if warmup.is_none() => hardest(scores, &same, margin)?,
            (LossName::Hinge, _) => {
                all(scores, &same, margin)?.f_add(&all(&transposed(scores)?, &same, margin)?)?
            }
            (LossName::Triplet, _) => {
                let cutoff = self.options.cutoff.unwrap_or(CUTOFF);
                let draw = |scores: &Tensor| drawn(scores, &same, margin, self.max_score, cutoff);
                draw(scores)?.f_add(&draw(&transposed(scores)?)?)?
            }
            (LossName::InfoNce, Some(log_scale)) => {
                // The parameter itself is kept in range: a clamp inside the graph would stop its gradient for good.
                let _ = tch::no_grad(|| log_scale.shallow_clone().f_clamp_(0.0, MOST_SCALE.ln()))?;
                let logits = scores.f_mul(&log_scale.f_exp()?.f_to_device(scores.device())?)?;
                let both =
                    cross_entropy(&logits, &same)?.f_add(&cross_entropy(&transposed(&logits)?, &same)?)?;
                both.f_div_scalar(2.0)?
            }
            (LossName::InfoNce, None) => unreachable!("made with its parameter"),
        };
        if let Some(share) = warmup {
            loss = loss.f_mul_scalar(share)?;
        }
        if let Some((fraction, ratio)) = kept {
            let off = fraction.f_neg()?.f_add_scalar(ratio)?.f_square()?.f_mean(fraction.kind())?;
            loss = loss.f_add(&off.f_mul_scalar(self.options.ratio_weight)?)?;
        }
        Ok(loss)
    }
}

/// Refuses what would be cut to integers, or taken for them.
pub(super) fn check_integers(operation: &'static str, argument: &'static str, tensor: &Tensor) -> Result<()> {
    let integers = [Kind::Int64, Kind::Int, Kind::Int16, Kind::Int8, Kind::Uint8];
    if integers.contains(&tensor.kind()) {
        return Ok(());
    }
    Err(LapsError::type_(operation, argument, "integers", format!("{:?}", tensor.kind())))
}

fn transposed(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_transpose(0, 1)?)
}

/// Each pair against its hardest negative in both directions (VSE++).
fn hardest(scores: &Tensor, same: &Tensor, margin: f64) -> Result<Tensor> {
    let negatives = scores.f_masked_fill(same, f64::NEG_INFINITY)?;
    let positive = scores.f_diagonal(0, 0, 1)?;
    let direction = |axis: i64| -> Result<Tensor> {
        let most = negatives.f_amax([axis], false)?;
        Ok(most.f_sub(&positive)?.f_add_scalar(margin)?.f_relu()?.f_sum(scores.kind())?)
    };
    Ok(direction(1)?.f_add(&direction(0)?)?)
}

/// Each pair against all negatives of its row.
fn all(scores: &Tensor, same: &Tensor, margin: f64) -> Result<Tensor> {
    let positive = scores.f_diagonal(0, 0, 1)?.f_unsqueeze(1)?;
    let hinges = scores.f_sub(&positive)?.f_add_scalar(margin)?.f_relu()?;
    Ok(hinges.f_masked_fill(same, 0.0)?.f_sum(scores.kind())?)
}

/// Each pair against one negative of its row, drawn the more likely the rarer its distance is on a sphere.
fn drawn(scores: &Tensor, same: &Tensor, margin: f64, max_score: f64, cutoff: f64) -> Result<Tensor> {
    let cosines = scores.f_detach()?.f_to_kind(Kind::Double)?.f_div_scalar(max_score)?.f_clamp(-1.0, 1.0)?;
    let distance = cosines.f_mul_scalar(-2.0)?.f_add_scalar(2.0)?.f_sqrt()?.f_clamp_min(LEAST_DISTANCE)?;
    let rim = distance.f_square()?.f_div_scalar(-4.0)?.f_add_scalar(1.0)?.f_clamp_min(1e-12)?.f_log()?;
    let near = distance.f_log()?.f_mul_scalar(2.0 - DIMENSION)?;
    let log_weights = near.f_sub(&rim.f_mul_scalar((DIMENSION - 3.0) / 2.0)?)?;
    let out = same.f_logical_or(&distance.f_ge(cutoff)?)?;
    let log_weights = log_weights.f_masked_fill(&out, f64::NEG_INFINITY)?;
    // NaN cannot be drawn from, and must not vanish either: such a row's loss is NaN.
    let poisoned = log_weights.f_isnan()?.f_any_dim(1, false)?;
    let empty = log_weights.f_gt(f64::NEG_INFINITY)?.f_any_dim(1, false)?.f_logical_not()?;
    let undrawable = empty.f_logical_or(&poisoned)?;
    let weights = log_weights.f_masked_fill(&undrawable.f_unsqueeze(1)?, 0.0)?.f_softmax(1, Kind::Double)?;
    let index = weights.f_multinomial(1, false)?;
    let negative = scores.f_gather(1, &index, false)?.f_squeeze_dim(1)?;
    let hinges = negative.f_sub(&scores.f_diagonal(0, 0, 1)?)?.f_add_scalar(margin)?.f_relu()?;
    let hinges = hinges.f_masked_fill(&undrawable, 0.0)?.f_masked_fill(&poisoned, f64::NAN)?;
    Ok(hinges.f_sum(scores.kind())?)
}

/// Mean cross-entropy against equal shares of a row's positives.
fn cross_entropy(logits: &Tensor, same: &Tensor) -> Result<Tensor> {
    let log_probability =
        logits.f_log_softmax(1, logits.kind())?.f_masked_fill(&same.f_logical_not()?, 0.0)?;
    let positives = same.f_sum_dim_intlist(1i64, false, logits.kind())?;
    let per_row = log_probability.f_sum_dim_intlist(1i64, false, logits.kind())?.f_div(&positives)?;
    Ok(per_row.f_neg()?.f_mean(logits.kind())?)
}
