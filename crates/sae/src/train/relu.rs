//! ReLU with an L1 penalty (Bricken et al. 2023, "Towards Monosemanticity").
//!
//! ```text
//! f    = relu(p)
//! loss = (sum |x_hat - x|^2 + l1 sum_j f_j) / V
//! dp_j = g . W_dec[j] + l1 / V                               where p_j > 0, else 0
//! ```
//!
//! Decoder rows have unit norm, so the penalty is that of the activations weighted by the norms of the
//! decoder rows: it can't be evaded by small activations of large rows. With rows of mean norm `sqrt(d)`
//! a weight of 5 is a usual start. Entries without activation have no gradient, so the sparse pass is
//! exact.

/// The penalty of a step.
#[derive(Debug)]
pub(super) struct L1 {
    /// Its weight.
    pub weight: f64,
    /// The weight over `V`.
    pub by: f32,
}
