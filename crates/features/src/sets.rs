//! Small sets of latents: which few, clamped together, raise the refusal most.
//!
//! Let `s(S)` be the rise of a metric over base when all latents of the set `S` are clamped, a mean over
//! unsafe prompts ([`Effect`]). The interaction of a set is what its members do together and not alone,
//!
//! ```text
//! I(S) = s(S) - sum_{j in S} s({j})
//! ```
//!
//! above 0 if they help each other, below 0 if they do the same work. All prompts are the same, so `I` is a
//! mean of differences, with an interval over prompts.
//!
//! To try every set of `n` of `m` latents costs `m^n / n!` measurements. Here all single latents and all
//! pairs are measured, which interactions need anyway: the best of each is the exact one. From three on
//! the latent that raises `s` most is added to the set that there is (forward selection), and the search
//! ends where none raises it. A set that changes benign text by more than the limit does not count. In all
//! `m (m + 1) / 2 + (m - 2) + (m - 3) + ...` measurements at most.
//!
//! The best of many has had luck: its `s` on the prompts that it was chosen on is above what it does on
//! others. The sweep of `tune` and the test say what it is worth.

use crate::stats;
use crate::table::{SetEvidence, SetSearch};

/// What a clamp of a set does, one figure a prompt.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Effect {
    /// Rise of the metric over base on unsafe prompts, `[unsafe]`.
    pub on_unsafe: Vec<f64>,
    /// The same on safe prompts, `[safe]`.
    pub on_safe: Vec<f64>,
    /// Mean KL(base || clamped) on benign prompts, nats.
    pub kl_benign: f64,
}

impl Effect {
    /// `s`.
    fn rise(&self) -> f64 {
        self.on_unsafe.iter().sum::<f64>() / self.on_unsafe.len().max(1) as f64
    }
}

/// How far a search goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    /// Latents of the largest set.
    pub size: usize,
    /// Largest change of benign text, nats.
    pub max_kl: f64,
}

/// Sets that were measured, by the places of their members in the pool.
type Measured = (Vec<usize>, Effect);

/// Searches the `pool`; `measure` says what a clamp of some latents, all at `value`, does.
///
/// # Errors
/// What `measure` returns.
pub fn search<E>(
    pool: &[u32],
    value: f64,
    limits: Limits,
    mut measure: impl FnMut(&[u32]) -> Result<Effect, E>,
) -> Result<SetSearch, E> {
    let mut measured = |places: Vec<usize>| {
        let latents: Vec<u32> = places.iter().map(|&i| pool[i]).collect();
        measure(&latents).map(|effect| (places, effect))
    };
    let all = 0..pool.len();
    let singles = all
        .clone()
        .map(|i| measured(vec![i]))
        .collect::<Result<Vec<_>, _>>()?;
    let pairs = match limits.size {
        0 | 1 => Vec::new(),
        _ => all
            .clone()
            .flat_map(|i| (i + 1..pool.len()).map(move |j| vec![i, j]))
            .map(&mut measured)
            .collect::<Result<Vec<_>, _>>()?,
    };
    let mut path: Vec<Measured> = Vec::new();
    for size in 1..=limits.size.min(pool.len()) {
        let larger = match (size, path.last()) {
            (1, _) => singles.clone(),
            (2, _) => pairs.clone(),
            (_, Some((places, _))) => all
                .clone()
                .filter(|i| !places.contains(i))
                .map(|i| measured([&places[..], &[i]].concat()))
                .collect::<Result<Vec<_>, _>>()?,
            (_, None) => break,
        };
        let before = path.last().map_or(0.0, |(_, e)| e.rise());
        let best = larger
            .into_iter()
            .filter(|(_, e)| e.kl_benign <= limits.max_kl && e.rise() > before)
            // The first of equals: `max_by` would take the last.
            .reduce(|a, b| if b.1.rise() > a.1.rise() { b } else { a });
        match best {
            Some(best) => path.push(best),
            None => break,
        }
    }
    let evidence = |(places, effect): &Measured, smaller: Option<&Effect>| SetEvidence {
        latents: places.iter().map(|&i| pool[i]).collect(),
        refusal_logodds_delta_unsafe: stats::mean(&effect.on_unsafe),
        refusal_logodds_delta_safe: stats::mean(&effect.on_safe),
        kl_benign: effect.kl_benign,
        interaction: (places.len() > 1).then(|| {
            let alone = places.iter().map(|&i| &singles[i].1.on_unsafe);
            stats::mean(&less(&effect.on_unsafe, alone))
        }),
        gain: smaller.map(|e| stats::mean(&less(&effect.on_unsafe, [&e.on_unsafe].into_iter()))),
    };
    let smaller = std::iter::once(None).chain(path.iter().map(|(_, e)| Some(e)));
    let sets = path.iter().zip(smaller).map(|(s, e)| evidence(s, e));
    Ok(SetSearch {
        value,
        max_kl: limits.max_kl,
        sets: sets.collect(),
        singles: singles.iter().map(|s| evidence(s, None)).collect(),
        pairs: pairs.iter().map(|s| evidence(s, None)).collect(),
    })
}

/// `a` less all of `others`, prompt by prompt.
fn less<'a>(a: &[f64], others: impl Iterator<Item = &'a Vec<f64>>) -> Vec<f64> {
    let mut rest = a.to_vec();
    for other in others {
        rest.iter_mut().zip(other).for_each(|(r, o)| *r -= o);
    }
    rest
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    const WIDE: Limits = Limits {
        size: 4,
        max_kl: 1.0,
    };

    /// Latents 10, 11, 12, 13 add 4, 3, 2 and 1 on each of two prompts, 0.5 more on the second; 10 and 11
    /// do the same work (together 4), 11 and 12 help each other (together 8). KL is 0.1 a latent.
    fn effect(latents: &[u32]) -> Result<Effect, Infallible> {
        let has = |j: u32| latents.contains(&j);
        let mut sum: f64 = latents.iter().map(|&j| f64::from(14 - j)).sum();
        if has(10) && has(11) {
            sum -= 3.0;
        }
        if has(11) && has(12) {
            sum += 3.0;
        }
        let n = latents.len() as f64;
        Ok(Effect {
            on_unsafe: vec![sum, sum + 0.5 * n],
            on_safe: vec![sum / 2.0],
            kl_benign: 0.1 * n,
        })
    }

    fn latents(sets: &[SetEvidence]) -> Vec<Vec<u32>> {
        sets.iter().map(|s| s.latents.clone()).collect()
    }

    #[test]
    fn pairs_are_exact_and_then_it_is_greedy() {
        let mut calls = 0;
        let found = search(&[10, 11, 12, 13], 0.5, WIDE, |s| {
            calls += 1;
            effect(s)
        })
        .unwrap();
        // 10 is the best alone, and yet not of the best pair. With 11 and 12 (8): 10 brings 9, 13 brings 9;
        // the first of equals is taken. 4 singles, 6 pairs, 2 and 1 extensions.
        assert_eq!(
            latents(&found.sets),
            [
                vec![10],
                vec![11, 12],
                vec![11, 12, 10],
                vec![11, 12, 10, 13]
            ]
        );
        assert_eq!(calls, 4 + 6 + 2 + 1);
        let pair = &found.sets[1];
        // rise 8 and 9: mean 8.5; alone 3 + 2 and 3.5 + 2.5: the interaction is 3 on both prompts.
        assert_eq!(pair.refusal_logodds_delta_unsafe.value, 8.5);
        let interaction = pair.interaction.unwrap();
        assert_eq!((interaction.value, interaction.lo), (3.0, 3.0));
        // over latent 10 alone: 8 - 4 and 9 - 4.5
        assert_eq!(pair.gain.unwrap().value, 4.25);
        assert_eq!(
            (pair.kl_benign, pair.refusal_logodds_delta_safe.value),
            (0.2, 4.0)
        );
        assert_eq!(found.sets[0].interaction, None);
        assert_eq!(found.sets[0].gain, None);
        let worst = found.pairs.iter().find(|p| p.latents == [10, 11]).unwrap();
        assert_eq!(worst.interaction.unwrap().value, -3.0);
        assert_eq!((found.singles.len(), found.pairs.len()), (4, 6));
    }

    #[test]
    fn what_changes_benign_text_too_much_does_not_count() {
        let narrow = Limits {
            max_kl: 0.15,
            ..WIDE
        };
        let found = search(&[10, 11, 12, 13], 0.5, narrow, effect).unwrap();
        assert_eq!(latents(&found.sets), [vec![10]]);
        let none = Limits {
            max_kl: 0.05,
            ..WIDE
        };
        let found = search(&[10, 11, 12, 13], 0.5, none, effect).unwrap();
        assert!(latents(&found.sets).is_empty());
        assert_eq!(found.pairs.len(), 6, "what was measured stays");
    }

    #[test]
    fn it_ends_where_nothing_is_gained() {
        // 10 and 11 are all there is: together no more than 10 alone but for the second prompt's 0.5.
        let same = |s: &[u32]| {
            let mut e = effect(s).unwrap();
            e.on_unsafe.truncate(1);
            Ok::<_, Infallible>(e)
        };
        let found = search(&[10, 11], 0.5, WIDE, same).unwrap();
        assert_eq!(latents(&found.sets), [vec![10]]);
        let nothing = search(&[], 0.5, WIDE, effect).unwrap();
        assert!(nothing.sets.is_empty() && nothing.pairs.is_empty());
        let one = Limits { size: 1, ..WIDE };
        let alone = search(&[10, 11], 0.5, one, effect).unwrap();
        assert_eq!(latents(&alone.sets), [vec![10]]);
        assert!(alone.pairs.is_empty());
    }

    #[test]
    fn what_measuring_refuses_comes_back() {
        let found = search(&[1], 0.5, WIDE, |_| Err("no"));
        assert_eq!(found.unwrap_err(), "no");
    }
}
