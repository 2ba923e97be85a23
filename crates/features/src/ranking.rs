//! The short list, and how much of it is chance.
//!
//! Several rankings of latents share a short list ([`short_list`]). Which latents are on it depends on the
//! prompts that there happened to be. So prompts are drawn again with replacement, as many as there are
//! (Efron's bootstrap, 1979), all rankings are made anew from scores that are there already, and so is
//! the short list: no model runs. For each latent, the fraction of draws in which it is listed (stability
//! selection, Meinshausen and Bühlmann 2010, with draws of the full size); for each ranking, Spearman's
//! correlation of its scores with those of a draw, over all its latents.
//!
//! A draw is a weight a prompt, and scores are sorted once: a ranking costs a pass over what is active.

use std::collections::BTreeMap;

use rayon::prelude::*;

use crate::attribution::PromptAttribution;
use crate::contrast::PromptSummary;
use crate::stats::{Draws, spearman};

/// The short list: of each ranking an equal share of latents that are not listed yet, `candidates` in all
/// at most.
pub fn short_list(rankings: &[Vec<u32>], candidates: usize) -> Vec<u32> {
    let share = candidates.div_ceil(rankings.len().max(1));
    let mut list: Vec<u32> = Vec::new();
    for ranking in rankings {
        let fresh: Vec<u32> = ranking
            .iter()
            .copied()
            .filter(|j| !list.contains(j))
            .take(share)
            .collect();
        list.extend(fresh);
    }
    list.truncate(candidates);
    list
}

/// A ranking of latents that can be made anew for weighted prompts.
#[derive(Debug, Clone)]
pub enum Ranking {
    /// By AUROC of two groups of prompts, then by the difference of their means.
    Groups(Groups),
    /// By the weighted mean of a score over `prompts`, which all have weight; latents above 0 only.
    Means {
        /// The prompts that have a score.
        prompts: Vec<usize>,
        /// Of each latent the prompts that have it, with its score there; 0 elsewhere.
        scores: BTreeMap<u32, Vec<(usize, f64)>>,
    },
    /// Prompts that have a ranking of their own, in order: the first of them that was drawn counts.
    First(Vec<(usize, Vec<u32>)>),
}

/// Largest activations in two groups of prompts.
#[derive(Debug, Clone)]
pub struct Groups {
    /// Whether a prompt is in the first group, `[prompts]`.
    positive: Vec<bool>,
    /// Of each latent the prompts in which it is active, the smallest activation first.
    columns: Vec<(u32, Vec<(f32, usize)>)>,
}

impl Groups {
    /// Latents that are active in a prompt and on at most `max_density` of the harvest, as
    /// [`contrast`](crate::contrast::contrast) has them.
    ///
    /// # Shapes
    /// `summaries` and `positive` are `[prompts]`; each summary and `density` `[d_sae]`.
    pub fn new(
        summaries: &[PromptSummary],
        positive: Vec<bool>,
        density: &[f64],
        max_density: f64,
    ) -> Self {
        let column = |j: usize| {
            let mut active: Vec<(f32, usize)> = summaries
                .iter()
                .enumerate()
                .filter_map(|(i, s)| (s[j] > 0.0).then_some((s[j], i)))
                .collect();
            active.sort_by(|a, b| a.0.total_cmp(&b.0));
            (j as u32, active)
        };
        let rare = (0..density.len()).filter(|&j| density[j] <= max_density);
        Self {
            positive,
            columns: rare.map(column).filter(|c| !c.1.is_empty()).collect(),
        }
    }

    /// AUROC and difference of means of each latent, in the order of `columns`; `None` if a group has no
    /// weight.
    fn scores(&self, weights: &[u32]) -> Option<Vec<(f64, f64)>> {
        let mut total = [0.0; 2]; // negative, positive
        for (w, p) in weights.iter().zip(&self.positive) {
            total[usize::from(*p)] += f64::from(*w);
        }
        if total[0] == 0.0 || total[1] == 0.0 {
            return None;
        }
        let score = |(_, active): &(u32, Vec<(f32, usize)>)| {
            let mut active_weight = [0.0; 2];
            let mut sums = [0.0; 2];
            for &(v, i) in active {
                let side = usize::from(self.positive[i]);
                active_weight[side] += f64::from(weights[i]);
                sums[side] += f64::from(weights[i]) * f64::from(v);
            }
            // Prompts without the latent are one group of ties, at 0.
            let silent = [total[0] - active_weight[0], total[1] - active_weight[1]];
            let mut u = silent[1] * silent[0] / 2.0;
            let mut below = silent[0];
            for ties in active.chunk_by(|a, b| a.0 == b.0) {
                let mut here = [0.0; 2];
                for &(_, i) in ties {
                    here[usize::from(self.positive[i])] += f64::from(weights[i]);
                }
                u += here[1] * (below + here[0] / 2.0);
                below += here[0];
            }
            (
                u / (total[0] * total[1]),
                sums[1] / total[1] - sums[0] / total[0],
            )
        };
        Some(self.columns.iter().map(score).collect())
    }
}

impl Ranking {
    /// Of attributions to the latents that `keep` keeps: by the integrated form if there is one, as
    /// [`Attributions::ranked`](crate::attribution::Attributions::ranked).
    ///
    /// # Shapes
    /// `found` has one entry for each of `prompts`.
    pub fn of_attributions(
        prompts: Vec<usize>,
        found: &[PromptAttribution],
        keep: impl Fn(u32) -> bool,
    ) -> Self {
        let integrated = found.iter().any(|f| !f.integrated.is_empty());
        let mut scores: BTreeMap<u32, Vec<(usize, f64)>> = BTreeMap::new();
        for (&i, f) in prompts.iter().zip(found) {
            let of_prompt = if integrated { &f.integrated } else { &f.plain };
            for (&j, &a) in of_prompt.iter().filter(|(j, _)| keep(**j)) {
                scores.entry(j).or_default().push((i, a));
            }
        }
        Self::Means { prompts, scores }
    }

    /// Every latent's score, and the ranking by it.
    fn of(&self, weights: &[u32]) -> (Vec<f64>, Vec<u32>) {
        match self {
            Self::Groups(groups) => {
                let Some(scores) = groups.scores(weights) else {
                    return (Vec::new(), Vec::new());
                };
                let mut order: Vec<usize> = (0..scores.len()).collect();
                order.sort_by(|&a, &b| {
                    let ((auroc_a, diff_a), (auroc_b, diff_b)) = (scores[a], scores[b]);
                    auroc_b
                        .total_cmp(&auroc_a)
                        .then(diff_b.total_cmp(&diff_a))
                        .then(a.cmp(&b))
                });
                (
                    scores.iter().map(|s| s.0).collect(),
                    order.iter().map(|&i| groups.columns[i].0).collect(),
                )
            }
            Self::Means { prompts, scores } => {
                let weight: f64 = prompts.iter().map(|&i| f64::from(weights[i])).sum();
                if weight == 0.0 {
                    return (Vec::new(), Vec::new());
                }
                let mean = |s: &Vec<(usize, f64)>| {
                    let weighted = s.iter().map(|&(i, v)| f64::from(weights[i]) * v);
                    weighted.sum::<f64>() / weight
                };
                let means: Vec<f64> = scores.values().map(mean).collect();
                let both = scores.keys().copied().zip(means.iter().copied());
                let mut above: Vec<(u32, f64)> = both.filter(|(_, m)| *m > 0.0).collect();
                above.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
                (means, above.into_iter().map(|(j, _)| j).collect())
            }
            Self::First(lists) => {
                let first = lists.iter().find(|(i, _)| weights[*i] > 0);
                (
                    Vec::new(),
                    first.map(|(_, l)| l.clone()).unwrap_or_default(),
                )
            }
        }
    }
}

/// Prompts that are drawn again. Each stratum is drawn from by itself, as often as it has members; what
/// belongs together (a request and its look-alike) is one member.
pub type Strata = Vec<Vec<Vec<usize>>>;

/// What came of the draws.
#[derive(Debug, Clone, PartialEq)]
pub struct Resampled {
    /// Fraction of draws in which a latent was listed; one that never was is not here.
    pub listed: BTreeMap<u32, f64>,
    /// Mean rank correlation of each ranking's scores with those of a draw, if it has scores that differ.
    pub correlation: Vec<Option<f64>>,
}

/// Draws prompts `draws` times and makes the short list of `candidates` anew each time.
pub fn resample(
    rankings: &[Ranking],
    strata: &Strata,
    candidates: usize,
    draws: usize,
    seed: u64,
) -> Resampled {
    let members = strata.iter().flatten().flatten();
    let prompts = members.max().map_or(0, |most| most + 1);
    let full: Vec<Vec<f64>> = rankings.iter().map(|r| r.of(&vec![1; prompts]).0).collect();
    let mut random = Draws::new(seed);
    let weights: Vec<Vec<u32>> = (0..draws)
        .map(|_| {
            let mut weights = vec![0; prompts];
            for stratum in strata {
                for _ in 0..stratum.len() {
                    let drawn = &stratum[random.below(stratum.len())];
                    drawn.iter().for_each(|&i| weights[i] += 1);
                }
            }
            weights
        })
        .collect();
    let found: Vec<(Vec<u32>, Vec<Option<f64>>)> = weights
        .par_iter()
        .map(|weights| {
            let (scores, lists): (Vec<_>, Vec<_>) = rankings.iter().map(|r| r.of(weights)).unzip();
            let pairs = full.iter().zip(&scores);
            let correlation = pairs.map(|(a, b)| spearman(a, b)).collect();
            (short_list(&lists, candidates), correlation)
        })
        .collect();
    let mut times: BTreeMap<u32, usize> = BTreeMap::new();
    for j in found.iter().flat_map(|(list, _)| list) {
        *times.entry(*j).or_default() += 1;
    }
    let listed = times.iter().map(|(j, n)| (*j, *n as f64 / draws as f64));
    let correlation = (0..rankings.len()).map(|r| {
        let known: Vec<f64> = found.iter().filter_map(|(_, c)| c[r]).collect();
        (!known.is_empty()).then(|| known.iter().sum::<f64>() / known.len() as f64)
    });
    Resampled {
        listed: listed.collect(),
        correlation: correlation.collect(),
    }
}

/// Places in an order by mean, under draws.
#[derive(Debug, Clone, PartialEq)]
pub struct Places {
    /// 95 % percentile interval of each item's place, 0 first.
    pub intervals: Vec<(usize, usize)>,
    /// Mean rank correlation of the means with those of a draw.
    pub correlation: Option<f64>,
}

/// Draws observations `draws` times and orders the items by their means, the largest first, ties in the
/// order given.
///
/// # Shapes
/// `scores` is `[items][observations]`.
pub fn places(scores: &[Vec<f64>], draws: usize, seed: u64) -> Places {
    let observations = scores.iter().map(Vec::len).min().unwrap_or(0);
    let means = |drawn: &[usize]| -> Vec<f64> {
        let mean = |s: &Vec<f64>| drawn.iter().map(|&i| s[i]).sum::<f64>() / drawn.len() as f64;
        scores.iter().map(mean).collect()
    };
    let full = means(&(0..observations).collect::<Vec<_>>());
    let mut random = Draws::new(seed);
    let mut found: Vec<Vec<usize>> = vec![Vec::with_capacity(draws); scores.len()];
    let mut correlations = Vec::new();
    for _ in 0..draws {
        let drawn: Vec<usize> = (0..observations)
            .map(|_| random.below(observations))
            .collect();
        let means = means(&drawn);
        correlations.extend(spearman(&full, &means));
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|&a, &b| means[b].total_cmp(&means[a]));
        for (place, &item) in order.iter().enumerate() {
            found[item].push(place);
        }
    }
    let interval = |mut places: Vec<usize>| {
        places.sort_unstable();
        let quantile = |q: f64| {
            let at = (q * draws as f64) as usize;
            places.get(at.min(draws.saturating_sub(1))).copied()
        };
        (
            quantile(0.025).unwrap_or_default(),
            quantile(0.975).unwrap_or_default(),
        )
    };
    let n = correlations.len();
    Places {
        intervals: found.into_iter().map(interval).collect(),
        correlation: (n > 0).then(|| correlations.iter().sum::<f64>() / n as f64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contrast::{Design, contrast};

    #[test]
    fn every_ranking_has_its_share() {
        let list = |rankings: &[Vec<u32>], n| short_list(rankings, n);
        assert_eq!(list(&[vec![1, 2, 3], vec![2, 3, 4]], 4), [1, 2, 3, 4]);
        // one that found nothing leaves its share to nobody; 5 of 2 is 3 each, cut to 5
        assert_eq!(list(&[vec![], vec![1, 2, 3]], 4), [1, 2]);
        assert_eq!(list(&[vec![1, 2, 3], vec![4, 5, 6]], 5), [1, 2, 3, 4, 5]);
        assert_eq!(list(&[], 4), [0u32; 0]);
    }

    /// Six prompts, three in each group, and four latents of which 2 is dense and 3 is silent.
    fn summaries() -> (Vec<PromptSummary>, Vec<bool>, [f64; 4]) {
        let rows = [
            [2.0, 0.0, 1.0, 0.0],
            [1.0, 3.0, 1.0, 0.0],
            [0.0, 3.0, 1.0, 0.0],
            [1.0, 0.0, 1.0, 0.0],
            [0.0, 1.0, 1.0, 0.0],
            [0.0, 0.0, 1.0, 0.0],
        ];
        (
            rows.iter().map(|r| r.to_vec()).collect(),
            vec![true, true, true, false, false, false],
            [0.1, 0.1, 0.9, 0.0],
        )
    }

    #[test]
    fn weighted_auroc_by_hand() {
        let (summaries, positive, density) = summaries();
        let groups = Groups::new(&summaries, positive, &density, 0.5);
        // Latent 0: (2, 1, 0) against (1, 0, 0): 3 + 2.5 + 1 = 6.5 of 9. Latent 1: (0, 3, 3) against
        // (0, 1, 0): 1 + 3 + 3 = 7 of 9.
        let scores = groups.scores(&[1; 6]).unwrap();
        assert_eq!(scores[0], (6.5 / 9.0, 1.0 - 1.0 / 3.0));
        assert_eq!(scores[1], (7.0 / 9.0, 2.0 - 1.0 / 3.0));
        // The first prompt three times and the others of its group not at all: (2, 2, 2) against (1, 0, 0)
        // and (0, 0, 0) against (0, 1, 0).
        let scores = groups.scores(&[3, 0, 0, 1, 1, 1]).unwrap();
        assert_eq!((scores[0].0, scores[1].0), (1.0, 3.0 / 9.0));
        assert_eq!(groups.scores(&[0, 0, 0, 1, 1, 1]), None);
    }

    #[test]
    fn with_every_prompt_once_the_ranking_is_that_of_the_contrast() {
        let mut random = Draws::new(3);
        let summaries: Vec<PromptSummary> = (0..20)
            .map(|_| (0..50).map(|_| random.below(4) as f32).collect())
            .collect();
        let positive: Vec<bool> = (0..20).map(|i| i % 2 == 0).collect();
        let of = |want| {
            let both = summaries.iter().zip(&positive);
            both.filter(|(_, p)| **p == want)
                .map(|(s, _)| s)
                .collect::<Vec<_>>()
        };
        let density = vec![0.1; 50];
        let found = contrast("test", &of(true), &of(false), Design::Groups, &density, 0.5).unwrap();
        let expected: Vec<u32> = found.iter().map(|f| f.0).collect();
        let ranking = Ranking::Groups(Groups::new(&summaries, positive.clone(), &density, 0.5));
        assert_eq!(ranking.of(&[1; 20]).1, expected);
    }

    #[test]
    fn a_latent_that_separates_is_always_listed_and_noise_is_not() {
        // Latent 0 separates; the nineteen others are noise of equal standing.
        let mut random = Draws::new(5);
        let positive: Vec<bool> = (0..24).map(|i| i < 12).collect();
        let summaries: Vec<PromptSummary> = positive
            .iter()
            .map(|&p| {
                let noise = (0..19).map(|_| 1.0 + random.below(100) as f32);
                std::iter::once(if p { 9.0 } else { 1.0 })
                    .chain(noise)
                    .collect()
            })
            .collect();
        let ranking = Ranking::Groups(Groups::new(&summaries, positive, &[0.1; 20], 0.5));
        let pairs: Strata = vec![(0..12).map(|i| vec![i, i + 12]).collect()];
        let found = resample(std::slice::from_ref(&ranking), &pairs, 2, 100, 1);
        assert_eq!(found.listed[&0], 1.0, "{found:?}");
        let others = found.listed.iter().filter(|(j, _)| **j != 0);
        assert!(
            others.map(|(_, f)| *f).fold(0.0, f64::max) < 0.95,
            "{found:?}"
        );
        let all: f64 = found.listed.values().sum();
        assert!(
            (all - 2.0).abs() < 1e-9,
            "two are listed in every draw: {all}"
        );
        let correlation = found.correlation[0].unwrap();
        assert!(0.3 < correlation && correlation < 1.0, "{correlation}");
        assert_eq!(
            found,
            resample(std::slice::from_ref(&ranking), &pairs, 2, 100, 1)
        );
        assert_ne!(found, resample(&[ranking], &pairs, 2, 100, 2));
    }

    #[test]
    fn means_and_first_rankings_follow_the_weights() {
        let means = Ranking::Means {
            prompts: vec![0, 2],
            scores: BTreeMap::from([
                (7, vec![(0, 1.0), (2, -2.0)]),
                (8, vec![(2, 1.0)]),
                (9, vec![(0, -1.0)]),
            ]),
        };
        // prompt 0 twice: 7 has (2 - 2) / 3 = 0, which is not above 0
        assert_eq!(means.of(&[2, 0, 1]).1, [8]);
        assert_eq!(means.of(&[3, 0, 1]).1, [7, 8]);
        assert_eq!(means.of(&[0, 5, 0]).1, [0u32; 0]);
        let first = Ranking::First(vec![(1, vec![4]), (2, vec![5])]);
        assert_eq!(first.of(&[1, 0, 1]).1, [5]);
        assert_eq!(first.of(&[1, 1, 1]).1, [4]);
        assert_eq!(first.of(&[1, 0, 0]).1, [0u32; 0]);
    }

    #[test]
    fn attributions_rank_as_they_do_where_they_are_summed_up() {
        use crate::attribution::Attributions;
        let prompt = |plain: &[(u32, f64)], integrated: &[(u32, f64)]| PromptAttribution {
            plain: plain.iter().copied().collect(),
            integrated: integrated.iter().copied().collect(),
        };
        let plain = [
            prompt(&[(1, 2.0), (2, 1.0)], &[]),
            prompt(&[(2, 3.0), (3, -1.0), (4, 9.0)], &[]),
        ];
        let both = [
            prompt(&[(1, 2.0)], &[(1, -1.0), (2, 0.5)]),
            prompt(&[(2, 3.0)], &[(2, 0.5), (4, 9.0)]),
        ];
        for found in [plain, both] {
            let mut expected = Attributions::new(&found, 0).ranked();
            expected.retain(|j| *j != 4);
            let ranking = Ranking::of_attributions(vec![5, 7], &found, |j| j != 4);
            assert_eq!(ranking.of(&[1; 8]).1, expected);
        }
    }

    #[test]
    fn places_are_sure_where_scores_are_apart() {
        // The first is ahead on every prompt; the other two change places with the prompts drawn.
        let scores = [
            vec![9.0, 9.0, 9.0, 9.0],
            vec![1.0, -1.0, 1.0, -1.0],
            vec![-1.0, 1.0, -1.0, 1.0],
        ];
        let found = places(&scores, 200, 1);
        assert_eq!(found.intervals, [(0, 0), (1, 2), (1, 2)]);
        assert!(found.correlation.unwrap() > 0.4);
        assert_eq!(places(&[], 10, 1).correlation, None);
        assert_eq!(places(&scores, 0, 1).intervals, [(0, 0); 3]);
    }
}
