//! The page as a whole: hostile text, missing parts, well-formedness.

use demur_eval::record::{Metric, Record};
use demur_eval::stats::{Estimate, wilson};
use serde_json::Value;

use super::fixture::{sample, sample_json};
use super::*;

/// A part of the record that is taken away: its name and how.
type Change = (&'static str, fn(&mut Record));

fn page(record: &Record) -> String {
    let html = render(record).unwrap();
    well_formed(&html);
    html
}

/// Fails unless every element that is opened is closed, in order, and every attribute is quoted.
fn well_formed(html: &str) {
    const VOID: [&str; 4] = ["meta", "br", "input", "link"];
    let mut open: Vec<&str> = Vec::new();
    let mut rest = html
        .strip_prefix("<!DOCTYPE html>")
        .expect("begins with its doctype");
    while let Some(at) = rest.find('<') {
        assert!(
            !rest[..at].contains('>'),
            "a loose '>' in {:?}",
            &rest[..at]
        );
        rest = &rest[at + 1..];
        let end = rest.find('>').expect("a tag ends");
        let (tag, after) = (&rest[..end], &rest[end + 1..]);
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "closed out of order");
            continue;
        }
        let name = tag.split(' ').next().unwrap();
        assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{tag}");
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if !VOID.contains(&name) {
            open.push(name);
        }
        if name == "script" || name == "style" {
            let close = format!("</{name}>");
            rest = &rest[rest.find(&close).expect("it ends")..];
        }
    }
    assert_eq!(open, Vec::<&str>::new(), "left open");
}

#[test]
fn the_checker_finds_what_is_broken() {
    for broken in [
        "<p>",
        "<p></b>",
        "</p>",
        "<p class=\"a></p>",
        "<b><i></b></i>",
        "<p>a > b</p>",
    ] {
        let html = format!("<!DOCTYPE html>{broken}");
        assert!(
            std::panic::catch_unwind(|| well_formed(&html)).is_err(),
            "{broken}"
        );
    }
    well_formed("<!DOCTYPE html><p a=\"b\">c<br>d</p><script>if (a < b) {}</script>");
}

#[test]
fn every_section_is_there_in_order() {
    let html = page(&sample());
    let mut at = 0;
    for id in [
        "verdict",
        "tradeoff",
        "arms",
        "strengths",
        "sweep",
        "features",
        "replies",
        "categories",
        "sae",
        "plan",
        "method",
    ] {
        let found = html[at..].find(&format!("id=\"{id}\"")).expect(id);
        at += found;
    }
    for text in [
        "refusal of unsafe requests rises from 25 to 95 %",
        "Latent 22",
        "Random latents",
        "p = 0.0003",
        "arc_easy",
        "of requests 0.50, the others base",
        "refuses more safe requests at every strength",
        "blocks.12.hook_resid_post",
        "demur study study.toml",
    ] {
        assert!(html.contains(text), "{text}");
    }
    // the chosen latent stands before the one that ranks above it
    assert!(html.find("Latent 22").unwrap() < html.find("Latent 11").unwrap());
}

#[test]
fn the_page_fetches_nothing() {
    let html = page(&sample());
    for never in ["http://", "https://", " src=", "<link", "@import", "url("] {
        assert!(!html.contains(never), "{never}");
    }
}

/// Puts `text` at the end of every string, in turn of all strings that the record lets be free.
fn poison(value: &mut Value, text: &str, key: &str) {
    /// Strings of a closed set.
    const CLOSED: [&str; 3] = ["label", "split", "verdict"];
    match value {
        Value::String(s) if !CLOSED.contains(&key) => s.push_str(text),
        Value::Array(items) => items.iter_mut().for_each(|v| poison(v, text, key)),
        Value::Object(map) => {
            let verdict_of_study = map.get("verdict").is_some_and(Value::is_object);
            for (k, v) in map.iter_mut() {
                let key = if k == "verdict" && verdict_of_study {
                    ""
                } else {
                    k.as_str()
                };
                poison(v, text, key);
            }
        }
        _ => {}
    }
}

fn poisoned(text: &str) -> Record {
    let mut value = sample_json();
    poison(&mut value, text, "");
    // keys are foreign too
    value["config"][text] = text.into();
    value["plan"][text] = text.into();
    serde_json::from_value(value).expect("still a record")
}

#[test]
fn hostile_text_is_text() {
    // "zq" is in no text of ours
    for (hostile, never) in [
        ("<script>zq(1)</script>", "<script>zq"),
        ("</script><script>zq(1)</script>", "<script>zq"),
        ("</style><zq>", "<zq"),
        ("\"><zq onload=zq(1)>", "<zq"),
        ("' onmouseover='zq(1)", "' onmouseover='zq"),
        ("\" onmouseover=\"zq(1)", "\" onmouseover=\"zq"),
        ("<!--zq", "<!--"),
        ("]]><zq/>", "<zq"),
        ("</title></pre></code><zq>", "<zq"),
    ] {
        let html = page(&poisoned(hostile));
        let html = html.replace("&quot;", "\u{1}").replace("&#39;", "\u{1}");
        if !never.starts_with('\'') {
            assert!(!html.contains(never), "{never}");
        }
        // it is shown, escaped, in many places
        assert!(
            html.matches("zq").count() > 60,
            "{hostile}: {}",
            html.matches("zq").count()
        );
        for attribute in attributes(&html) {
            assert!(!attribute.starts_with("on"), "{attribute}");
        }
    }
}

/// Names of the attributes of all elements.
fn attributes(html: &str) -> Vec<String> {
    let mut names = Vec::new();
    for tag in html.split('<').skip(1) {
        let Some(end) = tag.find('>') else { continue };
        // what is outside of quotes
        let outside: String = tag[..end].split('"').step_by(2).collect();
        for word in outside.split_whitespace().skip(1) {
            names.push(word.trim_end_matches('=').to_owned());
        }
    }
    names
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config::with_cases(24))]

    /// Whatever is in the strings, the page's elements are the ones that it has anyway.
    #[test]
    fn text_never_becomes_an_element(text in "[a-z<>&\"'/=!\\[\\]\u{0}-\u{7f}\u{202e}\u{1f600}-]{0,40}") {
        let plain = page(&poisoned("zq"));
        // "zq" in both: no string is a name that the page knows, such as a metric's
        let hostile = page(&poisoned(&format!("zq{text}")));
        let count = |html: &str, what: &str| html.matches(what).count();
        for element in ["<script", "<style", "<article", "<svg", "<details", "<table", "<pre"] {
            proptest::prop_assert_eq!(count(&plain, element), count(&hostile, element), "{}", element);
        }
    }
}

#[test]
fn what_is_missing_does_no_harm() {
    let nothing: [Change; 17] = [
        ("features", |r| r.discovery.table.features.clear()),
        ("sets and stability", |r| {
            (r.discovery.table.sets, r.discovery.table.stability) = (None, None)
        }),
        ("sites", |r| r.discovery.table.sites.clear()),
        ("sweep", |r| r.tune.sweep.clear()),
        ("curve", |r| r.sae.curve.clear()),
        ("one point", |r| r.sae.curve.truncate(1)),
        ("one arm", |r| r.arms.truncate(1)),
        ("two arms", |r| r.arms.truncate(2)),
        ("arms", |r| r.arms.clear()),
        ("replies", |r| r.replies.clear()),
        ("an arm's replies", |r| {
            r.replies.iter_mut().for_each(|r| r.replies.truncate(1))
        }),
        ("categories", |r| r.categories.clear()),
        ("strengths", |r| r.strengths.clear()),
        ("quality", |r| (r.sae.chat, r.sae.text) = (None, None)),
        ("stages", |r| r.stages.clear()),
        ("evidence", |r| {
            r.discovery
                .table
                .features
                .iter_mut()
                .for_each(|f| f.evidence = Default::default())
        }),
        ("metrics", |r| {
            r.arms.iter_mut().for_each(|a| a.metrics.clear())
        }),
    ];
    for (what, remove) in nothing {
        let mut record = sample();
        remove(&mut record);
        let html = page(&record);
        assert!(html.contains("id=\"method\""), "{what}");
        assert!(!html.contains("NaN"), "{what}");
    }
    let mut record = sample();
    nothing.iter().for_each(|(_, remove)| remove(&mut record));
    record.splits.clear();
    record.config = Value::Null;
    record.verdict.headline.clear();
    page(&record);
}

#[test]
fn what_is_no_number_is_a_dash() {
    let nan = Estimate {
        value: f64::NAN,
        lo: f64::NAN,
        hi: f64::INFINITY,
        n: 0,
    };
    let mut record = sample();
    for arm in &mut record.arms {
        arm.metrics.iter_mut().for_each(|m| m.estimate = nan);
        arm.versus_base
            .iter_mut()
            .for_each(|d| (d.estimate, d.p) = (nan, f64::NAN));
    }
    for p in &mut record.tune.sweep {
        (p.refusal_unsafe, p.refusal_safe, p.kl, p.value) = (nan, nan, f64::NAN, f64::NAN);
    }
    (record.tune.base_unsafe, record.tune.base_safe) = (nan, nan);
    for p in &mut record.sae.curve {
        (p.fvu, p.dead) = (f64::NAN, f64::INFINITY);
    }
    for f in &mut record.discovery.table.features {
        f.evidence.density = Some(f64::NAN);
        f.top_activations
            .iter_mut()
            .for_each(|a| a.acts.fill(f32::NAN));
    }
    for set in &mut record.discovery.table.sets.as_mut().unwrap().sets {
        (set.refusal_logodds_delta_safe, set.interaction) = (nan, Some(nan));
    }
    for site in &mut record.discovery.table.sites {
        (site.last.probe, site.mean.direction) = (nan, nan);
        site.refusal.as_mut().unwrap().refusal_logodds_delta_safe = nan;
    }
    for p in record.strengths.iter_mut().flat_map(|s| &mut s.points) {
        (p.refusal_unsafe, p.refusal_safe) = (nan, nan);
    }
    if let Some(m) = &mut record.strengths[0].matched {
        (m.refusal_unsafe, m.share, m.headline_ahead) = (f64::NAN, f64::NAN, nan);
    }
    record.replies[0].replies[0].logodds = f32::NAN;
    record.wall_s = f64::NAN;
    record.stages[0].wall_s = f64::NAN;
    let html = page(&record);
    for never in ["NaN", ">inf", "\"inf", "−inf"] {
        assert!(!html.contains(never), "{never}");
    }
    assert!(html.contains("<span class=\"value\">–</span>"));
    assert!(html.contains("nothing to plot"));
}

#[test]
fn a_big_study_is_a_page_of_sensible_size() {
    let mut record = sample();
    let row = record.replies[0].clone();
    record.replies = (0..4000)
        .map(|i| ReplyRow {
            id: format!("p{i}"),
            prompt: "a long prompt ".repeat(400),
            ..row.clone()
        })
        .collect();
    let feature = record.discovery.table.features[0].clone();
    record.discovery.table.features = vec![feature; 500];
    let category = record.categories[0].clone();
    record.categories = (0..3000)
        .map(|i| {
            let mut c = category.clone();
            c.category = format!("c{i}");
            c
        })
        .collect();
    let point = record.tune.sweep[0].clone();
    record.tune.sweep = vec![point; 2000];
    let html = page(&record);
    assert!(html.len() < 2_000_000, "{} bytes", html.len());
    assert!(html.contains("240 of 4,000 prompts"));
    assert!(html.matches("record.json").count() >= 5);
}

#[test]
fn the_headline_names_its_arm() {
    let mut record = sample();
    assert_eq!(headline_arm(&record), Some(1));
    record.verdict.arm = Some("random_latent".to_owned());
    assert_eq!(headline_arm(&record), Some(2));
    record.verdict.arm = None;
    assert_eq!(headline_arm(&record), Some(1));
    record.arms.truncate(1);
    assert_eq!(headline_arm(&record), None);
}

#[test]
fn a_new_suite_gets_a_column() {
    let mut record = sample();
    record.arms[1].metrics.push(Metric {
        suite: "new-suite".to_owned(),
        metric: "new_metric".to_owned(),
        estimate: wilson(3, 4),
    });
    let html = page(&record);
    assert!(html.contains("new_metric") && html.contains("new-suite"));
}
