//! Clamps on validation prompts, by what they do to the first reply token: each candidate alone, and small
//! sets of the best.

use anyhow::Result;
use demur_eval::judge::refusal_log_odds;
use demur_eval::prompts::{self, Label, Prompt, Split};
use demur_features::causal::{last_logits, mean_kl, rises};
use demur_features::harvest::Sequence;
use demur_features::sets::{Effect, Limits, search};
use demur_features::table::{CausalEvidence, SetSearch};
use demur_steering::{SteeringPlan, Unit};

use super::super::config::SetsConfig;
use super::super::{StudyContext, Working, with_reply};
use super::clamp_plan;
use crate::progress::Progress;

/// Validation prompts with base's logits at the first reply token, on which plans are compared.
pub struct Bench<'a> {
    pub c: &'a StudyContext,
    working: &'a Working,
    /// Unsafe, safe, benign.
    prompts: Vec<Sequence>,
    n_unsafe: usize,
    n_safe: usize,
    /// Base's logits, one row a prompt.
    base: Vec<Vec<f32>>,
}

impl<'a> Bench<'a> {
    /// As many unsafe validation prompts as the study says, at most `safe` look-alikes and `benign`
    /// ordinary requests.
    pub fn new(
        c: &'a StudyContext,
        working: &'a Working,
        safe: usize,
        benign: usize,
    ) -> Result<Self> {
        let mut prompts = Vec::new();
        let mut add = |some: Vec<&Prompt>, most: usize| -> Result<usize> {
            let items = c.items(&some[..some.len().min(most)])?;
            prompts.extend(items.iter().map(|i| with_reply(i, &[])));
            Ok(items.len())
        };
        let most = c.study.discovery.causal_prompts;
        let n_unsafe = add(c.prompts(Split::Validation, Label::Unsafe), most)?;
        let n_safe = add(c.prompts(Split::Validation, Label::Safe), safe)?;
        let shipped = prompts::shipped_benign()?;
        let of_split = shipped
            .iter()
            .filter(|p| p.split == Some(Split::Validation));
        add(of_split.collect(), benign)?;
        let mut bench = Self {
            c,
            working,
            prompts,
            n_unsafe,
            n_safe,
            base: Vec::new(),
        };
        bench.base = bench.logits(None)?;
        Ok(bench)
    }

    fn logits(&self, plan: Option<&SteeringPlan>) -> Result<Vec<Vec<f32>>> {
        let hook = match plan {
            Some(plan) => Some(self.c.compile(plan, self.working)?),
            None => None,
        };
        let prompts: Vec<&Sequence> = self.prompts.iter().collect();
        let tokens = self.c.study.model.batch_tokens;
        let hook = hook
            .as_deref()
            .map(|h| h as &dyn demur_model::hooks::Intervention);
        Ok(last_logits(&self.c.loaded.model, &prompts, hook, tokens)?)
    }

    /// What a plan does to the refusal log-odds, and to ordinary requests.
    pub fn effect(&self, plan: &SteeringPlan) -> Result<Effect> {
        let after = self.logits(Some(plan))?;
        let odds = |row: &[f32]| refusal_log_odds(row, &self.c.openers);
        let (safe, benign) = (self.n_unsafe, self.n_unsafe + self.n_safe);
        Ok(Effect {
            on_unsafe: rises(&self.base[..safe], &after[..safe], odds),
            on_safe: rises(&self.base[safe..benign], &after[safe..benign], odds),
            kl_benign: mean_kl(&self.base[benign..], &after[benign..]),
        })
    }

    /// What a clamp of `latents`, each to `value` times its largest activation, does.
    fn clamped(&self, latents: &[u32], value: f64) -> Result<Effect> {
        self.effect(&clamp_plan(
            "candidate",
            self.c,
            latents,
            value,
            Unit::RelMax,
        ))
    }
}

/// A candidate with what a clamp of it does.
pub struct Scored {
    pub latent: u32,
    pub evidence: CausalEvidence,
    /// Of the refusal log-odds, one an unsafe prompt.
    pub rises: Vec<f64>,
}

/// Clamps each candidate alone; the largest rise in refusal first.
pub fn score(bench: &Bench<'_>, candidates: &[u32]) -> Result<Vec<Scored>> {
    let value = bench.c.study.discovery.clamp;
    let bar = Progress::new("discover", "candidates", candidates.len() as u64);
    let mut scored = Vec::new();
    for &latent in candidates {
        let effect = bench.clamped(&[latent], value)?;
        let n = effect.on_unsafe.len().max(1) as f64;
        scored.push(Scored {
            latent,
            evidence: CausalEvidence {
                value,
                refusal_logodds_delta_unsafe: effect.on_unsafe.iter().sum::<f64>() / n,
                refusal_logodds_delta_safe: None,
                kl_benign: Some(effect.kl_benign),
            },
            rises: effect.on_unsafe,
        });
        bar.advance(1);
    }
    bar.finish();
    scored.sort_by(|a, b| {
        let rise = |s: &Scored| s.evidence.refusal_logodds_delta_unsafe;
        rise(b).total_cmp(&rise(a)).then(a.latent.cmp(&b.latent))
    });
    Ok(scored)
}

/// Searches the first of the ranking for small sets.
pub fn sets(bench: &Bench<'_>, ranked: &[u32], cfg: &SetsConfig) -> Result<SetSearch> {
    let pool = &ranked[..cfg.pool.min(ranked.len())];
    let (m, size) = (pool.len(), cfg.size.min(pool.len()));
    let pairs = if size > 1 { m * (m - 1) / 2 } else { 0 };
    let most = m + pairs + (2..size).map(|n| m - n).sum::<usize>();
    let bar = Progress::new("discover", "sets", most as u64);
    let limits = Limits {
        size: cfg.size,
        max_kl: cfg.max_kl,
    };
    let found = search(pool, cfg.value, limits, |latents| {
        let effect = bench.clamped(latents, cfg.value);
        bar.advance(1);
        effect
    })?;
    bar.finish();
    Ok(found)
}
