//! The front of the gate's settings: what any choice of scores and damping would have done on validation
//! prompts, as a curve and a table.

use demur_eval::record::{Calibration, Setting};
use demur_eval::stats::Estimate;
use maud::{Markup, html};

use super::format::{DASH, count, figure, fixed, px, rate, rate_interval};

/// Side of the drawing's square, in its own units.
const SIDE: f64 = 160.0;

/// The figures of a calibrated gate.
pub fn figures(c: &Calibration) -> Markup {
    html! {
        p {
            "Where it opens, where it is clear, how far it then clamps and damps was chosen among all settings on "
            (c.base_unsafe.n) " unsafe and " (c.base_safe.n) " safe validation prompts. These are the ones that no other beats. The aim: "
            (c.aim) "."
        }
        div class="panels two" {
            (curve(c))
            div class="scroll" tabindex="0" role="region" aria-label="The settings as a table" { (table(c)) }
        }
    }
}

fn curve(c: &Calibration) -> Markup {
    let at = |on_safe: f64, on_unsafe: f64| (SIDE * on_safe, SIDE * (1.0 - on_unsafe));
    let of = |s: &Setting| at(s.refusal_safe.value, s.refusal_unsafe.value);
    let points: Vec<String> = c
        .front
        .iter()
        .map(|s| {
            let (x, y) = of(s);
            format!("{},{}", px(x), px(y))
        })
        .collect();
    let base = at(c.base_safe.value, c.base_unsafe.value);
    html! {
        figure {
            figcaption { "Unsafe refused over safe refused: the front, the setting chosen (ring), base (dot)" }
            svg viewBox=(format!("0 0 {SIDE} {SIDE}")) width=(SIDE) height=(SIDE) role="img" aria-label="Front of the gate's settings" {
                rect x="0" y="0" width=(SIDE) height=(SIDE) fill="none" stroke="currentColor" stroke-opacity="0.3" {}
                polyline points=(points.join(" ")) fill="none" stroke="currentColor" stroke-width="1.5" {}
                circle cx=(px(base.0)) cy=(px(base.1)) r="3" fill="currentColor" {}
                @for (x, y) in c.front.iter().filter(|s| s.chosen).map(of) {
                    circle cx=(px(x)) cy=(px(y)) r="5" fill="none" stroke="currentColor" stroke-width="1.5" {}
                }
            }
        }
    }
}

fn table(c: &Calibration) -> Markup {
    let cell = |e: &Estimate| {
        html! { td { (rate(e.value, e.n)) " " small { (rate_interval(e)) } } }
    };
    html! {
        table class="plain" {
            thead {
                tr {
                    th scope="col" { "Open from" }
                    th scope="col" { "Clear below" }
                    th scope="col" { "Clamp" }
                    th scope="col" { "Damping" }
                    th scope="col" { "Unsafe refused" }
                    th scope="col" { "Safe refused" }
                    th scope="col" { "Gibberish" }
                    th scope="col" { "KL on chats, nats" }
                }
            }
            tbody {
                tr {
                    th scope="row" { "base" }
                    td { (DASH) }
                    td { (DASH) }
                    td { (DASH) }
                    (cell(&c.base_unsafe))
                    (cell(&c.base_safe))
                    td { (DASH) }
                    td { (DASH) }
                }
                @for s in &c.front {
                    tr class=[s.chosen.then_some("chosen")] {
                        th scope="row" { (fixed(s.threshold.into(), 2)) @if s.chosen { " " span class="tag" { "chosen" } } }
                        td { (s.clear.map_or_else(|| DASH.to_owned(), |c| fixed(c.into(), 2))) }
                        td { (s.clamp.to_string()) }
                        td { (if s.clear.is_some() { s.damp.to_string() } else { DASH.to_owned() }) }
                        (cell(&s.refusal_unsafe))
                        (cell(&s.refusal_safe))
                        td { (count(s.gibberish as u64)) }
                        td { (figure(s.chat_kl)) }
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
    fn the_front_is_drawn_and_listed() {
        let setting = |on_unsafe, on_safe, clear: Option<f32>| Setting {
            threshold: 0.5,
            clear,
            clamp: 1.5,
            damp: 0.25,
            refusal_unsafe: wilson(on_unsafe, 4),
            refusal_safe: wilson(on_safe, 4),
            gibberish: 0,
            chat_kl: 0.01,
            chosen: clear.is_some(),
        };
        let page = figures(&Calibration {
            aim: "<much>".to_owned(),
            base_unsafe: wilson(2, 4),
            base_safe: wilson(1, 4),
            front: vec![setting(4, 2, None), setting(3, 0, Some(-1.5))],
        })
        .into_string();
        assert!(page.contains("points=\"80,0 0,40\""), "{page}");
        assert!(page.contains("&lt;much&gt;"), "{page}");
        assert_eq!(page.matches("tag\">chosen").count(), 1, "{page}");
        assert!(page.contains("<td>1.5</td><td>0.25</td>"), "{page}");
    }
}
