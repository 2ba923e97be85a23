//! Sparse codes: the `k` largest of each row, and the decoder that reads only those.
//!
//! A TopK autoencoder keeps `k` of `m` latents a row (32 of some thousands), so decoding touches `k`
//! rows of the dictionary instead of all: `x_hat = b_dec + sum_j val_j w_dec[idx_j]`, `2 k d`
//! operations against `2 m d` of the dense product. Codes are stored as `[n, k]` indices and values,
//! in descending order of value. A row has fewer than `k` positive values at times: the rest of its
//! values are 0 after the ReLU and decode to nothing.

use rayon::prelude::*;

use crate::ops::{axpy, top_k_indices};

/// Operations below which a call stays on one thread.
const PARALLEL_FROM: usize = 1 << 16;

/// The `k` largest pre-activations of each row, through a ReLU; equal ones: the lower index first.
///
/// # Shapes
/// `pre` is `[n, m]`; `idx` and `val` are `[n, k]`.
///
/// # Panics
/// If a slice has another length, or `k` exceeds `m`.
pub fn topk_encode(pre: &[f32], n: usize, m: usize, k: usize, idx: &mut [u32], val: &mut [f32]) {
    assert!(k <= m, "k is at most the number of latents");
    assert_eq!(pre.len(), n * m, "pre is [n, m]");
    assert!(idx.len() == n * k && val.len() == n * k, "codes are [n, k]");
    if n == 0 || k == 0 {
        return;
    }
    let one = |top: &mut Vec<(u32, f32)>, pre: &[f32], idx: &mut [u32], val: &mut [f32]| {
        top_k_indices(pre, k, top);
        for ((idx, val), &(i, v)) in idx.iter_mut().zip(val).zip(top.iter()) {
            (*idx, *val) = (i, v.max(0.0));
        }
    };
    if pre.len() < PARALLEL_FROM {
        let mut top = Vec::new();
        for (i, pre) in pre.chunks_exact(m).enumerate() {
            let row = i * k..(i + 1) * k;
            one(&mut top, pre, &mut idx[row.clone()], &mut val[row]);
        }
    } else {
        pre.par_chunks_exact(m)
            .zip(idx.par_chunks_exact_mut(k))
            .zip(val.par_chunks_exact_mut(k))
            .for_each_init(Vec::new, |top, ((pre, idx), val)| one(top, pre, idx, val));
    }
}

/// `out = b_dec + sum_j val_j w_dec[idx_j]` for each row; values of zero are skipped.
///
/// # Shapes
/// `idx` and `val` are `[n, k]`, `w_dec` `[m, d]`, `b_dec` `[d]`, `out` `[n, d]`.
///
/// # Panics
/// If a slice has another length, or an index is not below `m`.
pub fn decode(
    idx: &[u32],
    val: &[f32],
    n: usize,
    k: usize,
    w_dec: &[f32],
    b_dec: &[f32],
    out: &mut [f32],
) {
    let d = b_dec.len();
    assert!(idx.len() == n * k && val.len() == n * k, "codes are [n, k]");
    assert_eq!(out.len(), n * d, "out is [n, d]");
    if n == 0 || d == 0 {
        return;
    }
    let one = |i: usize, out: &mut [f32]| {
        out.copy_from_slice(b_dec);
        let row = i * k..(i + 1) * k;
        for (&latent, &value) in idx[row.clone()].iter().zip(&val[row]) {
            if value != 0.0 {
                let at = latent as usize * d;
                axpy(value, &w_dec[at..at + d], out);
            }
        }
    };
    if n * k * d < PARALLEL_FROM {
        out.chunks_exact_mut(d)
            .enumerate()
            .for_each(|(i, out)| one(i, out));
    } else {
        out.par_chunks_exact_mut(d)
            .enumerate()
            .for_each(|(i, out)| one(i, out));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_row_by_hand() {
        let pre = [0.5, -1.0, 3.0, 3.0, -2.0, -3.0, -1.0, -1.0, 0.25, -9.0];
        let (mut idx, mut val) = ([9; 6], [9.0; 6]);
        topk_encode(&pre, 2, 5, 3, &mut idx, &mut val);
        assert_eq!(idx, [2, 3, 0, 3, 1, 2]);
        assert_eq!(val, [3.0, 3.0, 0.5, 0.25, 0.0, 0.0]);
        // d = 2, latent j decodes to (j, 1)
        let w_dec: Vec<f32> = (0..5).flat_map(|j| [j as f32, 1.0]).collect();
        let mut out = [0.0; 4];
        decode(&idx, &val, 2, 3, &w_dec, &[10.0, -1.0], &mut out);
        assert_eq!(out, [10.0 + 6.0 + 9.0, -1.0 + 6.5, 10.75, -0.75]);
    }

    #[test]
    fn nothing_to_do() {
        topk_encode(&[], 0, 4, 2, &mut [], &mut []);
        topk_encode(&[1.0, 2.0], 1, 2, 0, &mut [], &mut []);
        let mut out = [0.0];
        decode(&[], &[], 1, 0, &[], &[7.0], &mut out);
        assert_eq!(out, [7.0]);
    }

    proptest! {
        /// Many rows at once, on any thread, are the rows one by one: against a full sort and a
        /// dense product.
        #[test]
        fn agrees_with_sort_and_dense_product(
            n in 0usize..40, m in 1usize..300, d in 1usize..20, k in 0usize..12, seed in any::<u32>(),
        ) {
            let k = k.min(m);
            let mut state = seed;
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 26) as f32 - 31.0 // ties and signs
            };
            let pre: Vec<f32> = (0..n * m).map(|_| next()).collect();
            let w_dec: Vec<f32> = (0..m * d).map(|_| next()).collect();
            let b_dec: Vec<f32> = (0..d).map(|_| next()).collect();
            let (mut idx, mut val) = (vec![0; n * k], vec![0.0; n * k]);
            topk_encode(&pre, n, m, k, &mut idx, &mut val);
            let mut out = vec![f32::NAN; n * d];
            decode(&idx, &val, n, k, &w_dec, &b_dec, &mut out);
            for i in 0..n {
                let row = &pre[i * m..(i + 1) * m];
                let mut order: Vec<usize> = (0..m).collect();
                order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
                let mut dense = b_dec.clone();
                for (j, &latent) in order[..k].iter().enumerate() {
                    let value = row[latent].max(0.0);
                    prop_assert_eq!(idx[i * k + j] as usize, latent);
                    prop_assert_eq!(val[i * k + j], value);
                    for (o, w) in dense.iter_mut().zip(&w_dec[latent * d..]) {
                        *o += value * w; // small integers: exact in any order
                    }
                }
                prop_assert_eq!(&out[i * d..(i + 1) * d], &dense[..]);
            }
        }
    }
}
