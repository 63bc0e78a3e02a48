//! The full model on tch beside the Python package: the same folders, the same scores, the same training steps.
//!
//! Python (with torch and this package: `make test`) makes the models first: tests/_rust_models.py.

#![cfg(feature = "torch")]

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use common::{MODELS, batch, difference, named, python, run, scratch};
use laps::LapsError;
use laps::model::{
    BACKBONE_GROUP, Batch, CaptionTokenizer, Checkpoint, DirectionReduction, Half, ImageFeatures,
    ImageTransform, Interpolation, Laps, LapsConfig, LossName, LossOptions, TextFeatures,
};
use tch::nn::{OptimizerConfig, Sgd};
use tch::{Device, Kind, Tensor};

/// The folder with the models, made once for all tests of this process.
fn models() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = scratch("models");
        run(python().arg("tests/_rust_models.py").arg(&folder));
        folder
    })
}

/// Whoever draws holds this: all tests share torch's generator, and one of them needs its numbers in order.
fn drawing() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

fn scores(model: &Laps, batch: &Batch) -> Tensor {
    tch::no_grad(|| {
        let images = model.encode_image(&batch.pixels, false).unwrap();
        let texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
        model.similarity(&images, &texts).unwrap()
    })
}

#[test]
fn a_folder_of_python_gives_the_same_scores() {
    for name in MODELS {
        let folder = models().join(name);
        let (mut model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
        let expected = named(folder.join("expected.safetensors"));
        let narrow = difference(&scores(&model, &batch), &expected("scores32"));
        assert!(narrow < 1e-5, "{name}: {narrow} in f32");
        model.variables.double();
        let wide = difference(&scores(&model, &batch), &expected("scores64"));
        assert!(wide < 1e-9, "{name}: {wide} in f64");
    }
}

#[test]
fn pair_by_pair_is_the_diagonal() {
    let folder = models().join("vit");
    let (model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
    let images = model.encode_image(&batch.pixels, false).unwrap();
    let texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
    let all = model.similarity(&images, &texts).unwrap();
    let pairs = model.head().similarity_pairwise(&images, &texts).unwrap().scores;
    assert!(difference(&pairs, &all.diagonal(0, 0, 1)) < 1e-6);
}

#[test]
fn two_steps_of_training_give_the_weights_that_python_has_then() {
    let _alone = drawing();
    for name in MODELS {
        let folder = models().join(name);
        let (mut model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
        model.variables.double();
        let expected = named(folder.join("expected.safetensors"));
        let mut optimizer = Sgd::default().build(&model.variables, 0.01).unwrap();
        tch::manual_seed(3);
        let mut losses = Vec::new();
        for _ in 0..2 {
            let loss = model.loss(&batch, None).unwrap();
            optimizer.backward_step(&loss);
            losses.push(loss.double_value(&[]));
        }
        let error = difference(&Tensor::from_slice(&losses), &expected("losses"));
        assert!(error < 1e-9, "{name}: losses {losses:?} differ by {error}");
        for (parameter, tensor) in model.variables.variables() {
            let error = difference(&tensor, &expected(&format!("after.{parameter}")));
            assert!(error < 1e-9, "{name}: {parameter} differs by {error}");
        }
    }
}

#[test]
fn python_reads_what_was_saved_here() {
    for name in ["vit", "clip", "paper"] {
        let (source, folder) = (models().join(name), scratch(&format!("saved {name}")));
        let model = Laps::from_pretrained(&source, Device::Cpu).unwrap();
        model.save_pretrained(&folder).unwrap();
        let again = Laps::from_pretrained(&folder, Device::Cpu).unwrap();
        let batch = batch(&source);
        assert_eq!(difference(&scores(&again, &batch), &scores(&model, &batch)), 0.0);
        let code = "import sys, laps; a, b = map(laps.LAPS.from_pretrained, sys.argv[1:]); \
                    assert a.config == b.config and a.transform == b.transform; \
                    assert a.tokenizer.encode(['a red circle']).input_ids.equal( \
                        b.tokenizer.encode(['a red circle']).input_ids); b = b.state_dict(); \
                    assert all((b[k] == v).all() for k, v in a.state_dict().items())";
        run(python().args(["-c", code]).args([&source, &folder]));
    }
}

#[test]
fn a_saved_model_stays_whole_when_saving_fails() {
    let folder = scratch("full");
    let model = Laps::from_pretrained(models().join("vit"), Device::Cpu).unwrap();
    model.save_pretrained(&folder).unwrap();
    let before = std::fs::read(folder.join("model.safetensors")).unwrap();
    // A folder where the new config should go.
    std::fs::remove_file(folder.join("config.json")).unwrap();
    std::fs::create_dir_all(folder.join("config.json").join("x")).unwrap();
    let error = model.save_pretrained(&folder).unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("cannot be written"), "{error}");
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), before);
    let names = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
    let partial = names.filter(|name| name.to_string_lossy().contains("partial"));
    assert_eq!(partial.count(), 0, "nothing half-written is left");
}

#[test]
fn captions_and_images_become_what_python_makes_of_them() {
    let folder = models().join("vit");
    let captions = ["a red circle", "two dotted triangles above it", "unseen wörds, too"];
    let image = folder.join("photo.png");
    let out = scratch("inputs").join("expected.safetensors");
    let code = "import sys, torch, PIL.Image, laps; from safetensors.torch import save_file; \
                torch.manual_seed(0); \
                pixels = torch.nn.functional.interpolate(torch.rand(1, 4, 9, 11), (61, 83), mode='bilinear')[0]; \
                pixels = (pixels * 255).byte().permute(1, 2, 0).contiguous().numpy(); \
                PIL.Image.fromarray(pixels, 'RGBA').save(sys.argv[2]); \
                model = laps.LAPS.from_pretrained(sys.argv[1]); \
                tokens = model.tokenizer.encode(sys.argv[4:]); \
                pixels = model.transform.eval()(laps.data.open_image(sys.argv[2])).contiguous(); \
                save_file(dict(ids=tokens.input_ids, lengths=tokens.lengths, pixels=pixels), sys.argv[3])";
    run(python().args(["-W", "ignore", "-c", code]).args([&folder, &image, &out]).args(captions));
    let expected = named(out);
    let tokenizer = CaptionTokenizer::from_file(folder.join("tokenizer.json"), 512).unwrap();
    let (ids, lengths) = tokenizer.encode(&captions).unwrap();
    assert_eq!((ids, lengths), (expected("ids"), expected("lengths")));
    let model = Laps::from_pretrained(&folder, Device::Cpu).unwrap();
    let pixels = model.transform.load(&image).unwrap();
    assert_eq!(model.encode_captions(&captions, 2).unwrap().lengths, expected("lengths"));
    assert_eq!(model.encode_files(&[&image, &image, &image], 2).unwrap().patches.size()[0], 3);
    // Steps of 255, by the smallest standard deviation: one of compositing, one of resizing.
    let steps = difference(&pixels, &expected("pixels")) * 255.0 * 0.224;
    assert!(steps < 2.01, "{steps} of 255");
}

#[test]
fn hard_edges_are_resized_as_pillow_does() {
    let (source, folder) = (models().join("vit"), scratch("edges"));
    let code = "import sys, numpy, PIL.Image, laps; from safetensors.torch import save_file; \
                random = numpy.random.default_rng(0); out = sys.argv[2] + '/'; \
                images = {f'{w}x{h}': random.integers(0, 2, (h, w, 3)).astype('u1') * 255 \
                          for w, h in [(50, 40), (90, 200), (2, 3), (32, 70), (31, 33)]}; \
                [PIL.Image.fromarray(p).save(f'{out}{n}.png') for n, p in images.items()]; \
                transform = laps.LAPS.from_pretrained(sys.argv[1]).transform.eval(); \
                save_file({n: transform(laps.data.open_image(f'{out}{n}.png')).contiguous() for n in images}, \
                          out + 'expected.safetensors')";
    run(python().args(["-c", code]).args([&source, &folder]));
    let (expected, model) =
        (named(folder.join("expected.safetensors")), Laps::from_pretrained(&source, Device::Cpu).unwrap());
    for name in ["50x40", "90x200", "2x3", "32x70", "31x33"] {
        let pixels = model.transform.load(folder.join(format!("{name}.png"))).unwrap();
        let steps = difference(&pixels, &expected(name)) * 255.0 * 0.229;
        assert!(steps < 2.01, "{name}: {steps} of 255");
    }
}

#[test]
fn a_transform_is_read_from_what_lies_with_an_encoder() {
    let folder = scratch("preprocessor");
    let code = "import sys; from transformers import CLIPImageProcessor as C, ViTImageProcessor as V; \
                V().save_pretrained(sys.argv[1] + '/vit'); C().save_pretrained(sys.argv[1] + '/clip')";
    run(python().args(["-W", "ignore", "-c", code]).arg(&folder));
    let read =
        |name: &str| ImageTransform::from_preprocessor(folder.join(name).join("preprocessor_config.json"));
    let vit = read("vit").unwrap();
    assert_eq!((vit.image_size, vit.mean, vit.std), (224, [0.5; 3], [0.5; 3]));
    assert_eq!(vit.interpolation, Interpolation::Bilinear);
    let clip = read("clip").unwrap();
    assert_eq!(clip.interpolation, Interpolation::Bicubic);
    assert!((clip.mean[0] - 0.4814).abs() < 1e-3);
    std::fs::write(folder.join("vit/preprocessor_config.json"), r#"{"size": {"height": 224, "width": 192}}"#)
        .unwrap();
    assert!(read("vit").unwrap_err().to_string().contains("not a square"));
}

#[test]
fn what_python_would_refuse_is_neither_built_nor_saved() {
    let _alone = drawing();
    let source = models().join("vit");
    let load = || Laps::from_pretrained(&source, Device::Cpu).unwrap();
    let refused = |error: LapsError, wanted: &str| assert!(error.to_string().contains(wanted), "{error}");
    for (name, value) in
        [("aggregation_ratio", 1.5), ("aggregation_ratio", f64::NAN), ("selection_ratio", 0.0)]
    {
        let mut config = load().config().clone();
        if name == "selection_ratio" {
            config.head_options.selection_ratio = value;
        } else {
            config.head_options.aggregation_ratio = value;
        }
        refused(Laps::new(config, Device::Cpu).unwrap_err(), name);
    }
    let mut config = load().config().clone();
    config.image_encoder["num_channels"] = 1.into();
    refused(Laps::new(config, Device::Cpu).unwrap_err(), "num_channels");
    let folder = scratch("unsaved");
    let saves = |change: fn(&mut ImageTransform), wanted: &str| {
        let mut model = load();
        change(&mut model.transform);
        refused(model.save_pretrained(&folder).unwrap_err(), wanted);
        refused(model.encode_files(&["photo.png"], 1).unwrap_err(), wanted);
    };
    saves(|transform| transform.image_size = 64, "image_size");
    saves(|transform| transform.image_size = 0, "image_size");
    saves(|transform| transform.mean[1] = f64::NAN, "mean");
    saves(|transform| transform.std[1] = 0.0, "std");
    saves(|transform| transform.flip = 7.0, "flip");
    saves(|transform| transform.crop_scale = Some([5.0, -1.0]), "crop_scale");
    let mut small = load().config().clone();
    small.text_encoder["vocab_size"] = 10.into();
    let mut model = Laps::new(small, Device::Cpu).unwrap();
    model.tokenizer = load().tokenizer;
    refused(model.save_pretrained(&folder).unwrap_err(), "tokenizer");
    refused(model.encode_captions(&["a"], 1).unwrap_err(), "tokenizer");
    assert!(std::fs::read_dir(&folder).unwrap().next().is_none(), "nothing was written");
}

#[test]
fn the_bound_of_the_scores_follows_the_head() {
    let _alone = drawing();
    let mut config = Laps::from_pretrained(models().join("vit"), Device::Cpu).unwrap().config().clone();
    config.loss = LossOptions { name: LossName::Triplet, ..LossOptions::default() };
    let bound = |config: &LapsConfig| {
        let model = Laps::new(config.clone(), Device::Cpu).unwrap();
        model.config().loss.max_score.unwrap()
    };
    assert_eq!(bound(&config), 2.0);
    config.head_options.direction_reduction = DirectionReduction::Mean;
    assert_eq!(bound(&config), 1.0);
    config.loss.max_score = Some(1.5);
    assert_eq!(bound(&config), 1.5);
}

/// Runs an example that cargo has built beside the tests.
fn example(name: &str, arguments: &[&std::ffi::OsStr]) -> std::process::Output {
    let folder = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("examples");
    Command::new(folder.join(name)).args(arguments).output().unwrap()
}

#[test]
fn the_examples_run() {
    let (model, image) = (models().join("vit"), scratch("example").join("photo.png"));
    let code = "import sys, PIL.Image; PIL.Image.new('RGB', (40, 30), 'red').save(sys.argv[1])";
    run(python().args(["-c", code]).arg(&image));
    let scored = example("score", &[model.as_ref(), image.as_ref(), "a red circle".as_ref(), "a".as_ref()]);
    let lines = String::from_utf8(scored.stdout).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines.len(), 2, "{}", String::from_utf8_lossy(&scored.stderr));
    let score = |line: &str| line.split("  ").next().unwrap().parse::<f64>().unwrap();
    assert!(score(lines[0]) >= score(lines[1]));
    let failed = example("score", &[model.as_ref(), "nowhere.png".as_ref(), "a".as_ref()]);
    assert!(!failed.status.success());
    assert!(String::from_utf8_lossy(&failed.stderr).contains("nowhere.png cannot be read"));
    let trained = example("train", &["2".as_ref()]);
    assert!(String::from_utf8_lossy(&trained.stdout).contains("step    2"));
}

#[test]
fn what_does_not_fit_is_an_error_that_names_it() {
    let (source, folder) = (models().join("vit"), scratch("broken"));
    let fails = |wanted: &[&str]| {
        let error = Laps::from_pretrained(&folder, Device::Cpu).expect_err("an error").to_string();
        assert!(wanted.iter().all(|part| error.contains(part)), "{error}");
    };
    fails(&["config.json", "does not exist"]);
    std::fs::copy(source.join("config.json"), folder.join("config.json")).unwrap();
    fails(&["model.safetensors", "does not exist"]);
    std::fs::write(folder.join("model.safetensors"), b"no tensors").unwrap();
    fails(&["model.safetensors", "cannot be read"]);
    let mut tensors = Tensor::read_safetensors(source.join("model.safetensors")).unwrap();
    tensors.retain(|(name, _)| name != "head.aggregation.scale");
    tensors.push(("head.mystery".to_owned(), Tensor::from(1.0)));
    let wide = tensors.iter_mut().find(|(name, _)| name == "image_encoder.projection.bias").unwrap();
    wide.1 = Tensor::zeros([7], (tch::Kind::Float, Device::Cpu));
    Tensor::write_safetensors(&tensors, folder.join("model.safetensors")).unwrap();
    fails(&[
        "missing: head.aggregation.scale",
        "unexpected: head.mystery",
        "of another shape: image_encoder.projection.bias [7], not [24]",
    ]);
    std::fs::write(folder.join("config.json"), r#"{"laps_format": 1, "surprise": 2}"#).unwrap();
    fails(&["config.json", "surprise"]);
    std::fs::write(folder.join("config.json"), r#"{"model_type": "vit"}"#).unwrap();
    fails(&["config.json", "laps_format"]);
}

#[test]
fn wrong_shapes_are_errors_and_no_panics() {
    let folder = models().join("vit");
    let (model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
    let error = model.encode_image(&batch.pixels.narrow(2, 0, 16), false).unwrap_err().to_string();
    assert!(error.contains("expected (B_v >= 1, 3, 32, 32)"), "{error}");
    let error = model.encode_text(&batch.ids, &batch.lengths.narrow(0, 0, 2), false).unwrap_err();
    assert!(matches!(error, LapsError::Shape { .. }), "{error}");
    let images = model.encode_image(&batch.pixels, false).unwrap();
    let mut texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
    texts.words = texts.words.select(1, 0);
    let error = model.similarity(&images, &texts).unwrap_err().to_string();
    assert!(error.contains("rank 3"), "{error}");
    let text =
        |ids: &Tensor, lengths: &Tensor| model.encode_text(ids, lengths, false).unwrap_err().to_string();
    assert!(text(&(&batch.ids + 1_000_000), &batch.lengths).contains("ids is out of range"));
    assert!(text(&batch.ids, &batch.lengths.zeros_like()).contains("lengths is out of range"));
    assert!(text(&batch.ids, &batch.lengths.to_kind(Kind::Float)).contains("lengths has the wrong type"));
    let error = model.encode_image(&batch.pixels.to_kind(Kind::Int64), false).unwrap_err();
    assert!(matches!(error, LapsError::Type { .. }), "{error}");
    assert!(model.encode_image(&batch.pixels.narrow(0, 0, 0), false).is_err());
    let short = Batch { pixels: batch.pixels.narrow(0, 0, 3), ..clone(&batch) };
    let error = model.loss(&short, None).unwrap_err().to_string();
    assert!(error.contains("has shape [3, 4, 4, 4]"), "{error}");
    let loss =
        |scores: &Tensor, ids: &Tensor, warmup| model.objective().loss(scores, ids, warmup, None).is_err();
    let (scores, ids) = (Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)), &batch.images);
    assert!(!loss(&scores, ids, Some(1.0)));
    assert!(loss(&scores, ids, Some(-1.0)) && loss(&scores, ids, Some(f64::NAN)));
    assert!(loss(&scores.to_kind(Kind::Int64), ids, None) && loss(&scores, &ids.to_kind(Kind::Float), None));
    assert!(loss(&scores.narrow(0, 0, 0).narrow(1, 0, 0), &ids.narrow(0, 0, 0), None));
    // Features that another head made.
    for other in ["swin", "paper", "image"] {
        let model = Laps::from_pretrained(models().join(other), Device::Cpu).unwrap();
        let texts = model.encode_text(&batch.ids, &batch.lengths, false).unwrap();
        let result = model.similarity(&images, &texts);
        assert_eq!(result.is_ok(), other == "image", "{other}");
    }
    assert!(
        TextFeatures::cat(&[TextFeatures { words: ids.shallow_clone(), lengths: ids.shallow_clone() }])
            .is_err()
    );
}

fn clone(batch: &Batch) -> Batch {
    let Batch { pixels, ids, lengths, images } = batch;
    let same = |tensor: &Tensor| tensor.shallow_clone();
    Batch { pixels: same(pixels), ids: same(ids), lengths: same(lengths), images: same(images) }
}

#[test]
fn pretrained_encoders_become_a_model() {
    let _alone = drawing();
    let folder = scratch("pretrained");
    let code = "import sys; from pathlib import Path; from _models import *; out = Path(sys.argv[1]); \
                vision_model('vit').save_pretrained(out / 'vit'); text_model('bert').save_pretrained(out / 'bert')";
    run(python().args(["-c", code]).arg(&folder).env("PYTHONPATH", "tests"));
    let read = |name: &str, half| Checkpoint::read(folder.join(name), half, None).unwrap();
    let (image, text) = (|| read("vit", Half::Vision), || read("bert", Half::Text));
    let config = LapsConfig::new(image().config, text().config, 24).unwrap();
    let model = Laps::from_checkpoints(config.clone(), image(), text(), Device::Cpu).unwrap();
    let weights = model.variables.variables();
    for (prefix, checkpoint) in [("image_encoder", image()), ("text_encoder", text())] {
        for (name, tensor) in checkpoint.tensors {
            assert!(weights[&format!("{prefix}.backbone.{name}")].equal(&tensor), "{prefix} {name}");
        }
    }
    assert!(weights.contains_key("head.aggregation.scale"));
    assert!(model.loss(&batch(&models().join("vit")), None).unwrap().double_value(&[]).is_finite());
    let saved = folder.join("saved");
    model.save_pretrained(&saved).unwrap();
    run(python().args(["-c", "import sys, laps; laps.LAPS.from_pretrained(sys.argv[1])"]).arg(&saved));

    let fails = |config: &LapsConfig, image, text, wanted: &str| {
        let error = Laps::from_checkpoints(config.clone(), image, text, Device::Cpu).expect_err("an error");
        assert!(error.to_string().contains(wanted), "{error}");
    };
    fails(&config, text(), text(), "expected Vision, got Text");
    let mut other = image();
    other.config["num_hidden_layers"] = 1.into();
    fails(&config, other, text(), "the configuration of");
    let mut short = image();
    short.tensors.retain(|(name, _)| name != "layernorm.bias");
    fails(&config, short, text(), "missing: layernorm.bias");
}

#[test]
fn losses_outside_their_ranges_are_refused() {
    let _alone = drawing();
    let config = Laps::from_pretrained(models().join("vit"), Device::Cpu).unwrap().config().clone();
    let hinge = LossOptions::default();
    let contrastive = LossOptions { name: LossName::InfoNce, ..LossOptions::default() };
    for (argument, loss) in [
        ("margin", LossOptions { margin: Some(-0.1), ..hinge.clone() }),
        ("margin", LossOptions { margin: Some(0.2), ..contrastive.clone() }),
        ("temperature", LossOptions { temperature: Some(0.07), ..hinge.clone() }),
        ("temperature", LossOptions { temperature: Some(0.0), ..contrastive }),
        ("cutoff", LossOptions { cutoff: Some(1.9), ..hinge.clone() }),
        ("cutoff", LossOptions { name: LossName::Triplet, cutoff: Some(0.5), ..hinge.clone() }),
        ("ratio_weight", LossOptions { ratio_weight: f64::NAN, ..hinge.clone() }),
        ("max_score", LossOptions { max_score: Some(0.0), ..hinge }),
    ] {
        let mut config = config.clone();
        config.loss = loss;
        let error = Laps::new(config, Device::Cpu).expect_err("an error").to_string();
        assert!(error.contains(argument), "{argument}: {error}");
    }
}

#[test]
fn an_evaluation_can_ask_for_the_loss_of_its_scores() {
    let folder = models().join("vit");
    let (model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
    let loss = model.objective().loss(&scores(&model, &batch), &batch.images, None, None).unwrap();
    let trained = tch::no_grad(|| model.loss(&batch, None).unwrap());
    assert!(difference(&loss, &trained) < 1e-6);
}

#[test]
fn features_of_parts_are_those_of_the_whole() {
    for name in ["vit", "paper"] {
        let folder = models().join(name);
        let (model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
        let (mut images, mut texts) = (Vec::new(), Vec::new());
        for (start, count) in [(0, 1), (1, 3)] {
            let part = |tensor: &Tensor| tensor.narrow(0, start, count);
            images.push(model.encode_image(&part(&batch.pixels), false).unwrap());
            let lengths = part(&batch.lengths);
            let ids = part(&batch.ids).narrow(1, 0, lengths.max().int64_value(&[]));
            texts.push(model.encode_text(&ids, &lengths, false).unwrap());
        }
        let (images, texts) = (ImageFeatures::cat(&images).unwrap(), TextFeatures::cat(&texts).unwrap());
        let parts = model.similarity(&images, &texts).unwrap();
        assert!(difference(&parts, &scores(&model, &batch)) < 1e-6, "{name}");
    }
    assert!(ImageFeatures::cat(&[]).is_err() && TextFeatures::cat(&[]).is_err());
}

#[test]
fn optimizers_can_treat_backbones_apart() {
    let model = Laps::from_pretrained(models().join("vit"), Device::Cpu).unwrap();
    let mut optimizer = Sgd::default().build(&model.variables, 0.01).unwrap();
    optimizer.set_lr_group(BACKBONE_GROUP, 0.0);
    let batch = batch(&models().join("vit"));
    let before: Vec<_> = model.variables.variables().into_iter().map(|(n, t)| (n, t.copy())).collect();
    optimizer.backward_step(&model.loss(&batch, Some(0.5)).unwrap());
    let now = model.variables.variables();
    // But for a bias that no softmax takes notice of.
    for (name, old) in before.iter().filter(|(name, _)| name != "head.aggregation.fc2.bias") {
        assert_eq!(now[name].equal(old), name.contains("backbone"), "{name}");
    }
}

#[test]
fn a_loss_without_gradient_is_still_a_loss() {
    for name in ["vit", "swin"] {
        let folder = models().join(name);
        let (mut model, batch) = (Laps::from_pretrained(&folder, Device::Cpu).unwrap(), batch(&folder));
        let loss = model.loss(&batch, None).unwrap().double_value(&[]);
        let without = tch::no_grad(|| model.loss(&batch, None).unwrap());
        assert!(!without.requires_grad() && (without.double_value(&[]) - loss).abs() < 1e-6);
        model.variables.freeze();
        assert!((model.loss(&batch, None).unwrap().double_value(&[]) - loss).abs() < 1e-6);
    }
}

#[test]
fn a_model_born_here_is_read_by_python() {
    let _alone = drawing();
    let source = models().join("vit");
    let trained = Laps::from_pretrained(&source, Device::Cpu).unwrap();
    let model = Laps::new(trained.config().clone(), Device::Cpu).unwrap();
    let folder = scratch("born");
    std::fs::copy(source.join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
    model.save_pretrained(&folder).unwrap();
    assert!(!folder.join("tokenizer.json").exists(), "another model's tokenizer");
    run(python().args(["-c", "import sys, laps; laps.LAPS.from_pretrained(sys.argv[1])"]).arg(&folder));
}

#[test]
fn shards_and_other_resolutions_are_read_as_transformers_does() {
    let folder = scratch("checkpoints");
    let code = r#"
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from _models import vision_model
out = Path(sys.argv[1])
x = torch.randn(2, 3, 48, 48)
result = {"pixels": x}
for family in ("vit", "clip", "swin"):
    model = vision_model(family)
    model.save_pretrained(out / family, **({} if family == "swin" else {"max_shard_size": "20KB"}))
    tokens = model(x, interpolate_pos_encoding=True).last_hidden_state
    if family == "clip":
        tokens = model.visual_projection(model.vision_model.post_layernorm(tokens))
    result[family] = tokens.detach()
save_file(result, out / "expected.safetensors")
"#;
    run(python().args(["-c", code]).arg(&folder).env("PYTHONPATH", "tests"));
    let expected = named(folder.join("expected.safetensors"));
    for family in ["vit", "clip", "swin"] {
        assert_eq!(folder.join(family).join("model.safetensors.index.json").exists(), family != "swin");
        let checkpoint = Checkpoint::read(folder.join(family), Half::Vision, Some(48)).unwrap();
        let (config, vision) = checkpoint.vision().unwrap();
        assert_eq!(config.image_size(), 48);
        let tokens = vision.forward(&expected("pixels"), false).unwrap();
        assert!(difference(&tokens, &expected(family)) < 1e-5, "{family}");
    }
    std::fs::write(
        folder.join("vit").join("model.safetensors.index.json"),
        r#"{"weight_map": {"a": "../x"}}"#,
    )
    .unwrap();
    let error = Checkpoint::read(folder.join("vit"), Half::Vision, None).unwrap_err().to_string();
    assert!(error.contains("weight_map"), "{error}");
}
