use half::{bf16, f16};

use super::*;
use crate::dispatch::on_every_isa;
use crate::quant::group_len;

/// Numbers that look random and are the same everywhere.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }
}

/// A random matrix of type `ty`: any bytes are integers, the scales get a sane size.
fn matrix(ty: GgmlType, rows: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut next = noise(seed);
    let blocks = rows * columns / ty.block_len();
    let mut bytes: Vec<u8> = (0..blocks * ty.block_bytes())
        .map(|_| ((next() + 1.0) * 128.0) as u8)
        .collect();
    let halves: &[usize] = match ty {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => &[0],
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4K | GgmlType::Q5K => &[0, 2],
        GgmlType::Q2K => &[80, 82],
        GgmlType::Q3K => &[108],
        GgmlType::Q6K => &[208],
        GgmlType::F16 => &[0],
        _ => &[],
    };
    for block in bytes.chunks_exact_mut(ty.block_bytes()) {
        for &at in halves {
            let scale = f16::from_f32(next() * 0.01);
            block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        }
        if ty == GgmlType::F32 {
            block.copy_from_slice(&next().to_le_bytes());
        }
        if ty == GgmlType::BF16 {
            block.copy_from_slice(&bf16::from_f32(next()).to_le_bytes());
        }
    }
    bytes
}

const ALL: [GgmlType; 13] = [
    GgmlType::F32,
    GgmlType::F16,
    GgmlType::BF16,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::Q5_1,
    GgmlType::Q8_0,
    GgmlType::Q2K,
    GgmlType::Q3K,
    GgmlType::Q4K,
    GgmlType::Q5K,
    GgmlType::Q6K,
];

/// The product in f64, with activations rounded as the fast path rounds them.
fn reference(ty: GgmlType, bytes: &[u8], m: usize, k: usize, x: &[f32], int8: bool) -> Vec<f64> {
    let mut w = vec![0.0; m * k];
    dequantize_row(ty, bytes, &mut w).unwrap();
    let mut rounded = x.to_vec();
    if int8 {
        for block in rounded.chunks_exact_mut(BLOCK) {
            let largest = block.iter().fold(0.0f32, |a, v| a.max(v.abs()));
            let scale = f64::from(largest / 127.0);
            let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
            for v in block {
                *v = (f64::from((*v * inverse).round_ties_even()) * scale) as f32;
            }
        }
    }
    let mut y = Vec::new();
    for x in rounded.chunks_exact(k) {
        for w in w.chunks_exact(k) {
            y.push(
                w.iter()
                    .zip(x)
                    .map(|(a, b)| f64::from(*a) * f64::from(*b))
                    .sum(),
            );
        }
    }
    y
}

#[track_caller]
fn close(found: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let difference = (f64::from(*f) - e).abs();
        assert!(
            difference <= tolerance * (1.0 + e.abs()),
            "at {i}: {f} against {e}"
        );
    }
}

#[test]
fn every_type_matches_the_reference_on_every_isa() {
    on_every_isa(|isa| {
        for ty in ALL {
            for (m, n) in [(1, 1), (7, 2), (8, 3), (19, 4), (24, 5), (33, 17)] {
                let k = 512;
                let bytes = matrix(ty, m, k, 7 + m as u64);
                let mut next = noise(99);
                let x: Vec<f32> = (0..n * k).map(|_| next() * 3.0).collect();
                let bias: Vec<f32> = (0..m).map(|_| next()).collect();
                for precision in [Precision::Fast, Precision::F32] {
                    let linear = Linear::from_rows(ty, &bytes, m, k, precision, || ()).unwrap();
                    let mut y = vec![f32::NAN; n * m];
                    linear.forward(&x, n, Some(&bias), &mut y);
                    let int8 = precision == Precision::Fast && ty.is_quantised();
                    let mut expected = reference(ty, &bytes, m, k, &x, int8);
                    for (i, e) in expected.iter_mut().enumerate() {
                        *e += f64::from(bias[i % m]);
                    }
                    let found = std::panic::catch_unwind(|| close(&y, &expected, 2e-4));
                    assert!(
                        found.is_ok(),
                        "{} {precision:?} m {m} n {n} {isa:?}",
                        ty.name()
                    );
                }
            }
        }
    });
}

#[test]
fn a_row_has_the_same_bits_alone_and_in_a_batch() {
    on_every_isa(|_| {
        for ty in ALL {
            // More than one tile of any kernel, and a rest.
            let (m, k, n) = (21, 256, 37);
            let bytes = matrix(ty, m, k, 3);
            let mut next = noise(5);
            let x: Vec<f32> = (0..n * k).map(|_| next()).collect();
            for precision in [Precision::Fast, Precision::F32] {
                let linear = Linear::from_rows(ty, &bytes, m, k, precision, || ()).unwrap();
                let mut batch = vec![0.0; n * m];
                linear.forward(&x, n, None, &mut batch);
                for (row, expected) in x.chunks_exact(k).zip(batch.chunks_exact(m)) {
                    let mut alone = vec![0.0; m];
                    linear.forward(row, 1, None, &mut alone);
                    assert_eq!(alone, expected, "{} {precision:?}", ty.name());
                }
            }
        }
    });
}

#[test]
fn packed_weights_stay_small() {
    // Q2_K and Q3_K are kept in four bits.
    let kept = ALL
        .into_iter()
        .filter(|ty| ty.is_quantised() && !matches!(ty, GgmlType::Q2K | GgmlType::Q3K));
    for ty in kept {
        let (m, k) = (64, 512);
        let in_file = ty.row_bytes(k).unwrap() as f64 * 8.0 / k as f64;
        for precision in [Precision::Fast, Precision::F32] {
            let linear =
                Linear::from_rows(ty, &matrix(ty, m, k, 1), m, k, precision, || ()).unwrap();
            let bits = linear.bytes() as f64 * 8.0 / (m * k) as f64;
            assert!(
                bits <= 1.1 * in_file,
                "{} {precision:?}: {bits} bits a weight, {in_file} in the file",
                ty.name()
            );
        }
    }
    assert_eq!(group_len(GgmlType::Q6K), 16);
}

#[test]
fn extreme_integers_do_not_saturate() {
    // The largest magnitudes that a type can hold, against activations of +-127.
    on_every_isa(|_| {
        for ty in ALL.into_iter().filter(|t| t.is_quantised()) {
            let (m, k) = (8, 256);
            let mut bytes = matrix(ty, m, k, 1);
            for block in bytes.chunks_exact_mut(ty.block_bytes()) {
                let keep: Vec<u8> = block.to_vec();
                for (i, b) in block.iter_mut().enumerate() {
                    let is_float = match ty {
                        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 => i < 2,
                        GgmlType::Q2K => i >= 80,
                        GgmlType::Q3K => i >= 108,
                        GgmlType::Q6K => i >= 208,
                        _ => i < 4,
                    };
                    *b = if is_float {
                        keep[i]
                    } else if ty == GgmlType::Q8_0 {
                        0x80
                    } else {
                        0xff
                    };
                }
            }
            let x: Vec<f32> = (0..k).map(|i| if i < 128 { 1.0 } else { -1.0 }).collect();
            let linear = Linear::from_rows(ty, &bytes, m, k, Precision::Fast, || ()).unwrap();
            let mut y = vec![0.0; m];
            linear.forward(&x, 1, None, &mut y);
            close(&y, &reference(ty, &bytes, m, k, &x, true), 1e-3);
        }
    });
}

#[test]
fn halves_widen_exactly() {
    for bits in 0..=u16::MAX {
        let expected = f16::from_bits(bits).to_f32();
        let found = Half(bits).widen();
        let same = found == expected || (found.is_nan() && expected.is_nan());
        assert!(same, "{bits:#06x}: {found} against {expected}");
    }
}

#[test]
fn wrong_shapes_are_errors() {
    assert!(Linear::from_rows(GgmlType::Q8_0, &[0; 34], 1, 33, Precision::Fast, || ()).is_err());
    assert!(Linear::from_rows(GgmlType::Q8_0, &[0; 35], 1, 32, Precision::Fast, || ()).is_err());
    assert!(Linear::from_f32(vec![0.0; 5], 2, 3).is_err());
}

#[test]
fn layers_of_one_input_together_are_as_each_alone() {
    let (k, n) = (256, 5);
    let mut next = noise(3);
    let x: Vec<f32> = (0..n * k).map(|_| next()).collect();
    // One of them exact, or none.
    for precision in [Precision::Fast, Precision::F32] {
        on_every_isa(|_| {
            let layer = |ty, rows, precision| {
                let bytes = matrix(ty, rows, k, 9);
                Linear::from_rows(ty, &bytes, rows, k, precision, || ()).unwrap()
            };
            let layers = [
                layer(GgmlType::Q4K, 19, precision),
                layer(GgmlType::BF16, 7, Precision::Fast),
                layer(GgmlType::Q8_0, 300, Precision::Fast),
            ];
            let bias: Vec<f32> = (0..7).map(|i| i as f32).collect();
            let biases = [None, Some(&bias[..]), None];
            let new = || {
                layers
                    .each_ref()
                    .map(|l| vec![f32::NAN; n * l.out_features()])
            };
            let (mut alone, mut together) = (new(), new());
            for ((l, bias), y) in layers.iter().zip(biases).zip(&mut alone) {
                l.forward(&x, n, bias, y);
            }
            let [a, b, c] = &mut together;
            let output = |i: usize, y| Output {
                linear: &layers[i],
                bias: biases[i],
                y,
            };
            forward_all(
                &x,
                n,
                Products::Int8,
                [output(0, a), output(1, b), output(2, c)],
            );
            assert_eq!(together, alone);
            assert!(alone.iter().flatten().all(|v| v.is_finite()));
        });
    }
}

/// On AMX both operands are rounded to bf16 and no more; a row is the same alone and among others; elsewhere
/// the products are those of int8.
#[test]
fn bf16_products_match_the_reference() {
    on_every_isa(|isa| {
        for ty in ALL.into_iter().filter(|ty| ty.is_quantised()) {
            for (m, n) in [(1, 1), (19, 4), (33, 17), (48, 33), (64, 70)] {
                let k = 512;
                let bytes = matrix(ty, m, k, 7 + m as u64);
                let mut next = noise(99);
                let x: Vec<f32> = (0..n * k).map(|_| next() * 3.0).collect();
                let bias: Vec<f32> = (0..m).map(|_| next()).collect();
                let linear = Linear::from_rows(ty, &bytes, m, k, Precision::Fast, || ()).unwrap();
                let run = |x: &[f32], products| {
                    let mut y = vec![f32::NAN; x.len() / k * m];
                    let output = Output {
                        linear: &linear,
                        bias: Some(&bias),
                        y: &mut y,
                    };
                    forward_all(x, x.len() / k, products, [output]);
                    y
                };
                let y = run(&x, Products::Bf16);
                let last = run(&x[(n - 1) * k..], Products::Bf16);
                assert_eq!(last, y[(n - 1) * m..], "{ty:?} {isa:?} {m} x {n}");
                if isa < Isa::Amx {
                    assert_eq!(y, run(&x, Products::Int8), "{ty:?} {isa:?} {m} x {n}");
                    continue;
                }
                let round = |x: &[f32]| -> Vec<f64> {
                    x.iter().map(|v| bf16::from_f32(*v).to_f64()).collect()
                };
                let mut w = vec![0.0; m * k];
                dequantize_row(ty, &bytes, &mut w).unwrap();
                let (w, x) = (round(&w), round(&x));
                let mut expected = Vec::new();
                for x in x.chunks_exact(k) {
                    for (w, bias) in w.chunks_exact(k).zip(&bias) {
                        let dot: f64 = w.iter().zip(x).map(|(w, x)| w * x).sum();
                        expected.push(f64::from(*bias) + dot);
                    }
                }
                close(&y, &expected, 1e-3);
            }
        }
    });
}

/// `a w` in f64 on the weights as they are in the file, added to `start`; beside each sum that of the
/// terms' magnitudes, which is what rounding goes by.
fn sums_of(a: &[f32], w: &[f32], outputs: usize, start: &[f32]) -> Vec<(f64, f64)> {
    let inner = w.len() / outputs;
    let mut sums: Vec<_> = start.iter().map(|v| (f64::from(*v), 1.0)).collect();
    for (a, sums) in a.chunks_exact(inner).zip(sums.chunks_exact_mut(outputs)) {
        for (a, w) in a.iter().zip(w.chunks_exact(outputs)) {
            for ((sum, size), w) in sums.iter_mut().zip(w) {
                let term = f64::from(*a) * f64::from(*w);
                *sum += term;
                *size += term.abs();
            }
        }
    }
    sums
}

/// The exact product and its transpose, over more than one task, more than one part of the inner
/// dimension, and rests of both.
#[test]
fn exact_products_and_their_transpose_match_the_reference_for_every_type() {
    #[track_caller]
    fn near(what: &str, found: &[f32], expected: &[(f64, f64)]) {
        for (i, (f, (e, size))) in found.iter().zip(expected).enumerate() {
            let off = (f64::from(*f) - e).abs();
            assert!(off <= 1e-6 * size, "{what} at {i}: {f} against {e}");
        }
    }
    on_every_isa(|isa| {
        for ty in ALL {
            for (m, k, n) in [(1, 512, 1), (147, 1280, 3), (1100, 512, 13)] {
                let what = format!("{} m {m} k {k} n {n} {isa:?}", ty.name());
                let bytes = matrix(ty, m, k, 11 + m as u64);
                let mut next = noise(17);
                let mut some = |n: usize| -> Vec<f32> { (0..n).map(|_| next()).collect() };
                let (x, dy, bias, before) = (some(n * k), some(n * m), some(m), some(n * k));
                let linear = Linear::from_rows(ty, &bytes, m, k, Precision::Fast, || ()).unwrap();
                let mut w = vec![0.0; m * k];
                dequantize_row(ty, &bytes, &mut w).unwrap();
                let turned: Vec<f32> = (0..k * m).map(|i| w[i % m * k + i / m]).collect();

                let mut y = vec![f32::NAN; n * m];
                linear.forward_exact(&x, n, Some(&bias), &mut y);
                near(&what, &y, &sums_of(&x, &turned, m, &bias.repeat(n)));
                let mut dx = before.clone();
                linear.backward(&dy, n, &mut dx);
                near(&what, &dx, &sums_of(&dy, &w, k, &before));
            }
        }
    });
}

/// The rows of the identity give the weights back, to the last bit those of the file.
#[test]
fn nothing_is_lost_in_packed_weights() {
    let identity = |n: usize| -> Vec<f32> {
        let one = |i: usize| if i / n == i % n { 1.0 } else { 0.0 };
        (0..n * n).map(one).collect()
    };
    let (m, k) = (53, 768);
    on_every_isa(|isa| {
        for ty in ALL {
            let bytes = matrix(ty, m, k, 23);
            let mut w = vec![0.0; m * k];
            dequantize_row(ty, &bytes, &mut w).unwrap();
            let linear = Linear::from_rows(ty, &bytes, m, k, Precision::Fast, || ()).unwrap();
            let mut found = vec![0.0; m * k];
            linear.backward(&identity(m), m, &mut found);
            assert!(found == w, "{} {isa:?} backward", ty.name());
            let mut turned = vec![0.0; k * m];
            linear.forward_exact(&identity(k), k, None, &mut turned);
            let same = (0..m * k).all(|i| turned[i % k * m + i / k] == w[i]);
            assert!(same, "{} {isa:?} forward", ty.name());
        }
    });
}

/// What is not packed is multiplied as ever.
#[test]
fn the_exact_product_of_wide_weights_is_the_plain_one() {
    let (m, k, n) = (19, 96, 5);
    let mut next = noise(3);
    let x: Vec<f32> = (0..n * k).map(|_| next()).collect();
    for ty in [GgmlType::F32, GgmlType::F16, GgmlType::BF16] {
        let bytes = matrix(ty, m, k, 5);
        let linear = Linear::from_rows(ty, &bytes, m, k, Precision::Fast, || ()).unwrap();
        let (mut plain, mut exact) = (vec![0.0; n * m], vec![0.0; n * m]);
        on_every_isa(|_| {
            linear.forward(&x, n, None, &mut plain);
            linear.forward_exact(&x, n, None, &mut exact);
            assert_eq!(plain, exact, "{}", ty.name());
        });
    }
}
