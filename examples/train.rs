//! Draws scenes of two shapes, trains a small LAPS model on them, and finds new drawings by their captions. No Python, no
//! files; about a minute on two cores.
//!
//! ```sh
//! cargo run --release --features torch --example train
//! ```
//!
//! Takes the number of steps as an argument.

use laps::LapsError;
use laps::model::{Batch, HeadOptions, Laps, LapsConfig, LossName, LossOptions};
use serde_json::json;
use tch::nn::{AdamW, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const SIZE: i64 = 48;
const STEPS: usize = 2000;
const REPORTS: usize = 10;
const BATCH: usize = 32;
const LEARNING_RATE: f64 = 1e-3;
const SHAPES: [&str; 3] = ["circle", "square", "triangle"];
const COLOURS: [(&str, [f32; 3]); 4] = [
    ("red", [1.0, 0.2, 0.2]),
    ("green", [0.2, 0.9, 0.3]),
    ("blue", [0.3, 0.4, 1.0]),
    ("yellow", [1.0, 0.9, 0.2]),
];
/// The vocabulary, in the order of the ids, with padding, start and end before it.
const WORDS: [&str; 9] = ["a", "beside", "red", "green", "blue", "yellow", "circle", "square", "triangle"];
const START: i64 = 1;
const END: i64 = 2;
const FIRST_WORD: i64 = 3;

/// Two objects, each a shape and a colour by index.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Scene([(usize, usize); 2]);

impl Scene {
    /// All pairs of different objects, whichever is on the left.
    fn all() -> Vec<Scene> {
        let objects =
            || (0..SHAPES.len()).flat_map(|shape| (0..COLOURS.len()).map(move |colour| (shape, colour)));
        let pairs = objects().flat_map(|left| objects().map(move |right| Scene([left, right])));
        pairs.filter(|scene| scene.0[0] < scene.0[1]).collect()
    }

    /// "a red circle beside a blue square".
    fn caption(&self) -> Vec<&'static str> {
        let object = |(shape, colour): (usize, usize)| ["a", COLOURS[colour].0, SHAPES[shape]];
        [object(self.0[0]).as_slice(), &["beside"], &object(self.0[1])].concat()
    }

    fn ids(&self) -> Vec<i64> {
        let id =
            |word: &str| FIRST_WORD + WORDS.iter().position(|w| *w == word).expect("a known word") as i64;
        [START].into_iter().chain(self.caption().into_iter().map(id)).chain([END]).collect()
    }

    /// Pixels (3, S, S) in [0, 1], with places, sizes and background drawn anew each time.
    fn draw(&self, random: &mut Random) -> Vec<f32> {
        let side = SIZE as usize;
        let background = random.between(0.0, 0.3);
        let mut pixels = vec![0.0; 3 * side * side];
        pixels.iter_mut().for_each(|pixel| *pixel = background + random.between(0.0, 0.1));
        let first = random.below(2);
        for (index, (shape, colour)) in [self.0[first], self.0[1 - first]].into_iter().enumerate() {
            let radius = random.between(6.0, 9.0);
            let x = side as f32 * (0.25 + 0.5 * index as f32) + random.between(-2.0, 2.0);
            let y = side as f32 / 2.0 + random.between(-10.0, 10.0);
            for (row, column) in (0..side).flat_map(|row| (0..side).map(move |column| (row, column))) {
                let (dx, dy) = ((column as f32 - x) / radius, (row as f32 - y) / radius);
                let inside = match shape {
                    0 => dx * dx + dy * dy < 1.0,
                    1 => dx.abs().max(dy.abs()) < 0.85,
                    _ => dy < 0.8 && dy > 2.0 * dx.abs() - 1.0,
                };
                if inside {
                    for (channel, value) in COLOURS[colour].1.into_iter().enumerate() {
                        pixels[(channel * side + row) * side + column] = value;
                    }
                }
            }
        }
        pixels
    }
}

/// SplitMix64: quick, and the same scenes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn between(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// Scenes as a model takes them; the index of a scene tells which pairs show the same.
fn batch(scenes: &[Scene], chosen: &[usize], random: &mut Random) -> Batch {
    let count = chosen.len() as i64;
    let pixels: Vec<f32> = chosen.iter().flat_map(|&i| scenes[i].draw(random)).collect();
    let ids: Vec<i64> = chosen.iter().flat_map(|&i| scenes[i].ids()).collect();
    let length = ids.len() as i64 / count;
    let images: Vec<i64> = chosen.iter().map(|&i| i as i64).collect();
    Batch {
        pixels: (Tensor::from_slice(&pixels).view([count, 3, SIZE, SIZE]) - 0.5) / 0.25,
        ids: Tensor::from_slice(&ids).view([count, length]),
        lengths: Tensor::full([count], length, (Kind::Int64, Device::Cpu)),
        images: Tensor::from_slice(&images),
    }
}

fn model() -> Result<Laps, LapsError> {
    let small = json!({"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128});
    let merged = |more: serde_json::Value| {
        let (mut all, serde_json::Value::Object(more)) = (small.clone(), more) else {
            unreachable!("an object")
        };
        all.as_object_mut().expect("an object").extend(more);
        all
    };
    let vit = merged(json!({"model_type": "vit", "image_size": SIZE, "patch_size": 8}));
    let vocabulary = FIRST_WORD + WORDS.len() as i64;
    let bert = merged(json!({
        "model_type": "bert", "vocab_size": vocabulary, "max_position_embeddings": 16,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
    }));
    let mut config = LapsConfig::new(vit, bert, 64)?;
    // From scratch, the contrast with all negatives of a batch teaches sooner than the hardest alone.
    config.loss = LossOptions { name: LossName::InfoNce, ..LossOptions::default() };
    config.head_options =
        HeadOptions { selection_ratio: 0.6, aggregation_ratio: 0.6, ..HeadOptions::default() };
    Laps::new(config, Device::Cpu)
}

/// The share of captions whose own scene scores highest, in percent.
fn recall(model: &Laps, batch: &Batch) -> Result<f64, LapsError> {
    tch::no_grad(|| {
        let images = model.encode_image(&batch.pixels, false)?;
        let texts = model.encode_text(&batch.ids, &batch.lengths, false)?;
        let best = model.similarity(&images, &texts)?.argmax(0, false);
        let right = best.eq_tensor(&Tensor::arange(best.size()[0], (Kind::Int64, Device::Cpu)));
        Ok(100.0 * right.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]))
    })
}

fn main() -> Result<(), LapsError> {
    tch::manual_seed(0);
    let (scenes, mut random) = (Scene::all(), Random(0));
    let model = model()?;
    let mut optimizer = AdamW::default().build(&model.variables, LEARNING_RATE)?;
    let everything: Vec<usize> = (0..scenes.len()).collect();
    let new = batch(&scenes, &everything, &mut random);
    println!(
        "{} scenes; by chance {:.1} % of captions find theirs",
        scenes.len(),
        100.0 / scenes.len() as f64
    );
    let steps = std::env::args().nth(1).and_then(|steps| steps.parse().ok()).unwrap_or(STEPS);
    for step in 0..=steps {
        if step % (steps / REPORTS).max(1) == 0 || step == steps {
            println!("step {step:4}: {:5.1} % find theirs among new drawings", recall(&model, &new)?);
        }
        optimizer.set_lr(LEARNING_RATE * (1.0 - step as f64 / (steps + 1) as f64));
        let chosen: Vec<usize> = (0..BATCH).map(|_| random.below(scenes.len())).collect();
        let loss = model.loss(&batch(&scenes, &chosen, &mut random), None)?;
        optimizer.backward_step_clip_norm(&loss, 2.0);
    }
    Ok(())
}
