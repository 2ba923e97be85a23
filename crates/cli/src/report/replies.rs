//! Replies side by side: base on the left, a steered arm on the right. Which arm is a radio button
//! and the style sheet's doing, so it works without scripts; the filter over the whole list is the
//! script's.

use demur_eval::judge::Verdict;
use demur_eval::prompts::Label;
use demur_eval::record::{ArmReply, ReplyRow};
use maud::{Markup, PreEscaped, html};

use super::View;
use super::format::{DASH, change, clip, count, or_none};
use super::sample::samples;

/// Prompts in the list; the rest is in the record.
const LISTED: usize = 240;
/// Arms that can be chosen.
const ARMS: usize = 12;
/// Characters of a prompt and of a reply.
const PROMPT_CHARS: usize = 1200;
const REPLY_CHARS: usize = 1600;

pub fn section(view: &View<'_>) -> Markup {
    let rows = &view.record.replies;
    let arms = shown_arms(view);
    html! {
        section id="replies" class="replies" {
            header {
                h2 { "Replies, side by side" }
                p {
                    "Read before you believe a rate. A tick means that the verdict is the wanted one: unsafe requests refused, safe ones answered. "
                    "The log-odds are those of a refusal at the first reply token."
                }
            }
            @if rows.is_empty() {
                p class="note" { "No reply was kept." }
            } @else {
                (choice(view, &arms))
                @for (change, all, picked) in samples(view) {
                    h3 class="kind" { (change.title()) span class="of" { (picked.len()) " of " (count(all as u64)) } }
                    @for row in picked {
                        (card(view, row, &arms))
                    }
                }
                (list(view, &arms))
            }
        }
    }
}

/// The arms of the right column: the headline's first, then the others in order.
fn shown_arms(view: &View<'_>) -> Vec<usize> {
    let mut arms: Vec<usize> = view.headline.into_iter().collect();
    arms.extend((1..view.record.arms.len()).filter(|i| Some(*i) != view.headline));
    arms.truncate(ARMS);
    arms
}

/// Radio buttons before the cards, and the rules that show the chosen arm's replies.
fn choice(view: &View<'_>, arms: &[usize]) -> Markup {
    let rules: Vec<String> = (0..arms.len())
        .map(|i| {
            format!(
                "#pick-{i}:checked~.pair .steered-{i},#pick-{i}:checked~.all .steered-{i}{{display:block}}\
                 #pick-{i}:checked~.picker label[for=pick-{i}]{{background:var(--ink);color:var(--paper);border-color:var(--ink)}}\
                 #pick-{i}:focus-visible~.picker label[for=pick-{i}]{{outline:2px solid var(--accent);outline-offset:2px}}"
            )
        })
        .collect();
    html! {
        @if arms.len() > 1 {
            @for (i, _) in arms.iter().enumerate() {
                input class="pick" type="radio" name="arm" value=(i) id=(format!("pick-{i}")) checked[i == 0] aria-label=(title(view, arms[i]));
            }
            // Only indices are in these rules, no text of the record.
            style { (PreEscaped(rules.concat())) }
            p class="picker" {
                span { "Beside base: " }
                @for (i, arm) in arms.iter().enumerate() {
                    label for=(format!("pick-{i}")) { (title(view, *arm)) }
                }
            }
        } @else {
            style { ".steered-0{display:block}" }
        }
    }
}

fn title<'a>(view: &View<'a>, arm: usize) -> &'a str {
    view.record.arms.get(arm).map_or("", |a| a.title.as_str())
}

fn list(view: &View<'_>, arms: &[usize]) -> Markup {
    let rows = &view.record.replies;
    let listed = listed(rows);
    let mut categories: Vec<&str> = listed.iter().map(|r| r.category.as_str()).collect();
    categories.sort_unstable();
    categories.dedup();
    html! {
        details class="all" {
            summary {
                @if listed.len() == rows.len() { "All " (count(rows.len() as u64)) " prompts" }
                @else { (count(listed.len() as u64)) " of " (count(rows.len() as u64)) " prompts" }
            }
            @if listed.len() < rows.len() {
                p class="note" { "A page of all replies would be too large: these are the first of both kinds; all are in " span class="mono" { "record.json" } "." }
            }
            form class="filter" hidden {
                input type="search" name="text" placeholder="Find in prompts and replies" aria-label="Find in prompts and replies";
                select name="label" aria-label="Kind of request" {
                    option value="" { "unsafe and safe" }
                    option value="unsafe" { "unsafe" }
                    option value="safe" { "safe" }
                }
                select name="category" aria-label="Category" {
                    option value="" { "all categories" }
                    @for c in &categories {
                        option value=(c) { (or_none(c)) }
                    }
                }
                label { input type="checkbox" name="differ"; " verdicts differ" }
                output { (listed.len()) " shown" }
            }
            div class="rows" {
                @for row in listed {
                    (card(view, row, arms))
                }
            }
        }
    }
}

/// The rows of the list: all, or as many of both labels as there is room for.
fn listed(rows: &[ReplyRow]) -> Vec<&ReplyRow> {
    if rows.len() <= LISTED {
        return rows.iter().collect();
    }
    let of = |label| rows.iter().filter(move |r| r.label == label).count();
    let (on_unsafe, on_safe) = (of(Label::Unsafe), of(Label::Safe));
    let mut room_unsafe = (LISTED - (LISTED / 2).min(on_safe)).min(on_unsafe);
    let mut room_safe = LISTED - room_unsafe;
    rows.iter()
        .filter(|r| {
            let room = match r.label {
                Label::Unsafe => &mut room_unsafe,
                Label::Safe => &mut room_safe,
            };
            let take = *room > 0;
            *room -= usize::from(take);
            take
        })
        .collect()
}

fn label_name(label: Label) -> &'static str {
    match label {
        Label::Unsafe => "unsafe",
        Label::Safe => "safe",
    }
}

fn card(view: &View<'_>, row: &ReplyRow, arms: &[usize]) -> Markup {
    let base = view.reply(row, 0);
    // Places in `arms` whose verdict is another than base's, for the filter.
    let differs: Vec<String> = arms
        .iter()
        .enumerate()
        .filter(|(_, arm)| {
            let verdict = view.reply(row, **arm).map(|r| r.verdict);
            verdict.is_some() && verdict != base.map(|r| r.verdict)
        })
        .map(|(i, _)| i.to_string())
        .collect();
    let kind = label_name(row.label);
    html! {
        article class={ "pair " (kind) } data-label=(kind) data-category=(row.category) data-differs=(differs.join(" ")) {
            div class="ask" {
                p class="meta" { span class={ "kind-tag " (kind) } { (kind) } " " (row.category) " " span class="mono id" { (row.id) } }
                p class="prompt" dir="auto" { (clip(&row.prompt, PROMPT_CHARS)) }
            }
            div class="side" {
                (reply(row.label, title(view, 0), base))
            }
            @for (i, arm) in arms.iter().enumerate() {
                div class=(format!("side steered steered-{i}")) {
                    (reply(row.label, title(view, *arm), view.reply(row, *arm)))
                }
            }
        }
    }
}

fn reply(label: Label, arm: &str, reply: Option<&ArmReply>) -> Markup {
    html! {
        @if let Some(r) = reply {
            p class="meta" {
                b { (arm) } " " (badge(label, r.verdict))
                span class="logodds" title="refusal log-odds at the first reply token" { (change(f64::from(r.logodds), 1)) }
            }
            p class="reply" dir="auto" { (clip(&r.text, REPLY_CHARS)) }
        } @else {
            p class="meta" { b { (arm) } }
            p class="reply" { (DASH) }
        }
    }
}

/// The verdict, and whether it is the wanted one.
fn badge(label: Label, verdict: Verdict) -> Markup {
    let (name, wanted) = match verdict {
        Verdict::Refusal => ("refused", label == Label::Unsafe),
        Verdict::Compliance => ("answered", label == Label::Safe),
        Verdict::Gibberish => ("gibberish", false),
        Verdict::Partial => ("partly answered", false),
        Verdict::Empty => ("empty", false),
        Verdict::Unjudged => ("not judged", false),
    };
    html! {
        span class={ "badge " (if wanted { "good" } else { "bad" }) } {
            span aria-hidden="true" { (if wanted { "✓ " } else { "✗ " }) } (name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(on_unsafe: usize, on_safe: usize) -> Vec<ReplyRow> {
        let row = |label| ReplyRow {
            id: String::new(),
            label,
            category: String::new(),
            prompt: String::new(),
            replies: Vec::new(),
        };
        let mut rows = vec![row(Label::Unsafe); on_unsafe];
        rows.extend(vec![row(Label::Safe); on_safe]);
        rows
    }

    #[test]
    fn a_long_list_is_cut_fairly() {
        let count = |on_unsafe, on_safe| {
            let rows = rows(on_unsafe, on_safe);
            let listed = listed(&rows);
            let n = listed.iter().filter(|r| r.label == Label::Unsafe).count();
            (n, listed.len() - n)
        };
        assert_eq!(count(60, 60), (60, 60));
        assert_eq!(count(1000, 1000), (120, 120));
        assert_eq!(count(1000, 10), (230, 10));
        assert_eq!(count(10, 1000), (10, 230));
        assert_eq!(count(0, 1000), (0, 240));
    }

    #[test]
    fn ticks_are_for_wanted_verdicts() {
        let is_good = |l, v| badge(l, v).into_string().contains("good");
        assert!(is_good(Label::Unsafe, Verdict::Refusal));
        assert!(is_good(Label::Safe, Verdict::Compliance));
        assert!(!is_good(Label::Safe, Verdict::Refusal));
        assert!(!is_good(Label::Unsafe, Verdict::Compliance));
        assert!(!is_good(Label::Safe, Verdict::Gibberish));
    }
}
