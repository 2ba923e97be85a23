//! Gated SAEs (2404.16014): a gate says whether a latent is active, a magnitude how much; they share
//! the encoder's product up to a factor.
//!
//! ```text
//! f_j = 1[p_j + b_gate_j > 0] relu(p_j e^{r_mag_j} + b_mag_j)
//! ```
//!
//! `b_enc` is zero: the gate and the magnitude have biases of their own.

/// `1[p + b_gate > 0] relu(p scale + b_mag)`.
#[inline]
pub fn activation(p: f32, b_gate: f32, scale: f32, b_mag: f32) -> f32 {
    if p + b_gate > 0.0 {
        (p * scale + b_mag).max(0.0)
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::activation;

    #[test]
    fn by_hand() {
        assert_eq!(activation(1.0, 0.5, 2.0, -0.25), 1.75);
        // a shut gate, though the magnitude would be 1.5 * 2 - 1
        assert_eq!(activation(1.5, -1.5, 2.0, -1.0), 0.0);
        // an open gate with a negative magnitude
        assert_eq!(activation(1.0, 0.5, 2.0, -3.0), 0.0);
    }
}
