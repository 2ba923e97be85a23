//! The declarative description of a decoder: everything that tells one family from another, as data.

use demur_kernels::ops::{Activation, RopeStyle};

use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::families;

/// Widest head.
pub(crate) const MAX_HEAD: usize = 1 << 12;

/// What a decoder is.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// The family's name as in the checkpoint, for instance `qwen2`.
    pub architecture: String,
    /// Number of blocks.
    pub n_layers: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Query heads.
    pub n_heads: usize,
    /// Key-value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub d_head: usize,
    /// Width of the gated MLP.
    pub d_mlp: usize,
    /// Size of the vocabulary.
    pub d_vocab: usize,
    /// Longest sequence, tokens.
    pub context: usize,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// Norms multiply by `1 + w` (Gemma's safetensors).
    pub norm_plus_one: bool,
    /// Attention and MLP outputs are normed before they are added (Gemma 2 and 3).
    pub sandwich_norms: bool,
    /// Queries and keys are normed per head before the rotary embedding.
    pub qk_norm: bool,
    /// The MLP's gate.
    pub activation: Activation,
    /// Multiplies attention scores.
    pub attn_scale: f32,
    /// Soft cap of attention scores.
    pub attn_softcap: Option<f32>,
    /// Soft cap of the logits.
    pub final_softcap: Option<f32>,
    /// Multiplies embeddings.
    pub embed_scale: f32,
    /// Which pairs the rotary embedding turns.
    pub rope_style: RopeStyle,
    /// The rotary embeddings that layers choose from.
    pub ropes: Vec<Rope>,
    /// One entry a layer.
    pub layers: Vec<LayerSpec>,
}

/// What differs between the layers of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LayerSpec {
    /// Index into [`ModelSpec::ropes`].
    pub rope: usize,
    /// A query sees its own position and the `window - 1` before it.
    pub window: Option<usize>,
}

/// A rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Inverse frequencies, `[rot_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// LongRoPE's second set, used when a sequence is longer than the length given.
    pub long: Option<(Vec<f32>, usize)>,
    /// Multiplies cosines and sines (LongRoPE's attention factor).
    pub scale: f32,
}

impl Rope {
    /// `base^(-2 i / rot_dim)`.
    pub fn plain(base: f64, rot_dim: usize) -> Self {
        let inv_freq = (0..rot_dim / 2)
            .map(|i| base.powf(-2.0 * i as f64 / rot_dim as f64) as f32)
            .collect();
        Self {
            inv_freq,
            long: None,
            scale: 1.0,
        }
    }

    /// The inverse frequencies for a sequence that reaches `length` tokens; see
    /// [`KvCache`](crate::decoder::KvCache) for what a cache makes of it.
    pub fn frequencies(&self, length: usize) -> &[f32] {
        match &self.long {
            Some((long, original)) if length > *original => long,
            _ => &self.inv_freq,
        }
    }
}

/// Names of the tensors; `{i}` stands for the layer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct TensorNames {
    pub embed: String,
    pub final_norm: String,
    pub head: String,
    pub attn_norm: String,
    pub q: String,
    pub k: String,
    pub v: String,
    pub qkv: String,
    pub o: String,
    pub post_attn_norm: String,
    pub q_norm: String,
    pub k_norm: String,
    pub mlp_norm: String,
    pub gate: String,
    pub up: String,
    pub gate_up: String,
    pub down: String,
    pub post_mlp_norm: String,
}

impl ModelSpec {
    /// LongRoPE's original context: longer sequences have other rotary frequencies from their first
    /// token on.
    pub fn original_context(&self) -> Option<usize> {
        let longs = self.ropes.iter().filter_map(|r| r.long.as_ref());
        longs.map(|l| l.1).min()
    }

    /// Reads the description and the tensor names from a checkpoint's metadata.
    ///
    /// # Errors
    /// [`ModelError::Architecture`] for an unknown family; [`ModelError::Metadata`] or
    /// [`ModelError::Config`] for what is missing, contradictory or beyond a limit.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<(Self, TensorNames), ModelError> {
        let (spec, names) = families::read(checkpoint)?;
        spec.validate()?;
        Ok((spec, names))
    }

    /// Checks the numbers, which come from an untrusted file.
    pub(crate) fn validate(&self) -> Result<(), ModelError> {
        let limits = [
            ("n_layers", self.n_layers, 1024),
            ("d_model", self.d_model, 1 << 16),
            ("n_heads", self.n_heads, 1024),
            ("n_kv_heads", self.n_kv_heads, 1024),
            ("d_head", self.d_head, MAX_HEAD),
            ("d_mlp", self.d_mlp, 1 << 20),
            ("d_vocab", self.d_vocab, 1 << 24),
            ("context", self.context, 1 << 30),
        ];
        let bad =
            |field, value: String, rule: String| Err(ModelError::Config { field, value, rule });
        for (field, value, most) in limits {
            if value == 0 || value > most {
                return bad(
                    field,
                    value.to_string(),
                    format!("must be between 1 and {most}"),
                );
            }
        }
        if !self.n_heads.is_multiple_of(self.n_kv_heads) {
            let rule = format!("must divide n_heads = {}", self.n_heads);
            return bad("n_kv_heads", self.n_kv_heads.to_string(), rule);
        }
        if self.layers.len() != self.n_layers {
            let rule = format!("must have one entry for each of {} layers", self.n_layers);
            return bad("layers", self.layers.len().to_string(), rule);
        }
        for rope in &self.ropes {
            let halves = rope.inv_freq.len();
            let long = rope.long.as_ref().map_or(halves, |l| l.0.len());
            if halves == 0 || 2 * halves > self.d_head || long != halves {
                let rule = format!("must turn at most d_head = {} values", self.d_head);
                return bad("rope dimensions", (2 * halves).to_string(), rule);
            }
            if rope.inv_freq.iter().any(|f| !f.is_finite()) || !rope.scale.is_finite() {
                return bad("rope", "not finite".to_owned(), "must be finite".to_owned());
            }
        }
        if self
            .layers
            .iter()
            .any(|l| l.rope >= self.ropes.len() || l.window == Some(0))
        {
            let rule = "must name a rope that is there and a window of at least 1".to_owned();
            return bad("layers", "out of range".to_owned(), rule);
        }
        let finite = [self.norm_eps, self.attn_scale, self.embed_scale];
        if finite.iter().any(|v| !v.is_finite()) {
            return bad("scales", format!("{finite:?}"), "must be finite".to_owned());
        }
        Ok(())
    }
}
