//! JumpReLU with straight-through estimators (2407.14435).
//!
//! ```text
//! f_j  = p_j H(p_j - theta_j),      theta_j = exp(t_j)
//! loss = sum |x_hat - x|^2 / V + l0 L0                       or  + l0 (L0 / target - 1)^2
//! L0   = 1/n sum over rows and latents of H(p_j - theta_j)
//! ```
//!
//! `H` has no useful derivative. With the rectangle `K(u) = 1[|u| < 1/2]` of bandwidth `eps`, the paper's
//! pseudo-derivatives are
//!
//! ```text
//! df_j / dp_j             = H(p_j - theta_j)                 exact
//! df_j / dtheta_j         = -theta_j / eps K((p_j - theta_j) / eps)
//! dH(p_j - theta_j) / dtheta_j = -1 / eps K((p_j - theta_j) / eps)
//! ```
//!
//! so thresholds learn from the rows whose pre-activation is near, active or not: those rows are
//! entries too, with an activation of 0. The encoder learns from active ones only. `t` is what Adam
//! moves, `dt = theta dtheta`, so thresholds stay positive; the paper's rectification of `p` then does
//! nothing.
//!
//! The paper's rows have a mean square norm of 1 and `eps` = 0.001; here they have a mean norm of
//! `sqrt(d)`, and the bandwidth is multiplied by that. The penalty with a target is the paper's
//! variant for a fixed sparsity.

/// The L0 term.
#[derive(Debug, Clone, Copy)]
pub(super) struct L0Penalty {
    pub weight: f64,
    pub target: Option<f64>,
}

impl L0Penalty {
    /// The term at an L0, and its derivative.
    pub(super) fn at(self, l0: f64) -> (f64, f64) {
        match self.target {
            None => (self.weight * l0, self.weight),
            Some(target) => {
                let off = l0 / target - 1.0;
                (self.weight * off * off, 2.0 * self.weight * off / target)
            }
        }
    }
}

/// The rule of a step.
#[derive(Debug)]
pub(super) struct JumpRelu {
    thresholds: Vec<f32>, // [d_sae]
    width: f32,
    penalty: L0Penalty,
    /// Derivative of the L0 term to one `H`.
    slope: f32,
}

impl JumpRelu {
    pub(super) fn new(log: &[f32], width: f32, penalty: L0Penalty) -> Self {
        Self {
            thresholds: log.iter().map(|t| t.exp()).collect(),
            width,
            penalty,
            slope: 0.0,
        }
    }

    /// The L0 term, once the codes of the `n` rows are known; gradients need it.
    pub(super) fn penalise(&mut self, active: u64, n: usize) -> f64 {
        let (term, slope) = self.penalty.at(active as f64 / n as f64);
        self.slope = (slope / n as f64) as f32;
        term
    }

    fn near(&self, j: usize, p: f32) -> bool {
        (p - self.thresholds[j]).abs() < 0.5 * self.width
    }

    #[inline]
    pub(super) fn entry(&self, j: usize, p: f32) -> Option<f32> {
        if p > self.thresholds[j] {
            Some(p)
        } else {
            self.near(j, p).then_some(0.0)
        }
    }

    #[inline]
    pub(super) fn gradient(&self, j: usize, f: f32, p: f32, df: f32) -> (f32, f32) {
        let dp = if f > 0.0 { df } else { 0.0 };
        let theta = self.thresholds[j];
        let dt = match self.near(j, p) {
            true => -theta * (theta * df + self.slope) / self.width,
            false => 0.0,
        };
        (dp, dt)
    }
}
