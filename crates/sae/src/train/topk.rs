//! TopK (2406.04093): the equations are in [`super`]. With multi-TopK, the `4 k` largest reconstruct as well:
//!
//! ```text
//! loss = sum |e|^2 / V + 1/8 sum |e_4k|^2 / V + auxiliary term
//! ```
//!
//! which keeps the SAE useful where more latents are active than it was trained for (section 4.3, with
//! sparsify's weight). Gradients are those of both sums; `e_4k` has rows of its own beside `g`.

use super::codes::{Codes, RowEntries};

/// The wider selection, in multiples of `k`, and the weight of its error.
pub(super) const WIDER: usize = 4;
pub(super) const WEIGHT: f64 = 0.125;

/// The `k` largest of each of the `n` rows of `wide`; of equal values the lower latent comes first.
pub(super) fn narrowed(wide: &Codes, n: usize, k: usize) -> Vec<RowEntries> {
    let row = |r: usize| {
        let places = wide.row(r);
        let entries = wide.idx[places.clone()].iter().zip(&wide.val[places]);
        let mut row: RowEntries = entries.map(|(j, v)| (*j, *v)).collect();
        if row.len() > k {
            row.select_nth_unstable_by(k - 1, |a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            row.truncate(k);
            row.sort_unstable_by_key(|e| e.0);
        }
        row
    };
    (0..n).map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_of_a_row_in_the_order_of_latents() {
        let mut wide = Codes::default();
        wide.take(&[vec![(1, 2.0), (4, 3.0), (5, 2.0), (9, 1.0)], vec![(7, 1.0)]]);
        assert_eq!(
            narrowed(&wide, 2, 2),
            [vec![(1, 2.0), (4, 3.0)], vec![(7, 1.0)]]
        );
    }
}
