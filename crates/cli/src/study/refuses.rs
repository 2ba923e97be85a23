//! Where base would refuse by itself: a gate for damping, so that what base answers anyway is left alone.
//!
//! Base is asked some of the gate's discovery and validation prompts, and a linear probe learns from the residual of the
//! last prompt token, where a reply is decided, which of them it refuses. A reply is kept under its prompt's
//! hash in `replies.jsonl`, so that of prompts that are added only these are asked.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Result;
use demur_eval::arms::{Arm, Item};
use demur_eval::judge::Verdict;
use demur_eval::prompts::{Prompt, Split};
use demur_features::gate::{self, Detection, Pooled, Search, detection};
use demur_steering::Gate;
use serde::{Deserialize, Serialize};

use super::StudyContext;
use super::gate::last_token;
use super::read::key;
use crate::fetch::hex;
use crate::progress::note;

/// The name that plans of a study give the gate.
pub const REFUSES_NAME: &str = "refuses";
/// Penalties that are tried.
const L2: [f64; 4] = [0.01, 0.03, 0.1, 0.3];
/// How long a reply has to be for its opener to be judged, tokens.
const REPLY: usize = 16;

/// The gate, and how well it knows what base does.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Refuses {
    /// Opens on requests that base would refuse; its score is the log-odds.
    pub gate: Gate,
    /// Prompts that it learnt from.
    pub learnt_from: usize,
    /// On validation prompts: a request that base refuses counts as caught.
    pub validation: Detection,
}

/// Trains the gate on `residual`, which holds a row for each of `prompts` in its way of reading; asks base what it has not
/// answered in `folder`.
///
/// `None` if base refuses all or none of what it is asked.
pub fn run(
    c: &StudyContext,
    prompts: &[Prompt],
    residual: &[Pooled],
    folder: &Path,
) -> Result<Option<Refuses>> {
    let cfg = &c.study.gate;
    // A text that is there twice is asked once.
    let mut seen = HashSet::new();
    let mut of = |split, n| -> Vec<usize> {
        let of_split = (0..prompts.len()).filter(|&i| prompts[i].split == Some(split));
        let of_split = of_split.filter(|&i| seen.insert(key(&prompts[i])));
        super::evenly(of_split.collect(), n)
    };
    let learnt = of(Split::Discovery, cfg.asked);
    let tried = of(Split::Validation, cfg.asked.div_ceil(4));
    let asked = [&learnt[..], &tried[..]].concat();
    let of_asked: Vec<&Prompt> = asked.iter().map(|&i| &prompts[i]).collect();
    let mut items = c.items(&of_asked)?;
    for (item, p) in items.iter_mut().zip(&of_asked) {
        item.id = hex(&key(p));
    }
    let refused = refused(c, &items, folder)?;
    let width = c.loaded.model.spec().d_model;
    let (reading, rows) = last_token(residual, width)?;
    let last = Pooled {
        reading: reading.clone(),
        rows: asked.iter().map(|&i| rows[i].to_vec()).collect(),
    };
    let learnt_from = learnt.len();
    let known = learn(&last, &refused, learnt_from, cfg.recall);
    if known.is_none() {
        note(format_args!(
            "{:<12} base refuses all or none of {} prompts: there is no telling where it would",
            "gate",
            asked.len()
        ));
    }
    Ok(known.map(|(trained, validation)| Refuses {
        gate: trained.gate_on_residual(c.site, &[c.site], width),
        learnt_from,
        validation,
    }))
}

/// A linear score of the rows that tells which are `refused`, learnt from the first `train` of them, and what
/// it does on the rest; its threshold reaches `recall` there. `None` if it is the same for all.
fn learn(
    last: &Pooled,
    refused: &[bool],
    train: usize,
    recall: f64,
) -> Option<(gate::Trained, Detection)> {
    let both = |part: &[bool]| part.contains(&true) && part.contains(&false);
    if !both(&refused[..train]) || !both(&refused[train..]) {
        return None;
    }
    let search = Search {
        labels: refused,
        train: 0..train,
        validation: train..refused.len(),
        sizes: &[usize::MAX],
        l2: &L2,
        recall,
    };
    let trained = gate::train(std::slice::from_ref(last), &search)?;
    let scored: Vec<(f64, bool)> = search
        .validation
        .map(|i| (trained.score(&last.rows[i]), refused[i]))
        .collect();
    let found = detection(&scored, trained.threshold);
    Some((trained, found))
}

/// Whether base refuses each of the items.
fn refused(c: &StudyContext, items: &[Item], folder: &Path) -> Result<Vec<bool>> {
    let base = Arm {
        name: "base",
        hook: None,
        items,
    };
    let replies = c.replies("gate", &[base], REPLY, folder)?;
    Ok(replies
        .iter()
        .map(|r| r.verdict == Verdict::Refusal)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_features::gate::Reading;
    use demur_model::hooks::Role;
    use demur_steering::{Aggregate, Membership};

    /// Column 0 says it, with noise; column 1 is noise.
    fn rows(n: usize) -> (Pooled, Vec<bool>) {
        let mut state = 1u64;
        let mut unit = move || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let refused: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
        let row = |r: &bool| vec![f32::from(u8::from(*r)) + 0.8 * unit(), 5.0 * unit()];
        let rows = refused.iter().map(row).collect();
        let reading = Reading {
            membership: Membership::PreAct,
            aggregate: Aggregate::Last,
            roles: vec![Role::User, Role::Template],
        };
        (Pooled { reading, rows }, refused)
    }

    #[test]
    fn what_base_refuses_is_learnt_from_the_first_and_tried_on_the_rest() {
        let (last, refused) = rows(300);
        let (trained, found) = learn(&last, &refused, 240, 0.9).unwrap();
        let weight = |j: u32| trained.weights.iter().find(|w| w.0 == j).unwrap().1;
        assert!(weight(0) > 20.0 * weight(1).abs(), "{trained:?}");
        // Of 60 the 20 refused ones, of which 18 have to be caught.
        assert_eq!((found.recall.n, found.false_alarm.n), (20, 40));
        assert!((found.recall.value - 0.9).abs() < 1e-9, "{found:?}");
        // Classes overlap on a fifth of their width: it is good, and not without fault.
        assert!(
            found.auroc.is_some_and(|a| (0.9..1.0).contains(&a)),
            "{found:?}"
        );
        assert!(found.false_alarm.value > 0.0, "{found:?}");
    }

    #[test]
    fn of_a_base_that_never_or_always_refuses_nothing_is_learnt() {
        let (last, mut refused) = rows(40);
        refused[30..].fill(false);
        assert!(learn(&last, &refused, 30, 0.9).is_none());
        refused.fill(true);
        assert!(learn(&last, &refused, 30, 0.9).is_none());
    }
}
