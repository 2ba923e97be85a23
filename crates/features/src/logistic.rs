//! Logistic regression with an L2 penalty, for gates: convex, and fitted to its one optimum.
//!
//! With `s_i = b + w . x_i` and class weights `c_i` that give each class half of the weight,
//! `L(w, b) = sum_i c_i log(1 + exp(-y_i s_i)) + l2/2 |w|^2`, `y_i = ±1`. The bias is not
//! penalised. Minimised by L-BFGS (Liu and Nocedal 1989, memory 8) with a backtracking line search:
//! a step costs `n * width` products, where Newton's would solve a system of `width`. Nothing is
//! drawn at random, so the same rows give the same weights.

use rayon::prelude::*;

/// Rows whose gradients are summed apart.
const PART: usize = 256;
/// Running sums of a product.
const LANES: usize = 8;
/// Pairs of steps and gradients that L-BFGS remembers.
const MEMORY: usize = 8;
/// Most steps.
const MAX_STEPS: usize = 500;
/// Largest component of the gradient at the end.
const TOLERANCE: f64 = 1e-6;

/// A fitted model.
#[derive(Debug, Clone, PartialEq)]
pub struct Logistic {
    /// `w`, `[width]`.
    pub weights: Vec<f64>,
    /// `b`.
    pub bias: f64,
}

impl Logistic {
    /// The log-odds `b + w . x`.
    pub fn score(&self, x: &[f64]) -> f64 {
        self.bias + dot(&self.weights, x)
    }
}

/// Fits `labels` to `rows`.
///
/// # Shapes
/// `rows[i]` is `[width]`, the same for all.
pub fn fit(rows: &[Vec<f64>], labels: &[bool], l2: f64) -> Logistic {
    let width = rows.first().map_or(0, Vec::len);
    let mut at = vec![0.0; width + 1]; // the bias is last
    let (mut loss, mut gradient) = objective(rows, labels, l2, &at);
    let mut history: Vec<(Vec<f64>, Vec<f64>, f64)> = Vec::new(); // s, y, 1 / s.y
    for _ in 0..MAX_STEPS {
        if gradient.iter().all(|g| g.abs() <= TOLERANCE) {
            break;
        }
        let direction = descent(&history, &gradient);
        let slope = dot(&direction, &gradient);
        let mut step = if history.is_empty() {
            1.0 / dot(&gradient, &gradient).sqrt().max(1.0)
        } else {
            1.0
        };
        // Armijo: the objective is convex, so a short enough step always descends.
        let next = loop {
            let point: Vec<f64> = at
                .iter()
                .zip(&direction)
                .map(|(a, d)| a + step * d)
                .collect();
            let (value, g) = objective(rows, labels, l2, &point);
            if value <= loss + 1e-4 * step * slope {
                break Some((point, value, g));
            }
            step *= 0.5;
            if step < 1e-12 {
                break None; // at the limit of the numbers' precision
            }
        };
        let Some((point, value, g)) = next else { break };
        let s: Vec<f64> = point.iter().zip(&at).map(|(a, b)| a - b).collect();
        let y: Vec<f64> = g.iter().zip(&gradient).map(|(a, b)| a - b).collect();
        let curvature = dot(&s, &y);
        if curvature > 0.0 {
            if history.len() == MEMORY {
                history.remove(0);
            }
            history.push((s, y, 1.0 / curvature));
        }
        (at, loss, gradient) = (point, value, g);
    }
    let bias = at.pop().unwrap_or_default();
    Logistic { weights: at, bias }
}

/// The loss and its gradient at `[w, b]`.
fn objective(rows: &[Vec<f64>], labels: &[bool], l2: f64, at: &[f64]) -> (f64, Vec<f64>) {
    let (bias, w) = at.split_last().map_or((0.0, at), |(b, w)| (*b, w));
    let positives = labels.iter().filter(|l| **l).count();
    let weight_of = |label: bool| {
        let n = if label {
            positives
        } else {
            labels.len() - positives
        };
        0.5 / n.max(1) as f64
    };
    // Parts of fixed sizes, summed in order: the same bits on any number of threads.
    let parts = rows.par_chunks(PART).zip(labels.par_chunks(PART));
    let parts: Vec<(f64, Vec<f64>)> = parts
        .map(|(rows, labels)| {
            let (mut loss, mut gradient) = (0.0, vec![0.0; at.len()]);
            for (x, &label) in rows.iter().zip(labels) {
                let y = if label { 1.0 } else { -1.0 };
                let margin = y * (bias + dot(w, x));
                let c = weight_of(label);
                loss += c * softplus(-margin);
                let pull = -c * y * sigmoid(-margin);
                for (g, x) in gradient.iter_mut().zip(x) {
                    *g += pull * x;
                }
                if let Some(g) = gradient.last_mut() {
                    *g += pull;
                }
            }
            (loss, gradient)
        })
        .collect();
    let mut loss = 0.5 * l2 * dot(w, w);
    let mut gradient: Vec<f64> = w.iter().map(|w| l2 * w).collect();
    gradient.push(0.0);
    for (part, of_part) in parts {
        loss += part;
        gradient.iter_mut().zip(of_part).for_each(|(g, p)| *g += p);
    }
    (loss, gradient)
}

/// The two-loop recursion: `-H g`.
fn descent(history: &[(Vec<f64>, Vec<f64>, f64)], gradient: &[f64]) -> Vec<f64> {
    let mut q = gradient.to_vec();
    let mut alphas = Vec::with_capacity(history.len());
    for (s, y, rho) in history.iter().rev() {
        let alpha = rho * dot(s, &q);
        q.iter_mut().zip(y).for_each(|(q, y)| *q -= alpha * y);
        alphas.push(alpha);
    }
    if let Some((_, y, rho)) = history.last() {
        let scale = 1.0 / (rho * dot(y, y));
        q.iter_mut().for_each(|q| *q *= scale);
    }
    for ((s, y, rho), alpha) in history.iter().zip(alphas.iter().rev()) {
        let beta = rho * dot(y, &q);
        q.iter_mut()
            .zip(s)
            .for_each(|(q, s)| *q += (alpha - beta) * s);
    }
    q.iter_mut().for_each(|q| *q = -*q);
    q
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut sums = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            sums[i] += a[i] * b[i];
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(a, b)| a * b);
    sums.iter().sum::<f64>() + rest.sum::<f64>()
}

/// `log(1 + exp(x))` without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_by_hand() {
        // Two values, three rows each: at x = 1 two of three are positive, at x = -1 one of three.
        // Without a penalty the log-odds are ln 2 and -ln 2: w = ln 2, b = 0.
        let rows: Vec<Vec<f64>> = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0].map(|x| vec![x]).to_vec();
        let labels = [true, true, false, true, false, false];
        let fitted = fit(&rows, &labels, 0.0);
        assert!((fitted.weights[0] - 2f64.ln()).abs() < 1e-5, "{fitted:?}");
        assert!(fitted.bias.abs() < 1e-5, "{fitted:?}");
    }

    #[test]
    fn classes_have_the_same_weight() {
        // One positive at x = 1 against one negative there and nine at x = -1, with a positive there
        // too: the classes' weights are 1/4 a positive and 1/20 a negative. At x = 1 the odds are
        // (1/4) / (1/20) = 5, at x = -1 (1/4) / (9/20) = 5/9: b = (ln 5 + ln 5/9) / 2.
        let mut rows = vec![vec![1.0], vec![-1.0], vec![1.0]];
        rows.extend(vec![vec![-1.0]; 9]);
        let mut labels = vec![true, true, false];
        labels.extend([false; 9]);
        let fitted = fit(&rows, &labels, 0.0);
        let (at_1, at_minus_1) = (5f64.ln(), (5f64 / 9.0).ln());
        assert!((fitted.score(&[1.0]) - at_1).abs() < 1e-4, "{fitted:?}");
        assert!(
            (fitted.score(&[-1.0]) - at_minus_1).abs() < 1e-4,
            "{fitted:?}"
        );
    }

    #[test]
    fn a_penalty_shrinks_and_the_gradient_is_the_differences() {
        let row = |i: usize| -> Vec<f64> {
            (0..4)
                .map(|j| ((i * 7 + j * 3) % 11) as f64 / 5.0 - 1.0)
                .collect()
        };
        let rows: Vec<Vec<f64>> = (0..20).map(row).collect();
        let labels: Vec<bool> = (0..20).map(|i| i % 3 == 0).collect();
        let at = [0.3, -0.2, 0.1, 0.5, -0.4];
        let (_, gradient) = objective(&rows, &labels, 0.1, &at);
        for (j, g) in gradient.iter().enumerate() {
            let at_plus = |h: f64| {
                let mut p = at;
                p[j] += h;
                objective(&rows, &labels, 0.1, &p).0
            };
            let difference = (at_plus(1e-5) - at_plus(-1e-5)) / 2e-5;
            assert!((g - difference).abs() < 1e-7, "{j}: {g} {difference}");
        }
        let size = |l2| {
            dot(
                &fit(&rows, &labels, l2).weights,
                &fit(&rows, &labels, l2).weights,
            )
        };
        assert!(size(0.1) < 0.5 * size(0.001));
        let (_, end) = {
            let f = fit(&rows, &labels, 0.1);
            let mut at = f.weights.clone();
            at.push(f.bias);
            objective(&rows, &labels, 0.1, &at)
        };
        assert!(end.iter().all(|g| g.abs() < 1e-5), "{end:?}");
    }
}
