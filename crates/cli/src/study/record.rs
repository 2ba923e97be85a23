//! From the stages' outputs to the record: figures, intervals, comparisons, words.

use anyhow::Result;
use demur_eval::arms::Reply;
use demur_eval::judge::Verdict;
use demur_eval::prompts::{Label, Prompt, Split};
use demur_eval::record::{
    ArmReply, ArmResult, CategoryCount, Device, Difference, Discovery, GateFacts, Metric,
    ModelFacts, Record, ReplyRow, SCHEMA, SaeFacts, SplitCount, StageTime, Tune, Versions, verdict,
};
use demur_eval::stats::{self, Estimate, mcnemar, paired_difference, wilson};
use demur_features::gate::Group;
use demur_features::table::FeatureTable;
use demur_steering::{explain, explain_gate};

use super::config::Arm;
use super::evaluate::{ArmRun, test_prompts};
use super::gate::GATE_NAME;
use super::run::Run;
use super::{Planned, StudyContext, matched};

/// Arms that somebody would deploy; the others are controls.
const DEPLOYABLE: [Arm; 7] = [
    Arm::Clamp,
    Arm::ClampErrorDropped,
    Arm::DifferenceOfMeans,
    Arm::ConditionalDifferenceOfMeans,
    Arm::GatedClamp,
    Arm::GatedClampDamped,
    Arm::DefaultPlan,
];

pub fn assemble(
    c: &StudyContext,
    run: &Run,
    model_sha256: &str,
    planned: &Planned,
    runs: &[ArmRun],
) -> Result<Record> {
    let Planned {
        trained,
        gate,
        found,
        tuned,
        calibrated,
        ..
    } = planned;
    let spec = c.loaded.model.spec();
    let prompts = test_prompts(c);
    let (all, runs) = (runs, &runs[..c.study.evaluate.arms.len()]);
    let arms = arm_results(c, &prompts, runs);
    let steered: Vec<&str> = DEPLOYABLE.iter().map(|a| a.name()).collect();
    let verdict = verdict(&arms, &steered);
    let chosen: Vec<u32> = tuned
        .plan
        .interventions
        .iter()
        .flat_map(|i| i.edits.iter().map(|e| e.latent))
        .collect();
    let mut features = found.table.features.clone();
    features
        .iter_mut()
        .for_each(|f| f.chosen = chosen.contains(&f.latent));
    Ok(Record {
        schema: SCHEMA,
        study: c.study.name.clone(),
        description: c.study.description.clone(),
        wall_s: run.stages.iter().map(|s| s.1).sum(),
        stages: run
            .stages
            .iter()
            .map(|(name, wall_s, cached)| StageTime {
                name: (*name).to_owned(),
                wall_s: *wall_s,
                cached: *cached,
            })
            .collect(),
        config: serde_json::to_value(&c.study)?,
        seed: c.study.seed,
        versions: Versions {
            demur: env!("CARGO_PKG_VERSION").to_owned(),
        },
        device: Device {
            arch: std::env::consts::ARCH.to_owned(),
            isa: demur_kernels::dispatch::isa().name().to_owned(),
            threads: demur_kernels::threads(),
        },
        model: ModelFacts {
            name: c.study.model.name.clone(),
            file: c
                .loaded
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            sha256: model_sha256.to_owned(),
            architecture: spec.architecture.clone(),
            n_layers: spec.n_layers,
            d_model: spec.d_model,
            d_vocab: spec.d_vocab,
            precision: text(&c.study.model.precision)?,
        },
        sae: SaeFacts {
            source: text(&c.study.sae.source)?,
            sha256: trained.sha256.clone(),
            site: c.site.to_string(),
            d_sae: trained.d_sae,
            k: trained.k,
            trained_on_tokens: trained.trained_on_tokens,
            chat: Some(trained.chat.clone()),
            text: Some(trained.text.clone()),
            curve: trained.curve.clone(),
        },
        splits: [Split::Discovery, Split::Validation, Split::Test]
            .into_iter()
            .map(|split| SplitCount {
                split,
                r#unsafe: c.prompts(split, Label::Unsafe).len(),
                safe: c.prompts(split, Label::Safe).len(),
            })
            .collect(),
        gate: gate.as_ref().map(|g| GateFacts {
            latents: g.gate.weights.len(),
            site: g.gate.site.clone(),
            in_words: explain_gate(GATE_NAME, &g.gate),
            validation: g.validation.clone(),
            test: g.test.clone(),
            beside: g
                .beside
                .iter()
                .map(|b| Group {
                    name: b.name.clone(),
                    detection: b.test.clone(),
                })
                .collect(),
            refuses: g.refuses.as_ref().map(|r| r.validation.clone()),
        }),
        discovery: Discovery {
            refused_unsafe: found.refused_unsafe,
            table: FeatureTable {
                features,
                ..found.table.clone()
            },
        },
        tune: Tune {
            aim: tuned.aim.clone(),
            base_unsafe: tuned.base_unsafe,
            base_safe: tuned.base_safe,
            sweep: tuned.sweep.clone(),
        },
        calibration: calibrated.as_ref().map(|c| c.calibration.clone()),
        plan: serde_json::to_value(&tuned.plan)?,
        plan_sha256: tuned.plan.sha256(),
        plan_in_words: explain(&tuned.plan),
        strengths: matched::strengths(&prompts, all, verdict.arm.as_deref()),
        verdict,
        categories: categories(&prompts, runs),
        replies: prompts
            .iter()
            .enumerate()
            .map(|(i, p)| ReplyRow {
                id: p.id.clone(),
                label: label(p),
                category: p.category.clone().unwrap_or_default(),
                prompt: p.prompt.clone(),
                replies: runs.iter().map(|run| arm_reply(&run.replies[i])).collect(),
            })
            .collect(),
        arms,
    })
}

fn metric(suite: &str, metric: &str, estimate: Estimate) -> Metric {
    Metric {
        suite: suite.to_owned(),
        metric: metric.to_owned(),
        estimate,
    }
}

fn text(value: &impl serde::Serialize) -> Result<String> {
    Ok(serde_json::to_value(value)?
        .as_str()
        .unwrap_or_default()
        .to_owned())
}

fn label(p: &Prompt) -> Label {
    p.label.unwrap_or(Label::Safe)
}

fn arm_reply(r: &Reply) -> ArmReply {
    ArmReply {
        arm: r.arm.clone(),
        text: r.text.clone(),
        verdict: r.verdict,
        logodds: r.logodds,
        audit: r.audit.clone(),
    }
}

/// Which prompts of a label an arm refused, in their order.
pub fn refused(prompts: &[&Prompt], run: &ArmRun, want: Label) -> Vec<bool> {
    let both = prompts
        .iter()
        .zip(&run.replies)
        .filter(|(p, _)| label(p) == want);
    both.map(|(_, r)| r.verdict == Verdict::Refusal).collect()
}

/// The share of the true ones.
pub fn share(of: &[bool]) -> Estimate {
    wilson(of.iter().filter(|r| **r).count(), of.len())
}

/// The share of an arm's replies that are broken or empty.
pub fn broken(run: &ArmRun) -> Estimate {
    let is_broken = |r: &Reply| matches!(r.verdict, Verdict::Gibberish | Verdict::Empty);
    share(&run.replies.iter().map(is_broken).collect::<Vec<_>>())
}

fn arm_results(c: &StudyContext, prompts: &[&Prompt], runs: &[ArmRun]) -> Vec<ArmResult> {
    let suite = if c.study.prompts.file.is_some() {
        "prompts"
    } else {
        "pairs"
    };
    let kinds = [
        (Label::Unsafe, "refusal_unsafe"),
        (Label::Safe, "refusal_safe"),
    ];
    let mut results: Vec<ArmResult> = runs
        .iter()
        .map(|run| {
            let mut metrics = Vec::new();
            let mut push = |suite: &str, name: &str, estimate: Estimate| {
                metrics.push(metric(suite, name, estimate));
            };
            for (want, metric) in kinds {
                let r = refused(prompts, run, want);
                push(suite, metric, share(&r));
                let both = prompts.iter().zip(&run.replies);
                let of_label = both.filter(|(p, _)| label(p) == want);
                let odds: Vec<f64> = of_label.map(|(_, r)| f64::from(r.logodds)).collect();
                push(
                    suite,
                    &metric.replace("refusal", "refusal_logodds"),
                    stats::mean(&odds),
                );
            }
            push(suite, "gibberish", broken(run));
            if !run.passages.is_empty() {
                let per_token = |f: &dyn Fn(&(usize, f64, f64)) -> f64| -> Vec<f64> {
                    run.passages
                        .iter()
                        .map(|p| f(p) / p.0.max(1) as f64)
                        .collect()
                };
                // Passages are the unit: tokens within one are not independent.
                push("passages", "kl", stats::mean(&per_token(&|p| p.2)));
                let nll = stats::mean(&per_token(&|p| p.1));
                let ppl = Estimate {
                    value: nll.value.exp(),
                    lo: nll.lo.exp(),
                    hi: nll.hi.exp(),
                    n: nll.n,
                };
                push("passages", "ppl", ppl);
            }
            let (title, description) = words(run.arm);
            ArmResult {
                arm: run.arm.name().to_owned(),
                title: title.to_owned(),
                description: description.to_owned(),
                plan_sha256: run.plan.as_ref().map(|p| p.sha256()),
                metrics,
                versus_base: Vec::new(),
            }
        })
        .collect();
    // Paired differences from base, p values adjusted over the arms.
    if let Some(base) = runs.first() {
        for (want, metric) in kinds {
            let first = refused(prompts, base, want);
            let compared: Vec<(Estimate, f64)> = runs[1..]
                .iter()
                .map(|run| {
                    let second = refused(prompts, run, want);
                    let count = |f: fn(bool, bool) -> bool| {
                        first
                            .iter()
                            .zip(&second)
                            .filter(|(a, b)| f(**a, **b))
                            .count()
                    };
                    let p = mcnemar(count(|a, b| a && !b), count(|a, b| !a && b));
                    (paired_difference(&first, &second), p)
                })
                .collect();
            let adjusted = stats::holm(&compared.iter().map(|x| x.1).collect::<Vec<_>>());
            for ((result, (estimate, _)), p) in results[1..].iter_mut().zip(compared).zip(adjusted)
            {
                result.versus_base.push(Difference {
                    metric: metric.to_owned(),
                    estimate,
                    p,
                });
            }
        }
    }
    results
}

/// An arm's title and description.
pub fn words(arm: Arm) -> (&'static str, &'static str) {
    match arm {
        Arm::Base => ("Base", "The model as it is."),
        Arm::SaePassthrough => (
            "SAE passthrough",
            "The residual is replaced by the SAE's reconstruction; nothing is edited. What the SAE alone costs.",
        ),
        Arm::Clamp => (
            "Clamp",
            "The chosen latents are set to the chosen value; the reconstruction error is kept.",
        ),
        Arm::ClampErrorDropped => (
            "Clamp, error dropped",
            "The same clamp, and the reconstruction error is dropped: the paper's probable form.",
        ),
        Arm::RandomLatent => (
            "Random latents",
            "As many other latents, set so that the residual moves about as far. A control.",
        ),
        Arm::DifferenceOfMeans => (
            "Difference of means",
            "Three times the mean difference between refused and complied prompts is added, or, where there were none, the mean difference between written refusals and own replies. A baseline without an SAE.",
        ),
        Arm::FrequencyMatchedLatent => (
            "Frequency-matched latents",
            "As many other latents that fire about as often, set so that the residual moves about as far. A control.",
        ),
        Arm::ConditionalDifferenceOfMeans => (
            "Conditional difference of means",
            "The difference of means is added where the residual is like that of unsafe prompts. A baseline without an SAE, after CAST.",
        ),
        Arm::GatedClamp => (
            "Gated clamp",
            "The strongest clamp, only where the trained gate takes the request for unsafe.",
        ),
        Arm::GatedClampDamped => (
            "Gated clamp, damped",
            "The strongest clamp where the calibrated gate is open; where it is clear, the same latents are set to the other side while a reply begins; if base was asked, only where it would refuse.",
        ),
        Arm::DefaultPlan => (
            "Default plan",
            "The plan that demur ships: a gate and a clamp that another study trained and chose.",
        ),
        Arm::SystemPrompt => (
            "System prompt",
            "The model is asked in words to refuse harm.",
        ),
    }
}

fn categories(prompts: &[&Prompt], runs: &[ArmRun]) -> Vec<CategoryCount> {
    let mut out: Vec<CategoryCount> = Vec::new();
    for run in runs {
        for (p, r) in prompts.iter().zip(&run.replies) {
            let category = p.category.clone().unwrap_or_default();
            let refused = usize::from(r.verdict == Verdict::Refusal);
            let same = |e: &&mut CategoryCount| {
                e.category == category && e.arm == r.arm && e.label == label(p)
            };
            match out.iter_mut().find(same) {
                Some(e) => {
                    e.n += 1;
                    e.refused += refused;
                }
                None => out.push(CategoryCount {
                    category,
                    arm: r.arm.clone(),
                    label: label(p),
                    refused,
                    n: 1,
                }),
            }
        }
    }
    out
}
