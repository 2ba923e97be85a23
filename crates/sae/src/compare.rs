//! Two dictionaries side by side: for each decoder row of one, the largest cosine with a row of the other.
//!
//! ```text
//! s_i = max over j of  a_i . b_j / (|a_i| |b_j|)
//! ```
//!
//! The mean of `s` is the mean max cosine similarity (MMCS, Sharkey et al. 2022). It is not symmetric:
//! a dictionary may be part of a larger one. Signs count, as activations are not negative. A row of
//! zeros has a cosine of 0 with all.

use demur_kernels::gemm::{Matrix, matmul_with};
use demur_kernels::ops::dot;
use rayon::prelude::*;
use serde::Serialize;

use crate::error::SaeError;
use crate::sae::Sae;

/// Rows of a tile.
const TILE: usize = 64;
/// A row whose best cosine is not above this has no counterpart.
pub const MATCHED: f32 = 0.7;
/// A row whose best cosine is above this is found again.
pub const SAME: f32 = 0.9;

/// What of one dictionary is found in another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Found {
    /// Mean of the largest cosines.
    pub mean_max_cosine: f64,
    /// Share of latents with one above [`MATCHED`].
    pub above_07: f64,
    /// Share of latents with one above [`SAME`].
    pub above_09: f64,
    /// Latents without a counterpart.
    pub unmatched: Vec<u32>,
}

impl Found {
    /// Of largest cosines.
    pub fn new(cosines: &[f32]) -> Self {
        let n = cosines.len().max(1) as f64;
        let above = |bar: f32| cosines.iter().filter(|c| **c > bar).count() as f64 / n;
        let all = (0..).zip(cosines);
        Self {
            mean_max_cosine: cosines.iter().map(|c| f64::from(*c)).sum::<f64>() / n,
            above_07: above(MATCHED),
            above_09: above(SAME),
            unmatched: all.filter(|e| *e.1 <= MATCHED).map(|e| e.0).collect(),
        }
    }
}

/// For each latent of `a`, the largest cosine of its decoder row with one of `b`'s, and the latent of
/// `b` that has it.
///
/// # Errors
/// [`SaeError::Config`] if the rows have different widths.
pub fn max_cosines(a: &Sae, b: &Sae) -> Result<Vec<(f32, u32)>, SaeError> {
    let (d, m) = (a.d_out(), b.d_sae());
    if b.d_out() != d {
        return Err(SaeError::Config {
            field: "d_model",
            value: b.d_out().to_string(),
            rule: format!("must be {d}, as that of the other SAE"),
        });
    }
    let (a, b) = (unit_rows(a), unit_rows(b));
    let best = a.par_chunks(TILE * d).map_init(
        || vec![0.0f32; TILE * m],
        |cosines, rows| {
            let n = rows.len() / d;
            let (rows, others) = (Matrix::row_major(rows, d), Matrix::transposed(&b, d));
            matmul_with(n, m, d, rows, others, cosines, m, false, 1);
            let best = |of: &[f32]| {
                let start = (f32::NEG_INFINITY, 0);
                (0..).zip(of).fold(start, |best, (j, c)| match *c > best.0 {
                    true => (*c, j),
                    false => best,
                })
            };
            cosines
                .chunks_exact(m)
                .take(n)
                .map(best)
                .collect::<Vec<_>>()
        },
    );
    Ok(best.collect::<Vec<_>>().concat())
}

fn unit_rows(sae: &Sae) -> Vec<f32> {
    let mut rows = sae.weights().2.to_vec();
    for row in rows.chunks_exact_mut(sae.d_out()) {
        let norm = dot(row, row).sqrt();
        if norm > 0.0 {
            row.iter_mut().for_each(|v| *v /= norm);
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SaeConfig;

    fn sae(rows: &[[f32; 2]]) -> Sae {
        let w = rows.as_flattened().to_vec();
        let cfg = SaeConfig {
            d_model: 2,
            d_sae: rows.len(),
            k: 1,
            hook_name: String::new(),
            model_name: String::new(),
        };
        Sae::new(cfg, w.clone(), vec![0.0; rows.len()], w, vec![0.0; 2]).unwrap()
    }

    #[test]
    fn by_hand() {
        let a = sae(&[[2.0, 0.0], [0.0, -1.0], [0.6, 0.8], [0.0, 0.0]]);
        let b = sae(&[[0.0, 3.0], [5.0, 0.0]]);
        // (1, 0) is in b; -y is opposite to y and at right angles to x; (.6, .8) is .8 along y
        let of_a = max_cosines(&a, &b).unwrap();
        assert_eq!(of_a, [(1.0, 1), (0.0, 1), (0.8, 0), (0.0, 0)]);
        let found = Found::new(&of_a.iter().map(|e| e.0).collect::<Vec<_>>());
        assert!((found.mean_max_cosine - 1.8 / 4.0).abs() < 1e-6);
        assert_eq!((found.above_07, found.above_09), (0.5, 0.25));
        assert_eq!(found.unmatched, [1, 3]);
        // the other way: y is best along (.6, .8)
        let of_b = max_cosines(&b, &a).unwrap();
        assert_eq!(of_b, [(0.8, 2), (1.0, 0)]);
        // a control: each is itself
        let same = max_cosines(&b, &b).unwrap();
        assert_eq!(same, [(1.0, 0), (1.0, 1)]);
    }

    #[test]
    fn other_widths_are_refused() {
        let cfg = SaeConfig {
            d_model: 1,
            ..sae(&[[1.0, 0.0]]).cfg().clone()
        };
        let narrow = Sae::new(cfg, vec![1.0], vec![0.0], vec![1.0], vec![0.0]).unwrap();
        let e = max_cosines(&sae(&[[1.0, 0.0]]), &narrow).unwrap_err();
        assert!(e.to_string().contains("d_model"), "{e}");
    }
}
