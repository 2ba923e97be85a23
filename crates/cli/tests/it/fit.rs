//! `demur sae fit` and `demur bench sae`.

use std::fs;

use serde_json::Value;

use crate::support::{Place, model};

#[test]
fn what_harvest_writes_is_trained_on_and_goes_on_after_a_stop() {
    let place = Place::new();
    let model = model();
    let harvest = [
        "harvest",
        "--prompts",
        "prompts.jsonl",
        "--site",
        "layers.1",
        "--model",
    ];
    place
        .run(harvest.iter().map(AsRef::as_ref).chain([model.as_os_str()]))
        .succeeded();
    let fit = |out: &str, more: &[&str]| {
        let args = [
            "sae",
            "fit",
            "activations.safetensors",
            "--d-sae",
            "64",
            "--k",
            "4",
            "--json",
        ];
        let sizes = [
            "--batch",
            "32",
            "--epochs",
            "20",
            "--checkpoint-every",
            "5",
            "--out",
            out,
        ];
        place.run([&args[..], &sizes, more].concat())
    };
    let held = ["--held-out", "activations.safetensors"];
    let whole = fit("whole", &held).succeeded().json();
    let steps = whole["steps"].as_u64().unwrap();
    assert!(steps >= 10, "{whole}");
    let fvu = |v: &Value| v["held_out"]["fvu"].as_f64().unwrap();
    assert!(fvu(&whole) < 1.0, "{whole}");
    let lines = |out: &str| -> Vec<Value> {
        let text = fs::read_to_string(place.path(out).join("metrics.jsonl")).unwrap();
        let line = |l: &str| {
            let mut v: Value = serde_json::from_str(l).unwrap();
            v.as_object_mut().unwrap().remove("vectors_per_s");
            v
        };
        text.lines().map(line).collect()
    };
    assert_eq!(lines("whole").len() as u64, steps);
    place.run(["sae", "info", "whole/sae"]).succeeded();

    // Stopped at some moment, and the same command again: the same weights and metrics.
    let mut child = place
        .command([
            "-q",
            "sae",
            "fit",
            "activations.safetensors",
            "--d-sae",
            "64",
            "--k",
            "4",
        ])
        .args([
            "--batch",
            "32",
            "--epochs",
            "20",
            "--checkpoint-every",
            "5",
            "--out",
            "cut",
        ])
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(40));
    let _ = child.kill();
    let _ = child.wait();
    fit("cut", &[]).succeeded();
    assert_eq!(lines("cut"), lines("whole"));
    let weights =
        |out: &str| fs::read(place.path(out).join("sae/sae_weights.safetensors")).unwrap();
    assert!(weights("cut") == weights("whole"), "the weights differ");

    fs::write(place.path("broken.safetensors"), b"no").unwrap();
    place
        .run(["sae", "fit", "broken.safetensors"])
        .refused(1, &["broken.safetensors"]);
}

#[test]
fn the_step_is_timed() {
    let place = Place::new();
    let sizes = [
        "--d-model",
        "32",
        "--d-sae",
        "128",
        "--k",
        "4",
        "--batch",
        "64",
    ];
    let figures = place
        .run([&["bench", "sae", "--rounds", "1", "--json"][..], &sizes].concat())
        .succeeded()
        .json();
    for key in [
        "vectors_per_s",
        "step_ms",
        "encoder_gflops",
        "peak_fraction",
    ] {
        assert!(figures[key].as_f64().unwrap() > 0.0, "{key}: {figures}");
    }
}
