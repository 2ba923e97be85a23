//! The TopK SAE (2406.04093): the `k` largest pre-activations of each row, rectified.
//!
//! The encoder is one dense product of `d_model * d_sae` a row; everything after it touches `k` of
//! `d_sae` rows. The weights are kept as `[d_sae, d_model]` twice: a latent's encoder and decoder
//! rows are contiguous. Large batches are encoded in tiles, so that the pre-activations of a whole
//! batch are never held.

use demur_kernels::gemm::{Matrix, matmul_with};
use demur_kernels::ops::{axpy, dot, top_k_indices};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

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
    /// Latents active at once.
    pub k: usize,
    /// The site that it was trained on, for instance `blocks.12.hook_resid_post`.
    pub hook_name: String,
    /// The model that it was trained on.
    pub model_name: String,
}

/// A TopK SAE.
#[derive(Debug, Clone, PartialEq)]
pub struct Sae {
    cfg: SaeConfig,
    w_enc_t: Vec<f32>, // [d_sae, d_model]: the transpose of W_enc
    b_enc: Vec<f32>,   // [d_sae]
    w_dec: Vec<f32>,   // [d_sae, d_model]
    b_dec: Vec<f32>,   // [d_model]
}

/// Latent activations of some rows: `k` indices and values a row.
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
    /// Puts an SAE together.
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
        let bad = |field, value: String, rule: String| Err(SaeError::Config { field, value, rule });
        if cfg.k == 0 || cfg.k > cfg.d_sae || cfg.d_model == 0 {
            let rule = format!("must be between 1 and d_sae = {}", cfg.d_sae);
            return bad("k", cfg.k.to_string(), rule);
        }
        let size = cfg.d_sae.saturating_mul(cfg.d_model);
        for (field, v, expected) in [
            ("W_enc", &w_enc_t, size),
            ("W_dec", &w_dec, size),
            ("b_enc", &b_enc, cfg.d_sae),
            ("b_dec", &b_dec, cfg.d_model),
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
        Ok(Self {
            cfg,
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

    /// Decoder row of latent `j`, `[d_model]`.
    pub fn decoder_row(&self, j: usize) -> &[f32] {
        &self.w_dec[j * self.cfg.d_model..(j + 1) * self.cfg.d_model]
    }

    /// The rectified pre-activation of latent `j` on one row, whether in the top `k` or not.
    ///
    /// # Shapes
    /// `x` is `[d_model]`.
    pub fn latent(&self, x: &[f32], j: usize) -> f32 {
        let row = &self.w_enc_t[j * self.cfg.d_model..(j + 1) * self.cfg.d_model];
        (dot(x, row) - dot(&self.b_dec, row) + self.b_enc[j]).max(0.0)
    }

    /// Latent activations of `n` rows.
    ///
    /// # Shapes
    /// `x` is `[n, d_model]`.
    ///
    /// # Panics
    /// If `x` has another length.
    pub fn encode(&self, x: &[f32], n: usize) -> Codes {
        let (d, k) = (self.cfg.d_model, self.cfg.k);
        assert_eq!(x.len(), n * d, "x is [n, d_model]");
        let mut codes = Codes {
            n,
            k,
            idx: vec![0; n * k],
            val: vec![0.0; n * k],
        };
        if n == 1 {
            encode_row(self, x, &mut codes.idx, &mut codes.val);
            return codes;
        }
        encode_tiles(
            &self.w_enc_t,
            &self.b_enc,
            &self.b_dec,
            x,
            k,
            &mut codes.idx,
            &mut codes.val,
        );
        codes
    }

    /// Reconstructions of coded rows.
    ///
    /// # Shapes
    /// `out` is `[codes.n, d_model]`.
    pub fn decode(&self, codes: &Codes, out: &mut [f32]) {
        let d = self.cfg.d_model;
        let rows = codes
            .idx
            .par_chunks_exact(codes.k)
            .zip(codes.val.par_chunks_exact(codes.k));
        out.par_chunks_exact_mut(d)
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
}

/// One row: the product is a matrix-vector one, split over the latents.
fn encode_row(sae: &Sae, x: &[f32], idx: &mut [u32], val: &mut [f32]) {
    let d = sae.cfg.d_model;
    let centred: Vec<f32> = x.iter().zip(&sae.b_dec).map(|(x, b)| x - b).collect();
    let mut pre = vec![0.0f32; sae.cfg.d_sae];
    pre.par_chunks_mut(256)
        .zip(sae.w_enc_t.par_chunks(256 * d))
        .zip(sae.b_enc.par_chunks(256))
        .for_each(|((pre, w), b)| {
            for ((p, w), b) in pre.iter_mut().zip(w.chunks_exact(d)).zip(b) {
                *p = dot(&centred, w) + b;
            }
        });
    let mut top = Vec::new();
    select(&pre, &mut top, idx, val);
}

/// The `k` largest of `pre`, rectified; `k` is the length of `idx`.
fn select(pre: &[f32], top: &mut Vec<(u32, f32)>, idx: &mut [u32], val: &mut [f32]) {
    top_k_indices(pre, idx.len(), top);
    for ((i, v), (j, p)) in idx.iter_mut().zip(val).zip(top.iter()) {
        *i = *j;
        *v = p.max(0.0);
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
