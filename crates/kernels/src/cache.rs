//! Keys or values of one sequence at one layer, in f32 or rounded.
//!
//! | format | bytes a value | how |
//! | --- | --- | --- |
//! | [`CacheFormat::F32`] | 4 | as they are |
//! | [`CacheFormat::Bf16`] | 2 | rounded to the nearest, ties to even |
//! | [`CacheFormat::Int8`] | 1.125 | 32 values of a head share `max |x| / 127` (GGUF's Q8_0, its scale in f32) |
//!
//! A row is rounded once, when it is added, by itself: what a cache holds does not depend on how its
//! tokens came, so that pieces, batches and copies give the same bits.

use half::bf16;

use crate::dispatch::{Isa, isa};

/// Values of a head that share a scale in [`CacheFormat::Int8`].
const BLOCK: usize = 32;

/// What keys and values are kept as.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CacheFormat {
    /// 4 bytes a value, exact.
    #[default]
    F32,
    /// 2 bytes a value.
    Bf16,
    /// 9/8 bytes a value where a head's width is a multiple of 32.
    Int8,
}

impl CacheFormat {
    /// Bytes of a head of `d_head` values.
    pub fn bytes(self, d_head: usize) -> usize {
        match self {
            Self::F32 => 4 * d_head,
            Self::Bf16 => 2 * d_head,
            Self::Int8 => d_head + size_of::<f32>() * d_head.div_ceil(BLOCK),
        }
    }
}

/// Heads of `d_head` values, one after the other: `[positions, n_kv_heads, d_head]`.
#[derive(Debug)]
pub struct CacheRows {
    d_head: usize,
    store: Store,
}

#[derive(Debug, Clone)]
enum Store {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    /// `[heads, d_head]` and `[heads, ceil(d_head / BLOCK)]`.
    Int8(Vec<i8>, Vec<f32>),
}

impl CacheRows {
    /// None yet.
    ///
    /// # Panics
    /// If `d_head` is 0.
    pub fn new(format: CacheFormat, d_head: usize) -> Self {
        assert!(d_head > 0, "a head has a width");
        let store = match format {
            CacheFormat::F32 => Store::F32(Vec::new()),
            CacheFormat::Bf16 => Store::Bf16(Vec::new()),
            CacheFormat::Int8 => Store::Int8(Vec::new(), Vec::new()),
        };
        Self { d_head, store }
    }

    /// Heads that it holds.
    pub fn heads(&self) -> usize {
        let values = match &self.store {
            Store::F32(values) => values.len(),
            Store::Bf16(values) => values.len(),
            Store::Int8(codes, _) => codes.len(),
        };
        values / self.d_head
    }

    /// Forgets all heads from number `heads` on.
    pub fn truncate(&mut self, heads: usize) {
        let n = heads * self.d_head;
        match &mut self.store {
            Store::F32(values) => values.truncate(n),
            Store::Bf16(values) => values.truncate(n),
            Store::Int8(codes, scales) => {
                codes.truncate(n);
                scales.truncate(heads * self.d_head.div_ceil(BLOCK));
            }
        }
    }

    /// Adds whole heads.
    pub fn push(&mut self, x: &[f32]) {
        debug_assert!(x.len().is_multiple_of(self.d_head), "whole heads");
        match &mut self.store {
            Store::F32(values) => values.extend_from_slice(x),
            Store::Bf16(values) => values.extend(x.iter().map(|&x| bf16::from_f32(x))),
            Store::Int8(codes, scales) => {
                for block in x.chunks(self.d_head).flat_map(|head| head.chunks(BLOCK)) {
                    let max = block.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                    let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
                    scales.push(max / 127.0);
                    codes.extend(block.iter().map(|x| (x * inverse).round_ties_even() as i8));
                }
            }
        }
    }

    /// The values, where they are kept as they are.
    pub(crate) fn as_f32(&self) -> Option<&[f32]> {
        match &self.store {
            Store::F32(values) => Some(values),
            _ => None,
        }
    }

    /// Every `step`-th head from `first` on, `n` of them, in f32, into `out [n, d_head]`.
    ///
    /// # Panics
    /// If it does not hold them.
    pub(crate) fn widen(&self, first: usize, step: usize, n: usize, out: &mut Vec<f32>) {
        #[cfg(target_arch = "x86_64")]
        if isa() >= Isa::Avx512 {
            // SAFETY: `isa` returns a set only where the processor has it.
            return unsafe { self.widen_avx512(first, step, n, out) };
        } else if isa() >= Isa::Avx2 {
            // SAFETY: as above.
            return unsafe { self.widen_avx2(first, step, n, out) };
        }
        self.widen_body(first, step, n, out);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn widen_avx512(&self, first: usize, step: usize, n: usize, out: &mut Vec<f32>) {
        self.widen_body(first, step, n, out);
    }

    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn widen_avx2(&self, first: usize, step: usize, n: usize, out: &mut Vec<f32>) {
        self.widen_body(first, step, n, out);
    }

    #[inline(always)]
    fn widen_body(&self, first: usize, step: usize, n: usize, out: &mut Vec<f32>) {
        let d = self.d_head;
        out.resize(n * d, 0.0);
        let out = out.chunks_exact_mut(d).enumerate();
        match &self.store {
            Store::F32(values) => {
                for (i, out) in out {
                    out.copy_from_slice(&values[(first + i * step) * d..][..d]);
                }
            }
            Store::Bf16(values) => {
                for (i, out) in out {
                    let head = &values[(first + i * step) * d..][..d];
                    for (out, x) in out.iter_mut().zip(head) {
                        *out = f32::from_bits(u32::from(x.to_bits()) << 16);
                    }
                }
            }
            Store::Int8(codes, scales) => {
                let blocks = d.div_ceil(BLOCK);
                for (i, out) in out {
                    let at = first + i * step;
                    let head = codes[at * d..][..d].chunks(BLOCK);
                    let scales = &scales[at * blocks..][..blocks];
                    for ((out, codes), scale) in out.chunks_mut(BLOCK).zip(head).zip(scales) {
                        for (out, code) in out.iter_mut().zip(codes) {
                            *out = f32::from(*code) * scale;
                        }
                    }
                }
            }
        }
    }

    /// Bytes that it takes, room for growth included.
    pub fn bytes(&self) -> usize {
        match &self.store {
            Store::F32(values) => values.capacity() * size_of::<f32>(),
            Store::Bf16(values) => values.capacity() * size_of::<bf16>(),
            Store::Int8(codes, scales) => codes.capacity() + scales.capacity() * size_of::<f32>(),
        }
    }
}

impl Clone for CacheRows {
    fn clone(&self) -> Self {
        Self {
            d_head: self.d_head,
            store: self.store.clone(),
        }
    }

    /// In the memory that it has, where the format is the same.
    fn clone_from(&mut self, other: &Self) {
        self.d_head = other.d_head;
        match (&mut self.store, &other.store) {
            (Store::F32(to), Store::F32(from)) => to.clone_from(from),
            (Store::Bf16(to), Store::Bf16(from)) => to.clone_from(from),
            (Store::Int8(codes, scales), Store::Int8(from_codes, from_scales)) => {
                codes.clone_from(from_codes);
                scales.clone_from(from_scales);
            }
            (to, from) => *to = from.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::on_every_isa;
    use crate::testing::noise;

    fn widened(rows: &CacheRows, first: usize, step: usize, n: usize) -> Vec<f32> {
        let mut out = Vec::new();
        rows.widen(first, step, n, &mut out);
        out
    }

    #[test]
    fn int8_by_hand() {
        let mut rows = CacheRows::new(CacheFormat::Int8, 4);
        rows.push(&[254.0, -127.0, 1.0, 3.0, 0.0, 0.0, 0.0, 0.0]);
        // the scale is 2; 1/2 and 3/2 go to the even neighbour
        assert_eq!(widened(&rows, 0, 1, 1), [254.0, -128.0, 0.0, 4.0]);
        assert_eq!(widened(&rows, 1, 1, 1), [0.0; 4]);
        // two heads of four codes and a scale
        let Store::Int8(codes, scales) = &rows.store else {
            panic!("the format is int8")
        };
        let bytes = codes.len() + 4 * scales.len();
        assert_eq!(bytes, 2 * CacheFormat::Int8.bytes(4));
        assert_eq!(CacheFormat::Int8.bytes(64), 72);
    }

    #[test]
    fn bf16_by_hand() {
        let mut rows = CacheRows::new(CacheFormat::Bf16, 2);
        // 8 bits of mantissa: 257 lies between 256 and 258
        rows.push(&[257.0, -0.1]);
        assert_eq!(widened(&rows, 0, 1, 1), [256.0, -0.100_097_656]);
    }

    #[test]
    fn rounding_stays_within_its_bound() {
        on_every_isa(|_| {
            let (d, kv) = (40, 3);
            let x = noise(7 * kv * d, 5);
            for (format, bound) in [
                (CacheFormat::F32, 0.0),
                (CacheFormat::Bf16, 1.0 / 256.0),
                (CacheFormat::Int8, 0.5 / 127.0),
            ] {
                let mut rows = CacheRows::new(format, d);
                // in pieces, with a stretch that is taken back
                rows.push(&x[..2 * kv * d]);
                rows.push(&x[..kv * d]);
                rows.truncate(2 * kv);
                rows.push(&x[2 * kv * d..]);
                assert_eq!(rows.heads(), 7 * kv);
                let max = x.iter().fold(0.0f32, |max, x| max.max(x.abs()));
                for h in 0..kv {
                    let got = widened(&rows, kv + h, kv, 6);
                    let expected = (1..7).flat_map(|p| &x[(p * kv + h) * d..][..d]);
                    for (g, e) in got.iter().zip(expected) {
                        assert!((g - e).abs() <= bound * max, "{format:?}: {g} for {e}");
                    }
                }
                let mut copy = CacheRows::new(CacheFormat::F32, 1);
                copy.clone_from(&rows);
                assert_eq!(widened(&copy, 0, 1, 21), widened(&rows, 0, 1, 21));
            }
        });
    }
}
