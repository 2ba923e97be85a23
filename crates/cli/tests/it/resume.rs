//! A study can be killed at any moment: resumed, it ends with the record of one that was not.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::support::{Place, states};

/// Runs the study until `stop` says so, kills it, and says whether it was not yet at its end.
fn kill_when(place: &Place, runs: &str, stop: impl Fn(&Path) -> bool) -> bool {
    let mut child = place.start(runs);
    let run = place.path(runs).join("tiny");
    while child.try_wait().unwrap().is_none() && !stop(&run) {
        std::thread::sleep(Duration::from_micros(500));
    }
    child.kill().unwrap(); // SIGKILL; nothing, if it has ended
    child.wait().unwrap();
    !run.join("report.html").exists()
}

#[test]
fn killed_in_every_stage() {
    let place = Place::new();
    let whole = place.study("whole");
    let moments: [&dyn Fn(&Path) -> bool; 6] = [
        &|run| grown(&run.join("harvest/on_policy.jsonl"), 20_000),
        &|run| !states(&run.join("train")).is_empty(),
        &|run| run.join("train/sae").exists(),
        &|run| run.join("discover/inputs.sha256").exists(),
        &|run| grown(&run.join("tune/replies.jsonl"), 1),
        &|run| grown(&run.join("evaluate/replies.jsonl"), 1),
    ];
    let mut interrupted = 0;
    for moment in moments {
        interrupted += usize::from(kill_when(&place, "runs", moment));
    }
    assert!(
        interrupted >= 4,
        "only {interrupted} kills came before the end"
    );
    assert_eq!(place.study("runs"), whole);
    // Nothing is left of what was half-written.
    for folder in [".", "harvest", "train", "evaluate"] {
        for entry in fs::read_dir(place.path("runs/tiny").join(folder)).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(
                !name.starts_with(".tmp") && !name.starts_with(".sae-"),
                "{folder}/{name}"
            );
        }
    }
}

#[test]
fn killed_at_times_spread_over_the_run() {
    let place = Place::new();
    let started = Instant::now();
    let whole = place.study("whole");
    let length = started.elapsed();
    let mut interrupted = 0;
    for (i, part) in [0.13, 0.29, 0.47, 0.68, 0.86].iter().enumerate() {
        let runs = format!("runs-{i}");
        let until = Instant::now() + length.mul_f64(*part);
        interrupted += usize::from(kill_when(&place, &runs, |_| Instant::now() >= until));
        assert_eq!(place.study(&runs), whole, "killed at {part} of the run");
    }
    assert!(
        interrupted >= 2,
        "only {interrupted} kills came before the end"
    );
}

/// States that a kill between two writes leaves, made by hand: none must be taken for a whole one.
#[test]
fn resumed_from_every_half_way_state() {
    let place = Place::new();
    let whole = place.study("runs");
    let run = place.path("runs/tiny");
    let remove = |name: &str| {
        let path = run.join(name);
        if path.is_dir() {
            fs::remove_dir_all(path).unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
    };
    let cut = |name: &str, part: f64| {
        let bytes = fs::read(run.join(name)).unwrap();
        let length = (bytes.len() as f64 * part) as usize;
        fs::write(run.join(name), &bytes[..length]).unwrap();
    };
    let states: [(&str, &dyn Fn()); 9] = [
        ("without a record", &|| {
            remove("record.json");
            remove("report.html");
        }),
        ("a torn reply", &|| {
            remove("evaluate.json");
            cut("evaluate/replies.jsonl", 0.6);
        }),
        ("a cut stage file", &|| cut("tune.json", 0.5)),
        ("a stage file that is not JSON", &|| {
            fs::write(run.join("discover.json"), b"\x00\xff").unwrap();
        }),
        ("an SAE without its stage file", &|| {
            remove("train.json");
            fs::create_dir(run.join("train/.sae-old-1")).unwrap();
        }),
        ("a curve without a state", &|| {
            remove("train.json");
            remove("train/sae");
        }),
        ("a broken state", &|| {
            remove("train.json");
            fs::write(run.join("train/state-000000100.bin"), b"state").unwrap();
            fs::write(run.join("train/input.json"), b"[[").unwrap();
        }),
        ("a torn corpus", &|| {
            remove("harvest.json");
            remove("harvest/texts.jsonl");
            cut("harvest/on_policy.jsonl", 0.4);
            cut("harvest/replies.jsonl", 0.4);
        }),
        ("a folder that is gone", &|| remove("train")),
    ];
    for (name, make) in states {
        make();
        assert_eq!(place.study("runs"), whole, "resumed from {name}");
    }
}

#[test]
fn two_at_once_do_not_share_a_folder() {
    let place = Place::new();
    let mut first = place.start("runs");
    let lock = place.path("runs/tiny/pull.json");
    while !lock.exists() {
        assert!(first.try_wait().unwrap().is_none(), "it ended at once");
        std::thread::sleep(Duration::from_micros(500));
    }
    let second = place.run(["study", "tiny.toml", "--runs", "runs"]);
    // The first may have ended before the second began, on a machine that was busy in between.
    if first.try_wait().unwrap().is_none() {
        second.refused(1, &["runs/tiny", "another demur", "--runs"]);
    }
    first.kill().unwrap();
    first.wait().unwrap();
}

#[cfg(unix)]
#[test]
fn ctrl_c_says_how_to_go_on() {
    use std::process::Command;
    let place = Place::new();
    let child = place
        .command(["study", "tiny.toml", "--runs", "runs"])
        .spawn()
        .unwrap();
    while !place.path("runs/tiny/pull.json").exists() {
        std::thread::sleep(Duration::from_micros(500));
    }
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    let ended = crate::support::ended(child.wait_with_output().unwrap());
    assert!(sent.success());
    assert_eq!(ended.code, Some(130), "{ended:?}");
    assert!(
        ended.stderr.contains("run the same command to go on"),
        "{ended:?}"
    );
    let whole = place.study("whole");
    assert_eq!(place.study("runs"), whole);
}

fn grown(path: &Path, bytes: u64) -> bool {
    fs::metadata(path).is_ok_and(|m| m.len() >= bytes)
}
