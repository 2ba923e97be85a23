//! The feature table: latents with the evidence for each, as data.
//!
//! A *latent* is an index into the dictionary; a *feature* is a latent with evidence. Each piece of
//! evidence is optional: a discovery that did not look for it leaves it out, and nothing is guessed.

use serde::{Deserialize, Serialize};

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

/// What a discovery leaves behind.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct FeatureTable {
    /// The methods that were run, in order.
    pub methods: Vec<String>,
    /// Features, best first.
    pub features: Vec<Feature>,
}
