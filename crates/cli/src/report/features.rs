//! The features: each latent with its evidence, the tokens that its decoder row moves, and the
//! places where it fires most, with the activation as the background of each token.

use demur_features::table::{
    AttributionEvidence, CausalEvidence, ContrastEvidence, Evidence, Feature, Histogram, Stability,
    StabilityEvidence, TokenLogit, TopActivation,
};
use maud::{Markup, html};

use super::format::{change, count, figure, fixed, percent, px};
use super::{View, sets, sites};

/// Features on the page; the rest is in the record.
const FEATURES: usize = 24;
/// Contexts of one feature.
const CONTEXTS: usize = 6;
/// Tokens of one context, on each side of the peak.
const REACH: usize = 40;
/// Promoted or suppressed tokens.
const TOKENS: usize = 10;
/// Steps of the background; the style sheet has a class for each.
const LEVELS: f32 = 9.0;
/// Features that are open at first, if none was chosen.
const OPEN: usize = 1;

pub fn section(view: &View<'_>) -> Markup {
    let found = &view.record.discovery;
    let mut features: Vec<&Feature> = found.table.features.iter().collect();
    features.sort_by_key(|f| (!f.chosen, f.rank));
    let any_chosen = features.iter().any(|f| f.chosen);
    html! {
        section id="features" {
            header {
                h2 { "The features and the evidence for them" }
                p {
                    "A latent is an index into the SAE's dictionary; a feature is a latent with evidence. "
                    "They were found on discovery prompts and ranked by what a clamp does to the refusal log-odds of validation prompts."
                }
            }
            @if let Some(s) = &found.table.stability { (stability(s)) }
            @if features.is_empty() {
                p class="note" { "Discovery reported no feature." }
            }
            @for (i, f) in features.iter().take(FEATURES).enumerate() {
                (card(f, f.chosen || (!any_chosen && i < OPEN)))
            }
            @if features.len() > FEATURES {
                p class="note" {
                    "The first " (FEATURES) " of " (count(features.len() as u64)) " features are shown; all are in "
                    span class="mono" { "record.json" } "."
                }
            }
            @if let Some(s) = &found.table.sets { (sets::figures(s)) }
            @if !found.table.sites.is_empty() { (sites::figures(&found.table.sites, &view.record.sae.site)) }
        }
    }
}

fn stability(s: &Stability) -> Markup {
    let by = |what: &str, correlation: f64| format!("{} by {what}", fixed(correlation, 2));
    let methods = s.methods.iter().map(|(m, c)| by(&m.replace('_', " "), *c));
    let causal = s.causal.map(|c| by("what a clamp does", c));
    let all: Vec<String> = methods.chain(causal).collect();
    html! {
        p class="note" {
            "How much of this is chance: over " (count(s.draws as u64)) " draws of the prompts with replacement, the mean rank correlation with the ranking shown is "
            (all.join(", ")) ". Each feature says how often it is on the short list."
        }
    }
}

fn card(f: &Feature, open: bool) -> Markup {
    html! {
        details class={ "feature" @if f.chosen { " chosen" } } open[open] {
            summary {
                span class="feature-name" { "Latent " (f.latent) }
                @if f.chosen { span class="tag" { "in the plan" } }
                span class="feature-gist" {
                    @if let Some(c) = &f.evidence.causal {
                        "log-odds " (change(c.refusal_logodds_delta_unsafe, 1))
                    }
                    @if let Some(first) = f.promotes.first() {
                        " promotes " (token(&first.token))
                    }
                }
            }
            div class="feature-body" {
                div class="feature-evidence" {
                    (evidence(f))
                    (tokens("Promotes", "up", &f.promotes))
                    (tokens("Suppresses", "down", &f.suppresses))
                    @if let Some(h) = &f.activations { (histogram("Activations where it is active", "tokens", h)) }
                    @if let Some(h) = &f.logits { (histogram("Logits of its decoder row", "tokens of the vocabulary", h)) }
                }
                div class="contexts" {
                    h3 { "Where it fires most" }
                    @if f.top_activations.is_empty() {
                        p class="note" { "No context was kept." }
                    }
                    @for a in f.top_activations.iter().take(CONTEXTS) {
                        (context(a))
                    }
                    @if f.top_activations.len() > CONTEXTS {
                        p class="note" { (f.top_activations.len() - CONTEXTS) " more in " span class="mono" { "record.json" } "." }
                    }
                }
            }
        }
    }
}

fn evidence(f: &Feature) -> Markup {
    let Evidence {
        paper_recipe,
        harmful_vs_lookalike,
        refused_vs_complied,
        written_refusals,
        density,
        max_activation,
        cosine_refusal_direction,
        attribution,
        causal,
        stability,
    } = &f.evidence;
    html! {
        dl class="evidence" {
            div { dt { "Rank" } dd { (f.rank + 1) } }
            @if let Some(c) = causal { (caused(c)) }
            @if let Some(s) = stability { (stable(s)) }
            @if let Some(a) = attribution { (attributed(a)) }
            @if let Some(c) = refused_vs_complied { (contrast("Refused / complied", c)) }
            @if let Some(c) = written_refusals { (contrast("Written refusal / own reply", c)) }
            @if let Some(c) = harmful_vs_lookalike { (contrast("Harmful / look-alike", c)) }
            @if let Some(r) = paper_recipe {
                div { dt { "Paper's recipe" } dd { "active on " (r.active_refusal_tokens) " tokens of the refusal" } }
            }
            @if let Some(v) = cosine_refusal_direction {
                div { dt { "Cosine with refusal direction" } dd { (fixed(*v, 2)) } }
            }
            @if let Some(v) = density {
                div { dt { "Density" } dd { (percent(*v)) small { "of tokens" } } }
            }
            @if let Some(v) = max_activation {
                div { dt { "Largest activation" } dd { (figure(*v)) } }
            }
        }
    }
}

fn caused(c: &CausalEvidence) -> Markup {
    html! {
        div {
            dt { "Refusal log-odds, clamped at " (figure(c.value)) " × max" }
            dd {
                b { (change(c.refusal_logodds_delta_unsafe, 2)) } small { "unsafe" }
                @if let Some(v) = c.refusal_logodds_delta_safe { " " b { (change(v, 2)) } small { "safe" } }
            }
        }
        @if let Some(kl) = c.kl_benign {
            div { dt { "KL on benign prompts" } dd { (figure(kl)) small { "nats" } } }
        }
    }
}

fn stable(s: &StabilityEvidence) -> Markup {
    html! {
        div {
            dt { "If prompts are drawn again" }
            dd {
                "on the short list in " b { (percent(s.short_list)) } small { "of draws" }
                small class="line" { "rank " (s.rank_lo + 1) " to " (s.rank_hi + 1) " in 95 %" }
            }
        }
    }
}

/// Bars by the square root of their counts: the rare ones, which matter, stay visible.
fn histogram(title: &str, of: &str, h: &Histogram) -> Markup {
    const HEIGHT: f64 = 36.0;
    const BAR: f64 = 4.0;
    let root = |n: u64| (n as f64).sqrt();
    let highest = h.counts.iter().copied().max().map_or(1.0, root).max(1.0);
    let all: u64 = h.counts.iter().sum();
    let width = BAR * h.counts.len() as f64;
    html! {
        h3 { (title) }
        svg class="histogram" viewBox=(format!("0 0 {} {}", px(width), px(HEIGHT))) preserveAspectRatio="none" role="img"
            aria-label=(format!("{title}: {} {of}, from {} to {}", count(all), figure(h.lo), figure(h.hi))) {
            @for (i, n) in h.counts.iter().enumerate().filter(|(_, n)| **n > 0) {
                @let height = HEIGHT * root(*n) / highest;
                rect x=(px(BAR * i as f64)) y=(px(HEIGHT - height)) width=(px(BAR - 0.6)) height=(px(height)) {}
            }
        }
        p class="histogram-ends" { span { (figure(h.lo)) } span { (count(all)) " " (of) ", square root" } span { (figure(h.hi)) } }
    }
}

fn attributed(a: &AttributionEvidence) -> Markup {
    html! {
        div {
            dt { "Attribution of the refusal log-odds" }
            dd {
                b { (change(a.mean, 3)) } small { "q = " (figure(a.q)) }
                @if let Some(i) = &a.integrated {
                    " " b { (change(i.mean, 3)) } small { "integrated over " (i.steps) " steps, q = " (figure(i.q)) }
                }
                small class="line" { "active in " (a.active) " of " (a.prompts) " unsafe prompts" }
            }
        }
    }
}

fn contrast(name: &str, c: &ContrastEvidence) -> Markup {
    html! {
        div {
            dt { (name) }
            dd {
                "AUROC " b { (fixed(c.auroc, 2)) } small { "q = " (figure(c.q)) }
                small class="line" { "mean max " (figure(c.mean_pos)) " against " (figure(c.mean_neg)) }
            }
        }
    }
}

fn tokens(title: &str, class: &str, tokens: &[TokenLogit]) -> Markup {
    html! {
        @if !tokens.is_empty() {
            h3 { (title) }
            p class={ "tokens " (class) } {
                @for t in tokens.iter().take(TOKENS) {
                    span class="token" title=(format!("logit {}", change(t.logit, 2))) { (token(&t.token)) }
                    " "
                }
            }
        }
    }
}

/// A token with what can't be seen made visible.
fn token(text: &str) -> String {
    if text.is_empty() {
        return "∅".to_owned();
    }
    text.chars()
        .map(|c| match c {
            ' ' => '␣',
            '\n' => '↵',
            '\t' => '⇥',
            '\r' => '␍',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// A token in running text: spaces stay, a line break is shown where it is.
fn in_context(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' => '↵',
            '\t' => ' ',
            c if c.is_control() => '\u{fffd}',
            c => c,
        })
        .collect()
}

fn context(a: &TopActivation) -> Markup {
    let from = a.peak.saturating_sub(REACH).min(a.tokens.len());
    let to = (a.peak + REACH + 1).min(a.tokens.len());
    let shown = from.min(to)..to;
    html! {
        figure class="context" {
            p class="text" dir="auto" {
                @if from > 0 { "… " }
                @for i in shown {
                    @let act = a.acts.get(i).copied().unwrap_or(0.0);
                    (piece(&a.tokens[i], act, a.value as f32, i == a.peak))
                }
                @if to < a.tokens.len() { " …" }
            }
            figcaption { span class="mono" { (a.source) } " · peak " (figure(a.value)) }
        }
    }
}

/// A step of the background: 0 for none, [`LEVELS`] for the peak.
fn level(act: f32, peak: f32) -> u32 {
    if act > 0.0 && peak > 0.0 && act.is_finite() {
        (LEVELS * act / peak).ceil().clamp(1.0, LEVELS) as u32
    } else {
        0
    }
}

fn piece(text: &str, act: f32, peak: f32, is_peak: bool) -> Markup {
    let text = in_context(text);
    match level(act, peak) {
        0 if !is_peak => html! { (text) },
        l => html! {
            span class={ "a" (l) @if is_peak { " peak" } } title=(figure(f64::from(act))) { (text) }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backgrounds_follow_the_activation() {
        assert_eq!(level(0.0, 4.0), 0);
        assert_eq!(level(-1.0, 4.0), 0);
        assert_eq!(level(0.01, 4.0), 1);
        assert_eq!(level(2.0, 4.0), 5);
        assert_eq!(level(4.0, 4.0), 9);
        assert_eq!(level(8.0, 4.0), 9);
        assert_eq!(level(f32::NAN, 4.0), 0);
        assert_eq!(level(1.0, f32::NAN), 0);
    }

    #[test]
    fn an_attribution_is_shown_in_both_forms() {
        use demur_features::table::IntegratedEvidence;
        let mut a = AttributionEvidence {
            prompts: 16,
            active: 13,
            mean: 0.2713,
            q: 0.002,
            integrated: None,
        };
        let plain = attributed(&a).into_string();
        assert!(plain.contains("<b>+0.271</b>"), "{plain}");
        assert!(plain.contains("13 of 16") && !plain.contains("integrated"));
        a.integrated = Some(IntegratedEvidence {
            steps: 8,
            mean: -0.193,
            q: 0.04,
        });
        let both = attributed(&a).into_string();
        assert!(both.contains("<b>−0.193</b>"), "{both}");
        assert!(both.contains("over 8 steps"), "{both}");
    }

    #[test]
    fn a_histogram_is_drawn_by_the_root_of_its_counts() {
        let h = Histogram {
            lo: -1.0,
            hi: 3.0,
            counts: vec![16, 0, 4],
        };
        let page = histogram("Logits", "tokens", &h).into_string();
        assert!(page.contains(r#"viewBox="0 0 12 36""#), "{page}");
        assert!(
            page.contains(r#"x="0" y="0" width="3.4" height="36""#),
            "{page}"
        );
        assert!(
            page.contains(r#"x="8" y="18" width="3.4" height="18""#),
            "{page}"
        );
        assert_eq!(page.matches("<rect").count(), 2);
        assert!(
            page.contains("20 tokens") && page.contains("−1.00"),
            "{page}"
        );
        let empty = Histogram {
            lo: f64::NAN,
            hi: f64::NAN,
            counts: Vec::new(),
        };
        assert!(!histogram("x", "y", &empty).into_string().contains("NaN"));
    }

    #[test]
    fn the_peak_is_marked_and_far_tokens_are_cut() {
        let a = TopActivation {
            value: 2.0,
            source: "discovery/u1".to_owned(),
            tokens: (0..200).map(|i| format!(" t{i}")).collect(),
            acts: (0..200).map(|i| if i == 100 { 2.0 } else { 0.0 }).collect(),
            peak: 100,
        };
        let page = context(&a).into_string();
        assert!(
            page.contains(r#"<span class="a9 peak" title="2.00"> t100</span>"#),
            "{page}"
        );
        assert!(page.contains(" t60") && page.contains(" t140"));
        assert!(!page.contains(" t59") && !page.contains(" t141"));
    }

    #[test]
    fn a_peak_out_of_bounds_does_no_harm() {
        let a = TopActivation {
            value: f64::NAN,
            source: String::new(),
            tokens: vec!["a".to_owned()],
            acts: Vec::new(),
            peak: usize::MAX - 100,
        };
        assert!(context(&a).into_string().contains("figcaption"));
    }

    #[test]
    fn what_can_not_be_seen_is_shown() {
        assert_eq!(token(" a\n"), "␣a↵");
        assert_eq!(token(""), "∅");
        assert_eq!(in_context("a\n\u{0}"), "a↵\u{fffd}");
    }
}
