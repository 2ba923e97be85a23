//! Refusals by category: base above the headline's arm, unsafe beside safe.

use demur_eval::prompts::Label;
use demur_eval::record::CategoryCount;
use maud::{Markup, html};

use super::View;
use super::format::{DASH, count, or_none, px};

/// Categories on the page; the rest is in the record.
const CATEGORIES: usize = 40;

pub fn section(view: &View<'_>) -> Markup {
    let mut names: Vec<&str> = Vec::new();
    for c in &view.record.categories {
        if !names.contains(&c.category.as_str()) {
            names.push(&c.category);
        }
    }
    html! {
        section id="categories" {
            header {
                h2 { "By category" }
                p {
                    "Refusals of the test prompts in each category: " span class="key base" { "base" }
                    @if let Some(main) = view.headline() { ", " span class="key main" { (main.title) } }
                    ". A category has few prompts; read the pattern, not the bar."
                }
            }
            @if names.is_empty() {
                p class="note" { "The prompts have no categories." }
            } @else {
                div class="categories" {
                    div class="category head" aria-hidden="true" {
                        span {} span { "Unsafe refused" } span { "Safe refused" }
                    }
                    @for name in names.iter().take(CATEGORIES) {
                        div class="category" {
                            span class="category-name" { (or_none(&name.replace(['_', '-'], " "))) }
                            (bars(view, name, Label::Unsafe))
                            (bars(view, name, Label::Safe))
                        }
                    }
                }
                @if names.len() > CATEGORIES {
                    p class="note" { "The first " (CATEGORIES) " of " (count(names.len() as u64)) " categories; all are in " span class="mono" { "record.json" } "." }
                }
            }
        }
    }
}

fn bars(view: &View<'_>, category: &str, label: Label) -> Markup {
    let find = |arm: &str| {
        view.record
            .categories
            .iter()
            .find(|c| c.category == category && c.label == label && c.arm == arm)
    };
    let kind = match label {
        Label::Unsafe => "unsafe",
        Label::Safe => "safe",
    };
    html! {
        div class={ "bars " (kind) } {
            span class="bars-title" { (kind) }
            @for (arm, class) in [(view.base(), "base"), (view.headline(), "main")] {
                @if let Some(arm) = arm {
                    (bar(&arm.title, class, find(&arm.arm)))
                }
            }
        }
    }
}

fn bar(title: &str, class: &str, c: Option<&CategoryCount>) -> Markup {
    let text = c.map_or_else(|| DASH.to_owned(), |c| format!("{}/{}", c.refused, c.n));
    let width = c.map_or(0.0, |c| 100.0 * c.refused as f64 / c.n.max(1) as f64);
    html! {
        span class={ "bar " (class) } title=(format!("{title}: {text} refused")) {
            svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" {
                rect class="track" x="0" y="0" width="100" height="8" {}
                rect class="fill" x="0" y="0" width=(px(width.min(100.0))) height="8" {}
            }
            span class="bar-text" { (text) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_to_scale() {
        let c = CategoryCount {
            category: "a".to_owned(),
            arm: "base".to_owned(),
            label: Label::Unsafe,
            refused: 2,
            n: 5,
        };
        let page = bar("Base", "base", Some(&c)).into_string();
        assert!(
            page.contains(r#"width="40""#) && page.contains("2/5"),
            "{page}"
        );
        let nothing = bar("Base", "base", None).into_string();
        assert!(
            nothing.contains(r#"width="0""#) && nothing.contains(DASH),
            "{nothing}"
        );
    }
}
