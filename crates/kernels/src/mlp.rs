//! The gated MLP of a decoder, `y = W_down (act(W_gate x) * W_up x)`.
//!
//! With packed weights the hidden activations exist only as the rounded blocks that the last product reads;
//! otherwise they are f32. The numbers are those of the three products one after the other, bit for bit.

use crate::linear::{Linear, Output, Products, forward_all, forward_rounded, with_rounded};
use crate::ops::{self, Activation};
use crate::packed::{Activations, BLOCK, Gated};

/// A layer with its bias `[out_features]`.
pub type Biased<'a> = (&'a Linear, Option<&'a [f32]>);

/// The three layers.
#[derive(Debug, Clone, Copy)]
pub struct GatedMlp<'a> {
    /// `[d_mlp, d_model]`.
    pub gate: Biased<'a>,
    /// `[d_mlp, d_model]`.
    pub up: Biased<'a>,
    /// `[d_model, d_mlp]`.
    pub down: Biased<'a>,
    /// Applied to the gate.
    pub activation: Activation,
    /// Of packed weights.
    pub products: Products,
}

/// Hidden activations, kept from call to call.
#[derive(Debug, Default)]
pub struct Hidden {
    gate: Vec<f32>,
    up: Vec<f32>,
    rounded: Activations,
}

impl Hidden {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        (self.gate.capacity() + self.up.capacity()) * size_of::<f32>() + self.rounded.bytes()
    }
}

impl GatedMlp<'_> {
    /// Runs it on `n` rows.
    ///
    /// # Shapes
    /// `x` is `[n, d_model]`, `y` `[n, d_model]`.
    ///
    /// # Panics
    /// If a slice or a layer has another shape.
    pub fn forward(&self, x: &[f32], n: usize, hidden: &mut Hidden, y: &mut [f32]) {
        let Self {
            gate: (gate, gate_bias),
            up: (up, up_bias),
            down: (down, bias),
            activation,
            products,
        } = *self;
        let d_mlp = down.in_features();
        let output = Output {
            linear: down,
            bias,
            y,
        };
        for (layer, bias) in [self.gate, self.up] {
            assert_eq!(layer.out_features(), d_mlp, "the layers fit");
            assert_eq!(x.len(), n * layer.in_features(), "x is [n, d_model]");
            assert!(bias.is_none_or(|b| b.len() == d_mlp), "bias is [d_mlp]");
        }
        if n == 0 {
            return;
        }
        if let (Some(gate), Some(up), Some(_)) = (gate.packed(), up.packed(), down.packed())
            && d_mlp.is_multiple_of(BLOCK)
        {
            let gated = Gated {
                gate: (gate, gate_bias),
                up: (up, up_bias),
                activation,
            };
            with_rounded(Some(x), x.len() / n, products, |x| {
                gated.forward(x, n, &mut hidden.rounded);
            });
            return forward_rounded(&hidden.rounded, n, output);
        }
        hidden.gate.resize(n * d_mlp, 0.0);
        hidden.up.resize(n * d_mlp, 0.0);
        let both = [
            (gate, gate_bias, &mut hidden.gate),
            (up, up_bias, &mut hidden.up),
        ];
        let both = both.map(|(linear, bias, y)| Output { linear, bias, y });
        forward_all(x, n, products, both);
        ops::gated(activation, &mut hidden.gate, &hidden.up);
        forward_all(&hidden.gate, n, products, [output]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;
    use crate::linear::Precision;
    use crate::quant::GgmlType;
    use crate::testing::noise;

    /// A matrix of any bytes with small scales.
    fn matrix(ty: GgmlType, rows: usize, columns: usize, seed: u32) -> Linear {
        let mut bytes: Vec<u8> = noise(ty.row_bytes(columns).unwrap() * rows, seed)
            .iter()
            .map(|v| (v * 127.0) as i8 as u8)
            .collect();
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            block[..2].copy_from_slice(&half::f16::from_f32(0.01).to_le_bytes());
            if ty == GgmlType::Q4_1 {
                block[2..4].copy_from_slice(&half::f16::from_f32(-0.07).to_le_bytes());
            }
        }
        Linear::from_rows(ty, &bytes, rows, columns, Precision::Fast, || ()).unwrap()
    }

    /// Fused and one after the other give the same bits, for any number of rows and for layers of
    /// different types, with a bias and without.
    #[test]
    fn fused_is_the_products_one_after_the_other() {
        let (d, d_mlp) = (64, 160);
        let gate = matrix(GgmlType::Q5_0, d_mlp, d, 1);
        let up = matrix(GgmlType::Q4_1, d_mlp, d, 2);
        let down = matrix(GgmlType::Q8_0, d, d_mlp, 3);
        let bias = noise(d_mlp, 4);
        on_every_isa(|isa| {
            for (n, activation, bias) in [
                (1, Activation::Silu, None),
                (3, Activation::GeluTanh, Some(&bias[..])),
                (33, Activation::Silu, Some(&bias[..])),
                (150, Activation::GeluTanh, None),
            ] {
                for products in [Products::Int8, Products::Bf16] {
                    let x = noise(n * d, 5);
                    let run = |linear, x: &[f32], bias, y: &mut [f32]| {
                        forward_all(x, n, products, [Output { linear, bias, y }]);
                    };
                    let (mut g, mut u) = (vec![0.0; n * d_mlp], vec![0.0; n * d_mlp]);
                    run(&gate, &x, bias, &mut g);
                    run(&up, &x, None, &mut u);
                    ops::gated(activation, &mut g, &u);
                    let mut expected = vec![0.0; n * d];
                    run(&down, &g, None, &mut expected);
                    let mlp = GatedMlp {
                        gate: (&gate, bias),
                        up: (&up, None),
                        down: (&down, None),
                        activation,
                        products,
                    };
                    let mut y = vec![f32::NAN; n * d];
                    mlp.forward(&x, n, &mut Hidden::default(), &mut y);
                    assert_eq!(y, expected, "{isa:?} {products:?} n {n}");
                    assert!(y.iter().any(|v| *v != 0.0));
                }
            }
        });
    }
}
