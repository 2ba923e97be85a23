//! Stage `discover`: which latents mediate refusal, with the evidence for each.
//!
//! Base answers the discovery prompts. Over the tokens at which a refusal is decided (the template's
//! last tokens and the first of the reply) latents are contrasted: harmful requests against their
//! look-alikes, and refused against complied ones. The paper's recipe adds the latents that are
//! active on two or more tokens of one refusal. Gradients say what each latent adds to the refusal
//! log-odds. The short list is clamped, one latent at a time (`causal.rs`), and
//! scored on *validation* prompts by the rise of the refusal log-odds at the first reply token.
//!
//! If asked, small sets of the best are searched the same way, and all sites of the model are compared
//! (`sites.rs`). How stable the short list is, `stability.rs` says. For a model that refuses next to nothing
//! refusals are written (`written.rs`).

mod causal;
mod sites;
mod stability;
mod written;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Result, bail};
use demur_eval::arms::{Arm, Item};
use demur_eval::judge::{Verdict, refusal_log_odds_gradient};
use demur_eval::prompts::{Label, Prompt, Split};
use demur_features::FeatureError;
use demur_features::activations::{
    CodedSequence, activations_over, active_on_reply, latent_stats, top_activations,
};
use demur_features::attribution::{Attributions, PromptAttribution, attribute};
use demur_features::contrast::{Design, PromptSummary, contrast};
use demur_features::harvest::{Products, Sequence, harvest};
use demur_features::lens;
use demur_features::ranking::{places, short_list};
use demur_features::sites::difference_of_means;
use demur_features::table::{
    Evidence, Feature, FeatureTable, Histogram, RecipeEvidence, StabilityEvidence,
};
use demur_sae::Sae;
use demur_steering::{InterventionSpec, LatentEdit, Op, SteeringPlan, Unit};
use serde::{Deserialize, Serialize};

use super::config::Method;
use super::corpus::read_sequences;
use super::{SAE_NAME, StudyContext, Working, with_reply};
use crate::progress::{Progress, note};
use causal::Bench;
use written::Written;

/// Tokens of context on each side of a top activation.
const CONTEXT: usize = 8;
/// Template tokens before the reply that a contrast looks at.
const CLOSING: usize = 3;
/// Tokens that a feature promotes, and tokens that it suppresses.
const TOKENS: usize = 10;
/// Contexts of a feature.
const CONTEXTS: usize = 5;
/// Bins of a histogram.
const BINS: usize = 50;
/// Benign prompts on which candidates are priced.
const BENIGN: usize = 4;
/// Benign prompts on which sets and sites are: there a limit is set by it.
const MORE_BENIGN: usize = 8;

/// What the stage leaves.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Found {
    pub table: FeatureTable,
    pub refused_unsafe: usize,
    /// `[d_sae]`, over held-out text and discovery chats.
    pub max_activation: Vec<f32>,
    /// Fraction of tokens on which each latent is active, `[d_sae]`.
    pub density: Vec<f64>,
    /// Mean residual norm at the site, first tokens left out.
    pub resid_norm: f32,
    /// Refused minus complied, mean residual at the last prompt token, `[d_model]`; if none or all were refused and
    /// refusals were written, these less the model's own replies, over the reply's first tokens.
    pub refusal_direction: Vec<f32>,
    /// Whether it is the latter: of what is said in a refusal, not of where it is decided.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub direction_is_said: bool,
    /// Latents that written refusals are made of, the largest part first, each with its mean activation there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub written: Vec<(u32, f32)>,
}

pub fn run(c: &StudyContext, sae: &Arc<Sae>, corpus: &Path, scratch: &Path) -> Result<Found> {
    let cfg = &c.study.discovery;
    let on_unsafe = c.prompts(Split::Discovery, Label::Unsafe);
    let on_safe = c.prompts(Split::Discovery, Label::Safe);
    let prompts: Vec<&Prompt> = on_unsafe.iter().chain(&on_safe).copied().collect();
    let items = c.items(&prompts)?;
    let replies = c.replies(
        "discover",
        &[Arm {
            name: "base",
            hook: None,
            items: &items,
        }],
        cfg.reply_tokens,
        scratch,
    )?;
    let refused: Vec<bool> = replies
        .iter()
        .map(|r| r.verdict == Verdict::Refusal)
        .collect();
    let refused_unsafe = refused[..on_unsafe.len()].iter().filter(|r| **r).count();

    // Codes of discovery chats and of held-out text.
    let chats: Vec<Sequence> = items
        .iter()
        .zip(&replies)
        .map(|(i, r)| with_reply(i, &r.tokens))
        .collect();
    let mut codes = Codes::new(c, sae);
    let chats = codes.of(&chats, "discovery")?;
    let mut all = chats.clone();
    for (file, kind) in [("chat.jsonl", "held-out chat"), ("text.jsonl", "text")] {
        all.extend(codes.of(&read_sequences(&corpus.join(file))?, kind)?);
    }
    let written = match cfg.methods.contains(&Method::WrittenRefusals) {
        true => Some(Written::new(c, sae, &items)?),
        false => None,
    };
    all.extend(written.iter().flat_map(|w| w.chats.iter().cloned()));
    let stats = latent_stats(&all, sae);
    let (norm_sum, norm_n) = codes.norms;
    let resid_norm = (norm_sum / norm_n.max(1) as f64) as f32;
    let mut direction = difference_of_means(&codes.last_prompt_rows(&items), &refused);
    let mut direction_is_said = false;
    if let Some(written) = &written
        && direction.iter().all(|v| *v == 0.0)
    {
        direction = written.direction(&codes.rows, &items, cfg.window);
        direction_is_said = true;
    }

    // Contrasts and recipe.
    let summarised = |chats: &[CodedSequence]| -> Vec<PromptSummary> {
        let both = items.iter().zip(chats);
        both.map(|(item, chat)| {
            let prompt = item.tokens.len();
            chat.summary(
                prompt.saturating_sub(CLOSING)..prompt + cfg.window,
                sae.d_sae(),
            )
        })
        .collect()
    };
    let summaries = summarised(&chats);
    let refusing = written.as_ref().map(|w| summarised(&w.chats));
    let pick = |keep: &dyn Fn(usize) -> bool| -> Vec<&PromptSummary> {
        (0..items.len())
            .filter(|&i| keep(i))
            .map(|i| &summaries[i])
            .collect()
    };
    let n_unsafe = on_unsafe.len();
    let attributed = attribute_prompts(c, sae, &items[..n_unsafe], &codes.rows)?;
    let attributions = attributed
        .as_ref()
        .map(|(_, found)| Attributions::new(found, cfg.attribution.steps));
    let pairing = design(&on_unsafe, &on_safe);
    // The paper's recipe on one refusal: latents with the tokens on which they are active.
    let recipe = |i: usize| -> Vec<(u32, usize)> {
        let prompt = items[i].tokens.len();
        let mut found = active_on_reply(&chats[i], prompt..chats[i].tokens.len(), 2);
        found.retain(|(j, _)| stats.density[*j as usize] <= cfg.max_density);
        found
    };
    let mut evidence: BTreeMap<u32, Evidence> = BTreeMap::new();
    let mut rankings: Vec<Vec<u32>> = Vec::new();
    for method in &cfg.methods {
        rankings.push(match method {
            Method::PaperRecipe => {
                let first = (0..n_unsafe).find(|&i| refused[i]);
                let found = first.map(recipe).unwrap_or_default();
                for &(j, count) in &found {
                    evidence.entry(j).or_default().paper_recipe = Some(RecipeEvidence {
                        active_refusal_tokens: count,
                    });
                }
                found.iter().map(|f| f.0).collect()
            }
            Method::HarmfulVsLookalike => {
                let (p, n) = (pick(&|i| i < n_unsafe), pick(&|i| i >= n_unsafe));
                let found = contrast(
                    "harmful_vs_lookalike",
                    &p,
                    &n,
                    pairing,
                    &stats.density,
                    cfg.max_density,
                )?;
                for (j, e) in &found {
                    evidence.entry(*j).or_default().harmful_vs_lookalike = Some(e.clone());
                }
                found.iter().map(|f| f.0).collect()
            }
            Method::RefusedVsComplied => {
                let (p, n) = (pick(&|i| refused[i]), pick(&|i| !refused[i]));
                let found = contrast(
                    "refused_vs_complied",
                    &p,
                    &n,
                    Design::Groups,
                    &stats.density,
                    cfg.max_density,
                );
                let found = match found {
                    // A model that refuses nothing, or all, can still be steered by what else is found.
                    Err(e @ FeatureError::TooFew { .. }) => {
                        note(format_args!("{:<12} {e}; left out", "discover"));
                        Vec::new()
                    }
                    found => found?,
                };
                for (j, e) in &found {
                    evidence.entry(*j).or_default().refused_vs_complied = Some(e.clone());
                }
                found.iter().map(|f| f.0).collect()
            }
            Method::Attribution => {
                let ranked = attributions.as_ref().map(Attributions::ranked);
                let mut ranked = ranked.unwrap_or_default();
                ranked.retain(|&j| stats.density[j as usize] <= cfg.max_density);
                ranked
            }
            Method::WrittenRefusals => {
                let refusing = refusing.iter().flatten().collect::<Vec<_>>();
                let found = contrast(
                    "written_refusals",
                    &refusing,
                    &pick(&|_| true),
                    Design::Pairs,
                    &stats.density,
                    cfg.max_density,
                )?;
                for (j, e) in &found {
                    evidence.entry(*j).or_default().written_refusals = Some(e.clone());
                }
                found.iter().map(|f| f.0).collect()
            }
        });
    }
    let short = short_list(&rankings, cfg.candidates);
    if short.is_empty() {
        bail!("no latent passed the filters: raise discovery.max_density or give more prompts");
    }

    let working = Working {
        sae: Arc::clone(sae),
        sha256: String::new(),
        max_activation: stats.max_activation.clone().into(),
        resid_norm,
    };
    let scored = causal::score(&Bench::new(c, &working, 0, BENIGN)?, &short)?;
    let of_prompts = stability::Prompts {
        summaries: &summaries,
        refusing: refusing.as_deref(),
        refused: &refused,
        n_unsafe,
        pairing,
        density: &stats.density,
        attributed: attributed.as_ref(),
        recipe: &recipe,
    };
    let resampled = of_prompts.resample(cfg, c.study.seed);
    let rises: Vec<Vec<f64>> = scored.iter().map(|s| s.rises.clone()).collect();
    let placed = places(&rises, cfg.resamples, c.study.seed);
    let ranked: Vec<u32> = scored.iter().map(|s| s.latent).collect();
    let bench = match !cfg.sets.is_off() || cfg.compare_sites {
        true => Some(Bench::new(c, &working, cfg.causal_prompts, MORE_BENIGN)?),
        false => None,
    };
    let sets = match &bench {
        Some(bench) if !cfg.sets.is_off() => Some(causal::sets(bench, &ranked, &cfg.sets)?),
        _ => None,
    };
    let sites = match &bench {
        Some(bench) if cfg.compare_sites => sites::compare(bench, &prompts, &refused)?,
        _ => Vec::new(),
    };

    let text = |id: u32| c.loaded.tokenizer.token_text(id);
    let table = scored
        .into_iter()
        .zip(placed.intervals)
        .enumerate()
        .map(|(rank, (scored, (rank_lo, rank_hi)))| {
            let latent = scored.latent;
            let row = sae.decoder_row(latent as usize);
            let mut e = evidence.remove(&latent).unwrap_or_default();
            e.density = Some(stats.density[latent as usize]);
            e.max_activation = Some(f64::from(stats.max_activation[latent as usize]));
            e.cosine_refusal_direction = Some(cosine(row, &direction));
            e.attribution = attributions.as_ref().map(|a| a.of(latent));
            e.causal = Some(scored.evidence);
            e.stability = resampled.as_ref().map(|r| StabilityEvidence {
                short_list: r.listed.get(&latent).copied().unwrap_or_default(),
                rank_lo,
                rank_hi,
            });
            let mut feature = Feature {
                latent,
                rank,
                chosen: false,
                evidence: e,
                promotes: Vec::new(),
                suppresses: Vec::new(),
                top_activations: Vec::new(),
                activations: None,
                logits: None,
            };
            if rank < cfg.report_features {
                let logits = lens::logits(&c.loaded.model, row);
                (feature.promotes, feature.suppresses) = lens::promoted(&logits, TOKENS, text);
                feature.top_activations = top_activations(&all, latent, CONTEXTS, CONTEXT, text);
                feature.activations = Histogram::of(&activations_over(&all, latent), BINS);
                feature.logits = Histogram::of(&logits, BINS);
            }
            feature
        })
        .collect();
    let methods: Vec<String> = cfg
        .methods
        .iter()
        .map(|m| serde_json::to_value(m).map(|v| v.as_str().unwrap_or_default().to_owned()))
        .collect::<Result<_, _>>()?;
    Ok(Found {
        table: FeatureTable {
            stability: resampled.map(|r| stability::summary(r, &methods, cfg, placed.correlation)),
            methods,
            features: table,
            sets,
            sites,
        },
        refused_unsafe,
        max_activation: stats.max_activation,
        density: stats.density,
        resid_norm,
        written: written.map_or_else(Vec::new, |w| w.parts(sae, &chats, &items, cfg.window)),
        refusal_direction: direction,
        direction_is_said,
    })
}

/// What latents add to the refusal log-odds of unsafe prompts, on the tokens that a clamp edits: which
/// prompts, and what was found of each. `rows` are the residuals of each prompt and its reply.
fn attribute_prompts(
    c: &StudyContext,
    sae: &Sae,
    items: &[Item],
    rows: &[Vec<f32>],
) -> Result<Option<(Vec<usize>, Vec<PromptAttribution>)>> {
    let cfg = &c.study.discovery.attribution;
    if cfg.prompts == 0 {
        return Ok(None);
    }
    let n = cfg.prompts.min(items.len());
    let bar = Progress::new("discover", "attributions", n as u64);
    let looked_at: Vec<usize> = (0..n).map(|i| i * items.len() / n).collect();
    let mut found = Vec::with_capacity(n);
    for &i in &looked_at {
        let tokens = items[i].tokens.len();
        found.push(attribute(
            &c.loaded.model,
            sae,
            c.site,
            &rows[i][..tokens * sae.d_model()],
            1..tokens,
            cfg.steps,
            |logits| refusal_log_odds_gradient(logits, &c.openers),
        )?);
        bar.advance(1);
    }
    bar.finish();
    Ok(Some((looked_at, found)))
}

/// Whether each unsafe prompt stands beside its own look-alike.
fn design(on_unsafe: &[&Prompt], on_safe: &[&Prompt]) -> Design {
    let mut both = on_unsafe.iter().zip(on_safe);
    let paired =
        on_unsafe.len() == on_safe.len() && both.all(|(a, b)| a.pair.is_some() && a.pair == b.pair);
    if paired {
        Design::Pairs
    } else {
        Design::Groups
    }
}

/// A plan that sets latents to `value` in `unit`.
pub fn clamp_plan(
    name: &str,
    c: &StudyContext,
    latents: &[u32],
    value: f64,
    unit: Unit,
) -> SteeringPlan {
    let mut spec = InterventionSpec::at(c.site.to_string());
    spec.sae = Some(SAE_NAME.to_owned());
    spec.edits = latents
        .iter()
        .map(|&latent| LatentEdit {
            latent,
            op: Op::Set,
            value: value as f32,
            unit,
        })
        .collect();
    SteeringPlan::single(name, spec)
}

/// Codes of sequences, with norms and rows noted on the way.
struct Codes<'a> {
    c: &'a StudyContext,
    sae: &'a Sae,
    /// Sum and number of residual norms, first tokens left out.
    norms: (f64, usize),
    /// Rows of the first group of sequences.
    rows: Vec<Vec<f32>>,
}

impl<'a> Codes<'a> {
    fn new(c: &'a StudyContext, sae: &'a Sae) -> Self {
        Self {
            c,
            sae,
            norms: (0.0, 0),
            rows: Vec::new(),
        }
    }

    fn of(&mut self, sequences: &[Sequence], kind: &str) -> Result<Vec<CodedSequence>> {
        let d = self.sae.d_model();
        let mut out = Vec::with_capacity(sequences.len());
        let keep = self.rows.is_empty();
        let tokens = self.c.study.model.batch_tokens;
        harvest(
            &self.c.loaded.model,
            self.c.site,
            sequences,
            tokens,
            Products::Int8,
            |i, x| {
                for row in x.chunks_exact(d).skip(1) {
                    self.norms.0 += row
                        .iter()
                        .map(|v| f64::from(*v).powi(2))
                        .sum::<f64>()
                        .sqrt();
                    self.norms.1 += 1;
                }
                if keep {
                    self.rows.push(x.to_vec());
                }
                let s = &sequences[i];
                out.push(CodedSequence {
                    source: format!("{kind}/{}", s.source),
                    tokens: s.tokens.clone(),
                    roles: s.roles.clone(),
                    codes: self.sae.encode(x, s.tokens.len()),
                });
                Ok(())
            },
        )?;
        Ok(out)
    }

    /// The residual at each prompt's last token.
    fn last_prompt_rows(&self, items: &[Item]) -> Vec<Vec<f32>> {
        let d = self.sae.d_model();
        items
            .iter()
            .zip(&self.rows)
            .map(|(item, rows)| {
                let at = item.tokens.len() - 1;
                rows[at * d..(at + 1) * d].to_vec()
            })
            .collect()
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| -> f64 {
        x.iter()
            .zip(y)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}
