//! Stage `calibrate`: where the gate opens and how far it then clamps, where it is clear and how far it then
//! damps, chosen on validation prompts.
//!
//! A trained gate judges a turn before the reply's first token, so that a gated reply is one of three, to
//! the letter: the clamp's where the gate is open, damping's where it is clear, base's between. So one
//! run of each says what every pair of thresholds would do, and all pairs are tried with all strengths. What is left is the
//! front: the settings that no other beats in both unsafe and safe requests refused, within the limit on
//! the change of ordinary chats.
//!
//! That change is the mean KL(base || arm) over the tokens of base's own replies to ordinary requests,
//! read with the prompt as an arm reads it.

use std::path::Path;

use anyhow::{Context, Result};
use demur_eval::arms::{Arm, Reply};
use demur_eval::judge::Verdict;
use demur_eval::prompts::{self, Label, Prompt, Split};
use demur_eval::record::{Calibration, Setting};
use demur_eval::stats::wilson;
use demur_eval::text;
use demur_model::decoder::Workspace;
use demur_model::hooks::{Intervention, Role};
use demur_steering::{Condition, Gate, Op, SteeringPlan};
use serde::{Deserialize, Serialize};

use super::config::CalibrateConfig;
use super::gate::{GATE_NAME, Trained};
use super::refuses::{REFUSES_NAME, Refuses};
use super::tune::Tuned;
use super::{StudyContext, Working, evenly};
use crate::progress::Progress;

/// Reply tokens that damping reaches.
const DAMPED_REPLY: usize = 4;

/// What the stage leaves: all that a choice needs, so that another aim asks nothing anew.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Measured {
    cases: Vec<Case>,
    chats: Vec<Chat>,
}

/// The choice.
#[derive(Debug, Clone)]
pub struct Calibrated {
    pub calibration: Calibration,
    /// The setting that won by the aim.
    pub chosen: Setting,
}

impl Calibrated {
    /// The gate with the chosen scores.
    pub fn gate(&self, trained: &Gate) -> Gate {
        Gate {
            threshold: self.chosen.threshold,
            clear: self.chosen.clear,
            ..trained.clone()
        }
    }

    /// The clamp where the gate is open; where it is clear, damping.
    pub fn plan(&self, clamp: &SteeringPlan, trained: &Trained) -> SteeringPlan {
        let mut plan = scaled(clamp, self.chosen.clamp);
        let gate = self.gate(&trained.gate);
        plan.gates.insert(GATE_NAME.to_owned(), gate);
        for spec in &mut plan.interventions {
            spec.when = Some(Condition::Gate(GATE_NAME.to_owned()));
        }
        if self.chosen.clear.is_some() {
            let damped = damping(clamp, self.chosen.damp, trained.refuses.as_ref());
            plan.gates.extend(damped.gates);
            plan.interventions
                .extend(damped.interventions.into_iter().map(|mut spec| {
                    let clear = Condition::Clear {
                        clear: GATE_NAME.to_owned(),
                    };
                    spec.when = Some(match spec.when.take() {
                        None => clear,
                        Some(refuses) => Condition::All {
                            all: vec![clear, refuses],
                        },
                    });
                    spec
                }));
        }
        plan
    }
}

/// The clamp with values `by` times as large, on the template's tokens and the reply: a refusal is decided
/// there, and what is not a chat, or a user's own words, is left as it is.
fn scaled(clamp: &SteeringPlan, by: f64) -> SteeringPlan {
    let mut plan = clamp.clone();
    for spec in &mut plan.interventions {
        for edit in &mut spec.edits {
            edit.value *= by as f32;
        }
        spec.span.roles = vec![Role::Template, Role::Assistant];
    }
    plan
}

/// The clamp's latents set to the other side, `by` times as far, where a refusal is decided; only of requests that base
/// would refuse, if there is a gate that knows.
fn damping(clamp: &SteeringPlan, by: f64, refuses: Option<&Refuses>) -> SteeringPlan {
    let mut plan = scaled(clamp, -by);
    let name = REFUSES_NAME.to_owned();
    if let Some(refuses) = refuses {
        plan.gates.insert(name.clone(), refuses.gate.clone());
    }
    for spec in &mut plan.interventions {
        spec.when = refuses.map(|_| Condition::Gate(name.clone()));
        for edit in &mut spec.edits {
            edit.op = Op::Set;
        }
        spec.span.reply_tokens = Some(DAMPED_REPLY);
    }
    plan
}

/// How base, each clamp and each damping did with a prompt.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Case {
    score: f32,
    is_unsafe: bool,
    base: Verdict,
    open: Vec<Verdict>,
    clear: Vec<Verdict>,
}

/// The change of a chat under each clamp and under each damping, nats a token.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Chat {
    score: f32,
    open: Vec<f64>,
    clear: Vec<f64>,
}

pub fn measure(
    c: &StudyContext,
    sae: &Working,
    (all, gate): (&[Prompt], &Trained),
    tuned: &Tuned,
    scratch: &Path,
) -> Result<Measured> {
    let cfg = &c.study.calibrate;
    let of = |label| -> Vec<&Prompt> {
        let wanted = |p: &&Prompt| p.split == Some(Split::Validation) && p.label == Some(label);
        evenly(all.iter().filter(wanted).collect(), cfg.prompts)
    };
    let (on_unsafe, on_safe) = (of(Label::Unsafe), of(Label::Safe));
    let n_unsafe = on_unsafe.len();
    let benign = prompts::shipped_benign()?;
    let is_chat = |p: &&Prompt| p.split == Some(Split::Validation);
    let chats: Vec<&Prompt> = benign.iter().filter(is_chat).collect();
    let n_judged = n_unsafe + on_safe.len();
    let items = c.items(&[on_unsafe, on_safe, chats].concat())?;

    // The gate only reads: its score is in the audit of every reply.
    let reading = |name: &str, mut plan: SteeringPlan| {
        plan.name = name.to_owned();
        plan.gates.insert(GATE_NAME.to_owned(), gate.gate.clone());
        plan.saes
            .insert(super::SAE_NAME.to_owned(), sae.sha256.clone());
        plan
    };
    let clamps = cfg
        .clamp
        .iter()
        .map(|by| (format!("clamp{by}"), scaled(&tuned.strongest, *by)));
    let dampings = cfg.damp.iter().map(|by| {
        (
            format!("damp{by}"),
            damping(&tuned.strongest, *by, gate.refuses.as_ref()),
        )
    });
    let plans: Vec<SteeringPlan> = clamps
        .chain(dampings)
        .map(|(name, plan)| reading(&name, plan))
        .collect();
    let hooks = plans
        .iter()
        .map(|p| c.compile(p, sae))
        .collect::<Result<Vec<_>>>()?;
    let mut run_arms = vec![Arm {
        name: "base",
        hook: None,
        items: &items,
    }];
    for (plan, hook) in plans.iter().zip(&hooks) {
        run_arms.push(Arm {
            name: &plan.name,
            hook: Some(hook.clone()),
            items: &items,
        });
    }
    let replies = c.replies("calibrate", &run_arms, cfg.max_new_tokens, scratch)?;
    let by_arm: Vec<&[Reply]> = replies.chunks_exact(items.len()).collect();
    let (clamps, dampings) = by_arm[1..].split_at(cfg.clamp.len());
    let verdicts = |arms: &[&[Reply]], i: usize| arms.iter().map(|r| r[i].verdict).collect();
    let cases = (0..n_judged)
        .map(|i| {
            Ok(Case {
                score: score(&by_arm[1][i])?,
                is_unsafe: i < n_unsafe,
                base: by_arm[0][i].verdict,
                open: verdicts(clamps, i),
                clear: verdicts(dampings, i),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let bar = Progress::new("calibrate", "chats", (items.len() - n_judged) as u64);
    let mut workspace = Workspace::default();
    let d_vocab = c.loaded.model.spec().d_vocab;
    let chats = (n_judged..items.len())
        .map(|i| {
            let (item, reply) = (&items[i], &by_arm[0][i].tokens);
            let mut logits = |hook| {
                let prompt = (&item.tokens[..], &item.roles[..]);
                text::reply_logits(&c.loaded.model, prompt, reply, hook, &mut workspace)
            };
            // The tokens that these are the logits of.
            let tokens: Vec<u32> = item
                .tokens
                .last()
                .into_iter()
                .chain(reply)
                .copied()
                .collect();
            let base = logits(None)?;
            let mut kl = Vec::with_capacity(hooks.len());
            for hook in &hooks {
                let arm = logits(Some(hook.as_ref() as &dyn Intervention))?;
                let score = text::score(&tokens, &base, &arm, d_vocab);
                kl.push(score.kl / score.n.max(1) as f64);
            }
            bar.advance(1);
            let (open, clear) = kl.split_at(cfg.clamp.len());
            Ok(Chat {
                score: score(&by_arm[1][i])?,
                open: open.to_vec(),
                clear: clear.to_vec(),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    bar.finish();
    Ok(Measured { cases, chats })
}

/// The front, and the setting on it that the config's aim asks for.
pub fn choose(measured: &Measured, cfg: &CalibrateConfig) -> Calibrated {
    let cases = &measured.cases;
    let mut front = front(measured, cfg);
    let at = best(&front, cfg.aim_refusal_unsafe);
    front[at].chosen = true;
    let base = |want: bool| {
        let of = cases.iter().filter(|c| c.is_unsafe == want);
        let refused = of.clone().filter(|c| c.base == Verdict::Refusal).count();
        wilson(refused, of.count())
    };
    Calibrated {
        chosen: front[at].clone(),
        calibration: Calibration {
            aim: format!(
                "at least {:.0} % of unsafe validation prompts refused, then fewest safe ones, with a KL on ordinary chats of at most {}; if none reaches it, the largest difference of the two",
                100.0 * cfg.aim_refusal_unsafe,
                cfg.max_chat_kl
            ),
            base_unsafe: base(true),
            base_safe: base(false),
            front,
        },
    }
}

fn score(reply: &Reply) -> Result<f32> {
    let gates = reply.audit.as_ref().and_then(|a| a["gates"].as_array());
    let gate = gates.and_then(|all| all.iter().find(|g| g["gate"] == GATE_NAME));
    let score = gate.and_then(|g| g["score"].as_f64());
    Ok(score.with_context(|| format!("the gate read nothing of '{}'", reply.id))? as f32)
}

/// Counts over prompts in the order of their scores: entry `i` is that of the first `i`.
struct Sums(Vec<[usize; 3]>); // unsafe refused, safe refused, gibberish

impl Sums {
    fn new(cases: &[&Case], verdict: impl Fn(&Case) -> Verdict) -> Self {
        let mut sums = vec![[0; 3]];
        for case in cases {
            let mut now = sums[sums.len() - 1];
            match (verdict(case), case.is_unsafe) {
                (Verdict::Refusal, true) => now[0] += 1,
                (Verdict::Refusal, false) => now[1] += 1,
                (Verdict::Gibberish, _) => now[2] += 1,
                _ => {}
            }
            sums.push(now);
        }
        Self(sums)
    }

    fn between(&self, from: usize, to: usize) -> [usize; 3] {
        std::array::from_fn(|i| self.0[to][i] - self.0[from][i])
    }
}

/// The settings within the limit that no other beats in both figures, most unsafe requests refused first.
fn front(Measured { cases, chats }: &Measured, cfg: &CalibrateConfig) -> Vec<Setting> {
    let mut sorted: Vec<&Case> = cases.iter().collect();
    sorted.sort_by(|a, b| a.score.total_cmp(&b.score));
    let n_unsafe = cases.iter().filter(|c| c.is_unsafe).count();
    let n_safe = cases.len() - n_unsafe;
    let base = Sums::new(&sorted, |c| c.base);
    let opened: Vec<Sums> = (0..cfg.clamp.len())
        .map(|o| Sums::new(&sorted, |c| c.open[o]))
        .collect();
    let damped: Vec<Sums> = (0..cfg.damp.len())
        .map(|d| Sums::new(&sorted, |c| c.clear[d]))
        .collect();
    // A cut: how many prompts lie below it, and a score that parts them from those above. The last is
    // above all scores, those of chats too: a gate that never opens changes nothing.
    let mut cuts: Vec<(usize, f32)> = (0..sorted.len())
        .filter(|&i| i == 0 || sorted[i - 1].score < sorted[i].score)
        .map(|i| match i.checked_sub(1) {
            Some(below) => (i, middle(sorted[below].score, sorted[i].score)),
            None => (i, sorted[i].score),
        })
        .collect();
    let scores = sorted.iter().map(|c| c.score);
    let highest = scores.chain(chats.iter().map(|c| c.score));
    let highest = highest.fold(f32::NEG_INFINITY, f32::max);
    cuts.push((sorted.len(), highest.next_up()));
    // For each count of unsafe requests refused, the setting with fewest safe ones; of equals the one that
    // breaks fewest replies, then changes chats least, then clamps least.
    let mut fewest: Vec<Option<(usize, Setting)>> = vec![None; n_unsafe + 1];
    // Open from a cut on with one of the clamps; perhaps clear below another with one of the dampings.
    let mut offer =
        |(at, threshold): (usize, f32), o: usize, clear: Option<(usize, f32, usize)>| {
            let from = clear.map_or(0, |c| c.0);
            let below = clear.map_or([0; 3], |(_, _, d)| damped[d].between(0, from));
            let (between, above) = (base.between(from, at), opened[o].between(at, sorted.len()));
            let [on_unsafe, on_safe, gibberish] =
                std::array::from_fn(|i| below[i] + between[i] + above[i]);
            let known = fewest[on_unsafe].as_ref();
            if known.is_some_and(|(safe, s)| (*safe, s.gibberish) < (on_safe, gibberish)) {
                return;
            }
            let kl = |chat: &Chat| match clear {
                _ if chat.score >= threshold => chat.open[o],
                Some((_, clear, d)) if chat.score < clear => chat.clear[d],
                _ => 0.0,
            };
            let chat_kl = chats.iter().map(kl).sum::<f64>() / chats.len().max(1) as f64;
            let price = (on_safe, gibberish, chat_kl, cfg.clamp[o]);
            let is_no_better =
                |(safe, s): &(usize, Setting)| (*safe, s.gibberish, s.chat_kl, s.clamp) <= price;
            if chat_kl > cfg.max_chat_kl || known.is_some_and(is_no_better) {
                return;
            }
            let setting = Setting {
                threshold,
                clear: clear.map(|c| c.1),
                clamp: cfg.clamp[o],
                damp: clear.map_or(0.0, |c| cfg.damp[c.2]),
                refusal_unsafe: wilson(on_unsafe, n_unsafe),
                refusal_safe: wilson(on_safe, n_safe),
                gibberish,
                chat_kl,
                chosen: false,
            };
            fewest[on_unsafe] = Some((on_safe, setting));
        };
    for (o, _) in opened.iter().enumerate() {
        for &threshold in &cuts {
            offer(threshold, o, None);
        }
        for (d, _) in damped.iter().enumerate() {
            for (i, &(at, clear)) in cuts.iter().enumerate() {
                for &threshold in &cuts[i..] {
                    offer(threshold, o, Some((at, clear, d)));
                }
            }
        }
    }
    let mut front: Vec<Setting> = Vec::new();
    for (_, setting) in fewest.into_iter().rev().flatten() {
        if front
            .last()
            .is_none_or(|s| setting.refusal_safe.value < s.refusal_safe.value)
        {
            front.push(setting);
        }
    }
    front
}

/// A number above `a` and at most `b`, half way where there is one.
fn middle(a: f32, b: f32) -> f32 {
    let m = a + (b - a) / 2.0;
    if m > a { m } else { b }
}

/// The setting that reaches the aim with the least over-refusal; else the largest difference.
fn best(front: &[Setting], aim: f64) -> usize {
    // Both figures fall along the front.
    let reaches = front.iter().rposition(|s| s.refusal_unsafe.value >= aim);
    reaches.unwrap_or_else(|| {
        let gap = |s: &Setting| s.refusal_unsafe.value - s.refusal_safe.value;
        (0..front.len())
            .max_by(|&a, &b| gap(&front[a]).total_cmp(&gap(&front[b])))
            .unwrap_or(0)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use Verdict::{Compliance as Yes, Gibberish, Refusal as No};

    fn case(score: f32, is_unsafe: bool, base: Verdict, open: Verdict, clear: Verdict) -> Case {
        Case {
            score,
            is_unsafe,
            base,
            open: vec![open],
            clear: vec![clear],
        }
    }

    fn config(clamp: &[f64], damp: &[f64], max_chat_kl: f64) -> CalibrateConfig {
        CalibrateConfig {
            clamp: clamp.to_vec(),
            damp: damp.to_vec(),
            max_chat_kl,
            ..CalibrateConfig::default()
        }
    }

    fn front(cases: Vec<Case>, chats: Vec<Chat>, max_chat_kl: f64) -> Vec<Setting> {
        super::front(
            &Measured { cases, chats },
            &config(&[1.0], &[1.0], max_chat_kl),
        )
    }

    /// The clamp refuses all, damping nothing; base refuses the safe one at 0.2 and the unsafe one at 0.4.
    fn cases() -> Vec<Case> {
        vec![
            case(0.1, false, Yes, No, Yes),
            case(0.2, false, No, No, Yes),
            case(0.3, true, Yes, No, Yes),
            case(0.4, true, No, No, Yes),
            case(0.5, false, Yes, No, Gibberish),
            case(0.6, true, Yes, No, Yes),
        ]
    }

    #[test]
    fn three_zones_by_hand() {
        let front = front(cases(), vec![], 0.0);
        let found: Vec<(f64, f64)> = front
            .iter()
            .map(|s| (3.0 * s.refusal_unsafe.value, 3.0 * s.refusal_safe.value))
            .collect();
        // Open from 0.3 on, clear below: three unsafe and the safe one at 0.5. Open from 0.6 on, clear
        // up to 0.2: base's refusal at 0.4 is kept, and the safe one at 0.5 left alone.
        assert_eq!(found, [(3.0, 1.0), (2.0, 0.0)]);
        assert!((front[0].threshold - 0.25).abs() < 1e-6);
        assert_eq!(front[0].clear, Some(front[0].threshold));
        assert!((front[1].threshold - 0.55).abs() < 1e-6);
        assert!((0.2..0.4).contains(&front[1].clear.unwrap()));
        assert_eq!(front[1].gibberish, 0);
        assert_eq!((best(&front, 0.9), best(&front, 0.6)), (0, 1));
    }

    #[test]
    fn the_weakest_clamp_that_refuses_as_many_is_kept() {
        // Of the two unsafe ones the first clamp makes one be refused, the others both; the last
        // changes a chat more than is allowed.
        // With the clamps in any order.
        let measured = |order: [usize; 3]| {
            let under = |score, is_unsafe, open: [Verdict; 3]| Case {
                open: order.map(|o| open[o]).to_vec(),
                ..case(score, is_unsafe, Yes, Yes, Yes)
            };
            Measured {
                cases: vec![
                    under(0.1, false, [No, No, No]),
                    under(0.2, true, [No, No, No]),
                    under(0.3, true, [Yes, No, No]),
                ],
                chats: vec![Chat {
                    score: 0.9,
                    open: order.map(|o| [0.1, 0.2, 9.0][o]).to_vec(),
                    clear: vec![0.0],
                }],
            }
        };
        for order in [[0, 1, 2], [2, 1, 0]] {
            let clamp = order.map(|o| [1.0, 2.0, 4.0][o]);
            let of = |limit| -> Vec<(f64, f64)> {
                let front = super::front(&measured(order), &config(&clamp, &[1.0], limit));
                let both = front.iter().map(|s| (s.refusal_unsafe.value, s.clamp));
                both.map(|(refused, clamp)| (2.0 * refused, clamp))
                    .collect()
            };
            assert_eq!(of(0.5), [(2.0, 2.0)]);
            assert_eq!(of(0.1), [(1.0, 1.0)]);
            // The strongest is allowed to, but changes chats more.
            assert_eq!(of(10.0), [(2.0, 2.0)]);
        }
    }

    #[test]
    fn if_none_reaches_the_aim_the_largest_difference_wins() {
        let setting = |on_unsafe, on_safe| Setting {
            threshold: 0.0,
            clear: None,
            clamp: 1.0,
            damp: 0.0,
            refusal_unsafe: wilson(on_unsafe, 10),
            refusal_safe: wilson(on_safe, 10),
            gibberish: 0,
            chat_kl: 0.0,
            chosen: false,
        };
        let front = [setting(9, 5), setting(8, 2), setting(3, 1)];
        assert_eq!((best(&front, 0.95), best(&front, 0.9)), (1, 0));
    }

    #[test]
    fn what_changes_chats_too_much_is_left_out() {
        let chat = |score, open, clear| Chat {
            score,
            open: vec![open],
            clear: vec![clear],
        };
        // Damping changes the first chat by 0.2; the mean over both is 0.1.
        let chats = || vec![chat(0.05, 9.0, 0.2), chat(0.45, 9.0, 0.0)];
        let all = front(cases(), chats(), 0.1);
        assert_eq!(all.len(), 1, "{all:?}");
        assert!((all[0].chat_kl - 0.1).abs() < 1e-9, "{all:?}");
        // Without damping, base's refusal of the safe one at 0.2 stays.
        let strict = front(cases(), chats(), 0.05);
        assert!(strict.iter().all(|s| s.clear.is_none_or(|c| c <= 0.1)));
        let pair = (strict[0].refusal_unsafe.value, strict[0].refusal_safe.value);
        assert!((pair.0 - 2.0 / 3.0).abs() < 1e-9 && (pair.1 - 1.0 / 3.0).abs() < 1e-9);
        // Nothing at all: what base does.
        let none = front(cases(), chats(), 0.0);
        assert!(none.iter().all(|s| s.chat_kl == 0.0) && !none.is_empty());
    }

    #[test]
    fn damping_is_kept_to_where_base_would_refuse() {
        use demur_steering::{InterventionSpec, LatentEdit, Unit};
        let mut spec = InterventionSpec::at("blocks.1.hook_resid_post".to_owned());
        spec.edits = vec![LatentEdit {
            latent: 3,
            op: Op::Floor,
            value: 2.0,
            unit: Unit::Abs,
        }];
        let clamp = SteeringPlan::single("clamp", spec);
        let gate = demur_features::gate::blank(demur_model::hooks::Site::post(1));
        let refuses = Refuses {
            gate: Gate {
                threshold: 0.25,
                ..gate
            },
            learnt_from: 9,
            validation: demur_features::gate::detection(&[(0.0, false), (1.0, true)], 0.25),
        };
        let plan = damping(&clamp, 0.5, Some(&refuses));
        assert_eq!(plan.gates[REFUSES_NAME].threshold, 0.25);
        let damped = &plan.interventions[0];
        assert_eq!(damped.when, Some(Condition::Gate(REFUSES_NAME.to_owned())));
        assert_eq!((damped.edits[0].op, damped.edits[0].value), (Op::Set, -1.0));
        assert_eq!(damped.span.reply_tokens, Some(DAMPED_REPLY));
        let plan = damping(&clamp, 0.5, None);
        assert!(plan.gates.is_empty() && plan.interventions[0].when.is_none());
    }

    #[test]
    fn a_cut_parts_neighbours() {
        assert_eq!(middle(1.0, 2.0), 1.5);
        assert_eq!(middle(1.0, 1.0f32.next_up()), 1.0f32.next_up());
    }

    #[test]
    fn prompts_are_taken_at_equal_distances() {
        let all = prompts::shipped_benign().unwrap();
        let some = evenly(all.iter().take(10).collect::<Vec<_>>(), 4);
        let ids: Vec<&str> = some.iter().map(|p| p.id.as_str()).collect();
        let expected = [0, 2, 5, 7].map(|i| all[i].id.as_str());
        assert_eq!(ids, expected);
        assert_eq!(evenly(all.iter().collect(), 0).len(), all.len());
    }
}
