//! A study as data: what its TOML file may say. Unknown keys are errors; every default is here, and
//! `read.rs` reads and checks.

mod read;

pub use read::SaeToTrain;

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use demur_eval::judge::{self, Verdict};
use demur_model::hooks::Role;

use crate::architecture::ArchitectureConfig;
use crate::catalogue::DEFAULT_MODEL;

/// A whole study.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Study {
    /// Names the run's folder.
    pub name: String,
    /// What it is for, in a sentence; shown in the report.
    #[serde(default)]
    pub description: String,
    /// Every random choice of the study comes from it.
    #[serde(default = "defaults::seed")]
    pub seed: u64,
    /// Which model, and how it runs.
    #[serde(default)]
    pub model: ModelConfig,
    /// Where the SAE comes from.
    pub sae: SaeConfig,
    /// The text that an SAE is trained and judged on.
    #[serde(default)]
    pub corpus: CorpusConfig,
    /// How an SAE is trained; read if `sae.source` is `"train"`.
    #[serde(default)]
    pub train: TrainConfig,
    /// The prompts of discovery, tuning and test.
    #[serde(default)]
    pub prompts: PromptConfig,
    /// How the gate is trained; read if an arm or `demur gate train` wants one.
    #[serde(default)]
    pub gate: GateConfig,
    /// How candidates for the clamp are found.
    #[serde(default)]
    pub discovery: DiscoveryConfig,
    /// The clamp sweep.
    #[serde(default)]
    pub tune: TuneConfig,
    /// Where the gate opens and where it is clear; read if `gated_clamp_damped` is an arm.
    #[serde(default)]
    pub calibrate: CalibrateConfig,
    /// The test.
    #[serde(default)]
    pub evaluate: EvaluateConfig,
}

/// Which model, and how it runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelConfig {
    /// A name from the catalogue, or a path.
    pub name: String,
    /// How products are computed.
    pub precision: Precision,
    /// What keys and values are kept as.
    pub kv_cache: CacheFormat,
    /// Sequences that decode at once.
    pub max_batch: usize,
    /// Tokens in one forward pass.
    pub batch_tokens: usize,
}

/// How products are computed.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Precision {
    /// Weights as in the file, activations in int8 blocks for quantised ones.
    #[default]
    Fast,
    /// Products in f32, quantised weights dequantised as they are used: the reference, slower.
    F32,
}

/// What keys and values are kept as.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum CacheFormat {
    /// As they are.
    #[default]
    F32,
    /// Half the memory.
    Bf16,
    /// Little more than a quarter of the memory.
    Int8,
}

/// Where the SAE comes from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SaeConfig {
    /// Trained here, shipped, or a folder.
    #[serde(default)]
    pub source: SaeSource,
    /// Name of the shipped SAE, or the path of a folder in the SAELens layout.
    #[serde(default)]
    pub name: String,
    /// The hook site it reads.
    pub site: String,
}

/// Where the SAE comes from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SaeSource {
    /// Trained by this study on its corpus.
    #[default]
    Train,
    /// Built into the binary.
    Shipped,
    /// A folder on disk.
    Path,
}

/// The text that an SAE is trained and judged on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CorpusConfig {
    /// JSONL(.gz) files of `text` or `messages`; relative to the study's file.
    pub files: Vec<PathBuf>,
    /// Shares of the files in the tokens that are read of them, one for each; equal, if empty. A file
    /// that has come to its end leaves its share to the others.
    pub weights: Vec<f64>,
    /// Chats that the model writes itself, to prompts that demur ships.
    pub on_policy: bool,
    /// Replies sampled to each prompt of the on-policy corpus.
    pub samples: usize,
    /// Their sampling temperature.
    pub temperature: f32,
    /// Their largest length, tokens.
    pub max_new_tokens: usize,
    /// Times that each prompt of the on-policy corpus is answered by a refusal that demur wrote as well: a model that
    /// refuses next to nothing has no latents for it otherwise.
    #[serde(skip_serializing_if = "is_zero")]
    pub written_refusals: usize,
    /// Files are read up to this many tokens in all.
    pub max_tokens: usize,
    /// Longest sequence, tokens; longer texts are cut.
    pub context: usize,
    /// Whose tokens of chats are trained on; without `"template"`, the marks between turns are left out.
    /// Texts count whole. The first token of a sequence, which may be BOS, never counts.
    pub roles: Vec<Role>,
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// SAE training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainConfig {
    /// Latents active at once on a token; on average for some architectures.
    pub k: usize,
    /// What makes latents active: by default TopK.
    #[serde(skip_serializing_if = "ArchitectureConfig::is_default")]
    pub architecture: ArchitectureConfig,
    /// Latents as a multiple of the residual stream's width.
    pub expansion: f64,
    /// Latents; overrides `expansion`.
    pub d_sae: Option<usize>,
    /// Passes over the corpus.
    pub epochs: f64,
    /// Tokens in a step.
    pub batch: usize,
    /// Adam's peak learning rate; by the number of latents, if absent.
    pub lr: Option<f64>,
    /// Weight of the auxiliary loss that revives dead latents, 0 to turn it off; 1/32 where latents are
    /// selected by `k`, if absent. The other architectures have none.
    pub auxk_alpha: Option<f64>,
    /// Steps over which the learning rate rises from zero to its peak.
    pub warmup_steps: usize,
    /// Tokens without firing after which a latent is dead; those of one pass, if absent, but no more than
    /// `buffer`.
    pub dead_after: Option<u64>,
    /// Tokens whose activations are in memory at once, 4 bytes times `d_model` each, for each site. A corpus
    /// that is larger is streamed through it: in one pass over the model, shuffled by parts of this size.
    pub buffer: usize,
    /// More SAEs, trained from the same pass over the model; what is not given is as for the study's own.
    pub saes: Vec<SaeBeside>,
    /// Steps between states that a stopped run goes on from.
    pub checkpoint_every: usize,
    /// States that are kept: if the newest is damaged, the one before is used. Each takes 24 bytes times
    /// `d_model` times the number of latents.
    pub checkpoints: usize,
}

/// An SAE that is trained beside the study's own, from the same pass over the model. What is not given is
/// as for the study's own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SaeBeside {
    /// Names its folder, in `train/saes/`.
    pub name: String,
    /// The hook site it reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub site: Option<String>,
    /// Latents active at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub k: Option<usize>,
    /// What makes latents active, with keys as in `[train.architecture]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub architecture: Option<ArchitectureConfig>,
    /// Latents as a multiple of the residual stream's width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expansion: Option<f64>,
    /// Latents; overrides `expansion`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub d_sae: Option<usize>,
    /// Adam's peak learning rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// Weight of the auxiliary loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auxk_alpha: Option<f64>,
    /// Of its first weights; the order of rows is the same for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// The prompts of discovery, tuning and test.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PromptConfig {
    /// A JSONL file of prompts with `label` and `split`; the shipped pairs, if absent.
    pub file: Option<PathBuf>,
    /// Which of the shipped pairs, if there is no file.
    pub shipped: ShippedPairs,
    /// At most this many prompts a label of the discovery split; 0 takes all.
    pub discovery: usize,
    /// At most this many prompts a label of the validation split; 0 takes all.
    pub validation: usize,
    /// At most this many prompts a label of the test split; 0 takes all.
    pub test: usize,
    /// A system prompt for every arm.
    pub system: Option<String>,
    /// What sorts the replies.
    #[serde(skip_serializing_if = "JudgeChoice::is_default")]
    pub judge: JudgeChoice,
}

/// What sorts replies.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JudgeChoice {
    /// By their first words.
    #[default]
    Opener,
    /// Sentence by sentence: for a model that says something else before it declines. A partial answer is no refusal.
    Rules,
}

impl JudgeChoice {
    /// Whether it is what a study has that says nothing of it.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The judge.
    pub fn judge(self) -> fn(&str) -> Verdict {
        match self {
            Self::Opener => judge::judge,
            Self::Rules => judge::by_rules,
        }
    }
}

/// Pairs of unsafe requests and safe look-alikes that demur ships.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ShippedPairs {
    /// 132 pairs of short requests in 12 categories.
    #[default]
    Plain,
    /// 408 pairs in nine styles and 18 categories, six of them in no discovery split.
    Styled,
    /// Both.
    All,
}

/// How a gate is trained: on the study's prompts (or on all shipped pairs, if there is no file), on the
/// ordinary requests that demur ships, and on `files`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct GateConfig {
    /// What it may read: each is trained, and the best on validation prompts becomes the gate.
    pub reads: Vec<Reads>,
    /// Hook sites of the residual that it may read, none after the SAE's; only the SAE's, if empty.
    pub sites: Vec<String>,
    /// How many latents it may read; each is tried.
    pub sizes: Vec<usize>,
    /// Penalties of the logistic regression; each is tried.
    pub l2: Vec<f64>,
    /// Fraction of unsafe validation prompts that it must catch.
    pub recall: f64,
    /// How heads of attention are trained, if it may read with them.
    pub attention: AttentionConfig,
    /// JSONL(.gz) files of more labelled prompts to learn from; relative to the study's file. One in
    /// five is for validation, whatever split the file says; none is for the test.
    pub files: Vec<PathBuf>,
    /// At most this many prompts of each of the files, drawn by the study's seed; 0 takes all.
    pub per_file: usize,
    /// A JSONL(.gz) file of wrappers, `id` and `template` with `{request}`, under which some of the prompts
    /// are learnt from as well; relative to the study's file. One wrapper in five is for validation.
    pub wrappers: Option<PathBuf>,
    /// The share of prompts that are read under a wrapper as well; around each are as many of either label.
    pub wrapped: f64,
    /// JSONL(.gz) files of prompts that are kept for a test: nothing that is like one of them is learnt
    /// from. Relative to the study's file.
    pub held_out: Vec<PathBuf>,
    /// How many of the discovery prompts base is asked, and a quarter as many of the validation prompts, to learn where it would
    /// refuse by itself: damping is kept to there. 0: it is not asked, and damping is wherever the gate is clear.
    pub asked: usize,
}

/// What a gate reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Reads {
    /// Latents of the SAE.
    Latents,
    /// The residual itself, at `sites`: linear probes of what is pooled.
    Residual,
    /// The residual at `sites`, by heads of attention, which say themselves which tokens count.
    Attention,
}

/// How heads of attention are trained: by Adam, over minibatches of 64 prompts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttentionConfig {
    /// Heads.
    pub heads: usize,
    /// Passes over the prompts.
    pub epochs: usize,
    /// Largest step.
    pub rate: f64,
    /// Trainings that are averaged: each has heads of its own.
    pub trainings: usize,
}

/// How candidates are found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DiscoveryConfig {
    /// Ways to find candidates; the short list takes an equal share of each.
    pub methods: Vec<Method>,
    /// Reply length of the discovery prompts, tokens.
    pub reply_tokens: usize,
    /// Reply tokens that a contrast looks at, after the prompt's closing template tokens.
    pub window: usize,
    /// Latents active on more of the harvest than this are set aside.
    pub max_density: f64,
    /// Size of the short list that is clamped and scored.
    pub candidates: usize,
    /// The clamp of the causal score, times the latent's largest activation.
    pub clamp: f64,
    /// Validation prompts a label in the causal score.
    pub causal_prompts: usize,
    /// What latents add to the refusal log-odds, by gradients; off by default.
    #[serde(skip_serializing_if = "AttributionConfig::is_off")]
    pub attribution: AttributionConfig,
    /// Draws of the prompts, with replacement, that say how stable the short list and its ranking are;
    /// no model runs for it. 0 turns it off.
    pub resamples: usize,
    /// A search for small sets of latents that raise the refusal together; off by default.
    #[serde(skip_serializing_if = "SetsConfig::is_off")]
    pub sets: SetsConfig,
    /// Compare all sites of the model: where unsafe requests differ from look-alikes, and where the
    /// direction of refusal acts. One pass a site over the validation prompts.
    pub compare_sites: bool,
    /// Latents in the report.
    pub report_features: usize,
}

/// How the refusal log-odds at the first reply token are attributed to latents.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AttributionConfig {
    /// Unsafe discovery prompts that are looked at, spread evenly over all; 0 turns it off.
    pub prompts: usize,
    /// Steps of the integrated form, beside the first-order one; 0 leaves it out. A prompt costs one
    /// gradient and one more for each step.
    pub steps: usize,
}

impl AttributionConfig {
    /// Whether there is nothing to do.
    pub fn is_off(&self) -> bool {
        *self == Self::default()
    }
}

/// A search for small sets of latents, by the refusal log-odds at the first reply token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SetsConfig {
    /// Latents of the largest set; 0 turns it off. `tune` then tries the sets found beside those that
    /// are the first of the ranking, for each of its `set_sizes`.
    pub size: usize,
    /// Latents that are searched, the first of the ranking. All their pairs are measured.
    pub pool: usize,
    /// The value that each is clamped to, times its largest activation.
    pub value: f64,
    /// The most that a set may change benign text: mean KL from base at the first reply token, nats.
    pub max_kl: f64,
}

impl SetsConfig {
    /// Whether there is nothing to do.
    pub fn is_off(&self) -> bool {
        self.size == 0
    }
}

impl Default for SetsConfig {
    fn default() -> Self {
        Self {
            size: 0,
            pool: 8,
            value: 0.5,
            max_kl: 0.1,
        }
    }
}

/// A way to find candidates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Latents active on at least two tokens of one refusal.
    PaperRecipe,
    /// Harmful requests against their harmless look-alikes.
    HarmfulVsLookalike,
    /// Requests refused against requests complied with.
    RefusedVsComplied,
    /// Latents that add most to the refusal log-odds; needs `attribution`.
    Attribution,
    /// Refusals that demur wrote against the model's own replies to the same prompts: for a model that refuses next to
    /// nothing. Then the direction of refusal is the difference of these, too.
    WrittenRefusals,
}

/// The clamp sweep.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TuneConfig {
    /// Clamp values.
    pub values: Vec<f64>,
    /// What they are measured in.
    pub unit: ValueUnit,
    /// How many of the best latents are clamped together.
    pub set_sizes: Vec<usize>,
    /// Refusal of unsafe validation prompts that is asked for; among the settings that reach it,
    /// the one that refuses fewest safe prompts wins.
    pub aim_refusal_unsafe: f64,
    /// Reply length, tokens.
    pub max_new_tokens: usize,
    /// Validation prompts a label; 0 takes all.
    pub prompts: usize,
}

/// Where the gate of the damped arm opens and where it is clear, chosen on the gate's validation prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CalibrateConfig {
    /// The clamp's values where the gate is open, times those that `tune` found strongest, on the template's
    /// tokens and the reply; each is tried.
    pub clamp: Vec<f64>,
    /// How far the clamped latents are set to the other side where the gate is clear, times the values that
    /// `tune` found strongest, on the template's tokens and the first four of the reply; each is tried.
    pub damp: Vec<f64>,
    /// Refusal of unsafe prompts that is asked for; among the settings that reach it, the one that
    /// refuses fewest safe prompts wins.
    pub aim_refusal_unsafe: f64,
    /// The most that replies to ordinary chats may change: mean KL from base, nats a token.
    pub max_chat_kl: f64,
    /// Reply length, tokens.
    pub max_new_tokens: usize,
    /// Validation prompts a label, at equal distances; 0 takes all.
    pub prompts: usize,
}

/// The unit of a clamp value.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ValueUnit {
    /// Times the latent's largest activation over the harvest.
    #[default]
    RelMax,
    /// Activations.
    Abs,
}

/// The test.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// What is compared; the first must be `base`.
    pub arms: Vec<Arm>,
    /// Clamps and differences of means, gated or not, are asked with their values times each of these as well: what they refuse where they
    /// refuse as many safe requests as the best arm. Not what was calibrated, and no controls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub strengths: Vec<f64>,
    /// Reply length, tokens.
    pub max_new_tokens: usize,
    /// Passages of benign text for KL and perplexity; 0 takes all.
    pub passages: usize,
}

/// The arms that a study can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// The model as it is.
    Base,
    /// The residual becomes the SAE's reconstruction; nothing is edited.
    SaePassthrough,
    /// The chosen latents are set to the chosen value; the reconstruction error stays.
    Clamp,
    /// The same with the reconstruction error dropped.
    ClampErrorDropped,
    /// As many other latents, moved about as far: the control.
    RandomLatent,
    /// The mean difference of refused and complied prompts is added: a baseline without an SAE.
    DifferenceOfMeans,
    /// As many other latents that fire about as often as the chosen ones, moved about as far.
    FrequencyMatchedLatent,
    /// The same as `difference_of_means` where the residual is like that of unsafe prompts (CAST).
    ConditionalDifferenceOfMeans,
    /// The model is asked in words to refuse harm.
    SystemPrompt,
    /// The strongest clamp where the trained gate is open.
    GatedClamp,
    /// The same, as far as was calibrated, and the latents are set to the other side where it is clear.
    GatedClampDamped,
    /// The plan that demur ships for the default model, whatever this study found.
    DefaultPlan,
}

impl Arm {
    /// Whether it may be run at other strengths: it has one, nothing was calibrated to it, and it is no control.
    pub fn has_strength(self) -> bool {
        match self {
            Self::Clamp
            | Self::ClampErrorDropped
            | Self::DifferenceOfMeans
            | Self::ConditionalDifferenceOfMeans
            | Self::GatedClamp => true,
            Self::Base
            | Self::SaePassthrough
            | Self::SystemPrompt
            | Self::RandomLatent
            | Self::FrequencyMatchedLatent
            | Self::GatedClampDamped
            | Self::DefaultPlan => false,
        }
    }

    /// The name in records.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::SaePassthrough => "sae_passthrough",
            Self::Clamp => "clamp",
            Self::ClampErrorDropped => "clamp_error_dropped",
            Self::RandomLatent => "random_latent",
            Self::DifferenceOfMeans => "difference_of_means",
            Self::FrequencyMatchedLatent => "frequency_matched_latent",
            Self::ConditionalDifferenceOfMeans => "conditional_difference_of_means",
            Self::SystemPrompt => "system_prompt",
            Self::GatedClamp => "gated_clamp",
            Self::GatedClampDamped => "gated_clamp_damped",
            Self::DefaultPlan => "default_plan",
        }
    }

    /// Whether it needs a trained gate.
    pub fn is_gated(self) -> bool {
        matches!(
            self,
            Self::ConditionalDifferenceOfMeans | Self::GatedClamp | Self::GatedClampDamped
        )
    }
}

mod defaults {
    pub fn seed() -> u64 {
        1
    }
}

impl Default for ModelConfig {
    fn default() -> Self {
        Self {
            name: DEFAULT_MODEL.to_owned(),
            precision: Precision::Fast,
            kv_cache: CacheFormat::F32,
            max_batch: 16,
            batch_tokens: 1024,
        }
    }
}

impl Default for CorpusConfig {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            weights: Vec::new(),
            on_policy: true,
            samples: 1,
            written_refusals: 0,
            temperature: 0.8,
            max_new_tokens: 64,
            max_tokens: 200_000,
            context: 256,
            roles: vec![Role::Template, Role::System, Role::User, Role::Assistant],
        }
    }
}

impl Default for TrainConfig {
    fn default() -> Self {
        Self {
            k: 32,
            architecture: ArchitectureConfig::default(),
            expansion: 8.0,
            d_sae: None,
            epochs: 4.0,
            batch: 2048,
            lr: None,
            auxk_alpha: None,
            warmup_steps: 100,
            dead_after: None,
            buffer: 131_072,
            saes: Vec::new(),
            checkpoint_every: 100,
            checkpoints: 3,
        }
    }
}

impl TrainConfig {
    /// What the SAE depends on: how states are kept may be changed between a stop and going on.
    pub fn inputs(&self) -> Self {
        let Self {
            checkpoint_every,
            checkpoints,
            ..
        } = Self::default();
        Self {
            checkpoint_every,
            checkpoints,
            ..self.clone()
        }
    }
}

impl Default for DiscoveryConfig {
    fn default() -> Self {
        Self {
            methods: vec![
                Method::PaperRecipe,
                Method::HarmfulVsLookalike,
                Method::RefusedVsComplied,
            ],
            reply_tokens: 24,
            window: 4,
            max_density: 0.2,
            candidates: 24,
            clamp: 1.5,
            causal_prompts: 12,
            attribution: AttributionConfig::default(),
            resamples: 200,
            sets: SetsConfig::default(),
            compare_sites: false,
            report_features: 12,
        }
    }
}

impl Default for GateConfig {
    fn default() -> Self {
        Self {
            reads: vec![Reads::Latents, Reads::Residual],
            sites: Vec::new(),
            sizes: vec![16, 64, 256],
            l2: vec![0.01, 0.1, 1.0],
            recall: 0.95,
            attention: AttentionConfig::default(),
            files: Vec::new(),
            per_file: 0,
            wrappers: None,
            wrapped: 0.3,
            held_out: Vec::new(),
            asked: 0,
        }
    }
}

impl Default for AttentionConfig {
    fn default() -> Self {
        Self {
            heads: 8,
            epochs: 4,
            rate: 5e-4,
            trainings: 1,
        }
    }
}

impl Default for TuneConfig {
    fn default() -> Self {
        Self {
            values: vec![0.5, 1.0, 1.5, 2.0, 3.0],
            unit: ValueUnit::RelMax,
            set_sizes: vec![1, 2, 4],
            aim_refusal_unsafe: 0.9,
            max_new_tokens: 12,
            prompts: 24,
        }
    }
}

impl Default for CalibrateConfig {
    fn default() -> Self {
        Self {
            clamp: vec![1.0],
            damp: vec![0.25, 0.5, 1.0],
            aim_refusal_unsafe: 0.9,
            max_chat_kl: 0.1,
            max_new_tokens: 24,
            prompts: 0,
        }
    }
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            arms: vec![
                Arm::Base,
                Arm::SaePassthrough,
                Arm::Clamp,
                Arm::ClampErrorDropped,
                Arm::RandomLatent,
            ],
            strengths: Vec::new(),
            max_new_tokens: 32,
            passages: 12,
        }
    }
}
