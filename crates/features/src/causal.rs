//! Causal scores: clamp, and read the first reply token's distribution.
//!
//! One forward pass a prompt, no generation: the refusal log-odds at the first reply token follow
//! the refusal rate closely and cost a tenth. Benign prompts are scored by the KL divergence of the
//! first reply token's distribution from base.

use demur_model::decoder::{LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::Intervention;

use crate::error::FeatureError;
use crate::harvest::Sequence;

/// Logits at the last token of every prompt, under `hook` (or none).
///
/// # Shapes
/// One `[d_vocab]` row a prompt, in order.
///
/// # Errors
/// What the model refuses.
pub fn last_logits(
    model: &Model,
    prompts: &[&Sequence],
    hook: Option<&dyn Intervention>,
    batch_tokens: usize,
) -> Result<Vec<Vec<f32>>, FeatureError> {
    let mut workspace = Workspace::default();
    let mut rows = Vec::with_capacity(prompts.len());
    let mut first = 0;
    while first < prompts.len() {
        let mut end = first;
        let mut total = 0;
        while end < prompts.len()
            && (end == first || total + prompts[end].tokens.len() <= batch_tokens)
        {
            total += prompts[end].tokens.len();
            end += 1;
        }
        let batch = &prompts[first..end];
        let mut caches: Vec<_> = batch.iter().map(|_| model.new_cache()).collect();
        let mut states: Vec<_> = batch
            .iter()
            .map(|_| hook.map(Intervention::start))
            .collect();
        let sites = hook.map(Intervention::sites).unwrap_or_default();
        let mut inputs: Vec<SeqInput<'_>> = batch
            .iter()
            .zip(&mut caches)
            .zip(&mut states)
            .map(|((s, cache), state)| SeqInput {
                tokens: &s.tokens,
                roles: &s.roles,
                generated: false,
                cache,
                hook: state.as_deref_mut(),
                hook_sites: sites,
                logits: LogitsAt::Last,
            })
            .collect();
        let logits = model.forward(&mut inputs, None, &mut workspace)?;
        rows.extend(logits.rows().map(<[f32]>::to_vec));
        first = end;
    }
    Ok(rows)
}

/// `score` of each row of `after` less that of the same row of `before`.
///
/// # Shapes
/// Rows are `[d_vocab]`, one a prompt; returns `[prompts]`.
pub fn rises(before: &[Vec<f32>], after: &[Vec<f32>], score: impl Fn(&[f32]) -> f32) -> Vec<f64> {
    let both = after.iter().zip(before);
    both.map(|(a, b)| f64::from(score(a)) - f64::from(score(b)))
        .collect()
}

/// Mean over rows of KL(base || arm) between next-token distributions, nats.
pub fn mean_kl(base: &[Vec<f32>], arm: &[Vec<f32>]) -> f64 {
    let n = base.len().min(arm.len()).max(1) as f64;
    base.iter().zip(arm).map(|(b, a)| kl(b, a)).sum::<f64>() / n
}

/// KL(p || q) of two rows of logits, nats; never negative but for rounding.
fn kl(p: &[f32], q: &[f32]) -> f64 {
    let norm = |row: &[f32]| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max)
            + row
                .iter()
                .map(|&l| f64::from(l - max).exp())
                .sum::<f64>()
                .ln()
    };
    let (zp, zq) = (norm(p), norm(q));
    p.iter()
        .zip(q)
        .map(|(&a, &b)| {
            let log_p = f64::from(a) - zp;
            log_p.exp() * (log_p - (f64::from(b) - zq))
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_by_hand() {
        // p = (1/2, 1/2), q = (3/4, 1/4): KL = ln 2 - (ln 3)/2 = 0.143841...
        let p = [0.0f32, 0.0];
        let q = [3f32.ln(), 0.0];
        assert!((kl(&p, &q) - 0.143_841_036).abs() < 1e-6, "{}", kl(&p, &q));
        assert!(kl(&q, &q).abs() < 1e-12);
        // shifting logits changes nothing
        assert!((kl(&[5.0, 5.0], &q) - 0.143_841_036).abs() < 1e-6);
    }

    #[test]
    fn rise_by_hand() {
        let before = [vec![1.0], vec![2.0]];
        let after = [vec![2.0], vec![5.0]];
        assert_eq!(rises(&before, &after, |row| row[0]), [1.0, 3.0]);
    }
}
