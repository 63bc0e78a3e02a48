//! `laps._laps.similarity_forward` and `similarity_backward`.

use std::sync::atomic::AtomicBool;

use ndarray::{Array3, Axis, Ix1, Ix2, Ix3};
use pyo3::prelude::*;

use super::gate;
use super::options::SimilarityOptions;
use super::tensors::{Element, Tensor};
use crate::error::LapsError;
use crate::slimming::{self, GradientsMut, Options, PairInput, Pairs, Real, Saved, Selection};

/// The input of both calls, imported.
struct Arguments {
    operation: &'static str,
    patches: Tensor,
    words: Tensor,
    word_lengths: Tensor,
    logits: Tensor,
    prefix: Option<Tensor>,
    keep_prob: Option<Tensor>,
    mask: Option<Tensor>,
    seed: Option<u64>,
    options: Options,
    prefix_rows: usize,
    pairs: Pairs,
}

type Object<'a, 'py> = &'a Bound<'py, PyAny>;

impl Arguments {
    #[allow(clippy::too_many_arguments)]
    fn import(
        operation: &'static str,
        patches: Object<'_, '_>,
        words: Object<'_, '_>,
        word_lengths: Object<'_, '_>,
        logits: Object<'_, '_>,
        prefix: Option<Object<'_, '_>>,
        keep_prob: Option<Object<'_, '_>>,
        mask: Option<Object<'_, '_>>,
        seed: Option<i128>,
        options: &SimilarityOptions,
        pairwise: bool,
    ) -> PyResult<Self> {
        let import = |object: Object<'_, '_>, name| Tensor::import(object, operation, name);
        let maybe = |object: Option<Object<'_, '_>>, name| object.map(|o| import(o, name)).transpose();
        let arguments = Arguments {
            operation,
            patches: import(patches, "patches")?,
            words: import(words, "words")?,
            word_lengths: import(word_lengths, "word_lengths")?,
            logits: import(logits, "logits")?,
            prefix: maybe(prefix, "prefix")?,
            keep_prob: maybe(keep_prob, "keep_prob")?,
            mask: maybe(mask, "mask")?,
            // Python's and torch's negative seeds wrap.
            seed: seed.map(|seed| seed as u64),
            options: options.core,
            prefix_rows: options.prefix_rows,
            pairs: if pairwise { Pairs::Diagonal } else { Pairs::All },
        };
        if arguments.keep_prob.is_some() && arguments.mask.is_some() {
            let error = LapsError::value(operation, "mask", "keep_prob or mask, not both", "both");
            return Err(error.into());
        }
        let rows = arguments.patches.shape().get(1).copied().unwrap_or(0);
        if arguments.prefix_rows > 0 && (arguments.prefix.is_some() || arguments.prefix_rows >= rows) {
            let (expected, got) = ("fewer than the rows of patches, and no prefix", arguments.prefix_rows);
            return Err(LapsError::value(operation, "num_prefix_tokens", expected, got).into());
        }
        Ok(arguments)
    }

    /// About what the call costs, for [`gate::run`].
    fn work(&self) -> f64 {
        let product = |shape: Vec<usize>| shape.iter().map(|&d| d as f64).product::<f64>();
        let texts = if self.pairs == Pairs::All { product(self.words.shape()) } else { 1e4 };
        product(self.patches.shape()) * texts / 1e3
    }

    /// Hands the input to `job` as arrays of `T`.
    fn with_input<T: Real + Element, R>(
        &self,
        stop: &AtomicBool,
        job: impl FnOnce(&PairInput<'_, T>) -> Result<R, LapsError>,
    ) -> Result<R, LapsError> {
        let patches = self.patches.input::<T, Ix3>()?;
        let words = self.words.input::<T, Ix3>()?;
        let word_lengths = self.word_lengths.input::<i64, Ix1>()?;
        let logits = self.logits.input::<T, Ix3>()?;
        let prefix = self.prefix.as_ref().map(|p| p.input::<T, Ix3>()).transpose()?;
        let keep_prob = self.keep_prob.as_ref().map(|k| k.input::<T, Ix2>()).transpose()?;
        let diagonal = self.pairs == Pairs::Diagonal;
        let (hard, soft, soft_row);
        let selection = match (&self.mask, &keep_prob) {
            (None, None) => Selection::Scores,
            (_, Some(probability)) => {
                Selection::KeepProbability { probability: probability.view(), seed: self.seed }
            }
            (Some(mask), None) if mask.is_bool() => {
                hard = match diagonal {
                    true => mask.booleans::<Ix2>()?.insert_axis(Axis(1)),
                    false => mask.booleans::<Ix3>()?,
                };
                Selection::Mask(hard.view())
            }
            (Some(mask), None) if diagonal => {
                soft_row = mask.input::<T, Ix2>()?;
                Selection::SoftMask(soft_row.view().insert_axis(Axis(1)))
            }
            (Some(mask), None) => {
                soft = mask.input::<T, Ix3>()?;
                Selection::SoftMask(soft.view())
            }
        };
        // No leading rows are an empty prefix.
        let (leading, patches) = patches.view().split_at(Axis(1), self.prefix_rows);
        job(&PairInput {
            patches,
            prefix: prefix.as_ref().map_or(leading, |p| p.view()),
            words: words.view(),
            word_lengths: word_lengths.view(),
            logits: logits.view(),
            selection,
            pairs: self.pairs,
            interrupt: Some(stop),
        })
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        [&self.patches, &self.words, &self.word_lengths, &self.logits]
            .into_iter()
            .chain(&self.prefix)
            .chain(&self.keep_prob)
            .chain(&self.mask)
    }

    /// Refuses outputs that share memory with the input or each other.
    fn check_outputs<'a>(&self, outputs: impl Iterator<Item = &'a Tensor>) -> Result<(), LapsError> {
        let mut taken: Vec<&Tensor> = self.tensors().collect();
        for output in outputs {
            let span = output.span();
            let overlaps = |other: &&&Tensor| {
                let other = other.span();
                span.start < other.end && other.start < span.end
            };
            if let Some(other) = taken.iter().find(overlaps) {
                let got = format!("memory shared with {}", other.argument());
                return Err(LapsError::value(self.operation, output.argument(), "memory of its own", got));
            }
            taken.push(output);
        }
        Ok(())
    }
}

/// Runs `$body` with `$t` as the element type of `$tensor`.
macro_rules! with_float {
    ($operation:expr, $tensor:expr, $t:ident => $body:expr) => {
        match $tensor.dtype().as_str() {
            "float32" => {
                type $t = f32;
                $body
            }
            "float64" => {
                type $t = f64;
                $body
            }
            got => Err(LapsError::type_($operation, "patches", "float32 or float64", got).into()),
        }
    };
}
pub(super) use with_float;

fn copy<E: Element, const N: usize>(
    out: &mut Tensor,
    shape: [usize; N],
    operation: &'static str,
    from: impl Iterator<Item = E>,
) -> Result<(), LapsError>
where
    ndarray::Dim<[usize; N]>: ndarray::Dimension,
{
    let argument = out.argument();
    let mut view = out.output::<E, ndarray::Dim<[usize; N]>>()?;
    if view.shape() != shape {
        let got = slimming::shape(view.shape());
        return Err(LapsError::shape(operation, argument, slimming::shape(&shape), got));
    }
    view.iter_mut().zip(from).for_each(|(o, x)| *o = x);
    Ok(())
}

/// Copies to an output of one row per pair, or per image of the diagonal.
fn copy_pairs<E: Element>(
    out: &mut Tensor,
    pairs: Pairs,
    operation: &'static str,
    from: &Array3<E>,
) -> Result<(), LapsError> {
    let (images, texts, width) = from.dim();
    match pairs {
        Pairs::All => copy(out, [images, texts, width], operation, from.iter().copied()),
        Pairs::Diagonal => copy(out, [images, width], operation, from.iter().copied()),
    }
}

#[pyfunction]
#[pyo3(signature = (patches, words, word_lengths, logits, prefix, keep_prob, mask, seed, options, pairwise, num_threads,
    out_scores, out_kept_fraction, out_selection, out_best_token, out_best_word))]
#[allow(clippy::too_many_arguments)]
pub(super) fn similarity_forward(
    py: Python<'_>,
    patches: Object<'_, '_>,
    words: Object<'_, '_>,
    word_lengths: Object<'_, '_>,
    logits: Object<'_, '_>,
    prefix: Option<Object<'_, '_>>,
    keep_prob: Option<Object<'_, '_>>,
    mask: Option<Object<'_, '_>>,
    seed: Option<i128>,
    options: &SimilarityOptions,
    pairwise: bool,
    num_threads: usize,
    out_scores: Object<'_, '_>,
    out_kept_fraction: Object<'_, '_>,
    out_selection: Option<Object<'_, '_>>,
    out_best_token: Option<Object<'_, '_>>,
    out_best_word: Option<Object<'_, '_>>,
) -> PyResult<()> {
    let operation = "similarity";
    let arguments = Arguments::import(
        operation,
        patches,
        words,
        word_lengths,
        logits,
        prefix,
        keep_prob,
        mask,
        seed,
        options,
        pairwise,
    )?;
    let out = |object, name| Tensor::import(object, operation, name);
    let mut scores = out(out_scores, "out_scores")?;
    let mut fraction = out(out_kept_fraction, "out_kept_fraction")?;
    let mut saved = match (out_selection, out_best_token, out_best_word) {
        (Some(selection), Some(token), Some(word)) => Some([
            out(selection, "out_selection")?,
            out(token, "out_best_token")?,
            out(word, "out_best_word")?,
        ]),
        _ => None,
    };
    arguments.check_outputs([&scores, &fraction].into_iter().chain(saved.iter().flatten()))?;
    with_float!(operation, arguments.patches, T => {
        let work = arguments.work();
        gate::run(py, num_threads, work, |stop| {
            let result = arguments.with_input::<T, _>(stop, |input| {
                slimming::similarity(input, &arguments.options, saved.is_some())
            })?;
            let (images, texts) = result.scores.dim();
            for (out, from) in [(&mut scores, &result.scores), (&mut fraction, &result.kept_fraction)] {
                match arguments.pairs {
                    Pairs::All => copy(out, [images, texts], operation, from.iter().copied())?,
                    Pairs::Diagonal => copy(out, [images], operation, from.iter().copied())?,
                }
            }
            if let (Some([selection, token, word]), Some(from)) = (&mut saved, &result.saved) {
                copy_pairs(selection, arguments.pairs, operation, &from.selection)?;
                copy_pairs(token, arguments.pairs, operation, &from.best_token)?;
                copy_pairs(word, arguments.pairs, operation, &from.best_word)?;
            }
            Ok(())
        })
    })
}

/// An imported array of one row per pair, with the diagonal's missing axis put in.
fn load_pairs<E: Element>(tensor: &Tensor, pairs: Pairs) -> Result<Array3<E>, LapsError> {
    Ok(match pairs {
        Pairs::All => tensor.input::<E, Ix3>()?.view().to_owned(),
        Pairs::Diagonal => tensor.input::<E, Ix2>()?.view().to_owned().insert_axis(Axis(1)),
    })
}

fn load_grads<E: Element>(tensor: &Tensor, pairs: Pairs) -> Result<ndarray::Array2<E>, LapsError> {
    Ok(match pairs {
        Pairs::All => tensor.input::<E, Ix2>()?.view().to_owned(),
        Pairs::Diagonal => tensor.input::<E, Ix1>()?.view().to_owned().insert_axis(Axis(1)),
    })
}

#[pyfunction]
#[pyo3(signature = (patches, words, word_lengths, logits, prefix, keep_prob, mask, seed, options, pairwise, num_threads,
    selection, best_token, best_word, grad_scores, grad_kept_fraction, out_grad_patches, out_grad_words, out_grad_logits,
    out_grad_prefix, out_grad_keep_prob, out_grad_mask))]
#[allow(clippy::too_many_arguments)]
pub(super) fn similarity_backward(
    py: Python<'_>,
    patches: Object<'_, '_>,
    words: Object<'_, '_>,
    word_lengths: Object<'_, '_>,
    logits: Object<'_, '_>,
    prefix: Option<Object<'_, '_>>,
    keep_prob: Option<Object<'_, '_>>,
    mask: Option<Object<'_, '_>>,
    seed: Option<i128>,
    options: &SimilarityOptions,
    pairwise: bool,
    num_threads: usize,
    selection: Object<'_, '_>,
    best_token: Object<'_, '_>,
    best_word: Object<'_, '_>,
    grad_scores: Object<'_, '_>,
    grad_kept_fraction: Option<Object<'_, '_>>,
    out_grad_patches: Object<'_, '_>,
    out_grad_words: Object<'_, '_>,
    out_grad_logits: Object<'_, '_>,
    out_grad_prefix: Option<Object<'_, '_>>,
    out_grad_keep_prob: Option<Object<'_, '_>>,
    out_grad_mask: Option<Object<'_, '_>>,
) -> PyResult<()> {
    let operation = "similarity_backward";
    let arguments = Arguments::import(
        operation,
        patches,
        words,
        word_lengths,
        logits,
        prefix,
        keep_prob,
        mask,
        seed,
        options,
        pairwise,
    )?;
    let import = |object: Object<'_, '_>, name| Tensor::import(object, operation, name);
    let maybe = |object: Option<Object<'_, '_>>, name| object.map(|o| import(o, name)).transpose();
    let selection = import(selection, "selection")?;
    let best_token = import(best_token, "best_token")?;
    let best_word = import(best_word, "best_word")?;
    let grad_scores = import(grad_scores, "grad_scores")?;
    let grad_fraction = maybe(grad_kept_fraction, "grad_kept_fraction")?;
    let mut grad_patches = import(out_grad_patches, "out_grad_patches")?;
    let mut grad_words = import(out_grad_words, "out_grad_words")?;
    let mut grad_logits = import(out_grad_logits, "out_grad_logits")?;
    let mut grad_prefix = maybe(out_grad_prefix, "out_grad_prefix")?;
    let mut grad_keep_prob = maybe(out_grad_keep_prob, "out_grad_keep_prob")?;
    let mut grad_mask = maybe(out_grad_mask, "out_grad_mask")?;
    if arguments.prefix_rows > 0 && grad_prefix.is_some() {
        let expected = "none beside num_prefix_tokens: these rows of out_grad_patches";
        return Err(LapsError::value(operation, "out_grad_prefix", expected, "one").into());
    }
    let outputs = [&grad_patches, &grad_words, &grad_logits].into_iter();
    arguments.check_outputs(outputs.chain(&grad_prefix).chain(&grad_keep_prob).chain(&grad_mask))?;
    with_float!(operation, arguments.patches, T => {
        let pairs = arguments.pairs;
        gate::run(py, num_threads, 3.0 * arguments.work(), |stop| {
            let saved = Saved {
                selection: load_pairs(&selection, pairs)?,
                best_token: load_pairs(&best_token, pairs)?,
                best_word: load_pairs(&best_word, pairs)?,
            };
            let grad_scores = load_grads::<T>(&grad_scores, pairs)?;
            let grad_fraction = grad_fraction.as_ref().map(|g| load_grads::<T>(g, pairs)).transpose()?;
            arguments.with_input::<T, _>(stop, |input| {
                // Gradients that nobody wants still have a place to go.
                let (got, expected) = (grad_patches.shape(), arguments.patches.shape());
                if got != expected {
                    let (expected, got) = (slimming::shape(&expected), slimming::shape(&got));
                    return Err(LapsError::shape(operation, "out_grad_patches", expected, got));
                }
                let (leading, patches) =
                    grad_patches.output::<T, Ix3>()?.split_at(Axis(1), arguments.prefix_rows);
                let apart = if arguments.prefix_rows > 0 { 0 } else { input.prefix.dim().1 };
                let (images, _, channels) = input.prefix.dim();
                let mut unwanted_prefix = Array3::zeros((images, apart, channels));
                let prefix = match &mut grad_prefix {
                    Some(prefix) => prefix.output::<T, Ix3>()?,
                    None if arguments.prefix_rows > 0 => leading,
                    None => unwanted_prefix.view_mut(),
                };
                let mut unwanted_keep = match (&input.selection, &grad_keep_prob) {
                    (Selection::KeepProbability { probability, .. }, None) => {
                        Some(ndarray::Array2::zeros(probability.dim()))
                    }
                    _ => None,
                };
                let keep_probability = match &mut grad_keep_prob {
                    Some(keep) => Some(keep.output::<T, Ix2>()?),
                    None => unwanted_keep.as_mut().map(|k| k.view_mut()),
                };
                let mask = match (&mut grad_mask, pairs) {
                    (None, _) => None,
                    (Some(mask), Pairs::All) => Some(mask.output::<T, Ix3>()?),
                    (Some(mask), Pairs::Diagonal) => Some(mask.output::<T, Ix2>()?.insert_axis(Axis(1))),
                };
                let mut out = GradientsMut {
                    patches,
                    prefix,
                    words: grad_words.output()?,
                    logits: grad_logits.output()?,
                    keep_probability,
                    mask,
                };
                let grad_fraction = grad_fraction.as_ref().map(|g| g.view());
                slimming::similarity_backward(
                    input, &arguments.options, &saved, grad_scores.view(), grad_fraction, &mut out,
                )
            })
        })
    })
}
