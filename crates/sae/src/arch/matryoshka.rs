//! Matryoshka BatchTopK (2503.17547): nested dictionaries, each of which reconstructs alone.
//!
//! ```text
//! f     = batch_topk(p)
//! x_hat = sum over groups g of f_g W_dec_g + b_dec
//! ```
//!
//! The groups shape the training loss (one reconstruction error for each prefix of groups). At
//! inference the whole dictionary is used, which is BatchTopK.

use crate::error::SaeError;

/// Groups are not empty and are all latents.
pub(crate) fn check(group_sizes: &[usize], d_sae: usize) -> Result<(), SaeError> {
    let total = group_sizes
        .iter()
        .try_fold(0usize, |sum, g| sum.checked_add(*g));
    if !group_sizes.contains(&0) && total == Some(d_sae) {
        return Ok(());
    }
    Err(SaeError::Config {
        field: "group_sizes",
        value: format!("{group_sizes:?}"),
        rule: format!("must be positive and sum to d_sae = {d_sae}"),
    })
}
