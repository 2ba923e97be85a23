//! One training step: codes, errors, gradients, Adam. The equations are in [`super`].
//!
//! | phase | work | reads |
//! | --- | --- | --- |
//! | pack | `x - b_dec` as rows of `E` | the batch |
//! | encode | product and top-k in one pass | all of `W_enc` in `E` |
//! | order | entries by latent, a counting sort | codes |
//! | decode | errors, gradients to the codes, row by row | `k` rows of `W_dec` in `E` for each row |
//! | update | gradients of a latent in two buffers, Adam, norm, copies | rows of `x` and `g` in `E`, moments |
//!
//! `E` is bf16 or f32; sums and what Adam moves are f32 always.

use std::time::{Duration, Instant};

use demur_kernels::adam::Adam;
use demur_kernels::element::Element;
use demur_kernels::encoder::{self, Bf16Tiles, TileRows};
use demur_kernels::ops::{axpy, dot};
use half::bf16;
use rayon::prelude::*;

use super::{Param, Params, StepStats, Trainer, normalise};

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
    /// Of `encode`, the product of all latents: time of all threads, over their number.
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
    x: Vec<E>,     // [batch, stride], centred
    g: Vec<E>,     // [batch, stride]
    g_aux: Vec<E>, // [batch, stride]
    codes: Codes,
    aux: Codes,
}

/// Codes of a batch, their gradients, and the entries by latent.
#[derive(Debug, Default)]
struct Codes {
    k: usize,
    idx: Vec<u32>,  // [batch, k]
    val: Vec<f32>,  // [batch, k]
    grad: Vec<f32>, // [batch, k]
    /// Places in the three above, latent by latent.
    at: Vec<u32>,
    /// Where a latent's places start; one more than latents.
    starts: Vec<u32>,
}

impl Codes {
    fn resize(&mut self, n: usize, k: usize) {
        self.k = k;
        self.idx.resize(n * k, 0);
        self.val.resize(n * k, 0.0);
        self.grad.resize(n * k, 0.0);
    }

    /// Sorts the active entries by latent, each latent's by row.
    fn order(&mut self, d_sae: usize) {
        self.starts.clear();
        self.starts.resize(d_sae + 1, 0);
        for (&j, _) in self.idx.iter().zip(&self.val).filter(|e| *e.1 > 0.0) {
            self.starts[j as usize + 1] += 1;
        }
        for j in 0..d_sae {
            self.starts[j + 1] += self.starts[j];
        }
        self.at.resize(self.starts[d_sae] as usize, 0);
        let mut next = self.starts.clone();
        let entries = self.idx.iter().zip(&self.val).enumerate();
        for (i, (&j, _)) in entries.filter(|(_, e)| *e.1 > 0.0) {
            self.at[next[j as usize] as usize] = i as u32;
            next[j as usize] += 1;
        }
    }

    fn of(&self, latent: usize) -> &[u32] {
        match self.starts.get(latent..latent + 2) {
            Some(s) => &self.at[s[0] as usize..s[1] as usize],
            None => &[],
        }
    }
}

/// One latent's entries, side by side.
#[derive(Default)]
struct Entries {
    rows: Vec<u32>,
    vals: Vec<f32>,
    grads: Vec<f32>,
}

impl Entries {
    fn read(&mut self, codes: &Codes, latent: usize) {
        let at = codes.of(latent);
        self.rows.clear();
        self.vals.clear();
        self.grads.clear();
        self.rows
            .extend(at.iter().map(|&i| i / codes.k.max(1) as u32));
        self.vals.extend(at.iter().map(|&i| codes.val[i as usize]));
        self.grads
            .extend(at.iter().map(|&i| codes.grad[i as usize]));
    }
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
    db_enc: &'a mut [f32],
}

/// What a task of the decoder owns.
struct RowPart<'a, E> {
    first: usize,
    g: &'a mut [E],
    g_aux: &'a mut [E],
    grad: &'a mut [f32],
    aux_grad: &'a mut [f32],
}

impl<E: Element> Workspace<E> {
    /// For a state; `half` says whether copies in bf16 are kept.
    pub(super) fn new(params: &Params, d: usize, half: bool) -> Self {
        let (enc, dec) = (&params.w_enc, &params.w_dec);
        let copies = if half {
            let mut rows = vec![bf16::ZERO; dec.w.len()];
            bf16::store(&dec.w, &mut rows);
            Copies {
                enc: Bf16Tiles::new(&enc.w, d),
                dec: rows,
            }
        } else {
            Copies::none()
        };
        let zero = |p: &Param, j: usize| p.v[j * d..(j + 1) * d].iter().all(|v| *v == 0.0);
        Self {
            copies,
            awake: (0..params.b_enc.w.len())
                .map(|j| !(zero(enc, j) && zero(dec, j)))
                .collect(),
            x: Vec::new(),
            g: Vec::new(),
            g_aux: Vec::new(),
            codes: Codes::default(),
            aux: Codes::default(),
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
        let (d, m, k) = (t.cfg.sae.d_model, t.cfg.sae.d_sae, t.cfg.sae.k);
        let n = x.len() / d;
        let lr = t.lr();
        let mut timing = Timing::default();

        self.pack(x, &t.params.b_dec.w);
        timing.pack = lap();

        let dead = t.dead();
        let k_aux = match t.cfg.auxk_alpha > 0.0 {
            true => (d / 2).min(dead.len()),
            false => 0,
        };
        self.codes.resize(n, k);
        self.aux.resize(n, k_aux);
        let p = &t.params;
        let encoder = E::encoder(&p.w_enc.w, &self.copies.enc);
        let (idx, val) = (&mut self.codes.idx, &mut self.codes.val);
        let time = E::encode_topk(encoder, &p.b_enc.w, &self.x, d, k, idx, val);
        if k_aux > 0 {
            let some = E::gather(encoder, d, &dead);
            let bias: Vec<f32> = dead.iter().map(|&j| p.b_enc.w[j as usize]).collect();
            let (idx, val) = (&mut self.aux.idx, &mut self.aux.val);
            E::encode_topk(&some, &bias, &self.x, d, k_aux, idx, val);
            idx.iter_mut().for_each(|i| *i = dead[*i as usize]);
        }
        let threads = demur_kernels::threads() as u32;
        (timing.product, timing.select) = (time.product / threads, time.select / threads);
        timing.encode = lap();

        self.codes.order(m);
        self.aux.order(if k_aux > 0 { m } else { 0 });
        for (j, idle) in t.idle.iter_mut().enumerate() {
            let fired = !self.codes.of(j).is_empty();
            *idle = if fired { 0 } else { *idle + n as u64 };
        }
        timing.order = lap();

        let variance = variance(x, d);
        let weight = t.cfg.auxk_alpha * (dead.len() as f64 / (d / 2).max(1) as f64).min(1.0);
        let (error, aux_error, mut db_dec) = self.decode(&t.params, x, variance, weight);
        timing.decode = lap();

        t.step += 1;
        let adam = Adam::new(lr, t.step);
        let scale = match t.cfg.clip {
            Some(most) => self.clip(&t.params, d, most, &db_dec),
            None => 1.0,
        };
        let db_enc = self.update(&mut t.params, adam, d, scale, &mut db_dec);
        for (p, g) in [
            (&mut t.params.b_enc, &db_enc),
            (&mut t.params.b_dec, &db_dec),
        ] {
            adam.update(&mut p.w, &mut p.m, &mut p.v, g);
        }
        timing.update = lap();
        t.timing = timing;

        let fvu = error / variance;
        StepStats {
            step: t.step,
            loss: fvu + weight * aux_error / variance,
            fvu,
            dead: dead.len() as f64 / m as f64,
            lr,
        }
    }

    /// `x - b_dec`, padded.
    fn pack(&mut self, x: &[f32], b_dec: &[f32]) {
        let d = b_dec.len();
        let (n, stride) = (x.len() / d, E::stride(d));
        self.x
            .resize(n.next_multiple_of(encoder::ROWS) * stride, E::default());
        self.x[n * stride..].fill(E::default());
        self.g.resize(n * stride, E::default());
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

    /// Errors, and their gradients to rows and codes. Returns the sums of squares of both errors and
    /// the sum of `g` over rows.
    fn decode(
        &mut self,
        p: &Params,
        x: &[f32],
        variance: f64,
        weight: f64,
    ) -> (f64, f64, Vec<f32>) {
        let d = p.b_dec.w.len();
        let (n, stride) = (x.len() / d, E::stride(d));
        let (k, k_aux) = (self.codes.k, self.aux.k);
        if k_aux > 0 {
            self.g_aux.resize(n * stride, E::default());
        }
        let dec = E::pick(&p.w_dec.w, &self.copies.dec);
        let row_of = |j: u32| &dec[j as usize * d..(j as usize + 1) * d];
        let (by, by_aux) = ((2.0 / variance) as f32, (2.0 * weight / variance) as f32);
        let aux_stride = if k_aux > 0 { stride } else { 0 };
        let mut rows: Vec<RowPart<'_, E>> = (0..n)
            .step_by(ROWS)
            .zip(parts(&mut self.g, ROWS * stride))
            .zip(parts(&mut self.g_aux, ROWS * aux_stride))
            .zip(parts(&mut self.codes.grad, ROWS * k))
            .zip(parts(&mut self.aux.grad, ROWS * k_aux))
            .map(|((((first, g), g_aux), grad), aux_grad)| RowPart {
                first,
                g,
                g_aux,
                grad,
                aux_grad,
            })
            .collect();
        let (codes, aux) = (
            (&self.codes.idx, &self.codes.val),
            (&self.aux.idx, &self.aux.val),
        );
        // Gradients of a row's codes, from its error.
        let to_codes = |e: &[f32], by: f32, idx: &[u32], val: &[f32], grad: &mut [f32]| {
            for ((g, &j), &v) in grad.iter_mut().zip(idx).zip(val) {
                *g = if v > 0.0 {
                    by * E::dot(e, row_of(j))
                } else {
                    0.0
                };
            }
        };
        let sums: Vec<(f64, f64, Vec<f32>)> = rows
            .par_iter_mut()
            .map(|part| {
                let (mut error, mut aux_error, mut sum) = (0.0, 0.0, vec![0.0f32; d]);
                let (mut e, mut e_aux) = (vec![0.0f32; d], vec![0.0f32; d]);
                for (i, g) in part.g.chunks_exact_mut(stride).enumerate() {
                    let r = part.first + i;
                    for ((e, b), x) in e.iter_mut().zip(&p.b_dec.w).zip(&x[r * d..]) {
                        *e = b - x;
                    }
                    let (idx, val) = (&codes.0[r * k..(r + 1) * k], &codes.1[r * k..(r + 1) * k]);
                    E::weighted_sum(val, idx, dec, d, &mut e);
                    error += f64::from(dot(&e, &e));
                    to_codes(&e, by, idx, val, &mut part.grad[i * k..(i + 1) * k]);
                    if k_aux > 0 {
                        let of_row = r * k_aux..(r + 1) * k_aux;
                        let (idx, val) = (&aux.0[of_row.clone()], &aux.1[of_row]);
                        e_aux.copy_from_slice(&e); // - (x - x_hat)
                        E::weighted_sum(val, idx, dec, d, &mut e_aux);
                        aux_error += f64::from(dot(&e_aux, &e_aux));
                        let grad = &mut part.aux_grad[i * k_aux..(i + 1) * k_aux];
                        to_codes(&e_aux, by_aux, idx, val, grad);
                        e_aux.iter_mut().for_each(|v| *v *= by_aux);
                        E::store(&e_aux, &mut part.g_aux[i * stride..i * stride + d]);
                    }
                    for (e, sum) in e.iter_mut().zip(&mut sum) {
                        *e *= by;
                        *sum += *e;
                    }
                    E::store(&e, &mut g[..d]);
                }
                (error, aux_error, sum)
            })
            .collect();
        let mut total = vec![0.0f32; d];
        for (_, _, sum) in &sums {
            total.iter_mut().zip(sum).for_each(|(t, s)| *t += s);
        }
        let error = sums.iter().map(|s| s.0).sum();
        (error, sums.iter().map(|s| s.1).sum(), total)
    }

    /// Gradients of latent `j`: `dW_enc[j]`, `dW_dec[j]` without its part along the row, `db_enc[j]`.
    /// False if it has none.
    fn gradients(
        &self,
        j: usize,
        w_dec: &[f32],
        entries: &mut Entries,
        g_enc: &mut [f32],
        g_dec: &mut [f32],
        db_enc: &mut f32,
    ) -> bool {
        let stride = E::stride(g_enc.len());
        g_enc.fill(0.0);
        g_dec.fill(0.0);
        *db_enc = 0.0;
        let mut any = false;
        for (codes, g) in [(&self.codes, &self.g), (&self.aux, &self.g_aux)] {
            entries.read(codes, j);
            if entries.rows.is_empty() {
                continue;
            }
            any = true;
            E::weighted_sum(&entries.vals, &entries.rows, g, stride, g_dec);
            E::weighted_sum(&entries.grads, &entries.rows, &self.x, stride, g_enc);
            *db_enc += entries.grads.iter().sum::<f32>();
        }
        if any {
            axpy(-dot(g_dec, w_dec), w_dec, g_dec);
        }
        any
    }

    /// What gradients are multiplied by so that the norm of all together is at most `most`.
    fn clip(&self, p: &Params, d: usize, most: f64, g_sum: &[f32]) -> f32 {
        let m = p.b_enc.w.len();
        let squares: Vec<(f64, Vec<f32>)> = (0..m.div_ceil(LATENTS))
            .into_par_iter()
            .map(|part| {
                let mut entries = Entries::default();
                let (mut g_enc, mut g_dec, mut db) = (vec![0.0; d], vec![0.0; d], 0.0);
                let (mut square, mut shift) = (0.0, vec![0.0f32; d]);
                for j in part * LATENTS..((part + 1) * LATENTS).min(m) {
                    let row = j * d..(j + 1) * d;
                    let w_dec = &p.w_dec.w[row.clone()];
                    if self.gradients(j, w_dec, &mut entries, &mut g_enc, &mut g_dec, &mut db) {
                        axpy(-db, &p.w_enc.w[row], &mut shift);
                        for g in [&g_enc[..], &g_dec, &[db]] {
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

    /// Gradients and Adam, latent by latent. Completes `db_dec` and returns `db_enc`.
    fn update(
        &mut self,
        p: &mut Params,
        adam: Adam,
        d: usize,
        scale: f32,
        db_dec: &mut [f32],
    ) -> Vec<f32> {
        let m = p.b_enc.w.len();
        let mut db_enc = vec![0.0f32; m];
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
            .zip(parts(&mut db_enc, LATENTS))
            .map(
                |(((((first, enc), dec), half_dec), awake), db_enc)| LatentPart {
                    first,
                    enc,
                    dec,
                    tiles: tiles.next(),
                    half_dec,
                    awake,
                    db_enc,
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
                        let (j, db) = (part.first + i, &mut part.db_enc[i]);
                        let w_dec = &part.dec.w[row.clone()];
                        let any = self.gradients(j, w_dec, entries, g_enc, g_dec, db);
                        if any {
                            *db *= scale;
                            axpy(-*db, &part.enc.w[row.clone()], &mut shift);
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
        db_enc
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
