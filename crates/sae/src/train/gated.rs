//! Gated SAEs (2404.16014).
//!
//! ```text
//! pi   = W_enc (x - b_dec) + b_gate                          the gate; b_gate is trained as b_enc
//! mag  = e^r W_enc (x - b_dec) + b_mag
//! f    = H(pi) relu(mag)
//! loss = (sum |x_hat(f) - x|^2 + l1 sum_j relu(pi_j) + sum |x_frozen(relu(pi)) - x|^2) / V
//! ```
//!
//! `x_frozen` is the reconstruction with `W_dec` and `b_dec` taken as given: it teaches the gate, which
//! has no gradient through `H`, and nothing else. With `p` the shared product, and
//! `dmag_j = g . W_dec[j]` where `pi_j > 0` and `mag_j > 0`,
//!
//! ```text
//! dpi_j = l1 / V + g_frozen . W_dec[j]                       where pi_j > 0
//! dp_j  = e^{r_j} dmag_j + dpi_j
//! db_gate = sum dpi        db_mag = sum dmag        dr = sum dmag p e^r,    p e^r = f - b_mag
//! ```
//!
//! Where `pi_j <= 0` all gradients are 0, so the entries are the open gates. Decoder rows have unit norm,
//! so the penalty is weighted by their norms.

/// The rule of a step.
#[derive(Debug)]
pub(super) struct Gated {
    b_gate: Vec<f32>,
    scale: Vec<f32>, // exp(r)
    b_mag: Vec<f32>,
    pub l1: f64,
    by: f32,
}

impl Gated {
    pub(super) fn new(b_gate: &[f32], r: &[f32], b_mag: &[f32], l1: f64, variance: f64) -> Self {
        Self {
            b_gate: b_gate.to_vec(),
            scale: r.iter().map(|r| r.exp()).collect(),
            b_mag: b_mag.to_vec(),
            l1,
            by: (l1 / variance) as f32,
        }
    }

    #[inline]
    pub(super) fn entry(&self, j: usize, pi: f32) -> Option<f32> {
        let magnitude = (pi - self.b_gate[j]) * self.scale[j] + self.b_mag[j];
        (pi > 0.0).then_some(magnitude.max(0.0))
    }

    #[inline]
    pub(super) fn gradient(&self, j: usize, f: f32, df: f32, d_gate: f32) -> (f32, f32) {
        let d_mag = if f > 0.0 { df } else { 0.0 };
        (self.scale[j] * d_mag + self.by + d_gate, d_mag)
    }

    pub(super) fn of_latent(&self, j: usize, vals: &[f32], dp: f32, d_mag: &[f32]) -> [f32; 3] {
        let sum: f32 = d_mag.iter().sum();
        let product = d_mag.iter().zip(vals).map(|(d, f)| d * (f - self.b_mag[j]));
        [dp - self.scale[j] * sum, product.sum(), sum]
    }
}
