//! `demur sae fit`, `eval` and `diff`, and `demur bench sae`.

use std::fs;

use demur_sae::arch::{Activation, Wiring};
use demur_sae::saelens::{self, WeightType};
use demur_sae::{Sae, SaeConfig};
use serde_json::{Value, json};

use crate::support::{Place, model};

#[test]
fn what_harvest_writes_is_trained_on_and_goes_on_after_a_stop() {
    let place = harvested();
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

/// Rows of the tiny model after block 1, in `activations.safetensors`.
fn harvested() -> Place {
    let place = Place::new();
    let model = model();
    let args = [
        "harvest",
        "--prompts",
        "prompts.jsonl",
        "--site",
        "layers.1",
        "--model",
    ];
    place
        .run(args.iter().map(AsRef::as_ref).chain([model.as_os_str()]))
        .succeeded();
    place
}

#[test]
fn every_architecture_is_fitted_measured_and_compared() {
    let place = harvested();
    let rows = "activations.safetensors";
    for (name, written) in [
        ("topk", "topk"),
        ("batchtopk", "jumprelu"),
        ("matryoshka", "jumprelu"),
        ("relu", "standard"),
        ("jumprelu", "jumprelu"),
        ("gated", "gated"),
    ] {
        let sizes = [
            "--d-sae", "64", "--k", "4", "--batch", "32", "--epochs", "8",
        ];
        let out = [
            "--architecture",
            name,
            "--lr",
            "0.003",
            "--warmup",
            "5",
            "--out",
            name,
        ];
        place
            .run([&["sae", "fit", rows][..], &sizes, &out].concat())
            .succeeded();
        let sae = format!("{name}/sae");
        let said = place
            .run(["sae", "eval", &sae, "--activations", rows, "--json"])
            .succeeded()
            .json();
        assert_eq!(said["architecture"], written, "{name}");
        let figures = &said["activations"];
        let of = |key: &str| figures[key].as_f64().unwrap();
        assert!(of("fvu") < 1.0 && of("l0") > 0.0, "{name}: {figures}");
        assert!(
            (of("fvu") + of("fve") - 1.0).abs() < 1e-9,
            "{name}: {figures}"
        );
        let alive: u64 = figures["density_histogram"]
            .as_array()
            .unwrap()
            .iter()
            .map(|bin| bin[2].as_u64().unwrap())
            .sum();
        assert_eq!(alive as f64, ((1.0 - of("dead")) * 64.0).round(), "{name}");
        let events = fs::read(place.path(name).join("events.out.tfevents.demur")).unwrap();
        assert!(events.windows(10).any(|w| w == b"metrics/l0"), "{name}");
    }
    let same = ["sae", "diff", "topk/sae", "topk/sae", "--json"];
    let same = place.run(same).succeeded().json();
    assert_eq!(same["config"], json!({}));
    assert!(same["first_in_second"]["mean_max_cosine"].as_f64().unwrap() > 0.999_99);
    assert_eq!(same["second_in_first"]["above_09"], 1.0);
    let other = ["sae", "diff", "topk/sae", "gated/sae", "--json"];
    let other = place.run(other).succeeded().json();
    assert_eq!(other["config"]["architecture"], json!(["topk", "gated"]));
    let args = ["sae", "fit", rows, "--l1", "2", "--out", "never"];
    place.run(args).refused(1, &["l1", "TopK"]);
}

/// Controls with known figures: an SAE that reconstructs exactly costs nothing, and one that always gives
/// zeros costs what the ablation costs.
#[test]
fn patching_is_priced_between_identity_and_ablation() {
    let place = harvested();
    let beside = fs::read(place.path("activations.json")).unwrap();
    let beside: Value = serde_json::from_slice(&beside).unwrap();
    let d = beside["d_model"].as_u64().unwrap() as usize;
    let save = |name: &str, sign: f32| {
        // Each direction and its opposite, rectified; of no size, it is always zero.
        let mut w = vec![0.0f32; 2 * d * d];
        for i in 0..d {
            w[i * d + i] = sign;
            w[(d + i) * d + i] = -sign;
        }
        let cfg = SaeConfig {
            d_model: d,
            d_sae: 2 * d,
            k: 2 * d,
            hook_name: "blocks.1.hook_resid_post".to_owned(),
            model_name: "tiny".to_owned(),
        };
        let (b, wiring) = (vec![0.0; 2 * d], Wiring::default());
        let sae = Sae::of(cfg, Activation::Relu, wiring, w.clone(), b, w, vec![0.0; d]).unwrap();
        saelens::save(&sae, &place.path(name), WeightType::F32, &json!({})).unwrap();
    };
    save("identity", 1.0);
    save("nothing", 0.0);
    fs::write(
        place.path("chats.jsonl"),
        "{\"id\": \"a\", \"prompt\": \"How do I mend a lamp?\", \"reply\": \"Open it.\"}\n",
    )
    .unwrap();
    let model = model();
    for (name, score) in [("identity", 1.0), ("nothing", 0.0)] {
        let args = [
            "sae",
            "eval",
            name,
            "--ablation",
            "zero",
            "--limit",
            "2",
            "--json",
        ];
        let more = ["--context", "40", "--chats", "chats.jsonl", "--model"];
        let all = args.iter().chain(&more).map(AsRef::as_ref);
        let said = place.run(all.chain([model.as_os_str()])).succeeded().json();
        for side in ["text", "chat"] {
            let of = |key: &str| said[side][key].as_f64().unwrap();
            assert!(of("kl_ablated") > 1e-3, "{said}");
            assert!((of("kl_div_score") - score).abs() < 1e-3, "{name}: {said}");
            let expected = if score > 0.0 {
                of("ce")
            } else {
                of("ce_ablated")
            };
            assert!((of("ce_sae") - expected).abs() < 1e-4, "{name}: {said}");
            assert!((of("ce_loss_score") - score).abs() < 1e-2, "{name}: {said}");
            let fvu = of("fvu");
            assert!(
                if score > 0.0 { fvu < 1e-9 } else { fvu >= 1.0 },
                "{name}: {said}"
            );
        }
    }
    place
        .run(["sae", "eval", "identity"])
        .refused(1, &["--activations", "--model"]);
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
