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
}

impl LapsHead {
    pub fn new(
        mut at: Scope<'_>,
        embed_dim: i64,
        patches: i64,
        prefix: i64,
        options: &HeadOptions,
    ) -> Result<Self> {
        let kernel = options.kernel_options();
        kernel.check("LapsHead")?;
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
        Ok(LapsHead { options, kernel, prefix, patches, scale, aggregation_norm, aggregation, score })
    }

    pub fn options(&self) -> &HeadOptions {
        &self.options
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

/// A scored batch that waits for the gradient of its scores.
pub struct Scored {
    input: Input,
    options: Options,
    saved: Option<Saved>,
    /// The features of the graph: patches, prefix, words, logits and perhaps the keep probability.
    features: Vec<Tensor>,
}

/// Features as the kernels take them: detached, contiguous, on the CPU, in f64 or f32.
struct Input {
    patches: Tensor,
    prefix: Tensor,
    words: Tensor,
    logits: Tensor,
    keep_probability: Option<Tensor>,
    lengths: Tensor,
    pairs: Pairs,
    seed: Option<u64>,
}

impl Input {
    fn with<T: Element, R>(&self, job: impl FnOnce(&PairInput<'_, T>) -> Result<R>) -> Result<R> {
        let keep_probability = self.keep_probability.as_ref().map(view::<T, Ix2>).transpose()?;
        job(&PairInput {
            patches: view::<T, Ix3>(&self.patches)?,
            prefix: view::<T, Ix3>(&self.prefix)?,
            words: view::<T, Ix3>(&self.words)?,
            word_lengths: view::<i64, Ix1>(&self.lengths)?,
            logits: view::<T, Ix3>(&self.logits)?,
            selection: match keep_probability {
                None => Selection::Scores,
                Some(probability) => Selection::KeepProbability { probability, seed: self.seed },
            },
            pairs: self.pairs,
            interrupt: None,
        })
    }

    /// Zeros for the gradient of each feature, in the order of [`Scored::features`].
    fn zeros(&self) -> Result<Vec<Tensor>> {
        [&self.patches, &self.prefix, &self.words, &self.logits]
            .into_iter()
            .chain(&self.keep_probability)
            .map(|tensor| Ok(tensor.f_zeros_like()?))
            .collect()
    }
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
        let mut features = Vec::from(
            [&images.patches, &images.prefix, &texts.words, &images.logits].map(Tensor::shallow_clone),
        );
        features.extend(images.keep_probability.as_ref().map(Tensor::shallow_clone));
        let wide = features.iter().all(|tensor| tensor.kind() == Kind::Double);
        let kind = if wide { Kind::Double } else { Kind::Float };
        let plain = |tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(kind)?.f_contiguous()?)
        };
        let input = Input {
            patches: plain(&images.patches)?,
            prefix: plain(&images.prefix)?,
            words: plain(&texts.words)?,
            logits: plain(&images.logits)?,
            keep_probability: images.keep_probability.as_ref().map(plain).transpose()?,
            lengths: texts.lengths.f_to_device(Device::Cpu)?.f_to_kind(Kind::Int64)?.f_contiguous()?,
            pairs,
            seed,
        };
        let mut scored = Scored { input, options: head.kernel, saved: None, features };
        let scores = if wide { scored.forward::<f64>(save)? } else { scored.forward::<f32>(save)? };
        Ok((scored, scores))
    }

    fn forward<T: Element>(&mut self, save: bool) -> Result<Scores> {
        let result = self.input.with::<T, _>(|input| similarity(input, &self.options, save))?;
        let tensor = |array: ndarray::Array2<T>| -> Result<Tensor> {
            let (rows, columns) = array.dim();
            let (elements, _) = array.into_raw_vec_and_offset();
            Ok(Tensor::f_from_slice(&elements)?.f_view([rows as i64, columns as i64])?)
        };
        self.saved = result.saved;
        Ok(Scores { scores: tensor(result.scores)?, kept_fraction: tensor(result.kept_fraction)? })
    }

    /// From the gradients of scores and kept fractions to a number whose gradient is theirs, with respect to everything
    /// that the features were computed from. Its value means nothing.
    pub fn carry(&self, grad_scores: &Tensor, grad_fraction: Option<&Tensor>) -> Result<Tensor> {
        let grads = if self.input.patches.kind() == Kind::Double {
            self.gradients::<f64>(grad_scores, grad_fraction)?
        } else {
            self.gradients::<f32>(grad_scores, grad_fraction)?
        };
        let mut sum = Tensor::f_zeros([], (self.input.patches.kind(), self.features[0].device()))?;
        for (feature, grad) in self.features.iter().zip(grads) {
            let grad = grad.f_to_device(feature.device())?.f_to_kind(feature.kind())?;
            sum = sum.f_add(&feature.f_mul(&grad)?.f_sum(sum.kind())?)?;
        }
        Ok(sum)
    }

    fn gradients<T: Element>(
        &self,
        grad_scores: &Tensor,
        grad_fraction: Option<&Tensor>,
    ) -> Result<Vec<Tensor>> {
        let Some(saved) = &self.saved else {
            return Err(LapsError::value("similarity", "save", "a forward pass that saved", "none"));
        };
        let plain = |tensor: &Tensor| -> Result<Tensor> {
            Ok(tensor.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(T::KIND)?.f_contiguous()?)
        };
        let grad_scores = plain(grad_scores)?;
        let grad_fraction = grad_fraction.map(plain).transpose()?;
        let mut grads = self.input.zeros()?;
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
        self.input.with::<T, _>(|input| {
            similarity_backward(input, &self.options, saved, scores, fraction, &mut out)
        })?;
        Ok(grads)
    }
}
