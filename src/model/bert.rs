//! BERT (Devlin et al., NAACL 2019), with the key names of `BertModel`.

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::Result;
use super::backbone::{check_heads, check_layers, check_size};
use super::layers::{Activation, Attention, Embedding, LayerNorm, Linear, Mask, Mlp, dropout, normal};
use super::source::Scope;
use crate::error::LapsError;

#[derive(Clone, Debug, Deserialize)]
#[serde(default)]
pub struct BertConfig {
    pub vocab_size: i64,
    pub hidden_size: i64,
    pub num_hidden_layers: usize,
    pub num_attention_heads: i64,
    pub intermediate_size: i64,
    pub hidden_act: Activation,
    pub hidden_dropout_prob: f64,
    pub attention_probs_dropout_prob: f64,
    pub max_position_embeddings: i64,
    pub type_vocab_size: i64,
    pub initializer_range: f64,
    pub layer_norm_eps: f64,
    pub pad_token_id: Option<i64>,
}

impl Default for BertConfig {
    fn default() -> Self {
        BertConfig {
            vocab_size: 30522,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            hidden_dropout_prob: 0.1,
            attention_probs_dropout_prob: 0.1,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            initializer_range: 0.02,
            layer_norm_eps: 1e-12,
            pad_token_id: Some(0),
        }
    }
}

impl BertConfig {
    pub fn check(&self) -> Result<()> {
        check_heads(self.hidden_size, self.num_attention_heads)?;
        for (name, size) in [
            ("vocab_size", self.vocab_size),
            ("type_vocab_size", self.type_vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
        ] {
            check_size(name, size)?;
        }
        if let Some(id) = self.pad_token_id.filter(|id| !(0..self.vocab_size).contains(id)) {
            let expected = format!("an id below vocab_size {}", self.vocab_size);
            return Err(LapsError::value("encoder config", "pad_token_id", expected, id));
        }
        check_layers(self.num_hidden_layers, self.intermediate_size)
    }
}

/// A transformer layer that normalises after attention and after the MLP.
#[derive(Debug)]
struct Layer {
    attention: Attention,
    attention_norm: LayerNorm,
    mlp: Mlp,
    mlp_norm: LayerNorm,
}

#[derive(Debug)]
pub struct Bert {
    words: Embedding,
    positions: Embedding,
    types: Embedding,
    norm: LayerNorm,
    layers: Vec<Layer>,
    dropout: f64,
}

impl Bert {
    pub fn new(mut at: Scope<'_>, config: &BertConfig) -> Result<Self> {
        let mut at_embeddings = at.sub("embeddings");
        let (d, init) = (config.hidden_size, normal(config.initializer_range));
        let mut table = |name, rows, padding| Embedding::new(at_embeddings.sub(name), rows, d, padding, init);
        Ok(Bert {
            words: table("word_embeddings", config.vocab_size, config.pad_token_id)?,
            positions: table("position_embeddings", config.max_position_embeddings, None)?,
            types: table("token_type_embeddings", config.type_vocab_size, None)?,
            norm: LayerNorm::new(at_embeddings.sub("LayerNorm"), d, config.layer_norm_eps)?,
            layers: (0..config.num_hidden_layers)
                .map(|i| layer(at.sub(format!("encoder.layer.{i}")), config))
                .collect::<Result<_>>()?,
            dropout: config.hidden_dropout_prob,
        })
    }

    /// Ids (B, L), int64, to tokens (B, L, D). `mask` (B, L) is true where a token may be looked at, and None where all
    /// may; other rows are undefined.
    pub fn forward(&self, ids: &Tensor, mask: Option<&Tensor>, train: bool) -> Result<Tensor> {
        let (_, longest) = ids.size2()?;
        let positions = Tensor::f_arange(longest, (Kind::Int64, ids.device()))?;
        let types = self.types.weight.f_select(0, 0)?;
        let tokens = self.words.forward(ids)?.f_add(&types)?.f_add(&self.positions.forward(&positions)?)?;
        let mut tokens = dropout(&self.norm.forward(&tokens)?, self.dropout, train)?;
        let mask = mask.map(|mask| mask.f_unsqueeze(1)?.f_unsqueeze(1)).transpose()?;
        for layer in &self.layers {
            let seen = mask.as_ref().map_or(Mask::All, Mask::Given);
            let mixed = layer.attention.forward(&tokens, seen, train)?;
            tokens = layer.attention_norm.forward(&dropout(&mixed, self.dropout, train)?.f_add(&tokens)?)?;
            let changed = layer.mlp.forward(&tokens)?;
            tokens = layer.mlp_norm.forward(&dropout(&changed, self.dropout, train)?.f_add(&tokens)?)?;
        }
        Ok(tokens)
    }
}

fn layer(mut at: Scope<'_>, config: &BertConfig) -> Result<Layer> {
    let (d, init) = (config.hidden_size, normal(config.initializer_range));
    let mut linear = |name, from, to| Linear::new(at.sub(name), from, to, true, init);
    let attention = Attention {
        query: linear("attention.self.query", d, d)?,
        key: linear("attention.self.key", d, d)?,
        value: linear("attention.self.value", d, d)?,
        output: linear("attention.output.dense", d, d)?,
        heads: config.num_attention_heads,
        dropout: config.attention_probs_dropout_prob,
    };
    let mlp = Mlp {
        first: linear("intermediate.dense", d, config.intermediate_size)?,
        second: linear("output.dense", config.intermediate_size, d)?,
        activation: config.hidden_act,
    };
    Ok(Layer {
        attention,
        attention_norm: LayerNorm::new(at.sub("attention.output.LayerNorm"), d, config.layer_norm_eps)?,
        mlp,
        mlp_norm: LayerNorm::new(at.sub("output.LayerNorm"), d, config.layer_norm_eps)?,
    })
}
