//! Normalisation of inputs, by the names of SAELens.
//!
//! | name | `norm_in(x)` | `norm_out(y)` |
//! | --- | --- | --- |
//! | `none` | `x` | `y` |
//! | `constant_norm_rescale` | `x sqrt(d) / |x|` | `y |x| / sqrt(d)` |
//! | `layer_norm` | `(x - m) / (s + 1e-5)`, `s` with `d - 1` in its denominator | `y s + m` |
//!
//! `expected_average_only_in` (`x c` with one factor for the data set) is not here: it is a constant,
//! and readers fold it into the weights.

use demur_kernels::ops::dot;
use serde::{Deserialize, Serialize};

/// How rows are normalised before the encoder; undone after the decoder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InputNorm {
    /// Not at all.
    #[default]
    None,
    /// To a norm of `sqrt(d)`.
    ConstantNormRescale,
    /// To mean 0 and standard deviation 1.
    LayerNorm,
}

/// What undoes the normalisation of one row: `x_hat = y scale + shift`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Undo {
    pub scale: f32,
    pub shift: f32,
}

impl InputNorm {
    /// Its name in `cfg.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::ConstantNormRescale => "constant_norm_rescale",
            Self::LayerNorm => "layer_norm",
        }
    }

    /// What undoes the normalisation of the row `x`.
    pub(crate) fn undo(self, x: &[f32]) -> Undo {
        let d = x.len() as f64;
        match self {
            Self::None => Undo {
                scale: 1.0,
                shift: 0.0,
            },
            Self::ConstantNormRescale => Undo {
                scale: (f64::from(dot(x, x)).sqrt() / d.sqrt()) as f32,
                shift: 0.0,
            },
            Self::LayerNorm => {
                let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / d;
                let square: f64 = x.iter().map(|v| (f64::from(*v) - mean).powi(2)).sum();
                Undo {
                    scale: (square / (d - 1.0).max(1.0)).sqrt() as f32,
                    shift: mean as f32,
                }
            }
        }
    }

    /// Normalises a row in place. A row of zeros stays one.
    pub(crate) fn apply(self, x: &mut [f32]) {
        let Undo { scale, shift } = self.undo(x);
        let by = match self {
            Self::None => return,
            Self::ConstantNormRescale => 1.0 / scale.max(f32::MIN_POSITIVE),
            Self::LayerNorm => 1.0 / (scale + 1e-5),
        };
        x.iter_mut().for_each(|v| *v = (*v - shift) * by);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let mut x = [3.0, 4.0];
        InputNorm::ConstantNormRescale.apply(&mut x);
        assert!((x[0] - 3.0 * 2f32.sqrt() / 5.0).abs() < 1e-6);
        // mean 2, deviations -1 and 1, unbiased variance 2
        let mut x = [1.0, 3.0];
        let undo = InputNorm::LayerNorm.undo(&x);
        assert_eq!((undo.scale, undo.shift), (2f32.sqrt(), 2.0));
        InputNorm::LayerNorm.apply(&mut x);
        assert!((x[1] - 1.0 / (2f32.sqrt() + 1e-5)).abs() < 1e-6);
        let mut zero = [0.0, 0.0];
        InputNorm::ConstantNormRescale.apply(&mut zero);
        assert_eq!(zero, [0.0, 0.0]);
    }
}
