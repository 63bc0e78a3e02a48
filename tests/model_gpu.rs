//! The head on the kernels for GPUs, which tests/cuda runs on the CPU, beside the head on those for the CPU.

#![cfg(all(feature = "torch", feature = "cuda"))]

mod common;

use common::{batch, difference, python, run, scratch};
use laps::model::{Batch, Laps};
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
    for name in ["vit", "swin", "clip", "paper", "all patches"] {
        let place = folder.join(name);
        let (mut model, batch) = (Laps::from_pretrained(&place, Device::Cpu).unwrap(), batch(&place));
        let batch = Batch { pixels: batch.pixels.to_kind(Kind::Float), ..batch };
        let (expected, wanted) = (scores(&model, &batch), gradients(&model, &batch));
        model.head_mut().emulate_gpu().unwrap();
        compare(name, &model, &batch, &expected, &wanted);
        // One image and one caption at a time.
        model.head_mut().set_chunk(1);
        compare(name, &model, &batch, &expected, &wanted);
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
