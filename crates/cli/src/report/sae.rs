//! The SAE: how well it reconstructs, and how its training went.

use demur_eval::record::{CurvePoint, HeldOut};
use maud::{Markup, html};

use super::View;
use super::chart::{LineChart, Point, Series};
use super::format::{DASH, count, figure, fixed, percent};

/// Points of a drawn curve; more can't be told apart.
const CURVE_POINTS: usize = 240;

pub fn section(view: &View<'_>) -> Markup {
    let sae = &view.record.sae;
    html! {
        section id="sae" {
            header {
                h2 { "The sparse autoencoder" }
                p {
                    (count(sae.d_sae as u64)) " latents, at most " (sae.k) " active a token, at " span class="mono" { (sae.site) }
                    @if let Some(n) = sae.trained_on_tokens { ", trained on " (count(n)) " tokens" }
                    ". FVU is the fraction of variance that the reconstruction leaves unexplained, on text that was held out: 0 is perfect, 1 is no better than the mean."
                }
            }
            div class="scroll" {
                table class="plain quality" {
                    thead {
                        tr {
                            th scope="col" { "Held-out" }
                            th scope="col" { "FVU" }
                            th scope="col" { "L0" small { "active latents a token" } }
                            th scope="col" { "Never active" small { "of all latents" } }
                            th scope="col" { "Tokens" }
                        }
                    }
                    tbody {
                        (quality("chats", sae.chat.as_ref()))
                        (quality("plain text", sae.text.as_ref()))
                    }
                }
            }
            @if sae.curve.len() > 1 {
                (curves(&sae.curve))
            } @else if sae.source == "train" {
                p class="note" { "No training curve was kept." }
            } @else {
                p class="note" { "The SAE was not trained by this study, so there is no training curve." }
            }
        }
    }
}

fn quality(name: &str, q: Option<&HeldOut>) -> Markup {
    html! {
        tr {
            th scope="row" { (name) }
            @if let Some(q) = q {
                td { (fixed(q.fvu.value, 3)) }
                td { (fixed(q.l0.value, 1)) }
                td { (percent(q.dead)) }
                td { (count(q.n_tokens as u64)) }
            } @else {
                @for _ in 0..4 { td { (DASH) } }
            }
        }
    }
}

fn curves(curve: &[CurvePoint]) -> Markup {
    let drawn = thinned(curve);
    html! {
        div class="panels two" {
            (panel("FVU in training", figure, &drawn, |p| p.fvu))
            (panel("Dead latents in training", percent, &drawn, |p| p.dead))
        }
        @if drawn.len() < curve.len() {
            p class="note" { (drawn.len()) " of " (count(curve.len() as u64)) " points are drawn." }
        }
    }
}

/// Evenly chosen points, the first and the last among them.
fn thinned(curve: &[CurvePoint]) -> Vec<&CurvePoint> {
    if curve.len() <= CURVE_POINTS {
        return curve.iter().collect();
    }
    (0..CURVE_POINTS)
        .map(|i| &curve[i * (curve.len() - 1) / (CURVE_POINTS - 1)])
        .collect()
}

fn panel(
    title: &str,
    y_format: fn(f64) -> String,
    curve: &[&CurvePoint],
    read: impl Fn(&CurvePoint) -> f64,
) -> Markup {
    let (first, last) = (
        curve.first().map_or(0, |p| p.step),
        curve.last().map_or(0, |p| p.step),
    );
    let tick = |s: usize| (s as f64, count(s as u64));
    let points = curve
        .iter()
        .map(|p| Point {
            x: p.step as f64,
            y: read(p),
            interval: None,
            chosen: false,
            title: format!("step {}: {}", p.step, y_format(read(p))),
        })
        .collect();
    let chart = LineChart {
        summary: format!(
            "{title}: {} at step {first}, {} at step {last}",
            curve
                .first()
                .map_or_else(String::new, |p| y_format(read(p))),
            curve.last().map_or_else(String::new, |p| y_format(read(p)))
        ),
        x_label: "step",
        x_ticks: vec![tick(first), tick(first.midpoint(last)), tick(last)],
        log_x: false,
        y_min: 0.0,
        y_max: None,
        y_format,
        rules: Vec::new(),
        series: vec![Series {
            label: String::new(),
            class: "s0".to_owned(),
            points,
        }],
    };
    html! {
        figure class="panel" {
            figcaption { b { (title) } }
            (chart.svg())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_keeps_its_ends() {
        let curve: Vec<CurvePoint> = (0..10_000)
            .map(|step| CurvePoint {
                step,
                fvu: 0.5,
                loss: 1.0,
                dead: 0.0,
                lr: 0.001,
            })
            .collect();
        let drawn = thinned(&curve);
        assert_eq!(drawn.len(), CURVE_POINTS);
        assert_eq!((drawn[0].step, drawn[CURVE_POINTS - 1].step), (0, 9_999));
        assert_eq!(thinned(&curve[..5]).len(), 5);
    }
}
