//! The price of steering on plain text: perplexity, and next-token KL against base.
//!
//! Each passage is read under an arm as one sequence; the first token is not scored. Base logits of a
//! passage are needed beside the arm's, so both are run in turn and dropped: memory is two passages.

use demur_model::decoder::{LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::{Intervention, Role};

use crate::error::EvalError;

/// Cross-entropy and KL of one passage under an arm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PassageScore {
    /// Tokens scored.
    pub n: usize,
    /// Sum of `-ln p(token)`, nats.
    pub nll: f64,
    /// Sum of `KL(base || arm)` of the next-token distributions, nats.
    pub kl: f64,
}

/// Logits of every position of `tokens` under `hook`, rows of `[d_vocab]`.
///
/// # Errors
/// What the model refuses.
pub fn logits(
    model: &Model,
    tokens: &[u32],
    roles: &[Role],
    hook: Option<&dyn Intervention>,
    workspace: &mut Workspace,
) -> Result<Vec<f32>, EvalError> {
    let mut cache = model.new_cache();
    let mut state = hook.map(Intervention::start);
    let mut input = [SeqInput {
        tokens,
        roles,
        generated: false,
        cache: &mut cache,
        hook: state.as_deref_mut(),
        hook_sites: hook.map(Intervention::sites).unwrap_or_default(),
        logits: LogitsAt::All,
    }];
    let logits = model.forward(&mut input, None, workspace)?;
    Ok(logits.rows().flatten().copied().collect())
}

/// Logits at the last token of `prompt` (tokens and their roles) and at every token of a `reply` to it
/// under `hook`, rows of `[d_vocab]`: the reply is read as one that the model writes.
///
/// # Errors
/// What the model refuses.
pub fn reply_logits(
    model: &Model,
    (tokens, roles): (&[u32], &[Role]),
    reply: &[u32],
    hook: Option<&dyn Intervention>,
    workspace: &mut Workspace,
) -> Result<Vec<f32>, EvalError> {
    let mut cache = model.new_cache();
    let mut state = hook.map(Intervention::start);
    let hook_sites = hook.map(Intervention::sites).unwrap_or_default();
    let written = vec![Role::Assistant; reply.len()];
    let mut rows = Vec::new();
    for (tokens, roles, generated) in [(tokens, roles, false), (reply, &written[..], true)] {
        if tokens.is_empty() {
            continue;
        }
        let mut input = [SeqInput {
            tokens,
            roles,
            generated,
            cache: &mut cache,
            hook: state.as_deref_mut(),
            hook_sites,
            logits: match generated {
                true => LogitsAt::All,
                false => LogitsAt::Last,
            },
        }];
        let logits = model.forward(&mut input, None, workspace)?;
        rows.extend(logits.rows().flatten().copied());
    }
    Ok(rows)
}

/// Scores a passage: `base` and `arm` are logits of its positions.
///
/// # Shapes
/// `base` and `arm` are `[tokens.len(), d_vocab]`.
pub fn score(tokens: &[u32], base: &[f32], arm: &[f32], d_vocab: usize) -> PassageScore {
    let mut out = PassageScore {
        n: 0,
        nll: 0.0,
        kl: 0.0,
    };
    let rows = base.chunks_exact(d_vocab).zip(arm.chunks_exact(d_vocab));
    for ((b, a), &next) in rows.zip(tokens.iter().skip(1)) {
        let (zb, za) = (log_z(b), log_z(a));
        out.nll -= f64::from(a[next as usize]) - za;
        out.kl += b
            .iter()
            .zip(a)
            .map(|(&b, &a)| {
                let log_p = f64::from(b) - zb;
                log_p.exp() * (log_p - (f64::from(a) - za))
            })
            .sum::<f64>();
        out.n += 1;
    }
    out
}

fn log_z(row: &[f32]) -> f64 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    f64::from(max)
        + row
            .iter()
            .map(|&l| f64::from(l - max).exp())
            .sum::<f64>()
            .ln()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Two scored positions of a vocabulary of two; the arm predicts (3/4, 1/4), base (1/2, 1/2).
        let base = [0.0; 6];
        let arm = [3f32.ln(), 0.0, 3f32.ln(), 0.0, 9.0, 9.0];
        let s = score(&[0, 0, 1], &base, &arm, 2);
        assert_eq!(s.n, 2);
        assert!((s.nll - (-(0.75f64.ln()) - 0.25f64.ln())).abs() < 1e-6);
        // KL = ln 2 - (ln 3) / 2 at each
        assert!((s.kl - 2.0 * 0.143_841_036).abs() < 1e-6);
        assert!(score(&[0, 0, 1], &base, &base, 2).kl.abs() < 1e-12);
    }
}
