//! The gradient of a scalar of the last token's logits with respect to the residual stream at a site.
//!
//! The residual at the site is the input: from there on the decoder runs in f32, up to the logits of
//! one sequence's last token. A block has two halves, `y = x + branch(x)` each, so of a half
//! `dL/dx = dL/dy + Jᵀ dL/dy` with `J` the branch's Jacobian. Only each half's input is kept; what is
//! between is computed again on the way back. Memory is then linear in the tokens and the layers, and
//! the price is a third more products.
//!
//! The products are those of the weights as they are kept, with activations that are not rounded:
//! rounding has no slope. So with [`Precision::F32`](demur_kernels::linear::Precision) the logits here
//! are those of [`Model::forward`] to the last bit, and with fast products they differ by what the
//! rounding does.

use demur_kernels::attention::{SeqAttention, attention};
use demur_kernels::backward::{self, Attended};
use demur_kernels::cache::{CacheFormat, CacheRows};
use demur_kernels::ops::{self, RopeTable};

use super::Model;
use super::weights::Layer;
use crate::error::ModelError;
use crate::hooks::{Point, Site};

/// What [`Model::gradient`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradient {
    /// Logits of the last token, `[d_vocab]`.
    pub logits: Vec<f32>,
    /// `dL/dx` of every row at the site, `[tokens, d_model]`.
    pub rows: Vec<f32>,
}

impl Model {
    /// The logits of a sequence's last token, given its residual at `site`, and the gradient of a
    /// scalar `L` of them with respect to that residual. `objective` gets the logits and returns
    /// `dL/dlogits`.
    ///
    /// # Shapes
    /// `resid` is `[tokens, d_model]`, the whole sequence from its first token on; `objective` takes
    /// and returns `[d_vocab]`.
    ///
    /// # Errors
    /// [`ModelError::SiteLayer`]; [`ModelError::TooLong`]; [`ModelError::Request`] if `resid` is not
    /// whole rows, at least one, or what `objective` returns has another length.
    pub fn gradient(
        &self,
        site: Site,
        resid: &[f32],
        objective: impl FnOnce(&[f32]) -> Vec<f32>,
    ) -> Result<Gradient, ModelError> {
        let (spec, d) = (&self.spec, self.spec.d_model);
        let site = site.check(spec.n_layers)?;
        let n = resid.len() / d;
        if n == 0 || !resid.len().is_multiple_of(d) {
            return Err(ModelError::Request {
                reason: format!("{} values are no rows of {d}", resid.len()),
            });
        }
        if n > spec.context {
            return Err(ModelError::TooLong {
                tokens: n,
                context: spec.context,
            });
        }
        let pass = Pass::new(self, n);
        let first = match site.point {
            Point::Pre => 2 * site.layer,
            Point::Mid => 2 * site.layer + 1,
            Point::Post => 2 * site.layer + 2,
        };
        let mut x = resid.to_vec();
        let mut inputs = Vec::new();
        for half in first..2 * spec.n_layers {
            let y = pass.half(half, &x);
            inputs.push(std::mem::replace(&mut x, y));
        }
        let last = (n - 1) * d..n * d;
        let logits = pass.head(&x[last.clone()]);
        let slope = objective(&logits);
        if slope.len() != logits.len() {
            return Err(ModelError::Request {
                reason: format!(
                    "the objective's gradient has {} values, the logits {}",
                    slope.len(),
                    logits.len()
                ),
            });
        }
        let mut rows = vec![0.0; n * d];
        pass.head_back(&x[last.clone()], &logits, slope, &mut rows[last]);
        for (half, x) in (first..2 * spec.n_layers).zip(&inputs).rev() {
            pass.half_back(half, x, &mut rows);
        }
        Ok(Gradient { logits, rows })
    }
}

/// A pass over one sequence. Half `2 i` is the attention of block `i`, half `2 i + 1` its MLP.
struct Pass<'a> {
    model: &'a Model,
    n: usize,
    ropes: Vec<RopeTable>,
}

/// What the attention of a block computes before its output product.
struct Attention {
    /// Queries and keys before norm and rotation.
    raw: [Vec<f32>; 2],
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    out: Vec<f32>,
}

impl<'a> Pass<'a> {
    fn new(model: &'a Model, n: usize) -> Self {
        let table = |rope: &crate::spec::Rope| {
            let mut table = RopeTable::default();
            table.extend(0..n, rope.frequencies(n), rope.scale);
            table
        };
        Self {
            model,
            n,
            ropes: model.spec.ropes.iter().map(table).collect(),
        }
    }

    fn layer(&self, half: usize) -> &'a Layer {
        &self.model.weights.layers[half / 2]
    }

    fn normed(&self, x: &[f32], w: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        self.model.norm(x, w, &mut out);
        out
    }

    /// Adds to `dx` what `dy` is in terms of a norm's input `x`.
    fn norm_back(&self, x: &[f32], w: &[f32], dy: &[f32], dx: &mut [f32]) {
        let spec = &self.model.spec;
        backward::rms_norm(x, w, spec.norm_eps, spec.norm_plus_one, dy, dx);
    }

    /// `x + branch(x)`.
    fn half(&self, half: usize, x: &[f32]) -> Vec<f32> {
        let (layer, n) = (self.layer(half), self.n);
        let (out, post_norm) = if half.is_multiple_of(2) {
            let attended = self.attend(half, x).out;
            (layer.o.exact(&attended, n), &layer.post_attn_norm)
        } else {
            let [mut hidden, up] = self.gate_and_up(half, x);
            ops::gated(self.model.spec.activation, &mut hidden, &up);
            (layer.down.exact(&hidden, n), &layer.post_mlp_norm)
        };
        let mut y = x.to_vec();
        match post_norm {
            Some(w) => ops::add(&mut y, &self.normed(&out, w)),
            None => ops::add(&mut y, &out),
        }
        y
    }

    /// From `dL/dy` of a half's output to `dL/dx` of its input `x`, in place.
    fn half_back(&self, half: usize, x: &[f32], d: &mut [f32]) {
        if half.is_multiple_of(2) {
            self.attend_back(half, x, d);
        } else {
            self.mlp_back(half, x, d);
        }
    }

    fn attend(&self, half: usize, x: &[f32]) -> Attention {
        let (layer, n, spec) = (self.layer(half), self.n, &self.model.spec);
        let how = &spec.layers[half / 2];
        let h = self.normed(x, &layer.attn_norm);
        let [mut q, mut k, v] = [&layer.q, &layer.k, &layer.v].map(|w| w.exact(&h, n));
        let raw = [q.clone(), k.clone()];
        if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
            ops::rms_norm_in_place(&mut q, q_norm, spec.norm_eps, spec.norm_plus_one);
            ops::rms_norm_in_place(&mut k, k_norm, spec.norm_eps, spec.norm_plus_one);
        }
        let rope = &self.ropes[how.rope];
        rope.apply(&mut q, spec.n_heads, spec.d_head, spec.rope_style);
        rope.apply(&mut k, spec.n_kv_heads, spec.d_head, spec.rope_style);
        let mut out = vec![0.0; q.len()];
        let kept = |x: &[f32]| {
            let mut rows = CacheRows::new(CacheFormat::F32, spec.d_head);
            rows.push(x);
            rows
        };
        let seq = SeqAttention {
            q: &q,
            k: &kept(&k),
            v: &kept(&v),
            start: 0,
            out: &mut out,
        };
        attention(&self.model.attention_shape(how), &mut [seq]);
        Attention { raw, q, k, v, out }
    }

    fn attend_back(&self, half: usize, x: &[f32], d: &mut [f32]) {
        let (layer, n, spec) = (self.layer(half), self.n, &self.model.spec);
        let how = &spec.layers[half / 2];
        let a = self.attend(half, x);
        let d_out = self.post_norm_back(layer.post_attn_norm.as_deref(), d, || {
            layer.o.exact(&a.out, n)
        });
        let mut dy = vec![0.0; a.out.len()];
        layer.o.backward(&d_out, n, &mut dy);
        let seq = Attended {
            q: &a.q,
            k: &a.k,
            v: &a.v,
            dy: &dy,
        };
        let mut g = backward::attention(&self.model.attention_shape(how), seq);
        let rope = &self.ropes[how.rope];
        rope.apply_transposed(&mut g.q, spec.n_heads, spec.d_head, spec.rope_style);
        rope.apply_transposed(&mut g.k, spec.n_kv_heads, spec.d_head, spec.rope_style);
        if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
            for ((g, w), raw) in [(&mut g.q, q_norm), (&mut g.k, k_norm)]
                .into_iter()
                .zip(&a.raw)
            {
                let dy = std::mem::replace(g, vec![0.0; raw.len()]);
                self.norm_back(raw, w, &dy, g);
            }
        }
        let mut dh = vec![0.0; x.len()];
        layer.q.backward(&g.q, n, &mut dh);
        layer.k.backward(&g.k, n, &mut dh);
        layer.v.backward(&g.v, n, &mut dh);
        self.norm_back(x, &layer.attn_norm, &dh, d);
    }

    fn gate_and_up(&self, half: usize, x: &[f32]) -> [Vec<f32>; 2] {
        let layer = self.layer(half);
        let h = self.normed(x, &layer.mlp_norm);
        [&layer.gate, &layer.up].map(|w| w.exact(&h, self.n))
    }

    fn mlp_back(&self, half: usize, x: &[f32], d: &mut [f32]) {
        let (layer, n) = (self.layer(half), self.n);
        let activation = self.model.spec.activation;
        let [mut gate, mut up] = self.gate_and_up(half, x);
        let d_out = self.post_norm_back(layer.post_mlp_norm.as_deref(), d, || {
            let mut hidden = gate.clone();
            ops::gated(activation, &mut hidden, &up);
            layer.down.exact(&hidden, n)
        });
        let mut d_hidden = vec![0.0; gate.len()];
        layer.down.backward(&d_out, n, &mut d_hidden);
        backward::gated(activation, &mut gate, &mut up, &d_hidden);
        let mut dh = vec![0.0; x.len()];
        layer.gate.backward(&gate, n, &mut dh);
        layer.up.backward(&up, n, &mut dh);
        self.norm_back(x, &layer.mlp_norm, &dh, d);
    }

    /// The gradient of a branch's last product, given that of the branch; `out` computes that product
    /// again where a norm follows it.
    fn post_norm_back(
        &self,
        post_norm: Option<&[f32]>,
        d: &[f32],
        out: impl FnOnce() -> Vec<f32>,
    ) -> Vec<f32> {
        match post_norm {
            Some(w) => {
                let mut d_out = vec![0.0; d.len()];
                self.norm_back(&out(), w, d, &mut d_out);
                d_out
            }
            None => d.to_vec(),
        }
    }

    /// Logits of one row.
    fn head(&self, x: &[f32]) -> Vec<f32> {
        let (weights, spec) = (&self.model.weights, &self.model.spec);
        let h = self.normed(x, &weights.final_norm);
        let mut logits = vec![0.0; spec.d_vocab];
        weights.head.forward_exact(&h, 1, None, &mut logits);
        if let Some(cap) = spec.final_softcap {
            ops::softcap(&mut logits, cap);
        }
        logits
    }

    /// Adds to `dx` what `d`, the gradient of the logits, is in terms of the row `x`.
    fn head_back(&self, x: &[f32], logits: &[f32], mut d: Vec<f32>, dx: &mut [f32]) {
        let weights = &self.model.weights;
        if let Some(cap) = self.model.spec.final_softcap {
            backward::softcap(logits, cap, &mut d);
        }
        let mut dh = vec![0.0; x.len()];
        weights.head.backward(&d, 1, &mut dh);
        self.norm_back(x, &weights.final_norm, &dh, dx);
    }
}
