//! Codes of a corpus and what is read off them: density, largest activations, contexts.
//!
//! Codes are sparse (`k` of `d_sae` a token), so a corpus of a million tokens costs 256 MB at
//! `k = 32`; discovery works on some ten thousand.

use demur_model::hooks::Role;
use demur_sae::{Codes, Sae};

use crate::contrast::PromptSummary;
use crate::table::TopActivation;

/// One sequence's tokens and latent activations.
#[derive(Debug, Clone)]
pub struct CodedSequence {
    /// Where the text is from.
    pub source: String,
    /// Token ids, `[n]`.
    pub tokens: Vec<u32>,
    /// Each token's role, `[n]`.
    pub roles: Vec<Role>,
    /// Latent activations, `n` rows.
    pub codes: Codes,
}

impl CodedSequence {
    /// Activations of `latent` over the sequence, `[n]`.
    pub fn activations_of(&self, latent: u32) -> Vec<f32> {
        self.codes
            .idx
            .chunks_exact(self.codes.k)
            .zip(self.codes.val.chunks_exact(self.codes.k))
            .map(|(idx, val)| {
                idx.iter()
                    .zip(val)
                    .find_map(|(&j, &v)| (j == latent).then_some(v))
                    .unwrap_or(0.0)
            })
            .collect()
    }

    /// Largest activation of every latent over the tokens `window`, `[d_sae]`.
    pub fn summary(&self, window: std::ops::Range<usize>, d_sae: usize) -> PromptSummary {
        let mut out = vec![0.0f32; d_sae];
        let k = self.codes.k;
        let range = window.start.min(self.tokens.len()) * k..window.end.min(self.tokens.len()) * k;
        for (&j, &v) in self.codes.idx[range.clone()]
            .iter()
            .zip(&self.codes.val[range])
        {
            let o = &mut out[j as usize];
            *o = o.max(v);
        }
        out
    }
}

/// Per-latent figures of a corpus.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentStats {
    /// Tokens counted.
    pub n_tokens: usize,
    /// Fraction of tokens on which each latent is active, `[d_sae]`.
    pub density: Vec<f64>,
    /// Largest activation of each latent, `[d_sae]`.
    pub max_activation: Vec<f32>,
}

/// Density and largest activation of each latent; the first token of a sequence is left out, as its
/// residual is an attention sink of abnormal norm.
pub fn latent_stats(corpus: &[CodedSequence], sae: &Sae) -> LatentStats {
    let mut count = vec![0u64; sae.d_sae()];
    let mut max_activation = vec![0.0f32; sae.d_sae()];
    let mut n_tokens = 0;
    for s in corpus {
        let k = s.codes.k;
        n_tokens += s.tokens.len().saturating_sub(1);
        for (&j, &v) in s.codes.idx.iter().zip(&s.codes.val).skip(k) {
            if v > 0.0 {
                count[j as usize] += 1;
                let m = &mut max_activation[j as usize];
                *m = m.max(v);
            }
        }
    }
    let density = count
        .iter()
        .map(|&c| c as f64 / n_tokens.max(1) as f64)
        .collect();
    LatentStats {
        n_tokens,
        density,
        max_activation,
    }
}

/// Activations of `latent` where it is active, over all sequences; the first token of each is left out.
pub fn activations_over(corpus: &[CodedSequence], latent: u32) -> Vec<f32> {
    let of = |s: &CodedSequence| s.activations_of(latent).into_iter().skip(1);
    corpus.iter().flat_map(of).filter(|v| *v > 0.0).collect()
}

/// The `n` sequences in which `latent` is most active, with `radius` tokens of context around the
/// peak. `text` gives a token's text.
pub fn top_activations(
    corpus: &[CodedSequence],
    latent: u32,
    n: usize,
    radius: usize,
    text: impl Fn(u32) -> String,
) -> Vec<TopActivation> {
    let mut peaks: Vec<(f32, usize, usize)> = corpus
        .iter()
        .enumerate()
        .filter_map(|(i, s)| {
            let acts = s.activations_of(latent);
            let (t, v) = acts
                .iter()
                .copied()
                .enumerate()
                .skip(1)
                .max_by(|a, b| a.1.total_cmp(&b.1).then(b.0.cmp(&a.0)))?;
            (v > 0.0).then_some((v, i, t))
        })
        .collect();
    peaks.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    peaks
        .into_iter()
        .take(n)
        .map(|(value, i, t)| {
            let s = &corpus[i];
            let range = t.saturating_sub(radius)..(t + radius + 1).min(s.tokens.len());
            TopActivation {
                value: f64::from(value),
                source: s.source.clone(),
                tokens: s.tokens[range.clone()].iter().map(|&id| text(id)).collect(),
                acts: s.activations_of(latent)[range.clone()].to_vec(),
                peak: t - range.start,
            }
        })
        .collect()
}

/// The paper's recipe: latents active on at least `at_least` tokens of `reply`, with their counts,
/// the most often active first.
pub fn active_on_reply(
    sequence: &CodedSequence,
    reply: std::ops::Range<usize>,
    at_least: usize,
) -> Vec<(u32, usize)> {
    let k = sequence.codes.k;
    let range = reply.start * k..reply.end.min(sequence.tokens.len()) * k;
    let mut counts = std::collections::BTreeMap::<u32, usize>::new();
    for (&j, &v) in sequence.codes.idx[range.clone()]
        .iter()
        .zip(&sequence.codes.val[range])
    {
        if v > 0.0 {
            *counts.entry(j).or_default() += 1;
        }
    }
    let mut found: Vec<_> = counts.into_iter().filter(|&(_, c)| c >= at_least).collect();
    found.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three tokens, k = 2, over four latents.
    fn sequence() -> CodedSequence {
        CodedSequence {
            source: "test".to_owned(),
            tokens: vec![10, 11, 12],
            roles: vec![Role::User; 3],
            codes: Codes {
                n: 3,
                k: 2,
                idx: vec![0, 1, 1, 2, 1, 3],
                val: vec![9.0, 0.5, 2.0, 1.0, 3.0, 0.0],
            },
        }
    }

    #[test]
    fn summaries_and_recipe() {
        let s = sequence();
        assert_eq!(s.activations_of(1), [0.5, 2.0, 3.0]);
        assert_eq!(s.summary(1..3, 4), [0.0, 3.0, 1.0, 0.0]);
        assert_eq!(active_on_reply(&s, 0..3, 2), [(1, 3)]);
        // an activation of zero is no activation
        assert_eq!(active_on_reply(&s, 2..3, 1), [(1, 1)]);
    }

    #[test]
    fn contexts_are_cut_around_the_peak() {
        let top = top_activations(&[sequence()], 1, 5, 1, |id| id.to_string());
        assert_eq!(top.len(), 1);
        assert_eq!((top[0].value, top[0].peak), (3.0, 1));
        assert_eq!(top[0].tokens, ["11", "12"]);
        assert_eq!(
            activations_over(&[sequence(), sequence()], 1),
            [2.0, 3.0, 2.0, 3.0]
        );
        // the first token is never a peak
        assert!(top_activations(&[sequence()], 0, 5, 1, |id| id.to_string()).is_empty());
    }
}
