//! Which items of a suite a limit takes.
//!
//! Sets are ordered: by subject, by category, by difficulty. Their first items stand for none but
//! themselves, so that a limit spreads over the set:
//!
//! 1. Items fall into groups that have the same parts (category, subject) and label.
//! 2. A group of `n` among `N` items gets `limit * n / N` of the limit, rounded by largest remainder;
//!    where remainders are equal, lots decide.
//! 3. So many are drawn from each group, by Python's `random.Random(seed).sample`.
//!
//! What is taken stays in the order of the file. The first items are there to compare with
//! lm-evaluation-harness, whose limit takes them.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::hash::Hash;

use serde::{Deserialize, Serialize};

use super::python_random::Random;
use super::{Ask, Item};

/// How a limit chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pick {
    /// The first ones; of MMLU, whose subjects are tasks, the first ones of each subject in turn.
    First,
    /// A sample that has each category and label in the set's proportion.
    Spread {
        /// Decides which.
        seed: u32,
    },
}

impl Pick {
    /// At most `limit` of a suite's items, all if that is 0.
    pub fn take(self, items: Vec<Item>, limit: usize) -> Vec<Item> {
        if limit == 0 || limit >= items.len() {
            return items;
        }
        let kept = match self {
            Self::First => first(&items, limit),
            Self::Spread { seed } => spread(&items, limit, seed),
        };
        let both = items.into_iter().zip(kept);
        both.filter_map(|(item, kept)| kept.then_some(item))
            .collect()
    }
}

/// Places of items with the same key, groups by their first item.
fn groups<'i, K: Eq + Hash>(items: &'i [Item], key: impl Fn(&'i Item) -> K) -> Vec<Vec<usize>> {
    let mut all: Vec<Vec<usize>> = Vec::new();
    let mut known: HashMap<K, usize> = HashMap::new();
    for (at, item) in items.iter().enumerate() {
        let group = *known.entry(key(item)).or_insert(all.len());
        if group == all.len() {
            all.push(Vec::new());
        }
        all[group].push(at);
    }
    all
}

fn first(items: &[Item], limit: usize) -> Vec<bool> {
    let tasks = groups(items, |i| (i.suite == "mmlu").then_some(&i.parts));
    let longest = tasks.iter().map(Vec::len).max().unwrap_or(0);
    let in_turn = (0..longest).flat_map(|round| tasks.iter().filter_map(move |t| t.get(round)));
    let mut kept = vec![false; items.len()];
    for at in in_turn.take(limit) {
        kept[*at] = true;
    }
    kept
}

fn spread(items: &[Item], limit: usize, seed: u32) -> Vec<bool> {
    let label = |i: &Item| match i.ask {
        Ask::Chat { label, .. } => label,
        _ => None,
    };
    let groups = groups(items, |i| (&i.parts, label(i)));
    let mut random = Random::new(seed);
    let part = |group: &Vec<usize>| group.len() * limit;
    let mut shares: Vec<usize> = groups.iter().map(|g| part(g) / items.len()).collect();
    let left = limit - shares.iter().sum::<usize>();
    let mut order = random.sample(groups.len(), groups.len());
    order.sort_by_key(|g| Reverse(part(&groups[*g]) % items.len()));
    for g in order.into_iter().take(left) {
        shares[g] += 1;
    }
    let mut kept = vec![false; items.len()];
    for (group, share) in groups.iter().zip(shares) {
        for at in random.sample(group.len(), share) {
            kept[group[at]] = true;
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prompts::Label;

    /// Items of groups with so many each, one group after the other.
    fn items(suite: &str, sizes: &[(&str, usize)]) -> Vec<Item> {
        let of = |(part, n): &(&str, usize)| {
            let part = (*part).to_owned();
            (0..*n).map(move |i| Item {
                parts: vec![part.clone()],
                ..Item::alone(
                    suite,
                    format!("{part}{i}"),
                    Ask::Read {
                        text: String::new(),
                    },
                )
            })
        };
        sizes.iter().flat_map(of).collect()
    }

    fn ids(items: &[Item]) -> Vec<&str> {
        items.iter().map(|i| i.id.as_str()).collect()
    }

    fn counts(items: &[Item], parts: &[&str]) -> Vec<usize> {
        let of = |p: &&str| items.iter().filter(|i| i.parts[0] == **p).count();
        parts.iter().map(of).collect()
    }

    #[test]
    fn a_spread_has_the_proportions_of_the_set() {
        // 10 of 100: 5.0, 3.4, 1.6: 5 and 3 and 1, and the one that is left to the last.
        let all = items("s", &[("a", 50), ("b", 34), ("c", 16)]);
        for seed in 0..20 {
            let some = Pick::Spread { seed }.take(all.clone(), 10);
            assert_eq!(counts(&some, &["a", "b", "c"]), [5, 3, 2], "{seed}");
            // in the order of the file, none twice
            let order: Vec<usize> = some
                .iter()
                .map(|s| all.iter().position(|a| a.id == s.id).unwrap())
                .collect();
            assert!(order.is_sorted() && order.windows(2).all(|w| w[0] < w[1]));
        }
        // As Python has it: r = random.Random(7); r.sample(range(1), 1); r.sample(range(10), 3)
        let ten = Pick::Spread { seed: 7 }.take(items("s", &[("", 10)]), 3);
        assert_eq!(ids(&ten), ["0", "2", "6"]);
    }

    #[test]
    fn a_seed_decides_and_decides_alone() {
        let all = items("s", &[("a", 40), ("b", 40)]);
        let take = |seed| Pick::Spread { seed }.take(all.clone(), 10);
        assert_eq!(take(3), take(3));
        assert_ne!(take(3), take(4));
        // Every item has its chance: 200 draws of 10 out of 80 leave none out.
        let mut seen = std::collections::HashSet::new();
        for seed in 0..200 {
            seen.extend(take(seed).into_iter().map(|i| i.id));
        }
        assert_eq!(seen.len(), 80);
    }

    #[test]
    fn what_is_left_over_goes_by_lot_where_all_are_alike() {
        // One of each would be 4: which two of the four groups are asked is not the file's order.
        let all = items("s", &[("a", 5), ("b", 5), ("c", 5), ("d", 5)]);
        let mut first = std::collections::HashSet::new();
        for seed in 0..20 {
            let some = Pick::Spread { seed }.take(all.clone(), 2);
            let found = counts(&some, &["a", "b", "c", "d"]);
            assert_eq!(
                (found.iter().sum::<usize>(), found.iter().max()),
                (2, Some(&1))
            );
            first.insert(found);
        }
        assert!(first.len() > 2, "{first:?}");
    }

    #[test]
    fn labels_keep_their_proportion_too() {
        let chat = |i: usize| {
            let label = if i < 30 { Label::Unsafe } else { Label::Safe };
            let ask = Ask::Chat {
                turns: vec![i.to_string()],
                label: Some(label),
            };
            Item::alone("s", i.to_string(), ask)
        };
        let some = Pick::Spread { seed: 1 }.take((0..40).map(chat).collect(), 8);
        let safe = some.iter().filter(|i| i.id.parse::<usize>().unwrap() >= 30);
        assert_eq!((some.len(), safe.count()), (8, 2));
    }

    #[test]
    fn the_first_are_those_of_the_harness() {
        let sizes = [("a", 2), ("b", 4)];
        let first = |suite: &str, limit| Pick::First.take(items(suite, &sizes), limit);
        assert_eq!(ids(&first("arc_easy", 2)), ["a0", "a1"]);
        // of every subject in turn, until the short one has no more
        assert_eq!(ids(&first("mmlu", 2)), ["a0", "b0"]);
        assert_eq!(ids(&first("mmlu", 5)), ["a0", "a1", "b0", "b1", "b2"]);
        assert_eq!(first("mmlu", 0).len(), 6);
        assert_eq!(first("mmlu", 9).len(), 6);
    }
}
