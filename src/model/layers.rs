//! The layers that the encoders share, over tch tensors. Every call returns what torch refused as a [`LapsError`].

use serde::Deserialize;
use tch::nn::Init;
use tch::{Kind, Tensor};

use super::Result;
use super::source::{Initial, Scope};

const ZEROS: Init = Init::Const(0.0);
const ONES: Init = Init::Const(1.0);

/// Normal with mean 0.
pub fn normal(stdev: f64) -> Init {
    Init::Randn { mean: 0.0, stdev }
}

/// `x W^T + b`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    pub fn new(mut at: Scope<'_>, from: i64, to: i64, bias: bool, init: Init) -> Result<Self> {
        let weight = at.tensor("weight", &[to, from], init)?;
        let bias = bias.then(|| at.tensor("bias", &[to], ZEROS)).transpose()?;
        Ok(Linear { weight, bias })
    }

    /// With torch's own initial values, uniform within `1 / sqrt(from)`.
    pub fn uniform(mut at: Scope<'_>, from: i64, to: i64) -> Result<Self> {
        let bound = (from as f64).powf(-0.5);
        let init = Init::Uniform { lo: -bound, up: bound };
        let weight = at.tensor("weight", &[to, from], init)?;
        Ok(Linear { weight, bias: Some(at.tensor("bias", &[to], init)?) })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_linear(&self.weight, self.bias.as_ref())?)
    }
}

#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl LayerNorm {
    pub fn new(mut at: Scope<'_>, size: i64, epsilon: f64) -> Result<Self> {
        let weight = at.tensor("weight", &[size], ONES)?;
        Ok(LayerNorm { weight, bias: at.tensor("bias", &[size], ZEROS)?, epsilon })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let size = self.weight.size();
        Ok(x.f_layer_norm(size, Some(&self.weight), Some(&self.bias), self.epsilon, true)?)
    }
}

/// A table of vectors, looked up by index.
#[derive(Debug)]
pub struct Embedding {
    pub weight: Tensor,
    /// The row that has no gradient, or -1.
    padding: i64,
}

impl Embedding {
    pub fn new(mut at: Scope<'_>, rows: i64, size: i64, padding: Option<i64>, init: Init) -> Result<Self> {
        let initial = Initial::with_zero_row(init, padding);
        Ok(Embedding { weight: at.tensor("weight", &[rows, size], initial)?, padding: padding.unwrap_or(-1) })
    }

    pub fn forward(&self, indices: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_embedding(&self.weight, indices, self.padding, false, false)?)
    }
}

/// Non-overlapping squares of pixels, each through the same linear map: (B, 3, S, S) to (B, D, S/p, S/p).
#[derive(Debug)]
pub struct Patches {
    weight: Tensor,
    bias: Option<Tensor>,
    size: i64,
}

impl Patches {
    pub fn new(mut at: Scope<'_>, channels: i64, to: i64, size: i64, bias: bool, init: Init) -> Result<Self> {
        let weight = at.tensor("weight", &[to, channels, size, size], init)?;
        let bias = bias.then(|| at.tensor("bias", &[to], ZEROS)).transpose()?;
        Ok(Patches { weight, bias, size })
    }

    pub fn forward(&self, pixels: &Tensor) -> Result<Tensor> {
        let stride = [self.size, self.size];
        let pixels = pixels.f_to_kind(self.weight.kind())?;
        Ok(pixels.f_conv2d(&self.weight, self.bias.as_ref(), stride, [0, 0], [1, 1], 1)?)
    }
}

/// The activations that configurations name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    Gelu,
    /// `x sigmoid(1.702 x)`, CLIP's.
    QuickGelu,
    /// By tanh.
    #[serde(alias = "gelu_pytorch_tanh")]
    GeluNew,
    Relu,
}

impl Activation {
    pub fn forward(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Gelu => x.f_gelu("none")?,
            Activation::QuickGelu => x.f_mul(&x.f_mul_scalar(1.702)?.f_sigmoid()?)?,
            Activation::GeluNew => x.f_gelu("tanh")?,
            Activation::Relu => x.f_relu()?,
        })
    }
}

/// Two linear maps with an activation between them.
#[derive(Debug)]
pub struct Mlp {
    pub first: Linear,
    pub second: Linear,
    pub activation: Activation,
}

impl Mlp {
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.second.forward(&self.activation.forward(&self.first.forward(x)?)?)
    }
}

/// Which tokens a token may look at.
pub enum Mask<'a> {
    All,
    /// Those before it, and itself.
    Before,
    /// Where true, or as this is added to the logits: broadcast to (B, heads, T, T).
    Given(&'a Tensor),
}

/// Multi-head self-attention.
#[derive(Debug)]
pub struct Attention {
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
    pub heads: i64,
    /// Of the attention weights.
    pub dropout: f64,
}

impl Attention {
    /// (B, T, D) to (B, T, D).
    pub fn forward(&self, x: &Tensor, mask: Mask<'_>, train: bool) -> Result<Tensor> {
        let (b, t, d) = x.size3()?;
        let split = |map: &Linear| -> Result<Tensor> {
            Ok(map.forward(x)?.f_view([b, t, self.heads, d / self.heads])?.f_transpose(1, 2)?)
        };
        let (query, key, value) = (split(&self.query)?, split(&self.key)?, split(&self.value)?);
        let (given, causal) = match mask {
            Mask::All => (None, false),
            Mask::Before => (None, true),
            Mask::Given(mask) => (Some(mask), false),
        };
        let dropout = if train { self.dropout } else { 0.0 };
        let mixed = Tensor::f_scaled_dot_product_attention(
            &query, &key, &value, given, dropout, causal, None, false,
        )?;
        self.output.forward(&mixed.f_transpose(1, 2)?.f_reshape([b, t, d])?)
    }
}

/// A transformer layer that normalises before attention and before the MLP, as ViT and CLIP have it.
#[derive(Debug)]
pub struct PreNorm {
    pub attention_norm: LayerNorm,
    pub attention: Attention,
    pub mlp_norm: LayerNorm,
    pub mlp: Mlp,
    /// Of what each half adds.
    pub dropout: f64,
}

impl PreNorm {
    pub fn forward(&self, x: &Tensor, mask: Mask<'_>, train: bool) -> Result<Tensor> {
        let mixed = self.attention.forward(&self.attention_norm.forward(x)?, mask, train)?;
        let x = dropout(&mixed, self.dropout, train)?.f_add(x)?;
        let changed = self.mlp.forward(&self.mlp_norm.forward(&x)?)?;
        Ok(dropout(&changed, self.dropout, train)?.f_add(&x)?)
    }
}

pub fn dropout(x: &Tensor, probability: f64, train: bool) -> Result<Tensor> {
    if !train || probability == 0.0 {
        return Ok(x.shallow_clone());
    }
    Ok(x.f_dropout(probability, true)?)
}

/// Stochastic depth (Huang et al., 2016): drops the whole of `x` for some items of the batch.
pub fn drop_path(x: &Tensor, probability: f64, train: bool) -> Result<Tensor> {
    if !train || probability == 0.0 {
        return Ok(x.shallow_clone());
    }
    let keep = 1.0 - probability;
    let mut shape = vec![1; x.dim()];
    shape[0] = x.size()[0];
    let kept = Tensor::f_rand(shape, (x.kind(), x.device()))?.f_add_scalar(keep)?.f_floor()?;
    Ok(x.f_div_scalar(keep)?.f_mul(&kept)?)
}

/// Position embeddings (N, D) of a square grid for another square grid, by bicubic interpolation.
pub fn resize_grid(positions: &Tensor, side: i64) -> Result<Tensor> {
    let (n, d) = positions.size2()?;
    let old = n.isqrt();
    let wide =
        positions.f_to_kind(if positions.kind() == Kind::Double { Kind::Double } else { Kind::Float })?;
    let grid = wide.f_reshape([1, old, old, d])?.f_permute([0, 3, 1, 2])?;
    let grid = grid.f_upsample_bicubic2d([side, side], false, None, None)?;
    Ok(grid.f_permute([0, 2, 3, 1])?.f_reshape([side * side, d])?.f_to_kind(positions.kind())?)
}
