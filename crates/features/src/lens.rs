//! The logit lens: what a direction of the residual stream promotes and suppresses.
//!
//! The direction goes through the final norm and the output head as if it were a residual. The
//! logits are centred on their mean over the vocabulary, which no softmax can see.

use demur_model::decoder::Model;

use crate::table::TokenLogit;

/// Logits of `direction`, less their mean.
///
/// # Shapes
/// `direction` is `[d_model]`; returns `[d_vocab]`.
pub fn logits(model: &Model, direction: &[f32]) -> Vec<f32> {
    let mut logits = model.unembed_row(direction);
    let mean = logits.iter().sum::<f32>() / logits.len().max(1) as f32;
    logits.iter_mut().for_each(|l| *l -= mean);
    logits
}

/// The `n` tokens of largest logit, and the `n` of smallest.
///
/// # Shapes
/// `logits` is `[d_vocab]`, of [`logits`].
pub fn promoted(
    logits: &[f32],
    n: usize,
    text: impl Fn(u32) -> String,
) -> (Vec<TokenLogit>, Vec<TokenLogit>) {
    let mut top = Vec::new();
    demur_kernels::ops::top_k_indices(logits, n, &mut top);
    let token = |&(id, logit): &(u32, f32), sign: f32| TokenLogit {
        token: text(id),
        logit: f64::from(sign * logit),
    };
    let promotes = top.iter().map(|t| token(t, 1.0)).collect();
    let negative: Vec<f32> = logits.iter().map(|l| -l).collect();
    demur_kernels::ops::top_k_indices(&negative, n, &mut top);
    (promotes, top.iter().map(|t| token(t, -1.0)).collect())
}
