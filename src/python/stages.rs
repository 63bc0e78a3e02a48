//! `laps._laps`: the single stages and max_sim.

use ndarray::{ArrayView3, Ix1, Ix2, Ix3, Ix4};
use numpy::{PyArray2, PyArray3, PyArray4};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use super::gate;
use super::options::{SimilarityOptions, score as parse_score};
use super::similarity::with_float;
use super::tensors::Tensor;
use crate::error::LapsError;
use crate::slimming;

type Object<'a, 'py> = &'a Bound<'py, PyAny>;

/// About what `pairs` of this many multiplications cost, for [`gate::run`].
fn work(a: &Tensor, b: &Tensor) -> f64 {
    let product = |t: &Tensor| t.shape().iter().map(|&d| d as f64).product::<f64>();
    product(a) * product(b) / 1e3
}

#[pyfunction]
pub(super) fn max_sim(
    py: Python<'_>,
    patches: Object<'_, '_>,
    words: Object<'_, '_>,
    word_lengths: Object<'_, '_>,
    num_threads: usize,
    out_scores: Object<'_, '_>,
) -> PyResult<()> {
    let operation = "max_sim";
    let patches = Tensor::import(patches, operation, "patches")?;
    let words = Tensor::import(words, operation, "words")?;
    let lengths = Tensor::import(word_lengths, operation, "word_lengths")?;
    let mut out = Tensor::import(out_scores, operation, "out_scores")?;
    with_float!(operation, patches, T => gate::run(py, num_threads, 0.0, |_| {
        let (patches, words) = (patches.input::<T, Ix3>()?, words.input::<T, Ix3>()?);
        let scores = slimming::max_sim(patches.view(), words.view(), lengths.input::<i64, Ix1>()?.view())?;
        let mut out = out.output::<T, Ix2>()?;
        if out.dim() != scores.dim() {
            let (expected, got) = (slimming::shape(scores.shape()), slimming::shape(out.shape()));
            return Err(LapsError::shape(operation, "out_scores", expected, got));
        }
        out.assign(&scores);
        Ok(())
    }))
}

#[pyfunction]
pub(super) fn selection_scores<'py>(
    py: Python<'py>,
    patches: Object<'_, 'py>,
    words: Object<'_, 'py>,
    word_lengths: Object<'_, 'py>,
    language_context: bool,
    score: &str,
    num_threads: usize,
) -> PyResult<Bound<'py, PyAny>> {
    let operation = "selection_scores";
    let patches = Tensor::import(patches, operation, "patches")?;
    let words = Tensor::import(words, operation, "words")?;
    let lengths = Tensor::import(word_lengths, operation, "word_lengths")?;
    let score = parse_score(score)?;
    with_float!(operation, patches, T => {
        let scores = gate::run(py, num_threads, work(&patches, &words), |_| {
            let (patches, words) = (patches.input::<T, Ix3>()?, words.input::<T, Ix3>()?);
            let lengths = lengths.input::<i64, Ix1>()?;
            slimming::selection_scores(patches.view(), words.view(), lengths.view(), language_context, score)
        })?;
        Ok(PyArray3::from_owned_array(py, scores).into_any())
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn select_patches<'py>(
    py: Python<'py>,
    patches: Object<'_, 'py>,
    words: Object<'_, 'py>,
    word_lengths: Object<'_, 'py>,
    selection_ratio: f64,
    language_context: bool,
    score: &str,
    num_threads: usize,
) -> PyResult<Bound<'py, PyArray3<i64>>> {
    let operation = "select_patches";
    let patches = Tensor::import(patches, operation, "patches")?;
    let words = Tensor::import(words, operation, "words")?;
    let lengths = Tensor::import(word_lengths, operation, "word_lengths")?;
    let score = parse_score(score)?;
    with_float!(operation, patches, T => {
        let indices = gate::run(py, num_threads, work(&patches, &words), |_| {
            let (patches, words) = (patches.input::<T, Ix3>()?, words.input::<T, Ix3>()?);
            let (lengths, rho) = (lengths.input::<i64, Ix1>()?, selection_ratio);
            let (patches, words) = (patches.view(), words.view());
            slimming::select_patches(patches, words, lengths.view(), rho, language_context, score)
        })?;
        Ok(PyArray3::from_owned_array(py, indices))
    })
}

#[pyfunction]
#[allow(clippy::too_many_arguments)]
pub(super) fn calibrate_patches<'py>(
    py: Python<'py>,
    patches: Object<'_, 'py>,
    logits: Object<'_, 'py>,
    mask: Object<'_, 'py>,
    scores: Object<'_, 'py>,
    prefix: Option<Object<'_, 'py>>,
    fusion: bool,
    num_threads: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let operation = "calibrate_patches";
    let patches = Tensor::import(patches, operation, "patches")?;
    let logits = Tensor::import(logits, operation, "logits")?;
    let mask = Tensor::import(mask, operation, "mask")?;
    let scores = Tensor::import(scores, operation, "scores")?;
    let prefix = prefix.map(|prefix| Tensor::import(prefix, operation, "prefix")).transpose()?;
    with_float!(operation, patches, T => {
        let (tokens, counts) = gate::run(py, num_threads, work(&patches, &scores), |_| {
            let (patches, logits) = (patches.input::<T, Ix3>()?, logits.input::<T, Ix3>()?);
            let (mask, scores) = (mask.booleans::<Ix3>()?, scores.input::<T, Ix3>()?);
            let (images, _, channels) = patches.view().dim();
            let none = ArrayView3::from_shape((images, 0, channels), &[]).expect("no elements");
            let prefix = prefix.as_ref().map(|prefix| prefix.input::<T, Ix3>()).transpose()?;
            let prefix = prefix.as_ref().map_or(none, |prefix| prefix.view());
            let (patches, logits) = (patches.view(), logits.view());
            slimming::calibrate_patches(patches, prefix, logits, mask.view(), scores.view(), fusion)
        })?;
        let tokens = PyArray4::from_owned_array(py, tokens).into_any();
        (tokens, PyArray2::from_owned_array(py, counts)).into_pyobject(py)
    })
}

#[pyfunction]
pub(super) fn align_patches_words<'py>(
    py: Python<'py>,
    tokens: Object<'_, 'py>,
    words: Object<'_, 'py>,
    word_lengths: Object<'_, 'py>,
    token_counts: Option<Object<'_, 'py>>,
    options: &SimilarityOptions,
    num_threads: usize,
) -> PyResult<Bound<'py, PyTuple>> {
    let operation = "align_patches_words";
    let tokens = Tensor::import(tokens, operation, "tokens")?;
    let words = Tensor::import(words, operation, "words")?;
    let lengths = Tensor::import(word_lengths, operation, "word_lengths")?;
    let counts = token_counts.map(|c| Tensor::import(c, operation, "token_counts")).transpose()?;
    let options = &options.core;
    with_float!(operation, tokens, T => {
        let (scores, alignment) = gate::run(py, num_threads, work(&tokens, &words), |_| {
            let (tokens, words) = (tokens.input::<T, Ix4>()?, words.input::<T, Ix3>()?);
            let counts = counts.as_ref().map(|counts| counts.input::<i64, Ix2>()).transpose()?;
            let counts = counts.as_ref().map(|counts| counts.view());
            let lengths = lengths.input::<i64, Ix1>()?;
            slimming::align_patches_words(tokens.view(), counts, words.view(), lengths.view(), options)
        })?;
        let scores = PyArray2::from_owned_array(py, scores).into_any();
        (scores, PyArray4::from_owned_array(py, alignment)).into_pyobject(py)
    })
}
