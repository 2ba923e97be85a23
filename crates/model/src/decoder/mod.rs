//! One decoder for all families.
//!
//! With `x` the residual stream, block `i` is
//!
//! ```text
//! x += post_norm?( W_o attention(rope(norm_q? W_q h), rope(norm_k? W_k h), W_v h) ),  h = norm(x)
//! x += post_norm?( W_down (act(W_gate h) * W_up h) ),                                 h = norm(x)
//! ```
//!
//! where the [`ModelSpec`] says which of the optional parts a family has. A batch is ragged: the new
//! tokens of all sequences lie packed in one `[tokens, d_model]` buffer, linear layers run over all
//! rows at once, attention and hooks per sequence. The head is computed only for rows that ask for
//! logits.

mod weights;

use std::sync::Arc;

use demur_kernels::attention::{AttentionShape, SeqAttention, attention};
use demur_kernels::linear::Precision;
use demur_kernels::ops::{self, RopeTable};
use demur_kernels::quant::dequantize_row;

use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::hooks::{InterventionState, Point, Role, Rows, Site};
use crate::spec::{Activation, ModelSpec};
use weights::Weights;

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    checkpoint: Arc<Checkpoint>,
    weights: Weights,
}

/// Keys and values of one sequence, f32, one pair of buffers a layer.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    layers: Vec<(Vec<f32>, Vec<f32>)>, // [len, n_kv_heads, d_head] each
    len: usize,
}

impl KvCache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Which of a sequence's new tokens get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsAt {
    /// None: the head is not computed.
    None,
    /// The last one.
    Last,
    /// All.
    All,
}

/// One sequence of a batch: its new tokens, its cache, its hook.
pub struct SeqInput<'a> {
    /// New tokens; at least one.
    pub tokens: &'a [u32],
    /// Their roles, as many.
    pub roles: &'a [Role],
    /// Whether the model wrote them.
    pub generated: bool,
    /// The sequence's cache; the new tokens are added.
    pub cache: &'a mut KvCache,
    /// What edits this sequence's residuals.
    pub hook: Option<&'a mut (dyn InterventionState + 'static)>,
    /// The hook's sites, canonical.
    pub hook_sites: &'a [Site],
    /// Which tokens get logits.
    pub logits: LogitsAt,
}

/// What to keep of the residual stream, as later layers see it (after any edit).
#[derive(Debug, Clone, Default)]
pub struct Capture {
    /// The sites.
    pub sites: Vec<Site>,
    /// Stop after the last of them: later layers and the head are not computed, there are no
    /// logits, and the caches do not advance.
    pub stop_after_last: bool,
    /// Filled in: for each site, `[tokens, d_model]` in the order of the batch.
    pub rows: Vec<Vec<f32>>,
}

/// Logits of the rows that asked for them, in the order of the batch.
#[derive(Debug, Clone, Default)]
pub struct Logits {
    data: Vec<f32>,
    d_vocab: usize,
}

impl Logits {
    /// The rows, `[d_vocab]` each.
    pub fn rows(&self) -> std::slice::ChunksExact<'_, f32> {
        self.data.chunks_exact(self.d_vocab.max(1))
    }
}

/// Buffers that are kept from one forward pass to the next.
#[derive(Debug, Default)]
pub struct Workspace {
    x: Vec<f32>,
    h: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    attended: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

impl Workspace {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let Self {
            x,
            h,
            q,
            k,
            v,
            attended,
            gate,
            up,
            out,
        } = self;
        [x, h, q, k, v, attended, gate, up, out]
            .iter()
            .map(|b| b.capacity() * 4)
            .sum()
    }
}

/// Memory of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// Bytes of the weight files.
    pub checkpoint: u64,
    /// Bytes of the packed weights.
    pub weights: usize,
    /// Bytes of keys and values for each token of each sequence.
    pub cache_per_token: usize,
    /// Bytes of activations for each token of a forward pass.
    pub workspace_per_token: usize,
}

impl Model {
    /// Packs the weights of `checkpoint`, which stays mapped for embedding look-ups.
    ///
    /// # Errors
    /// What [`ModelSpec::from_checkpoint`] finds; a tensor that is missing or has another shape than
    /// the spec asks for.
    pub fn load(checkpoint: &Arc<Checkpoint>, precision: Precision) -> Result<Self, ModelError> {
        let (spec, names) = ModelSpec::from_checkpoint(checkpoint)?;
        let weights = Weights::load(checkpoint, &spec, &names, precision)?;
        Ok(Self {
            spec,
            checkpoint: Arc::clone(checkpoint),
            weights,
        })
    }

    /// The model's description.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// An empty cache.
    pub fn new_cache(&self) -> KvCache {
        KvCache {
            layers: vec![Default::default(); self.spec.n_layers],
            len: 0,
        }
    }

    /// What the model takes in memory.
    pub fn memory(&self) -> MemoryReport {
        let s = &self.spec;
        let (q, kv) = (s.n_heads * s.d_head, s.n_kv_heads * s.d_head);
        MemoryReport {
            checkpoint: self.checkpoint.bytes_on_disk(),
            weights: self.weights.bytes(),
            cache_per_token: s.n_layers * 2 * kv * 4,
            workspace_per_token: (3 * s.d_model + 2 * q + 2 * kv + 2 * s.d_mlp) * 4,
        }
    }

    /// Runs the new tokens of every sequence through the model.
    ///
    /// # Errors
    /// [`ModelError::TokenId`], [`ModelError::TooLong`], [`ModelError::SiteLayer`] or
    /// [`ModelError::Request`]; the caches are then as before.
    pub fn forward(
        &self,
        seqs: &mut [SeqInput<'_>],
        mut capture: Option<&mut Capture>,
        ws: &mut Workspace,
    ) -> Result<Logits, ModelError> {
        self.check(seqs, capture.as_deref())?;
        let spec = &self.spec;
        let (d, q_row, kv_row) = (
            spec.d_model,
            spec.n_heads * spec.d_head,
            spec.n_kv_heads * spec.d_head,
        );
        let n: usize = seqs.iter().map(|s| s.tokens.len()).sum();
        self.embed(seqs, ws)?;
        let last = capture.as_deref_mut().and_then(|c| {
            c.rows = vec![Vec::with_capacity(n * d); c.sites.len()];
            let stop = c.stop_after_last;
            c.sites.iter().map(|s| s.canonical()).max().filter(|_| stop)
        });
        let ropes: Vec<RopeTable> = spec
            .ropes
            .iter()
            .map(|rope| {
                let mut whole = RopeTable::default();
                for s in seqs.iter() {
                    let (start, end) = (s.cache.len, s.cache.len + s.tokens.len());
                    whole.extend(start..end, rope.frequencies(end), rope.scale);
                }
                whole
            })
            .collect();
        self.at_site(
            Site {
                layer: 0,
                point: Point::Pre,
            },
            seqs,
            &mut capture,
            &mut ws.x,
        );
        for (i, layer) in self.weights.layers.iter().enumerate() {
            let reached = |point| last == Some(Site { layer: i, point });
            if last
                == Some(Site {
                    layer: 0,
                    point: Point::Pre,
                })
            {
                break;
            }
            let how = spec.layers[i];
            // Attention.
            resize(&mut ws.h, n * d);
            ops::rms_norm(
                &ws.x,
                &layer.attn_norm,
                spec.norm_eps,
                spec.norm_plus_one,
                &mut ws.h,
            );
            resize(&mut ws.q, n * q_row);
            resize(&mut ws.k, n * kv_row);
            resize(&mut ws.v, n * kv_row);
            layer.q.forward(&ws.h, n, &mut ws.q);
            layer.k.forward(&ws.h, n, &mut ws.k);
            layer.v.forward(&ws.h, n, &mut ws.v);
            if let (Some(q_norm), Some(k_norm)) = (&layer.q_norm, &layer.k_norm) {
                ops::rms_norm_in_place(&mut ws.q, q_norm, spec.norm_eps, spec.norm_plus_one);
                ops::rms_norm_in_place(&mut ws.k, k_norm, spec.norm_eps, spec.norm_plus_one);
            }
            let rope = &ropes[how.rope];
            rope.apply(&mut ws.q, spec.n_heads, spec.d_head, spec.rope_style);
            rope.apply(&mut ws.k, spec.n_kv_heads, spec.d_head, spec.rope_style);
            resize(&mut ws.attended, n * q_row);
            let shape = AttentionShape {
                n_heads: spec.n_heads,
                n_kv_heads: spec.n_kv_heads,
                d_head: spec.d_head,
                scale: spec.attn_scale,
                window: how.window,
                softcap: spec.attn_softcap,
            };
            let mut tasks = Vec::with_capacity(seqs.len());
            let (mut q, mut k, mut v) = (&ws.q[..], &ws.k[..], &ws.v[..]);
            let mut out = &mut ws.attended[..];
            for s in seqs.iter_mut() {
                let t = s.tokens.len();
                let start = s.cache.len;
                let (keys, values) = &mut s.cache.layers[i];
                // After an error in a former pass the buffers may be longer than the cache.
                keys.truncate(start * kv_row);
                values.truncate(start * kv_row);
                keys.extend_from_slice(split(&mut k, t * kv_row));
                values.extend_from_slice(split(&mut v, t * kv_row));
                let (mine, rest) = std::mem::take(&mut out).split_at_mut(t * q_row);
                out = rest;
                let q = split(&mut q, t * q_row);
                tasks.push(SeqAttention {
                    q,
                    k: keys,
                    v: values,
                    start,
                    out: mine,
                });
            }
            attention(&shape, &mut tasks);
            layer.o.forward(&ws.attended, n, &mut ws.h);
            self.add_branch(ws, layer.post_attn_norm.as_deref());
            self.at_site(
                Site {
                    layer: i,
                    point: Point::Mid,
                },
                seqs,
                &mut capture,
                &mut ws.x,
            );
            if reached(Point::Mid) {
                break;
            }
            // MLP.
            ops::rms_norm(
                &ws.x,
                &layer.mlp_norm,
                spec.norm_eps,
                spec.norm_plus_one,
                &mut ws.h,
            );
            resize(&mut ws.gate, n * spec.d_mlp);
            resize(&mut ws.up, n * spec.d_mlp);
            layer.gate.forward(&ws.h, n, &mut ws.gate);
            layer.up.forward(&ws.h, n, &mut ws.up);
            match spec.activation {
                Activation::Silu => ops::silu_mul(&mut ws.gate, &ws.up),
                Activation::GeluTanh => ops::gelu_tanh_mul(&mut ws.gate, &ws.up),
            }
            layer.down.forward(&ws.gate, n, &mut ws.h);
            self.add_branch(ws, layer.post_mlp_norm.as_deref());
            self.at_site(Site::post(i), seqs, &mut capture, &mut ws.x);
            if reached(Point::Post) {
                break;
            }
        }
        if last.is_some() {
            return Ok(Logits::default());
        }
        for s in seqs.iter_mut() {
            s.cache.len += s.tokens.len();
        }
        Ok(self.head(seqs, ws))
    }

    /// The final norm and the head of one residual row: the logit lens.
    ///
    /// # Shapes
    /// `resid` is `[d_model]`, the result `[d_vocab]`.
    pub fn unembed_row(&self, resid: &[f32]) -> Vec<f32> {
        let mut h = vec![0.0; self.spec.d_model];
        self.normed_head(resid, &mut h)
    }

    fn normed_head(&self, rows: &[f32], h: &mut [f32]) -> Vec<f32> {
        let spec = &self.spec;
        let n = rows.len() / spec.d_model;
        ops::rms_norm(
            rows,
            &self.weights.final_norm,
            spec.norm_eps,
            spec.norm_plus_one,
            h,
        );
        let mut logits = vec![0.0; n * spec.d_vocab];
        self.weights.head().forward(h, n, None, &mut logits);
        if let Some(cap) = spec.final_softcap {
            ops::softcap(&mut logits, cap);
        }
        logits
    }

    fn check(&self, seqs: &[SeqInput<'_>], capture: Option<&Capture>) -> Result<(), ModelError> {
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
        for site in capture.iter().flat_map(|c| &c.sites) {
            site.check(spec.n_layers)?;
        }
        Ok(())
    }

    /// Embeddings of all new tokens into `ws.x`.
    fn embed(&self, seqs: &[SeqInput<'_>], ws: &mut Workspace) -> Result<(), ModelError> {
        let spec = &self.spec;
        let d = spec.d_model;
        let table = self.checkpoint.tensor(&self.weights.embed)?;
        let row = table.bytes.len() / spec.d_vocab;
        let n: usize = seqs.iter().map(|s| s.tokens.len()).sum();
        resize(&mut ws.x, n * d);
        let tokens = seqs.iter().flat_map(|s| s.tokens);
        for (x, &id) in ws.x.chunks_exact_mut(d).zip(tokens) {
            let at = id as usize * row;
            dequantize_row(table.info.ty, &table.bytes[at..at + row], x)?;
            if spec.embed_scale != 1.0 {
                x.iter_mut().for_each(|v| *v *= spec.embed_scale);
            }
        }
        Ok(())
    }

    /// `x += h`, normed first if the family does.
    fn add_branch(&self, ws: &mut Workspace, post_norm: Option<&[f32]>) {
        let spec = &self.spec;
        match post_norm {
            Some(w) => {
                resize(&mut ws.out, ws.h.len());
                ops::rms_norm(&ws.h, w, spec.norm_eps, spec.norm_plus_one, &mut ws.out);
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
        let d = self.spec.d_model;
        let mut at = 0;
        for s in seqs.iter_mut() {
            let rows = at..at + s.tokens.len() * d;
            at = rows.end;
            if let Some(hook) = s.hook.as_deref_mut()
                && s.hook_sites.contains(&site)
            {
                let seen = Rows {
                    start_pos: s.cache.len,
                    tokens: s.tokens,
                    roles: s.roles,
                    generated: s.generated,
                };
                hook.edit(site, &seen, &mut x[rows]);
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
    fn head(&self, seqs: &[SeqInput<'_>], ws: &mut Workspace) -> Logits {
        let d = self.spec.d_model;
        let mut wanted = Vec::new();
        let mut at = 0;
        for s in seqs {
            let end = at + s.tokens.len();
            match s.logits {
                LogitsAt::None => {}
                LogitsAt::Last => wanted.extend_from_slice(&ws.x[(end - 1) * d..end * d]),
                LogitsAt::All => wanted.extend_from_slice(&ws.x[at * d..end * d]),
            }
            at = end;
        }
        if wanted.is_empty() {
            return Logits {
                data: Vec::new(),
                d_vocab: self.spec.d_vocab,
            };
        }
        resize(&mut ws.h, wanted.len());
        Logits {
            data: self.normed_head(&wanted, &mut ws.h),
            d_vocab: self.spec.d_vocab,
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
