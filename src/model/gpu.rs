//! The fused similarity on NVIDIA GPUs: what is prepared with torch, and the launches of the kernels in between. For Python,
//! `laps.cuda_backend` does the same; both follow kernels/call.cuh.
//!
//! Sizes: b images with N patches and P prefix tokens, t captions, W words in all, C channels, N_c aggregated tokens.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use super::Result;
use super::head::{Features, Scores};
use crate::cuda::{self, Address, BackwardCall, Call, Element, Selection, Stream};
use crate::error::LapsError;
use crate::slimming::{Directions, Options, Pairs, Sampling, Score};

/// Floor of the stable weights.
const EPSILON: f64 = 1e-6;
/// A sum shorter than this share of its terms is rounding noise, not a direction.
const NOISE: f64 = 1e-12;
/// Epsilons of its largest value: what a row of scores must spread to count as more than noise.
const CONSTANT: f64 = 16.0;
/// Bytes of scratch memory, forward and backward.
const SCRATCH: i64 = 1 << 30;
const SCRATCH_BACKWARD: i64 = 192 << 20;
/// Images of a launch: blocks of a grid's second dimension.
const MOST_IMAGES: i64 = 1 << 15;

/// What the backward pass needs of the forward pass.
#[derive(Debug)]
pub(super) struct Saved {
    selection: Tensor,
    best_token: Tensor,
    best_word: Tensor,
}

/// Where launches go.
#[derive(Clone, Copy)]
struct Place {
    device: i32,
    element: Element,
    tf32: bool,
}

impl Place {
    fn of(tensor: &Tensor) -> Result<Self> {
        let element = match tensor.kind() {
            Kind::Float => Element::F32,
            Kind::Half => Element::F16,
            Kind::BFloat16 => Element::Bf16,
            other => {
                let got = format!("{other:?}");
                return Err(LapsError::type_("similarity", "patches", "float32, float16 or bfloat16", got));
            }
        };
        let device = if let Device::Cuda(index) = tensor.device() { index as i32 } else { 0 };
        Ok(Place { device, element, tf32: false })
    }
}

/// Gradients of float16 span more than halves do: TF32 has their digits, and the range of floats.
fn widened(features: &Features) -> Result<(Features, bool)> {
    if features.patches.kind() != Kind::Half {
        return Ok((features.shallow(), false));
    }
    let float = |tensor: &Tensor| tensor.f_to_kind(Kind::Float);
    let wide = Features {
        patches: float(&features.patches)?,
        prefix: float(&features.prefix)?,
        words: float(&features.words)?,
        ..features.shallow()
    };
    Ok((wide, true))
}

/// Everything of some images that no caption changes, as the kernels take it.
struct Images {
    first: i64,
    finite: Tensor,
    scale: Tensor,
    rows: Tensor,
    norms: Tensor,
    prefix_inverse: Tensor,
    self_scores: Tensor,
    text_factor: Tensor,
    logits: Tensor,
    exponentials: Tensor,
    weights: Tensor,
    gram: Tensor,
    keep_probability: Option<Tensor>,
    prefix: i64,
}

/// The same of all captions.
struct Texts {
    words: Tensor,
    scale: Tensor,
    inverse: Tensor,
    first: Tensor,
    count: Tensor,
    finite: Tensor,
    /// (k, t, C): parts that sum to the direction of the mean word
    direction: Tensor,
    /// What products with it count for.
    size: Option<Tensor>,
    /// Where each caption's words begin, and where the last one's end.
    starts: Vec<i64>,
    /// (W,): places among the padded words
    places: Tensor,
}

/// The power of two that brings values of at most `largest` (finite, > 0) to [2, 4); never subnormal.
fn power(largest: &Tensor) -> Result<Tensor> {
    let largest = largest.f_clamp_min(f64::from(f32::MIN_POSITIVE))?;
    let (mantissa, _) = largest.f_frexp()?;
    Ok(mantissa.f_mul_scalar(4.0)?.f_div(&largest)?)
}

/// `x` where the condition holds, else `other`.
fn kept(x: &Tensor, condition: &Tensor, other: f64) -> Result<Tensor> {
    Ok(x.f_where_scalarother(condition, other)?)
}

fn length(x: &Tensor, keep: bool) -> Result<Tensor> {
    Ok(x.f_norm_scalaropt_dim(2, [-1i64], keep)?)
}

/// 1 / x, and 0 where x is 0.
fn inverse(x: &Tensor) -> Result<Tensor> {
    kept(&x.f_reciprocal()?, &x.f_gt(0.0)?, 0.0)
}

/// The direction of a sum (.., C), in f64, of vectors whose lengths sum to `reach` (.., 1); zero where they cancel.
fn direction(total: &Tensor, reach: &Tensor) -> Result<Tensor> {
    let long = length(total, true)?;
    let unit = total.f_div(&long.f_clamp_min(f64::MIN_POSITIVE)?)?;
    Ok(kept(&unit, &long.f_gt_tensor(&reach.f_mul_scalar(NOISE)?)?, 0.0)?.f_to_kind(Kind::Float)?)
}

fn round_up(count: i64, step: i64) -> i64 {
    (count + step - 1) / step * step
}

/// a b of halves or floats, in f32.
fn product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let batched = a.dim() == 3;
    Ok(match (a.kind(), a.device()) {
        (Kind::Float, _) => a.f_matmul(b)?,
        (_, Device::Cuda(_)) if batched => a.f_bmm_dtype(b, Kind::Float)?,
        (_, Device::Cuda(_)) => a.f_mm_dtype(b, Kind::Float)?,
        _ => a.f_to_kind(Kind::Float)?.f_matmul(&b.f_to_kind(Kind::Float)?)?,
    })
}

impl Images {
    fn new(features: &Features, own: Range<i64>, options: &Options) -> Result<Self> {
        let part = |tensor: &Tensor| tensor.f_narrow(0, own.start, own.end - own.start);
        let float = |tensor: Tensor| tensor.f_to_kind(Kind::Float);
        let (patches, prefix) = (part(&features.patches)?, float(part(&features.prefix)?)?);
        let logits = float(part(&features.logits)?)?.f_contiguous()?;
        let keep_probability = match &features.keep_probability {
            None => None,
            Some(keep) => Some(float(part(keep)?)?.f_contiguous()?),
        };
        let (element, device) = (patches.kind(), patches.device());
        let ((b, n, c), p, aggregated) = (patches.size3()?, prefix.size()[1], logits.size()[2]);
        let soft = i64::from(keep_probability.is_some());

        let wide = float(patches)?;
        let largest = wide.f_abs()?.f_amax([1, 2], false)?;
        let mut finite = largest.f_isfinite()?;
        for tensor in
            [Some(&logits), (p > 0).then_some(&prefix), keep_probability.as_ref()].into_iter().flatten()
        {
            finite = finite.f_logical_and(&tensor.f_isfinite()?.f_flatten(1, -1)?.f_all_dim(1, false)?)?;
        }
        let there = finite.f_view([b, 1, 1])?;
        let (wide, logits) = (kept(&wide, &there, 0.0)?, kept(&logits, &there, 0.0)?);
        let prefix = kept(&prefix, &there, 0.0)?;
        let sized = finite.f_logical_and(&largest.f_gt(0.0)?)?;
        let scale = power(&kept(&largest, &sized, 1.0)?)?.f_view([b, 1, 1])?;
        let wide = wide.f_mul(&scale)?;

        let lengths = length(&wide, false)?;
        // In f64: where patches cancel nothing must be left, not rounding noise with a direction.
        let exact_mean = wide.f_mean_dim([1i64].as_slice(), false, Kind::Double)?;
        let reach = lengths.f_mean_dim([1i64].as_slice(), true, Kind::Float)?;
        let mean = exact_mean.f_to_kind(Kind::Float)?;
        let along = |to: &Tensor| wide.f_matmul(&to.f_unsqueeze(-1)?)?.f_squeeze_dim(-1);
        let (mut self_scores, text_factor) = match options.score {
            Score::Cosine => {
                let factor = inverse(&lengths)?;
                (along(&direction(&exact_mean, &reach)?)?.f_mul(&factor)?, factor)
            }
            Score::Dot => {
                let scale = scale.f_view([b, 1])?;
                let square = scale.f_square()?.f_mul_scalar(c)?;
                (
                    along(&mean)?.f_div(&square)?,
                    scale.f_reciprocal()?.f_expand([b, n], false)?.f_contiguous()?,
                )
            }
        };
        if keep_probability.is_some() {
            self_scores = min_max(&self_scores)?;
        }

        let stride = round_up(n + soft + p, 16);
        let pitch = if stride % 32 == 16 { stride } else { stride + 16 };
        let slots = round_up(p + aggregated + 1, 16);
        let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, device));
        let mut rows = zeros(&[b, stride, c], element)?;
        rows.f_narrow(1, 0, n)?.f_copy_(&wide)?;
        let mut norms = zeros(&[b, stride], Kind::Float)?;
        norms.f_narrow(1, 0, n)?.f_copy_(&lengths)?;
        if soft == 1 {
            rows.f_select(1, n)?.f_copy_(&mean)?;
            norms.f_narrow(1, n, 1)?.f_copy_(&reach)?;
        }
        let mut prefix_inverse = zeros(&[b, p, 1], Kind::Float)?;
        if p > 0 {
            let longest = prefix.f_abs()?.f_amax([-1], true)?;
            let prefix_scale = power(&kept(&longest, &longest.f_gt(0.0)?, 1.0)?)?;
            let scaled = prefix.f_mul(&prefix_scale)?;
            let unit = inverse(&length(&scaled, true)?)?;
            prefix_inverse = unit.f_mul(&prefix_scale)?;
            rows.f_narrow(1, n + soft, p)?.f_copy_(&scaled.f_mul(&unit)?)?;
            let _ = norms.f_narrow(1, n + soft, p)?.f_fill_(1.0)?;
        }
        let highest = logits.f_amax([1], true)?;
        let exponentials = logits.f_sub(&highest)?.f_exp()?.f_transpose(1, 2)?;
        let mut weights = zeros(&[b, slots, pitch], element)?;
        let own_slots = weights.f_narrow(1, p, aggregated)?;
        own_slots.f_narrow(2, 0, n)?.f_copy_(&exponentials)?;
        if soft == 1 {
            let _ = own_slots.f_select(2, n)?.f_fill_(EPSILON)?;
        }
        for token in 0..p {
            let _ = weights.f_select(1, token)?.f_select(1, n + soft + token)?.f_fill_(1.0)?;
        }
        let gram = zeros(&[b, stride, pitch], element)?;
        gram.f_narrow(2, 0, stride)?.f_copy_(&rows.f_matmul(&rows.f_transpose(1, 2)?)?)?;
        (rows, norms, weights) = (rows.f_contiguous()?, norms.f_contiguous()?, weights.f_contiguous()?);
        Ok(Images {
            first: own.start,
            finite,
            scale,
            rows,
            norms,
            prefix_inverse,
            self_scores: self_scores.f_contiguous()?,
            text_factor: text_factor.f_contiguous()?,
            logits: logits.f_contiguous()?,
            exponentials,
            weights,
            gram,
            keep_probability,
            prefix: p,
        })
    }

    fn count(&self) -> i64 {
        self.finite.size()[0]
    }

    /// N
    fn patches(&self) -> i64 {
        self.self_scores.size()[1]
    }

    fn stride(&self) -> i64 {
        self.rows.size()[1]
    }
}

/// Scores (b, N) scaled to [0, 1]; zeros where they are constant but for rounding.
fn min_max(scores: &Tensor) -> Result<Tensor> {
    let (low, high) = (scores.f_amin([1], true)?, scores.f_amax([1], true)?);
    let spread = high.f_sub(&low)?;
    let noise = high.f_maximum(&low.f_neg()?)?.f_mul_scalar(CONSTANT * f64::from(f32::EPSILON))?;
    let varied = spread.f_gt_tensor(&noise)?;
    kept(&scores.f_sub(&low)?.f_div(&kept(&spread, &varied, 1.0)?)?, &varied, 0.0)
}

impl Texts {
    fn new(features: &Features, pairs: Pairs, options: &Options) -> Result<Self> {
        let (words, device) = (&features.words, features.words.device());
        let (t, longest, c) = words.size3()?;
        let lengths = features.lengths.f_to_device(Device::Cpu)?.f_to_kind(Kind::Int64)?;
        let lengths = Vec::<i64>::try_from(&lengths)?;
        if let Some(wrong) = lengths.iter().find(|&&length| length < 1 || length > longest) {
            return Err(LapsError::value("similarity", "word_lengths", format!("1 to L={longest}"), wrong));
        }
        // Pairs take their words where they are; else they are packed.
        let packed = pairs == Pairs::All;
        let mut starts = vec![0];
        let mut places: Vec<i64> = Vec::new();
        for (text, &length) in lengths.iter().enumerate() {
            let first = text as i64 * longest;
            places.extend(first..first + if packed { length } else { longest });
            starts.push(places.len() as i64);
        }
        let places = Tensor::f_from_slice(&places)?.f_to_device(device)?;
        let count = Tensor::f_from_slice(&lengths)?.f_to_device(device)?;
        let real = Tensor::f_arange(longest, (Kind::Int64, device))?.f_lt_tensor(&count.f_unsqueeze(1)?)?;
        let real = real.f_unsqueeze(2)?;

        let wide = kept(&words.f_to_kind(Kind::Float)?, &real, 0.0)?;
        let largest = wide.f_abs()?.f_amax([1, 2], false)?;
        let finite = largest.f_isfinite()?;
        let wide = kept(&wide, &finite.f_view([t, 1, 1])?, 0.0)?;
        let scale = power(&kept(&largest, &finite.f_logical_and(&largest.f_gt(0.0)?)?, 1.0)?)?;
        let wide = wide.f_mul(&scale.f_view([t, 1, 1])?)?;
        let norms = length(&wide, false)?;
        let total = wide.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?;
        let reach = norms.f_sum_dim_intlist([1i64].as_slice(), true, Kind::Float)?;
        let (direction, size) = match options.score {
            Score::Cosine => (direction(&total, &reach)?, None),
            Score::Dot => {
                let mean = total.f_to_kind(Kind::Float)?.f_div(&count.f_unsqueeze(1)?)?;
                // Apart from the direction, which would underflow in halves.
                (mean, Some(scale.f_mul_scalar(c)?.f_reciprocal()?))
            }
        };
        let element = words.kind();
        let direction = if element == Kind::Float {
            direction.f_unsqueeze(0)?
        } else {
            // What rounding to halves loses of the direction, and with it of the selection, is a second part.
            let high = direction.f_to_kind(element)?;
            let low = direction.f_sub(&high.f_to_kind(Kind::Float)?)?.f_to_kind(element)?;
            Tensor::f_stack(&[high, low], 0)?
        };
        let flat = |tensor: &Tensor| tensor.f_flatten(0, 1)?.f_index_select(0, &places);
        let scales = scale.f_view([t, 1, 1])?.f_expand([t, longest, 1], false)?;
        Ok(Texts {
            words: flat(&wide)?.f_to_kind(element)?,
            scale: flat(&scales)?,
            inverse: inverse(&flat(&norms)?)?,
            first: Tensor::f_from_slice(&starts[..t as usize])?.f_to_device(device)?,
            count,
            finite,
            direction,
            size,
            starts,
            places,
        })
    }

    fn words_of(&self, part: &Range<i64>) -> Range<i64> {
        self.starts[part.start as usize]..self.starts[part.end as usize]
    }
}

// ---- pairs

/// A launch: its parameters, and the tensors that must live until they are used.
struct Launch {
    call: Call,
    products: Tensor,
    _text_products: Tensor,
    words: Range<i64>,
    texts: Range<i64>,
}

/// Images, and the captions that meet them launch by launch.
type Chunk = (Range<i64>, Vec<Range<i64>>);

/// How a call is cut into chunks that fit the scratch memory.
fn chunks(
    features: &Features,
    options: &Options,
    texts: &Texts,
    pairs: Pairs,
    backward: bool,
) -> Result<Vec<Chunk>> {
    // What the CPU's kernels do with is small; a GPU's launches would not fill the device.
    let budget =
        options.chunk.map_or(if backward { SCRATCH_BACKWARD } else { SCRATCH }, |bytes| bytes as i64);
    let (b, n, c) = features.patches.size3()?;
    let (p, aggregated) = (features.prefix.size()[1], features.logits.size()[2]);
    let size = features.patches.kind().elt_size_in_bytes() as i64;
    let (stride, slots) = (round_up(n + 1 + p, 16), round_up(p + aggregated + 1, 16));
    let word = stride * size * if backward { 2 } else { 1 };
    let pair = 8 * stride + if backward { slots * stride * (2 * size + 4) } else { 0 };
    let mut image =
        stride * c * (size + if backward { 8 } else { 4 }) + (slots + stride) * (stride + 16) * size;
    if backward {
        image += 4 * stride * (stride + 16 * slots);
    }
    let total = texts.starts.len() as i64 - 1;
    if pairs == Pairs::Diagonal {
        let longest = features.words.size()[1];
        let step = (budget / (image + pair + longest * (word + c * size))).max(1);
        return Ok(ranges(b, step).map(|own| (own.clone(), vec![own])).collect());
    }
    let average = (texts.starts[total as usize] + total - 1) / total;
    // A share of the budget for the images, so that many captions meet them in a launch.
    let least = image + total.min(16) * (average * word + pair);
    let share = if backward { 2 } else { 4 };
    let step = even(b, (budget / least).min(budget / share / image)).min(MOST_IMAGES);
    let parts = ranges(b, step).map(|own| {
        let held = own.end - own.start;
        let most = (budget - held * image) / (held * (average * word + pair));
        (own, ranges(total, even(total, most)).collect())
    });
    Ok(parts.collect())
}

fn ranges(end: i64, step: i64) -> impl Iterator<Item = Range<i64>> {
    (0..end).step_by(step as usize).map(move |start| start..(start + step).min(end))
}

/// The size of parts of nearly the same size, each of at most `most`, or one.
fn even(count: i64, most: i64) -> i64 {
    let parts = (count + most.max(1) - 1) / most.max(1);
    (count + parts - 1) / parts
}

fn address(tensor: &Tensor) -> Address {
    tensor.data_ptr() as Address
}

/// The outputs of all pairs.
struct Outputs {
    scores: Tensor,
    fraction: Tensor,
    saved: Option<Saved>,
}

struct Job<'a> {
    features: &'a Features,
    options: &'a Options,
    pairs: Pairs,
    seed: Option<u64>,
}

impl Job<'_> {
    fn mode(&self) -> Selection {
        match (&self.features.keep_probability, self.seed, self.options.sampling) {
            (None, ..) | (_, None, _) => Selection::Top,
            (_, _, Sampling::Gumbel) => Selection::Gumbel,
            (_, _, Sampling::TopK) => Selection::Perturbed,
        }
    }

    /// P^T, the products with the directions, and a launch of the pairs of `images` and `part`.
    fn launch(
        &self,
        images: &Images,
        texts: &Texts,
        part: &Range<i64>,
        outputs: &Outputs,
        mode: Selection,
    ) -> Result<Launch> {
        let (diagonal, options) = (self.pairs == Pairs::Diagonal, self.options);
        let words_range = texts.words_of(part);
        let count = part.end - part.start;
        let words = texts.words.f_narrow(0, words_range.start, words_range.end - words_range.start)?;
        let directions = texts.direction.f_narrow(1, part.start, count)?;
        let (products, mut text_products) = if diagonal {
            let own = words.f_view([count, self.features.words.size()[1], -1])?;
            let columns = images.rows.f_transpose(1, 2)?;
            let along = product(&directions.f_transpose(0, 1)?.f_contiguous()?, &columns)?;
            (own.f_matmul(&columns)?, along.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?)
        } else {
            let rows = images.rows.f_flatten(0, 1)?.f_transpose(0, 1)?;
            let along = product(&directions.f_flatten(0, 1)?, &rows)?;
            let along = along.f_view([-1, count, rows.size()[1]])?;
            (words.f_matmul(&rows)?, along.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Float)?)
        };
        if let Some(size) = &texts.size {
            text_products = text_products.f_mul(&size.f_narrow(0, part.start, count)?.f_unsqueeze(1)?)?;
        }
        let (products, text_products) = (products.f_contiguous()?, text_products.f_contiguous()?);
        let share = match (options.directions, options.mean_of_directions) {
            (Directions::Both, true) => 0.5,
            _ => 1.0,
        };
        let n = images.patches();
        // First elements of what this launch sees of all captions.
        let of = |tensor: &Tensor, from: i64| -> Result<Address> {
            Ok(address(&tensor.f_narrow(0, from, tensor.size()[0] - from)?))
        };
        let saved = outputs.saved.as_ref();
        let call = Call {
            weights: address(&images.weights),
            gram: address(&images.gram),
            rows: address(&images.rows),
            norms: address(&images.norms),
            self_scores: address(&images.self_scores),
            text_factor: address(&images.text_factor),
            keep_prob: images.keep_probability.as_ref().map_or(0, address),
            logits: address(&images.logits),
            image_finite: address(&images.finite),
            words: of(&texts.words, words_range.start)?,
            word_inverse: of(&texts.inverse, words_range.start)?,
            first_word: of(&texts.first, part.start)?,
            word_count: of(&texts.count, part.start)?,
            text_finite: of(&texts.finite, part.start)?,
            products: address(&products),
            text_products: address(&text_products),
            mask: 0,
            scores: address(&outputs.scores),
            fraction: address(&outputs.fraction),
            selection: saved.map_or(0, |saved| address(&saved.selection)),
            best_token: saved.map_or(0, |saved| address(&saved.best_token)),
            best_word: saved.map_or(0, |saved| address(&saved.best_word)),
            word_offset: words_range.start,
            product_pitch: products.size()[products.dim() - 1],
            product_image: if diagonal { 0 } else { images.stride() },
            text_pitch: text_products.size()[1],
            text_image: if diagonal { 0 } else { images.stride() },
            mask_pitch: 0,
            seed: self.seed.unwrap_or(0),
            images: images.count() as i32,
            texts: count as i32,
            first_image: images.first as i32,
            first_text: part.start as i32,
            columns: outputs.scores.size()[1] as i32,
            diagonal: i32::from(diagonal),
            patches: n as i32,
            stride: images.stride() as i32,
            pitch: images.gram.size()[2] as i32,
            slots: images.weights.size()[1] as i32,
            aggregated: images.logits.size()[2] as i32,
            prefix: images.prefix as i32,
            channels: images.rows.size()[2] as i32,
            max_words: self.features.words.size()[1] as i32,
            kept: options.kept(n as usize) as i32,
            selection_mode: mode as i32,
            soft: i32::from(images.keep_probability.is_some()),
            seeded: i32::from(self.seed.is_some()),
            paper: i32::from(images.keep_probability.is_some()),
            language_context: i32::from(options.language_context),
            fusion: i32::from(options.fusion),
            shared: 0,
            attention_weight: options.attention_weight as f32,
            temperature: options.temperature as f32,
            negative_slope: options.negative_slope as f32,
            word_to_patch: if options.directions == Directions::PatchToWord { 0.0 } else { share },
            patch_to_word: if options.directions == Directions::WordToPatch { 0.0 } else { share },
        };
        Ok(Launch { call, products, _text_products: text_products, words: words_range, texts: part.clone() })
    }
}

/// Scores and kept fractions of all pairs; `save` for the backward pass.
pub(super) fn forward(
    features: &Features,
    options: &Options,
    pairs: Pairs,
    seed: Option<u64>,
    save: bool,
) -> Result<(Scores, Option<Saved>)> {
    let place = Place::of(&features.patches)?;
    let device = features.patches.device();
    let (b, n, _) = features.patches.size3()?;
    let (t, longest, _) = features.words.size3()?;
    let columns = if pairs == Pairs::Diagonal { 1 } else { t };
    let empty = |width: i64, kind| Tensor::f_empty([b, columns, width], (kind, device));
    let tokens = features.prefix.size()[1] + features.logits.size()[2] + 1;
    let saved = match save {
        false => None,
        true => Some(Saved {
            selection: empty((n + 7) / 8, Kind::Uint8)?,
            best_token: empty(longest, Kind::Int16)?,
            best_word: empty(tokens, Kind::Int16)?,
        }),
    };
    let pairwise = Tensor::f_empty([b, columns], (Kind::Float, device))?;
    let outputs = Outputs { fraction: pairwise.f_empty_like()?, scores: pairwise, saved };
    let texts = Texts::new(features, pairs, options)?;
    let job = Job { features, options, pairs, seed };
    for (own, parts) in chunks(features, options, &texts, pairs, false)? {
        let images = Images::new(features, own, options)?;
        for part in parts {
            let launch = job.launch(&images, &texts, &part, &outputs, job.mode())?;
            // SAFETY: every address is of a tensor on the device with the sizes that kernels/call.cuh states; torch's
            // allocator keeps their memory until the stream, torch's default one, has passed this launch.
            unsafe { cuda::forward(place.device, Stream(0), place.element, place.tf32, &launch.call)? };
        }
    }
    let Outputs { scores, fraction, saved } = outputs;
    Ok((Scores { scores, kept_fraction: fraction }, saved))
}

// ---- gradients

/// Gradients of one chunk of images, summed over the captions.
struct Sums {
    rows: Tensor,
    gram: Tensor,
    weights: Tensor,
    keep: Option<Tensor>,
    poisoned: Tensor,
}

/// Gradients of patches, prefix, words, logits and perhaps the keep probability, in f32.
pub(super) fn backward(
    features: &Features,
    options: &Options,
    pairs: Pairs,
    seed: Option<u64>,
    saved: &Saved,
    grad_scores: &Tensor,
    grad_fraction: Option<&Tensor>,
) -> Result<Vec<Tensor>> {
    let (features, tf32) = widened(features)?;
    let place = Place { tf32, ..Place::of(&features.patches)? };
    let device = features.patches.device();
    let float = |tensor: &Tensor| tensor.f_to_device(device)?.f_to_kind(Kind::Float)?.f_contiguous();
    let grad_scores = float(grad_scores)?;
    let grad_fraction =
        grad_fraction.filter(|_| features.keep_probability.is_some()).map(float).transpose()?;
    let texts = Texts::new(&features, pairs, options)?;
    let words = texts.words.size();
    let zeros = |shape: &[i64], kind| Tensor::f_zeros(shape, (kind, device));
    let d_words = zeros(&words, Kind::Float)?;
    let poisoned_texts = zeros(&[texts.count.size()[0]], Kind::Bool)?;
    let shallow = |tensor: &Tensor| tensor.shallow_clone();
    let outputs = Outputs {
        scores: shallow(&grad_scores),
        fraction: shallow(&grad_scores),
        saved: Some(Saved {
            selection: shallow(&saved.selection),
            best_token: shallow(&saved.best_token),
            best_word: shallow(&saved.best_word),
        }),
    };
    let job = Job { features: &features, options, pairs, seed };
    let mut parts_of: [Vec<Tensor>; 4] = Default::default();
    for (own, parts) in chunks(&features, options, &texts, pairs, true)? {
        let images = Images::new(&features, own, options)?;
        let (b, stride, slots) = (images.count(), images.stride(), images.weights.size()[1]);
        let mut sums: Option<(Sums, i64)> = None;
        // The largest part first: its launch adds up in as many places as any.
        for part in parts {
            let launch = job.launch(&images, &texts, &part, &outputs, Selection::Saved)?;
            if sums.is_none() {
                let geometry = cuda::geometry(place.device, &launch.call, place.element, true)?;
                let warps = geometry.warps_per_image(launch.call.diagonal != 0) as i64;
                let keep = images
                    .keep_probability
                    .as_ref()
                    .map(|_| zeros(&[b, warps, images.patches()], Kind::Float));
                let fresh = Sums {
                    rows: zeros(&images.rows.size(), Kind::Float)?,
                    gram: zeros(&[b, stride, stride], Kind::Float)?,
                    weights: zeros(&[b, warps, slots, stride], Kind::Float)?,
                    keep: keep.transpose()?,
                    poisoned: zeros(&[b], Kind::Bool)?,
                };
                sums = Some((fresh, warps));
            }
            let (sums, warps) = sums.as_mut().expect("made above");
            let meets = if pairs == Pairs::Diagonal { 1 } else { part.end - part.start };
            let tokens = Tensor::f_empty([b, meets, slots, stride], (features.patches.kind(), device))?;
            let shrunk = tokens.f_empty_like()?;
            // Between the padded words of pairs there are rows that no pair writes.
            let grad_products = launch.products.f_zeros_like()?;
            let backward = BackwardCall {
                call: launch.call,
                grad_scores: address(&grad_scores),
                grad_fraction: grad_fraction.as_ref().map_or(0, address),
                grad_products: address(&grad_products),
                tokens: address(&tokens),
                shrunk_tokens: address(&shrunk),
                grad_weights: address(&sums.weights),
                grad_keep: sums.keep.as_ref().map_or(0, address),
                grad_mask: 0,
                poisoned_images: address(&sums.poisoned),
                poisoned_texts: address(&poisoned_texts.f_narrow(0, part.start, part.end - part.start)?),
                warps_per_image: *warps,
            };
            // SAFETY: as in `forward`, and kernels/gradient.cuh.
            unsafe { cuda::backward(place.device, Stream(0), place.element, place.tf32, &backward)? };
            sums.add(&launch, &grad_products, &images, &texts, &d_words)?;
            let flat = |tensor: &Tensor| tensor.f_view([b, -1, stride]);
            let added = product(&flat(&shrunk)?.f_transpose(1, 2)?, &flat(&tokens)?)?;
            sums.gram = sums.gram.f_add(&added)?;
        }
        let (sums, _) = sums.expect("at least one part");
        for (all, one) in parts_of.iter_mut().zip(sums.finish(&images)?) {
            all.extend(one);
        }
    }
    let [patches, prefix, logits, keep] = parts_of;
    let mut grads = vec![
        Tensor::f_cat(&patches, 0)?,
        Tensor::f_cat(&prefix, 0)?,
        through_words(&d_words, &texts, &features, &poisoned_texts)?,
        Tensor::f_cat(&logits, 0)?,
    ];
    if !keep.is_empty() {
        grads.push(Tensor::f_cat(&keep, 0)?);
    }
    Ok(grads)
}

impl Sums {
    /// What a launch left in dP, into the rows of its images and the words of its captions.
    fn add(
        &mut self,
        launch: &Launch,
        grad_products: &Tensor,
        images: &Images,
        texts: &Texts,
        d_words: &Tensor,
    ) -> Result<()> {
        let count = launch.words.end - launch.words.start;
        let words = texts.words.f_narrow(0, launch.words.start, count)?;
        let mut own = d_words.f_narrow(0, launch.words.start, count)?;
        let added = if launch.call.diagonal != 0 {
            let b = launch.texts.end - launch.texts.start;
            let words = words.f_view([b, count / b, -1])?;
            let _ = own.f_add_(&product(grad_products, &images.rows)?.f_flatten(0, 1)?)?;
            product(&grad_products.f_transpose(1, 2)?, &words)?
        } else {
            let _ = own.f_add_(&product(grad_products, &images.rows.f_flatten(0, 1)?)?)?;
            product(&grad_products.f_transpose(0, 1)?, &words)?.f_view(self.rows.size().as_slice())?
        };
        self.rows = self.rows.f_add(&added)?;
        Ok(())
    }

    /// From the rows to patches, prefix tokens, logits and the keep probability.
    fn finish(&self, images: &Images) -> Result<[Option<Tensor>; 4]> {
        let (n, p, aggregated) = (images.patches(), images.prefix, images.logits.size()[2]);
        let soft = i64::from(images.keep_probability.is_some());
        let rows = self.rows.f_sub(&self.gram.f_matmul(&images.rows.f_to_kind(Kind::Float)?)?)?;
        let mut patches = rows.f_narrow(1, 0, n)?;
        if soft == 1 {
            patches = patches.f_add(&rows.f_narrow(1, n, 1)?.f_div_scalar(n)?)?;
        }
        let patches = patches.f_mul(&images.scale)?;
        let units = images.rows.f_narrow(1, n + soft, p)?.f_to_kind(Kind::Float)?;
        let prefix = through_unit(&rows.f_narrow(1, n + soft, p)?, &units)?.f_mul(&images.prefix_inverse)?;
        let weights = self.weights.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?;
        let weights = weights.f_narrow(1, p, aggregated)?;
        let mut logits = images.exponentials.f_mul(&weights.f_narrow(2, 0, n)?)?;
        if soft == 1 {
            // The stable form fixes the scale of E against eps, so its maximum carries minus the sum of these gradients: as
            // a direction has no scale, what eps, the weight of the mean, has.
            let highest = images.logits.f_argmax(1, false)?.f_unsqueeze(2)?;
            logits = logits.f_scatter_add(2, &highest, &weights.f_narrow(2, n, 1)?.f_mul_scalar(EPSILON)?)?;
        }
        let keep = match &self.keep {
            None => None,
            Some(keep) => Some(keep.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Float)?),
        };
        // A pair without a score has no gradient; where one came to it, it is the gradient's turn to be NaN.
        let told = |gradient: Tensor| -> Result<Option<Tensor>> {
            let mut shape = vec![1; gradient.dim()];
            shape[0] = -1;
            let gradient = kept(&gradient, &images.finite.f_view(shape.as_slice())?, 0.0)?;
            Ok(Some(gradient.f_masked_fill(&self.poisoned.f_view(shape.as_slice())?, f64::NAN)?))
        };
        let logits = logits.f_transpose(1, 2)?;
        Ok([told(patches)?, told(prefix)?, told(logits)?, keep.map(told).transpose()?.flatten()])
    }
}

/// The part of a gradient that changes a vector's direction.
fn through_unit(gradient: &Tensor, unit: &Tensor) -> Result<Tensor> {
    let along = gradient.f_mul(unit)?.f_sum_dim_intlist([-1i64].as_slice(), true, Kind::Float)?;
    Ok(gradient.f_sub(&unit.f_mul(&along)?)?)
}

/// From the words of all captions (W, C) to the padded ones (B_t, L, C).
fn through_words(gradient: &Tensor, texts: &Texts, features: &Features, poisoned: &Tensor) -> Result<Tensor> {
    let (t, longest, c) = features.words.size3()?;
    let units = texts.words.f_to_kind(Kind::Float)?.f_mul(&texts.inverse.f_unsqueeze(1)?)?;
    let gradient = through_unit(gradient, &units)?.f_mul(&texts.scale)?;
    let padded = Tensor::f_zeros([t * longest, c], (Kind::Float, gradient.device()))?;
    let padded = padded.f_index_copy(0, &texts.places, &gradient)?.f_view([t, longest, c])?;
    let place = Tensor::f_arange(longest, (Kind::Int64, padded.device()))?;
    let real = place.f_lt_tensor(&texts.count.f_unsqueeze(1)?)?.f_unsqueeze(2)?;
    let poisoned = poisoned.f_view([t, 1, 1])?.f_logical_and(&real)?;
    Ok(kept(&padded, &real, 0.0)?.f_masked_fill(&poisoned, f64::NAN)?)
}
