//! One sparse autoencoder of any architecture: weights, codes, reconstructions.
//!
//! The encoder is one dense product of `d_model * d_sae` a row; everything after it touches the
//! active latents only. The weights are kept as `[d_sae, d_model]` twice: a latent's encoder and
//! decoder rows are contiguous. Large batches are encoded in tiles, so that the pre-activations of a
//! whole batch are never held.

use std::cmp::Ordering;

use demur_kernels::gemm::{Matrix, matmul_with};
use demur_kernels::ops::{axpy, dot};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::arch::topk::select;
use crate::arch::{Activation, InputNorm, Wiring};
use crate::error::SaeError;

/// Rows of a tile of pre-activations.
const TILE: usize = 64;

/// What an SAE is, beside its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SaeConfig {
    /// Width of the activations.
    pub d_model: usize,
    /// Number of latents.
    pub d_sae: usize,
    /// Latents active at once: of TopK exactly, of BatchTopK on average; `d_sae` where the
    /// architecture has no such number.
    pub k: usize,
    /// The site that it was trained on, for instance `blocks.12.hook_resid_post`.
    pub hook_name: String,
    /// The model that it was trained on.
    pub model_name: String,
}

/// A sparse autoencoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Sae {
    cfg: SaeConfig,
    activation: Activation,
    wiring: Wiring,
    centre: Vec<f32>,  // [d_model]: b_dec, or zeros
    w_enc_t: Vec<f32>, // [d_sae, d_model]: the transpose of W_enc
    b_enc: Vec<f32>,   // [d_sae]
    w_dec: Vec<f32>,   // [d_sae, d_out]
    b_dec: Vec<f32>,   // [d_out]
}

/// Latent activations of some rows: `k` indices and values a row.
///
/// Rows of TopK have `k` entries. Elsewhere `k` is that of the fullest row, and others are filled up
/// with latent 0 at a value of 0, behind their real entries. What is not above 0 is not active.
#[derive(Debug, Clone, PartialEq)]
pub struct Codes {
    /// Number of rows.
    pub n: usize,
    /// Entries a row.
    pub k: usize,
    /// Latents, `[n, k]`, largest activation first.
    pub idx: Vec<u32>,
    /// Their activations, `[n, k]`; zero where the pre-activation was not positive.
    pub val: Vec<f32>,
}

impl Sae {
    /// Puts a TopK SAE together.
    ///
    /// # Shapes
    /// `w_enc_t` and `w_dec` are `[d_sae, d_model]`, `b_enc` `[d_sae]`, `b_dec` `[d_model]`.
    ///
    /// # Errors
    /// [`SaeError::Config`] if a length is wrong, a number is not finite, or `k` exceeds `d_sae`.
    pub fn new(
        cfg: SaeConfig,
        w_enc_t: Vec<f32>,
        b_enc: Vec<f32>,
        w_dec: Vec<f32>,
        b_dec: Vec<f32>,
    ) -> Result<Self, SaeError> {
        let activation = Activation::TopK { k: cfg.k };
        let wiring = Wiring::default();
        Self::of(cfg, activation, wiring, w_enc_t, b_enc, w_dec, b_dec)
    }

    /// Puts an SAE of any architecture together.
    ///
    /// # Shapes
    /// `w_enc_t` is `[d_sae, d_model]`, `b_enc` `[d_sae]`, `w_dec` `[d_sae, d_out]`, `b_dec`
    /// `[d_out]`; `d_out` is `d_model` but for transcoders.
    ///
    /// # Errors
    /// [`SaeError::Config`] if a length is wrong, a number is not finite, or `k` exceeds `d_sae`.
    pub fn of(
        cfg: SaeConfig,
        activation: Activation,
        wiring: Wiring,
        w_enc_t: Vec<f32>,
        b_enc: Vec<f32>,
        w_dec: Vec<f32>,
        b_dec: Vec<f32>,
    ) -> Result<Self, SaeError> {
        let bad = |field, value: String, rule: String| Err(SaeError::Config { field, value, rule });
        if cfg.k == 0 || cfg.k > cfg.d_sae || cfg.d_model == 0 {
            let rule = format!("must be between 1 and d_sae = {}", cfg.d_sae);
            return bad("k", cfg.k.to_string(), rule);
        }
        let size = cfg.d_sae.saturating_mul(cfg.d_model);
        let d_out = if wiring.transcoder {
            b_dec.len()
        } else {
            cfg.d_model
        };
        let none = Vec::new();
        let skip = wiring.w_skip.as_ref();
        for (field, v, expected) in [
            ("W_enc", &w_enc_t, size),
            ("W_dec", &w_dec, cfg.d_sae.saturating_mul(d_out)),
            ("b_enc", &b_enc, cfg.d_sae),
            ("b_dec", &b_dec, d_out.max(1)),
            (
                "W_skip",
                skip.unwrap_or(&none),
                skip.map_or(0, |_| d_out.saturating_mul(cfg.d_model)),
            ),
        ] {
            if v.len() != expected {
                return bad(
                    field,
                    format!("{} values", v.len()),
                    format!("must have {expected}"),
                );
            }
            if v.iter().any(|x| !x.is_finite()) {
                return bad(field, "not finite".to_owned(), "must be finite".to_owned());
            }
        }
        activation.check(cfg.d_sae)?;
        if let Activation::TopK { k } = activation
            && k != cfg.k
        {
            return bad("k", k.to_string(), format!("must be {}", cfg.k));
        }
        if wiring.transcoder && (wiring.centre || wiring.input_norm != InputNorm::None) {
            let rule = "a transcoder neither centres nor normalises its input".to_owned();
            return bad("apply_b_dec_to_input", wiring.centre.to_string(), rule);
        }
        let centre = if wiring.centre {
            b_dec.clone()
        } else {
            vec![0.0; cfg.d_model]
        };
        Ok(Self {
            cfg,
            activation,
            wiring,
            centre,
            w_enc_t,
            b_enc,
            w_dec,
            b_dec,
        })
    }

    /// What it is.
    pub fn cfg(&self) -> &SaeConfig {
        &self.cfg
    }

    /// Its architecture.
    pub fn activation(&self) -> &Activation {
        &self.activation
    }

    /// What it reads and writes.
    pub fn wiring(&self) -> &Wiring {
        &self.wiring
    }

    /// Its architecture's name, as SAELens has it.
    pub fn architecture(&self) -> String {
        let name = self.activation.name();
        let skip = match self.wiring.w_skip {
            Some(_) => "skip_",
            None => "",
        };
        match (&self.activation, self.wiring.transcoder) {
            (_, false) => format!("{skip}{name}"),
            (Activation::Relu, true) => format!("{skip}transcoder"),
            (_, true) => format!("{name}_{skip}transcoder"),
        }
    }

    /// Width of what it reconstructs or, as a transcoder, predicts.
    pub fn d_out(&self) -> usize {
        self.b_dec.len()
    }

    /// Width of the activations.
    pub fn d_model(&self) -> usize {
        self.cfg.d_model
    }

    /// Number of latents.
    pub fn d_sae(&self) -> usize {
        self.cfg.d_sae
    }

    /// `W_encᵀ`, `b_enc`, `W_dec` and `b_dec`, in the shapes of [`Self::new`].
    pub fn weights(&self) -> (&[f32], &[f32], &[f32], &[f32]) {
        (&self.w_enc_t, &self.b_enc, &self.w_dec, &self.b_dec)
    }

    /// Decoder row of latent `j`, `[d_out]`.
    pub fn decoder_row(&self, j: usize) -> &[f32] {
        let d = self.d_out();
        &self.w_dec[j * d..(j + 1) * d]
    }

    /// How much one unit of a latent's activation moves the reconstruction of `x` along its decoder
    /// row: 1, but for SAEs that normalise their input, where it is in units of the row's scale.
    ///
    /// # Shapes
    /// `x` is `[d_model]`.
    pub fn unit(&self, x: &[f32]) -> f32 {
        self.wiring.input_norm.undo(x).scale
    }

    /// Activation of latent `j` on one row; for TopK the rectified pre-activation, whether in the top
    /// `k` or not.
    ///
    /// # Shapes
    /// `x` is `[d_model]`.
    pub fn latent(&self, x: &[f32], j: usize) -> f32 {
        let row = &self.w_enc_t[j * self.cfg.d_model..(j + 1) * self.cfg.d_model];
        let normed;
        let x = match self.wiring.input_norm {
            InputNorm::None => x,
            norm => {
                let mut x = x.to_vec();
                norm.apply(&mut x);
                normed = x;
                &normed
            }
        };
        let p = dot(x, row) - dot(&self.centre, row) + self.b_enc[j];
        self.activation.of(j, p)
    }

    /// Activation of latent `j` on one row as [`Self::encode`] of that row alone gives it, to the bit, and
    /// without the whole encode where less tells: a latent that is not positive is not active, and of
    /// TopK one that `k` others come before is not either.
    ///
    /// # Shapes
    /// `x` is `[d_model]`.
    pub fn active(&self, x: &[f32], j: usize) -> f32 {
        let d = self.cfg.d_model;
        let mut x = x.to_vec();
        self.wiring.input_norm.apply(&mut x);
        let x = centred(self, &x);
        let pre = |i: usize| dot(&x, &self.w_enc_t[i * d..(i + 1) * d]) + self.b_enc[i];
        let p = pre(j);
        let Activation::TopK { k } = self.activation else {
            let f = self.activation.of(j, p);
            return if f > 0.0 { f } else { 0.0 };
        };
        if p <= 0.0 {
            return 0.0;
        }
        let before = |i: &usize| match pre(*i).total_cmp(&p) {
            Ordering::Greater => true,
            Ordering::Equal => *i < j,
            Ordering::Less => false,
        };
        let others = (0..self.cfg.d_sae).filter(|i| *i != j);
        if others.filter(before).take(k).count() == k {
            return 0.0;
        }
        p
    }

    /// Latent activations of `n` rows.
    ///
    /// # Shapes
    /// `x` is `[n, d_model]`.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn encode(&self, x: &[f32], n: usize) -> Codes {
        let d = self.cfg.d_model;
        assert_eq!(x.len(), n * d, "x is [n, d_model]");
        let normed;
        let x = match self.wiring.input_norm {
            InputNorm::None => x,
            norm => {
                let mut x = x.to_vec();
                x.par_chunks_exact_mut(d).for_each(|row| norm.apply(row));
                normed = x;
                &normed
            }
        };
        match self.activation {
            Activation::TopK { k } => self.encode_topk(x, n, k),
            _ => self.encode_each(x, n),
        }
    }

    fn encode_topk(&self, x: &[f32], n: usize, k: usize) -> Codes {
        let mut codes = Codes {
            n,
            k,
            idx: vec![0; n * k],
            val: vec![0.0; n * k],
        };
        if n == 1 {
            let pre = pre_acts_of_row(self, x);
            select(&pre, &mut Vec::new(), &mut codes.idx, &mut codes.val);
            return codes;
        }
        encode_tiles(
            &self.w_enc_t,
            &self.b_enc,
            &self.centre,
            x,
            k,
            &mut codes.idx,
            &mut codes.val,
        );
        codes
    }

    /// Codes where each latent's activation is its own affair.
    fn encode_each(&self, x: &[f32], n: usize) -> Codes {
        let (d, m) = (self.cfg.d_model, self.cfg.d_sae);
        let active = |pre: &[f32]| -> Vec<(u32, f32)> {
            let acts = (0..m as u32).zip(pre);
            acts.map(|(j, p)| (j, self.activation.of(j as usize, *p)))
                .filter(|(_, f)| *f > 0.0)
                .collect()
        };
        let mut rows: Vec<Vec<(u32, f32)>> = if n == 1 {
            vec![active(&pre_acts_of_row(self, x))]
        } else {
            x.par_chunks(TILE * d)
                .map_init(
                    || (vec![0.0f32; TILE * d], vec![0.0f32; TILE * m]),
                    |(centred, pre), x| {
                        let rows = x.len() / d;
                        pre_acts_of_tile(self, x, centred, pre);
                        pre.chunks_exact(m).take(rows).map(active).collect()
                    },
                )
                .collect::<Vec<Vec<_>>>()
                .concat()
        };
        let k = rows.iter().map(Vec::len).max().unwrap_or(0).max(1);
        let mut codes = Codes {
            n,
            k,
            idx: vec![0; n * k],
            val: vec![0.0; n * k],
        };
        rows.par_iter_mut()
            .zip(codes.idx.par_chunks_exact_mut(k))
            .zip(codes.val.par_chunks_exact_mut(k))
            .for_each(|((row, idx), val)| {
                row.sort_unstable_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                for ((i, v), (j, f)) in idx.iter_mut().zip(val).zip(row.iter()) {
                    (*i, *v) = (*j, *f);
                }
            });
        codes
    }

    /// `f W_dec + b_dec` of coded rows: the reconstruction of SAEs that neither normalise nor skip;
    /// [`Self::reconstruct`] is for all.
    ///
    /// # Shapes
    /// `out` is `[codes.n, d_out]`.
    pub fn decode(&self, codes: &Codes, out: &mut [f32]) {
        let rows = codes
            .idx
            .par_chunks_exact(codes.k)
            .zip(codes.val.par_chunks_exact(codes.k));
        out.par_chunks_exact_mut(self.d_out())
            .zip(rows)
            .for_each(|(out, (idx, val))| {
                out.copy_from_slice(&self.b_dec);
                for (&j, &v) in idx.iter().zip(val) {
                    if v > 0.0 {
                        axpy(v, self.decoder_row(j as usize), out);
                    }
                }
            });
    }

    /// Reconstructions (of a transcoder, predictions) of the rows `x` with codes `codes`.
    ///
    /// # Shapes
    /// `x` is `[codes.n, d_model]`, `out` `[codes.n, d_out]`.
    pub fn reconstruct(&self, x: &[f32], codes: &Codes, out: &mut [f32]) {
        self.decode(codes, out);
        let (norm, d) = (self.wiring.input_norm, self.cfg.d_model);
        if norm == InputNorm::None && self.wiring.w_skip.is_none() {
            return;
        }
        out.par_chunks_exact_mut(self.d_out())
            .zip(x.par_chunks_exact(d))
            .for_each(|(out, x)| {
                if norm != InputNorm::None {
                    let undo = norm.undo(x);
                    for o in out.iter_mut() {
                        *o = *o * undo.scale + undo.shift;
                    }
                }
                if let Some(w) = &self.wiring.w_skip {
                    for (o, w) in out.iter_mut().zip(w.chunks_exact(d)) {
                        *o += dot(x, w);
                    }
                }
            });
    }
}

/// One (normalised) row less the centre.
fn centred(sae: &Sae, x: &[f32]) -> Vec<f32> {
    x.iter().zip(&sae.centre).map(|(x, b)| x - b).collect()
}

/// Pre-activations of one (normalised) row: a matrix-vector product, split over the latents.
fn pre_acts_of_row(sae: &Sae, x: &[f32]) -> Vec<f32> {
    let d = sae.cfg.d_model;
    let centred = centred(sae, x);
    let mut pre = vec![0.0f32; sae.cfg.d_sae];
    pre.par_chunks_mut(256)
        .zip(sae.w_enc_t.par_chunks(256 * d))
        .zip(sae.b_enc.par_chunks(256))
        .for_each(|((pre, w), b)| {
            for ((p, w), b) in pre.iter_mut().zip(w.chunks_exact(d)).zip(b) {
                *p = dot(&centred, w) + b;
            }
        });
    pre
}

/// Pre-activations of at most [`TILE`] (normalised) rows; `centred` is scratch.
///
/// A row's product does not depend on its tile: tiles have a fixed size and the last is padded.
fn pre_acts_of_tile(sae: &Sae, x: &[f32], centred: &mut [f32], pre: &mut [f32]) {
    let (d, m) = (sae.cfg.d_model, sae.cfg.d_sae);
    centred[x.len()..].fill(0.0);
    for (c, x) in centred.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
        for ((c, x), b) in c.iter_mut().zip(x).zip(&sae.centre) {
            *c = x - b;
        }
    }
    let rows = Matrix::row_major(centred, d);
    let weights = Matrix::transposed(&sae.w_enc_t, d);
    matmul_with(TILE, m, d, rows, weights, pre, m, false, 1);
    for pre in pre.chunks_exact_mut(m) {
        for (p, b) in pre.iter_mut().zip(&sae.b_enc) {
            *p += b;
        }
    }
}

/// Encodes in tiles of rows.
///
/// A row's product does not depend on its tile: tiles have a fixed size and the last is padded.
fn encode_tiles(
    w_enc_t: &[f32],
    b_enc: &[f32],
    b_dec: &[f32],
    x: &[f32],
    k: usize,
    idx: &mut [u32],
    val: &mut [f32],
) {
    let (d, m) = (b_dec.len(), b_enc.len());
    x.par_chunks(TILE * d)
        .zip(idx.par_chunks_mut(TILE * k))
        .zip(val.par_chunks_mut(TILE * k))
        .for_each_init(
            || (vec![0.0f32; TILE * d], vec![0.0f32; TILE * m], Vec::new()),
            |(centred, pre, top), ((x, idx), val)| {
                let rows = x.len() / d;
                centred[rows * d..].fill(0.0);
                for (c, x) in centred.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
                    for ((c, x), b) in c.iter_mut().zip(x).zip(b_dec) {
                        *c = x - b;
                    }
                }
                matmul_with(
                    TILE,
                    m,
                    d,
                    Matrix::row_major(centred, d),
                    Matrix::transposed(w_enc_t, d),
                    pre,
                    m,
                    false,
                    1,
                );
                let rows_of_pre = pre.chunks_exact_mut(m).take(rows);
                for ((pre, idx), val) in rows_of_pre
                    .zip(idx.chunks_exact_mut(k))
                    .zip(val.chunks_exact_mut(k))
                {
                    for (p, b) in pre.iter_mut().zip(b_enc) {
                        *p += b;
                    }
                    select(pre, top, idx, val);
                }
            },
        );
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Four latents over two dimensions: +x, +y, -x, -y, shifted by b_dec = (1, 0).
    pub(crate) fn cross(k: usize) -> Sae {
        let w = vec![1.0, 0.0, 0.0, 1.0, -1.0, 0.0, 0.0, -1.0];
        let cfg = SaeConfig {
            d_model: 2,
            d_sae: 4,
            k,
            hook_name: "blocks.0.hook_resid_post".to_owned(),
            model_name: "test".to_owned(),
        };
        Sae::new(cfg, w.clone(), vec![0.0, 0.0, 0.0, -0.5], w, vec![1.0, 0.0]).unwrap()
    }

    #[test]
    fn codes_by_hand() {
        // (3, -2) - (1, 0) = (2, -2): pre-activations 2, -2, -2, 1.5
        let sae = cross(2);
        let codes = sae.encode(&[3.0, -2.0, 1.0, 0.0], 2);
        assert_eq!(
            (&codes.idx[..2], &codes.val[..2]),
            (&[0, 3][..], &[2.0, 1.5][..])
        );
        // nothing is positive but k entries are there: relu leaves zeros
        assert_eq!(&codes.val[2..], &[0.0, 0.0]);
        let mut out = [9.0; 4];
        sae.decode(&codes, &mut out);
        assert_eq!(out, [3.0, -1.5, 1.0, 0.0]);
        assert_eq!(sae.latent(&[3.0, -2.0], 3), 1.5);
        assert_eq!(sae.latent(&[3.0, -2.0], 1), 0.0);
        // one row alone is coded as in a batch
        assert_eq!(sae.encode(&[3.0, -2.0], 1).val, [2.0, 1.5]);
        // 2, -2, -2, 1.5: of two, the first and the last; of one, the first.
        let each = |k, x: &[f32]| [0, 1, 2, 3].map(|j| cross(k).active(x, j));
        assert_eq!(each(2, &[3.0, -2.0]), [2.0, 0.0, 0.0, 1.5]);
        assert_eq!(each(1, &[3.0, -2.0]), [2.0, 0.0, 0.0, 0.0]);
        // 1, 1, -1, -1.5: of equal ones the first.
        assert_eq!(each(1, &[2.0, 1.0]), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn one_latent_is_as_in_the_whole_code() {
        let (d, m) = (24, 96);
        let mut state = 7u32;
        let mut noise = |n: usize| -> Vec<f32> {
            let next = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(next).collect()
        };
        let cfg = SaeConfig {
            d_model: d,
            d_sae: m,
            k: 9,
            ..cross(2).cfg
        };
        let (w_enc, w_dec) = (noise(m * d), noise(m * d));
        let topk = Sae::new(cfg.clone(), w_enc, noise(m), w_dec, noise(d)).unwrap();
        let (e, be, w, bd) = topk.weights();
        let all = (e.to_vec(), be.to_vec(), w.to_vec(), bd.to_vec());
        let wiring = Wiring {
            input_norm: InputNorm::LayerNorm,
            ..Wiring::default()
        };
        let relu = Sae::of(cfg, Activation::Relu, wiring, all.0, all.1, all.2, all.3).unwrap();
        let mut active = 0;
        for sae in [&topk, &relu] {
            for _ in 0..20 {
                let x = noise(d);
                let codes = sae.encode(&x, 1);
                for j in 0..m {
                    let both = codes.idx.iter().zip(&codes.val);
                    let whole = both.filter(|(i, _)| **i == j as u32).map(|(_, v)| *v);
                    let whole = whole.fold(0.0, f32::max);
                    assert_eq!(sae.active(&x, j).to_bits(), whole.to_bits());
                    active += usize::from(whole > 0.0);
                }
            }
        }
        assert!(active > 20 * 9);
    }

    /// `cross` with another activation and wiring.
    fn cross_as(activation: Activation, wiring: Wiring) -> Result<Sae, SaeError> {
        let sae = cross(2);
        let (e, be, d, bd) = sae.weights();
        let cfg = sae.cfg().clone();
        let all = (e.to_vec(), be.to_vec(), d.to_vec(), bd.to_vec());
        Sae::of(cfg, activation, wiring, all.0, all.1, all.2, all.3)
    }

    #[test]
    fn architectures_by_hand() {
        // pre-activations of (3, -2): 2, -2, -2, 1.5; of (1, 0.5): 0, 0.5, 0, -1
        let x = [3.0, -2.0, 1.0, 0.5];
        let gated = Activation::Gated {
            b_gate: vec![0.0, 0.0, 0.0, -1.5],
            scale: vec![2.0; 4],
            b_mag: vec![-1.0, 0.0, 9.0, 0.0],
        };
        for (activation, idx, val) in [
            (Activation::Relu, [0, 3, 1, 0], [2.0, 1.5, 0.5, 0.0]),
            (
                Activation::BatchTopK {
                    k: 1,
                    threshold: 0.5,
                },
                [0, 3, 0, 0],
                [2.0, 1.5, 0.0, 0.0],
            ),
            (
                Activation::JumpRelu {
                    threshold: vec![2.0, 0.0, 0.0, 1.0],
                },
                [3, 1, 0, 0],
                [1.5, 0.5, 0.0, 0.0],
            ),
            (gated, [0, 1, 0, 0], [3.0, 1.0, 0.0, 0.0]),
        ] {
            let sae = cross_as(activation, Wiring::default()).unwrap();
            let codes = sae.encode(&x, 2);
            let n = 2 * codes.k;
            if codes.k == 2 {
                assert_eq!((&codes.idx[..], &codes.val[..]), (&idx[..], &val[..]));
            } else {
                assert_eq!(
                    (codes.idx, codes.val),
                    (vec![idx[0], idx[1]], vec![val[0], val[1]])
                );
                assert_eq!(n, 2);
            }
            // one latent of one row, and one row alone, are as in a batch
            for (t, x) in x.chunks(2).enumerate() {
                let alone = sae.encode(x, 1);
                let batch = sae.encode(&[x, &[9.0, 9.0]].concat(), 2);
                for j in 0..4 {
                    let of = |c: &Codes| {
                        let row = c.idx[..c.k].iter().zip(&c.val);
                        row.filter(|e| *e.0 == j).map(|e| *e.1).fold(0.0, f32::max)
                    };
                    assert_eq!(of(&alone), sae.latent(x, j as usize), "row {t}");
                    assert_eq!(of(&alone), of(&batch), "row {t}");
                }
            }
        }
    }

    #[test]
    fn normalisation_is_undone_and_a_skip_added() {
        let wiring = Wiring {
            input_norm: InputNorm::ConstantNormRescale,
            ..Wiring::default()
        };
        let sae = cross_as(Activation::Relu, wiring).unwrap();
        let scale = 5.0 / 2f32.sqrt();
        let x = [3.0, 4.0];
        let codes = sae.encode(&x, 1);
        let mut out = [0.0; 2];
        sae.reconstruct(&x, &codes, &mut out);
        // both components are above b_dec = (1, 0) or below it: the cross reconstructs them
        assert!((out[0] - 3.0).abs() < 1e-5 && (out[1] - 4.0).abs() < 1e-5);
        assert!((sae.unit(&x) - scale).abs() < 1e-6);

        let wiring = Wiring {
            centre: false,
            transcoder: true,
            w_skip: Some(vec![0.0, 1.0, 2.0, 0.0]),
            ..Wiring::default()
        };
        let sae = cross_as(Activation::Relu, wiring).unwrap();
        assert_eq!(sae.architecture(), "skip_transcoder");
        let codes = sae.encode(&x, 1);
        sae.reconstruct(&x, &codes, &mut out);
        // (3, 4) + b_dec (1, 0) + (4, 6)
        assert_eq!(out, [8.0, 10.0]);
    }

    #[test]
    fn a_threshold_that_was_never_set_is_refused() {
        let batch = Activation::BatchTopK {
            k: 1,
            threshold: -1.0,
        };
        let e = cross_as(batch, Wiring::default()).unwrap_err().to_string();
        assert!(e.contains("never estimated"), "{e}");
        let groups = Activation::Matryoshka {
            k: 1,
            threshold: 0.0,
            group_sizes: vec![1, 2],
        };
        assert!(cross_as(groups, Wiring::default()).is_err());
    }

    #[test]
    fn wrong_shapes_are_errors() {
        let sae = cross(2);
        let (e, be, d, bd) = sae.weights();
        let short = Sae::new(
            sae.cfg().clone(),
            e[1..].to_vec(),
            be.to_vec(),
            d.to_vec(),
            bd.to_vec(),
        );
        assert!(short.unwrap_err().to_string().contains("W_enc"));
        let cfg = SaeConfig {
            k: 5,
            ..sae.cfg().clone()
        };
        assert!(Sae::new(cfg, e.to_vec(), be.to_vec(), d.to_vec(), bd.to_vec()).is_err());
    }
}
