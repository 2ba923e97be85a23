//! Families as data: one row of [`FAMILIES`] each, and where their numbers are written.
//!
//! A number has a key in GGUF and one in `config.json`; [`Source`] reads either. What is left beside
//! the table are three rules: how a rotary embedding is scaled ([`rope`]), which layers have a
//! window, and how tensors are named ([`names`]).

mod names;
mod rope;

use demur_kernels::ops::RopeStyle;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, Metadata};
use crate::error::ModelError;
use crate::gguf::GgufMetadata;
use crate::spec::{LayerSpec, MAX_HEAD, ModelSpec, TensorNames};
use demur_kernels::ops::Activation;

/// Which layers have a sliding window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Windows {
    /// None, unless the config lists layer types.
    None,
    /// All, if the config gives a window.
    All,
    /// All but every n-th.
    AllButEvery(usize),
    /// Those from `max_window_layers` on, if `use_sliding_window`.
    Upper,
}

/// What tells a family from the others.
struct Family {
    gguf: &'static [&'static str],
    hf: &'static [&'static str],
    activation: Activation,
    windows: Windows,
    qk_norm: bool,
    sandwich: bool,
    /// Embeddings are scaled by `sqrt(d_model)`, norms are `1 + w` in safetensors.
    gemma: bool,
    /// Layers of the one size whose attention scale is `1 / sqrt(d_model / n_heads)` in GGUF.
    wide_scale_layers: usize,
    /// GGUF stores queries and keys for interleaved pairs.
    interleaved: bool,
}

const PLAIN: Family = Family {
    gguf: &[],
    hf: &[],
    activation: Activation::Silu,
    windows: Windows::None,
    qk_norm: false,
    sandwich: false,
    gemma: false,
    wide_scale_layers: 0,
    interleaved: false,
};

const GEMMA: Family = Family {
    activation: Activation::GeluTanh,
    sandwich: true,
    gemma: true,
    ..PLAIN
};

const FAMILIES: [Family; 7] = [
    Family {
        gguf: &["llama"],
        hf: &["llama"],
        interleaved: true,
        ..PLAIN
    },
    Family {
        hf: &["mistral"],
        windows: Windows::All,
        ..PLAIN
    },
    Family {
        gguf: &["qwen2"],
        hf: &["qwen2"],
        windows: Windows::Upper,
        ..PLAIN
    },
    Family {
        gguf: &["qwen3"],
        hf: &["qwen3"],
        windows: Windows::Upper,
        qk_norm: true,
        ..PLAIN
    },
    Family {
        gguf: &["phi3"],
        hf: &["phi3"],
        windows: Windows::All,
        ..PLAIN
    },
    Family {
        gguf: &["gemma2"],
        hf: &["gemma2"],
        windows: Windows::AllButEvery(2),
        wide_scale_layers: 46,
        ..GEMMA
    },
    Family {
        gguf: &["gemma3"],
        hf: &["gemma3_text", "gemma3"],
        windows: Windows::AllButEvery(6),
        qk_norm: true,
        wide_scale_layers: 62,
        ..GEMMA
    },
];

/// Where numbers are read from.
enum Source<'a> {
    Gguf(&'a GgufMetadata, String),
    Hf(&'a Value),
}

impl Source<'_> {
    fn wrong(key: &str, reason: &str) -> ModelError {
        ModelError::Metadata {
            key: key.to_owned(),
            reason: reason.to_owned(),
        }
    }

    /// A size under its GGUF key (after the architecture's prefix) or its config key.
    fn size(&self, gguf: &str, hf: &str) -> Result<Option<usize>, ModelError> {
        match self {
            Self::Gguf(m, arch) => m.size(&format!("{arch}.{gguf}")),
            Self::Hf(c) => match c.get(hf) {
                None | Some(Value::Null) => Ok(None),
                Some(v) => v
                    .as_u64()
                    .and_then(|v| usize::try_from(v).ok())
                    .map(Some)
                    .ok_or_else(|| Self::wrong(hf, "is not a size")),
            },
        }
    }

    fn need(&self, gguf: &str, hf: &str) -> Result<usize, ModelError> {
        let key = match self {
            Self::Gguf(_, arch) => format!("{arch}.{gguf}"),
            Self::Hf(_) => hf.to_owned(),
        };
        self.size(gguf, hf)?
            .ok_or_else(|| Self::wrong(&key, "is missing"))
    }

    fn float(&self, gguf: &str, hf: &str) -> Result<Option<f64>, ModelError> {
        match self {
            Self::Gguf(m, arch) => m.float(&format!("{arch}.{gguf}")),
            Self::Hf(c) => match c.get(hf) {
                None | Some(Value::Null) => Ok(None),
                Some(v) => v
                    .as_f64()
                    .map(Some)
                    .ok_or_else(|| Self::wrong(hf, "is not a number")),
            },
        }
    }
}

/// Reads a checkpoint's spec and tensor names.
pub(crate) fn read(checkpoint: &Checkpoint) -> Result<(ModelSpec, TensorNames), ModelError> {
    let (name, is_gguf) = match checkpoint.metadata() {
        Metadata::Gguf(m) => (
            m.str("general.architecture")?
                .ok_or_else(|| Source::wrong("general.architecture", "is missing"))?,
            true,
        ),
        Metadata::Config(c) => (
            c.get("model_type")
                .and_then(Value::as_str)
                .ok_or_else(|| Source::wrong("model_type", "is missing"))?,
            false,
        ),
    };
    let family = FAMILIES
        .iter()
        .find(|f| if is_gguf { f.gguf } else { f.hf }.contains(&name))
        .ok_or_else(|| ModelError::Architecture {
            name: name.to_owned(),
            supported: FAMILIES
                .iter()
                .flat_map(|f| if is_gguf { f.gguf } else { f.hf })
                .copied()
                .collect::<Vec<_>>()
                .join(", "),
        })?;
    let source = match checkpoint.metadata() {
        Metadata::Gguf(m) => Source::Gguf(m, name.to_owned()),
        Metadata::Config(c) => Source::Hf(c.get("text_config").unwrap_or(c)),
    };
    let names = names::of(checkpoint, is_gguf, family.sandwich);
    let spec = build(&source, family, name, &names, checkpoint)?;
    Ok((spec, names))
}

fn build(
    source: &Source<'_>,
    family: &Family,
    name: &str,
    names: &TensorNames,
    checkpoint: &Checkpoint,
) -> Result<ModelSpec, ModelError> {
    let is_gguf = matches!(source, Source::Gguf(..));
    let n_layers = source.need("block_count", "num_hidden_layers")?;
    let d_model = source.need("embedding_length", "hidden_size")?;
    let n_heads = source.need("attention.head_count", "num_attention_heads")?;
    let n_kv_heads = source
        .size("attention.head_count_kv", "num_key_value_heads")?
        .unwrap_or(n_heads);
    let d_head = match source.size("attention.key_length", "head_dim")? {
        Some(d) => d,
        None if n_heads > 0 => d_model / n_heads,
        None => 0,
    };
    // Before anything is made that is as long as it says.
    if d_head > MAX_HEAD {
        return Err(ModelError::Config {
            field: "d_head",
            value: d_head.to_string(),
            rule: format!("must be between 1 and {MAX_HEAD}"),
        });
    }
    if n_layers == 0 || n_layers > 1024 {
        return Err(ModelError::Config {
            field: "n_layers",
            value: n_layers.to_string(),
            rule: "must be between 1 and 1024".to_owned(),
        });
    }
    activation_is(source, family)?;
    let attn_scale = match source.float("\0", "query_pre_attn_scalar")? {
        Some(scalar) if family.gemma => 1.0 / scalar.sqrt(),
        _ if is_gguf && family.gemma && n_layers == family.wide_scale_layers => {
            1.0 / (d_model as f64 / n_heads.max(1) as f64).sqrt()
        }
        _ => 1.0 / (d_head as f64).sqrt(),
    };
    let cap = |v: Option<f64>| v.map(|v| v as f32).filter(|v| *v > 0.0);
    let embed = checkpoint.tensor(&names.embed)?;
    let windows = windows(source, family, n_layers)?;
    let (ropes, which) = rope::read(source, d_head, &windows, checkpoint)?;
    Ok(ModelSpec {
        architecture: name.to_owned(),
        n_layers,
        d_model,
        n_heads,
        n_kv_heads,
        d_head,
        d_mlp: source.need("feed_forward_length", "intermediate_size")?,
        d_vocab: embed.info.shape.first().copied().unwrap_or(0),
        context: source
            .size("context_length", "max_position_embeddings")?
            .unwrap_or(2048),
        norm_eps: source
            .float("attention.layer_norm_rms_epsilon", "rms_norm_eps")?
            .unwrap_or(1e-6) as f32,
        norm_plus_one: family.gemma && !is_gguf,
        sandwich_norms: family.sandwich,
        qk_norm: family.qk_norm,
        activation: family.activation,
        attn_scale: attn_scale as f32,
        attn_softcap: cap(source.float("attn_logit_softcapping", "attn_logit_softcapping")?),
        final_softcap: cap(source.float("final_logit_softcapping", "final_logit_softcapping")?),
        embed_scale: if family.gemma {
            (d_model as f32).sqrt()
        } else {
            1.0
        },
        rope_style: if is_gguf && family.interleaved {
            RopeStyle::Interleaved
        } else {
            RopeStyle::Neox
        },
        ropes,
        layers: windows
            .into_iter()
            .zip(which)
            .map(|(window, rope)| LayerSpec { rope, window })
            .collect(),
    })
}

/// A config that names another activation than the family's is refused.
fn activation_is(source: &Source<'_>, family: &Family) -> Result<(), ModelError> {
    let Source::Hf(config) = source else {
        return Ok(());
    };
    let named = ["hidden_activation", "hidden_act"]
        .iter()
        .find_map(|k| config.get(*k).and_then(Value::as_str));
    let known: &[&str] = match family.activation {
        Activation::Silu => &["silu", "swish"],
        Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu_new", "gelu"],
    };
    match named {
        Some(name) if !known.contains(&name) => Err(ModelError::Config {
            field: "hidden_act",
            value: name.to_owned(),
            rule: format!("is not supported; this family uses {}", known[0]),
        }),
        _ => Ok(()),
    }
}

/// Each layer's window.
fn windows(
    source: &Source<'_>,
    family: &Family,
    n_layers: usize,
) -> Result<Vec<Option<usize>>, ModelError> {
    let window = source
        .size("attention.sliding_window", "sliding_window")?
        .filter(|w| *w > 0);
    if let Source::Hf(config) = source
        && let Some(types) = config.get("layer_types").and_then(Value::as_array)
    {
        if types.len() != n_layers {
            return Err(Source::wrong(
                "layer_types",
                "does not have one entry a layer",
            ));
        }
        return types
            .iter()
            .map(|t| match t.as_str() {
                Some("full_attention") => Ok(None),
                Some("sliding_attention") => window
                    .map(Some)
                    .ok_or_else(|| Source::wrong("sliding_window", "is missing")),
                _ => Err(Source::wrong(
                    "layer_types",
                    "has a type that is not supported",
                )),
            })
            .collect();
    }
    let first_upper = match (family.windows, source) {
        (Windows::Upper, Source::Hf(c))
            if c.get("use_sliding_window").and_then(Value::as_bool) == Some(true) =>
        {
            source.size("\0", "max_window_layers")?.unwrap_or(0)
        }
        _ => n_layers,
    };
    let period = match family.windows {
        Windows::AllButEvery(period) => source
            .size("\0", "sliding_window_pattern")?
            .unwrap_or(period)
            .max(1),
        _ => 1,
    };
    Ok((0..n_layers)
        .map(|i| {
            let slides = match family.windows {
                Windows::None => false,
                Windows::All => true,
                Windows::AllButEvery(_) => (i + 1) % period != 0,
                Windows::Upper => i >= first_upper,
            };
            window.filter(|_| slides)
        })
        .collect())
}
