//! What the processor can do at most of the encoder's product.

use std::time::Instant;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::dispatch::{Isa, isa};
use crate::gemm::{Matrix, matmul_with};

/// GFLOP/s of all threads when the instruction of [`super`]'s bf16 product runs on registers alone; of
/// the f32 product of the `gemm` crate, on operands in the cache, where there is none. The best of `rounds`.
pub fn peak_gflops(rounds: usize) -> f64 {
    let threads = crate::threads();
    let best = (0..rounds.max(1)).map(|_| {
        let clock = Instant::now();
        let operations: f64 = (0..threads)
            .into_par_iter()
            .with_max_len(1)
            .map(|_| run())
            .sum();
        operations / clock.elapsed().as_secs_f64() / 1e9
    });
    best.fold(0.0, f64::max)
}

/// Some milliseconds of products on one thread; returns the number of operations.
fn run() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Amx {
        let rounds = 1 << 19;
        super::amx::spin(rounds);
        return rounds as f64 * 4.0 * (2 * 16 * 16 * 32) as f64;
    } else if isa() >= Isa::Avx512 {
        let rounds = 1 << 20;
        std::hint::black_box(super::avx512::spin(rounds));
        return rounds as f64 * 16.0 * 64.0;
    }
    let (m, n, k, rounds) = (128, 128, 256, 64);
    let (a, b) = (vec![1.0f32; m * k], vec![1.0f32; n * k]);
    let mut c = vec![0.0f32; m * n];
    for _ in 0..rounds {
        let (a, b) = (Matrix::row_major(&a, k), Matrix::transposed(&b, k));
        matmul_with(m, n, k, a, b, &mut c, n, false, 1);
    }
    std::hint::black_box(&c);
    (2 * m * n * k * rounds) as f64
}
