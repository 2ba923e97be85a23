//! The linear layers of the default model, for one row (decoding, bound by memory), 16 (a batch that
//! decodes) and 512 (a prompt). Throughput counts `2 out in n` operations.
//!
//! | rung | idea |
//! | --- | --- |
//! | `gemm f32` | weights dequantised to f32 ahead, the `gemm` crate: what a prompt costs without integer kernels, at 4 to 8 times the memory |
//! | `F32` | the reference: the same weights, sums in an order that does not depend on the batch |
//! | `Fast` | what ships: packed integers against int8 activations |

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use demur_bench::noise;
use demur_kernels::gemm::{Matrix, matmul};
use demur_kernels::linear::{Linear, Precision};
use demur_kernels::quant::{GgmlType, dequantize_row};

/// Random integers; the pattern keeps every f16 factor finite, as its top exponent bit is never set.
fn weights(ty: GgmlType, out: usize, inner: usize) -> Vec<u8> {
    let bytes = ty.row_bytes(inner).unwrap_or(0) * out;
    (0..bytes).map(|i| (i * 31 % 61) as u8).collect()
}

fn ladder(c: &mut Criterion) {
    let layers = [
        ("qkv", GgmlType::Q5_0, 128, 896),
        ("attention out", GgmlType::Q5_0, 896, 896),
        ("gate", GgmlType::Q5_0, 4864, 896),
        ("down", GgmlType::Q6K, 896, 4864),
        ("down", GgmlType::Q4K, 896, 4864),
        ("head", GgmlType::Q8_0, 151_936, 896),
    ];
    for (name, ty, out, inner) in layers {
        let bytes = weights(ty, out, inner);
        let mut group = c.benchmark_group(format!("linear/{name} {} {out}x{inner}", ty.name()));
        group.sample_size(10);
        let rungs: &[Precision] = if out > 100_000 {
            &[Precision::Fast]
        } else {
            &[Precision::F32, Precision::Fast]
        };
        for n in [1, 16, 512] {
            if out > 100_000 && n > 16 {
                continue; // only the last rows of a prompt go through the head
            }
            let x = noise(n * inner, 7);
            let mut y = vec![0.0; n * out];
            group.throughput(Throughput::Elements((2 * out * inner * n) as u64));
            for &precision in rungs {
                let linear = Linear::from_rows(ty, &bytes, out, inner, precision, || ())
                    .expect("the bytes are whole rows");
                group.bench_function(BenchmarkId::new(format!("{precision:?}"), n), |b| {
                    b.iter(|| linear.forward(&x, n, None, &mut y));
                });
            }
            if rungs.len() > 1 && n > 1 {
                let mut w = vec![0.0; out * inner];
                dequantize_row(ty, &bytes, &mut w).expect("the bytes are whole rows");
                group.bench_function(BenchmarkId::new("gemm f32", n), |b| {
                    b.iter(|| {
                        let (x, w) = (Matrix::row_major(&x, inner), Matrix::transposed(&w, inner));
                        matmul(n, out, inner, x, w, &mut y, false);
                    });
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, ladder);
criterion_main!(benches);
