//! Contrasts: which latents tell two groups of prompts apart.
//!
//! Each prompt is summarised by the largest activation of every latent over a window of its tokens.
//! Per latent: the difference of the groups' means, AUROC, and a test, Wilcoxon's on the differences
//! if the groups are paired and Mann-Whitney's if not, whose p values are adjusted over all latents
//! that fire at all (Benjamini-Hochberg). Latents that are active on
//! more than `max_density` of the harvest are set aside: they say nothing about a request.

use crate::error::FeatureError;
use crate::stats;
use crate::table::ContrastEvidence;

/// Largest activation of every latent over one prompt's window, `[d_sae]`.
pub type PromptSummary = Vec<f32>;

/// Fewest prompts on each side of a contrast.
pub const MIN_GROUP: usize = 4;

/// How two groups belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Design {
    /// They are just two groups.
    Groups,
    /// Member `i` of the one is the look-alike of member `i` of the other.
    Pairs,
}

/// Compares two groups, latent by latent.
///
/// Returns evidence for every latent that is active in at least one prompt and whose density is at
/// most `max_density`, ordered by AUROC and then difference, largest first.
///
/// # Shapes
/// Each summary and `density` are `[d_sae]`.
///
/// # Errors
/// [`FeatureError::TooFew`] if a group has fewer than [`MIN_GROUP`] prompts.
pub fn contrast(
    name: &'static str,
    positive: &[&PromptSummary],
    negative: &[&PromptSummary],
    design: Design,
    density: &[f64],
    max_density: f64,
) -> Result<Vec<(u32, ContrastEvidence)>, FeatureError> {
    if positive.len() < MIN_GROUP || negative.len() < MIN_GROUP {
        return Err(FeatureError::TooFew {
            contrast: name,
            positive: positive.len(),
            negative: negative.len(),
            needed: MIN_GROUP,
        });
    }
    let column = |group: &[&PromptSummary], j: usize| -> Vec<f64> {
        group.iter().map(|row| f64::from(row[j])).collect()
    };
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let mut found = Vec::new();
    let mut p_values = Vec::new();
    for (j, &dense) in density.iter().enumerate() {
        if dense > max_density {
            continue;
        }
        let (pos, neg) = (column(positive, j), column(negative, j));
        if pos.iter().chain(&neg).all(|&v| v == 0.0) {
            continue;
        }
        let (mean_pos, mean_neg) = (mean(&pos), mean(&neg));
        p_values.push(match design {
            Design::Groups => stats::mann_whitney(&pos, &neg).p,
            Design::Pairs => {
                let both = pos.iter().zip(&neg);
                stats::wilcoxon(&both.map(|(a, b)| a - b).collect::<Vec<_>>())
            }
        });
        found.push((
            j as u32,
            ContrastEvidence {
                mean_pos,
                mean_neg,
                diff: mean_pos - mean_neg,
                auroc: stats::auroc(&pos, &neg),
                q: 1.0,
                paired: design == Design::Pairs,
            },
        ));
    }
    for ((_, evidence), q) in found.iter_mut().zip(stats::benjamini_hochberg(&p_values)) {
        evidence.q = q;
    }
    found.sort_by(|(i, a), (j, b)| {
        (b.auroc.total_cmp(&a.auroc))
            .then(b.diff.total_cmp(&a.diff))
            .then(i.cmp(j))
    });
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_the_latent_that_separates_and_drops_the_dense_one() {
        // latent 0 separates, 1 is reversed, 2 never fires, 3 separates but is dense.
        let positive: Vec<PromptSummary> = (0..5)
            .map(|i| vec![2.0 + i as f32, 0.0, 0.0, 5.0])
            .collect();
        let negative: Vec<PromptSummary> = (0..5)
            .map(|i| vec![i as f32 * 0.1, 1.0, 0.0, 0.0])
            .collect();
        let (p, n): (Vec<_>, Vec<_>) = (positive.iter().collect(), negative.iter().collect());
        let found = contrast("test", &p, &n, Design::Groups, &[0.1, 0.1, 0.0, 0.9], 0.5).unwrap();
        assert_eq!(found.iter().map(|f| f.0).collect::<Vec<_>>(), [0, 1]);
        let best = &found[0].1;
        assert_eq!((best.mean_pos, best.auroc), (4.0, 1.0));
        assert!((best.mean_neg - 0.2).abs() < 1e-6);
        assert!(best.q < 0.05, "q = {}", best.q);
        assert_eq!(found[1].1.auroc, 0.0);
    }

    #[test]
    fn pairs_tell_what_groups_do_not() {
        // Pairs differ far more from each other than the two sides of a pair do.
        let positive: Vec<PromptSummary> = (0..12).map(|i| vec![i as f32 * 10.0 + 2.0]).collect();
        let negative: Vec<PromptSummary> = (0..12).map(|i| vec![i as f32 * 10.0 + 1.0]).collect();
        let (p, n): (Vec<_>, Vec<_>) = (positive.iter().collect(), negative.iter().collect());
        let q = |design| {
            contrast("test", &p, &n, design, &[0.1], 1.0).unwrap()[0]
                .1
                .q
        };
        assert!(q(Design::Groups) > 0.5);
        assert!(q(Design::Pairs) < 0.01);
    }

    #[test]
    fn too_few_is_an_error() {
        let row = vec![1.0];
        let group = vec![&row; 3];
        assert!(matches!(
            contrast("test", &group, &group, Design::Groups, &[0.0], 1.0),
            Err(FeatureError::TooFew { positive: 3, .. })
        ));
    }
}
