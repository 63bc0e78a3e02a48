//! The LAPS head: the text-independent networks on tch tensors, and the fused kernels between them and the scores.
//!
//! tch has no autograd function of one's own. So the kernels run on detached features, and what they say of the gradient
//! comes back into the graph as an inner product: `sum_f <f, dL/df>` has exactly the gradient of the loss with respect to
//! every feature f.

use ndarray::{Ix1, Ix2, Ix3};
use tch::{Device, Kind, Tensor};

use super::Result;
use super::arrays::{Element, view, view_mut};
use super::config::HeadOptions;
use super::layers::{Activation, LayerNorm, Linear, Mlp};
use super::source::Scope;
use crate::error::LapsError;
use crate::slimming::{
    GradientsMut, Options, PairInput, Pairs, Saved, Selection, similarity, similarity_backward,
};

const EPSILON: f64 = 1e-5;

/// Everything about B_v images that no caption changes.
#[derive(Debug)]
pub struct ImageFeatures {
    /// (B_v, N, C)
    pub patches: Tensor,
    /// (B_v, P, C)
    pub prefix: Tensor,
    /// (B_v, N, N_c)
    pub logits: Tensor,
    /// (B_v, N), of the paper variant
    pub keep_probability: Option<Tensor>,
}

/// Everything about B_t captions that no image changes.
#[derive(Debug)]
pub struct TextFeatures {
    /// (B_t, L, C)
    pub words: Tensor,
    /// (B_t,), int64 on the CPU
    pub lengths: Tensor,
}

impl ImageFeatures {
    /// One after the other.
    pub fn cat(parts: &[ImageFeatures]) -> Result<Self> {
        let all = |field: fn(&ImageFeatures) -> Option<&Tensor>| -> Result<Option<Tensor>> {
            let tensors: Vec<&Tensor> = parts.iter().filter_map(field).collect();
            Ok((!tensors.is_empty()).then(|| Tensor::f_cat(&tensors, 0)).transpose()?)
        };
        let some = |field| all(field)?.ok_or_else(|| LapsError::value("cat", "parts", "at least one", 0));
        Ok(ImageFeatures {
            patches: some(|part| Some(&part.patches))?,
            prefix: some(|part| Some(&part.prefix))?,
            logits: some(|part| Some(&part.logits))?,
            keep_probability: all(|part| part.keep_probability.as_ref())?,
        })
    }
}

impl TextFeatures {
    /// One after the other, padded to the longest.
    pub fn cat(parts: &[TextFeatures]) -> Result<Self> {
        if let Some(part) = parts.iter().find(|part| part.words.dim() != 3) {
            return Err(LapsError::shape("cat", "words", "(B_t, L, C)", format!("{:?}", part.words.size())));
        }
        let Some(longest) = parts.iter().map(|part| part.words.size()[1]).max() else {
            return Err(LapsError::value("cat", "parts", "at least one", 0));
        };
        let padded = |part: &TextFeatures| -> Result<Tensor> {
            Ok(part.words.f_constant_pad_nd([0, 0, 0, longest - part.words.size()[1]])?)
        };
        let words = parts.iter().map(padded).collect::<Result<Vec<_>>>()?;
        let lengths: Vec<&Tensor> = parts.iter().map(|part| &part.lengths).collect();
        Ok(TextFeatures { words: Tensor::f_cat(&words, 0)?, lengths: Tensor::f_cat(&lengths, 0)? })
    }
}

/// Scores and kept fractions, both (B_v, B_t), or (B,) pair by pair, without gradient.
#[derive(Debug)]
pub struct Scores {
    pub scores: Tensor,
    pub kept_fraction: Tensor,
}

/// The trainable part: the aggregation network of SPC and, in the paper variant, the score net of LPS.
#[derive(Debug)]
pub struct LapsHead {
    options: HeadOptions,
    kernel: Options,
    prefix: i64,
    patches: i64,
    scale: Tensor,
    aggregation_norm: LayerNorm,
    aggregation: Mlp,
    score: Option<(LayerNorm, Mlp)>,
    /// For tests with the stand-ins of driver and NVRTC: the kernels for GPUs, on tensors of the CPU.
    #[cfg(feature = "cuda")]
    emulated: bool,
}

impl LapsHead {
    pub fn new(
        mut at: Scope<'_>,
        embed_dim: i64,
        patches: i64,
        prefix: i64,
        options: &HeadOptions,
    ) -> Result<Self> {
        options.check()?;
        let kernel = options.kernel_options();
        let tokens = options.aggregated(patches)?;
        let mut at_aggregation = at.sub("aggregation");
        let scale = at_aggregation.tensor("scale", &[1, 1, 1], tch::nn::Init::Const(1.0))?;
        let (aggregation_norm, aggregation) =
            network(at_aggregation, embed_dim, ((0.2 * embed_dim as f64) as i64).max(1), tokens)?;
        let score = options
            .has_score_net()
            .then(|| network(at.sub("score"), embed_dim, (embed_dim / 4).max(1), 2))
            .transpose()?;
        let options = options.clone();
        Ok(LapsHead {
            options,
            kernel,
            prefix,
            patches,
            scale,
            aggregation_norm,
            aggregation,
            score,
            #[cfg(feature = "cuda")]
            emulated: false,
        })
    }

    /// Whether the kernels of `cuda` score these; those of `slimming` do otherwise, and always in f64.
    #[cfg(feature = "cuda")]
    fn runs_on_gpu(&self, features: &Features) -> bool {
        let gpu = self.emulated || features.patches.device().is_cuda();
        gpu && features.patches.kind() != Kind::Double
    }

    /// From here on the kernels for GPUs score what is on the CPU. Refused unless the driver is the tests' stand-in.
    #[cfg(feature = "cuda")]
    #[doc(hidden)]
    pub fn emulate_gpu(&mut self) -> Result<()> {
        if !crate::cuda::libraries()?.driver.emulated {
            return Err(LapsError::device("LapsHead", "no emulator", "tests/cuda", "a driver of real GPUs"));
        }
        self.emulated = true;
        Ok(())
    }

    pub fn options(&self) -> &HeadOptions {
        &self.options
    }

    /// Budget of scratch memory of a call, in bytes. None: 24 MiB on the CPU; on a GPU 1 GiB forward and 192 MiB backward.
    pub fn set_chunk(&mut self, bytes: Option<usize>) -> Result<()> {
        let kernel = Options { chunk: bytes, ..self.kernel };
        kernel.check("LapsHead::set_chunk")?;
        self.kernel = kernel;
        Ok(())
    }

    /// Image tokens (B_v, P + N, C), prefix first, to features.
    pub fn encode_image(&self, tokens: &Tensor) -> Result<ImageFeatures> {
        let (_, count, _) = tokens.size3()?;
        if count != self.prefix + self.patches {
            let expected = format!("{} prefix tokens + {} patches", self.prefix, self.patches);
            return Err(LapsError::shape("LapsHead", "image_tokens", expected, count));
        }
        let prefix = tokens.f_narrow(1, 0, self.prefix)?;
        let patches = tokens.f_narrow(1, self.prefix, self.patches)?;
        let logits = self.aggregation.forward(&self.aggregation_norm.forward(&patches)?)?;
        let keep_probability = match &self.score {
            None => None,
            Some((norm, net)) => {
                let odds = net.forward(&norm.forward(&patches)?)?;
                Some(odds.f_softmax(-1, odds.kind())?.f_select(-1, 0)?)
            }
        };
        Ok(ImageFeatures { patches, prefix, logits: logits.f_mul(&self.scale)?, keep_probability })
    }

    /// Refuses features that another head made.
    fn check_features(&self, images: &ImageFeatures) -> Result<()> {
        let sizes = |tensor: &Tensor, axis: usize| tensor.size().get(axis).copied();
        let own = [
            ("patches", sizes(&images.patches, 1), self.patches),
            ("prefix", sizes(&images.prefix, 1), self.prefix),
            ("logits", sizes(&images.logits, 2), self.options.aggregated(self.patches)?),
            (
                "keep_probability",
                Some(i64::from(images.keep_probability.is_some())),
                i64::from(self.score.is_some()),
            ),
        ];
        for (name, got, expected) in own {
            if got.is_some_and(|got| got != expected) {
                let (expected, got) = (format!("this head's {expected}"), got.unwrap_or_default());
                return Err(LapsError::value("similarity", name, expected, got));
            }
        }
        Ok(())
    }

    /// Scores of every image with every caption, (B_v, B_t); no selection is sampled.
    pub fn similarity(&self, images: &ImageFeatures, texts: &TextFeatures) -> Result<Scores> {
        let (_, scores) = Scored::new(self, images, texts, Pairs::All, None, false)?;
        Ok(scores)
    }

    /// Scores of image i with caption i, (B,); no selection is sampled.
    pub fn similarity_pairwise(&self, images: &ImageFeatures, texts: &TextFeatures) -> Result<Scores> {
        let (_, scores) = Scored::new(self, images, texts, Pairs::Diagonal, None, false)?;
        let flat = |tensor: Tensor| tensor.f_squeeze_dim(1);
        Ok(Scores { scores: flat(scores.scores)?, kept_fraction: flat(scores.kept_fraction)? })
    }

    /// Scores for a loss, and what takes its gradient on to the features. With a score net the selection is sampled, its
    /// seed drawn from torch's default generator of the CPU, as Python does.
    pub fn training_scores(&self, images: &ImageFeatures, texts: &TextFeatures) -> Result<(Scored, Scores)> {
        let seed = match &self.score {
            None => None,
            Some(_) => {
                let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
                Some(seed.f_int64_value(&[0])? as u64)
            }
        };
        Scored::new(self, images, texts, Pairs::All, seed, true)
    }
}

fn network(mut at: Scope<'_>, from: i64, hidden: i64, to: i64) -> Result<(LayerNorm, Mlp)> {
    let norm = LayerNorm::new(at.sub("norm"), from, EPSILON)?;
    let mlp = Mlp {
        first: Linear::uniform(at.sub("fc1"), from, hidden)?,
        second: Linear::uniform(at.sub("fc2"), hidden, to)?,
        activation: Activation::Gelu,
    };
    Ok((norm, mlp))
}

/// What pairs are scored from, in the graph.
#[derive(Debug)]
pub(super) struct Features {
    pub patches: Tensor,
    pub prefix: Tensor,
    pub words: Tensor,
    pub logits: Tensor,
    pub keep_probability: Option<Tensor>,
    pub lengths: Tensor,
}

impl Features {
    fn new(images: &ImageFeatures, texts: &TextFeatures) -> Self {
        Features {
            patches: images.patches.shallow_clone(),
            prefix: images.prefix.shallow_clone(),
            words: texts.words.shallow_clone(),
            logits: images.logits.shallow_clone(),
            keep_probability: images.keep_probability.as_ref().map(Tensor::shallow_clone),
            lengths: texts.lengths.shallow_clone(),
        }
    }

    /// All that carry gradient, in the order of their gradients.
    fn each(&self) -> impl Iterator<Item = &Tensor> {
        [&self.patches, &self.prefix, &self.words, &self.logits].into_iter().chain(&self.keep_probability)
    }

    /// The same, each changed by `job`; lengths stay as they are.
    fn map(&self, mut job: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Features> {
        Ok(Features {
            patches: job(&self.patches)?,
            prefix: job(&self.prefix)?,
            words: job(&self.words)?,
            logits: job(&self.logits)?,
            keep_probability: self.keep_probability.as_ref().map(job).transpose()?,
            lengths: self.lengths.shallow_clone(),
        })
    }

    /// Refuses sizes that do not fit each other, before any kernel sees them.
    #[cfg(feature = "cuda")]
    fn check(&self, pairs: Pairs) -> Result<()> {
        const MOST: i64 = 16384;
        let refuse = |argument, expected: String, tensor: &Tensor| {
            Err(LapsError::shape("similarity", argument, expected, format!("{:?}", tensor.size())))
        };
        let (patches, words) = (self.patches.size(), self.words.size());
        let [b, n, c] = patches[..] else { return refuse("patches", "rank 3".to_owned(), &self.patches) };
        if b < 1 || !(1..=MOST).contains(&n) || c < 1 {
            return refuse("patches", format!("(B_v >= 1, 1 <= N <= {MOST}, C >= 1)"), &self.patches);
        }
        let [t, l, _] = words[..] else { return refuse("words", "rank 3".to_owned(), &self.words) };
        if t < 1 || !(1..=MOST).contains(&l) || words[2] != c {
            return refuse("words", format!("(B_t >= 1, 1 <= L <= {MOST}, {c})"), &self.words);
        }
        if pairs == Pairs::Diagonal && b != t {
            return refuse("words", format!("one text per image, B_t={b}"), &self.words);
        }
        let prefix = self.prefix.size();
        if prefix.len() != 3 || prefix[0] != b || prefix[2] != c {
            return refuse("prefix", format!("({b}, P, {c})"), &self.prefix);
        }
        let logits = self.logits.size();
        if logits.len() != 3 || logits[..2] != [b, n] || logits[2] < 1 || prefix[1] + logits[2] > MOST {
            return refuse("logits", format!("({b}, {n}, N_c >= 1)"), &self.logits);
        }
        if let Some(keep) = self.keep_probability.as_ref().filter(|keep| keep.size() != [b, n]) {
            return refuse("keep_probability", format!("({b}, {n})"), keep);
        }
        if self.lengths.size() != [t] {
            return refuse("lengths", format!("({t},)"), &self.lengths);
        }
        let device = self.patches.device();
        if let Some(other) = self.each().find(|tensor| tensor.device() != device) {
            let (expected, got) = (format!("{device:?}"), format!("{:?}", other.device()));
            return Err(LapsError::value("similarity", "features", expected, got));
        }
        Ok(())
    }

    #[cfg(feature = "cuda")]
    pub fn shallow(&self) -> Features {
        self.map(|tensor| Ok(tensor.shallow_clone())).expect("nothing to fail")
    }
}

/// A scored batch that waits for the gradient of its scores.
#[derive(Debug)]
pub struct Scored {
    features: Features,
    options: Options,
    kernels: Kernels,
}

/// Where pairs were scored, and what was saved there.
#[derive(Debug)]
enum Kernels {
    Cpu(Box<Input>, Option<Saved>),
    #[cfg(feature = "cuda")]
    Gpu {
        pairs: Pairs,
        seed: Option<u64>,
        saved: Option<super::gpu::Saved>,
    },
}

/// Features as the kernels of the CPU take them: detached, contiguous, in f64 or f32.
#[derive(Debug)]
struct Input {
    features: Features,
    pairs: Pairs,
    seed: Option<u64>,
}

impl Input {
    fn with<T: Element, R>(&self, job: impl FnOnce(&PairInput<'_, T>) -> Result<R>) -> Result<R> {
        let Features { patches, prefix, words, logits, keep_probability, lengths } = &self.features;
        let keep_probability = keep_probability.as_ref().map(view::<T, Ix2>).transpose()?;
        job(&PairInput {
            patches: view::<T, Ix3>(patches)?,
            prefix: view::<T, Ix3>(prefix)?,
            words: view::<T, Ix3>(words)?,
            word_lengths: view::<i64, Ix1>(lengths)?,
            logits: view::<T, Ix3>(logits)?,
            selection: match keep_probability {
                None => Selection::Scores,
                Some(probability) => Selection::KeepProbability { probability, seed: self.seed },
            },
            pairs: self.pairs,
            interrupt: None,
        })
    }

    fn is_double(&self) -> bool {
        self.features.patches.kind() == Kind::Double
    }

    fn forward<T: Element>(&self, options: &Options, save: bool) -> Result<(Scores, Option<Saved>)> {
        let result = self.with::<T, _>(|input| similarity(input, options, save))?;
        let tensor = |array: ndarray::Array2<T>| -> Result<Tensor> {
            let (rows, columns) = array.dim();
            let (elements, _) = array.into_raw_vec_and_offset();
            Ok(Tensor::f_from_slice(&elements)?.f_view([rows as i64, columns as i64])?)
        };
        let scores = Scores { scores: tensor(result.scores)?, kept_fraction: tensor(result.kept_fraction)? };
        Ok((scores, result.saved))
    }

    fn backward<T: Element>(
        &self,
        options: &Options,
        saved: &Saved,
        grad_scores: &Tensor,
        grad_fraction: Option<&Tensor>,
    ) -> Result<Vec<Tensor>> {
        let plain = |tensor: &Tensor| on_cpu(tensor, T::KIND);
        let grad_scores = plain(grad_scores)?;
        let grad_fraction = grad_fraction.map(plain).transpose()?;
        let mut grads = self.features.each().map(|x| Ok(x.f_zeros_like()?)).collect::<Result<Vec<_>>>()?;
        let [patches, prefix, words, logits, rest @ ..] = grads.as_mut_slice() else {
            unreachable!("four features at least")
        };
        let keep_probability = rest.first_mut().map(view_mut::<T, Ix2>).transpose()?;
        let mut out = GradientsMut {
            patches: view_mut::<T, Ix3>(patches)?,
            prefix: view_mut::<T, Ix3>(prefix)?,
            words: view_mut::<T, Ix3>(words)?,
            logits: view_mut::<T, Ix3>(logits)?,
            keep_probability,
            mask: None,
        };
        let fraction = grad_fraction.as_ref().map(view::<T, Ix2>).transpose()?;
        let scores = view::<T, Ix2>(&grad_scores)?;
        self.with::<T, _>(|input| similarity_backward(input, options, saved, scores, fraction, &mut out))?;
        Ok(grads)
    }
}

fn on_cpu(tensor: &Tensor, kind: Kind) -> Result<Tensor> {
    Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?)
}

impl Scored {
    fn new(
        head: &LapsHead,
        images: &ImageFeatures,
        texts: &TextFeatures,
        pairs: Pairs,
        seed: Option<u64>,
        save: bool,
    ) -> Result<(Self, Scores)> {
        head.check_features(images)?;
        let (features, options) = (Features::new(images, texts), head.kernel);
        #[cfg(feature = "cuda")]
        if head.runs_on_gpu(&features) {
            // The kernels of the CPU check for themselves.
            features.check(pairs)?;
            let detached = features.map(|tensor| Ok(tensor.f_detach()?))?;
            let (scores, saved) = super::gpu::forward(&detached, &options, pairs, seed, save)?;
            return Ok((Scored { features, options, kernels: Kernels::Gpu { pairs, seed, saved } }, scores));
        }
        let wide = features.each().all(|tensor| tensor.kind() == Kind::Double);
        let kind = if wide { Kind::Double } else { Kind::Float };
        let mut plain = features.map(|tensor| on_cpu(tensor, kind))?;
        plain.lengths = on_cpu(&texts.lengths, Kind::Int64)?;
        let input = Input { features: plain, pairs, seed };
        let (scores, saved) = if wide {
            input.forward::<f64>(&options, save)?
        } else {
            input.forward::<f32>(&options, save)?
        };
        Ok((Scored { features, options, kernels: Kernels::Cpu(Box::new(input), saved) }, scores))
    }

    /// From the gradients of scores and kept fractions to a number whose gradient is theirs, with respect to everything
    /// that the features were computed from. Its value is zero, for finite features.
    pub fn carry(&self, grad_scores: &Tensor, grad_fraction: Option<&Tensor>) -> Result<Tensor> {
        let unsaved = || LapsError::value("similarity", "save", "a forward pass that saved", "none");
        let grads = match &self.kernels {
            Kernels::Cpu(input, saved) => {
                let saved = saved.as_ref().ok_or_else(unsaved)?;
                if input.is_double() {
                    input.backward::<f64>(&self.options, saved, grad_scores, grad_fraction)?
                } else {
                    input.backward::<f32>(&self.options, saved, grad_scores, grad_fraction)?
                }
            }
            #[cfg(feature = "cuda")]
            Kernels::Gpu { pairs, seed, saved } => {
                let saved = saved.as_ref().ok_or_else(unsaved)?;
                let features = self.features.map(|tensor| Ok(tensor.f_detach()?))?;
                let options = &self.options;
                super::gpu::backward(&features, options, *pairs, *seed, saved, grad_scores, grad_fraction)?
            }
        };
        let first = &self.features.patches;
        let kind = if first.kind() == Kind::Double { Kind::Double } else { Kind::Float };
        let mut sum = Tensor::f_zeros([], (kind, first.device()))?;
        for (feature, grad) in self.features.each().zip(grads) {
            let grad = grad.f_to_device(first.device())?.f_to_kind(kind)?;
            // Zero, with the feature's gradient: nothing overflows, and halves are left only behind it.
            let still = feature.f_sub(&feature.f_detach()?)?.f_to_kind(kind)?;
            sum = sum.f_add(&still.f_mul(&grad)?.f_sum(kind)?)?;
        }
        Ok(sum)
    }
}
