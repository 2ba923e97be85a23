//! The `k` largest positive values of rows whose values come in groups.
//!
//! A row keeps candidates above a bar. When it has [`FULL`] times `k`, a bisection over the bits of the
//! values (positive floats are ordered as their bits are) finds a higher bar that at least `k` of them
//! reach, and the others go. So the bar rises with the logarithm of the number of groups, and nearly
//! every value is dropped by one comparison. Candidates stay in the order of their latents: of equal
//! values the lower latent wins, as later ones must exceed the bar.

use crate::dispatch::{Isa, isa};

/// Candidates, in multiples of `k`, at which the bar is raised.
const FULL: usize = 4;
/// Values of a vector.
const LANES: usize = 16;

/// Candidates of some rows.
#[derive(Debug, Default)]
pub(super) struct Candidates {
    k: usize,
    each: usize,
    bars: Vec<f32>,
    counts: Vec<u32>,
    vals: Vec<f32>, // [rows, each]
    idxs: Vec<u32>,
}

impl Candidates {
    /// Candidates for which a row has room.
    fn room(k: usize, group: usize) -> usize {
        FULL * k + group + LANES
    }

    /// Bytes of a row.
    pub(super) fn bytes(k: usize, group: usize) -> usize {
        8 * Self::room(k, group)
    }

    /// The bias of each latent, and of those that fill the last group one that never reaches a bar.
    pub(super) fn padded(bias: &[f32], group: usize) -> Vec<f32> {
        let mut bias = bias.to_vec();
        bias.resize(bias.len().next_multiple_of(group), f32::NEG_INFINITY);
        bias
    }

    /// Empties it, for `rows` rows and groups of `group`.
    pub(super) fn reset(&mut self, rows: usize, k: usize, group: usize) {
        self.k = k;
        self.each = Self::room(k, group);
        self.bars.clear();
        self.bars.resize(rows, 0.0);
        self.counts.clear();
        self.counts.resize(rows, 0);
        self.vals.resize(rows * self.each, 0.0);
        self.idxs.resize(rows * self.each, 0);
    }

    /// Takes what exceeds the bar of `sums + bias`, latents `first ..`.
    #[inline]
    pub(super) fn offer(&mut self, row: usize, sums: &[f32], bias: &[f32], first: u32) {
        let count = self.counts[row] as usize;
        let at = row * self.each;
        let (vals, idxs) = (
            &mut self.vals[at..at + self.each],
            &mut self.idxs[at..at + self.each],
        );
        assert!(sums.len() == bias.len() && count + sums.len() + LANES <= vals.len());
        let bar = self.bars[row];
        let added = append(
            sums,
            bias,
            bar,
            first,
            &mut vals[count..],
            &mut idxs[count..],
        );
        let mut count = count + added;
        if count >= FULL * self.k {
            let bar = raise(&vals[..count], self.k, self.k / 2);
            count = keep(vals, idxs, count, bar, usize::MAX);
            if count >= FULL * self.k {
                // Too many equal values.
                count = keep(vals, idxs, count, bar, self.k);
            }
            self.bars[row] = bar;
        }
        self.counts[row] = count as u32;
    }

    /// The row's `k` largest in the order of their latents; zeros where fewer were positive.
    pub(super) fn finish(&mut self, row: usize, idx: &mut [u32], val: &mut [f32]) {
        let mut count = self.counts[row] as usize;
        let at = row * self.each;
        let (vals, idxs) = (
            &mut self.vals[at..at + self.each],
            &mut self.idxs[at..at + self.each],
        );
        if count > self.k {
            let bar = raise(&vals[..count], self.k, 0);
            count = keep(vals, idxs, count, bar, self.k);
        }
        idx[..count].copy_from_slice(&idxs[..count]);
        val[..count].copy_from_slice(&vals[..count]);
        idx[count..].fill(0);
        val[count..].fill(0.0);
    }
}

/// A value that at least `k` of more than `k` positive values reach, and at most `k + slack` if there is
/// one; the largest such value if `slack` is 0.
fn raise(vals: &[f32], k: usize, slack: usize) -> f32 {
    let bits = |v: &f32| v.to_bits();
    let mut low = vals.iter().map(bits).min().unwrap_or(0);
    let mut high = vals.iter().map(bits).max().unwrap_or(0).saturating_add(1);
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        let reached = count_from(vals, middle);
        if reached >= k {
            low = middle;
            if reached <= k + slack {
                break;
            }
        } else {
            high = middle;
        }
    }
    f32::from_bits(low)
}

#[inline(always)]
fn count_body(vals: &[f32], bits: u32) -> usize {
    let mut count = 0u32;
    for v in vals {
        count += u32::from(v.to_bits() >= bits);
    }
    count as usize
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
fn count_avx512(vals: &[f32], bits: u32) -> usize {
    use std::arch::x86_64::*;
    let bar = _mm512_set1_epi32(bits as i32);
    let mut count = 0;
    for v in vals.chunks(LANES) {
        let lanes = (1u32 << v.len()).wrapping_sub(1) as u16;
        // SAFETY: masked lanes are not read.
        let v = unsafe { _mm512_maskz_loadu_epi32(lanes, v.as_ptr().cast()) };
        count += _mm512_mask_cmpge_epu32_mask(lanes, v, bar).count_ones();
    }
    count as usize
}

/// Positive values whose bits are at least `bits`.
fn count_from(vals: &[f32], bits: u32) -> usize {
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 {
        // SAFETY: `isa` returns a set only where the processor has it.
        return unsafe { count_avx512(vals, bits) };
    }
    count_body(vals, bits)
}

/// Keeps values that reach the bar, in order; at most `most`, those above the bar first. Returns how many.
fn keep(vals: &mut [f32], idxs: &mut [u32], count: usize, bar: f32, most: usize) -> usize {
    let above = vals[..count].iter().filter(|v| **v > bar).count();
    let mut equals = most.saturating_sub(above);
    let mut kept = 0;
    for i in 0..count {
        let v = vals[i];
        let equal = v == bar && equals > 0;
        equals -= usize::from(equal);
        (vals[kept], idxs[kept]) = (v, idxs[i]);
        kept += usize::from(v > bar || equal);
    }
    kept
}

/// Appends what exceeds the bar; returns how many.
fn append(
    sums: &[f32],
    bias: &[f32],
    bar: f32,
    first: u32,
    vals: &mut [f32],
    idxs: &mut [u32],
) -> usize {
    assert!(vals.len() >= sums.len() + LANES && idxs.len() >= sums.len() + LANES);
    #[cfg(target_arch = "x86_64")]
    if isa() >= Isa::Avx512 && sums.len().is_multiple_of(LANES) {
        // SAFETY: `isa` said AVX-512; there is room for all values and a vector more.
        return unsafe { append_avx512(sums, bias, bar, first, vals, idxs) };
    }
    let mut kept = 0;
    for (i, (s, b)) in sums.iter().zip(bias).enumerate() {
        let v = s + b;
        if v > bar {
            (vals[kept], idxs[kept]) = (v, first + i as u32);
            kept += 1;
        }
    }
    kept
}

/// # Safety
/// `vals` and `idxs` have room for a vector more than `sums`; `bias` is as long as `sums`.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,popcnt")]
unsafe fn append_avx512(
    sums: &[f32],
    bias: &[f32],
    bar: f32,
    first: u32,
    vals: &mut [f32],
    idxs: &mut [u32],
) -> usize {
    use std::arch::x86_64::*;
    let bar = _mm512_set1_ps(bar);
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    let mut ids = _mm512_add_epi32(_mm512_set1_epi32(first as i32), lanes);
    let mut kept = 0;
    for at in (0..sums.len()).step_by(LANES) {
        // SAFETY: a whole vector of both.
        let v = unsafe {
            _mm512_add_ps(
                _mm512_loadu_ps(sums.as_ptr().add(at)),
                _mm512_loadu_ps(bias.as_ptr().add(at)),
            )
        };
        let above = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(v, bar);
        // SAFETY: the caller's promise: at most `sums.len()` were kept, and a vector fits behind.
        unsafe {
            _mm512_storeu_ps(
                vals.as_mut_ptr().add(kept),
                _mm512_maskz_compress_ps(above, v),
            );
            _mm512_storeu_epi32(
                idxs.as_mut_ptr().add(kept).cast(),
                _mm512_maskz_compress_epi32(above, ids),
            );
        }
        kept += above.count_ones() as usize;
        ids = _mm512_add_epi32(ids, _mm512_set1_epi32(LANES as i32));
    }
    kept
}
