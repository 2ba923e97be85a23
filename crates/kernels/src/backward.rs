//! Gradients of a decoder's small operations: norms, gated activations, soft caps, attention.
//!
//! With `L` a scalar, `dy` is `dL/dy` of an operation's output and `dx` of its input; each function
//! here turns the one into the other, given what the operation read. They serve attribution, which
//! runs a sequence at a time and only back to a site: there are no gradients of weights. Those of
//! products are [`Linear::backward`](crate::linear::Linear::backward), those of the rotary embedding
//! [`RopeTable::apply_transposed`](crate::ops::RopeTable::apply_transposed).
//!
//! Against the products they cost little, so they are plain loops, and sums run in a fixed order.

use crate::attention::AttentionShape;
use crate::ops::{self, Activation, axpy, dot};
use crate::pool;

/// RMS norm, `y = x s w` with `s = 1 / sqrt(mean(x^2) + eps)`: adds
/// `s w dy - x s^3 mean(w dy x)` to `dx`; with `plus_one` the weight is `1 + w`.
///
/// # Shapes
/// `x`, `dy` and `dx` are `[n, w.len()]`.
pub fn rms_norm(x: &[f32], w: &[f32], eps: f32, plus_one: bool, dy: &[f32], dx: &mut [f32]) {
    let plus = if plus_one { 1.0 } else { 0.0 };
    let d = w.len().max(1);
    let rows = x.chunks_exact(d).zip(dy.chunks_exact(d));
    for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(d)) {
        let s = 1.0 / (dot(x, x) / d as f32 + eps).sqrt();
        let weighted = || dy.iter().zip(w).map(|(dy, w)| dy * (w + plus));
        let along: f32 = weighted().zip(x).map(|(g, x)| g * x).sum();
        let back = s * s * s * along / d as f32;
        for ((dx, g), x) in dx.iter_mut().zip(weighted()).zip(x) {
            *dx += s * g - back * x;
        }
    }
}

/// Gated activation, `y = act(gate) * up`: `gate` and `up` become their own gradients,
/// `act'(gate) up dy` and `act(gate) dy`.
///
/// # Shapes
/// All have the same length.
pub fn gated(activation: Activation, gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
        let (act, slope) = match activation {
            Activation::Silu => silu(*gate),
            Activation::GeluTanh => gelu(*gate),
        };
        (*gate, *up) = (slope * *up * dy, act * dy);
    }
}

/// `x σ(x)` and its slope, `σ (1 + x (1 - σ))`.
fn silu(x: f32) -> (f32, f32) {
    let sigma = 1.0 / (1.0 + ops::exp(-x));
    (x * sigma, sigma * (1.0 + x * (1.0 - sigma)))
}

/// `x σ(2 z)` with `z = sqrt(2 / pi) (x + 0.044715 x^3)`, the tanh approximation of gelu, and its
/// slope, `σ (1 + 2 x (1 - σ) z')`.
fn gelu(x: f32) -> (f32, f32) {
    const C: f32 = 0.797_884_6;
    let z = C * (x + 0.044_715 * x * x * x);
    let slope_of_z = C * (1.0 + 3.0 * 0.044_715 * x * x);
    let sigma = 1.0 / (1.0 + ops::exp(-2.0 * z));
    (
        x * sigma,
        sigma * (1.0 + 2.0 * x * (1.0 - sigma) * slope_of_z),
    )
}

/// Soft cap, `y = cap tanh(x / cap)`: `dy` becomes `dx = (1 - (y / cap)^2) dy`.
///
/// # Shapes
/// `y`, the capped values, and `dy` have the same length.
pub fn softcap(y: &[f32], cap: f32, dy: &mut [f32]) {
    for (y, dy) in y.iter().zip(dy) {
        *dy *= cap_slope(*y, cap);
    }
}

fn cap_slope(y: f32, cap: f32) -> f32 {
    1.0 - (y / cap) * (y / cap)
}

/// What attention over one whole sequence read, and the gradient of what it wrote.
#[derive(Debug, Clone, Copy)]
pub struct Attended<'a> {
    /// Queries as scored, `[n, n_heads, d_head]`.
    pub q: &'a [f32],
    /// Keys as scored, `[n, n_kv_heads, d_head]`.
    pub k: &'a [f32],
    /// As `k`.
    pub v: &'a [f32],
    /// Gradient of the output, as `q`.
    pub dy: &'a [f32],
}

/// Gradients of an attention's inputs, with their shapes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AttentionGradient {
    /// As the queries.
    pub q: Vec<f32>,
    /// As the keys.
    pub k: Vec<f32>,
    /// As the values.
    pub v: Vec<f32>,
}

/// Causal attention of a sequence that is not cached, `y = sum_j p_j v_j` with
/// `p = softmax_j(cap(scale q k_j))` over the positions that a query sees.
///
/// With `g_j = dy v_j`, of a score before its cap the gradient is
/// `ds_j = p_j (g_j - sum_i p_i g_i) cap'`, so `dq = scale sum_j ds_j k_j`, `dk_j = scale ds_j q` and
/// `dv_j = p_j dy`, summed over queries, and over the heads that share keys in their order. The
/// probabilities are computed again, a query at a time: memory is linear in the length.
///
/// # Panics
/// If a slice has another length than its shape says.
pub fn attention(shape: &AttentionShape, seq: Attended<'_>) -> AttentionGradient {
    let AttentionShape {
        n_heads,
        n_kv_heads,
        d_head,
        ..
    } = *shape;
    let (q_row, kv_row) = (n_heads * d_head, n_kv_heads * d_head);
    let n = seq.q.len() / q_row.max(1);
    assert!(
        seq.q.len() == n * q_row && seq.dy.len() == n * q_row,
        "q and dy are [n, n_heads, d_head]"
    );
    assert!(
        seq.k.len() == n * kv_row && seq.v.len() == n * kv_row,
        "k and v are [n, n_kv_heads, d_head]"
    );
    let mut heads = vec![AttentionGradient::default(); n_heads];
    pool::for_each_row(&mut heads, 1, |head, out| {
        out[0] = one_head(shape, seq, head, n);
    });
    let mut total = AttentionGradient {
        q: vec![0.0; n * q_row],
        k: vec![0.0; n * kv_row],
        v: vec![0.0; n * kv_row],
    };
    let add = |total: &mut [f32], row: usize, head: usize, part: &[f32]| {
        let rows = total.chunks_exact_mut(row).zip(part.chunks_exact(d_head));
        for (total, part) in rows {
            axpy(1.0, part, &mut total[head * d_head..(head + 1) * d_head]);
        }
    };
    for (head, part) in heads.iter().enumerate() {
        let kv = head / (n_heads / n_kv_heads);
        add(&mut total.q, q_row, head, &part.q);
        add(&mut total.k, kv_row, kv, &part.k);
        add(&mut total.v, kv_row, kv, &part.v);
    }
    total
}

/// The part of one query head, `[n, d_head]` each.
fn one_head(shape: &AttentionShape, seq: Attended<'_>, head: usize, n: usize) -> AttentionGradient {
    let (d, scale) = (shape.d_head, shape.scale);
    let kv = head / (shape.n_heads / shape.n_kv_heads);
    let query = |i: usize| (i * shape.n_heads + head) * d..(i * shape.n_heads + head + 1) * d;
    let key = |j: usize| (j * shape.n_kv_heads + kv) * d..(j * shape.n_kv_heads + kv + 1) * d;
    let mut out = AttentionGradient {
        q: vec![0.0; n * d],
        k: vec![0.0; n * d],
        v: vec![0.0; n * d],
    };
    let (mut p, mut slope, mut g) = (Vec::new(), Vec::new(), Vec::new());
    for i in 0..n {
        let q = &seq.q[query(i)];
        let dy = &seq.dy[query(i)];
        let from = shape.window.map_or(0, |w| (i + 1).saturating_sub(w));
        p.clear();
        slope.clear();
        g.clear();
        for j in from..=i {
            let mut score = scale * dot(q, &seq.k[key(j)]);
            let mut slope_here = scale;
            if let Some(cap) = shape.softcap {
                score = cap * ops::tanh(score / cap);
                slope_here *= cap_slope(score, cap);
            }
            p.push(score);
            slope.push(slope_here);
            g.push(dot(dy, &seq.v[key(j)]));
        }
        ops::softmax(&mut p);
        let mean = dot(&p, &g);
        for (at, j) in (from..=i).enumerate() {
            let ds = p[at] * (g[at] - mean) * slope[at];
            axpy(ds, &seq.k[key(j)], &mut out.q[i * d..(i + 1) * d]);
            axpy(ds, q, &mut out.k[j * d..(j + 1) * d]);
            axpy(p[at], dy, &mut out.v[j * d..(j + 1) * d]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{RopeStyle, RopeTable};
    use crate::testing::noise;

    /// The gradient of `f` at `x` by central differences. In f64, with steps of 1e-5 and values near 1,
    /// rounding leaves 1e-11 and the third derivative 1e-10: far below what f32 can show.
    fn numeric(f: impl Fn(&[f64]) -> f64, x: &[f32]) -> Vec<f64> {
        const H: f64 = 1e-5;
        let mut x: Vec<f64> = x.iter().map(|v| f64::from(*v)).collect();
        (0..x.len())
            .map(|i| {
                let at = x[i];
                x[i] = at + H;
                let above = f(&x);
                x[i] = at - H;
                let below = f(&x);
                x[i] = at;
                (above - below) / (2.0 * H)
            })
            .collect()
    }

    /// `sum y dy`, whose gradient with respect to what `y` was made from is what is tested.
    fn weighted(y: impl IntoIterator<Item = f64>, dy: &[f32]) -> f64 {
        y.into_iter()
            .zip(dy)
            .map(|(y, dy)| y * f64::from(*dy))
            .sum()
    }

    /// Of some tens of sums in f32 of values near 1: a relative error of 1e-5 at most.
    #[track_caller]
    fn close(what: &str, found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len(), "{what}");
        let largest = expected.iter().fold(0.0f64, |a, e| a.max(e.abs()));
        assert!(largest > 0.01, "{what}: the gradient is next to nothing");
        for (i, (f, e)) in found.iter().zip(expected).enumerate() {
            let off = (f64::from(*f) - e).abs();
            assert!(
                off <= 1e-5 * (1.0 + e.abs()),
                "{what} at {i}: {f} against {e}"
            );
        }
    }

    #[test]
    fn norms() {
        let (x, w, dy) = (noise(21, 1), noise(7, 2), noise(21, 3));
        for plus_one in [false, true] {
            let eps = 1e-3f32;
            let f = |x: &[f64]| {
                let rows = x.chunks_exact(7).flat_map(|x| {
                    let mean = x.iter().map(|v| v * v).sum::<f64>() / 7.0;
                    let s = 1.0 / (mean + f64::from(eps)).sqrt();
                    let weight = |w: f32| f64::from(w) + if plus_one { 1.0 } else { 0.0 };
                    let row: Vec<f64> = x.iter().zip(&w).map(|(x, w)| x * s * weight(*w)).collect();
                    row
                });
                weighted(rows, &dy)
            };
            let mut dx = noise(21, 4);
            let mut expected = numeric(f, &x);
            expected
                .iter_mut()
                .zip(&dx)
                .for_each(|(e, d)| *e += f64::from(*d));
            rms_norm(&x, &w, eps, plus_one, &dy, &mut dx);
            close("rms norm", &dx, &expected);
        }
    }

    #[test]
    fn gated_activations() {
        let wide = |seed| -> Vec<f32> { noise(40, seed).iter().map(|v| 4.0 * v).collect() };
        let (gate, up, dy) = (wide(1), wide(2), noise(40, 3));
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let act = |x: f64| match activation {
                Activation::Silu => x / (1.0 + (-x).exp()),
                Activation::GeluTanh => {
                    let z = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
                    0.5 * x * (1.0 + z.tanh())
                }
            };
            let both: Vec<f32> = gate.iter().chain(&up).copied().collect();
            let f = |x: &[f64]| weighted((0..40).map(|i| act(x[i]) * x[40 + i]), &dy);
            let expected = numeric(f, &both);
            let (mut dgate, mut dup) = (gate.clone(), up.clone());
            gated(activation, &mut dgate, &mut dup, &dy);
            close("gate", &dgate, &expected[..40]);
            close("up", &dup, &expected[40..]);
        }
    }

    #[test]
    fn soft_caps() {
        let x: Vec<f32> = noise(30, 1).iter().map(|v| 9.0 * v).collect();
        let dy = noise(30, 2);
        let f = |x: &[f64]| weighted(x.iter().map(|x| 5.0 * (x / 5.0).tanh()), &dy);
        let (mut y, mut dx) = (x.clone(), dy.clone());
        ops::softcap(&mut y, 5.0);
        softcap(&y, 5.0, &mut dx);
        close("soft cap", &dx, &numeric(f, &x));
    }

    /// For an operation that is linear, `(R x) . y = x . (Rᵀ y)` says it all.
    #[test]
    fn rotary_embeddings() {
        for style in [RopeStyle::Neox, RopeStyle::Interleaved] {
            let mut table = RopeTable::default();
            table.extend(3..8, &[1.0, 0.3, 0.1], 1.2);
            let (x, y) = (noise(5 * 2 * 8, 1), noise(5 * 2 * 8, 2));
            let (mut turned, mut back) = (x.clone(), y.clone());
            table.apply(&mut turned, 2, 8, style);
            table.apply_transposed(&mut back, 2, 8, style);
            let inner = |a: &[f32], b: &[f32]| weighted(a.iter().map(|v| f64::from(*v)), b);
            let (forward, backward) = (inner(&turned, &y), inner(&x, &back));
            assert!(
                (forward - backward).abs() < 1e-5,
                "{forward} against {backward}"
            );
            assert!((forward - inner(&x, &y)).abs() > 0.1, "nothing was turned");
        }
    }

    /// Attention straight from the definition.
    fn attend(shape: &AttentionShape, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let d = shape.d_head;
        let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let mut out = Vec::new();
        for (at, q) in q.chunks_exact(d).enumerate() {
            let (i, head) = (at / shape.n_heads, at % shape.n_heads);
            let kv = head / (shape.n_heads / shape.n_kv_heads);
            let row = |j: usize| (j * shape.n_kv_heads + kv) * d;
            let seen: Vec<usize> = (0..=i)
                .filter(|j| shape.window.is_none_or(|w| i - j < w))
                .collect();
            let weight = |j: usize| {
                let s = f64::from(shape.scale) * inner(q, &k[row(j)..row(j) + d]);
                let cap = |c: f32| f64::from(c) * (s / f64::from(c)).tanh();
                shape.softcap.map_or(s, cap).exp()
            };
            let sum: f64 = seen.iter().map(|&j| weight(j)).sum();
            for c in 0..d {
                let mixed = seen.iter().map(|&j| weight(j) * v[row(j) + c]);
                out.push(mixed.sum::<f64>() / sum);
            }
        }
        out
    }

    #[test]
    fn attention_with_all_that_families_have() {
        let (n, n_heads, n_kv_heads, d_head) = (6, 4, 2, 5);
        let (q_len, kv_len) = (n * n_heads * d_head, n * n_kv_heads * d_head);
        let inputs: Vec<f32> = noise(q_len + 2 * kv_len, 1)
            .iter()
            .map(|v| 2.0 * v)
            .collect();
        let dy = noise(q_len, 2);
        for (window, softcap) in [
            (None, None),
            (Some(3), None),
            (None, Some(0.7)),
            (Some(2), Some(1.5)),
        ] {
            let shape = AttentionShape {
                n_heads,
                n_kv_heads,
                d_head,
                scale: 0.6,
                window,
                softcap,
            };
            let f = |x: &[f64]| {
                let (q, kv) = x.split_at(q_len);
                weighted(attend(&shape, q, &kv[..kv_len], &kv[kv_len..]), &dy)
            };
            let expected = numeric(f, &inputs);
            let (q, kv) = inputs.split_at(q_len);
            let (k, v) = kv.split_at(kv_len);
            let found = attention(&shape, Attended { q, k, v, dy: &dy });
            close("queries", &found.q, &expected[..q_len]);
            close("keys", &found.k, &expected[q_len..q_len + kv_len]);
            close("values", &found.v, &expected[q_len + kv_len..]);
        }
    }
}
