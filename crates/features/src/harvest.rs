//! Harvest: from token sequences to rows of the residual stream.
//!
//! Sequences are packed, without padding, into batches of about `batch_tokens`; the forward pass
//! stops at the site, so later layers and the output head cost nothing. What all begin with (a chat's
//! template and system prompt) is run once. Rows are handed over a sequence at a time, in the order of the
//! input, and are not kept.

pub use demur_kernels::linear::Products;
use demur_model::decoder::{Capture, KvCache, LogitsAt, Model, SeqInput, Workspace};
use demur_model::generate::common_beginning;
use demur_model::hooks::{Role, Site};

use crate::error::FeatureError;

/// Fewer tokens that all begin with are not worth a pass of their own.
const MIN_SHARED: usize = 8;

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
    let mut capture = Capture {
        sites: sites.to_vec(),
        stop_after_last: true,
        products,
        rows: Vec::new(),
    };
    let mut start = model.new_cache();
    let shared = shared(model, sequences);
    if shared > 0 {
        let first = &sequences[0];
        let input = input(
            (&first.tokens[..shared], &first.roles[..shared]),
            &mut start,
        );
        model.forward(&mut [input], Some(&mut capture), &mut workspace)?;
    }
    // For each site the rows of what is shared, if anything is, then those of a sequence's own tokens.
    let mut whole = std::mem::take(&mut capture.rows);
    let own = |s: &Sequence| s.tokens.len() - shared;
    let mut first = 0;
    while first < sequences.len() {
        let mut end = first;
        let mut total = 0;
        while end < sequences.len()
            && (end == first || total + own(&sequences[end]) <= batch_tokens)
        {
            total += own(&sequences[end]);
            end += 1;
        }
        let batch = &sequences[first..end];
        let mut caches: Vec<_> = batch.iter().map(|_| start.clone()).collect();
        let inputs = batch.iter().zip(&mut caches);
        let mut inputs: Vec<SeqInput<'_>> = inputs
            .map(|(s, cache)| input((&s.tokens[shared..], &s.roles[shared..]), cache))
            .collect();
        model.forward(&mut inputs, Some(&mut capture), &mut workspace)?;
        let mut at = 0;
        for (i, s) in batch.iter().enumerate() {
            let end = at + own(s) * d;
            let own = capture.rows.iter().map(|rows| &rows[at..end]);
            if shared == 0 {
                consume(first + i, &own.collect::<Vec<_>>())?;
            } else {
                for (whole, own) in whole.iter_mut().zip(own) {
                    whole.truncate(shared * d);
                    whole.extend_from_slice(own);
                }
                let rows: Vec<&[f32]> = whole.iter().map(Vec::as_slice).collect();
                consume(first + i, &rows)?;
            }
            at = end;
        }
        first = end;
    }
    Ok(())
}

/// New tokens, with their roles, of a sequence that is only read.
fn input<'a>((tokens, roles): (&'a [u32], &'a [Role]), cache: &'a mut KvCache) -> SeqInput<'a> {
    SeqInput {
        tokens,
        roles,
        generated: false,
        cache,
        hook: None,
        hook_sites: &[],
        logits: LogitsAt::None,
    }
}

/// How many tokens all sequences begin with, in the same roles, so that they are run once; 0 where that is
/// not worth a pass, or where a sequence is so long that its rotary frequencies are others.
fn shared(model: &Model, sequences: &[Sequence]) -> usize {
    let Some((first, rest)) = sequences.split_first() else {
        return 0;
    };
    let longest = sequences.iter().map(|s| s.tokens.len()).max();
    let original = model.spec().original_context();
    if rest.is_empty() || original.is_some_and(|most| longest > Some(most)) {
        return 0;
    }
    let common =
        |s: &Sequence| common_beginning((&first.tokens, &first.roles), (&s.tokens, &s.roles));
    let n = rest.iter().map(common).min().unwrap_or(0);
    if n < MIN_SHARED { 0 } else { n }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use demur_kernels::linear::Precision;
    use demur_model::checkpoint::Checkpoint;

    use super::*;

    #[test]
    fn a_shared_beginning_changes_no_bit() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/models/qwen2");
        let checkpoint = Arc::new(Checkpoint::open(&path).unwrap());
        let model = Model::load(&checkpoint, Precision::Fast).unwrap();
        let sites = [Site::post(0), Site::post(1)];
        let sequence = |i: u32| {
            let own = (0..3 + i).map(|j| 40 + 7 * i + j);
            let tokens: Vec<u32> = (1..=10).chain(own).collect();
            Sequence {
                source: i.to_string(),
                roles: vec![Role::User; tokens.len()],
                tokens,
            }
        };
        let sequences: Vec<Sequence> = (0..5).map(sequence).collect();
        let rows_of = |sequences: &[Sequence]| {
            let mut all = Vec::new();
            let keep = |_, rows: &[&[f32]]| {
                all.push(rows.concat());
                Ok(())
            };
            harvest_sites(&model, &sites, sequences, 16, Products::Int8, keep).unwrap();
            all
        };
        assert_eq!(shared(&model, &sequences), 10);
        let together = rows_of(&sequences);
        for (s, rows) in sequences.iter().zip(&together) {
            let alone = std::slice::from_ref(s);
            assert_eq!(shared(&model, alone), 0);
            assert_eq!(rows.len(), 2 * s.tokens.len() * model.spec().d_model);
            assert!(rows_of(alone)[0] == *rows, "{}", s.source);
        }
        // Another role where the texts are the same is another beginning.
        let mut other = sequences.clone();
        other[4].roles[8] = Role::System;
        assert_eq!(shared(&model, &other), 8);
        other[4].roles[7] = Role::System;
        assert_eq!(shared(&model, &other), 0);
    }
}
