//! What this machine can do at most: products on registers alone, and bytes read from memory. Every figure
//! is of all threads together, the best of some rounds.

use std::time::Instant;

use rayon::prelude::*;

#[cfg(target_arch = "x86_64")]
use crate::dispatch::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use crate::encoder;
use crate::gemm::{Matrix, matmul_with};
use crate::{ops, packed};

/// GFLOP/s of the instruction of the [`crate::encoder`]'s bf16 product; of the f32 product of the
/// `gemm` crate, on operands in the cache, where there is none.
pub fn product_gflops(rounds: usize) -> f64 {
    best(rounds, run)
}

/// GOP/s of the instruction of the int8 product with packed weights (a multiply-add is two operations);
/// `None` where it is not a single one.
pub fn int8_gops(rounds: usize) -> Option<f64> {
    packed::spin()?;
    Some(best(rounds, || packed::spin().unwrap_or(0.0)))
}

/// GB/s read from memory, each thread from 128 MB of its own.
pub fn read_gb_s(rounds: usize) -> f64 {
    const BYTES: usize = 128 << 20;
    let parts: Vec<Vec<u64>> = (0..crate::threads())
        .into_par_iter()
        .map(|i| vec![i as u64 | 1; BYTES / 8])
        .collect();
    let reads = |_| {
        let clock = Instant::now();
        let parts = parts.par_iter().with_max_len(1);
        parts.for_each(|part| {
            std::hint::black_box(ops::xor(part));
        });
        (crate::threads() * BYTES) as f64 / clock.elapsed().as_secs_f64() / 1e9
    };
    (0..rounds.max(1)).map(reads).fold(0.0, f64::max)
}

/// Operations a second of all threads, in 1e9, the best of `rounds`.
fn best(rounds: usize, one: impl Fn() -> f64 + Sync) -> f64 {
    let threads = crate::threads();
    let best = (0..rounds.max(1)).map(|_| {
        let clock = Instant::now();
        let operations: f64 = (0..threads)
            .into_par_iter()
            .with_max_len(1)
            .map(|_| one())
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
        encoder::amx::spin(rounds);
        return rounds as f64 * 4.0 * (2 * 16 * 16 * 32) as f64;
    } else if isa() >= Isa::Avx512 {
        let rounds = 1 << 20;
        std::hint::black_box(encoder::avx512::spin(rounds));
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
