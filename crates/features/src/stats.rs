//! Statistics of discovery and evaluation. Formulas and sources are at each function.

mod rank;

use serde::{Deserialize, Deserializer, Serialize};

pub use rank::{MannWhitney, auroc, auroc_estimate, mann_whitney, spearman, wilcoxon};

/// Two-sided 95 % quantile of the normal distribution.
const Z95: f64 = 1.959_963_984_540_054;

/// An estimate with its 95 % interval and the number of observations.
///
/// One observation has no interval, and none has no estimate either. JSON knows neither NaN nor
/// infinity: such a number is written as `null`, and `null` is read as NaN.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate.
    #[serde(deserialize_with = "number_or_null")]
    pub value: f64,
    /// Lower end of the interval.
    #[serde(deserialize_with = "number_or_null")]
    pub lo: f64,
    /// Upper end.
    #[serde(deserialize_with = "number_or_null")]
    pub hi: f64,
    /// Observations.
    pub n: usize,
}

fn number_or_null<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(d)?.unwrap_or(f64::NAN))
}

/// A proportion with Wilson's score interval (Wilson 1927):
/// `(p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n)`.
pub fn wilson(successes: usize, n: usize) -> Estimate {
    if n == 0 {
        return Estimate {
            value: f64::NAN,
            lo: 0.0,
            hi: 1.0,
            n,
        };
    }
    let (p, m) = (successes as f64 / n as f64, n as f64);
    let z2 = Z95 * Z95;
    let centre = p + z2 / (2.0 * m);
    let half = Z95 * (p * (1.0 - p) / m + z2 / (4.0 * m * m)).sqrt();
    let scale = 1.0 + z2 / m;
    let lo = if successes == 0 {
        0.0
    } else {
        (centre - half) / scale
    };
    let hi = if successes == n {
        1.0
    } else {
        (centre + half) / scale
    };
    Estimate {
        value: p,
        lo,
        hi,
        n,
    }
}

/// A mean with its normal 95 % interval, `mean ± z s / sqrt(n)`, `s` with `n - 1`.
pub fn mean(values: &[f64]) -> Estimate {
    let n = values.len();
    if n == 0 {
        return Estimate {
            value: f64::NAN,
            lo: f64::NAN,
            hi: f64::NAN,
            n,
        };
    }
    let m = values.iter().sum::<f64>() / n as f64;
    let square: f64 = values.iter().map(|v| (v - m).powi(2)).sum();
    let half = if n > 1 {
        Z95 * (square / (n - 1) as f64 / n as f64).sqrt()
    } else {
        f64::INFINITY
    };
    Estimate {
        value: m,
        lo: m - half,
        hi: m + half,
        n,
    }
}

/// A ratio of sums over units, `sum a / sum b`, with the normal 95 % interval of the ratio estimator
/// (Cochran 1977, 6.4): the variance of `a_i - r b_i` over the units, `n / (n - 1)` for the sample.
pub fn ratio(pairs: &[(f64, f64)]) -> Estimate {
    let n = pairs.len();
    let (a, b) = pairs
        .iter()
        .fold((0.0, 0.0), |(a, b), p| (a + p.0, b + p.1));
    let value = a / b;
    let half = if n > 1 {
        let square: f64 = pairs.iter().map(|p| (p.0 - value * p.1).powi(2)).sum();
        Z95 * (square * n as f64 / (n - 1) as f64).sqrt() / b.abs()
    } else {
        f64::INFINITY
    };
    Estimate {
        value,
        lo: value - half,
        hi: value + half,
        n,
    }
}

/// Exact McNemar test: two-sided binomial p value of the discordant pairs, `b` one way and `c` the
/// other.
pub fn mcnemar(b: usize, c: usize) -> f64 {
    // Terms of the binomial tail by their logarithms: 0.5^n alone would vanish beyond n = 1074.
    let (n, k) = (b + c, b.min(c));
    let mut log_term = n as f64 * 0.5f64.ln();
    let mut sum = 0.0;
    for i in 0..=k {
        sum += log_term.exp();
        log_term += ((n - i) as f64 / (i + 1) as f64).ln();
    }
    (2.0 * sum).min(1.0)
}

/// The difference of two paired proportions with the interval of Newcombe's method 10 (1998),
/// without its continuity correction, `second - first`.
pub fn paired_difference(first: &[bool], second: &[bool]) -> Estimate {
    let n = first.len().min(second.len());
    let count = |f: fn(bool, bool) -> bool| {
        first
            .iter()
            .zip(second)
            .filter(|(a, b)| f(**a, **b))
            .count() as f64
    };
    let both = count(|a, b| a && b);
    let only_first = count(|a, b| a && !b);
    let only_second = count(|a, b| !a && b);
    let neither = count(|a, b| !a && !b);
    let one = wilson((both + only_first) as usize, n);
    let two = wilson((both + only_second) as usize, n);
    let d = two.value - one.value;
    let product = (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither);
    let phi = if product > 0.0 {
        (both * neither - only_first * only_second) / product.sqrt()
    } else {
        0.0
    };
    let reach = |a: f64, b: f64| (a * a - 2.0 * phi * a * b + b * b).max(0.0).sqrt();
    Estimate {
        value: d,
        lo: d - reach(two.value - two.lo, one.hi - one.value),
        hi: d + reach(two.hi - two.value, one.value - one.lo),
        n,
    }
}

/// Numbers drawn at random: the same for the same seed, on every machine.
#[derive(Debug, Clone)]
pub struct Draws(u64);

impl Draws {
    /// Draws that `seed` says.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A whole number from 0 to `n - 1`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        // splitmix64; the top of a 128-bit product is uniform but for n / 2^64.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((u128::from(z ^ (z >> 31)) * n as u128) >> 64) as usize
    }
}

/// A mean paired difference, `second - first`, with the 95 % percentile interval of a bootstrap over
/// clusters (Field and Welsh 2007): whole clusters are drawn with replacement, as many as there are.
///
/// # Shapes
/// `first`, `second` and `clusters` have one entry an observation; equal entries of `clusters` belong
/// together.
pub fn paired_bootstrap(
    first: &[f64],
    second: &[f64],
    clusters: &[&str],
    draws: usize,
    seed: u64,
) -> Estimate {
    let mut at: std::collections::HashMap<&str, usize> = std::collections::HashMap::new();
    let mut sums: Vec<(f64, f64)> = Vec::new(); // of differences, and how many
    for ((a, b), name) in first.iter().zip(second).zip(clusters) {
        let i = *at.entry(name).or_insert_with(|| {
            sums.push((0.0, 0.0));
            sums.len() - 1
        });
        sums[i].0 += b - a;
        sums[i].1 += 1.0;
    }
    let n = first.len().min(second.len()).min(clusters.len());
    let of = |s: (f64, f64)| s.0 / s.1;
    let total = sums.iter().fold((0.0, 0.0), |t, s| (t.0 + s.0, t.1 + s.1));
    if sums.len() < 2 || draws == 0 {
        let half = f64::INFINITY;
        let value = of(total);
        return Estimate {
            value,
            lo: value - half,
            hi: value + half,
            n,
        };
    }
    let mut drawn_by = Draws::new(seed);
    let mut found: Vec<f64> = (0..draws)
        .map(|_| {
            let drawn = (0..sums.len()).map(|_| sums[drawn_by.below(sums.len())]);
            of(drawn.fold((0.0, 0.0), |t, s| (t.0 + s.0, t.1 + s.1)))
        })
        .collect();
    found.sort_by(f64::total_cmp);
    let quantile = |q: f64| found[((q * draws as f64) as usize).min(draws - 1)];
    Estimate {
        value: of(total),
        lo: quantile(0.025),
        hi: quantile(0.975),
        n,
    }
}

/// Cohen's kappa of two raters: `(p_o - p_e) / (1 - p_e)`.
pub fn kappa(a: &[bool], b: &[bool]) -> f64 {
    let n = a.len().min(b.len()).max(1) as f64;
    let agree = a.iter().zip(b).filter(|(x, y)| x == y).count() as f64 / n;
    let rate = |v: &[bool]| v.iter().filter(|x| **x).count() as f64 / n;
    let (pa, pb) = (rate(a), rate(b));
    let chance = pa * pb + (1.0 - pa) * (1.0 - pb);
    if chance >= 1.0 {
        1.0
    } else {
        (agree - chance) / (1.0 - chance)
    }
}

/// Benjamini-Hochberg adjusted p values (1995), in the order given.
pub fn benjamini_hochberg(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*b].total_cmp(&p[*a]));
    let (mut least, m) = (1.0f64, p.len() as f64);
    let mut q = vec![1.0; p.len()];
    for (i, &at) in order.iter().enumerate() {
        least = least.min(p[at] * m / (m - i as f64));
        q[at] = least;
    }
    q
}

/// Holm's adjusted p values (1979), in the order given.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let (mut most, m) = (0.0f64, p.len());
    let mut adjusted = vec![1.0; p.len()];
    for (i, &at) in order.iter().enumerate() {
        most = most.max((p[at] * (m - i) as f64).min(1.0));
        adjusted[at] = most;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_estimate_without_an_interval_can_be_read_again() {
        for (estimate, known) in [
            (mean(&[2.5]), true),
            (mean(&[]), false),
            (wilson(0, 0), false),
        ] {
            let text = serde_json::to_string(&estimate).unwrap();
            let again: Estimate = serde_json::from_str(&text).unwrap();
            assert_eq!(
                (again.n, again.value.is_finite()),
                (estimate.n, known),
                "{text}"
            );
        }
        assert!(serde_json::from_str::<Estimate>(r#"{"value": 1, "lo": 0, "n": 1}"#).is_err());
        let whole = wilson(3, 7);
        let text = serde_json::to_string(&whole).unwrap();
        assert_eq!(serde_json::from_str::<Estimate>(&text).unwrap(), whole);
    }

    #[track_caller]
    pub(super) fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() <= tolerance,
            "{found} against {expected}"
        );
    }

    #[test]
    fn wilson_by_hand() {
        // 8 of 10: the textbook's interval is (0.490, 0.943)
        let e = wilson(8, 10);
        close(e.lo, 0.4902, 1e-4);
        close(e.hi, 0.9433, 1e-4);
        assert_eq!((wilson(0, 5).lo, wilson(5, 5).hi), (0.0, 1.0));
        assert!(wilson(0, 5).hi > 0.4);
    }

    #[test]
    fn mcnemar_by_hand() {
        // 1 against 5: 2 (1 + 6) / 64
        close(mcnemar(1, 5), 14.0 / 64.0, 1e-12);
        assert_eq!(mcnemar(0, 0), 1.0);
        close(mcnemar(10, 0), 2.0 / 1024.0, 1e-12);
        // A normal tail for large counts: z = (1100 - 1000 - 1) / sqrt(2100) = 2.16.
        close(mcnemar(1000, 1100), 0.0307, 5e-4);
    }

    #[test]
    fn paired_difference_is_narrower_when_pairs_agree() {
        let first: Vec<bool> = (0..50).map(|i| i < 20).collect();
        let second: Vec<bool> = (0..50).map(|i| i < 30).collect();
        let shuffled: Vec<bool> = (0..50).map(|i| (i * 7) % 50 < 30).collect();
        let (a, b) = (
            paired_difference(&first, &second),
            paired_difference(&first, &shuffled),
        );
        close(a.value, 0.2, 1e-12);
        close(b.value, 0.2, 1e-12);
        assert!(a.hi - a.lo < b.hi - b.lo);
        assert!(a.lo > 0.0 && a.lo < 0.2 && a.hi < 0.4);
    }

    #[test]
    fn as_scipy_has_it() {
        // scipy 1.17: stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
        for (k, n, lo, hi) in [
            (8, 10, 0.490_162_471_536_641_8, 0.943_317_848_545_624_8),
            (0, 20, 0.0, 0.161_125_158_052_819_35),
            (13, 250, 0.030_637_655_164_191_244, 0.086_921_781_183_727_09),
            (431, 500, 0.828_997_986_404_719_9, 0.889_481_991_101_116_3),
        ] {
            let e = wilson(k, n);
            close(e.lo, lo, 1e-12);
            close(e.hi, hi, 1e-12);
        }
        // stats.binomtest(min(b, c), b + c, 0.5).pvalue
        close(mcnemar(59, 6) / 4.964_650_327_128_616e-12, 1.0, 1e-9);
        close(mcnemar(121, 59) / 4.434_449_263_755_164_5e-6, 1.0, 1e-9);
        close(mcnemar(10, 10), 1.0, 1e-12);
        // stats.bootstrap((y - x,), np.mean, n_resamples=400000, method="percentile"): 0.1000, 0.7125
        let x = [1.2, 0.4, 2.2, 3.1, 0.1, -0.4, 1.7, 0.9];
        let y = [1.0, 0.9, 2.9, 3.0, 1.1, 0.4, 2.4, 0.8];
        let alone = ["a", "b", "c", "d", "e", "f", "g", "h"];
        let e = paired_bootstrap(&x, &y, &alone, 20_000, 1);
        close(e.value, 0.4125, 1e-12);
        close(e.lo, 0.1, 0.02);
        close(e.hi, 0.7125, 0.02);
        // Clusters: stats.bootstrap((sums, counts), lambda s, m, axis: s.sum(axis) / m.sum(axis),
        // paired=True, n_resamples=400000, method="percentile"): 0.0714, 0.5
        let bits = |text: &str| {
            text.bytes()
                .map(|b| f64::from(b - b'0'))
                .collect::<Vec<_>>()
        };
        let (a, b) = (bits("0110100110110010"), bits("1110110101111011"));
        let clusters: Vec<&str> = "a a b b b c d d d d e f f g g g".split(' ').collect();
        let e = paired_bootstrap(&a, &b, &clusters, 20_000, 1);
        close(e.value, 0.25, 1e-12);
        close(e.lo, 1.0 / 14.0, 0.01);
        close(e.hi, 0.5, 0.01);
        assert_eq!(e, paired_bootstrap(&a, &b, &clusters, 20_000, 1));
        assert!(
            paired_bootstrap(&a, &b, &["a"; 16], 100, 1)
                .hi
                .is_infinite()
        );
        // sklearn.metrics.cohen_kappa_score
        let yes = |text: &str| text.bytes().map(|b| b == b'1').collect::<Vec<_>>();
        close(
            kappa(&yes("1100101011"), &yes("1000111011")),
            0.583_333_333_333_333_3,
            1e-12,
        );
    }

    #[test]
    fn kappa_by_hand() {
        // agreement 3/4; both say yes half the time: chance 1/2; kappa 1/2
        close(
            kappa(&[true, true, false, false], &[true, false, false, false]),
            0.5,
            1e-12,
        );
        close(kappa(&[true, false], &[false, true]), -1.0, 1e-12);
    }

    #[test]
    fn corrections_by_hand() {
        let p = [0.01, 0.04, 0.03, 0.5];
        let q = benjamini_hochberg(&p);
        for (f, e) in q.iter().zip([0.04, 0.16 / 3.0, 0.16 / 3.0, 0.5]) {
            close(*f, e, 1e-12);
        }
        let h = holm(&p);
        for (f, e) in h.iter().zip([0.04, 0.09, 0.09, 0.5]) {
            close(*f, e, 1e-12);
        }
    }

    #[test]
    fn ratio_by_hand() {
        // r = 3/6; residuals 1 - 1 = 0, 0 - 1 = -1, 2 - 1 = 1: variance 2 * 3/2 over 6^2
        let e = ratio(&[(1.0, 2.0), (0.0, 2.0), (2.0, 2.0)]);
        close(e.value, 0.5, 1e-12);
        close(e.hi - e.value, 1.959_964 * 3.0f64.sqrt() / 6.0, 1e-6);
        assert!(ratio(&[(1.0, 2.0)]).hi.is_infinite());
    }

    #[test]
    fn mean_by_hand() {
        let e = mean(&[1.0, 2.0, 3.0, 4.0]);
        close(e.value, 2.5, 1e-12);
        // s = sqrt(5/3), half = 1.96 s / 2
        close(
            e.hi - e.value,
            1.959_964 * (5.0f64 / 3.0).sqrt() / 2.0,
            1e-5,
        );
    }
}
