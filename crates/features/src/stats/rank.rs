//! Statistics of ranks.

use super::{Estimate, Z95};

/// Ranks from 1, ties at their mean; and `sum (t³ - t)` over groups of `t` ties.
fn ranks(values: &[f64]) -> (Vec<f64>, f64) {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let (mut at, mut ties) = (0, 0.0);
    while at < order.len() {
        let mut end = at + 1;
        while end < order.len() && values[order[end]] == values[order[at]] {
            end += 1;
        }
        let t = (end - at) as f64;
        for &i in &order[at..end] {
            ranks[i] = (at + end + 1) as f64 / 2.0;
        }
        ties += t * t * t - t;
        at = end;
    }
    (ranks, ties)
}

/// Result of [`mann_whitney`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MannWhitney {
    /// The statistic of the first group: pairs in which it is larger, ties counting half.
    pub u: f64,
    /// Two-sided p value, normal approximation with tie and continuity correction.
    pub p: f64,
}

/// Mann-Whitney U test of two groups.
pub fn mann_whitney(first: &[f64], second: &[f64]) -> MannWhitney {
    let (n1, n2) = (first.len() as f64, second.len() as f64);
    let all: Vec<f64> = first.iter().chain(second).copied().collect();
    let (ranks, ties) = ranks(&all);
    let u = ranks[..first.len()].iter().sum::<f64>() - n1 * (n1 + 1.0) / 2.0;
    let n = n1 + n2;
    let variance = n1 * n2 / 12.0 * (n + 1.0 - ties / (n * (n - 1.0)).max(1.0));
    if variance <= 0.0 {
        return MannWhitney { u, p: 1.0 };
    }
    let z = ((u - n1 * n2 / 2.0).abs() - 0.5).max(0.0) / variance.sqrt();
    MannWhitney {
        u,
        p: (2.0 * normal_tail(z)).min(1.0),
    }
}

/// Wilcoxon's signed-rank test of paired differences (1945): two-sided p value, normal approximation
/// with tie and continuity correction; differences of zero are left out.
pub fn wilcoxon(differences: &[f64]) -> f64 {
    let nonzero: Vec<f64> = differences.iter().copied().filter(|d| *d != 0.0).collect();
    let (ranks, ties) = ranks(&nonzero.iter().map(|d| d.abs()).collect::<Vec<_>>());
    let positive = nonzero.iter().zip(&ranks).filter(|(d, _)| **d > 0.0);
    let w: f64 = positive.map(|(_, r)| r).sum();
    let n = nonzero.len() as f64;
    let variance = n * (n + 1.0) * (2.0 * n + 1.0) / 24.0 - ties / 48.0;
    if variance <= 0.0 {
        return 1.0;
    }
    let z = ((w - n * (n + 1.0) / 4.0).abs() - 0.5).max(0.0) / variance.sqrt();
    (2.0 * normal_tail(z)).min(1.0)
}

/// Area under the ROC curve: the probability that a member of `positive` exceeds one of `negative`,
/// ties counting half.
pub fn auroc(positive: &[f64], negative: &[f64]) -> f64 {
    let pairs = (positive.len() * negative.len()).max(1) as f64;
    mann_whitney(positive, negative).u / pairs
}

/// `P(Z > z)` of the standard normal: the complementary error function by Numerical Recipes'
/// rational Chebyshev fit, relative error below 1.2e-7.
fn normal_tail(z: f64) -> f64 {
    let x = z / std::f64::consts::SQRT_2;
    let t = 1.0 / (1.0 + 0.5 * x);
    let poly = [
        0.170_872_77,
        -0.822_152_23,
        1.488_515_87,
        -1.135_203_98,
        0.278_868_07,
        -0.186_288_06,
        0.096_784_18,
        0.374_091_96,
        1.000_023_68,
    ];
    let sum = poly.iter().fold(0.0, |s, c| s * t + c);
    0.5 * t * (-x * x - 1.265_512_23 + t * sum).exp()
}

/// [`auroc`] with the normal 95 % interval of Hanley and McNeil (1982), cut to 0 and 1:
/// `A ± z sqrt((A(1-A) + (p-1)(Q1-A²) + (n-1)(Q2-A²)) / pn)`, `Q1 = A/(2-A)`, `Q2 = 2A²/(1+A)`, with `p`
/// and `n` the groups' sizes. At 0 and at 1 it has no width, however few prompts there are.
pub fn auroc_estimate(positive: &[f64], negative: &[f64]) -> Estimate {
    let n = positive.len() + negative.len();
    if positive.is_empty() || negative.is_empty() {
        return Estimate {
            value: f64::NAN,
            lo: 0.0,
            hi: 1.0,
            n,
        };
    }
    let a = auroc(positive, negative);
    let (p, m) = (positive.len() as f64, negative.len() as f64);
    let q1 = a / (2.0 - a) - a * a;
    let q2 = 2.0 * a * a / (1.0 + a) - a * a;
    let variance = (a * (1.0 - a) + (p - 1.0) * q1 + (m - 1.0) * q2) / (p * m);
    let half = Z95 * variance.max(0.0).sqrt();
    Estimate {
        value: a,
        lo: (a - half).max(0.0),
        hi: (a + half).min(1.0),
        n,
    }
}

/// Spearman's rank correlation (1904): Pearson's correlation of the ranks, ties at their mean. `None` if
/// one side is the same throughout.
///
/// # Shapes
/// Both have one entry an observation.
pub fn spearman(a: &[f64], b: &[f64]) -> Option<f64> {
    let n = a.len().min(b.len());
    let (a, b) = (ranks(&a[..n]).0, ranks(&b[..n]).0);
    let middle = (n as f64 + 1.0) / 2.0;
    let dot = |x: &[f64], y: &[f64]| -> f64 {
        let both = x.iter().zip(y);
        both.map(|(x, y)| (x - middle) * (y - middle)).sum()
    };
    let (aa, bb) = (dot(&a, &a), dot(&b, &b));
    (aa > 0.0 && bb > 0.0).then(|| dot(&a, &b) / (aa * bb).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::tests::close;

    #[test]
    fn mann_whitney_and_auroc_with_ties() {
        // (3, 2, 2) against (1, 2): pairs larger 1+1+1+1 and ties 1/2+1/2 -> 3 + 1 = 4 ... of 6:
        // 3>1, 3>2, 2>1, 2=2, 2>1, 2=2 -> 4 + 2/2 = 5
        close(auroc(&[3.0, 2.0, 2.0], &[1.0, 2.0]), 5.0 / 6.0, 1e-12);
        let apart = mann_whitney(&[5.0, 6.0, 7.0, 8.0, 9.0], &[0.0, 1.0, 2.0, 3.0, 4.0]);
        close(apart.u, 25.0, 1e-12);
        // z = (12.5 - 0.5) / sqrt(25 * 11 / 12) = 2.5067
        close(apart.p, 0.012_186, 1e-5);
        assert_eq!(mann_whitney(&[1.0, 1.0], &[1.0, 1.0]).p, 1.0);
    }

    #[test]
    fn wilcoxon_by_hand() {
        // |d| = 1, 2, 2, 4, 5 (zero out), ranks 1, 2.5, 2.5, 4, 5; positive all but the one of 1:
        // W = 14, mean 7.5, variance 5 * 6 * 11 / 24 - 6 / 48 = 13.625, z = 6 / 3.6912 = 1.6255
        close(wilcoxon(&[2.0, -1.0, 0.0, 2.0, 5.0, 4.0]), 0.104_05, 1e-4);
        // the sign does not matter, nor does an empty list
        close(wilcoxon(&[-2.0, 1.0, -2.0, -5.0, -4.0]), 0.104_05, 1e-4);
        assert_eq!(wilcoxon(&[0.0, 0.0]), 1.0);
        assert_eq!(wilcoxon(&[]), 1.0);
    }

    #[test]
    fn an_auroc_has_an_interval() {
        // A = 3/4 of 2 x 2 pairs: Q1 = 0.6, Q2 = 9/14; variance
        // (0.1875 + (0.6 - 0.5625) + (0.642857 - 0.5625)) / 4 = 0.0763393, half = 1.96 * 0.276296
        let e = auroc_estimate(&[3.0, 1.0], &[2.0, 0.0]);
        close(e.value, 0.75, 1e-12);
        close(e.lo, 0.75 - 0.541_530, 1e-5);
        assert_eq!((e.hi, e.n), (1.0, 4));
        let apart = auroc_estimate(&[3.0, 2.0], &[1.0, 0.0]);
        assert_eq!((apart.lo, apart.value, apart.hi), (1.0, 1.0, 1.0));
        let none = auroc_estimate(&[], &[1.0]);
        assert!(none.value.is_nan() && (none.lo, none.hi) == (0.0, 1.0));
    }

    #[test]
    fn spearman_by_hand() {
        // ranks 1, 2, 3, 4 against 2, 1, 4, 3: 1 - 6 * 4 / (4 * 15) = 0.6
        let a = [1.0, 2.0, 3.0, 4.0];
        close(spearman(&a, &[20.0, 10.0, 40.0, 30.0]).unwrap(), 0.6, 1e-12);
        close(spearman(&a, &[9.0, 7.0, 5.0, 1.0]).unwrap(), -1.0, 1e-12);
        // ties: ranks 1.5, 1.5, 3.5, 3.5; sums of squares 5 and 4, product 1 + 1 + ... = 4
        close(
            spearman(&a, &[0.0, 0.0, 1.0, 1.0]).unwrap(),
            4.0 / 20.0f64.sqrt(),
            1e-12,
        );
        assert_eq!(spearman(&a, &[1.0; 4]), None);
        assert_eq!(spearman(&[], &[]), None);
    }
}
