//! Harvest: from token sequences to rows of the residual stream.
//!
//! Sequences are packed, without padding, into batches of about `batch_tokens`; the forward pass
//! stops at the site, so later layers and the output head cost nothing. Rows are handed over a
//! sequence at a time, in the order of the input, and are not kept.

pub use demur_kernels::linear::Products;
use demur_model::decoder::{Capture, LogitsAt, Model, SeqInput, Workspace};
use demur_model::hooks::{Role, Site};

use crate::error::FeatureError;

/// Tokens with their roles, and where they are from.
#[derive(Debug, Clone, PartialEq)]
pub struct Sequence {
    /// Where the text is from, for instance `discovery/unsafe-012`.
    pub source: String,
    /// Token ids, `[n]`.
    pub tokens: Vec<u32>,
    /// Each token's role, `[n]`.
    pub roles: Vec<Role>,
}

/// Runs `sequences` through `model` up to `site` and gives each one's rows to `consume`: as
/// [`harvest_sites`], of one site.
///
/// # Shapes
/// `consume(i, rows)` gets the rows of `sequences[i]`, `[n, d_model]`, f32.
///
/// # Errors
/// What the model refuses, and what `consume` returns.
pub fn harvest(
    model: &Model,
    site: Site,
    sequences: &[Sequence],
    batch_tokens: usize,
    products: Products,
    mut consume: impl FnMut(usize, &[f32]) -> Result<(), FeatureError>,
) -> Result<(), FeatureError> {
    harvest_sites(
        model,
        &[site],
        sequences,
        batch_tokens,
        products,
        |i, rows| consume(i, rows[0]),
    )
}

/// Runs `sequences` through `model` up to the last of `sites` and gives each one's rows to `consume`.
///
/// With [`Products::Int8`] rows are those that an intervention sees, bit for bit: what is calibrated (a gate, a
/// latent's statistics) is calibrated on them. [`Products::Bf16`] is for bulk, such as training data.
///
/// # Shapes
/// `consume(i, rows)` gets for each site the rows of `sequences[i]`, `[n, d_model]`, f32.
///
/// # Errors
/// What the model refuses, and what `consume` returns.
pub fn harvest_sites(
    model: &Model,
    sites: &[Site],
    sequences: &[Sequence],
    batch_tokens: usize,
    products: Products,
    mut consume: impl FnMut(usize, &[&[f32]]) -> Result<(), FeatureError>,
) -> Result<(), FeatureError> {
    let d = model.spec().d_model;
    let mut workspace = Workspace::default();
    let mut first = 0;
    while first < sequences.len() {
        let mut end = first;
        let mut total = 0;
        while end < sequences.len()
            && (end == first || total + sequences[end].tokens.len() <= batch_tokens)
        {
            total += sequences[end].tokens.len();
            end += 1;
        }
        let batch = &sequences[first..end];
        let mut caches: Vec<_> = batch.iter().map(|_| model.new_cache()).collect();
        let mut inputs: Vec<SeqInput<'_>> = batch
            .iter()
            .zip(&mut caches)
            .map(|(s, cache)| SeqInput {
                tokens: &s.tokens,
                roles: &s.roles,
                generated: false,
                cache,
                hook: None,
                hook_sites: &[],
                logits: LogitsAt::None,
            })
            .collect();
        let mut capture = Capture {
            sites: sites.to_vec(),
            stop_after_last: true,
            products,
            rows: Vec::new(),
        };
        model.forward(&mut inputs, Some(&mut capture), &mut workspace)?;
        let mut at = 0;
        for (i, s) in batch.iter().enumerate() {
            let end = at + s.tokens.len() * d;
            let rows: Vec<&[f32]> = capture.rows.iter().map(|r| &r[at..end]).collect();
            consume(first + i, &rows)?;
            at = end;
        }
        first = end;
    }
    Ok(())
}
