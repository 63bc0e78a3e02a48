//! `laps._laps.SimilarityOptions`.

use pyo3::prelude::*;

use crate::error::LapsError;
use crate::slimming::{Directions, Options, Sampling, Score};

const OPERATION: &str = "SimilarityOptions";

/// The settings of a similarity call, checked.
#[pyclass(frozen, module = "laps._laps", name = "SimilarityOptions")]
pub(super) struct SimilarityOptions {
    pub(super) core: Options,
    /// Leading rows of `patches` that are prefix tokens; 0 where these are an argument of their own.
    pub(super) prefix_rows: usize,
}

fn choose<V: Copy>(argument: &'static str, value: &str, choices: &[(&str, V)]) -> Result<V, LapsError> {
    match choices.iter().find(|(name, _)| *name == value) {
        Some((_, choice)) => Ok(*choice),
        None => {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            Err(LapsError::value(OPERATION, argument, names.join(" | "), format!("{value:?}")))
        }
    }
}

pub(super) fn score(value: &str) -> Result<Score, LapsError> {
    choose("score", value, &[("cosine", Score::Cosine), ("dot", Score::Dot)])
}

#[pymethods]
impl SimilarityOptions {
    #[new]
    #[pyo3(signature = (*, selection_ratio, directions="both", direction_reduction="sum", negative_slope=0.1,
        fusion=true, language_context=true, attention_weight=0.8, score="cosine", sampling="gumbel",
        temperature=1.0, chunk=None, num_prefix_tokens=0))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        selection_ratio: f64,
        directions: &str,
        direction_reduction: &str,
        negative_slope: f64,
        fusion: bool,
        language_context: bool,
        attention_weight: f64,
        score: &str,
        sampling: &str,
        temperature: f64,
        chunk: Option<i64>,
        num_prefix_tokens: i64,
    ) -> PyResult<Self> {
        let directions = choose(
            "directions",
            directions,
            &[
                ("both", Directions::Both),
                ("patch_to_word", Directions::PatchToWord),
                ("word_to_patch", Directions::WordToPatch),
            ],
        )?;
        let reductions = [("sum", false), ("mean", true)];
        let sampling =
            choose("sampling", sampling, &[("gumbel", Sampling::Gumbel), ("topk", Sampling::TopK)])?;
        let core = Options {
            selection_ratio,
            directions,
            mean_of_directions: choose("direction_reduction", direction_reduction, &reductions)?,
            negative_slope,
            fusion,
            language_context,
            attention_weight,
            score: self::score(score)?,
            sampling,
            temperature,
            chunk: chunk.map(|bytes| usize::try_from(bytes).unwrap_or(0)),
        };
        core.check(OPERATION)?;
        let prefix_rows = usize::try_from(num_prefix_tokens)
            .map_err(|_| LapsError::value(OPERATION, "num_prefix_tokens", "at least 0", num_prefix_tokens))?;
        Ok(SimilarityOptions { core, prefix_rows })
    }

    fn __repr__(&self) -> String {
        format!("{:?}, prefix_rows: {}", self.core, self.prefix_rows)
    }
}
