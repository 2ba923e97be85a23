//! The feature table: latents with the evidence for each, as data.
//!
//! A *latent* is an index into the dictionary; a *feature* is a latent with evidence. Each piece of
//! evidence is optional: a discovery that did not look for it leaves it out, and nothing is guessed.

use serde::{Deserialize, Serialize};

use crate::stats::Estimate;

/// A latent with everything that was found out about it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Feature {
    /// Index of the latent.
    pub latent: u32,
    /// Place in the ranking, 0 first.
    pub rank: usize,
    /// Whether the plan edits it.
    pub chosen: bool,
    /// Why it is here.
    pub evidence: Evidence,
    /// Tokens whose logit its decoder row raises most, through the final norm and the head.
    #[serde(default)]
    pub promotes: Vec<TokenLogit>,
    /// Tokens whose logit it lowers most.
    #[serde(default)]
    pub suppresses: Vec<TokenLogit>,
    /// Where it fires most, in context.
    #[serde(default)]
    pub top_activations: Vec<TopActivation>,
    /// Of its activations where it is active, over the harvest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activations: Option<Histogram>,
    /// Of the logits of its decoder row, over the vocabulary.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logits: Option<Histogram>,
}

/// The evidence for one latent.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    /// The paper's recipe: active on the refusal of one handcrafted prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paper_recipe: Option<RecipeEvidence>,
    /// Harmful requests against their harmless look-alikes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub harmful_vs_lookalike: Option<ContrastEvidence>,
    /// Requests that the model refused against requests that it complied with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused_vs_complied: Option<ContrastEvidence>,
    /// Written refusals against own replies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub written_refusals: Option<ContrastEvidence>,
    /// Fraction of harvested tokens on which it is active.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub density: Option<f64>,
    /// Largest activation over the harvest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_activation: Option<f64>,
    /// Cosine of its decoder row with the difference of means, refused minus complied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cosine_refusal_direction: Option<f64>,
    /// What it adds to the refusal log-odds of unsafe discovery prompts, by gradients.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub attribution: Option<AttributionEvidence>,
    /// What clamping it does, on validation prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causal: Option<CausalEvidence>,
    /// How much its place owes to the prompts that there happened to be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stability: Option<StabilityEvidence>,
}

/// Evidence from the paper's recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecipeEvidence {
    /// Tokens of the refusal on which the latent is active.
    pub active_refusal_tokens: usize,
}

/// A comparison of two groups of prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContrastEvidence {
    /// Mean over the first group of the latent's largest activation.
    pub mean_pos: f64,
    /// The same over the second group.
    pub mean_neg: f64,
    /// `mean_pos - mean_neg`.
    pub diff: f64,
    /// Probability that a member of the first group exceeds one of the second; ties count half.
    pub auroc: f64,
    /// p value, adjusted over all latents tested (Benjamini-Hochberg).
    pub q: f64,
    /// Whether it is Wilcoxon's, of pairs; else Mann-Whitney's.
    #[serde(default)]
    pub paired: bool,
}

/// What a latent adds to the refusal log-odds at the first reply token; see
/// [`attribution`](crate::attribution).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AttributionEvidence {
    /// Prompts that were looked at.
    pub prompts: usize,
    /// Those in which it is active.
    pub active: usize,
    /// Mean over all prompts of the first-order estimate, nats; above 0 it is for refusal.
    pub mean: f64,
    /// p value of Wilcoxon's test over prompts, adjusted over all latents that are active in one
    /// (Benjamini-Hochberg).
    pub q: f64,
    /// The integrated form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub integrated: Option<IntegratedEvidence>,
}

/// Integrated gradients, from no latent at all to those of the prompt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct IntegratedEvidence {
    /// Steps of the path.
    pub steps: usize,
    /// Mean over all prompts, nats.
    pub mean: f64,
    /// As of the first-order estimate.
    pub q: f64,
}

/// What a clamp of this latent alone does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CausalEvidence {
    /// The clamp's value, times the latent's largest activation.
    pub value: f64,
    /// Mean rise of the refusal log-odds at the first reply token, unsafe prompts.
    pub refusal_logodds_delta_unsafe: f64,
    /// The same on safe prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal_logodds_delta_safe: Option<f64>,
    /// Mean next-token KL(base || clamped) at the first reply token of benign prompts, nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kl_benign: Option<f64>,
}

/// How often a latent is found if prompts are drawn again; see [`ranking`](crate::ranking).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StabilityEvidence {
    /// Fraction of draws of the discovery prompts in which it is on the short list.
    pub short_list: f64,
    /// First place in the ranking, 0 first, of the 95 % percentile interval over draws of the validation
    /// prompts.
    pub rank_lo: usize,
    /// Last place of that interval.
    pub rank_hi: usize,
}

/// Equal bins from `lo` to `hi`, of which the last has `hi` in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The least value.
    pub lo: f64,
    /// The greatest.
    pub hi: f64,
    /// Values in each bin.
    pub counts: Vec<u64>,
}

impl Histogram {
    /// Counts `values` in `bins` bins; `None` without a finite value or without a bin. Values that are not
    /// finite are left out.
    pub fn of(values: &[f32], bins: usize) -> Option<Self> {
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let lo = f64::from(finite().reduce(f32::min)?);
        let hi = f64::from(finite().reduce(f32::max)?);
        let mut counts = vec![0u64; bins];
        let last = bins.checked_sub(1)?;
        for v in finite() {
            let share = match hi > lo {
                true => (f64::from(v) - lo) / (hi - lo),
                false => 0.0,
            };
            counts[((share * bins as f64) as usize).min(last)] += 1;
        }
        Some(Self { lo, hi, counts })
    }

    /// The middle of each bin.
    pub fn middles(&self) -> Vec<f64> {
        let width = (self.hi - self.lo) / self.counts.len().max(1) as f64;
        (0..self.counts.len())
            .map(|i| self.lo + (i as f64 + 0.5) * width)
            .collect()
    }
}

/// A token and its logit.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TokenLogit {
    /// The token's text.
    pub token: String,
    /// Its logit, relative to the mean over the vocabulary.
    pub logit: f64,
}

/// A stretch of text around a place where a latent is strongly active.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TopActivation {
    /// The activation at the peak.
    pub value: f64,
    /// Where the text is from, for instance `discovery/unsafe-012`.
    pub source: String,
    /// The tokens' texts.
    pub tokens: Vec<String>,
    /// The latent's activation on each token.
    pub acts: Vec<f32>,
    /// Index of the peak in `tokens`.
    pub peak: usize,
}

/// What clamping a set of latents together does, on validation prompts; see [`sets`](crate::sets).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetEvidence {
    /// The latents, in the order in which they were added.
    pub latents: Vec<u32>,
    /// Rise of the refusal log-odds at the first reply token over base, unsafe prompts.
    pub refusal_logodds_delta_unsafe: Estimate,
    /// The same on safe prompts.
    pub refusal_logodds_delta_safe: Estimate,
    /// Mean next-token KL(base || clamped) at the first reply token of benign prompts, nats.
    pub kl_benign: f64,
    /// The rise on unsafe prompts less what the latents do alone; none for a single one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interaction: Option<Estimate>,
    /// The rise on unsafe prompts over that of the best smaller set, for sets that were chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain: Option<Estimate>,
}

/// A search for small sets.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SetSearch {
    /// The value of each latent, times its largest activation.
    pub value: f64,
    /// The most that a set may change benign text, nats.
    pub max_kl: f64,
    /// The best set of each size, from one on; it ends where a larger one gains nothing.
    pub sets: Vec<SetEvidence>,
    /// Every latent that was looked at, alone, the best of the ranking first.
    pub singles: Vec<SetEvidence>,
    /// All their pairs.
    pub pairs: Vec<SetEvidence>,
}

impl SetSearch {
    /// The pairs, the strongest interaction first, of either sign.
    pub fn strongest_pairs(&self) -> Vec<&SetEvidence> {
        let strength = |p: &SetEvidence| p.interaction.map_or(0.0, |i| i.value.abs());
        let mut pairs: Vec<&SetEvidence> = self.pairs.iter().collect();
        pairs.sort_by(|a, b| strength(b).total_cmp(&strength(a)));
        pairs
    }
}

/// How well two detectors tell unsafe validation prompts from safe ones: AUROC.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Separation {
    /// The difference of the means of unsafe and safe discovery prompts.
    pub direction: Estimate,
    /// A logistic regression on them.
    pub probe: Estimate,
}

/// What adding the direction of refusal at a site does, on validation prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DirectionEvidence {
    /// Length of refused minus complied, over the mean length of the residual at the last prompt token.
    pub relative_norm: f64,
    /// Rise of the refusal log-odds at the first reply token over base, unsafe prompts.
    pub refusal_logodds_delta_unsafe: Estimate,
    /// The same on safe prompts.
    pub refusal_logodds_delta_safe: Estimate,
    /// Mean next-token KL(base || steered) at the first reply token of benign prompts, nats.
    pub kl_benign: f64,
}

/// One site; see [`sites`](crate::sites).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SiteEvidence {
    /// The site.
    pub site: String,
    /// Of the residual at the last prompt token.
    pub last: Separation,
    /// Of its mean over the tokens of the user and the template.
    pub mean: Separation,
    /// What the direction of refusal does there; none if base refused no discovery prompt, or all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<DirectionEvidence>,
}

/// How much of a ranking is chance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stability {
    /// Draws of the prompts.
    pub draws: usize,
    /// Of each method that scores latents, by name: mean rank correlation with its ranking of the prompts
    /// as they are.
    pub methods: Vec<(String, f64)>,
    /// The same of the ranking of the short list by clamps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub causal: Option<f64>,
}

/// What a discovery leaves behind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FeatureTable {
    /// The methods that were run, in order.
    pub methods: Vec<String>,
    /// Features, best first.
    pub features: Vec<Feature>,
    /// How much of their ranking is chance, if prompts were drawn again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stability: Option<Stability>,
    /// The search for sets, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sets: Option<SetSearch>,
    /// All sites compared, in order; empty, if they were not.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sites: Vec<SiteEvidence>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_by_hand() {
        let h = Histogram::of(&[1.0, 1.4, 2.0, 3.0, f32::NAN, f32::INFINITY], 4).unwrap();
        // bins of 0.5 from 1 to 3: 1.0 and 1.4 | - | 2.0 | 3.0, which is in the last
        assert_eq!((h.lo, h.hi, &h.counts[..]), (1.0, 3.0, &[2, 0, 1, 1][..]));
        assert_eq!(h.middles(), [1.25, 1.75, 2.25, 2.75]);
        let one = Histogram::of(&[2.0, 2.0], 3).unwrap();
        assert_eq!(one.counts, [2, 0, 0]);
        assert_eq!(Histogram::of(&[f32::NAN], 3), None);
        assert_eq!(Histogram::of(&[1.0], 0), None);
    }
}
