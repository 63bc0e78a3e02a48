//! The library as a Rust user has it: no Python, no torch. Values are compared with the oracle in the Python tests.

use std::sync::atomic::AtomicBool;

use laps::LapsError;
use laps::slimming::{
    Gradients, Options, PairInput, Pairs, Sampling, Saved, Selection, Similarity, align_patches_words,
    calibrate_patches, max_sim, select_patches, selection_scores, similarity, similarity_backward,
};
use ndarray::{Array1, Array2, Array3, ArrayView3, Axis, s};

struct Batch {
    patches: Array3<f64>,
    prefix: Array3<f64>,
    words: Array3<f64>,
    lengths: Array1<i64>,
    logits: Array3<f64>,
    keep: Array2<f64>,
    soft: Array3<f64>,
}

fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    (*state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

fn batch(images: usize, texts: usize) -> Batch {
    let mut state = 7;
    let mut array = |a, b, c| Array3::from_shape_simple_fn((a, b, c), || uniform(&mut state));
    let (patches, prefix) = (array(images, 11, 9), array(images, 1, 9));
    let (words, logits) = (array(texts, 6, 9), array(images, 11, 3));
    let soft = array(images, texts, 11).mapv(|x| (x.abs() + 0.1) / 1.2);
    let keep = array(1, images, 11).index_axis_move(Axis(0), 0).mapv(f64::abs);
    let lengths = (0..texts).map(|t| 1 + (t as i64 * 5 + 3) % 6).collect();
    Batch { patches, prefix, words, lengths, logits, keep, soft }
}

impl Batch {
    fn input<'a>(&'a self, selection: Selection<'a, f64>) -> PairInput<'a, f64> {
        PairInput {
            patches: self.patches.view(),
            prefix: self.prefix.view(),
            words: self.words.view(),
            word_lengths: self.lengths.view(),
            logits: self.logits.view(),
            selection,
            pairs: Pairs::All,
            interrupt: None,
        }
    }

    fn paper(&self) -> Selection<'_, f64> {
        Selection::KeepProbability { probability: self.keep.view(), seed: Some(5) }
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
}

fn run(input: &PairInput<'_, f64>, options: &Options) -> (Similarity<f64>, Gradients<f64>) {
    let forward = similarity(input, options, true).unwrap();
    let grad = forward.scores.mapv(|x| 1.0 + x);
    let mut out = Gradients::zeros(input);
    let saved = forward.saved.as_ref().unwrap();
    similarity_backward(input, options, saved, grad.view(), Some(grad.view()), &mut out.view_mut()).unwrap();
    (forward, out)
}

/// sum of scores^2 / 2 + scores has the gradient 1 + scores, which `run` passes on.
fn objective(input: &PairInput<'_, f64>, options: &Options) -> f64 {
    similarity(input, options, false).unwrap().scores.mapv(|x| x + x * x / 2.0).sum()
}

fn assert_derivative(name: &str, numeric: f64, analytic: f64) {
    assert!((numeric - analytic).abs() < 1e-6 * (1.0 + analytic.abs()), "{name}: {numeric} != {analytic}");
}

#[test]
fn gradients_are_the_derivatives_of_the_scores() {
    // Three texts use the direct lengths, nine the Gram matrix. The fused token is off: its weights are scores, which
    // depend on patches and words but carry no gradient, by definition.
    for texts in [3, 9] {
        let mut data = batch(2, texts);
        let options = Options { fusion: false, ..Options::default() };
        let (_, grads) = run(&data.input(Selection::Scores), &options);
        let step = 1e-6;
        macro_rules! probe {
            ($field:ident, $grad:expr, $at:expr) => {{
                let before = data.$field[$at];
                data.$field[$at] = before + step;
                let up = objective(&data.input(Selection::Scores), &options);
                data.$field[$at] = before - step;
                let down = objective(&data.input(Selection::Scores), &options);
                data.$field[$at] = before;
                assert_derivative(stringify!($field), (up - down) / (2.0 * step), $grad[$at]);
            }};
        }
        for i in 0..11 {
            probe!(patches, grads.patches, [i % 2, i, i % 9]);
            probe!(logits, grads.logits, [i % 2, i, i % 3]);
            probe!(words, grads.words, [i % texts, 0, i % 9]);
            probe!(prefix, grads.prefix, [i % 2, 0, i % 9]);
        }
    }
}

#[test]
fn soft_masks_have_the_derivatives_of_the_scores() {
    let mut data = batch(2, 9);
    let options = Options::default();
    let grads = {
        let input = data.input(Selection::SoftMask(data.soft.view()));
        let forward = similarity(&input, &options, true).unwrap();
        let grad = forward.scores.mapv(|x| 1.0 + x);
        let mut out = Gradients::zeros(&input);
        let saved = forward.saved.unwrap();
        similarity_backward(&input, &options, &saved, grad.view(), None, &mut out.view_mut()).unwrap();
        out.mask.unwrap()
    };
    for i in 0..11 {
        let at = [i % 2, i % 9, i];
        let step = 1e-6;
        let before = data.soft[at];
        data.soft[at] = before + step;
        let up = objective(&data.input(Selection::SoftMask(data.soft.view())), &options);
        data.soft[at] = before - step;
        let down = objective(&data.input(Selection::SoftMask(data.soft.view())), &options);
        data.soft[at] = before;
        assert_derivative("mask", (up - down) / (2.0 * step), grads[at]);
    }
}

#[test]
fn results_do_not_depend_on_threads_or_chunks() {
    let data = batch(5, 13);
    for selection in [Selection::Scores, data.paper(), Selection::SoftMask(data.soft.view())] {
        let input = data.input(selection);
        let (one, one_grads) = pool(1).install(|| run(&input, &Options::default()));
        for (threads, chunk) in [(3, None), (2, Some(1)), (1, Some(20_000))] {
            let options = Options { chunk, ..Options::default() };
            let (many, many_grads) = pool(threads).install(|| run(&input, &options));
            assert_eq!(one.scores, many.scores);
            assert_eq!(one.saved, many.saved);
            // Blocks of texts add up in the outputs instead of in the sums of an image.
            let close =
                |a: &Array3<f64>, b: &Array3<f64>| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(close(&one_grads.patches, &many_grads.patches));
            assert!(close(&one_grads.words, &many_grads.words));
            if chunk == Options::default().chunk {
                assert_eq!(one_grads.patches, many_grads.patches);
                assert_eq!(one_grads.words, many_grads.words);
            }
        }
    }
}

#[test]
fn the_diagonal_is_that_of_all_pairs() {
    let data = batch(9, 9);
    let all = data.input(Selection::Scores);
    let diagonal = PairInput { pairs: Pairs::Diagonal, ..all };
    let (all, _) = run(&all, &Options::default());
    let (diagonal, _) = run(&diagonal, &Options::default());
    for i in 0..9 {
        assert!((all.scores[[i, i]] - diagonal.scores[[i, 0]]).abs() < 1e-12);
    }
}

#[test]
fn stages_in_a_row_give_the_similarity() {
    let data = batch(3, 4);
    let (patches, words) = (data.patches.view(), data.words.view());
    let options = Options::default();
    let chosen = select_patches(patches, words, data.lengths.view(), 0.5, true, options.score).unwrap();
    let scores = selection_scores(patches, words, data.lengths.view(), true, options.score).unwrap();
    let mut mask = Array3::from_elem((3, 4, 11), false);
    for ((i, t, _), &p) in chosen.indexed_iter() {
        mask[[i, t, p as usize]] = true;
    }
    let (prefix, logits) = (data.prefix.view(), data.logits.view());
    let (tokens, counts) =
        calibrate_patches(patches, prefix, logits, mask.view(), scores.view(), true).unwrap();
    assert_eq!(tokens.dim(), (3, 4, 1 + 3 + 1, 9));
    let (aligned, alignment) =
        align_patches_words(tokens.view(), Some(counts.view()), words, data.lengths.view(), &options)
            .unwrap();
    assert_eq!(alignment.dim(), (3, 4, 5, 6));
    let (whole, _) = run(&data.input(Selection::Scores), &options);
    assert!(aligned.iter().zip(&whole.scores).all(|(a, b)| (a - b).abs() < 1e-12));
}

#[test]
fn max_sim_sums_the_best_products() {
    let data = batch(3, 4);
    let scores = max_sim(data.patches.view(), data.words.view(), data.lengths.view()).unwrap();
    for ((i, t), &score) in scores.indexed_iter() {
        let words = data.words.slice(s![t, ..data.lengths[t] as usize, ..]);
        let products = words.dot(&data.patches.index_axis(Axis(0), i).t());
        let expected: f64 = products.rows().into_iter().map(|r| r.fold(f64::MIN, |a, &b| a.max(b))).sum();
        assert!((score - expected).abs() < 1e-12);
    }
}

#[test]
fn non_finite_input_reaches_only_its_own_pairs() {
    let mut data = batch(3, 4);
    let clean = run(&data.input(Selection::Scores), &Options::default()).0.scores;
    data.patches[[1, 0, 0]] = f64::NAN;
    data.words[[2, 0, 3]] = f64::INFINITY;
    let scores = similarity(&data.input(Selection::Scores), &Options::default(), false).unwrap().scores;
    for ((i, t), &score) in scores.indexed_iter() {
        if i == 1 || t == 2 {
            assert!(score.is_nan());
        } else {
            assert_eq!(score, clean[[i, t]]);
        }
    }
}

#[test]
fn sampling_is_reproducible_and_keeps_its_budget() {
    let data = batch(2, 3);
    let options = Options { sampling: Sampling::TopK, ..Options::default() };
    let draw = |seed| {
        let selection = Selection::KeepProbability { probability: data.keep.view(), seed: Some(seed) };
        similarity(&data.input(selection), &options, true).unwrap()
    };
    assert_eq!(draw(1).saved, draw(1).saved);
    assert_ne!(draw(1).saved, draw(2).saved);
    let kept = draw(3).kept_fraction;
    assert!(kept.iter().all(|&f| (f - 6.0 / 11.0).abs() < 1e-15));
}

#[test]
fn bad_input_is_an_error_that_names_the_argument() {
    let data = batch(2, 3);
    let good = data.input(Selection::Scores);
    let none = Array3::zeros((2, 3, 5));
    let empty = Array3::from_elem((2, 3, 11), false);
    let lengths = Array1::from_vec(vec![1, 7, 2]);
    let narrow: ArrayView3<'_, f64> = data.words.slice(s![.., .., ..4]);
    let cases = [
        ("words", PairInput { words: narrow, ..good }),
        ("word_lengths", PairInput { word_lengths: lengths.view(), ..good }),
        ("logits", PairInput { logits: none.view(), ..good }),
        ("prefix", PairInput { prefix: data.words.slice(s![..1, .., ..]), ..good }),
        ("patches", PairInput { patches: data.patches.slice(s![..0, .., ..]), ..good }),
        ("mask", PairInput { selection: Selection::Mask(empty.view()), ..good }),
        ("words", PairInput { pairs: Pairs::Diagonal, ..good }),
    ];
    for (argument, input) in cases {
        let message = similarity(&input, &Options::default(), false).unwrap_err().to_string();
        assert!(message.starts_with(&format!("similarity: {argument} ")), "{message}");
    }
    let options = Options { selection_ratio: 1.5, ..Options::default() };
    let message = similarity(&good, &options, false).unwrap_err().to_string();
    assert!(message.contains("selection_ratio") && message.contains("1.5"), "{message}");
}

#[test]
fn saved_indices_out_of_range_are_refused() {
    let data = batch(2, 3);
    let input = data.input(Selection::Scores);
    let options = Options::default();
    let forward = similarity(&input, &options, true).unwrap();
    let mut saved: Saved = forward.saved.unwrap();
    saved.best_token[[0, 0, 0]] = 99;
    let mut out = Gradients::zeros(&input);
    let grad = forward.scores;
    let error = similarity_backward(&input, &options, &saved, grad.view(), None, &mut out.view_mut());
    assert!(error.unwrap_err().to_string().contains("best_token"));
}

#[test]
fn a_set_flag_interrupts() {
    let data = batch(2, 3);
    let stop = AtomicBool::new(true);
    let input = PairInput { interrupt: Some(&stop), ..data.input(Selection::Scores) };
    let error = similarity(&input, &Options::default(), false).unwrap_err();
    assert!(matches!(error, LapsError::Interrupted { .. }));
}
