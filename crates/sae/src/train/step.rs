//! One training step: codes, errors, gradients, Adam. The equations are in [`super`].
//!
//! | phase | work | reads |
//! | --- | --- | --- |
//! | pack | `x - b_dec` as rows of `E` | the batch |
//! | encode | product and top-k in one pass, or product by tiles and a rule | all of `W_enc`, in `E` or f32 |
//! | order | entries by latent, a counting sort | codes |
//! | decode | errors, gradients to the codes, row by row | a row of `W_dec` in `E` for each entry |
//! | update | gradients of a latent in two buffers, Adam, norm, copies | rows of `x` and `g` in `E`, moments |
//!
//! `E` is bf16 or f32; sums and what Adam moves are f32 always.

use std::time::{Duration, Instant};

use demur_kernels::adam::Adam;
use demur_kernels::element::Element;
use demur_kernels::encoder::{self, Bf16Tiles, EncodeTime, TileRows};
use demur_kernels::ops::{axpy, dot};
use half::bf16;
use rayon::prelude::*;

use super::architecture::{Rule, StepOf};
use super::codes::{Codes, Entries};
use super::{Architecture, Param, Params, StepStats, Trainer, batch_topk, dense, normalise, topk};

/// Latents of a task of the update.
const LATENTS: usize = 256;
/// Rows of a task of the decoder.
const ROWS: usize = 64;

/// Where the time of a step went. The sum of the phases is the step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Rows centred and rounded.
    pub pack: Duration,
    /// Product and top-k, of dead latents as well.
    pub encode: Duration,
    /// Of `encode`, the product of all latents where it is one pass with the selection: time of all
    /// threads, over their number.
    pub product: Duration,
    /// Of `encode`, the selection, in the same way.
    pub select: Duration,
    /// Entries sorted by latent.
    pub order: Duration,
    /// Errors and gradients to the codes.
    pub decode: Duration,
    /// Gradients to the weights and Adam.
    pub update: Duration,
}

/// The weights in `E`, where that is not f32.
#[derive(Debug)]
struct Copies {
    enc: Bf16Tiles,
    dec: Vec<bf16>, // [d_sae, d_model]
}

impl Copies {
    fn none() -> Self {
        Self {
            enc: Bf16Tiles::new(&[], 0),
            dec: Vec::new(),
        }
    }
}

/// What a step needs beside the state; kept from step to step.
#[derive(Debug)]
pub(super) struct Workspace<E> {
    copies: Copies,
    /// Latents with moments that are not all zero: Adam does nothing to the others.
    awake: Vec<bool>,
    /// Where the latents of each level end.
    levels: Vec<u32>,
    x: Vec<E>, // [batch, stride], centred
    g: Vec<E>, // [batch, levels, stride]
    codes: Codes,
    /// Dead latents that reconstruct the error.
    aux: Term<E>,
    /// Of multi-TopK, the wider selection.
    wide: Term<E>,
}

/// Codes that take part in the loss beside the SAE's own.
#[derive(Debug, Default)]
struct Term<E> {
    codes: Codes,
    g: Vec<E>, // [batch, stride]
}

/// Parts of `each` elements, and then empty ones.
fn parts<T>(mut rest: &mut [T], each: usize) -> impl Iterator<Item = &mut [T]> {
    std::iter::repeat_with(move || {
        let whole = std::mem::take(&mut rest);
        let (part, others) = whole.split_at_mut(each.min(whole.len()));
        rest = others;
        part
    })
}

/// Parts that end at `ends`; empty ones of an empty slice.
fn parts_to<'a, T>(mut rest: &'a mut [T], ends: &[usize]) -> Vec<&'a mut [T]> {
    let mut from = 0;
    let mut next = |end: usize| {
        let whole = std::mem::take(&mut rest);
        let (part, others) = whole.split_at_mut((end - from).min(whole.len()));
        (rest, from) = (others, end);
        part
    };
    ends.iter().map(|end| next(*end)).collect()
}

/// A parameter's rows of some latents.
struct ParamPart<'a> {
    w: &'a mut [f32],
    m: &'a mut [f32],
    v: &'a mut [f32],
}

impl Param {
    fn parts(&mut self, each: usize) -> impl Iterator<Item = ParamPart<'_>> {
        let moments = parts(&mut self.m, each).zip(parts(&mut self.v, each));
        parts(&mut self.w, each)
            .zip(moments)
            .map(|(w, (m, v))| ParamPart { w, m, v })
    }
}

impl ParamPart<'_> {
    fn step(&mut self, adam: Adam, row: std::ops::Range<usize>, g: &[f32]) {
        let (m, v) = (&mut self.m[row.clone()], &mut self.v[row.clone()]);
        adam.update(&mut self.w[row], m, v, g);
    }
}

/// What a task of the update owns.
struct LatentPart<'a> {
    first: usize,
    enc: ParamPart<'a>,
    dec: ParamPart<'a>,
    tiles: Option<TileRows<'a>>,
    half_dec: &'a mut [bf16],
    awake: &'a mut [bool],
    db: &'a mut [[f32; 3]],
}

/// What a task of the decoder owns.
struct RowPart<'a, E> {
    first: usize,
    g: &'a mut [E],
    grad: &'a mut [f32],
    own: &'a mut [f32],
    aux: TermPart<'a, E>,
    wide: TermPart<'a, E>,
}

/// A term's rows of a task.
struct TermPart<'a, E> {
    codes: &'a Codes,
    /// Place of the first entry.
    base: usize,
    g: &'a mut [E],
    grad: &'a mut [f32],
}

impl<E: Element> Term<E> {
    /// Parts of `each` of `n` rows. `grad` are the gradients to the codes, taken out of them.
    fn parts<'a>(
        &'a mut self,
        grad: &'a mut [f32],
        n: usize,
        each: usize,
        stride: usize,
    ) -> Vec<TermPart<'a, E>> {
        let rows = if self.codes.is_empty() { 0 } else { n };
        self.g.resize(rows * stride, E::default());
        let (codes, ends) = (&self.codes, self.codes.ends(n, each));
        let starts = std::iter::once(0).chain(ends.iter().copied());
        parts(&mut self.g, each * stride)
            .zip(parts_to(grad, &ends))
            .zip(starts)
            .map(|((g, grad), base)| TermPart {
                codes,
                base,
                g,
                grad,
            })
            .collect()
    }
}

impl<E: Element> TermPart<'_, E> {
    /// Adds row `r`'s entries to the error `e`, takes gradients from it, and turns it into the gradient
    /// `by e`, which goes to the part's row `i`. Returns `|e|^2`.
    fn decode(&mut self, r: usize, i: usize, dec: &[E], by: f32, e: &mut [f32]) -> f64 {
        let (d, row) = (e.len(), self.codes.row(r));
        let idx = &self.codes.idx[row.clone()];
        E::weighted_sum(&self.codes.val[row.clone()], idx, dec, d, e);
        let square = f64::from(dot(e, e));
        let grad = &mut self.grad[row.start - self.base..row.end - self.base];
        for (g, &j) in grad.iter_mut().zip(idx) {
            *g = by * E::dot(e, &dec[j as usize * d..(j as usize + 1) * d]);
        }
        e.iter_mut().for_each(|v| *v *= by);
        let stride = E::stride(d);
        E::store(e, &mut self.g[i * stride..i * stride + d]);
        square
    }
}

/// Gradients of a latent's row that are numbers.
struct OfLatent {
    /// To the encoder's product, over rows.
    product: f32,
    /// To `b_enc`, and to parameters of the architecture.
    biases: [f32; 3],
}

/// What the decoder sums up.
#[derive(Default)]
struct Errors {
    /// `sum |x - x_hat|^2`.
    error: f64,
    /// The same over all levels, with penalties that rows have.
    loss: f64,
    aux: f64,
    /// Sum of `g` over rows, `[d_model]`.
    g: Vec<f32>,
}

impl<E: Element> Workspace<E> {
    /// For a state; `half` says whether copies in bf16 are kept.
    pub(super) fn new(t: &Trainer, half: bool) -> Self {
        let (params, d) = (&t.params, t.cfg.sae.d_model);
        let (enc, dec) = (&params.w_enc, &params.w_dec);
        let mut copies = Copies::none();
        if half {
            copies.dec = vec![bf16::ZERO; dec.w.len()];
            bf16::store(&dec.w, &mut copies.dec);
            if t.cfg.architecture.selects() {
                copies.enc = Bf16Tiles::new(&enc.w, d);
            }
        }
        let zero = |p: &Param, j: usize| p.v[j * d..(j + 1) * d].iter().all(|v| *v == 0.0);
        Self {
            copies,
            awake: (0..params.b_enc.w.len())
                .map(|j| !(zero(enc, j) && zero(dec, j)))
                .collect(),
            levels: t.cfg.architecture.levels(t.cfg.sae.d_sae),
            x: Vec::new(),
            g: Vec::new(),
            codes: Codes::default(),
            aux: Term::default(),
            wide: Term::default(),
        }
    }

    /// Bytes of the copies of the weights.
    pub(super) fn copied_bytes(&self) -> usize {
        self.copies.enc.bytes() + size_of_val(&self.copies.dec[..])
    }

    /// One step of `t` on `x`.
    pub(super) fn step(&mut self, t: &mut Trainer, x: &[f32]) -> StepStats {
        let mut clock = Instant::now();
        let mut lap = || std::mem::replace(&mut clock, Instant::now()).elapsed();
        let (d, m) = (t.cfg.sae.d_model, t.cfg.sae.d_sae);
        let n = x.len() / d;
        let lr = t.lr();
        let mut timing = Timing::default();

        self.pack(x, &t.params.b_dec.w);
        timing.pack = lap();

        let variance = variance(x, d);
        let mut rule = t.cfg.architecture.rule(
            &t.params,
            &StepOf {
                step: t.step,
                steps: t.cfg.steps,
                d,
                variance,
            },
        );
        let dead = t.dead();
        let k_aux = match t.cfg.auxk_alpha > 0.0 {
            true => (d / 2).min(dead.len()),
            false => 0,
        };
        let time = self.encode(t, x, &rule, &dead, k_aux);
        let threads = demur_kernels::threads() as u32;
        (timing.product, timing.select) = (time.product / threads, time.select / threads);
        timing.encode = lap();

        self.codes.order(m);
        for (j, idle) in t.idle.iter_mut().enumerate() {
            let places = self.codes.of(j).0;
            let fired = places.iter().any(|&i| self.codes.val[i as usize] > 0.0);
            *idle = if fired { 0 } else { *idle + n as u64 };
        }
        let active = self.codes.active();
        timing.order = lap();

        let weight = t.cfg.auxk_alpha * (dead.len() as f64 / (d / 2).max(1) as f64).min(1.0);
        let sparsity = match &mut rule {
            Rule::Jump(rule) => rule.penalise(active, n),
            _ => 0.0,
        };
        let mut sums = self.decode(&t.params, x, variance, weight, &rule);
        timing.decode = lap();

        t.step += 1;
        let adam = Adam::new(lr, t.step);
        let scale = match t.cfg.clip {
            Some(most) => self.clip(&t.params, d, most, &sums.g, &rule),
            None => 1.0,
        };
        let db = self.update(&mut t.params, adam, d, scale, &mut sums.g, &rule);
        let p = &mut t.params;
        for (i, p) in std::iter::once(&mut p.b_enc)
            .chain(&mut p.extra)
            .enumerate()
        {
            let g: Vec<f32> = db.iter().map(|db| db[i]).collect();
            adam.update(&mut p.w, &mut p.m, &mut p.v, &g);
        }
        adam.update(&mut p.b_dec.w, &mut p.b_dec.m, &mut p.b_dec.v, &sums.g);
        timing.update = lap();
        t.timing = timing;

        StepStats {
            step: t.step,
            loss: (sums.loss + weight * sums.aux) / variance + sparsity,
            fvu: sums.error / variance,
            l0: active as f64 / n as f64,
            dead: dead.len() as f64 / m as f64,
            lr,
        }
    }

    /// Codes, and those of dead latents for the auxiliary term.
    fn encode(
        &mut self,
        t: &mut Trainer,
        x: &[f32],
        rule: &Rule,
        dead: &[u32],
        k_aux: usize,
    ) -> EncodeTime {
        let (d, k) = (t.cfg.sae.d_model, t.cfg.sae.k);
        let n = x.len() / d;
        let p = &t.params;
        let encoder = E::encoder(&p.w_enc.w, &self.copies.enc);
        let time = match t.cfg.architecture {
            Architecture::TopK { multi: false } => self.codes.select(n, k, |idx, val| {
                E::encode_topk(encoder, &p.b_enc.w, &self.x, d, k, idx, val)
            }),
            Architecture::TopK { multi: true } => {
                let (wide, most) = (&mut self.wide.codes, (topk::WIDER * k).min(t.cfg.sae.d_sae));
                let time = wide.select(n, most, |idx, val| {
                    E::encode_topk(encoder, &p.b_enc.w, &self.x, d, most, idx, val)
                });
                wide.order(t.cfg.sae.d_sae);
                self.codes.take(&topk::narrowed(wide, n, k));
                time
            }
            Architecture::BatchTopK | Architecture::Matryoshka { .. } => {
                let (rows, time) = batch_topk::encode::<E>(encoder, &p.b_enc.w, &self.x, n, d, k);
                self.codes.take(&rows);
                let smallest = self.codes.vals().reduce(f32::min);
                t.threshold = batch_topk::threshold(t.threshold, t.step + 1, smallest);
                time
            }
            _ => {
                self.codes.take_tiles(&dense::encode(p, x, rule));
                EncodeTime::default()
            }
        };
        if k_aux == 0 {
            self.aux.codes.clear();
            return time;
        }
        let some = E::gather(encoder, d, dead);
        let bias: Vec<f32> = dead.iter().map(|&j| p.b_enc.w[j as usize]).collect();
        self.aux.codes.select(n, k_aux, |idx, val| {
            E::encode_topk(&some, &bias, &self.x, d, k_aux, idx, val);
            idx.iter_mut().for_each(|i| *i = dead[*i as usize]);
        });
        self.aux.codes.order(t.cfg.sae.d_sae);
        time
    }

    /// `x - b_dec`, padded.
    fn pack(&mut self, x: &[f32], b_dec: &[f32]) {
        let d = b_dec.len();
        let (n, stride) = (x.len() / d, E::stride(d));
        self.x
            .resize(n.next_multiple_of(encoder::ROWS) * stride, E::default());
        self.x[n * stride..].fill(E::default());
        self.g.resize(n * self.levels.len() * stride, E::default());
        self.x
            .par_chunks_exact_mut(stride)
            .zip(x.par_chunks_exact(d))
            .with_min_len(ROWS)
            .for_each_init(
                || vec![0.0f32; d],
                |centred, (row, x)| {
                    for ((c, x), b) in centred.iter_mut().zip(x).zip(b_dec) {
                        *c = x - b;
                    }
                    E::store(centred, &mut row[..d]);
                },
            );
    }

    /// Errors, and their gradients to rows and codes.
    fn decode(&mut self, p: &Params, x: &[f32], variance: f64, weight: f64, rule: &Rule) -> Errors {
        let d = p.b_dec.w.len();
        let (n, stride, levels) = (x.len() / d, E::stride(d), &self.levels);
        let dec = E::pick(&p.w_dec.w, &self.copies.dec);
        let row_of = |j: u32| &dec[j as usize * d..(j as usize + 1) * d];
        let (by, by_aux) = ((2.0 / variance) as f32, (2.0 * weight / variance) as f32);
        let by_wide = (2.0 * topk::WEIGHT / variance) as f32;
        let ends = self.codes.ends(n, ROWS);
        let mut grads = [&mut self.codes, &mut self.aux.codes, &mut self.wide.codes]
            .map(|codes| std::mem::take(&mut codes.grad));
        let [grad, aux_grad, wide_grad] = &mut grads;
        let mut own = std::mem::take(&mut self.codes.own);
        let (with_aux, with_wide) = (!self.aux.codes.is_empty(), !self.wide.codes.is_empty());
        let mut rows: Vec<RowPart<'_, E>> = (0..n)
            .step_by(ROWS)
            .zip(parts(&mut self.g, ROWS * levels.len() * stride))
            .zip(parts_to(grad, &ends))
            .zip(parts_to(&mut own, &ends))
            .zip(self.aux.parts(aux_grad, n, ROWS, stride))
            .zip(self.wide.parts(wide_grad, n, ROWS, stride))
            .map(|(((((first, g), grad), own), aux), wide)| RowPart {
                first,
                g,
                grad,
                own,
                aux,
                wide,
            })
            .collect();
        let codes = &self.codes;
        let sums: Vec<Errors> = rows
            .par_iter_mut()
            .map(|part| {
                let mut sums = Errors {
                    g: vec![0.0f32; d],
                    ..Errors::default()
                };
                let mut e = vec![0.0f32; levels.len() * d];
                let mut scratch = vec![0.0f32; d];
                let last = (levels.len() - 1) * d;
                let first = codes.row(part.first).start;
                for (i, g) in part.g.chunks_exact_mut(levels.len() * stride).enumerate() {
                    let r = part.first + i;
                    let x = &x[r * d..(r + 1) * d];
                    let row = codes.row(r);
                    let (idx, val) = (&codes.idx[row.clone()], &codes.val[row.clone()]);
                    let mut from = 0;
                    for (l, &end) in levels.iter().enumerate() {
                        if l == 0 {
                            error_of_none(x, &p.b_dec.w, &mut e[..d]);
                        } else {
                            e.copy_within((l - 1) * d..l * d, l * d);
                        }
                        let e = &mut e[l * d..(l + 1) * d];
                        let to = from + idx[from..].partition_point(|j| *j < end);
                        E::weighted_sum(&val[from..to], &idx[from..to], dec, d, e);
                        from = to;
                        sums.loss += f64::from(dot(e, e));
                    }
                    sums.error += f64::from(dot(&e[last..], &e[last..]));
                    if with_aux {
                        scratch.copy_from_slice(&e[last..]); // - (x - x_hat)
                        sums.aux += part.aux.decode(r, i, dec, by_aux, &mut scratch);
                    }
                    if with_wide {
                        error_of_none(x, &p.b_dec.w, &mut scratch);
                        let square = part.wide.decode(r, i, dec, by_wide, &mut scratch);
                        sums.loss += topk::WEIGHT * square;
                        axpy(1.0, &scratch, &mut sums.g);
                    }
                    for l in (1..levels.len()).rev() {
                        let (below, above) = e.split_at_mut(l * d);
                        axpy(1.0, &above[..d], &mut below[(l - 1) * d..]);
                    }
                    let pre = codes.pre.get(row.clone()).unwrap_or(val);
                    let gate = match rule {
                        Rule::Gated(_) => {
                            error_of_none(x, &p.b_dec.w, &mut scratch);
                            E::weighted_sum(pre, idx, dec, d, &mut scratch);
                            sums.loss += f64::from(dot(&scratch, &scratch));
                            Some(&scratch)
                        }
                        _ => None,
                    };
                    sums.loss += rule.of_row(val, pre);
                    let place = row.start - first..row.end - first;
                    let grad = &mut part.grad[place.clone()];
                    let mut own = part.own.get_mut(place);
                    let mut level = 0;
                    for (at, (&j, grad)) in idx.iter().zip(grad).enumerate() {
                        while j >= levels[level] {
                            level += 1;
                        }
                        let df = by * E::dot(&e[level * d..(level + 1) * d], row_of(j));
                        let d_gate = gate.map_or(0.0, |e| by * E::dot(e, row_of(j)));
                        let (dp, d_own) = rule.gradient(j as usize, val[at], pre[at], df, d_gate);
                        *grad = dp;
                        if let Some(own) = &mut own {
                            own[at] = d_own;
                        }
                    }
                    e.iter_mut().for_each(|e| *e *= by);
                    axpy(1.0, &e[..d], &mut sums.g);
                    for (e, g) in e.chunks_exact(d).zip(g.chunks_exact_mut(stride)) {
                        E::store(e, &mut g[..d]);
                    }
                }
                sums
            })
            .collect();
        drop(rows);
        self.codes.own = own;
        [self.codes.grad, self.aux.codes.grad, self.wide.codes.grad] = grads;
        let mut all = Errors {
            g: vec![0.0f32; d],
            ..Errors::default()
        };
        for sums in &sums {
            all.error += sums.error;
            all.loss += sums.loss;
            all.aux += sums.aux;
            axpy(1.0, &sums.g, &mut all.g);
        }
        all
    }

    /// Gradients of latent `j`: `dW_enc[j]`, `dW_dec[j]` without its part along the row, and numbers.
    /// `None` if it has none.
    fn gradients(
        &self,
        j: usize,
        w_dec: &[f32],
        entries: &mut Entries,
        g_enc: &mut [f32],
        g_dec: &mut [f32],
        rule: &Rule,
    ) -> Option<OfLatent> {
        let stride = E::stride(g_enc.len());
        g_enc.fill(0.0);
        g_dec.fill(0.0);
        let mut all: Option<OfLatent> = None;
        let level = self.levels.partition_point(|end| *end as usize <= j);
        let of_codes = (&self.codes, &self.g, self.levels.len(), level, rule);
        let select = Rule::Select;
        let (aux, wide) = (&self.aux, &self.wide);
        let of_aux = (&aux.codes, &aux.g, 1, 0, &select);
        let of_wide = (&wide.codes, &wide.g, 1, 0, &select);
        for (codes, g, levels, level, rule) in [of_codes, of_aux, of_wide] {
            let rows = entries.read(codes, j, levels, level);
            if rows.is_empty() {
                continue;
            }
            E::weighted_sum(&entries.vals, &entries.seen, g, stride, g_dec);
            E::weighted_sum(&entries.grads, rows, &self.x, stride, g_enc);
            let product = entries.grads.iter().sum::<f32>();
            let biases = rule.of_latent(j, &entries.vals, product, &entries.own);
            let all = all.get_or_insert(OfLatent {
                product: 0.0,
                biases: [0.0; 3],
            });
            all.product += product;
            all.biases.iter_mut().zip(biases).for_each(|(a, b)| *a += b);
        }
        if all.is_some() {
            axpy(-dot(g_dec, w_dec), w_dec, g_dec);
        }
        all
    }

    /// What gradients are multiplied by so that the norm of all together is at most `most`.
    fn clip(&self, p: &Params, d: usize, most: f64, g_sum: &[f32], rule: &Rule) -> f32 {
        let m = p.b_enc.w.len();
        let squares: Vec<(f64, Vec<f32>)> = (0..m.div_ceil(LATENTS))
            .into_par_iter()
            .map(|part| {
                let mut entries = Entries::default();
                let (mut g_enc, mut g_dec) = (vec![0.0; d], vec![0.0; d]);
                let (mut square, mut shift) = (0.0, vec![0.0f32; d]);
                for j in part * LATENTS..((part + 1) * LATENTS).min(m) {
                    let row = j * d..(j + 1) * d;
                    let w_dec = &p.w_dec.w[row.clone()];
                    let found =
                        self.gradients(j, w_dec, &mut entries, &mut g_enc, &mut g_dec, rule);
                    if let Some(of) = found {
                        axpy(-of.product, &p.w_enc.w[row], &mut shift);
                        for g in [&g_enc[..], &g_dec, &of.biases] {
                            square += f64::from(dot(g, g));
                        }
                    }
                }
                (square, shift)
            })
            .collect();
        let mut db_dec = g_sum.to_vec();
        for (_, shift) in &squares {
            db_dec.iter_mut().zip(shift).for_each(|(g, s)| *g += s);
        }
        let square: f64 = squares.iter().map(|s| s.0).sum();
        let norm = (square + f64::from(dot(&db_dec, &db_dec))).sqrt();
        (most / norm.max(most)) as f32
    }

    /// Gradients and Adam, latent by latent. Completes `db_dec` and returns the gradients to `b_enc` and
    /// what the architecture adds.
    fn update(
        &mut self,
        p: &mut Params,
        adam: Adam,
        d: usize,
        scale: f32,
        db_dec: &mut [f32],
        rule: &Rule,
    ) -> Vec<[f32; 3]> {
        let m = p.b_enc.w.len();
        let mut db = vec![[0.0f32; 3]; m];
        let half = !self.copies.dec.is_empty();
        let mut copies = std::mem::replace(&mut self.copies, Copies::none());
        let mut awake = std::mem::take(&mut self.awake);
        let mut tiles = copies.enc.chunks_mut(LATENTS);
        let mut latents: Vec<LatentPart<'_>> = (0..m)
            .step_by(LATENTS)
            .zip(p.w_enc.parts(LATENTS * d))
            .zip(p.w_dec.parts(LATENTS * d))
            .zip(parts(&mut copies.dec, LATENTS * d))
            .zip(parts(&mut awake, LATENTS))
            .zip(parts(&mut db, LATENTS))
            .map(
                |(((((first, enc), dec), half_dec), awake), db)| LatentPart {
                    first,
                    enc,
                    dec,
                    tiles: tiles.next(),
                    half_dec,
                    awake,
                    db,
                },
            )
            .collect();
        let shifts: Vec<Vec<f32>> = latents
            .par_iter_mut()
            .map_init(
                || (Entries::default(), vec![0.0f32; d], vec![0.0f32; d]),
                |(entries, g_enc, g_dec), part| {
                    let mut shift = vec![0.0f32; d];
                    for i in 0..part.awake.len() {
                        let row = i * d..(i + 1) * d;
                        let j = part.first + i;
                        let w_dec = &part.dec.w[row.clone()];
                        let found = self.gradients(j, w_dec, entries, g_enc, g_dec, rule);
                        if let Some(of) = found {
                            part.db[i] = of.biases.map(|b| b * scale);
                            axpy(-of.product * scale, &part.enc.w[row.clone()], &mut shift);
                            part.awake[i] = true;
                        }
                        if !part.awake[i] {
                            continue;
                        }
                        if scale != 1.0 {
                            g_enc
                                .iter_mut()
                                .chain(g_dec.iter_mut())
                                .for_each(|g| *g *= scale);
                        }
                        part.enc.step(adam, row.clone(), g_enc);
                        part.dec.step(adam, row.clone(), g_dec);
                        normalise(&mut part.dec.w[row.clone()]);
                        if half {
                            bf16::store(&part.dec.w[row.clone()], &mut part.half_dec[row.clone()]);
                        }
                        if let Some(tiles) = &mut part.tiles {
                            tiles.set(i, &part.enc.w[row]);
                        }
                    }
                    shift
                },
            )
            .collect();
        drop(latents);
        drop(tiles);
        (self.copies, self.awake) = (copies, awake);
        db_dec.iter_mut().for_each(|g| *g *= scale);
        for shift in &shifts {
            db_dec.iter_mut().zip(shift).for_each(|(g, s)| *g += s);
        }
        db
    }
}

/// `b_dec - x`: the error where nothing is active.
fn error_of_none(x: &[f32], b_dec: &[f32], e: &mut [f32]) {
    for ((e, b), x) in e.iter_mut().zip(b_dec).zip(x) {
        *e = b - x;
    }
}

/// `sum |x - mean|^2` over the batch.
pub(super) fn variance(x: &[f32], d: usize) -> f64 {
    let n = (x.len() / d).max(1) as f64;
    let partial: Vec<(Vec<f64>, f64)> = x
        .par_chunks(ROWS * d)
        .map(|rows| {
            let (mut sum, mut square) = (vec![0.0f64; d], 0.0);
            for row in rows.chunks_exact(d) {
                for (s, v) in sum.iter_mut().zip(row) {
                    *s += f64::from(*v);
                }
                square += f64::from(dot(row, row));
            }
            (sum, square)
        })
        .collect();
    let mut sum = vec![0.0f64; d];
    for (part, _) in &partial {
        sum.iter_mut().zip(part).for_each(|(s, p)| *s += p);
    }
    let square: f64 = partial.iter().map(|p| p.1).sum();
    (square - sum.iter().map(|s| s * s).sum::<f64>() / n).max(f64::MIN_POSITIVE)
}
