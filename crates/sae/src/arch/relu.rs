//! ReLU with an L1 penalty in training ("standard"; Bricken et al. 2023).
//!
//! ```text
//! f = relu(p)
//! ```

/// `relu(p)`.
#[inline]
pub fn activation(p: f32) -> f32 {
    p.max(0.0)
}
