//! CLIP's two halves (Radford et al., ICML 2021) with their projections, applied to every token; key names of
//! `CLIPVisionModelWithProjection` and `CLIPTextModelWithProjection`.

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::Result;
use super::backbone::{check_heads, check_image, check_layers, check_pixels, check_size};
use super::layers::{
    Activation, Attention, Embedding, LayerNorm, Linear, Mask, Mlp, Patches, PreNorm, normal,
};
use super::source::Scope;

/// What both halves have.
#[derive(Clone, Copy, Debug)]
struct Body {
    hidden_size: i64,
    intermediate_size: i64,
    projection_dim: i64,
    num_hidden_layers: usize,
    num_attention_heads: i64,
    hidden_act: Activation,
    layer_norm_eps: f64,
    attention_dropout: f64,
    initializer_factor: f64,
}

macro_rules! body {
    ($config:expr) => {
        Body {
            hidden_size: $config.hidden_size,
            intermediate_size: $config.intermediate_size,
            projection_dim: $config.projection_dim,
            num_hidden_layers: $config.num_hidden_layers,
            num_attention_heads: $config.num_attention_heads,
            hidden_act: $config.hidden_act,
            layer_norm_eps: $config.layer_norm_eps,
            attention_dropout: $config.attention_dropout,
            initializer_factor: $config.initializer_factor,
        }
    };
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ClipVisionConfig {
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub projection_dim: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub num_channels: i64,
    pub image_size: i64,
    pub patch_size: i64,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
    pub attention_dropout: f64,
    pub initializer_range: f64,
    pub initializer_factor: f64,
}

impl Default for ClipVisionConfig {
    fn default() -> Self {
        ClipVisionConfig {
            hidden_size: 768,
            intermediate_size: 3072,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            num_channels: 3,
            image_size: 224,
            patch_size: 32,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_range: 0.02,
            initializer_factor: 1.0,
        }
    }
}

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct ClipTextConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub projection_dim: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub max_position_embeddings: i64,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
    pub attention_dropout: f64,
    pub initializer_factor: f64,
}

impl Default for ClipTextConfig {
    fn default() -> Self {
        ClipTextConfig {
            vocab_size: 49408,
            hidden_size: 512,
            intermediate_size: 2048,
            projection_dim: 512,
            num_hidden_layers: 12,
            num_attention_heads: 8,
            max_position_embeddings: 77,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
            attention_dropout: 0.0,
            initializer_factor: 1.0,
        }
    }
}

impl ClipVisionConfig {
    pub fn check(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        check_image(self.image_size, self.patch_size, self.num_channels)?;
        check_size("projection_dim", self.projection_dim)?;
        check_layers(self.num_hidden_layers, self.intermediate_size)
    }

    /// Patches along a side of the image.
    pub fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }
}

impl ClipTextConfig {
    pub fn check(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("projection_dim", self.projection_dim),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            check_size(name, size)?;
        }
        check_layers(self.num_hidden_layers, self.intermediate_size)
    }
}

#[derive(Debug)]
pub struct ClipVision {
    class: Tensor,
    patches: Patches,
    positions: Embedding,
    pre_norm: LayerNorm,
    layers: Vec<PreNorm>,
    post_norm: LayerNorm,
    projection: Linear,
    image_size: i64,
}

impl ClipVision {
    pub fn new(mut at: Scope<'_>, config: &ClipVisionConfig) -> Result<Self> {
        let (body, d, factor) = (body!(config), config.hidden_size, config.initializer_factor);
        let init = normal(config.initializer_range * factor);
        let mut at_model = at.sub("vision_model");
        Ok(ClipVision {
            class: at_model.tensor(
                "embeddings.class_embedding",
                &[d],
                normal((d as f64).powf(-0.5) * factor),
            )?,
            patches: Patches::new(
                at_model.sub("embeddings.patch_embedding"),
                config.num_channels,
                d,
                config.patch_size,
                false,
                init,
            )?,
            positions: Embedding::new(
                at_model.sub("embeddings.position_embedding"),
                1 + config.side() * config.side(),
                d,
                None,
                init,
            )?,
            pre_norm: LayerNorm::new(at_model.sub("pre_layrnorm"), d, config.layer_norm_eps)?,
            layers: layers(&mut at_model, &body)?,
            post_norm: LayerNorm::new(at_model.sub("post_layernorm"), d, config.layer_norm_eps)?,
            projection: projection(at.sub("visual_projection"), &body)?,
            image_size: config.image_size,
        })
    }

    /// Pixels (B, 3, S, S) to tokens (B, 1 + N, C) in the space shared with captions, `[CLS]` first.
    pub fn forward(&self, pixels: &Tensor, train: bool) -> Result<Tensor> {
        check_pixels(pixels, self.image_size)?;
        let patches = self.patches.forward(pixels)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let class = self.class.f_expand([patches.size()[0], 1, -1], false)?;
        let tokens = Tensor::f_cat(&[class, patches], 1)?.f_add(&self.positions.weight)?;
        let mut tokens = self.pre_norm.forward(&tokens)?;
        for layer in &self.layers {
            tokens = layer.forward(&tokens, Mask::All, train)?;
        }
        self.projection.forward(&self.post_norm.forward(&tokens)?)
    }
}

#[derive(Debug)]
pub struct ClipText {
    words: Embedding,
    positions: Embedding,
    layers: Vec<PreNorm>,
    norm: LayerNorm,
    projection: Linear,
}

impl ClipText {
    pub fn new(mut at: Scope<'_>, config: &ClipTextConfig) -> Result<Self> {
        let (body, d) = (body!(config), config.hidden_size);
        let init = normal(0.02 * config.initializer_factor);
        let mut at_model = at.sub("text_model");
        let mut table = |name, rows| Embedding::new(at_model.sub(name), rows, d, None, init);
        Ok(ClipText {
            words: table("embeddings.token_embedding", config.vocab_size)?,
            positions: table("embeddings.position_embedding", config.max_position_embeddings)?,
            layers: layers(&mut at_model, &body)?,
            norm: LayerNorm::new(at_model.sub("final_layer_norm"), d, config.layer_norm_eps)?,
            projection: projection(at.sub("text_projection"), &body)?,
        })
    }

    /// Ids (B, L) to tokens (B, L, C) in the space shared with images. A token sees only those before it, so padding
    /// behind a caption changes nothing and needs no mask; rows of padding are undefined.
    pub fn forward(&self, ids: &Tensor, train: bool) -> Result<Tensor> {
        let (_, longest) = ids.size2()?;
        let positions = Tensor::f_arange(longest, (Kind::Int64, ids.device()))?;
        let mut tokens = self.words.forward(ids)?.f_add(&self.positions.forward(&positions)?)?;
        for layer in &self.layers {
            tokens = layer.forward(&tokens, Mask::Before, train)?;
        }
        self.projection.forward(&self.norm.forward(&tokens)?)
    }
}

fn projection(at: Scope<'_>, body: &Body) -> Result<Linear> {
    let init = normal((body.hidden_size as f64).powf(-0.5) * body.initializer_factor);
    Linear::new(at, body.hidden_size, body.projection_dim, false, init)
}

fn layers(at: &mut Scope<'_>, body: &Body) -> Result<Vec<PreNorm>> {
    (0..body.num_hidden_layers).map(|i| layer(at.sub(format!("encoder.layers.{i}")), body)).collect()
}

fn layer(mut at: Scope<'_>, body: &Body) -> Result<PreNorm> {
    let (d, factor) = (body.hidden_size, body.initializer_factor);
    let width = (d as f64).powf(-0.5) * factor;
    let deep = width * (2.0 * body.num_hidden_layers as f64).powf(-0.5);
    let mut linear = |name, from, to, stdev| Linear::new(at.sub(name), from, to, true, normal(stdev));
    let attention = Attention {
        query: linear("self_attn.q_proj", d, d, deep)?,
        key: linear("self_attn.k_proj", d, d, deep)?,
        value: linear("self_attn.v_proj", d, d, deep)?,
        output: linear("self_attn.out_proj", d, d, width)?,
        heads: body.num_attention_heads,
        dropout: body.attention_dropout,
    };
    let mlp = Mlp {
        first: linear("mlp.fc1", d, body.intermediate_size, (2.0 * d as f64).powf(-0.5) * factor)?,
        second: linear("mlp.fc2", body.intermediate_size, d, deep)?,
        activation: body.hidden_act,
    };
    Ok(PreNorm {
        attention_norm: LayerNorm::new(at.sub("layer_norm1"), d, body.layer_norm_eps)?,
        attention,
        mlp_norm: LayerNorm::new(at.sub("layer_norm2"), d, body.layer_norm_eps)?,
        mlp,
        dropout: 0.0,
    })
}
