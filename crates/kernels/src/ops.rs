//! The small operations of a decoder: norms, rotary embedding, activations, softmax, top-k.
//!
//! Bodies are plain Rust that vectorises; on x86-64 each is compiled again for AVX2 and AVX-512 and chosen
//! by [`crate::dispatch`]. Nothing is fused or reordered, so all give the same bits.

use crate::pool;

/// Below this many elements an operation runs on one thread.
const PARALLEL_FROM: usize = 1 << 15;

/// Defines `$name` with an instance of `$body` for each instruction set.
macro_rules! dispatched {
    ($(#[$doc:meta])* $vis:vis fn $name:ident / $body:ident ($($arg:ident: $ty:ty),*) $(-> $ret:ty)?) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::dispatch::{Isa, isa};
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body($($arg),*)
                }
                if isa() >= Isa::Avx512 {
                    // SAFETY: `isa` returns Avx512 or more only where the processor has these features.
                    return unsafe { avx512($($arg),*) };
                } else if isa() >= Isa::Avx2 {
                    // SAFETY: as above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use dispatched;

/// `e^x` to within 2e-7 relative, without branches so that it vectorises: `2^n e^r` with
/// `n = round(x / ln 2)` and the polynomial of Cephes' `expf` for `|r| <= ln 2 / 2`. Below -87.3 the
/// result is 0 to within 2e-38; above 88 it is clamped to `e^88`.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    const ROUND_BITS: u32 = ROUND.to_bits();
    let x = x.clamp(-87.3, 88.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_2e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    // The low bits of `rounded` are those of the integer `n`; a cast would be done one by one.
    let scale = f32::from_bits(rounded.to_bits().wrapping_sub(ROUND_BITS - 127) << 23);
    (p * r * r + r + 1.0) * scale
}

/// `tanh x` to within 3e-7 relative, without branches: Cephes' `tanhf`, an odd polynomial below 0.625
/// in magnitude and `1 - 2 / (e^{2 x} + 1)` above.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let s = x * x;
    let mut p = -5.704_988_7e-3;
    p = p * s + 2.063_909e-2;
    p = p * s - 5.373_971_6e-2;
    p = p * s + 1.333_144_2e-1;
    p = p * s - 3.333_328e-1;
    let near = x + x * s * p;
    let far = 1.0 - 2.0 / (exp(2.0 * x.abs()) + 1.0);
    if x.abs() < 0.625 {
        near
    } else {
        far.copysign(x)
    }
}

/// Sum with eight running lanes, in a fixed order.
#[inline(always)]
fn lanes_sum(a: [f32; 8]) -> f32 {
    ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]))
}

#[inline(always)]
fn dot_body(a: &[f32], b: &[f32]) -> f32 {
    let mut acc = [0.0f32; 8];
    let (whole_a, rest_a) = a.as_chunks::<8>();
    let (whole_b, rest_b) = b.as_chunks::<8>();
    for (a, b) in whole_a.iter().zip(whole_b) {
        for i in 0..8 {
            acc[i] += a[i] * b[i];
        }
    }
    lanes_sum(acc) + rest_a.iter().zip(rest_b).map(|(a, b)| a * b).sum::<f32>()
}

dispatched! {
    /// `a . b`.
    pub fn dot / dot_body (a: &[f32], b: &[f32]) -> f32
}

#[inline(always)]
fn axpy_body(alpha: f32, x: &[f32], y: &mut [f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += alpha * x;
    }
}

dispatched! {
    /// `y += alpha x`.
    pub fn axpy / axpy_body (alpha: f32, x: &[f32], y: &mut [f32])
}

#[inline(always)]
fn xor_body(x: &[u64]) -> u64 {
    let mut acc = [0u64; 64];
    for x in x.as_chunks::<64>().0 {
        for i in 0..64 {
            acc[i] ^= x[i];
        }
    }
    acc.into_iter().fold(0, |a, b| a ^ b)
}

dispatched! {
    /// All of `x` in one number, as fast as it can be read; a rest below 64 is left out.
    pub(crate) fn xor / xor_body (x: &[u64]) -> u64
}

/// `x += y`.
pub fn add(x: &mut [f32], y: &[f32]) {
    in_chunks(x, y, |x, y| axpy(1.0, y, x));
}

#[inline(always)]
fn rms_row(x: &[f32], w: &[f32], eps: f32, plus: f32, out: &mut [f32]) {
    let scale = 1.0 / (dot_body(x, x) / x.len() as f32 + eps).sqrt();
    for ((o, x), w) in out.iter_mut().zip(x).zip(w) {
        *o = x * scale * (w + plus);
    }
}

dispatched! {
    fn rms_one / rms_row (x: &[f32], w: &[f32], eps: f32, plus: f32, out: &mut [f32])
}

/// RMS norm of each row: `out = x / sqrt(mean(x^2) + eps) * w`, with `1 + w` instead of `w` if
/// `plus_one` (Gemma, as its safetensors store it).
///
/// # Shapes
/// `x` and `out` are `[n, w.len()]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, plus_one: bool, out: &mut [f32]) {
    let plus = if plus_one { 1.0 } else { 0.0 };
    let d = w.len().max(1);
    if x.len() < PARALLEL_FROM {
        for (x, out) in x.chunks_exact(d).zip(out.chunks_exact_mut(d)) {
            rms_one(x, w, eps, plus, out);
        }
    } else {
        pool::for_each_row(out, d, |i, out| {
            rms_one(&x[i * d..(i + 1) * d], w, eps, plus, out);
        });
    }
}

/// Runs `one` on every row of `width` values, with its index.
fn in_rows(x: &mut [f32], width: usize, one: impl Fn(usize, &mut [f32]) + Sync) {
    let width = width.max(1);
    if x.len() < PARALLEL_FROM {
        x.chunks_exact_mut(width)
            .enumerate()
            .for_each(|(i, row)| one(i, row));
    } else {
        pool::for_each_row(x, width, one);
    }
}

/// RMS norm in place, for the per-head norms of queries and keys.
///
/// # Shapes
/// `x` is `[n, w.len()]`.
pub fn rms_norm_in_place(x: &mut [f32], w: &[f32], eps: f32, plus_one: bool) {
    let plus = if plus_one { 1.0 } else { 0.0 };
    in_rows(x, w.len(), |_, row| {
        let scale = 1.0 / (dot(row, row) / row.len() as f32 + eps).sqrt();
        for (x, w) in row.iter_mut().zip(w) {
            *x = *x * scale * (w + plus);
        }
    });
}

/// Which pairs of a head's values a rotary embedding turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RopeStyle {
    /// `(x[i], x[i + rot_dim / 2])`: Hugging Face's layout.
    #[default]
    Neox,
    /// `(x[2 i], x[2 i + 1])`: the layout of Llama's GGUF files.
    Interleaved,
}

/// Cosines and sines of a batch of positions, computed once a forward pass for each rope base.
#[derive(Debug, Clone, Default)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>, // [n, rot_dim / 2]
    sin: Vec<f32>,
}

impl RopeTable {
    /// Adds `cos(p f) scale` and `sin(p f) scale` for every position `p` and inverse frequency `f`.
    pub fn extend(&mut self, positions: std::ops::Range<usize>, inv_freq: &[f32], scale: f32) {
        self.half = inv_freq.len();
        for p in positions {
            for f in inv_freq {
                let (sin, cos) = (p as f32 * f).sin_cos();
                self.cos.push(cos * scale);
                self.sin.push(sin * scale);
            }
        }
    }

    /// Turns `x` in place.
    ///
    /// # Shapes
    /// `x` is `[n, heads, d_head]` for the table's `n` positions; of each head the first
    /// `2 * inv_freq.len()` values are turned.
    pub fn apply(&self, x: &mut [f32], heads: usize, d_head: usize, style: RopeStyle) {
        self.turn(x, heads, d_head, style, false);
    }

    /// The transpose of [`Self::apply`], for gradients: the same turn the other way round, with the
    /// same scale. Shapes as there.
    pub fn apply_transposed(&self, x: &mut [f32], heads: usize, d_head: usize, style: RopeStyle) {
        self.turn(x, heads, d_head, style, true);
    }

    /// Turns each pair; the other way round if its values swap places.
    fn turn(&self, x: &mut [f32], heads: usize, d_head: usize, style: RopeStyle, swap: bool) {
        let half = self.half;
        in_rows(x, heads * d_head, |i, row| {
            let at = i * half..(i + 1) * half;
            let (cos, sin) = (&self.cos[at.clone()], &self.sin[at]);
            for head in row.chunks_exact_mut(d_head) {
                match style {
                    RopeStyle::Neox => {
                        let (a, b) = head[..2 * half].split_at_mut(half);
                        let (a, b) = if swap { (b, a) } else { (a, b) };
                        rotate(a, b, cos, sin);
                    }
                    RopeStyle::Interleaved => {
                        let pairs = head[..2 * half].as_chunks_mut::<2>().0;
                        for ([a, b], (cos, sin)) in pairs.iter_mut().zip(cos.iter().zip(sin)) {
                            let (a, b) = if swap { (b, a) } else { (a, b) };
                            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                        }
                    }
                }
            }
        });
    }
}

#[inline(always)]
fn rotate_body(a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32]) {
    for ((a, b), (cos, sin)) in a.iter_mut().zip(b).zip(cos.iter().zip(sin)) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

dispatched! {
    fn rotate / rotate_body (a: &mut [f32], b: &mut [f32], cos: &[f32], sin: &[f32])
}

#[inline(always)]
fn silu_body(gate: &mut [f32], up: &[f32]) {
    for (g, u) in gate.iter_mut().zip(up) {
        *g = *g / (1.0 + exp(-*g)) * u;
    }
}

dispatched! {
    fn silu_one / silu_body (gate: &mut [f32], up: &[f32])
}

#[inline(always)]
fn gelu_body(gate: &mut [f32], up: &[f32]) {
    // 0.5 x (1 + tanh z) = x / (1 + e^{-2 z}), z = sqrt(2 / pi) (x + 0.044715 x^3)
    for (g, u) in gate.iter_mut().zip(up) {
        let x = *g;
        let z = 0.797_884_6 * (x + 0.044_715 * x * x * x);
        *g = x / (1.0 + exp(-2.0 * z)) * u;
    }
}

dispatched! {
    fn gelu_one / gelu_body (gate: &mut [f32], up: &[f32])
}

fn in_chunks(x: &mut [f32], y: &[f32], one: fn(&mut [f32], &[f32])) {
    if x.len() < PARALLEL_FROM {
        one(x, y);
    } else {
        pool::for_each_row(x, 8192, |i, x| {
            let from = i * 8192;
            one(x, &y[from..from + x.len()]);
        });
    }
}

/// What is applied to the gate of an MLP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// The tanh approximation of gelu (Gemma).
    GeluTanh,
}

/// `gate = act(gate) * up`, on this thread.
pub(crate) fn gate_one(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => silu_one(gate, up),
        Activation::GeluTanh => gelu_one(gate, up),
    }
}

/// `gate = act(gate) * up`.
pub fn gated(activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => in_chunks(gate, up, silu_one),
        Activation::GeluTanh => in_chunks(gate, up, gelu_one),
    }
}

#[inline(always)]
fn softcap_body(x: &mut [f32], cap: f32) {
    for v in x {
        *v = cap * tanh(*v / cap);
    }
}

dispatched! {
    fn softcap_one / softcap_body (x: &mut [f32], cap: f32)
}

/// `x = cap tanh(x / cap)`.
pub fn softcap(x: &mut [f32], cap: f32) {
    if x.len() < PARALLEL_FROM {
        softcap_one(x, cap);
    } else {
        pool::for_each_row(x, 8192, |_, x| softcap_one(x, cap));
    }
}

#[inline(always)]
fn softmax_body(x: &mut [f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; 8];
    let (whole, rest) = x.as_chunks::<8>();
    for c in whole {
        for i in 0..8 {
            lanes[i] = lanes[i].max(c[i]);
        }
    }
    let max = lanes
        .iter()
        .chain(rest)
        .copied()
        .fold(f32::NEG_INFINITY, f32::max);
    let mut sums = [0.0f32; 8];
    let (whole, rest) = x.as_chunks_mut::<8>();
    for c in whole {
        for i in 0..8 {
            c[i] = exp(c[i] - max);
            sums[i] += c[i];
        }
    }
    let mut sum = lanes_sum(sums);
    for v in rest {
        *v = exp(*v - max);
        sum += *v;
    }
    let inverse = 1.0 / sum;
    for v in x.iter_mut() {
        *v *= inverse;
    }
    sum
}

dispatched! {
    /// Softmax in place; returns the sum of `e^(x - max)`.
    pub fn softmax / softmax_body (x: &mut [f32]) -> f32
}

/// `ln sum e^x`, accumulated in f64.
pub fn logsumexp(x: &[f32]) -> f32 {
    let max = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    if !max.is_finite() {
        return max;
    }
    let sum: f64 = x.iter().map(|&v| f64::from(v - max).exp()).sum();
    (f64::from(max) + sum.ln()) as f32
}

/// Log-probability of `id` under `logits`.
pub fn log_softmax_at(logits: &[f32], id: usize) -> f32 {
    logits[id] - logsumexp(logits)
}

/// The `k` largest values with their indices, largest first; of equal ones the lower index first.
/// NaN counts as smaller than everything. One pass with a threshold, then a sort of what is left.
pub fn top_k_indices(x: &[f32], k: usize, out: &mut Vec<(u32, f32)>) {
    out.clear();
    let k = k.min(x.len());
    if k == 0 {
        return;
    }
    let key = |v: f32| if v.is_nan() { f32::NEG_INFINITY } else { v };
    let order = |a: &(u32, f32), b: &(u32, f32)| key(b.1).total_cmp(&key(a.1)).then(a.0.cmp(&b.0));
    let mut bar = f32::NEG_INFINITY;
    for (i, &v) in x.iter().enumerate() {
        // Of equal values the earlier index wins, so a later one must exceed the bar.
        if out.len() < k || key(v) > bar {
            out.push((i as u32, v));
            if out.len() == 4 * k.max(16) {
                out.select_nth_unstable_by(k - 1, order);
                out.truncate(k);
                bar = out
                    .iter()
                    .map(|&(_, v)| key(v))
                    .fold(f32::INFINITY, f32::min);
            }
        }
    }
    out.sort_unstable_by(order);
    out.truncate(k);
}

/// Index of the largest value, the first of equals; 0 for an empty slice.
pub fn argmax(x: &[f32]) -> usize {
    let mut best = 0;
    for (i, v) in x.iter().enumerate() {
        if *v > x[best] || x[best].is_nan() {
            best = i;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn close(found: &[f32], expected: &[f32]) {
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            let near = (f - e).abs() <= 1e-6 + 1e-6 * e.abs();
            assert!(near, "at {i}: {f} against {e}");
        }
    }

    #[test]
    fn exp_is_accurate() {
        for i in -8700..8800 {
            let x = i as f32 * 0.01;
            let expected = f64::from(x).exp();
            let relative = (f64::from(exp(x)) - expected).abs() / expected;
            assert!(relative < 2e-7, "exp({x}): {relative}");
        }
        assert!(exp(-200.0) < 2e-38);
    }

    #[test]
    fn tanh_is_accurate() {
        for i in -3000..3000 {
            let x = i as f32 * 0.004 + 1e-4;
            let expected = f64::from(x).tanh();
            let relative = ((f64::from(tanh(x)) - expected) / expected).abs();
            assert!(relative < 3e-7, "tanh({x}): {relative}");
        }
        assert_eq!((tanh(1e30), tanh(-1e30), tanh(0.0)), (1.0, -1.0, 0.0));
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn norm_by_hand() {
        // mean of squares of (3, 4) is 12.5
        let mut out = [0.0; 2];
        rms_norm(&[3.0, 4.0], &[2.0, 1.0], 0.0, false, &mut out);
        close(&out, &[6.0 / 12.5f32.sqrt(), 4.0 / 12.5f32.sqrt()]);
        rms_norm(&[3.0, 4.0], &[1.0, 0.0], 0.0, true, &mut out);
        close(&out, &[6.0 / 12.5f32.sqrt(), 4.0 / 12.5f32.sqrt()]);
    }

    #[test]
    fn rope_turns_by_the_angle() {
        let mut table = RopeTable::default();
        table.extend(0..2, &[std::f32::consts::FRAC_PI_2, 0.0], 1.0);
        let mut x = [1.0, 2.0, 3.0, 4.0, 9.0, 1.0, 2.0, 3.0, 4.0, 9.0];
        table.apply(&mut x, 1, 5, RopeStyle::Neox);
        close(&x, &[1.0, 2.0, 3.0, 4.0, 9.0, -3.0, 2.0, 1.0, 4.0, 9.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0, 1.0, 2.0, 3.0, 4.0];
        table.apply(&mut x, 1, 4, RopeStyle::Interleaved);
        close(&x, &[1.0, 2.0, 3.0, 4.0, -2.0, 1.0, 3.0, 4.0]);
    }

    #[test]
    fn activations_by_hand() {
        let mut g = [0.0, 1.0, -2.0];
        gated(Activation::Silu, &mut g, &[1.0, 2.0, 1.0]);
        close(&g, &[0.0, 2.0 * 0.731_058_6, -2.0 * 0.119_202_92]);
        let mut g = [0.0, 1.0, -1.0];
        gated(Activation::GeluTanh, &mut g, &[1.0, 1.0, 2.0]);
        close(&g, &[0.0, 0.841_192, -0.317_616]);
        let mut x = [50.0];
        softcap(&mut x, 50.0);
        close(&x, &[50.0 * 0.761_594_2]);
    }

    #[test]
    fn softmax_and_log_probabilities() {
        let mut x: Vec<f32> = (0..19).map(|i| (i % 7) as f32 * 0.5).collect();
        let expected: Vec<f32> = {
            let sum: f64 = x.iter().map(|v| f64::from(*v).exp()).sum();
            x.iter()
                .map(|v| (f64::from(*v).exp() / sum) as f32)
                .collect()
        };
        let log = log_softmax_at(&x, 3);
        softmax(&mut x);
        close(&x, &expected);
        close(&[log.exp()], &[expected[3]]);
    }

    #[test]
    fn top_k_agrees_with_a_sort() {
        let mut state = 1u32;
        for n in [0usize, 1, 5, 100, 3000] {
            let x: Vec<f32> = (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 24) as f32 // many ties
                })
                .collect();
            for k in [0, 1, 3, 40, 5000] {
                let mut all: Vec<(u32, f32)> =
                    x.iter().enumerate().map(|(i, &v)| (i as u32, v)).collect();
                all.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                all.truncate(k);
                let mut found = Vec::new();
                top_k_indices(&x, k, &mut found);
                assert_eq!(found, all, "n {n} k {k}");
            }
        }
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), 1);
        assert_eq!(argmax(&[f32::NAN, 3.0]), 1);
    }
}
