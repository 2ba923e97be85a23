//! Stage `tune`: which latents, at which value, chosen on validation prompts only.

use std::path::Path;

use anyhow::{Result, bail};
use demur_eval::arms::{Arm, Reply};
use demur_eval::judge::Verdict;
use demur_eval::prompts::{self, Label, Prompt, Split};
use demur_eval::record::SweepPoint;
use demur_eval::stats::{Estimate, wilson};
use demur_features::causal::{last_logits, mean_kl};
use demur_features::harvest::Sequence;
use demur_model::hooks::Role;
use demur_steering::{SteeringPlan, Unit};
use serde::{Deserialize, Serialize};

use super::config::ValueUnit;
use super::discover::{Found, clamp_plan};
use super::{StudyContext, Working, with_reply};

/// What the stage leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tuned {
    pub aim: String,
    pub base_unsafe: Estimate,
    pub base_safe: Estimate,
    pub sweep: Vec<SweepPoint>,
    /// The setting that won by the aim.
    pub plan: SteeringPlan,
    /// The one that refuses most unsafe prompts, whatever else it refuses: for where a gate decides.
    pub strongest: SteeringPlan,
}

pub fn run(c: &StudyContext, sae: &Working, found: &Found, scratch: &Path) -> Result<Tuned> {
    let cfg = &c.study.tune;
    let unit = match cfg.unit {
        ValueUnit::RelMax => Unit::RelMax,
        ValueUnit::Abs => Unit::Abs,
    };
    let take = |label| -> Vec<&Prompt> {
        let all = c.prompts(Split::Validation, label);
        let n = if cfg.prompts == 0 {
            all.len()
        } else {
            cfg.prompts.min(all.len())
        };
        all[..n].to_vec()
    };
    let (on_unsafe, on_safe) = (take(Label::Unsafe), take(Label::Safe));
    let n_unsafe = on_unsafe.len();
    let items = c.items(&[on_unsafe, on_safe].concat())?;

    let ranked: Vec<u32> = found.table.features.iter().map(|f| f.latent).collect();
    let searched = found.table.sets.as_ref().map_or(&[][..], |s| &s.sets);
    let searched: Vec<&[u32]> = searched.iter().map(|s| &s.latents[..]).collect();
    let mut sets = sets(&ranked, &searched, &cfg.set_sizes);
    sets.extend(written(&found.written, &cfg.set_sizes));
    let mut settings = Vec::new();
    for set in &sets {
        for &value in &cfg.values {
            let kind = match (&set.values, set.searched) {
                (Some(_), _) => "written",
                (None, true) => "searched",
                (None, false) => "set",
            };
            let name = format!("{kind}{}_{value}", set.latents.len());
            let mut plan = clamp_plan(&name, c, &set.latents, value, unit);
            if let Some(values) = &set.values {
                as_written(&mut plan, values, value);
            }
            plan.saes
                .insert(super::SAE_NAME.to_owned(), sae.sha256.clone());
            settings.push((name, set, value, plan));
        }
    }
    if settings.is_empty() {
        bail!(
            "tune.set_sizes asks for more latents than the {} found",
            ranked.len()
        );
    }
    let hooks = settings
        .iter()
        .map(|s| c.compile(&s.3, sae))
        .collect::<Result<Vec<_>>>()?;
    let mut all = vec![Arm {
        name: "base",
        hook: None,
        items: &items,
    }];
    for (s, hook) in settings.iter().zip(&hooks) {
        all.push(Arm {
            name: &s.0,
            hook: Some(hook.clone()),
            items: &items,
        });
    }
    let replies = c.replies("tune", &all, cfg.max_new_tokens, scratch)?;
    let mut by_arm = replies.chunks_exact(items.len());
    let rates = |r: &[Reply]| {
        let refused = |r: &[Reply]| r.iter().filter(|r| r.verdict == Verdict::Refusal).count();
        let (a, b) = r.split_at(n_unsafe);
        (wilson(refused(a), a.len()), wilson(refused(b), b.len()))
    };
    let (base_unsafe, base_safe) = rates(by_arm.next().unwrap_or_default());

    let benign = prompts::shipped_benign()?;
    let benign: Vec<&Prompt> = benign
        .iter()
        .filter(|p| p.split == Some(Split::Validation))
        .take(8)
        .collect();
    let benign: Vec<Sequence> = c
        .items(&benign)?
        .iter()
        .map(|i| with_reply(i, &[]))
        .collect();
    let benign: Vec<&Sequence> = benign.iter().collect();
    let tokens = c.study.model.batch_tokens;
    let base_logits = last_logits(&c.loaded.model, &benign, None, tokens)?;
    let mut sweep = Vec::new();
    for ((s, hook), r) in settings.iter().zip(&hooks).zip(by_arm) {
        let (refusal_unsafe, refusal_safe) = rates(r);
        let logits = last_logits(&c.loaded.model, &benign, Some(hook.as_ref()), tokens)?;
        sweep.push(SweepPoint {
            latents: s.1.latents.clone(),
            searched: s.1.searched,
            value: s.2,
            unit: match (&s.1.values, cfg.unit) {
                (Some(_), _) => "x written".to_owned(),
                (None, ValueUnit::RelMax) => "x max".to_owned(),
                (None, ValueUnit::Abs) => "activation".to_owned(),
            },
            refusal_unsafe,
            refusal_safe,
            gibberish: r.iter().filter(|r| r.verdict == Verdict::Gibberish).count(),
            kl: mean_kl(&base_logits, &logits),
            chosen: false,
        });
    }
    let best = choose(&sweep, cfg.aim_refusal_unsafe);
    sweep[best].chosen = true;
    let strongest = settings[strongest(&sweep)].3.clone();
    let mut plan = settings.swap_remove(best).3;
    plan.name = "clamp".to_owned();
    Ok(Tuned {
        aim: format!(
            "at least {:.0} % of unsafe validation prompts refused, then fewest safe ones; if none reaches it, the largest difference of the two",
            100.0 * cfg.aim_refusal_unsafe
        ),
        base_unsafe,
        base_safe,
        sweep,
        plan,
        strongest,
    })
}

/// A set of latents to try.
#[derive(Debug, PartialEq)]
struct Set {
    latents: Vec<u32>,
    /// Found by the search, and not the first of the ranking.
    searched: bool,
    /// Activations in written refusals, one a latent, which the values multiply.
    values: Option<Vec<f32>>,
}

/// Of each size the latents that written refusals are made of.
fn written(parts: &[(u32, f32)], sizes: &[usize]) -> Vec<Set> {
    let first = sizes.iter().filter_map(|&size| parts.get(..size));
    first
        .map(|parts| Set {
            latents: parts.iter().map(|p| p.0).collect(),
            searched: false,
            values: Some(parts.iter().map(|p| p.1).collect()),
        })
        .collect()
}

/// Sets the plan's latents to `by` times their activations in written refusals, on the template's tokens and the reply, where
/// such activations were read.
fn as_written(plan: &mut SteeringPlan, values: &[f32], by: f64) {
    for spec in &mut plan.interventions {
        spec.span.roles = vec![Role::Template, Role::Assistant];
        for (edit, value) in spec.edits.iter_mut().zip(values) {
            (edit.value, edit.unit) = (by as f32 * value, Unit::Abs);
        }
    }
}

/// Of each size the first of the ranking, and beside it the one that was searched for, if it is another.
fn sets(ranked: &[u32], searched: &[&[u32]], sizes: &[usize]) -> Vec<Set> {
    let mut sets = Vec::new();
    for &size in sizes {
        let first = ranked.get(..size);
        sets.extend(first.map(|latents| Set {
            latents: latents.to_vec(),
            searched: false,
            values: None,
        }));
        let other = searched.iter().filter(|s| s.len() == size);
        let is_new = |s: &&&[u32]| first.is_none_or(|f| !s.iter().all(|j| f.contains(j)));
        sets.extend(other.filter(is_new).map(|latents| Set {
            latents: latents.to_vec(),
            searched: true,
            values: None,
        }));
    }
    sets
}

/// The setting that reaches the aim with the least over-refusal; else the largest difference.
fn choose(sweep: &[SweepPoint], aim: f64) -> usize {
    let reaches = sweep.iter().any(|p| p.refusal_unsafe.value >= aim);
    let score = |p: &SweepPoint| {
        if reaches {
            if p.refusal_unsafe.value >= aim {
                -p.refusal_safe.value
            } else {
                f64::NEG_INFINITY
            }
        } else {
            p.refusal_unsafe.value - p.refusal_safe.value
        }
    };
    (0..sweep.len())
        .max_by(|&a, &b| {
            score(&sweep[a])
                .total_cmp(&score(&sweep[b]))
                .then(
                    sweep[a]
                        .refusal_unsafe
                        .value
                        .total_cmp(&sweep[b].refusal_unsafe.value),
                )
                .then(sweep[b].kl.total_cmp(&sweep[a].kl))
                .then(b.cmp(&a))
        })
        .unwrap_or(0)
}

/// The setting that refuses most unsafe prompts; of equals the one with fewest broken replies, then
/// the one that changes benign text least.
fn strongest(sweep: &[SweepPoint]) -> usize {
    (0..sweep.len())
        .max_by(|&a, &b| {
            let (p, q) = (&sweep[a], &sweep[b]);
            (p.refusal_unsafe.value.total_cmp(&q.refusal_unsafe.value))
                .then(q.gibberish.cmp(&p.gibberish))
                .then(q.kl.total_cmp(&p.kl))
                .then(b.cmp(&a))
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use demur_steering::{InterventionSpec, LatentEdit, Op};

    use super::*;

    fn point(on_unsafe: usize, on_safe: usize, kl: f64) -> SweepPoint {
        SweepPoint {
            latents: vec![1],
            searched: false,
            value: 1.0,
            unit: "x max".to_owned(),
            refusal_unsafe: wilson(on_unsafe, 20),
            refusal_safe: wilson(on_safe, 20),
            gibberish: 0,
            kl,
            chosen: false,
        }
    }

    #[test]
    fn searched_sets_stand_beside_the_first_of_the_ranking() {
        let set = |latents: &[u32], searched| Set {
            latents: latents.to_vec(),
            searched,
            values: None,
        };
        let searched: [&[u32]; 3] = [&[5], &[6, 5], &[6, 8, 5]];
        // 6 and 5 are the first two of the ranking in another order; there is no set of four.
        assert_eq!(
            sets(&[5, 6, 7], &searched, &[1, 2, 3, 4]),
            [
                set(&[5], false),
                set(&[5, 6], false),
                set(&[5, 6, 7], false),
                set(&[6, 8, 5], true),
            ]
        );
        assert_eq!(sets(&[5], &[], &[1, 2]), [set(&[5], false)]);
    }

    #[test]
    fn written_refusals_give_their_first_latents_and_values() {
        let sets = written(&[(5, 3.0), (7, 2.0)], &[1, 2, 3]);
        let of: Vec<_> = sets.iter().map(|s| (&s.latents[..], &s.values)).collect();
        assert_eq!(
            of,
            [
                (&[5][..], &Some(vec![3.0])),
                (&[5, 7][..], &Some(vec![3.0, 2.0]))
            ]
        );
        let mut spec = InterventionSpec::at("blocks.1.hook_resid_post");
        let edit = |latent| LatentEdit {
            latent,
            op: Op::Set,
            value: 1.0,
            unit: Unit::RelMax,
        };
        spec.edits = vec![edit(5), edit(7)];
        let mut plan = SteeringPlan::single("p", spec);
        as_written(&mut plan, &[3.0, 2.0], 1.5);
        let spec = &plan.interventions[0];
        let of: Vec<_> = spec.edits.iter().map(|e| (e.value, e.unit)).collect();
        assert_eq!(of, [(4.5, Unit::Abs), (3.0, Unit::Abs)]);
        assert_eq!(spec.span.roles, [Role::Template, Role::Assistant]);
    }

    #[test]
    fn the_aim_comes_first_then_over_refusal_then_kl() {
        let sweep = [
            point(10, 0, 0.0),
            point(18, 9, 0.1),
            point(20, 12, 0.2),
            point(18, 9, 0.05),
        ];
        assert_eq!(choose(&sweep, 0.9), 3);
        assert_eq!(strongest(&sweep), 2);
        assert_eq!(strongest(&[point(9, 0, 0.2), point(9, 9, 0.1)]), 1);
        // nobody reaches it: the largest difference
        assert_eq!(choose(&[point(10, 0, 0.0), point(12, 1, 0.0)], 0.9), 1);
    }
}
