//! The vision transformer (Dosovitskiy et al., ICLR 2021), with the key names of `ViTModel`.

use serde::Deserialize;
use tch::Tensor;

use super::Result;
use super::backbone::{check_heads, check_image, check_layers, check_pixels};
use super::layers::{Activation, Attention, LayerNorm, Linear, Mask, Mlp, Patches, PreNorm, dropout, normal};
use super::source::Scope;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct VitConfig {
    pub hidden_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub intermediate_size: i64,
    pub hidden_act: Activation,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub image_size: i64,
    pub patch_size: i64,
    pub num_channels: i64,
    pub qkv_bias: bool,
}

impl Default for VitConfig {
    fn default() -> Self {
        VitConfig {
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.0,
            attention_probs_dropout_prob: 0.0,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            image_size: 224,
            patch_size: 16,
            num_channels: 3,
            qkv_bias: true,
        }
    }
}

impl VitConfig {
    pub fn check(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        check_image(self.image_size, self.patch_size, self.num_channels)?;
        check_layers(self.num_hidden_layers, self.intermediate_size)
    }

    /// Patches along a side of the image.
    pub fn side(&self) -> i64 {
        self.image_size / self.patch_size
    }
}

#[derive(Debug)]
pub struct Vit {
    class: Tensor,
    positions: Tensor,
    patches: Patches,
    layers: Vec<PreNorm>,
    norm: LayerNorm,
    dropout: f64,
    image_size: i64,
}

impl Vit {
    pub fn new(mut at: Scope<'_>, config: &VitConfig) -> Result<Self> {
        let (d, init) = (config.hidden_size, normal(config.initializer_range));
        let tokens = 1 + config.side() * config.side();
        Ok(Vit {
            class: at.tensor("embeddings.cls_token", &[1, 1, d], init)?,
            positions: at.tensor("embeddings.position_embeddings", &[1, tokens, d], init)?,
            patches: Patches::new(
                at.sub("embeddings.patch_embeddings.projection"),
                config.num_channels,
                d,
                config.patch_size,
                true,
                init,
            )?,
            layers: (0..config.num_hidden_layers)
                .map(|i| layer(at.sub(format!("encoder.layer.{i}")), config))
                .collect::<Result<_>>()?,
            norm: LayerNorm::new(at.sub("layernorm"), d, config.layer_norm_eps)?,
            dropout: config.hidden_dropout_prob,
            image_size: config.image_size,
        })
    }

    /// Pixels (B, 3, S, S) to tokens (B, 1 + N, D), `[CLS]` first.
    pub fn forward(&self, pixels: &Tensor, train: bool) -> Result<Tensor> {
        check_pixels(pixels, self.image_size)?;
        let patches = self.patches.forward(pixels)?.f_flatten(2, 3)?.f_transpose(1, 2)?;
        let class = self.class.f_expand([patches.size()[0], -1, -1], false)?;
        let tokens = Tensor::f_cat(&[class, patches], 1)?.f_add(&self.positions)?;
        let mut tokens = dropout(&tokens, self.dropout, train)?;
        for layer in &self.layers {
            tokens = layer.forward(&tokens, Mask::All, train)?;
        }
        self.norm.forward(&tokens)
    }
}

fn layer(mut at: Scope<'_>, config: &VitConfig) -> Result<PreNorm> {
    let (d, init) = (config.hidden_size, normal(config.initializer_range));
    let mut linear = |name, from, to, bias| Linear::new(at.sub(name), from, to, bias, init);
    let attention = Attention {
        query: linear("attention.attention.query", d, d, config.qkv_bias)?,
        key: linear("attention.attention.key", d, d, config.qkv_bias)?,
        value: linear("attention.attention.value", d, d, config.qkv_bias)?,
        output: linear("attention.output.dense", d, d, true)?,
        heads: config.num_attention_heads,
        dropout: config.attention_probs_dropout_prob,
    };
    let mlp = Mlp {
        first: linear("intermediate.dense", d, config.intermediate_size, true)?,
        second: linear("output.dense", config.intermediate_size, d, true)?,
        activation: config.hidden_act,
    };
    Ok(PreNorm {
        attention_norm: LayerNorm::new(at.sub("layernorm_before"), d, config.layer_norm_eps)?,
        attention,
        mlp_norm: LayerNorm::new(at.sub("layernorm_after"), d, config.layer_norm_eps)?,
        mlp,
        dropout: config.hidden_dropout_prob,
    })
}
