//! The sign of an arm: a shape beside the colour, so that no one has to tell arms by colour alone.

use maud::{Markup, html};

use super::View;
use super::format::px;

/// The sign of `arm`, centred on `(x, y)`.
pub fn marker(view: &View<'_>, arm: usize, x: f64, y: f64, r: f64) -> Markup {
    let class = format!("mark {}", view.arm_class(arm));
    if arm == 0 || Some(arm) == view.headline {
        return html! { circle class=(class) cx=(px(x)) cy=(px(y)) r=(px(r)) {} };
    }
    let corners: &[(f64, f64)] = match (arm - 1) % 5 {
        0 => &[(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        1 => &[(0.0, -1.2), (1.2, 0.0), (0.0, 1.2), (-1.2, 0.0)],
        2 => &[(0.0, -1.1), (1.1, 0.85), (-1.1, 0.85)],
        3 => &[(0.0, 1.1), (1.1, -0.85), (-1.1, -0.85)],
        _ => &[
            (-0.35, -1.0),
            (0.35, -1.0),
            (0.35, -0.35),
            (1.0, -0.35),
            (1.0, 0.35),
            (0.35, 0.35),
            (0.35, 1.0),
            (-0.35, 1.0),
            (-0.35, 0.35),
            (-1.0, 0.35),
            (-1.0, -0.35),
            (-0.35, -0.35),
        ],
    };
    let points: Vec<String> = corners
        .iter()
        .map(|(dx, dy)| format!("{},{}", px(x + r * dx), px(y + r * dy)))
        .collect();
    html! { polygon class=(class) points=(points.join(" ")) {} }
}

/// The sign of `arm` in a line of text.
pub fn swatch(view: &View<'_>, arm: usize) -> Markup {
    html! {
        svg class="swatch" viewBox="0 0 14 14" width="14" height="14" aria-hidden="true" {
            (marker(view, arm, 7.0, 7.0, 5.0))
        }
    }
}
