//! The forward pass.

use demur_kernels::attention::{AttentionShape, SeqAttention, attention};
use demur_kernels::linear::forward_all;
use demur_kernels::ops::{self, RopeTable};
use demur_kernels::quant::dequantize_row;

use super::batch::{Capture, Logits, LogitsAt, SeqInput, Workspace};
use super::{Model, weights::Layer};
use crate::error::ModelError;
use crate::hooks::{Point, Rows, Site};
use crate::spec::LayerSpec;

/// The site after which a pass ends early.
fn stops_at(capture: Option<&Capture>) -> Option<Site> {
    let early = capture.filter(|c| c.stop_after_last)?;
    early.sites.iter().map(|s| s.canonical()).max()
}

impl Model {
    /// Runs the new tokens of every sequence through the model.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooLong`], [`ModelError::SiteLayer`] or
    /// [`ModelError::Request`]; the caches are then as before.
    pub fn forward<'w>(
        &self,
        seqs: &mut [SeqInput<'_>],
        mut capture: Option<&mut Capture>,
        ws: &'w mut Workspace,
    ) -> Result<Logits<'w>, ModelError> {
        let stop = stops_at(capture.as_deref());
        let depth = stop.map_or(self.spec.n_layers, |site| match site.point {
            Point::Pre => site.layer,
            Point::Mid | Point::Post => site.layer + 1,
        });
        self.check(seqs, capture.as_deref(), depth)?;
        self.embed(seqs, ws)?;
        ws.products = capture.as_deref().map(|c| c.products).unwrap_or_default();
        if let Some(c) = capture.as_deref_mut() {
            c.rows = vec![Vec::with_capacity(ws.x.len()); c.sites.len()];
        }
        let ropes = self.ropes(seqs);
        // Runs hooks and captures; says whether that was the last thing to do.
        let mut visit = |layer, point, seqs: &mut [SeqInput<'_>], x: &mut [f32]| {
            let site = Site { layer, point };
            self.at_site(site, seqs, &mut capture, x);
            stop == Some(site)
        };
        let mut stopped = visit(0, Point::Pre, seqs, &mut ws.x);
        for (i, (layer, how)) in self
            .weights
            .layers
            .iter()
            .zip(&self.spec.layers)
            .enumerate()
        {
            if stopped {
                break;
            }
            self.attend(layer, i, how, &ropes[how.rope], seqs, ws);
            stopped = visit(i, Point::Mid, seqs, &mut ws.x);
            if !stopped {
                self.mlp(layer, ws);
                stopped = visit(i, Point::Post, seqs, &mut ws.x);
            }
        }
        for s in seqs.iter_mut() {
            s.cache.depth = depth;
            s.cache.len += s.tokens.len();
        }
        if stopped {
            return Ok(Logits::default());
        }
        Ok(self.head(seqs, ws))
    }

    fn check(
        &self,
        seqs: &[SeqInput<'_>],
        capture: Option<&Capture>,
        depth: usize, // layers whose attention runs
    ) -> Result<(), ModelError> {
        let spec = &self.spec;
        for s in seqs {
            if s.tokens.is_empty() || s.tokens.len() != s.roles.len() {
                return Err(ModelError::Request {
                    reason: format!(
                        "{} new tokens with {} roles; give at least one token and as many roles",
                        s.tokens.len(),
                        s.roles.len()
                    ),
                });
            }
            if let Some(&id) = s.tokens.iter().find(|&&id| id as usize >= spec.d_vocab) {
                return Err(ModelError::TokenId {
                    id,
                    d_vocab: spec.d_vocab,
                });
            }
            let tokens = s.cache.len + s.tokens.len();
            if tokens > spec.context {
                return Err(ModelError::TooLong {
                    tokens,
                    context: spec.context,
                });
            }
            if s.cache.layers.len() != spec.n_layers {
                return Err(ModelError::Request {
                    reason: "the cache is of another model; use Model::new_cache".to_owned(),
                });
            }
        }
        if let Some(s) = seqs
            .iter()
            .find(|s| !s.cache.is_empty() && s.cache.depth < depth)
        {
            return Err(ModelError::Request {
                reason: format!(
                    "the cache holds the first {} of {} layers, after a pass that stopped there; go on from it to no later site",
                    s.cache.depth, spec.n_layers
                ),
            });
        }
        for site in capture.iter().flat_map(|c| &c.sites) {
            site.check(spec.n_layers)?;
        }
        Ok(())
    }

    /// Embeddings of all new tokens into `ws.x`.
    fn embed(&self, seqs: &[SeqInput<'_>], ws: &mut Workspace) -> Result<(), ModelError> {
        let spec = &self.spec;
        let table = self.checkpoint.tensor(&self.weights.embed)?;
        let row = table.bytes.len() / spec.d_vocab;
        let n: usize = seqs.iter().map(|s| s.tokens.len()).sum();
        resize(&mut ws.x, n * spec.d_model);
        let tokens = seqs.iter().flat_map(|s| s.tokens);
        for (x, &id) in ws.x.chunks_exact_mut(spec.d_model).zip(tokens) {
            let at = id as usize * row;
            dequantize_row(table.info.ty, &table.bytes[at..at + row], x)?;
            if spec.embed_scale != 1.0 {
                x.iter_mut().for_each(|v| *v *= spec.embed_scale);
            }
        }
        Ok(())
    }

    /// Cosines and sines of all new positions, for each of the model's rotary embeddings.
    fn ropes(&self, seqs: &[SeqInput<'_>]) -> Vec<RopeTable> {
        let table = |rope: &crate::spec::Rope| {
            let mut table = RopeTable::default();
            for s in seqs {
                let (start, end) = (s.cache.len, s.cache.len + s.tokens.len());
                let length = end.max(s.cache.expected);
                table.extend(start..end, rope.frequencies(length), rope.scale);
            }
            table
        };
        self.spec.ropes.iter().map(table).collect()
    }

    /// The attention half of block `i`: reads and writes `ws.x`.
    fn attend(
        &self,
        layer: &Layer,
        i: usize,
        how: &LayerSpec,
        rope: &RopeTable,
        seqs: &mut [SeqInput<'_>],
        ws: &mut Workspace,
    ) {
        let spec = &self.spec;
        let n = ws.x.len() / spec.d_model;
        let (q_row, kv_row) = (spec.n_heads * spec.d_head, spec.n_kv_heads * spec.d_head);
        resize(&mut ws.h, ws.x.len());
        resize(&mut ws.q, n * q_row);
        resize(&mut ws.k, n * kv_row);
        resize(&mut ws.v, n * kv_row);
        self.norm(&ws.x, &layer.attn_norm, &mut ws.h);
        let qkv = [
            layer.q.output(&mut ws.q),
            layer.k.output(&mut ws.k),
            layer.v.output(&mut ws.v),
        ];
        forward_all(&ws.h, n, ws.products, qkv);
        if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
            ops::rms_norm_in_place(&mut ws.q, q_norm, spec.norm_eps, spec.norm_plus_one);
            ops::rms_norm_in_place(&mut ws.k, k_norm, spec.norm_eps, spec.norm_plus_one);
        }
        rope.apply(&mut ws.q, spec.n_heads, spec.d_head, spec.rope_style);
        rope.apply(&mut ws.k, spec.n_kv_heads, spec.d_head, spec.rope_style);
        resize(&mut ws.attended, n * q_row);
        let mut tasks = Vec::with_capacity(seqs.len());
        let (mut q, mut k, mut v) = (&ws.q[..], &ws.k[..], &ws.v[..]);
        let mut out = &mut ws.attended[..];
        for s in seqs.iter_mut() {
            let (t, start) = (s.tokens.len(), s.cache.len);
            let (keys, values) = &mut s.cache.layers[i];
            // After a pass that stopped early the buffers are longer than the cache.
            keys.truncate(start * spec.n_kv_heads);
            values.truncate(start * spec.n_kv_heads);
            keys.push(split(&mut k, t * kv_row));
            values.push(split(&mut v, t * kv_row));
            let (mine, rest) = std::mem::take(&mut out).split_at_mut(t * q_row);
            out = rest;
            tasks.push(SeqAttention {
                q: split(&mut q, t * q_row),
                k: keys,
                v: values,
                start,
                out: mine,
            });
        }
        attention(&self.attention_shape(how), &mut tasks);
        forward_all(&ws.attended, n, ws.products, [layer.o.output(&mut ws.h)]);
        self.add_branch(ws, layer.post_attn_norm.as_deref());
    }

    /// How a layer attends.
    pub(super) fn attention_shape(&self, how: &LayerSpec) -> AttentionShape {
        let spec = &self.spec;
        AttentionShape {
            n_heads: spec.n_heads,
            n_kv_heads: spec.n_kv_heads,
            d_head: spec.d_head,
            scale: spec.attn_scale,
            window: how.window,
            softcap: spec.attn_softcap,
        }
    }

    /// The MLP half of a block: reads and writes `ws.x`.
    fn mlp(&self, layer: &Layer, ws: &mut Workspace) {
        let spec = &self.spec;
        let n = ws.x.len() / spec.d_model;
        resize(&mut ws.out, ws.x.len());
        self.norm(&ws.x, &layer.mlp_norm, &mut ws.out);
        let mlp = layer.mlp(spec.activation, ws.products);
        mlp.forward(&ws.out, n, &mut ws.hidden, &mut ws.h);
        self.add_branch(ws, layer.post_mlp_norm.as_deref());
    }

    pub(super) fn norm(&self, x: &[f32], w: &[f32], out: &mut [f32]) {
        ops::rms_norm(x, w, self.spec.norm_eps, self.spec.norm_plus_one, out);
    }

    /// `x += h`, normed first if the family does.
    fn add_branch(&self, ws: &mut Workspace, post_norm: Option<&[f32]>) {
        match post_norm {
            Some(w) => {
                resize(&mut ws.out, ws.h.len());
                self.norm(&ws.h, w, &mut ws.out);
                ops::add(&mut ws.x, &ws.out);
            }
            None => ops::add(&mut ws.x, &ws.h),
        }
    }

    /// Runs the hooks of a site, then captures.
    fn at_site(
        &self,
        site: Site,
        seqs: &mut [SeqInput<'_>],
        capture: &mut Option<&mut Capture>,
        x: &mut [f32],
    ) {
        let mut rest = &mut x[..];
        for s in seqs.iter_mut() {
            let (mine, others) =
                std::mem::take(&mut rest).split_at_mut(s.tokens.len() * self.spec.d_model);
            rest = others;
            if let Some(hook) = s.hook.as_deref_mut()
                && s.hook_sites.contains(&site)
            {
                let rows = Rows {
                    start_pos: s.cache.len,
                    tokens: s.tokens,
                    roles: s.roles,
                    generated: s.generated,
                };
                hook.edit(site, &rows, mine);
            }
        }
        if let Some(capture) = capture.as_deref_mut() {
            for (wanted, rows) in capture.sites.iter().zip(&mut capture.rows) {
                if wanted.canonical() == site {
                    rows.extend_from_slice(x);
                }
            }
        }
    }

    /// Final norm and head for the rows that ask for logits.
    fn head<'w>(&self, seqs: &[SeqInput<'_>], ws: &'w mut Workspace) -> Logits<'w> {
        let d = self.spec.d_model;
        ws.out.clear();
        let mut at = 0;
        for s in seqs {
            let end = at + s.tokens.len();
            let first = match s.logits {
                LogitsAt::None => end,
                LogitsAt::Last => end - 1,
                LogitsAt::All => at,
            };
            ws.out.extend_from_slice(&ws.x[first * d..end * d]);
            at = end;
        }
        self.unembed(&ws.out, &mut ws.h, &mut ws.logits);
        Logits {
            data: &ws.logits,
            d_vocab: self.spec.d_vocab,
        }
    }

    /// The final norm and the head of one residual row: the logit lens.
    ///
    /// # Shapes
    /// `resid` is `[d_model]`, the result `[d_vocab]`.
    pub fn unembed_row(&self, resid: &[f32]) -> Vec<f32> {
        let mut logits = Vec::new();
        self.unembed(resid, &mut Vec::new(), &mut logits);
        logits
    }

    /// `logits [n, d_vocab]` of residual rows `[n, d_model]`; `h` is scratch.
    fn unembed(&self, rows: &[f32], h: &mut Vec<f32>, logits: &mut Vec<f32>) {
        let spec = &self.spec;
        let n = rows.len() / spec.d_model;
        resize(h, rows.len());
        resize(logits, n * spec.d_vocab);
        self.norm(rows, &self.weights.final_norm, h);
        self.weights.head.forward(h, n, None, logits);
        if let Some(cap) = spec.final_softcap {
            ops::softcap(logits, cap);
        }
    }
}

fn resize(buffer: &mut Vec<f32>, n: usize) {
    buffer.resize(n, 0.0);
}

/// Takes `n` values off the front.
fn split<'a>(rest: &mut &'a [f32], n: usize) -> &'a [f32] {
    let (front, back) = rest.split_at(n);
    *rest = back;
    front
}
