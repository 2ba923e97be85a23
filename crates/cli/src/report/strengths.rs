//! Arms at several strengths, and what each refuses where it refuses as many safe requests as the headline's arm.

use demur_eval::record::{Matched, Strengths};
use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::View;
use super::format::{DASH, change, drawable, fixed, interval_of, px, rate};
use super::marker::marker;

/// Side of the drawing's square, in its own units.
const SIDE: f64 = 240.0;

pub fn section(view: &View<'_>) -> Markup {
    let arms = &view.record.strengths;
    html! {
        @if let (false, Some(headline)) = (arms.is_empty(), view.headline()) {
            section id="strengths" {
                header {
                    h2 { "At the same over-refusal" }
                    p {
                        "An arm that pushes harder refuses more of everything. So each was run at several strengths, and stands here where it "
                        "refuses no more safe requests than " (headline.title) ": at one of its strengths, or at one of two, chosen by a coin "
                        "for each request. That was chosen on these test prompts, in the arms' favour."
                    }
                }
                div class="panels two" {
                    (curves(view, arms))
                    div class="scroll" tabindex="0" role="region" aria-label="The arms at the same over-refusal" { (table(arms)) }
                }
            }
        }
    }
}

fn curves(view: &View<'_>, arms: &[Strengths]) -> Markup {
    let at = |on_safe: f64, on_unsafe: f64| (SIDE * on_safe, SIDE * (1.0 - on_unsafe));
    let of_arm = |i: usize| {
        let arm = view.record.arms.get(i)?;
        let (on_unsafe, on_safe) = (
            arm.estimate("refusal_unsafe")?,
            arm.estimate("refusal_safe")?,
        );
        let drawn = drawable(&on_unsafe) && drawable(&on_safe);
        drawn.then(|| at(on_safe.value, on_unsafe.value))
    };
    let base = of_arm(0);
    let line = |arm: &Strengths| {
        let points = arm.points.iter();
        let mut points: Vec<(f64, (f64, f64))> = points
            .map(|p| (p.strength, at(p.refusal_safe.value, p.refusal_unsafe.value)))
            .collect();
        points.extend(base.map(|base| (0.0, base)));
        points.retain(|(_, (x, y))| x.is_finite() && y.is_finite());
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        let points = points
            .iter()
            .map(|(_, (x, y))| format!("{},{}", px(*x), px(*y)));
        points.collect::<Vec<_>>().join(" ")
    };
    let number = |arm: &Strengths| view.record.arms.iter().position(|a| a.arm == arm.arm);
    html! {
        figure {
            figcaption { "Unsafe refused over safe refused: each arm from its least strength through base to its largest" }
            svg class="strengths" viewBox=(format!("-8 -8 {} {}", SIDE + 16.0, SIDE + 16.0)) width=(SIDE) height=(SIDE) role="img" aria-label="Arms at several strengths" {
                rect x="0" y="0" width=(SIDE) height=(SIDE) fill="none" stroke="currentColor" stroke-opacity="0.3" {}
                @for arm in arms {
                    @let class = number(arm).map_or(String::new(), |i| view.arm_class(i));
                    g class={ "arm " (class) } {
                        title { (arm.title) }
                        polyline points=(line(arm)) fill="none" stroke="currentColor" stroke-width="1.5" {}
                    }
                }
                @for i in std::iter::once(0).chain(view.headline) {
                    @if let Some((x, y)) = of_arm(i) {
                        g class={ "arm " (view.arm_class(i)) } { (marker(view, i, x, y, 5.0)) }
                    }
                }
            }
        }
    }
}

fn table(arms: &[Strengths]) -> Markup {
    html! {
        table class="plain" {
            thead {
                tr {
                    th scope="col" { "Arm" }
                    th scope="col" { "Strengths" }
                    th scope="col" { "There" }
                    th scope="col" { "Unsafe refused" }
                    th scope="col" { "Safe refused" }
                    th scope="col" { "Behind by" }
                }
            }
            tbody {
                @for arm in arms {
                    tr {
                        th scope="row" { (arm.title) }
                        td { (arm.points.iter().map(|p| fixed(p.strength, 2)).collect::<Vec<_>>().join(", ")) }
                        @match &arm.matched {
                            Some(m) => {
                                td { (place(m)) }
                                td { (rate(m.refusal_unsafe, m.headline_ahead.n)) }
                                td { (rate(m.refusal_safe, m.headline_ahead.n)) }
                                td { (behind(&m.headline_ahead)) }
                            }
                            None => {
                                td colspan="4" { (DASH) " refuses more safe requests at every strength" }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// The strength, or two of them and the share of the second.
fn place(m: &Matched) -> String {
    let name = |strength: f64| match strength {
        0.0 => "base".to_owned(),
        by => fixed(by, 2),
    };
    match m.share > 0.0 {
        true => format!(
            "{} of requests {}, the others {}",
            rate(m.share, m.headline_ahead.n),
            name(m.to),
            name(m.from)
        ),
        false => name(m.from),
    }
}

fn behind(ahead: &Estimate) -> Markup {
    let points = |v: f64| change(100.0 * v, 0);
    html! { (points(ahead.value)) " points " small { (interval_of(ahead, points)) } }
}
