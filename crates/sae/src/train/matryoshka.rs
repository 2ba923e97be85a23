//! Matryoshka BatchTopK (2503.17547): every prefix of the groups reconstructs alone.
//!
//! ```text
//! f      = batch_topk(p)                                     over the whole dictionary
//! e_l    = sum over groups g <= l of f_g W_dec_g + b_dec - x
//! loss   = sum_l |e_l|^2 / V + auxiliary term of the last level
//! g_l    = 2 / V sum over l' >= l of e_l'                    the gradient that latents of group l see
//! ```
//!
//! A batch's gradient has one row for each level, `b_dec` sees the first. Selection and threshold are
//! BatchTopK's.

/// Group sizes for `d_sae` latents in the proportions 1 : 2 : 4 : 8 : 17 of 32; fewer groups where the
/// first would be empty.
pub fn default_groups(d_sae: usize) -> Vec<usize> {
    let mut sizes: Vec<usize> = [32, 16, 8, 4].map(|of| d_sae / of).to_vec();
    sizes.retain(|s| *s > 0);
    sizes.push(d_sae - sizes.iter().sum::<usize>());
    sizes
}

/// Where each group ends.
pub(super) fn ends(group_sizes: &[usize]) -> Vec<u32> {
    let sums = group_sizes.iter().scan(0, |sum, size| {
        *sum += *size as u32;
        Some(*sum)
    });
    sums.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_hand() {
        assert_eq!(default_groups(64), [2, 4, 8, 16, 34]);
        assert_eq!(default_groups(9), [1, 2, 6]);
        assert_eq!(default_groups(3), [3]);
        assert_eq!(ends(&[2, 4, 8]), [2, 6, 14]);
    }
}
