//! `demur study` from end to end.

use std::fs;

use crate::support::{Place, states};

const ARMS: [&str; 7] = [
    "base",
    "sae_passthrough",
    "clamp",
    "clamp_error_dropped",
    "random_latent",
    "difference_of_means",
    "system_prompt",
];

#[test]
fn a_study_leaves_what_it_promises() {
    let place = Place::new();
    let ended = place
        .run(["study", "tiny.toml", "--runs", "runs", "--json"])
        .succeeded();
    let run = place.path("runs/tiny");
    for stage in ["pull", "harvest", "train", "discover", "tune", "evaluate"] {
        let text = fs::read(run.join(format!("{stage}.json"))).unwrap();
        let stage: serde_json::Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(stage["inputs_sha256"].as_str().unwrap().len(), 64);
    }
    for file in ["report.html", "plan.toml", "train/sae/manifest.json"] {
        assert!(fs::metadata(run.join(file)).unwrap().len() > 0, "{file}");
    }
    // The SAE is whole: without what training needed to go on.
    assert!(states(&run.join("train")).is_empty());

    let json = ended.json();
    assert_eq!(json["study"], "tiny");
    assert!(json["model"].as_str().unwrap().ends_with("model.gguf"));
    assert!(json["wall_s"].as_f64().unwrap() > 0.0);
    let rows = json["rows"].as_array().unwrap();
    for arm in ARMS {
        let of = |metric: &str| {
            let row = rows
                .iter()
                .find(|r| r["arm"] == arm && r["metric"] == metric);
            row.unwrap_or_else(|| panic!("{arm} has no {metric}"))
        };
        for metric in ["refusal_unsafe", "refusal_safe", "gibberish"] {
            let row = of(metric);
            let number = |key: &str| row[key].as_f64().unwrap();
            assert!(
                0.0 <= number("lo") && number("lo") <= number("value"),
                "{row}"
            );
            assert!(
                number("value") <= number("hi") && number("hi") <= 1.0,
                "{row}"
            );
            let n = if metric == "gibberish" { 8 } else { 4 };
            assert_eq!(
                (row["suite"].as_str(), row["n"].as_u64()),
                (Some("prompts"), Some(n))
            );
        }
        // A system prompt does not reach plain text.
        if arm != "system_prompt" {
            assert!(of("kl")["value"].as_f64().unwrap() >= 0.0);
            assert!(of("ppl")["value"].as_f64().unwrap() >= 1.0);
        }
    }
    let record = place.record("runs");
    // The figure of all rows lies in the interval over sequences.
    for (suite, metric) in [
        ("chat", "fvu"),
        ("chat", "l0"),
        ("text", "fvu"),
        ("text", "l0"),
    ] {
        let row = rows
            .iter()
            .find(|r| r["suite"] == suite && r["metric"] == metric)
            .unwrap_or_else(|| panic!("there is no {metric} on {suite}"));
        let number = |key: &str| row[key].as_f64().unwrap();
        let kept = &record["sae"][suite][metric];
        assert_eq!(row["value"], kept["value"]);
        assert!(
            number("lo") <= number("value") && number("value") <= number("hi"),
            "{row}"
        );
    }
    let names: Vec<_> = record["arms"]
        .as_array()
        .unwrap()
        .iter()
        .map(|a| &a["arm"])
        .collect();
    assert_eq!(names, ARMS);
    let replies = record["replies"].as_array().unwrap();
    assert_eq!(replies.len(), 8);
    assert!(
        replies
            .iter()
            .all(|r| r["replies"].as_array().unwrap().len() == ARMS.len())
    );
}

/// A model that refuses nothing: what refusals look like was written, and arms are curves.
#[test]
fn refusals_are_written_and_arms_have_strengths() {
    let place = Place::new();
    let args = ["study", "tiny.toml", "--runs", "runs"];
    let sets = [
        "corpus.written_refusals=1",
        "prompts.judge=\"rules\"",
        "discovery.methods=[\"written_refusals\"]",
        "discovery.resamples=5",
        "evaluate.arms=[\"base\", \"clamp\", \"difference_of_means\", \"system_prompt\"]",
        "evaluate.strengths=[-0.5, 2.0]",
    ];
    let sets = sets.map(|s| ["--set", s]).concat();
    let ended = place.run([&args[..], &sets].concat()).succeeded();
    assert!(!ended.stderr.contains("does nothing"), "{}", ended.stderr);
    let record = place.record("runs");
    let contrast = &record["discovery"]["features"][0]["evidence"]["written_refusals"];
    assert_eq!(contrast["paired"], true, "{contrast}");
    let sweep = record["tune"]["sweep"].as_array().unwrap();
    let written = |p: &&serde_json::Value| p["unit"] == "x written";
    // Two sizes at two values, of the ranking and of what refusals are made of.
    assert_eq!(
        (sweep.len(), sweep.iter().filter(written).count()),
        (8, 4),
        "{sweep:?}"
    );
    let strengths = record["strengths"].as_array().unwrap();
    // The arm of the headline is what the others stand beside.
    let mut others = vec!["clamp", "difference_of_means"];
    others.retain(|arm| record["verdict"]["arm"] != *arm);
    let arms = strengths.iter().map(|s| s["arm"].as_str().unwrap());
    let arms: Vec<_> = arms.collect();
    assert_eq!((arms, others.len()), (others.clone(), 1));
    for arm in strengths {
        let points = arm["points"].as_array().unwrap();
        let of: Vec<_> = points.iter().map(|p| p["strength"].as_f64()).collect();
        assert_eq!(of, [Some(-0.5), Some(1.0), Some(2.0)]);
        assert!(points.iter().all(|p| p["refusal_safe"]["n"] == 4));
    }
    // Of prompts there is a reply an arm, not one a strength.
    let replies = record["replies"][0]["replies"].as_array().unwrap();
    assert_eq!(replies.len(), 4);
    let page = fs::read_to_string(place.path("runs/tiny/report.html")).unwrap();
    assert!(page.contains("At the same over-refusal"));
    for bad in ["[1.0]", "[0.0]", "[2.0, 2.0]"] {
        let set = format!("evaluate.strengths={bad}");
        place
            .run([&args[..], &["--set", &set]].concat())
            .refused(2, &["evaluate.strengths"]);
    }
}

#[test]
fn stages_are_reused_and_redone() {
    let place = Place::new();
    let first = place.study("runs");
    let run = |more: &[&str]| {
        let args = ["study", "tiny.toml", "--runs", "runs"];
        let ended = place.run(args.iter().chain(more)).succeeded();
        let again: Vec<String> = ended
            .stderr
            .lines()
            .filter_map(|l| l.strip_suffix("done before").map(|l| l.trim().to_owned()))
            .collect();
        again
    };
    let all = ["pull", "harvest", "train", "discover", "tune", "evaluate"];
    assert_eq!(run(&[]), all);
    assert_eq!(run(&["--from", "tune"]), all[..4]);
    assert_eq!(place.record("runs"), first, "the same numbers come again");
    assert_eq!(run(&["--from", "report"]), all);
    assert_eq!(run(&["--set", "evaluate.max_new_tokens=5"]), all[..5]);
    // A file's content is an input as its name is.
    let prompts = fs::read_to_string(place.path("prompts.jsonl")).unwrap();
    fs::write(
        place.path("prompts.jsonl"),
        prompts.replace("lamp", "lantern"),
    )
    .unwrap();
    assert_eq!(run(&[]), all[..1]);
    assert_ne!(place.record("runs"), first);
}

/// One passage has a mean and no interval: the record can be read all the same.
#[test]
fn a_figure_without_an_interval() {
    let place = Place::new();
    let args = ["study", "tiny.toml", "--runs", "runs"];
    let one = ["--set", "evaluate.passages=1", "--json"];
    let json = place.run([&args[..], &one].concat()).succeeded().json();
    let rows = json["rows"].as_array().unwrap();
    let kl = rows.iter().find(|r| r["metric"] == "kl").unwrap();
    assert!(kl["value"].is_number() && kl["lo"].is_null(), "{kl}");
    place.run(["report", "runs/tiny"]).succeeded();
}

#[test]
fn a_dry_run_writes_nothing() {
    let place = Place::new();
    let ended = place.run(["study", "tiny.toml", "--dry-run"]).succeeded();
    assert!(ended.stdout.contains("sae_passthrough"), "{ended:?}");
    let json = place
        .run([
            "study",
            "tiny.toml",
            "--dry-run",
            "--json",
            "--set",
            "seed=9",
        ])
        .succeeded()
        .json();
    assert_eq!(json["study"]["seed"], 9);
    let mut left: Vec<_> = fs::read_dir(place.path(""))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["prompts.jsonl", "tiny.toml"]);
}

#[test]
fn what_the_command_line_gets_wrong_is_named() {
    let place = Place::new();
    let refused = |args: &[&str], names: &[&str]| {
        place.run([&["study"], args].concat()).refused(2, names);
        assert!(!place.path("runs").exists(), "{args:?} left a folder");
    };
    refused(&["tiny.toml", "--set", "tune.valeus=[1]"], &["valeus"]);
    refused(&["tiny.toml", "--set", "seed"], &["key=value"]);
    refused(
        &["tiny.toml", "--set", "model.max_batch=0"],
        &["model.max_batch"],
    );
    refused(
        &["tiny.toml", "--set", "evaluate.arms=[\"base\",\"base\"]"],
        &["evaluate.arms", "base"],
    );
    refused(
        &["tiny.toml", "--set", "tune.values=[1.0, 1.0]"],
        &["tune.values"],
    );
    refused(&["tiny.toml", "--from", "bake"], &["bake", "discover"]);
    refused(&["quickstrat"], &["quickstrat", "quickstart", "hint"]);
    refused(&["tiny.toml", "--reprot"], &["--reprot"]);
}

#[test]
fn an_sae_of_a_former_run_serves_another_study() {
    let place = Place::new();
    place.study("runs");
    let sae = place.path("runs/tiny/train/sae");
    let info = place
        .run([
            "sae".as_ref(),
            "info".as_ref(),
            sae.as_os_str(),
            "--json".as_ref(),
        ])
        .succeeded()
        .json();
    let name = format!("sae.name={:?}", sae.display().to_string());
    let args = [
        "study",
        "tiny.toml",
        "--runs",
        "other",
        "--set",
        "sae.source=path",
        "--set",
        &name,
    ];
    place.run(args).succeeded();
    let record = place.record("other");
    assert_eq!(record["sae"]["sha256"], info["sha256"]);
    assert_eq!(record["sae"]["source"], "path");
    // The plan needs nothing but the SAE.
    let plan = place.path("other/tiny/plan.toml");
    let reply = place
        .run([
            "generate".as_ref(),
            "--model".as_ref(),
            crate::support::model().as_os_str(),
            "--plan".as_ref(),
            plan.as_os_str(),
            "--sae".as_ref(),
            sae.as_os_str(),
            "--max-new-tokens=4".as_ref(),
            "--json".as_ref(),
            "hi".as_ref(),
        ])
        .succeeded()
        .json();
    assert!(!reply["tokens"].as_array().unwrap().is_empty());
}
