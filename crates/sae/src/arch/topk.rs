//! TopK (2406.04093): the `k` largest pre-activations of each row, rectified.
//!
//! ```text
//! f = relu(top_k(p))
//! ```
//!
//! Selecting first and rectifying then is the same as the reverse, but for zeros.

use demur_kernels::ops::top_k_indices;

/// The `k` largest of `pre`, rectified, largest first; `k` is the length of `idx`.
pub(crate) fn select(pre: &[f32], top: &mut Vec<(u32, f32)>, idx: &mut [u32], val: &mut [f32]) {
    top_k_indices(pre, idx.len(), top);
    for ((i, v), (j, p)) in idx.iter_mut().zip(val).zip(top.iter()) {
        *i = *j;
        *v = p.max(0.0);
    }
}
