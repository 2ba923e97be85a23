//! Attribution: what each latent adds to a metric of the next token, by gradients.
//!
//! A clamp measures one latent in a pass of its own; a gradient estimates all of them at once. Let `m`
//! be the metric as a function of the residual `x` at the site, `f_i` the activation of latent `i` on
//! token `t` and `d_i` its decoder row (times [`Sae::unit`] where an SAE normalises its input). Over
//! the tokens that an edit would touch,
//!
//! ```text
//! a_i = sum_t f_i(x_t) d_i . g_t(x),                       g_t = dm/dx_t
//! A_i = sum_t f_i(x_t) d_i . mean_s g_t(x^s),              s = 1 .. M
//! x^s = x - (1 - (s - 1/2) / M) sum_j f_j(x) d_j
//! ```
//!
//! `a_i` is attribution patching (Syed et al. 2023, arXiv 2310.10348): to first order, how much `m`
//! falls when what the latent contributes is taken out of the residual. It is wrong where `m` bends on
//! the way there.
//!
//! `A_i` is integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) by the midpoint rule, on
//! the straight path from no latent at all to those of the prompt. What the SAE does not explain and
//! the decoder's bias stay where they are, as in sparse feature circuits (Marks et al. 2024, arXiv
//! 2403.19647); all latents go together, so that a prompt costs `M` passes and not `M` a latent. The
//! price of that is an ablation further from what the model is used to; what it gives is completeness:
//! as `M` grows, `sum_i A_i` becomes `m(x)` less `m` of the path's beginning.

use std::collections::BTreeMap;
use std::ops::Range;

use demur_kernels::ops::{axpy, dot};
use demur_model::decoder::Model;
use demur_model::hooks::Site;
use demur_sae::{Codes, Sae};

use crate::error::FeatureError;
use crate::stats;
use crate::table::{AttributionEvidence, IntegratedEvidence};

/// One prompt's attributions, of every latent that is active on an edited token, in the metric's unit.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct PromptAttribution {
    /// `a_i`.
    pub plain: BTreeMap<u32, f64>,
    /// `A_i`; empty without steps.
    pub integrated: BTreeMap<u32, f64>,
}

/// Attributes a metric of a prompt's next token to the latents of its tokens `edited`, with `steps`
/// steps of the integrated form; 0 leaves that out. `gradient` is the metric's, of the logits.
///
/// Costs `1 + steps` times [`Model::gradient`].
///
/// # Shapes
/// `resid` is `[tokens, d_model]`, the prompt's residual at `site`; `gradient` takes and returns
/// `[d_vocab]`.
///
/// # Errors
/// [`FeatureError::Transcoder`], [`FeatureError::SaeWidth`], and what [`Model::gradient`] refuses.
pub fn attribute(
    model: &Model,
    sae: &Sae,
    site: Site,
    resid: &[f32],
    edited: Range<usize>,
    steps: usize,
    gradient: impl Fn(&[f32]) -> Vec<f32>,
) -> Result<PromptAttribution, FeatureError> {
    let d = model.spec().d_model;
    if sae.wiring().transcoder {
        return Err(FeatureError::Transcoder);
    }
    if sae.d_model() != d {
        return Err(FeatureError::SaeWidth {
            sae: sae.d_model(),
            model: d,
        });
    }
    let at_prompt = model.gradient(site, resid, &gradient)?.rows;
    let edited = edited.start..edited.end.min(resid.len() / d);
    let part = edited.start * d..edited.end * d;
    let x = &resid[part.clone()];
    let latents = Latents {
        sae,
        codes: &sae.encode(x, edited.len()),
        units: x.chunks_exact(d).map(|x| sae.unit(x)).collect(),
    };
    let mut found = PromptAttribution {
        plain: latents.along(&at_prompt[part.clone()]),
        integrated: BTreeMap::new(),
    };
    if steps > 0 {
        let explained = latents.contribution(d);
        let mut mean = vec![0.0; part.len()];
        for s in 0..steps {
            let removed = 1.0 - (s as f32 + 0.5) / steps as f32;
            let mut on_path = resid.to_vec();
            axpy(-removed, &explained, &mut on_path[part.clone()]);
            let there = model.gradient(site, &on_path, &gradient)?.rows;
            axpy(1.0 / steps as f32, &there[part.clone()], &mut mean);
        }
        found.integrated = latents.along(&mean);
    }
    Ok(found)
}

/// The latents of some rows, with what a unit of activation is worth in each.
struct Latents<'a> {
    sae: &'a Sae,
    codes: &'a Codes,
    units: Vec<f32>,
}

impl Latents<'_> {
    /// Row, latent and activation in units of the residual, of all that are active.
    fn active(&self) -> impl Iterator<Item = (usize, u32, f32)> {
        let k = self.codes.k;
        let codes = self.codes.idx.iter().zip(&self.codes.val).enumerate();
        codes
            .filter(|(_, (_, f))| **f > 0.0)
            .map(move |(at, (j, f))| (at / k, *j, f * self.units[at / k]))
    }

    /// `sum_t f_i d_i . g_t` of every latent, with `g` `[rows, d_model]`.
    fn along(&self, g: &[f32]) -> BTreeMap<u32, f64> {
        let mut sums = BTreeMap::new();
        let d = self.sae.d_model();
        for (t, j, f) in self.active() {
            let slope = dot(self.sae.decoder_row(j as usize), &g[t * d..(t + 1) * d]);
            *sums.entry(j).or_default() += f64::from(f) * f64::from(slope);
        }
        sums
    }

    /// `sum_j f_j d_j` of every row, `[rows, d_model]`.
    fn contribution(&self, d: usize) -> Vec<f32> {
        let mut out = vec![0.0; self.codes.n * d];
        for (t, j, f) in self.active() {
            axpy(
                f,
                self.sae.decoder_row(j as usize),
                &mut out[t * d..(t + 1) * d],
            );
        }
        out
    }
}

/// Evidence over some prompts, for any latent.
#[derive(Debug, Clone, PartialEq)]
pub struct Attributions {
    prompts: usize,
    steps: usize,
    active: BTreeMap<u32, AttributionEvidence>,
}

impl Attributions {
    /// Sums up what [`attribute`] found with `steps` steps: means over all prompts, and Wilcoxon's
    /// signed-rank test of the prompts' attributions against zero (the metric with the latent and
    /// without it is a pair, of which the attribution is the difference), adjusted over all latents
    /// that are active in at least one (Benjamini-Hochberg).
    pub fn new(prompts: &[PromptAttribution], steps: usize) -> Self {
        let plain = over_prompts(prompts, |p| &p.plain);
        let mut integrated = over_prompts(prompts, |p| &p.integrated);
        let evidence = |(j, (active, mean, q))| {
            let integrated = integrated.remove(&j);
            let integrated = integrated.map(|(_, mean, q)| IntegratedEvidence { steps, mean, q });
            let evidence = AttributionEvidence {
                prompts: prompts.len(),
                active,
                mean,
                q,
                integrated,
            };
            (j, evidence)
        };
        Self {
            prompts: prompts.len(),
            steps,
            active: plain.into_iter().map(evidence).collect(),
        }
    }

    /// The evidence for a latent; one that is not active on any prompt adds nothing to any.
    pub fn of(&self, latent: u32) -> AttributionEvidence {
        let nothing = || AttributionEvidence {
            prompts: self.prompts,
            active: 0,
            mean: 0.0,
            q: 1.0,
            integrated: (self.steps > 0).then_some(IntegratedEvidence {
                steps: self.steps,
                mean: 0.0,
                q: 1.0,
            }),
        };
        self.active.get(&latent).cloned().unwrap_or_else(nothing)
    }

    /// Latents that add to the metric, the one that adds most first: by the integrated form, if there
    /// is one.
    pub fn ranked(&self) -> Vec<u32> {
        let best = |e: &AttributionEvidence| e.integrated.as_ref().map_or(e.mean, |i| i.mean);
        let all = self.active.iter().map(|(j, e)| (*j, best(e)));
        let mut positive: Vec<(u32, f64)> = all.filter(|(_, mean)| *mean > 0.0).collect();
        positive.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        positive.into_iter().map(|(j, _)| j).collect()
    }
}

/// Of each latent the number of prompts that have it, the mean over all, and the adjusted p value.
fn over_prompts(
    prompts: &[PromptAttribution],
    of: impl Fn(&PromptAttribution) -> &BTreeMap<u32, f64>,
) -> BTreeMap<u32, (usize, f64, f64)> {
    let mut values: BTreeMap<u32, Vec<f64>> = BTreeMap::new();
    for (j, a) in prompts.iter().flat_map(of) {
        values.entry(*j).or_default().push(*a);
    }
    let p: Vec<f64> = values.values().map(|v| stats::wilcoxon(v)).collect();
    let q = stats::benjamini_hochberg(&p);
    values
        .into_iter()
        .zip(q)
        .map(|((j, v), q)| {
            let mean = v.iter().sum::<f64>() / prompts.len() as f64;
            (j, (v.len(), mean, q))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use demur_kernels::linear::Precision;
    use demur_model::checkpoint::Checkpoint;
    use demur_model::hooks::Role;
    use demur_sae::SaeConfig;

    use super::*;
    use crate::harvest::{Products, Sequence, harvest};

    fn sae(d_model: usize, d_sae: usize, k: usize, w_enc: Vec<f32>, w_dec: Vec<f32>) -> Sae {
        let cfg = SaeConfig {
            d_model,
            d_sae,
            k,
            hook_name: "blocks.0.hook_resid_post".to_owned(),
            model_name: "tiny".to_owned(),
        };
        let b_dec = (0..d_model).map(|i| i as f32 * 0.01).collect();
        Sae::new(cfg, w_enc, vec![0.0; d_sae], w_dec, b_dec).unwrap()
    }

    #[test]
    fn latents_along_a_gradient_by_hand() {
        let w_dec = vec![1.0, 0.0, 0.0, 2.0, 1.0, 1.0];
        let sae = sae(2, 3, 2, w_dec.clone(), w_dec);
        let codes = Codes {
            n: 2,
            k: 2,
            idx: vec![0, 1, 2, 1],
            val: vec![3.0, 0.5, 2.0, 0.0],
        };
        let latents = Latents {
            sae: &sae,
            codes: &codes,
            units: vec![1.0, 10.0],
        };
        // Row 0: latent 0 is 3 (1, 0), latent 1 is 0.5 (0, 2). Row 1: latent 2 is 2 * 10 (1, 1); latent 1
        // is not active.
        let found = latents.along(&[0.1, 0.2, -1.0, 0.5]);
        let expected = [(0, 3.0 * 0.1), (1, 0.5 * 0.4), (2, 20.0 * -0.5)];
        assert_eq!(found.len(), 3);
        for (j, a) in expected {
            assert!(
                (found[&j] - a).abs() < 1e-6,
                "{j}: {} against {a}",
                found[&j]
            );
        }
        assert_eq!(latents.contribution(2), [3.0, 1.0, 20.0, 20.0]);
    }

    #[test]
    fn evidence_by_hand() {
        // Latent 4 is there in all ten prompts and always raises; 7 in two, once either way.
        let prompts: Vec<PromptAttribution> = (0..10)
            .map(|i| {
                let mut plain = BTreeMap::from([(4, 1.0 + i as f64)]);
                if i < 2 {
                    plain.insert(7, if i == 0 { 3.0 } else { -1.0 });
                }
                let integrated = plain.iter().map(|(j, a)| (*j, a * 0.5)).collect();
                PromptAttribution { plain, integrated }
            })
            .collect();
        let found = Attributions::new(&prompts, 8);
        let (a, b) = (found.of(4), found.of(7));
        assert_eq!((a.prompts, a.active, a.mean), (10, 10, 5.5));
        assert_eq!((b.prompts, b.active, b.mean), (10, 2, 0.2));
        // W = 55 of 10 ranks: z = (55 - 27.5 - 0.5) / sqrt(96.25) = 2.752, p = 0.0059; of two latents.
        assert!((a.q - 2.0 * 0.00592).abs() < 1e-4, "{}", a.q);
        assert_eq!(b.q, 1.0);
        let half = a.integrated.unwrap();
        assert_eq!((half.steps, half.mean, half.q), (8, 2.75, a.q));
        let silent = found.of(5);
        assert_eq!((silent.prompts, silent.active, silent.mean), (10, 0, 0.0));
        assert_eq!(silent.integrated.unwrap().mean, 0.0);
        assert_eq!(found.ranked(), [4, 7]);
    }

    #[test]
    fn the_integrated_form_ranks_if_it_is_there() {
        let plain = BTreeMap::from([(1, 3.0), (2, 2.0), (3, -1.0)]);
        let integrated = BTreeMap::from([(1, -0.5), (2, 2.0), (3, 4.0)]);
        let with = PromptAttribution { plain, integrated };
        let without = PromptAttribution {
            integrated: BTreeMap::new(),
            ..with.clone()
        };
        assert_eq!(Attributions::new(&[with], 4).ranked(), [3, 2]);
        let plain = Attributions::new(&[without], 0);
        assert_eq!(plain.ranked(), [1, 2]);
        assert_eq!(
            (plain.of(1).integrated, plain.of(9).integrated),
            (None, None)
        );
    }

    const SITE: Site = Site {
        layer: 0,
        point: demur_model::hooks::Point::Post,
    };

    fn tiny() -> (Model, Sae, Vec<f32>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models/llama");
        let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
        let model = Model::load(&checkpoint, Precision::F32).unwrap();
        let d = model.spec().d_model;
        let mut state = 1u32;
        let mut noise = |n: usize| -> Vec<f32> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            (0..n).map(|_| next()).collect()
        };
        let w = noise(2 * d * d);
        let scaled = |by: f32| w.iter().map(|w| w * by).collect();
        let sae = sae(d, 2 * d, 6, scaled(1.0), scaled(1.0 / d as f32));
        let sequence = Sequence {
            source: String::new(),
            tokens: (0..9)
                .map(|i| (i * 7 + 3) % model.spec().d_vocab as u32)
                .collect(),
            roles: vec![Role::User; 9],
        };
        let mut resid = Vec::new();
        harvest(&model, SITE, &[sequence], 64, Products::Int8, |_, rows| {
            resid = rows.to_vec();
            Ok(())
        })
        .unwrap();
        (model, sae, resid)
    }

    /// The metric is the logit of token 5 less that of token 2.
    fn slope(logits: &[f32]) -> Vec<f32> {
        let mut g = vec![0.0; logits.len()];
        (g[5], g[2]) = (1.0, -1.0);
        g
    }

    fn metric(model: &Model, resid: &[f32]) -> f64 {
        let logits = model.gradient(SITE, resid, slope).unwrap().logits;
        f64::from(logits[5]) - f64::from(logits[2])
    }

    /// A latent's plain attribution is the slope of the metric as it is taken out, on edited tokens.
    #[test]
    fn plain_attribution_is_a_derivative() {
        let (model, sae, resid) = tiny();
        let d = sae.d_model();
        let found = attribute(&model, &sae, SITE, &resid, 1..100, 0, slope).unwrap();
        assert!(found.integrated.is_empty());
        let (&j, &a) = found
            .plain
            .iter()
            .max_by(|a, b| a.1.abs().total_cmp(&b.1.abs()))
            .unwrap();
        let scaled = |by: f32| {
            let mut x = resid.clone();
            for row in x.chunks_exact_mut(d).skip(1) {
                let codes = sae.encode(row, 1);
                if let Some(at) = codes.idx.iter().position(|i| *i == j) {
                    axpy(by * codes.val[at], sae.decoder_row(j as usize), row);
                }
            }
            metric(&model, &x)
        };
        let expected = (scaled(0.1) - scaled(-0.1)) / 0.2;
        assert!(
            (a - expected).abs() < 2e-3 * a.abs(),
            "{a} against {expected}"
        );
        assert!(a.abs() > 1e-3, "{a} shows nothing");
    }

    /// Integrated attributions add up to what all latents together change, and plain ones do not.
    #[test]
    fn integrated_attributions_are_complete() {
        let (model, sae, resid) = tiny();
        let d = sae.d_model();
        let found = attribute(&model, &sae, SITE, &resid, 1..9, 16, slope).unwrap();
        let mut without = resid.clone();
        for row in without.chunks_exact_mut(d).skip(1) {
            let codes = sae.encode(row, 1);
            for (j, f) in codes.idx.iter().zip(&codes.val) {
                axpy(-f.max(0.0), sae.decoder_row(*j as usize), row);
            }
        }
        let change = metric(&model, &resid) - metric(&model, &without);
        let sum = |a: &BTreeMap<u32, f64>| a.values().sum::<f64>();
        let (integrated, plain) = (sum(&found.integrated), sum(&found.plain));
        let off = |a: f64| ((a - change) / change).abs();
        assert!(off(integrated) < 0.01, "{integrated} against {change}");
        assert!(
            off(plain) > 0.02,
            "{plain} is as good as {integrated}: nothing is bent"
        );
    }

    #[test]
    fn an_sae_of_another_width_is_refused() {
        let (model, _, resid) = tiny();
        let other = sae(2, 2, 1, vec![1.0; 4], vec![1.0; 4]);
        let error = attribute(&model, &other, SITE, &resid, 1..9, 0, slope).unwrap_err();
        assert!(
            matches!(error, FeatureError::SaeWidth { sae: 2, .. }),
            "{error}"
        );
    }
}
