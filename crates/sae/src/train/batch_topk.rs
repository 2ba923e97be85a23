//! BatchTopK (2412.06410): the `k n` largest activations of a batch of `n` rows.
//!
//! ```text
//! f    = p 1[p among the k n largest positive ones of the batch]
//! loss = sum |x_hat - x|^2 / V + auxiliary term              gradients as TopK's
//! ```
//!
//! # The selection is exact
//!
//! The pass of [`demur_kernels::encoder`] gives each row's `k'` largest, with `k'` above `k`. The `k n`
//! largest of these are those of the batch unless a row had all of its `k'` selected: only then could
//! it have more. Such rows alone are coded again with a larger `k'`, until there is none. More
//! candidates only raise the bar, so a row that was not full stays so. Of equal values the earlier row,
//! then the lower latent, comes first.
//!
//! # Threshold
//!
//! At inference one threshold stands for the batch: the mean over batches of the smallest activation that
//! was selected. As weights move it is a running one, plain over the first 100 steps and then with a
//! weight of 1/100 for the newest.

use demur_kernels::element::Element;
use demur_kernels::encoder::{EncodeTime, ROWS};

use super::codes::RowEntries;

/// Candidates of a row, in multiples of `k`, and how they grow.
const CANDIDATES: usize = 2;
const GROWTH: usize = 4;
/// Weight of the newest batch in the threshold.
const NEWEST: f32 = 0.01;

/// The largest `k n` of `n` rows; `x` is `[n, stride]`, padded.
pub(super) fn encode<E: Element>(
    w: &E::Encoder,
    b_enc: &[f32],
    x: &[E],
    n: usize,
    d: usize,
    k: usize,
) -> (Vec<RowEntries>, EncodeTime) {
    let (m, stride) = (b_enc.len(), E::stride(d));
    let mut rows: Vec<RowEntries> = vec![RowEntries::default(); n];
    let mut wide = (CANDIDATES * k).min(m);
    let (mut idx, mut val) = (vec![0; n * wide], vec![0.0; n * wide]);
    let time = E::encode_topk(w, b_enc, x, d, wide, &mut idx, &mut val);
    let mut open: Vec<usize> = (0..n).collect();
    loop {
        for (at, &r) in open.iter().enumerate() {
            let of_row = at * wide..(at + 1) * wide;
            let entries = idx[of_row.clone()].iter().zip(&val[of_row]);
            rows[r] = entries
                .filter(|e| *e.1 > 0.0)
                .map(|(j, v)| (*j, *v))
                .collect();
        }
        let bar = Bar::of(&rows, k * n);
        let full = |r: &usize| rows[*r].len() == wide && bar.all(*r, &rows[*r]);
        open.retain(full);
        if open.is_empty() || wide == m {
            for (r, row) in rows.iter_mut().enumerate() {
                row.retain(|e| bar.keeps(r, *e));
            }
            return (rows, time);
        }
        wide = (GROWTH * wide).min(m);
        let mut some = vec![E::default(); open.len().next_multiple_of(ROWS) * stride];
        for (to, &r) in some.chunks_exact_mut(stride).zip(&open) {
            to.copy_from_slice(&x[r * stride..(r + 1) * stride]);
        }
        idx = vec![0; open.len() * wide];
        val = vec![0.0; open.len() * wide];
        E::encode_topk(w, b_enc, &some, d, wide, &mut idx, &mut val);
    }
}

/// The last entry that is selected; what comes before it is, too.
struct Bar(Option<(u32, usize, u32)>);

/// Order of selection: bits of positive values ascend with them.
fn key(r: usize, (j, v): (u32, f32)) -> (u32, usize, u32) {
    (!v.to_bits(), r, j)
}

impl Bar {
    fn of(rows: &[RowEntries], most: usize) -> Self {
        let all = rows.iter().enumerate();
        let mut keys: Vec<_> = all
            .flat_map(|(r, row)| row.iter().map(move |e| key(r, *e)))
            .collect();
        Self((keys.len() > most).then(|| *keys.select_nth_unstable(most - 1).1))
    }

    fn keeps(&self, r: usize, entry: (u32, f32)) -> bool {
        self.0.is_none_or(|last| key(r, entry) <= last)
    }

    fn all(&self, r: usize, row: &[(u32, f32)]) -> bool {
        row.iter().all(|e| self.keeps(r, *e))
    }
}

/// The threshold after step `step`, counted from 1, of which `smallest` was selected last. Below zero it
/// is not set.
pub(super) fn threshold(before: f32, step: usize, smallest: Option<f32>) -> f32 {
    match smallest {
        None => before,
        Some(v) if before < 0.0 => v,
        Some(v) => before + (v - before) * (1.0 / step as f32).max(NEWEST),
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Rows whose number of active latents differs by far more than the candidates allow for, with ties.
    #[test]
    fn the_selection_is_that_of_all_activations() {
        let (n, d, m, k) = (37usize, 8, 150, 3);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut whole = || (rng.random_range(0..7) as f32) - 3.0;
        let w: Vec<f32> = (0..m * d).map(|_| whole()).collect();
        let b: Vec<f32> = (0..m).map(|_| whole()).collect();
        let mut x = vec![0.0; n.next_multiple_of(ROWS) * d];
        x[..n * d].iter_mut().for_each(|v| *v = whole());
        for (r, row) in x.chunks_exact_mut(d).enumerate() {
            let by = if r == 5 { 40.0 } else { 1.0 };
            row.iter_mut().for_each(|v| *v *= by);
        }
        let (rows, _) = encode::<f32>(&w, &b, &x, n, d, k);
        let mut all: Vec<(u32, usize, u32)> = Vec::new();
        for r in 0..n {
            for j in 0..m {
                let row = w[j * d..(j + 1) * d].iter().zip(&x[r * d..]);
                let p = row.map(|(w, x)| w * x).sum::<f32>() + b[j];
                if p > 0.0 {
                    all.push(key(r, (j as u32, p)));
                }
            }
        }
        all.sort_unstable();
        all.truncate(k * n);
        all.sort_unstable_by_key(|(_, r, j)| (*r, *j));
        let found: Vec<_> = rows
            .iter()
            .enumerate()
            .flat_map(|(r, row)| row.iter().map(move |e| key(r, *e)))
            .collect();
        assert_eq!(found, all);
        assert!(rows[5].len() > 4 * CANDIDATES * k, "{}", rows[5].len());
    }

    #[test]
    fn the_threshold_is_a_running_mean() {
        let t = threshold(-1.0, 1, Some(4.0));
        let t = threshold(t, 2, Some(2.0));
        assert_eq!(t, 3.0);
        assert_eq!(threshold(t, 3, None), 3.0);
        assert!((threshold(t, 1000, Some(4.0)) - 3.01).abs() < 1e-6);
    }
}
