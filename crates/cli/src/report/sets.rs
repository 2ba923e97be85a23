//! Small sets of latents: the best of each size, and which pairs help or hinder each other.

use demur_eval::stats::Estimate;
use demur_features::table::{SetEvidence, SetSearch};
use maud::{Markup, html};

use super::format::{DASH, change, count, figure, interval_of};

/// Pairs of the table, the strongest interactions first.
const PAIRS: usize = 12;

/// The figures of a search.
pub fn figures(s: &SetSearch) -> Markup {
    let pairs = s.strongest_pairs();
    html! {
        div class="beside" id="sets" {
            h3 { "Small sets" }
            p class="prose" {
                "The first " (s.singles.len()) " latents of the ranking, clamped together at " (figure(s.value))
                " × their largest activation, by the rise of the refusal log-odds of validation prompts. The best single latent and the best pair are the best of all; from three on the best one is added. "
                "Sets that change benign prompts by more than " (figure(s.max_kl)) " nats do not count. The interaction is what a set does beyond the sum of its members alone."
            }
            @if s.sets.is_empty() {
                p class="note" { "No latent raises refusal within that limit." }
            } @else {
                (table("The best set of each size", s.sets.iter()))
            }
            @if !pairs.is_empty() {
                details {
                    summary { "Pairs, the strongest interactions first" }
                    (table("Pairs", pairs.iter().copied().take(PAIRS)))
                    @if pairs.len() > PAIRS {
                        p class="note" { "All " (count(pairs.len() as u64)) " are in " span class="mono" { "record.json" } "." }
                    }
                }
            }
        }
    }
}

fn table<'a>(label: &str, sets: impl Iterator<Item = &'a SetEvidence>) -> Markup {
    html! {
        div class="scroll" tabindex="0" role="region" aria-label=(label) {
            table class="plain" {
                thead {
                    tr {
                        th scope="col" { "Latents" }
                        th scope="col" { "Log-odds, unsafe" }
                        th scope="col" { "Log-odds, safe" }
                        th scope="col" { "KL, nats" }
                        th scope="col" { "Interaction" }
                        th scope="col" { "Gain over the smaller set" }
                    }
                }
                tbody {
                    @for set in sets {
                        @let names: Vec<String> = set.latents.iter().map(u32::to_string).collect();
                        tr {
                            th scope="row" class="mono" { (names.join(", ")) }
                            (cell(Some(&set.refusal_logodds_delta_unsafe)))
                            (cell(Some(&set.refusal_logodds_delta_safe)))
                            td { (figure(set.kl_benign)) }
                            (cell(set.interaction.as_ref()))
                            (cell(set.gain.as_ref()))
                        }
                    }
                }
            }
        }
    }
}

fn cell(e: Option<&Estimate>) -> Markup {
    html! {
        td {
            @if let Some(e) = e {
                (change(e.value, 2)) " " span class="interval inline" { (interval_of(e, |v| change(v, 2))) }
            } @else { (DASH) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::mean;

    #[test]
    fn sets_and_the_strongest_pairs_are_listed() {
        let set = |latents: &[u32], interaction: Option<f64>| SetEvidence {
            latents: latents.to_vec(),
            refusal_logodds_delta_unsafe: mean(&[4.0, 4.0]),
            refusal_logodds_delta_safe: mean(&[]),
            kl_benign: 0.05,
            interaction: interaction.map(|i| mean(&[i, i])),
            gain: None,
        };
        let mut search = SetSearch {
            value: 0.5,
            max_kl: 0.1,
            sets: vec![set(&[7], None), set(&[7, 9], Some(0.25))],
            singles: vec![set(&[7], None), set(&[9], None)],
            pairs: vec![set(&[1, 2], Some(0.5)), set(&[3, 4], Some(-2.0))],
        };
        let page = figures(&search).into_string();
        assert!(page.contains("7, 9") && page.contains("+0.25"), "{page}");
        let (strong, weak) = (page.find("3, 4"), page.find("1, 2"));
        assert!(strong.unwrap() < weak.unwrap(), "{page}");
        assert!(page.contains("−2.00") && !page.contains("NaN"), "{page}");
        search.sets.clear();
        assert!(
            figures(&search).into_string().contains("No latent raises"),
            "{page}"
        );
    }
}
