//! The gate: what it catches of the test prompts and what it takes for unsafe falsely, by part, beside
//! what else could have been the gate; and how well its probabilities are calibrated.

use demur_eval::record::GateFacts;
use demur_features::gate::Detection;
use maud::{Markup, html};

use super::View;
use super::format::{DASH, count, fixed, px, rate, rate_interval};
use super::front;

/// Side of the ROC curve's square, in its own units.
const SIDE: f64 = 160.0;

/// The section, if an arm has a gate.
pub fn section(view: &View<'_>) -> Markup {
    let Some(g) = &view.record.gate else {
        return html! {};
    };
    html! {
        section id="gate" {
            header {
                h2 { "The gate" }
                p {
                    (g.in_words)
                    " It was trained on discovery prompts, and chosen, calibrated and given its threshold on validation prompts; these are the test prompts."
                }
            }
            div class="scroll" { (table(g)) }
            div class="panels two" { (curve(&g.test.roc)) (calibration(g)) }
            @if let Some(refuses) = &g.refuses {
                p {
                    "A second gate says where base would refuse by itself, so that damping leaves alone what base answers anyway. "
                    "Of the validation prompts that base refuses it knows " (rate(refuses.recall.value, refuses.recall.n))
                    " " (rate_interval(&refuses.recall)) ", and takes "
                    (rate(refuses.false_alarm.value, refuses.false_alarm.n)) " " (rate_interval(&refuses.false_alarm))
                    " of the others for refused"
                    @if let Some(auroc) = refuses.auroc { " (AUROC " (fixed(auroc, 3)) ")" }
                    "."
                }
            }
            @if let Some(c) = &view.record.calibration { (front::figures(c)) }
        }
    }
}

fn table(g: &GateFacts) -> Markup {
    html! {
        table class="plain" {
            thead {
                tr {
                    th scope="col" { "Prompts" }
                    th scope="col" { "AUROC" }
                    th scope="col" { "Unsafe caught" }
                    th scope="col" { "Safe taken for unsafe" }
                }
            }
            tbody {
                @for group in &g.test.groups { (row(&group.name.replace('_', " "), &group.detection)) }
                @for other in &g.beside { (row(&format!("all, by {}", other.name), &other.detection)) }
            }
        }
    }
}

fn row(name: &str, d: &Detection) -> Markup {
    html! {
        tr {
            th scope="row" { (name) }
            td { (d.auroc.map_or_else(|| DASH.to_owned(), |a| fixed(a, 3))) }
            @for e in [&d.recall, &d.false_alarm] {
                td {
                    @if e.n == 0 { (DASH) } @else {
                        (rate(e.value, e.n)) " " small { (rate_interval(e)) " of " (count(e.n as u64)) }
                    }
                }
            }
        }
    }
}

fn curve(roc: &[(f64, f64)]) -> Markup {
    let points: Vec<String> = roc
        .iter()
        .map(|(x, y)| format!("{},{}", px(SIDE * x), px(SIDE * (1.0 - y))))
        .collect();
    html! {
        figure {
            figcaption { "ROC curve: unsafe caught over safe taken for unsafe" }
            svg viewBox=(format!("0 0 {SIDE} {SIDE}")) width=(SIDE) height=(SIDE) role="img" aria-label="ROC curve" {
                rect x="0" y="0" width=(SIDE) height=(SIDE) fill="none" stroke="currentColor" stroke-opacity="0.3" {}
                polyline points=(points.join(" ")) fill="none" stroke="currentColor" stroke-width="1.5" {}
            }
        }
    }
}

fn calibration(g: &GateFacts) -> Markup {
    html! {
        figure {
            figcaption {
                "Calibration: what the gate says, and what is; classes weigh the same. Expected error "
                (fixed(g.test.calibration_error, 3))
            }
            table class="plain" {
                thead { tr { th scope="col" { "Said" } th scope="col" { "Is" } th scope="col" { "Prompts" } } }
                tbody {
                    @for bin in &g.test.reliability {
                        tr {
                            td { (fixed(bin.predicted, 2)) }
                            td { (fixed(bin.observed, 2)) }
                            td { (count(bin.n as u64)) }
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use demur_eval::stats::wilson;

    #[test]
    fn a_row_shows_what_is_known() {
        let mut d = Detection {
            auroc: Some(0.9174),
            recall: wilson(3, 4),
            false_alarm: wilson(1, 2),
        };
        let page = row("<all>", &d).into_string();
        assert!(
            page.contains("&lt;all&gt;") && page.contains("0.917"),
            "{page}"
        );
        assert!(page.contains("of 4") && page.contains("of 2"), "{page}");
        (d.auroc, d.false_alarm) = (None, wilson(0, 0));
        assert_eq!(row("x", &d).into_string().matches(DASH).count(), 2);
    }

    #[test]
    fn the_curve_begins_below_and_ends_above() {
        let page = curve(&[(0.0, 0.0), (0.5, 0.75), (1.0, 1.0)]).into_string();
        assert!(page.contains("points=\"0,160 80,40 160,0\""), "{page}");
    }
}
