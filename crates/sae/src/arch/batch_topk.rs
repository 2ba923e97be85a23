//! BatchTopK (2412.06410): training keeps the `k n` largest of a batch's `n d_sae` activations, so
//! rows differ in their number. At inference a row has no batch: one threshold, the mean over
//! training batches of the smallest activation that was kept, stands for it.
//!
//! ```text
//! f_j = relu(p_j) 1[relu(p_j) > theta]
//! ```

use crate::arch::jumprelu;
use crate::error::SaeError;

/// `relu(p) 1[relu(p) > threshold]`.
#[inline]
pub fn activation(p: f32, threshold: f32) -> f32 {
    jumprelu::activation(p, threshold)
}

/// A threshold below zero is one that was never estimated.
pub(crate) fn check(threshold: f32) -> Result<(), SaeError> {
    if threshold.is_finite() && threshold >= 0.0 {
        return Ok(());
    }
    Err(SaeError::Config {
        field: "threshold",
        value: threshold.to_string(),
        rule: "must be at least 0: below it was never estimated, and the SAE can't be used for \
               inference; train it further"
            .to_owned(),
    })
}
