//! Sites compared: where the residual stream tells unsafe requests from their look-alikes, and where the
//! direction of refusal acts.
//!
//! One pass of the model over all prompts gives every site's residual, at the last prompt token and as the
//! mean over the user's and the template's tokens (what a gate can read before a reply begins). On the
//! first prompts two detectors are made: the difference of the two groups' means, whose score is the
//! product with a row, and a logistic regression with one fixed penalty ([`crate::logistic`]). On the others, which
//! choose nothing, each has its AUROC. So sites can be compared, and the best one's figure is a little
//! lucky: it is the best of many.
//!
//! The refused minus the complied mean of a site is the direction of refusal there (Arditi et al. 2024,
//! arXiv 2406.11717). Whether it acts is another matter than whether it can be read: it has to be added,
//! and the refusal measured.

use std::ops::Range;

use demur_model::decoder::Model;
use demur_model::hooks::{Role, Site};
use demur_steering::{Aggregate, Membership};

use crate::error::FeatureError;
use crate::gate::{Linear, Reading, pool};
use crate::harvest::{Products, Sequence, harvest_sites};
use crate::stats::auroc_estimate;
use crate::table::Separation;

/// Penalty of the probes, of standardised columns: the middle one of those that a gate tries.
const PROBE_L2: f64 = 0.1;

/// What is read of the prompts at one site.
#[derive(Debug, Clone)]
pub struct SiteRows {
    /// The site.
    pub site: Site,
    /// The residual at each prompt's last token, `[prompts][d_model]`.
    pub last: Vec<Vec<f32>>,
    /// Its mean over each prompt's tokens of the user and the template, as a gate reads it,
    /// `[prompts][d_model]`; zeros if there are none.
    pub mean: Vec<Vec<f32>>,
}

/// Reads prompts at all `sites`, in ascending order; `on_prompt` is called after each prompt.
///
/// # Errors
/// What the model refuses.
pub fn read(
    model: &Model,
    sites: &[Site],
    prompts: &[Sequence],
    batch_tokens: usize,
    mut on_prompt: impl FnMut(),
) -> Result<Vec<SiteRows>, FeatureError> {
    let d = model.spec().d_model;
    let mean = Reading {
        membership: Membership::PreAct,
        aggregate: Aggregate::Mean,
        roles: vec![Role::User, Role::Template],
    };
    let mut out: Vec<SiteRows> = sites
        .iter()
        .map(|&site| SiteRows {
            site,
            last: Vec::with_capacity(prompts.len()),
            mean: Vec::with_capacity(prompts.len()),
        })
        .collect();
    harvest_sites(
        model,
        sites,
        prompts,
        batch_tokens,
        Products::Int8,
        |i, rows| {
            for (site, rows) in out.iter_mut().zip(rows) {
                site.last
                    .push(rows[rows.len().saturating_sub(d)..].to_vec());
                site.mean.push(pool(&mean, rows, &prompts[i].roles));
            }
            on_prompt();
            Ok(())
        },
    )?;
    Ok(out)
}

/// How well both detectors, made on the prompts `train`, tell the others apart.
///
/// # Shapes
/// `rows` is `[prompts][d_model]`, `labels` `[prompts]`.
pub fn separation(rows: &[Vec<f32>], labels: &[bool], train: Range<usize>) -> Separation {
    let (fitted, of_fitted) = (&rows[train.clone()], &labels[train.clone()]);
    let direction = difference_of_means(fitted, of_fitted);
    let probe = Linear::fit(fitted, of_fitted, None, PROBE_L2);
    let others = |want: bool| {
        let all = rows.iter().zip(labels).enumerate();
        all.filter(|(i, (_, label))| !train.contains(i) && **label == want)
            .map(|(_, (row, _))| row)
            .collect::<Vec<_>>()
    };
    let (positive, negative) = (others(true), others(false));
    let auroc = |score: &dyn Fn(&[f32]) -> f64| {
        let scores = |group: &[&Vec<f32>]| group.iter().map(|row| score(row)).collect::<Vec<_>>();
        auroc_estimate(&scores(&positive), &scores(&negative))
    };
    Separation {
        direction: auroc(&|row| {
            let both = row.iter().zip(&direction);
            both.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
        }),
        probe: auroc(&|row| probe.score(row)),
    }
}

/// Mean of the rows that are labelled, less the mean of the others; zeros if there are none of either: then there is
/// no difference to speak of.
///
/// # Shapes
/// `rows` is `[n][d_model]`, `labels` `[n]`; returns `[d_model]`.
pub fn difference_of_means<R: AsRef<[f32]>>(rows: &[R], labels: &[bool]) -> Vec<f32> {
    let d = rows.first().map_or(0, |r| r.as_ref().len());
    if !labels.contains(&true) || !labels.contains(&false) {
        return vec![0.0; d];
    }
    let mean = |want: bool| -> Vec<f64> {
        let group: Vec<&[f32]> = rows
            .iter()
            .zip(labels)
            .filter(|(_, l)| **l == want)
            .map(|(x, _)| x.as_ref())
            .collect();
        let n = group.len().max(1) as f64;
        (0..d)
            .map(|i| group.iter().map(|x| f64::from(x[i])).sum::<f64>() / n)
            .collect()
    };
    mean(true)
        .iter()
        .zip(mean(false))
        .map(|(a, b)| (a - b) as f32)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_by_hand() {
        let rows = [vec![1.0, 0.0], vec![3.0, 0.0], vec![0.0, 8.0]];
        assert_eq!(
            difference_of_means(&rows, &[true, true, false]),
            [2.0, -8.0]
        );
        assert_eq!(difference_of_means(&rows[..1], &[true]), [0.0, 0.0]);
        assert!(difference_of_means::<Vec<f32>>(&[], &[]).is_empty());
    }

    #[test]
    fn a_probe_sees_what_the_difference_of_means_does_not() {
        // The second column separates. The first is noise, a hundred times as large; in training it is a
        // little larger where the label is set, so that it decides the difference of means. The probe
        // standardises it away.
        let noise = [3.0, -2.0, 5.0, -4.0, 1.0, -6.0, 2.0, -5.0];
        let row = |i: usize| {
            let (side, at) = (i.is_multiple_of(2), i / 2 % 8);
            let shifted = i < 16 && side && at == 7;
            let first = if shifted { 5.0 } else { noise[at] };
            vec![50.0 * first, if side { 1.0 } else { -1.0 }]
        };
        let rows: Vec<Vec<f32>> = (0..32).map(row).collect();
        let labels: Vec<bool> = (0..32).map(|i| i % 2 == 0).collect();
        let found = separation(&rows, &labels, 0..16);
        assert_eq!((found.probe.value, found.probe.n), (1.0, 16));
        // Both groups have the same noise: of 64 pairs it decides 28 each way, and leaves 8 to the rest.
        assert_eq!(found.direction.value, 36.0 / 64.0);
        // the other way round, and by hand: means 4 and 1, so a row's score is 3 times its value
        let rows = [4.0f32, 1.0, 2.0, 3.0, 1.0, 0.0].map(|v| vec![v]);
        let found = separation(&rows, &[true, false, true, false, true, false], 0..2);
        // 2 and 1 against 3 and 0: 1 of 2 twice
        assert_eq!(found.direction.value, 0.5);
    }
}
