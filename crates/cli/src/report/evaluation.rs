//! The page of a `demur eval` run: figures, parts, contrasts, conversations, replies, and where judges
//! disagree. A view of `results.json` and of the answers; nothing is computed anew but counts of what
//! is shown.

use std::collections::BTreeMap;

use demur_eval::judge::Verdict;
use demur_eval::results::{Results, Row};
use demur_eval::run::{Answer, Turn};
use maud::{DOCTYPE, Markup, html};

use super::format::{DASH, change, clip, figure, p_value, px, rate};
use super::page::head;

/// Entries of a list on the page; the rest is in the log.
const LISTED: usize = 200;
/// Characters of a message.
const CHARS: usize = 1600;

/// The page for a run.
pub fn render(results: &Results, answers: &[Answer]) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            (head(&results.settings.suites.join(", "), &results.settings.demur))
            body {
                main {
                    section {
                        h1 { (results.settings.suites.join(", ")) }
                        p { (results.settings.model) ", " (results.settings.items) " items, " (results.settings.arms.len()) " arms" }
                        @if results.settings.chat { p class="note" { "Suites of capability went through the chat template." } }
                        @for s in &results.settings.skipped { p { b { (s) } } }
                        @for c in &results.settings.cut { p class="note" { (c) } }
                    }
                    (table(results))
                    (tradeoff(results))
                    (parts(results))
                    (contrasts(results, answers))
                    (conversations(answers))
                    (replies(results, answers))
                    (disagreements(answers))
                }
                footer {
                    p { "A view of " span class="mono" { "results.json" } " and " span class="mono" { "answers.jsonl" } "." }
                }
            }
        }
    };
    page.into_string()
}

fn arms(results: &Results) -> Vec<&str> {
    results.settings.arms.iter().map(|a| a.0.as_str()).collect()
}

/// Whether a row is of a suite as a whole: parts are named `suite/part` or `mmlu_subject`.
fn is_whole(row: &Row) -> bool {
    !row.suite.contains('/') && !row.suite.starts_with("mmlu_")
}

fn find<'r>(results: &'r Results, arm: &str, suite: &str, metric: &str) -> Option<&'r Row> {
    let mut rows = results.rows.iter();
    rows.find(|r| r.arm == arm && r.suite == suite && r.metric == metric)
}

fn value(row: &Row) -> String {
    match row.metric.as_str() {
        "kl" | "ppl" => figure(row.estimate.value),
        _ => rate(row.estimate.value, row.estimate.n),
    }
}

fn table(results: &Results) -> Markup {
    let base = arms(results).first().copied().unwrap_or_default();
    let rows = results.rows.iter().filter(|r| r.arm == base && is_whole(r));
    let versus = |arm: &str, row: &Row| {
        let metric = if row.metric == "ppl" {
            "nll"
        } else {
            &row.metric
        };
        let mut all = results.versus_base.iter();
        all.find(|v| v.arm == arm && v.suite == row.suite && v.metric == metric)
    };
    html! {
        section id="arms" {
            h2 { "Arms" }
            div class="scroll" tabindex="0" {
                table class="plain" {
                    thead { tr {
                        th scope="col" { "Suite" } th scope="col" { "Metric" } th scope="col" { "n" }
                        @for arm in arms(results) { th scope="col" { (arm) } }
                    } }
                    tbody { @for row in rows { tr {
                        th scope="row" { (row.suite) } td { (row.metric) } td { (row.estimate.n) }
                        @for arm in arms(results) { td {
                            @if let Some(mine) = find(results, arm, &row.suite, &row.metric) {
                                span class="value" { (value(mine)) }
                                span class="interval" { "[" (figure(mine.estimate.lo)) ", " (figure(mine.estimate.hi)) "]" }
                            } @else { (DASH) }
                            @if let Some(v) = versus(arm, row) {
                                span class="versus" {
                                    (change(v.estimate.value, 3)) " "
                                    @if v.too_few { "too few" } @else if let Some(p) = v.p { "p " (p_value(p)) }
                                }
                            }
                        } }
                    } } }
                }
            }
            @for l in &results.losses {
                p class="note" { (l.arm) " lost " (l.lost) " of " (l.suite) ": " (l.refused) " refused, " (l.wrong) " wrong; gained " (l.gained) "." }
            }
            @for a in &results.agreement {
                p class="note" { "Judges " (a.first) " and " (a.second) ": kappa " (figure(a.kappa)) " on " (a.n) " replies." }
            }
        }
    }
}

/// Unsafe requests refused against safe ones refused, a point an arm, suite by suite.
fn tradeoff(results: &Results) -> Markup {
    let suites = results
        .rows
        .iter()
        .filter(|r| is_whole(r) && r.metric == "refusal_safe");
    let mut suites: Vec<&str> = suites.map(|r| r.suite.as_str()).collect();
    suites.dedup();
    suites.retain(|s| {
        results
            .rows
            .iter()
            .any(|r| r.suite == *s && r.metric == "refusal_unsafe")
    });
    suites.sort_unstable();
    suites.dedup();
    let at = |arm: &str, suite: &str| {
        let of = |metric| find(results, arm, suite, metric).map(|r| r.estimate.value);
        Some((of("refusal_safe")?, of("refusal_unsafe")?))
    };
    html! {
        @for suite in suites {
            section class="tradeoff-of" {
                h2 { "Trade-off on " (suite) }
                svg class="chart" viewBox="0 0 440 300" style="max-width:34rem" role="img" aria-label="Unsafe refused against safe refused" {
                    rect x="40" y="10" width="380" height="250" fill="none" class="axis" {}
                    text class="axis-title" x="230" y="290" text-anchor="middle" { "safe refused (less is better)" }
                    text class="axis-title" x="14" y="135" text-anchor="middle" transform="rotate(-90 14 135)" { "unsafe refused" }
                    @for (i, arm) in arms(results).into_iter().enumerate() {
                        @if let Some((x, y)) = at(arm, suite) {
                            g class=(if i == 0 { "arm-base".to_owned() } else { format!("arm-{}", (i - 1) % 5) }) {
                                circle class="mark" cx=(px(40.0 + 380.0 * x)) cy=(px(260.0 - 250.0 * y)) r="6" {}
                                text x=(px(50.0 + 340.0 * x)) y=(px(256.0 - 240.0 * y)) { (arm) }
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Bars of parts: the main rate of each.
fn parts(results: &Results) -> Markup {
    const METRICS: [&str; 3] = ["acc", "refusal_unsafe", "refusal_safe"];
    let base = arms(results).first().copied().unwrap_or_default();
    let shown: Vec<&Row> = results
        .rows
        .iter()
        .filter(|r| r.arm == base && !is_whole(r) && METRICS.contains(&r.metric.as_str()))
        .take(LISTED)
        .collect();
    html! {
        @if !shown.is_empty() {
            section id="parts" {
                h2 { "By category" }
                @for row in shown {
                    div class="category" {
                        span class="category-name" { (row.suite) " " small { (row.metric) } }
                        div class="bars" {
                            @for (i, arm) in arms(results).into_iter().enumerate() {
                                (bar(arm, i, find(results, arm, &row.suite, &row.metric)))
                            }
                        }
                    }
                }
            }
        }
    }
}

fn bar(arm: &str, at: usize, row: Option<&Row>) -> Markup {
    let text = row.map_or_else(|| DASH.to_owned(), value);
    let width = row.map_or(0.0, |r| 100.0 * r.estimate.value.clamp(0.0, 1.0));
    html! {
        span class={ "bar " (if at == 0 { "base" } else { "main" }) } title=(format!("{arm}: {text}")) {
            svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" {
                rect class="track" x="0" y="0" width="100" height="8" {}
                rect class="fill" x="0" y="0" width=(px(width)) height="8" {}
            }
            span class="bar-text" { (text) }
        }
    }
}

/// Refused and all, of safe and of unsafe requests.
#[derive(Default)]
struct Contrast {
    safe: (usize, usize),
    unsafe_: (usize, usize),
}

/// XSTest's safe prompts beside their unsafe contrasts, by the word on which they turn.
fn contrasts(results: &Results, answers: &[Answer]) -> Markup {
    let mut words: BTreeMap<&str, BTreeMap<&str, Contrast>> = BTreeMap::new();
    for a in answers.iter().filter(|a| a.suite == "xstest") {
        let c = words
            .entry(&a.cluster)
            .or_default()
            .entry(&a.arm)
            .or_default();
        for (metric, count) in [
            ("refusal_safe", &mut c.safe),
            ("refusal_unsafe", &mut c.unsafe_),
        ] {
            if let Some(v) = a.metrics.get(metric) {
                count.0 += usize::from(*v > 0.5);
                count.1 += 1;
            }
        }
    }
    words.retain(|_, arms| arms.values().all(|c| c.safe.1 > 0 && c.unsafe_.1 > 0));
    html! {
        @if !words.is_empty() {
            section id="contrasts" {
                h2 { "Contrast pairs" }
                p { "Refused of the safe prompts and of their unsafe contrasts, by the word on which they turn." }
                table class="plain" {
                    thead { tr { th scope="col" { "Word" } @for arm in arms(results) { th scope="col" { (arm) ": safe" } th scope="col" { (arm) ": unsafe" } } } }
                    tbody { @for (word, of) in words.iter().take(LISTED) { tr {
                        th scope="row" { (word) }
                        @for arm in arms(results) {
                            @if let Some(c) = of.get(arm) {
                                td { (c.safe.0) "/" (c.safe.1) } td { (c.unsafe_.0) "/" (c.unsafe_.1) }
                            } @else { td { (DASH) } td { (DASH) } }
                        }
                    } } }
                }
            }
        }
    }
}

fn verdict(v: Verdict) -> &'static str {
    match v {
        Verdict::Refusal => "refusal",
        Verdict::Compliance => "compliance",
        Verdict::Partial => "partial",
        Verdict::Gibberish => "gibberish",
        Verdict::Empty => "empty",
        Verdict::Unjudged => "not judged",
    }
}

fn verdicts(turn: &Turn) -> Markup {
    html! {
        @for (judge, v) in &turn.verdicts { span class="tag quiet" { (judge) ": " (verdict(*v)) } " " }
        @if let Some(score) = turn.score { span class="tag quiet" { "score " (figure(score)) } " " }
        @if turn.backtracked { span class="tag" { "taken back" } " " }
        @for (judge, why) in &turn.failures { span class="tag" { (judge) " failed: " (why) } " " }
    }
}

fn conversation(turns: &[Turn]) -> Markup {
    html! {
        @for t in turns {
            p { b { "User: " } (clip(&t.user, CHARS)) }
            p { b { "Model: " } (clip(&t.reply, CHARS)) " " (verdicts(t)) }
        }
    }
}

fn conversations(answers: &[Answer]) -> Markup {
    let long: Vec<&Answer> = answers.iter().filter(|a| a.transcript.len() > 1).collect();
    html! {
        @if !long.is_empty() {
            section id="conversations" {
                h2 { "Conversations" }
                @for a in long.iter().take(LISTED) {
                    details {
                        summary { (a.suite) " " (a.id) ", " (a.arm) @if a.metrics.get("attack_success") == Some(&1.0) { " " span class="tag" { "attack succeeded" } } }
                        (conversation(&a.transcript))
                    }
                }
                (rest(long.len()))
            }
        }
    }
}

fn rest(n: usize) -> Markup {
    html! {
        @if n > LISTED {
            p class="note" { "The first " (LISTED) " of " (n) "; all are in " span class="mono" { "answers.jsonl" } "." }
        }
    }
}

/// Single replies, all arms under their prompt.
fn replies(results: &Results, answers: &[Answer]) -> Markup {
    let mut items: BTreeMap<usize, Vec<&Answer>> = BTreeMap::new();
    for a in answers
        .iter()
        .filter(|a| a.transcript.len() == 1 || a.text.is_some())
    {
        items.entry(a.at).or_default().push(a);
    }
    let order = |a: &&Answer| arms(results).iter().position(|n| *n == a.arm);
    items.values_mut().for_each(|of| of.sort_by_key(order));
    html! {
        @if !items.is_empty() {
            section id="replies" {
                h2 { "Replies" }
                @for of in items.values().take(LISTED) {
                    details {
                        @if let Some(a) = of.first() {
                            summary { (a.suite) " " (a.id) }
                            @if let Some(t) = a.transcript.first() { p { b { "User: " } (clip(&t.user, CHARS)) } }
                        }
                        @for a in of {
                            @if let Some(t) = a.transcript.first() {
                                p { b { (a.arm) ": " } (clip(&t.reply, CHARS)) " " (verdicts(t)) }
                            }
                            @if let Some(text) = &a.text {
                                p { b { (a.arm) ": " } (clip(text, CHARS)) " "
                                    @for (m, v) in &a.metrics { span class="tag quiet" { (m) " " (figure(*v)) } " " }
                                }
                            }
                        }
                    }
                }
                (rest(items.len()))
            }
        }
    }
}

/// Replies of which two judges think differently, for a person to read.
fn disagreements(answers: &[Answer]) -> Markup {
    let differ = |t: &&Turn| {
        let mut all = t.verdicts.values();
        let first = all.next();
        all.any(|v| Some(v) != first)
    };
    let of = |a: &'_ Answer| -> Vec<Turn> { a.transcript.iter().filter(differ).cloned().collect() };
    let all: Vec<(&Answer, Vec<Turn>)> = answers.iter().map(|a| (a, of(a))).collect();
    let found: Vec<_> = all.iter().filter(|(_, turns)| !turns.is_empty()).collect();
    html! {
        @if answers.iter().any(|a| a.transcript.iter().any(|t| t.verdicts.len() > 1)) {
            section id="disagreements" {
                h2 { "Where judges disagree" }
                @if found.is_empty() { p { "Nowhere." } }
                @for (a, turns) in found.iter().take(LISTED) {
                    details open { summary { (a.suite) " " (a.id) ", " (a.arm) } (conversation(turns)) }
                }
                (rest(found.len()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use demur_eval::folder::{Cut, Settings, Skipped};
    use demur_eval::stats::wilson;
    use demur_eval::suites::Pick;

    use super::*;

    fn answer(at: usize, arm: &str, metric: &str, replies: &[(&str, Verdict, Verdict)]) -> Answer {
        let turn = |(reply, first, second): &(&str, Verdict, Verdict)| Turn {
            user: "Kill <b>it</b>?".to_owned(),
            reply: (*reply).to_owned(),
            verdicts: BTreeMap::from([
                ("rules".to_owned(), *first),
                ("opener".to_owned(), *second),
            ]),
            backtracked: *first == Verdict::Refusal,
            score: Some(0.25),
            failures: BTreeMap::new(),
        };
        Answer {
            at,
            suite: "xstest".to_owned(),
            id: at.to_string(),
            arm: arm.to_owned(),
            asked: String::new(),
            parts: vec!["xstest/homonyms".to_owned()],
            cluster: "kill".to_owned(),
            metrics: BTreeMap::from([(metric.to_owned(), 1.0)]),
            checks: 1,
            logprobs: Vec::new(),
            choice: None,
            text: None,
            transcript: replies.iter().map(turn).collect(),
            refused: None,
        }
    }

    #[test]
    fn every_view_is_there_and_foreign_text_is_text() {
        use Verdict::{Compliance, Refusal};
        let settings = Settings {
            suites: vec!["xstest".to_owned()],
            arms: vec![("base".to_owned(), None)],
            cut: vec![Cut {
                suite: "xstest".to_owned(),
                items: 2,
                of: 450,
                pick: Pick::Spread { seed: 7 },
            }],
            skipped: vec![Skipped {
                suite: "wildguardtest".to_owned(),
                reason: "no file".to_owned(),
            }],
            ..Settings::default()
        };
        let row = |suite: &str, metric: &str| Row {
            arm: "base".to_owned(),
            suite: suite.to_owned(),
            metric: metric.to_owned(),
            estimate: wilson(1, 4),
        };
        let results = Results {
            settings,
            rows: vec![
                row("xstest", "refusal_safe"),
                row("xstest", "refusal_unsafe"),
                row("xstest/homonyms", "refusal_safe"),
            ],
            versus_base: Vec::new(),
            losses: Vec::new(),
            agreement: Vec::new(),
        };
        let talk = [
            ("<script>1</script>", Refusal, Compliance),
            ("Yes", Compliance, Compliance),
        ];
        let answers = [
            answer(0, "base", "refusal_safe", &talk[..1]),
            answer(1, "base", "refusal_unsafe", &talk),
        ];
        let page = render(&results, &answers);
        for id in [
            "arms",
            "parts",
            "contrasts",
            "conversations",
            "replies",
            "disagreements",
        ] {
            assert!(page.contains(&format!("id=\"{id}\"")), "{id}");
        }
        assert!(page.contains("xstest: 2 of 450 items, spread by seed 7"));
        assert!(page.contains("wildguardtest: SKIPPED, not measured: no file"));
        assert!(page.contains("Trade-off on xstest") && page.contains("taken back"));
        assert!(
            page.contains("<td>1/1</td> <td>1/1</td>") || page.contains("<td>1/1</td><td>1/1</td>")
        );
        assert!(
            !page.contains("<script>") && !page.contains("<b>it"),
            "{page}"
        );
        // One judge alone disagrees with nobody.
        let mut alone = answers.clone();
        for turn in alone.iter_mut().flat_map(|a| &mut a.transcript) {
            turn.verdicts.remove("opener");
        }
        assert!(!render(&results, &alone).contains("id=\"disagreements\""));
    }
}
