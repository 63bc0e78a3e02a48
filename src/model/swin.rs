//! The Swin transformer (Liu et al., ICCV 2021): attention within shifted windows, with the key names of `SwinModel`.

use serde::Deserialize;
use tch::nn::Init;
use tch::{Device, Kind, Tensor};

use super::Result;
use super::backbone::{check_heads, check_image, check_layers, check_size};
use super::layers::{
    Activation, Attention, LayerNorm, Linear, Mask, Mlp, Patches, drop_path, dropout, normal,
};
use super::source::Scope;
use crate::error::LapsError;

/// Of the two norms whose epsilon no configuration sets.
const EPSILON: f64 = 1e-5;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct SwinConfig {
    pub image_size: i64,
    pub patch_size: i64,
    pub num_channels: i64,
    pub embed_dim: i64,
    pub depths: Vec<usize>,
    pub num_heads: Vec<i64>,
    pub window_size: i64,
    pub mlp_ratio: f64,
    pub qkv_bias: bool,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
    pub drop_path_rate: f64,
    pub hidden_act: Activation,
    pub use_absolute_embeddings: bool,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
}

impl Default for SwinConfig {
    fn default() -> Self {
        SwinConfig {
            image_size: 224,
            patch_size: 4,
            num_channels: 3,
            embed_dim: 96,
            depths: vec![2, 2, 6, 2],
            num_heads: vec![3, 6, 12, 24],
            window_size: 7,
            mlp_ratio: 4.0,
            qkv_bias: true,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            drop_path_rate: 0.1,
            hidden_act: Activation::Gelu,
            use_absolute_embeddings: false,
            initializer_range: 0.02,
            layer_norm_eps: 1e-5,
        }
    }
}

impl SwinConfig {
    pub fn check(&self) -> Result<()> {
        check_image(self.image_size, self.patch_size, self.num_channels)?;
        check_size("embed_dim", self.embed_dim)?;
        let stages = self.depths.len();
        if stages == 0 || stages > 16 || self.num_heads.len() != stages {
            let got = format!("{} depths and {} num_heads", stages, self.num_heads.len());
            return Err(LapsError::value("swin", "num_heads", "one for each of 1 to 16 depths", got));
        }
        for (stage, &heads) in self.num_heads.iter().enumerate() {
            check_heads(self.embed_dim << stage, heads)?;
            check_layers(self.depths[stage], (self.mlp_ratio * self.embed_dim as f64) as i64)?;
        }
        // A larger window would have to shrink, and its biases with it.
        if !(1..=self.side()).contains(&self.window_size) {
            let expected = format!("1 to {}, the last stage's side", self.side());
            return Err(LapsError::value("encoder config", "window_size", expected, self.window_size));
        }
        Ok(())
    }

    /// Patches along a side of the image where the first stage begins; what is left over of a patch is padded.
    fn first_side(&self) -> i64 {
        (self.image_size as u64).div_ceil(self.patch_size as u64) as i64
    }

    /// Patches along a side where the last stage ends.
    pub fn side(&self) -> i64 {
        (1..self.depths.len()).fold(self.first_side(), |side, _| (side + 1) / 2)
    }

    /// D of the last stage.
    pub fn width(&self) -> i64 {
        self.embed_dim << (self.depths.len() - 1)
    }
}

#[derive(Debug)]
pub struct Swin {
    patches: Patches,
    patch_size: i64,
    window: i64,
    patch_norm: LayerNorm,
    positions: Option<Tensor>,
    stages: Vec<Stage>,
    norm: LayerNorm,
    dropout: f64,
}

#[derive(Debug)]
struct Stage {
    blocks: Vec<Block>,
    merging: Option<Merging>,
}

impl Swin {
    pub fn new(mut at: Scope<'_>, config: &SwinConfig) -> Result<Self> {
        let (d, init) = (config.embed_dim, normal(config.initializer_range));
        let mut at_embeddings = at.sub("embeddings");
        let patches = Patches::new(
            at_embeddings.sub("patch_embeddings.projection"),
            config.num_channels,
            d,
            config.patch_size,
            true,
            init,
        )?;
        let grid = config.image_size / config.patch_size;
        let positions = config
            .use_absolute_embeddings
            .then(|| at_embeddings.tensor("position_embeddings", &[1, grid * grid, d], Init::Const(0.0)))
            .transpose()?;
        let patch_norm = LayerNorm::new(at_embeddings.sub("norm"), d, EPSILON)?;
        Ok(Swin {
            patches,
            patch_size: config.patch_size,
            window: config.window_size,
            patch_norm,
            positions,
            stages: (0..config.depths.len())
                .map(|stage| Stage::new(at.sub(format!("encoder.layers.{stage}")), config, stage))
                .collect::<Result<_>>()?,
            norm: LayerNorm::new(at.sub("layernorm"), config.width(), config.layer_norm_eps)?,
            dropout: config.hidden_dropout_prob,
        })
    }

    /// Pixels (B, 3, S, S) to tokens (B, N, D), row by row.
    pub fn forward(&self, pixels: &Tensor, train: bool) -> Result<Tensor> {
        let (_, _, h, w) = pixels.size4()?;
        let missing = |size: i64| (self.patch_size - size % self.patch_size) % self.patch_size;
        let pixels = pixels.f_constant_pad_nd([0, missing(w), 0, missing(h)])?;
        let patches = self.patches.forward(&pixels)?;
        let (b, d, h, w) = patches.size4()?;
        let mut tokens = self.patch_norm.forward(&patches.f_permute([0, 2, 3, 1])?)?;
        if let Some(positions) = &self.positions {
            tokens = tokens.f_add(&positions.f_view([1, h, w, d])?)?;
        }
        let mut tokens = dropout(&tokens, self.dropout, train)?;
        let bias_rows = relative_positions(self.window, tokens.device())?;
        for stage in &self.stages {
            for block in &stage.blocks {
                tokens = block.forward(&tokens, &bias_rows, train)?;
            }
            if let Some(merging) = &stage.merging {
                tokens = merging.forward(&tokens)?;
            }
        }
        let d = tokens.size()[3];
        self.norm.forward(&tokens.f_reshape([b, -1, d])?)
    }
}

impl Stage {
    fn new(mut at: Scope<'_>, config: &SwinConfig, stage: usize) -> Result<Self> {
        let before: usize = config.depths[..stage].iter().sum();
        let last = config.depths.iter().sum::<usize>().saturating_sub(1).max(1) as f64;
        let dim = config.embed_dim << stage;
        Ok(Stage {
            blocks: (0..config.depths[stage])
                .map(|i| {
                    let shift = if i % 2 == 0 { 0 } else { config.window_size / 2 };
                    let drop_path = config.drop_path_rate * (before + i) as f64 / last;
                    let sizes = BlockSizes { dim, heads: config.num_heads[stage], shift, drop_path };
                    Block::new(at.sub(format!("blocks.{i}")), config, sizes)
                })
                .collect::<Result<_>>()?,
            merging: (stage + 1 < config.depths.len())
                .then(|| Merging::new(at.sub("downsample"), dim, config.initializer_range))
                .transpose()?,
        })
    }
}

/// Four neighbours become one token of twice the size.
#[derive(Debug)]
struct Merging {
    norm: LayerNorm,
    reduction: Linear,
}

impl Merging {
    fn new(mut at: Scope<'_>, dim: i64, stdev: f64) -> Result<Self> {
        Ok(Merging {
            norm: LayerNorm::new(at.sub("norm"), 4 * dim, EPSILON)?,
            reduction: Linear::new(at.sub("reduction"), 4 * dim, 2 * dim, false, normal(stdev))?,
        })
    }

    /// (B, H, W, D) to (B, H/2, W/2, 2 D), odd sides padded.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let (b, h, w, d) = x.size4()?;
        let x = x.f_constant_pad_nd([0, 0, 0, w % 2, 0, h % 2])?;
        let (h, w) = ((h + 1) / 2, (w + 1) / 2);
        // Neighbours in the order (0,0), (1,0), (0,1), (1,1) of row and column.
        let x =
            x.f_reshape([b, h, 2, w, 2, d])?.f_permute([0, 1, 3, 4, 2, 5])?.f_reshape([b, h, w, 4 * d])?;
        self.reduction.forward(&self.norm.forward(&x)?)
    }
}

/// What differs between the blocks of a model.
struct BlockSizes {
    dim: i64,
    heads: i64,
    shift: i64,
    drop_path: f64,
}

#[derive(Debug)]
struct Block {
    attention_norm: LayerNorm,
    attention: Attention,
    /// (number of relative positions, heads).
    bias: Tensor,
    mlp_norm: LayerNorm,
    mlp: Mlp,
    window: i64,
    shift: i64,
    dropout: f64,
    drop_path: f64,
}

impl Block {
    fn new(mut at: Scope<'_>, config: &SwinConfig, sizes: BlockSizes) -> Result<Self> {
        let BlockSizes { dim, heads, shift, drop_path } = sizes;
        let (window, init) = (config.window_size, normal(config.initializer_range));
        let hidden = (config.mlp_ratio * dim as f64) as i64;
        let places = (2 * window - 1) * (2 * window - 1);
        let bias =
            at.tensor("attention.self.relative_position_bias_table", &[places, heads], Init::Const(0.0))?;
        let mut linear = |name, from, to, bias| Linear::new(at.sub(name), from, to, bias, init);
        let attention = Attention {
            query: linear("attention.self.query", dim, dim, config.qkv_bias)?,
            key: linear("attention.self.key", dim, dim, config.qkv_bias)?,
            value: linear("attention.self.value", dim, dim, config.qkv_bias)?,
            output: linear("attention.output.dense", dim, dim, true)?,
            heads,
            dropout: config.attention_probs_dropout_prob,
        };
        let mlp = Mlp {
            first: linear("intermediate.dense", dim, hidden, true)?,
            second: linear("output.dense", hidden, dim, true)?,
            activation: config.hidden_act,
        };
        Ok(Block {
            attention_norm: LayerNorm::new(at.sub("layernorm_before"), dim, config.layer_norm_eps)?,
            attention,
            bias,
            mlp_norm: LayerNorm::new(at.sub("layernorm_after"), dim, config.layer_norm_eps)?,
            mlp,
            window,
            shift,
            dropout: config.hidden_dropout_prob,
            drop_path,
        })
    }

    /// (B, H, W, D) to (B, H, W, D). `bias_rows` are the rows of the table of biases for each pair of places in a window.
    fn forward(&self, x: &Tensor, bias_rows: &Tensor, train: bool) -> Result<Tensor> {
        let (b, h, w, d) = x.size4()?;
        if h.min(w) < self.window {
            let got = format!("{h} x {w}");
            let expected = format!("at least the window of {0} x {0}", self.window);
            return Err(LapsError::shape("swin", "the grid of patches", expected, got));
        }
        // A window that covers the grid has nowhere to shift to.
        let shift = if h.min(w) == self.window { 0 } else { self.shift };
        let windows = Windows::new(h, w, self.window, shift);
        let inside = windows.split(&self.attention_norm.forward(x)?)?;
        let mixed =
            self.attention.forward(&inside, Mask::Given(&self.mask(&windows, bias_rows, b)?), train)?;
        let mixed = windows.join(&dropout(&mixed, self.dropout, train)?, b, d)?;
        let x = drop_path(&mixed, self.drop_path, train)?.f_add(x)?;
        let changed = self.mlp.forward(&self.mlp_norm.forward(&x)?)?;
        Ok(dropout(&changed, self.dropout, train)?.f_add(&x)?)
    }

    /// What is added to the attention logits: (1, heads, A, A), or (B windows, heads, A, A) where windows were shifted;
    /// A places in a window.
    fn mask(&self, windows: &Windows, bias_rows: &Tensor, batch: i64) -> Result<Tensor> {
        let area = self.window * self.window;
        let bias = self.bias.f_index_select(0, bias_rows)?.f_view([area, area, -1])?;
        let bias = bias.f_permute([2, 0, 1])?.f_unsqueeze(0)?;
        if windows.shift == 0 {
            return Ok(bias);
        }
        let apart = windows.mask(&bias)?.f_unsqueeze(1)?;
        Ok(bias.f_add(&apart)?.f_repeat([batch, 1, 1, 1])?)
    }
}

/// How a grid is cut into windows.
struct Windows {
    height: i64,
    width: i64,
    /// The sides, padded to whole windows.
    padded: (i64, i64),
    side: i64,
    shift: i64,
}

impl Windows {
    fn new(height: i64, width: i64, side: i64, shift: i64) -> Self {
        let whole = |size: i64| (size + side - 1) / side * side;
        Windows { height, width, padded: (whole(height), whole(width)), side, shift }
    }

    /// (B, H, W, D) to (B windows, A, D).
    fn split(&self, x: &Tensor) -> Result<Tensor> {
        let ((h, w), side) = (self.padded, self.side);
        let (b, _, _, d) = x.size4()?;
        let mut x = x.f_constant_pad_nd([0, 0, 0, w - self.width, 0, h - self.height])?;
        if self.shift > 0 {
            x = x.f_roll([-self.shift, -self.shift], [1, 2])?;
        }
        let x = x.f_view([b, h / side, side, w / side, side, d])?.f_transpose(2, 3)?;
        Ok(x.f_reshape([-1, side * side, d])?)
    }

    /// The reverse of `split`.
    fn join(&self, x: &Tensor, batch: i64, d: i64) -> Result<Tensor> {
        let ((h, w), side) = (self.padded, self.side);
        let x = x.f_view([batch, h / side, w / side, side, side, d])?.f_transpose(2, 3)?;
        let mut x = x.f_reshape([batch, h, w, d])?;
        if self.shift > 0 {
            x = x.f_roll([self.shift, self.shift], [1, 2])?;
        }
        Ok(x.f_narrow(1, 0, self.height)?.f_narrow(2, 0, self.width)?)
    }

    /// -100 between places that only the shift has brought together, else 0: (windows, A, A), as `like` is stored.
    fn mask(&self, like: &Tensor) -> Result<Tensor> {
        let ((h, w), side) = (self.padded, self.side);
        let regions = |size: i64| -> Result<Tensor> {
            let place = Tensor::f_arange(size, (Kind::Int64, like.device()))?;
            let (shifted, moved) = (place.f_ge(size - side)?, place.f_ge(size - self.shift)?);
            Ok(shifted.f_to_kind(Kind::Int64)?.f_add(&moved)?)
        };
        let regions = regions(h)?.f_mul_scalar(3)?.f_unsqueeze(1)?.f_add(&regions(w)?)?;
        let regions = regions.f_view([h / side, side, w / side, side])?.f_transpose(1, 2)?;
        let regions = regions.f_reshape([-1, side * side])?;
        let apart = regions.f_unsqueeze(1)?.f_ne_tensor(&regions.f_unsqueeze(2)?)?;
        Ok(apart.f_to_kind(like.kind())?.f_mul_scalar(-100.0)?)
    }
}

/// For places i and j of a window, the row of the bias table for how i lies to j; flat, i first.
fn relative_positions(window: i64, device: Device) -> Result<Tensor> {
    // On the device: a copy from here would wait for all that a GPU still has to do.
    let place = Tensor::f_arange(window * window, (Kind::Int64, device))?;
    let across = place.f_remainder(window)?;
    // Neighbouring rows of the window lie 2 window - 1 apart, so that no two ways share a number.
    let number = place
        .f_sub(&across)?
        .f_div_scalar_mode(window, "floor")?
        .f_mul_scalar(2 * window - 1)?
        .f_add(&across)?;
    let ways = number.f_unsqueeze(1)?.f_sub(&number.f_unsqueeze(0)?)?;
    Ok(ways.f_add_scalar((window - 1) * 2 * window)?.f_flatten(0, 1)?)
}
