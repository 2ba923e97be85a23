//! From tensors to packed weights, every shape checked against the spec first.

use std::sync::Arc;

use demur_kernels::linear::{Linear, Output, Precision, Products};
use demur_kernels::mlp::GatedMlp;
use demur_kernels::ops::Activation;
use demur_kernels::quant::dequantize_row;

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::ModelError;
use crate::spec::{ModelSpec, TensorNames};

/// A linear layer with its bias.
#[derive(Debug)]
pub(super) struct Biased {
    linear: Linear,
    bias: Option<Vec<f32>>,
}

impl Biased {
    /// This layer's part in a product of several.
    pub(super) fn output<'a>(&'a self, y: &'a mut [f32]) -> Output<'a> {
        Output {
            linear: &self.linear,
            bias: self.bias.as_deref(),
            y,
        }
    }

    /// Its output for the rows `x`, `[n, in_features]`, in f32.
    pub(super) fn exact(&self, x: &[f32], n: usize) -> Vec<f32> {
        let mut y = vec![0.0; n * self.linear.out_features()];
        self.linear
            .forward_exact(x, n, self.bias.as_deref(), &mut y);
        y
    }

    /// Adds to `dx` what `dy`, the gradient of its output, is in terms of its input.
    pub(super) fn backward(&self, dy: &[f32], n: usize, dx: &mut [f32]) {
        self.linear.backward(dy, n, dx);
    }
}

impl Layer {
    /// The MLP.
    pub(super) fn mlp(&self, activation: Activation, products: Products) -> GatedMlp<'_> {
        let [gate, up, down] =
            [&self.gate, &self.up, &self.down].map(|b| (&b.linear, b.bias.as_deref()));
        GatedMlp {
            gate,
            up,
            down,
            activation,
            products,
        }
    }
}

#[derive(Debug)]
pub(super) struct Layer {
    pub attn_norm: Vec<f32>,
    pub q: Biased,
    pub k: Biased,
    pub v: Biased,
    pub q_norm: Option<Vec<f32>>,
    pub k_norm: Option<Vec<f32>>,
    pub o: Biased,
    pub post_attn_norm: Option<Vec<f32>>,
    pub mlp_norm: Vec<f32>,
    pub gate: Biased,
    pub up: Biased,
    pub down: Biased,
    pub post_mlp_norm: Option<Vec<f32>>,
}

#[derive(Debug)]
pub(super) struct Weights {
    /// Name of the embedding table, which stays in the checkpoint.
    pub embed: String,
    pub layers: Vec<Layer>,
    pub final_norm: Vec<f32>,
    pub head: Linear,
}

impl Weights {
    pub(super) fn load(
        checkpoint: &Arc<Checkpoint>,
        spec: &ModelSpec,
        names: &TensorNames,
        precision: Precision,
    ) -> Result<Self, ModelError> {
        let loader = Loader {
            checkpoint,
            precision,
        };
        let d = spec.d_model;
        let embed = checkpoint.tensor(&names.embed)?;
        expect_shape(&embed, &[spec.d_vocab, d])?;
        let head = if checkpoint.has(&names.head) {
            &names.head
        } else {
            &names.embed
        };
        let layers = (0..spec.n_layers)
            .map(|i| loader.layer(spec, names, i))
            .collect::<Result<_, _>>()?;
        let head = loader.linear(head, 0, spec.d_vocab, spec.d_vocab, d)?;
        Ok(Self {
            embed: names.embed.clone(),
            layers,
            final_norm: loader.vector(&names.final_norm, d)?,
            head: head.linear,
        })
    }

    /// Bytes of all packed weights.
    pub(super) fn bytes(&self) -> usize {
        let layers = self
            .layers
            .iter()
            .flat_map(|l| [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down]);
        layers.map(|b| b.linear.bytes()).sum::<usize>() + self.head.bytes()
    }
}

struct Loader<'a> {
    checkpoint: &'a Checkpoint,
    precision: Precision,
}

impl Loader<'_> {
    fn layer(&self, spec: &ModelSpec, names: &TensorNames, i: usize) -> Result<Layer, ModelError> {
        let name = |pattern: &str| pattern.replace("{i}", &i.to_string());
        let (d, d_mlp) = (spec.d_model, spec.d_mlp);
        let (q_rows, kv_rows) = (spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head);
        let fused_qkv = self.checkpoint.has(&name(&names.qkv));
        let qkv = q_rows + 2 * kv_rows;
        // A part of the fused tensor, or a tensor of its own.
        let part = |own: &str, first: usize, rows: usize| {
            if fused_qkv {
                self.linear(&name(&names.qkv), first, rows, qkv, d)
            } else {
                self.linear(&name(own), 0, rows, rows, d)
            }
        };
        let fused_mlp = names.gate != names.gate_up
            && !self.checkpoint.has(&name(&names.gate))
            && self.checkpoint.has(&name(&names.gate_up));
        let (gate, up) = if fused_mlp {
            let fused = name(&names.gate_up);
            (
                self.linear(&fused, 0, d_mlp, 2 * d_mlp, d)?,
                self.linear(&fused, d_mlp, d_mlp, 2 * d_mlp, d)?,
            )
        } else {
            (
                self.linear(&name(&names.gate), 0, d_mlp, d_mlp, d)?,
                self.linear(&name(&names.up), 0, d_mlp, d_mlp, d)?,
            )
        };
        let optional = |on: bool, pattern: &str, n: usize| {
            on.then(|| self.vector(&name(pattern), n)).transpose()
        };
        Ok(Layer {
            attn_norm: self.vector(&name(&names.attn_norm), d)?,
            q: part(&names.q, 0, q_rows)?,
            k: part(&names.k, q_rows, kv_rows)?,
            v: part(&names.v, q_rows + kv_rows, kv_rows)?,
            q_norm: optional(spec.qk_norm, &names.q_norm, spec.d_head)?,
            k_norm: optional(spec.qk_norm, &names.k_norm, spec.d_head)?,
            o: self.linear(&name(&names.o), 0, d, d, q_rows)?,
            post_attn_norm: optional(spec.sandwich_norms, &names.post_attn_norm, d)?,
            mlp_norm: self.vector(&name(&names.mlp_norm), d)?,
            gate,
            up,
            down: self.linear(&name(&names.down), 0, d, d, d_mlp)?,
            post_mlp_norm: optional(spec.sandwich_norms, &names.post_mlp_norm, d)?,
        })
    }

    /// Rows `first .. first + rows` of a `[total, columns]` tensor, with the same part of its bias.
    fn linear(
        &self,
        name: &str,
        first: usize,
        rows: usize,
        total: usize,
        columns: usize,
    ) -> Result<Biased, ModelError> {
        let tensor = self.checkpoint.tensor(name)?;
        expect_shape(&tensor, &[total, columns])?;
        let row = tensor.bytes.len() / total;
        let bytes = &tensor.bytes[first * row..(first + rows) * row];
        // What was packed is given back: the file and the weights are never both in memory.
        let release = || self.checkpoint.release();
        let ty = tensor.info.ty;
        let linear = Linear::from_rows(ty, bytes, rows, columns, self.precision, release)?;
        let bias_name = format!("{}.bias", name.strip_suffix(".weight").unwrap_or(name));
        let bias = if self.checkpoint.has(&bias_name) {
            Some(self.vector(&bias_name, total)?[first..first + rows].to_vec())
        } else {
            None
        };
        Ok(Biased { linear, bias })
    }

    fn vector(&self, name: &str, n: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.checkpoint.tensor(name)?;
        expect_shape(&tensor, &[n])?;
        let mut out = vec![0.0; n];
        dequantize_row(tensor.info.ty, tensor.bytes, &mut out)?;
        Ok(out)
    }
}

fn expect_shape(tensor: &TensorView<'_>, expected: &[usize]) -> Result<(), ModelError> {
    if tensor.info.shape == expected {
        return Ok(());
    }
    Err(ModelError::TensorShape {
        tensor: tensor.info.name.clone(),
        found: tensor.info.shape.clone(),
        expected: expected.to_vec(),
    })
}
