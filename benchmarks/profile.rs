//! Times the fused similarity from Rust alone, for profilers:
//! `cargo run --release --example profile -- [threads [images [texts [patches [channels [aggregated [0 for no backward pass]]]]]]]`.

use std::time::Instant;

use laps::slimming::{
    Gradients, Level, Options, PairInput, Pairs, Selection, similarity, similarity_backward,
};
use ndarray::{Array1, Array2, Array3};

fn main() {
    let argument = |at: usize, default: usize| {
        std::env::args().nth(at).map_or(default, |text| text.parse().expect("a whole number"))
    };
    let threads = argument(1, 1);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool");
    let (images, texts) = (argument(2, 64), argument(3, 64));
    let (patches, channels, aggregated, longest) = (argument(4, 196), argument(5, 512), argument(6, 39), 30);
    let mut state = 1u64;
    let mut uniform = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let patch_values = Array3::from_shape_simple_fn((images, patches, channels), &mut uniform);
    let prefix = Array3::from_shape_simple_fn((images, 1, channels), &mut uniform);
    let words = Array3::from_shape_simple_fn((texts, longest, channels), &mut uniform);
    let logits = Array3::from_shape_simple_fn((images, patches, aggregated), &mut uniform);
    let lengths = Array1::from_iter((0..texts).map(|t| 8 + (t * 7 % 23) as i64));
    let input = PairInput {
        patches: patch_values.view(),
        prefix: prefix.view(),
        words: words.view(),
        word_lengths: lengths.view(),
        logits: logits.view(),
        selection: Selection::Scores,
        pairs: Pairs::All,
        interrupt: None,
    };
    println!("{} on {threads} threads, {} words", Level::current().unwrap().name(), lengths.sum());
    for _ in 0..8 {
        let start = Instant::now();
        let result = pool.install(|| similarity(&input, &Options::default(), false)).expect("valid input");
        let per_pair = start.elapsed().as_secs_f64() / (images * texts) as f64;
        println!("forward {:.2} us per pair, mean score {}", per_pair * 1e6, result.scores.mean().unwrap());
        if argument(7, 1) == 0 {
            continue;
        }
        let saved =
            pool.install(|| similarity(&input, &Options::default(), true)).expect("valid input").saved;
        let grad = Array2::from_elem((images, texts), 1.0);
        let mut out = Gradients::zeros(&input);
        let start = Instant::now();
        let options = Options::default();
        pool.install(|| {
            similarity_backward(
                &input,
                &options,
                saved.as_ref().unwrap(),
                grad.view(),
                None,
                &mut out.view_mut(),
            )
        })
        .expect("valid input");
        let per_pair = start.elapsed().as_secs_f64() / (images * texts) as f64;
        println!("backward {:.2} us per pair", per_pair * 1e6);
    }
}
