//! SAEs that are trained side by side, on rows that are streamed from the model.

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::{Ended, Place, states};

/// Settings of a stream of several parts.
const STREAMED: [&str; 4] = [
    "train.buffer=600",
    "train.batch=64",
    "train.epochs=1.5",
    "train.checkpoint_every=3",
];
/// SAEs beside the study's own: the same once more, another seed, another site, another architecture.
const BESIDE: &str = r#"train.saes=[{name="twin"}, {name="seed", seed=9}, {name="deep", site="layers.1", k=6}, {name="gated", architecture={name="gated"}, expansion=2.0}]"#;

fn args<'a>(runs: &'a str, sets: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["sae", "train", "tiny.toml", "--json", "--runs", runs];
    for set in STREAMED.iter().chain(sets) {
        args.extend(["--set", *set]);
    }
    args
}

fn train(place: &Place, runs: &str, sets: &[&str]) -> Ended {
    place.run(args(runs, sets)).succeeded()
}

/// The weights of an SAE of a run; the study's own has no name.
fn weights(place: &Place, runs: &str, name: &str) -> Vec<u8> {
    let stage = place.path(runs).join("tiny/train");
    let folder = match name {
        "" => stage,
        name => stage.join("saes").join(name),
    };
    fs::read(folder.join("sae/sae_weights.safetensors")).unwrap()
}

/// The metrics of an SAE of a run, without the speed.
fn metrics(place: &Place, runs: &str, name: &str) -> Vec<Value> {
    let file = place.path(runs).join("tiny/train/saes").join(name);
    let text = fs::read_to_string(file.join("metrics.jsonl")).unwrap();
    let line = |l: &str| {
        let mut v: Value = serde_json::from_str(l).unwrap();
        v["vectors_per_s"] = json!(null);
        v
    };
    text.lines().map(line).collect()
}

const NAMES: [&str; 5] = ["", "twin", "seed", "deep", "gated"];

fn all_weights(place: &Place, runs: &str) -> Vec<Vec<u8>> {
    NAMES
        .iter()
        .map(|name| weights(place, runs, name))
        .collect()
}

/// Starts a training, kills it as soon as its newest state has so many steps, and says whether it came to
/// that.
fn kill_at(place: &Place, runs: &str, sets: &[&str], steps: u64) -> bool {
    let mut child = place
        .command(args(runs, sets))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let folder = place.path(runs).join("tiny/train");
    let newest = || {
        let last = states(&folder).pop()?;
        let name = last.file_stem()?.to_str()?;
        name.strip_prefix("state-")?.parse::<u64>().ok()
    };
    while child.try_wait().unwrap().is_none() && newest().is_none_or(|s| s < steps) {
        std::thread::sleep(Duration::from_micros(300));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    !states(&folder).is_empty()
}

#[test]
fn one_pass_trains_several_that_do_not_depend_on_each_other() {
    let place = Place::new();
    let said = train(&place, "all", &[BESIDE]).json();
    // More parts than one, or nothing was streamed.
    let tokens = said["trained_on_tokens"].as_u64().unwrap();
    assert!(tokens > 1200, "{said}");
    let all = all_weights(&place, "all");
    assert!(all[1] == all[0], "of the same settings came another SAE");
    assert!(all[2] != all[0] && all[3] != all[0]);
    let sites: Vec<_> = said["saes"].as_array().unwrap().iter().collect();
    assert_eq!(sites[2]["site"], "blocks.1.hook_resid_post");
    assert_eq!(sites[2]["k"], 6);
    for sae in sites {
        let fvu = sae["chat"]["fvu"]["value"].as_f64().unwrap();
        assert!(fvu > 0.0, "{sae}");
        place
            .run(["sae", "info", sae["folder"].as_str().unwrap()])
            .succeeded();
    }
    // The SAE at the deeper site, alone; on one thread.
    let alone = ["sae.site=layers.1", "train.k=6"];
    let mut command = place.command(args("alone", &alone));
    let ended = command.args(["--threads", "1"]).output().unwrap();
    crate::support::ended(ended).succeeded();
    assert!(weights(&place, "alone", "") == all[3]);
    // A buffer of another size mixes rows otherwise.
    train(&place, "other", &["train.buffer=700"]);
    assert!(weights(&place, "other", "") != all[0]);
    assert!(!place.path("all/tiny/harvest/activations.f32").exists());
    assert!(states(&place.path("all/tiny/train")).is_empty());
}

#[test]
fn killed_at_any_step_it_ends_with_the_same_weights() {
    let place = Place::new();
    train(&place, "whole", &[BESIDE]);
    let whole = all_weights(&place, "whole");
    let mut killed = 0;
    for steps in [1, 60, 130, 200] {
        killed += usize::from(kill_at(&place, "cut", &[BESIDE], steps));
    }
    assert!(killed >= 2, "only {killed} kills came before the end");
    // How states are kept may change in between.
    train(&place, "cut", &[BESIDE, "train.checkpoints=1"]);
    assert!(all_weights(&place, "cut") == whole);
    for name in &NAMES[1..] {
        let (cut, whole) = (metrics(&place, "cut", name), metrics(&place, "whole", name));
        assert_eq!(cut, whole, "{name}");
        assert_eq!(whole.len() as u64, whole[whole.len() - 1]["step"], "{name}");
    }
}

#[test]
fn a_damaged_state_is_said_and_the_one_before_is_used() {
    let place = Place::new();
    train(&place, "whole", &[]);
    assert!(
        kill_at(&place, "cut", &[], 7),
        "it ended before it was killed"
    );
    let kept = states(&place.path("cut/tiny/train"));
    assert!(kept.len() >= 2, "{kept:?}");
    let newest = &kept[kept.len() - 1];
    let mut bytes = fs::read(newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(newest, bytes).unwrap();
    let ended = train(&place, "cut", &[]);
    let name = newest.file_name().unwrap().to_str().unwrap();
    let noted = |words: &str| ended.stderr.lines().any(|l| l.contains(words));
    assert!(noted(name) && noted("damaged"), "{ended:?}");
    assert!(noted("goes on from the state before"), "{ended:?}");
    assert!(weights(&place, "cut", "") == weights(&place, "whole", ""));
}

/// Files by their weights, and of chats only what the roles asked for wrote.
#[test]
fn a_corpus_of_texts_and_chats() {
    let place = Place::new();
    let (mut texts, mut chats) = (String::new(), String::new());
    for i in 0..200 {
        let words = "Some words of a book, and of its end. ".repeat(1 + i % 3);
        texts.push_str(&format!("{}\n", json!({ "text": words })));
        let messages = json!([
            { "role": "user", "content": format!("What is {i} and two?") },
            { "role": "assistant", "content": format!("It is {}.", i + 2) },
        ]);
        chats.push_str(&format!("{}\n", json!({ "id": i, "messages": messages })));
    }
    fs::write(place.path("texts.jsonl"), texts).unwrap();
    fs::write(place.path("chats.jsonl"), chats).unwrap();
    let files = [
        "corpus.on_policy=false",
        r#"corpus.files=["texts.jsonl", "chats.jsonl"]"#,
        "corpus.weights=[1.0, 3.0]",
        "corpus.max_tokens=3000",
    ];
    let read = |runs: &str, more: &[&str]| -> (Value, Vec<Value>) {
        train(&place, runs, &[&files[..], more].concat());
        let run = place.path(runs).join("tiny");
        let stage: Value =
            serde_json::from_slice(&fs::read(run.join("harvest.json")).unwrap()).unwrap();
        let lines = fs::read_to_string(run.join("harvest/texts.jsonl")).unwrap();
        let lines = lines.lines().map(|l| serde_json::from_str(l).unwrap());
        (stage["output"].clone(), lines.collect())
    };
    let (corpus, lines) = read("all", &[]);
    let of = |name: &str| -> f64 {
        let its = lines
            .iter()
            .filter(|l| l["source"].as_str().unwrap().starts_with(name));
        its.map(|l| l["tokens"].as_array().unwrap().len() as f64)
            .sum()
    };
    let share = of("chats.jsonl") / of("texts.jsonl");
    assert!((share - 3.0).abs() < 0.2, "{share}");
    let tokens = of("chats.jsonl") + of("texts.jsonl");
    assert!((3000.0..3100.0).contains(&tokens), "{tokens}");
    let rows = |corpus: &Value| corpus["train_rows"].as_u64().unwrap();
    // All but the first of each.
    assert_eq!(rows(&corpus) + lines.len() as u64, tokens as u64);
    let (without, _) = read("roles", &[r#"corpus.roles=["user", "assistant"]"#]);
    assert!(rows(&without) < rows(&corpus));
    assert_eq!(without["train_sequences"], corpus["train_sequences"]);
    let set = r#"corpus.roles=["system"]"#;
    let mut only = args("texts", &[&files[..], &[set]].concat());
    only.retain(|a| *a != "--json");
    // Chats have none: only the texts are left.
    let ended = place.run(only).succeeded();
    assert!(ended.stdout.contains("FVU"), "{ended:?}");
    let harvest = fs::read_to_string(place.path("texts/tiny/harvest/texts.jsonl")).unwrap();
    assert!(!harvest.contains("chats.jsonl"), "a chat without a row");
}

/// A file that may not grow stands for a disk that is full.
#[cfg(unix)]
#[test]
fn a_full_disk_leaves_no_state_that_is_not_whole() {
    use std::process::Command;
    let place = Place::new();
    let model = crate::support::model();
    let harvest = ["harvest", "--prompts", "prompts.jsonl", "--model"];
    place
        .run(
            harvest
                .iter()
                .map(AsRef::as_ref)
                .chain([model.as_os_str(), "--site=layers.1".as_ref()]),
        )
        .succeeded();
    let fit = |out: &'static str| {
        let sizes = [
            "--d-sae", "2048", "--k", "4", "--batch", "32", "--epochs", "3",
        ];
        let args = [
            "sae",
            "fit",
            "activations.safetensors",
            "--checkpoint-every",
            "5",
            "--out",
        ];
        place.command([&args[..], &[out], &sizes].concat())
    };
    let ended = crate::support::ended(fit("whole").output().unwrap()).succeeded();
    assert!(ended.stdout.contains("whole/sae"), "{ended:?}");
    let plain = fit("cut");
    let mut limited = Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 256; exec \"$0\" \"$@\""])
        .arg(plain.get_program())
        .args(plain.get_args())
        .current_dir(place.path(""))
        .stdin(Stdio::null());
    let full = crate::support::ended(limited.output().unwrap());
    full.refused(1, &["state-000000005.bin"]);
    let left = |folder: &Path| -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let names = entries.map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|n| n.contains("state")).collect()
    };
    assert!(left(&place.path("cut")).is_empty());
    crate::support::ended(fit("cut").output().unwrap()).succeeded();
    let weights =
        |out: &str| fs::read(place.path(out).join("sae/sae_weights.safetensors")).unwrap();
    assert!(weights("cut") == weights("whole"));
}
