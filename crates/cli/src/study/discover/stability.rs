//! How stable the short list is, from scores that discovery has anyway.

use demur_features::attribution::PromptAttribution;
use demur_features::contrast::{Design, PromptSummary};
use demur_features::ranking::{Groups, Ranking, Resampled, Strata, resample};
use demur_features::table::Stability;

use super::super::config::{DiscoveryConfig, Method};

/// What is known of the discovery prompts: `n_unsafe` of them first, then the safe ones.
pub struct Prompts<'a> {
    pub summaries: &'a [PromptSummary],
    /// The same prompts with written refusals, if there are any.
    pub refusing: Option<&'a [PromptSummary]>,
    pub refused: &'a [bool],
    pub n_unsafe: usize,
    pub pairing: Design,
    /// `[d_sae]`
    pub density: &'a [f64],
    /// The prompts that were attributed, with what was found.
    pub attributed: Option<&'a (Vec<usize>, Vec<PromptAttribution>)>,
    /// Latents of the paper's recipe, of one refused prompt.
    pub recipe: &'a dyn Fn(usize) -> Vec<(u32, usize)>,
}

impl Prompts<'_> {
    /// Draws the prompts anew; nothing, if the study asks for no draws.
    pub fn resample(&self, cfg: &DiscoveryConfig, seed: u64) -> Option<Resampled> {
        let rankings: Vec<Ranking> = cfg.methods.iter().map(|m| self.ranking(*m, cfg)).collect();
        let draw = || {
            resample(
                &rankings,
                &self.strata(),
                cfg.candidates,
                cfg.resamples,
                seed,
            )
        };
        (cfg.resamples > 0).then(draw)
    }

    /// A request and its look-alike are drawn together; where there are none, unsafe and safe prompts
    /// apart; a prompt and its written refusal, which comes after all prompts, together.
    fn strata(&self) -> Strata {
        let (n, all) = (self.n_unsafe, self.summaries.len());
        let mut strata: Strata = match self.pairing {
            Design::Pairs => vec![(0..n).map(|i| vec![i, n + i]).collect()],
            Design::Groups => [0..n, n..all].map(|r| r.map(|i| vec![i]).collect()).into(),
        };
        if self.refusing.is_some() {
            for member in strata.iter_mut().flatten() {
                let refusing: Vec<usize> = member.iter().map(|i| all + i).collect();
                member.extend(refusing);
            }
        }
        strata
    }

    fn ranking(&self, method: Method, cfg: &DiscoveryConfig) -> Ranking {
        let groups = |first: Vec<bool>| {
            Ranking::Groups(Groups::new(
                self.summaries,
                first,
                self.density,
                cfg.max_density,
            ))
        };
        match method {
            Method::PaperRecipe => {
                let refused = (0..self.n_unsafe).filter(|&i| self.refused[i]);
                let latents = |i| (self.recipe)(i).into_iter().map(|(j, _)| j).collect();
                Ranking::First(refused.map(|i| (i, latents(i))).collect())
            }
            Method::HarmfulVsLookalike => {
                let all = 0..self.summaries.len();
                groups(all.map(|i| i < self.n_unsafe).collect())
            }
            Method::RefusedVsComplied => groups(self.refused.to_vec()),
            Method::Attribution => {
                let (prompts, found) = self.attributed.cloned().unwrap_or_default();
                let rare = |j: u32| self.density[j as usize] <= cfg.max_density;
                Ranking::of_attributions(prompts, &found, rare)
            }
            Method::WrittenRefusals => {
                let refusing = self.refusing.unwrap_or_default();
                let both = [self.summaries, refusing].concat();
                let is_refusing = |i| i >= self.summaries.len();
                let first = (0..both.len()).map(is_refusing).collect();
                Ranking::Groups(Groups::new(&both, first, self.density, cfg.max_density))
            }
        }
    }
}

/// The figures of all methods, and of the ranking by clamps.
pub fn summary(
    resampled: Resampled,
    methods: &[String],
    cfg: &DiscoveryConfig,
    causal: Option<f64>,
) -> Stability {
    let both = methods.iter().cloned().zip(resampled.correlation);
    Stability {
        draws: cfg.resamples,
        methods: both.filter_map(|(m, c)| Some((m, c?))).collect(),
        causal,
    }
}
