//! The head on the kernels for GPUs, which tests/cuda runs on the CPU, beside the head on those for the CPU.

#![cfg(all(feature = "torch", feature = "cuda"))]

mod common;

use common::{MODELS, batch, difference, python, run, scratch};
use laps::LapsError;
use laps::model::{Batch, ImageFeatures, Laps, TextFeatures};
use tch::{Device, Kind, Tensor};

/// Scores of all pairs and of the diagonal, without gradient.
fn scores(model: &Laps, batch: &Batch) -> [Tensor; 2] {
    let images = model.encode_image(&batch.pixels, false).unwrap();
    let texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
    let pairs = model.head().similarity_pairwise(&images, &texts).unwrap().scores;
    [model.similarity(&images, &texts).unwrap(), pairs]
}

/// The gradient of every parameter after one step; the draws follow seed 3.
fn gradients(model: &Laps, batch: &Batch) -> Vec<(String, Tensor)> {
    tch::manual_seed(3);
    for mut tensor in model.variables.trainable_variables() {
        tensor.zero_grad();
    }
    model.loss(batch, None).unwrap().backward();
    let mut grads: Vec<_> =
        model.variables.variables().into_iter().map(|(name, tensor)| (name, tensor.grad().copy())).collect();
    grads.sort_by(|a, b| a.0.cmp(&b.0));
    grads
}

#[test]
fn scores_and_gradients_are_those_of_the_cpu() {
    let folder = scratch("gpu");
    let code = "import sys; from pathlib import Path; from _cuda_emulator import build; import _rust_models; \
                out = Path(sys.argv[1]); _rust_models.write(out); \
                print(*(f'{name}={value}' for name, value in build(out).items()), sep='\\n')";
    let made = run(python().args(["-c", code]).arg(&folder).env("PYTHONPATH", "tests"));
    for line in made.lines() {
        let Some((name, value)) = line.split_once('=').filter(|(name, _)| name.starts_with("LAPS_")) else {
            continue;
        };
        // SAFETY: the only test of this binary; nothing else runs yet that could read the environment.
        unsafe { std::env::set_var(name, value) };
    }
    for name in MODELS {
        let place = folder.join(name);
        let (mut model, batch) = (Laps::from_pretrained(&place, Device::Cpu).unwrap(), batch(&place));
        let batch = Batch { pixels: batch.pixels.to_kind(Kind::Float), ..batch };
        let (expected, wanted) = (scores(&model, &batch), gradients(&model, &batch));
        model.head_mut().emulate_gpu().unwrap();
        compare(name, &model, &batch, &expected, &wanted);
        // One image and one caption at a time.
        model.head_mut().set_chunk(Some(1)).unwrap();
        compare(name, &model, &batch, &expected, &wanted);
        model.head_mut().set_chunk(None).unwrap();
        halves(name, &model, &batch);
        wrong_shapes(&model, &batch);
    }
}

fn compare(name: &str, model: &Laps, batch: &Batch, expected: &[Tensor; 2], wanted: &[(String, Tensor)]) {
    for (ours, theirs) in scores(model, batch).iter().zip(expected) {
        assert!(difference(ours, theirs) < 1e-6, "{name}: {ours} {theirs}");
    }
    let largest = wanted.iter().map(|(_, grad)| grad.abs().max().double_value(&[])).fold(0.0, f64::max);
    for ((parameter, ours), (_, theirs)) in gradients(model, batch).iter().zip(wanted) {
        let error = difference(ours, theirs) / largest;
        assert!(error < 1e-5, "{name}: {parameter} differs by {error}");
    }
}

/// Features of a batch as leaves of a graph, in another dtype.
fn leaves(model: &Laps, batch: &Batch, kind: Kind) -> (ImageFeatures, TextFeatures) {
    let images = model.encode_image(&batch.pixels, false).unwrap();
    let texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
    let leaf = |tensor: &Tensor| tensor.detach().to_kind(kind).set_requires_grad(true);
    let images = ImageFeatures {
        patches: leaf(&images.patches),
        prefix: leaf(&images.prefix),
        logits: leaf(&images.logits),
        keep_probability: images.keep_probability.as_ref().map(leaf),
    };
    (images, TextFeatures { words: leaf(&texts.words), lengths: texts.lengths })
}

/// Scores, and the gradients of their sum weighted by place, of features that were rounded to `kind` and are kept as `kept`.
fn rounded(model: &Laps, batch: &Batch, kind: Kind, kept: Kind) -> Vec<Tensor> {
    let (mut images, mut texts) = leaves(model, batch, kind);
    let leaf = |tensor: &Tensor| tensor.detach().to_kind(kept).set_requires_grad(true);
    for tensor in [&mut images.patches, &mut images.prefix, &mut images.logits, &mut texts.words] {
        *tensor = leaf(tensor);
    }
    images.keep_probability = images.keep_probability.as_ref().map(leaf);
    tch::manual_seed(3);
    let (scored, scores) = model.head().training_scores(&images, &texts).unwrap();
    let weights = Tensor::arange(16, (Kind::Float, Device::Cpu)).view([4, 4]) / 16.0;
    scored.carry(&weights, None).unwrap().backward();
    vec![scores.scores, images.patches.grad(), images.prefix.grad(), images.logits.grad(), texts.words.grad()]
}

/// Half precision differs from floats of the same rounded features by its own rounding only; and where a word has two tokens
/// that are best to the last digit, by which of them its gradient goes to, which three quarters of the images do not see.
fn halves(name: &str, model: &Laps, batch: &Batch) {
    for (kind, tolerance) in [(Kind::Half, 1e-3), (Kind::BFloat16, 6e-3)] {
        let (exact, ours) = (rounded(model, batch, kind, Kind::Float), rounded(model, batch, kind, kind));
        for (index, (ours, exact)) in ours.iter().zip(&exact).enumerate().filter(|(_, (x, _))| x.numel() > 0)
        {
            let errors = (ours.to_kind(Kind::Float) - exact).abs() / exact.abs().max();
            let share = if index == 0 { 1.0 } else { 0.7 };
            let error = errors.quantile_scalar(share, None, false, "linear").double_value(&[]);
            assert!(error < tolerance, "{name}, {kind:?}: {index} differs by {error}");
        }
    }
}

fn wrong_shapes(model: &Laps, batch: &Batch) {
    let fails = |change: fn(&mut ImageFeatures, &mut TextFeatures)| {
        let (mut images, mut texts) = leaves(model, batch, Kind::Float);
        change(&mut images, &mut texts);
        let error = model.similarity(&images, &texts).expect_err("a refusal");
        assert!(matches!(error, LapsError::Shape { .. } | LapsError::Value { .. }), "{error}");
    };
    fails(|images, _| images.patches = images.patches.select(0, 0));
    fails(|images, _| images.patches = images.patches.narrow(0, 0, 0));
    fails(|images, _| images.prefix = images.prefix.narrow(2, 0, 3));
    fails(|images, _| images.logits = images.logits.narrow(1, 0, 3));
    fails(|_, texts| texts.words = texts.words.narrow(2, 0, 3));
    fails(|_, texts| texts.lengths = texts.lengths.narrow(0, 0, 1));
    fails(|_, texts| texts.lengths = texts.lengths.zeros_like());
    fails(|_, texts| texts.lengths = &texts.lengths + 100);
}
