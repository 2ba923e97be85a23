//! JumpReLU (2407.14435): a latent is active above a threshold of its own, at its full value.
//!
//! ```text
//! f_j = relu(p_j) 1[p_j > theta_j]
//! ```
//!
//! The comparison is strict. A negative threshold acts as 0.

/// `relu(p) 1[p > threshold]`.
#[inline]
pub fn activation(p: f32, threshold: f32) -> f32 {
    if p > threshold { p.max(0.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::activation;

    #[test]
    fn by_hand() {
        for (p, threshold, f) in [
            (1.0, 0.5, 1.0),
            (0.5, 0.5, 0.0), // strict
            (0.4, 0.5, 0.0),
            (-1.0, -2.0, 0.0), // rectified
        ] {
            assert_eq!(activation(p, threshold), f, "{p} {threshold}");
        }
    }
}
