//! Gates from training to the arms that use them, and plans that are compared.

use std::fs;

use crate::support::{Place, model};

#[test]
fn a_gate_on_latents_is_trained_tested_and_used() {
    let trained = trained_tested_and_used("gate.reads=[\"latents\"]", "gate.sites=[]");
    let read = trained["gate"]["weights"].as_array().unwrap().len();
    assert!((1..=8).contains(&read), "{read}");
    assert_eq!(trained["beside"].as_array().unwrap().len(), 1);
}

#[test]
fn a_gate_on_the_residual_is_trained_tested_and_used() {
    let trained = trained_tested_and_used(
        "gate.reads=[\"residual\"]",
        "gate.sites=[\"blocks.0.hook_resid_mid\"]",
    );
    let probes = trained["gate"]["probes"].as_array().unwrap();
    let sites: Vec<&str> = probes.iter().map(|p| p["site"].as_str().unwrap()).collect();
    assert_eq!(sites.len(), 2, "{sites:?}");
    assert_eq!(sites[0], "blocks.0.hook_resid_mid");
}

#[test]
fn a_gate_of_heads_is_trained_tested_and_used() {
    let trained = trained_tested_and_used(
        "gate.reads=[\"residual\", \"attention\"]",
        "gate.attention={heads=3, epochs=40, rate=0.02}",
    );
    // Whichever of the two is better on validation prompts; the other one is beside it.
    assert_eq!(trained["beside"].as_array().unwrap().len(), 2);
    let trained = trained_tested_and_used(
        "gate.reads=[\"attention\"]",
        "gate.attention={heads=3, epochs=40, rate=0.02}",
    );
    let heads = trained["gate"]["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 3);
    let site = &heads[2]["value"][0]["site"];
    assert_eq!(trained["gate"]["site"], *site);
    assert_eq!(trained["gate"]["aggregate"], "attention");
    assert!(trained["tried"].as_array().unwrap().is_empty());
}

#[test]
fn base_that_never_refuses_is_asked_and_says_nothing_of_where_to_damp() {
    let trained = trained_tested_and_used("gate.reads=[\"residual\"]", "gate.asked=12");
    assert!(trained["refuses"].is_null(), "{}", trained["refuses"]);
}

/// Trains a gate, tests it, and runs the arms that use it; gives what was trained.
fn trained_tested_and_used(reads: &str, sites: &str) -> serde_json::Value {
    let place = Place::new();
    let args = [
        "-q",
        "gate",
        "train",
        "tiny.toml",
        "--runs",
        "runs",
        "--json",
    ];
    let sets = ["gate.sizes=[8]", "gate.l2=[0.1]", reads, sites];
    let sets = sets.map(|s| ["--set", s]).concat();
    let trained = place.run([&args[..], &sets].concat()).succeeded().json();
    let group = |split: &str, name: &str| {
        let groups = trained["trained"][split]["groups"].as_array().unwrap();
        let group = groups.iter().find(|g| g["name"] == name);
        group
            .unwrap_or_else(|| panic!("{name}: {groups:?}"))
            .clone()
    };
    let all = group("test", "all");
    assert_eq!(
        (&all["recall"]["n"], &all["false_alarm"]["n"]),
        (&4.into(), &65.into())
    );

    // The gate as it runs says what the training said of the same prompts.
    let prompts = fs::read_to_string(place.path("prompts.jsonl")).unwrap();
    for split in ["validation", "test"] {
        let of: Vec<&str> = prompts
            .lines()
            .filter(|l| l.contains(&format!("\"{split}-")))
            .collect();
        fs::write(place.path("some.jsonl"), of.join("\n")).unwrap();
        let model = model();
        let model = model.to_str().unwrap();
        let plan = "runs/tiny/gate.toml";
        let tested = place
            .run([
                "-q",
                "gate",
                "test",
                "some.jsonl",
                "--plan",
                plan,
                "--model",
                model,
                "--json",
            ])
            .succeeded()
            .json();
        let expected = group(split, "against look-alikes");
        for figure in ["auroc", "recall", "false_alarm"] {
            assert_eq!(
                tested["detection"][figure], expected[figure],
                "{split} {figure}"
            );
        }
    }

    // And the arms use it.
    let arms = "evaluate.arms=[\"base\", \"frequency_matched_latent\", \"gated_clamp\", \
                \"gated_clamp_damped\", \"conditional_difference_of_means\"]";
    let args = ["-q", "study", "tiny.toml", "--runs", "runs", "--set", arms];
    place.run([&args[..], &sets].concat()).succeeded();
    let record = place.record("runs");
    assert_eq!(record["arms"].as_array().unwrap().len(), 5);
    let facts = &record["gate"]["test"]["groups"][0];
    assert_eq!(facts["recall"], all["recall"]);
    let front = record["calibration"]["front"].as_array().unwrap();
    assert_eq!(front.iter().filter(|s| s["chosen"] == true).count(), 1);
    let page = fs::read_to_string(place.path("runs/tiny/report.html")).unwrap();
    assert!(page.contains("Front of the gate's settings"));
    assert!(page.contains("id=\"gate\"") && page.contains("href=\"#gate\""));
    for row in record["replies"].as_array().unwrap() {
        let audit = |arm: &str| {
            let reply = row["replies"]
                .as_array()
                .unwrap()
                .iter()
                .find(|r| r["arm"] == arm);
            reply.unwrap()["audit"].clone()
        };
        let damped = audit("gated_clamp_damped");
        let is = |zone: &str| damped["gates"][0][zone].as_bool().unwrap();
        let (open, clear) = (is("open"), is("clear"));
        let interventions = damped["interventions"].as_array().unwrap();
        let edited = interventions
            .iter()
            .map(|i| i["tokens_edited"].as_u64().unwrap() > 0);
        let expected = [open, clear];
        assert!(
            edited.eq(expected[..interventions.len()].iter().copied()),
            "{damped}"
        );
        // A reply is the clamp's, damping's or base's, to the letter.
        let text = |arm: &str| {
            let reply = row["replies"]
                .as_array()
                .unwrap()
                .iter()
                .find(|r| r["arm"] == arm);
            reply.unwrap()["text"].clone()
        };
        assert!(open || clear || text("gated_clamp_damped") == text("base"));
        let open = audit("gated_clamp")["gates"][0]["open"].as_bool().unwrap();
        assert!(open || text("gated_clamp") == text("base"));
        // This model refuses nothing: there is no direction of refusal to add.
        assert_eq!(text("conditional_difference_of_means"), text("base"));
    }
    // Batch equals single, gates and all.
    let one = [
        "--set",
        "model.max_batch=1",
        "--set",
        "model.batch_tokens=32",
    ];
    let args = ["-q", "study", "tiny.toml", "--runs", "one", "--set", arms];
    place.run([&args[..], &sets, &one].concat()).succeeded();
    assert_eq!(place.record("one")["replies"], record["replies"]);
    let again = [
        "-q",
        "gate",
        "test",
        "prompts.jsonl",
        "--plan",
        "runs/tiny/plan.toml",
    ];
    let model = model();
    let again = [&again[..], &["--model", model.to_str().unwrap()]].concat();
    // The study's plan is that of the gated arm.
    place.run(&again).succeeded();
    let plan = fs::read_to_string(place.path("runs/tiny/plan.toml")).unwrap();
    let (before, _) = plan.split_once("[gates").unwrap();
    fs::write(place.path("runs/tiny/plan.toml"), before).unwrap();
    place.run(again).refused(1, &["no gate"]);
    trained["trained"].clone()
}

/// A gate is trained anew from what was read; a torn or lost end of it is read again, to the same gate.
#[test]
fn what_was_read_is_kept() {
    let place = Place::new();
    let train = |runs: &str, l2: &str| {
        let args = ["gate", "train", "tiny.toml", "--runs", runs, "--json"];
        let sets = ["--set", "gate.reads=[\"residual\"]", "--set", l2];
        place.run([&args[..], &sets].concat()).succeeded()
    };
    let read = |stderr: &str| stderr.lines().any(|l| l.contains(" prompts in "));
    let first = train("runs", "gate.l2=[0.1]");
    assert!(read(&first.stderr), "{}", first.stderr);
    let again = train("runs", "gate.l2=[0.3]");
    assert!(!read(&again.stderr), "{}", again.stderr);
    let alone = train("alone", "gate.l2=[0.3]").json()["trained"].clone();
    assert_eq!(again.json()["trained"], alone);

    let rows = place.path("runs/tiny/read/rows.f32");
    let whole = fs::read(&rows).unwrap();
    fs::write(&rows, &whole[..whole.len() / 2 + 3]).unwrap();
    let torn = train("runs", "gate.l2=[0.1]");
    assert!(read(&torn.stderr), "{}", torn.stderr);
    assert_eq!(torn.json()["trained"], first.json()["trained"]);
    assert_eq!(fs::read(&rows).unwrap().len(), whole.len());
}

/// What files add to the gate's prompts: what is like a test's prompt is not among it.
#[test]
fn a_gate_learns_from_files_but_not_from_a_test() {
    let place = Place::new();
    let row = |id: usize, label: &str, text: &str| {
        serde_json::json!({"id": id.to_string(), "label": label, "split": "test", "prompt": text})
            .to_string()
    };
    let more = [
        row(1, "harmful", "Wreck the bridge over the river tonight."),
        row(2, "harmless", "Paint the fence of the garden green."),
        row(3, "harmful", "Wreck the bridge over the river now!"),
        row(4, "harmless", "Count the apples in this basket for me."),
    ];
    fs::write(place.path("more.jsonl"), more.join("\n")).unwrap();
    let test = row(9, "harmful", "wreck the BRIDGE over the river, today");
    fs::write(place.path("test.jsonl"), test).unwrap();
    let args = ["gate", "train", "tiny.toml", "--runs", "runs"];
    let sets = [
        "gate.files=[\"more.jsonl\"]",
        "gate.held_out=[\"test.jsonl\"]",
        "gate.reads=[\"residual\"]",
        "gate.l2=[0.1]",
    ];
    let sets = sets.map(|s| ["--set", s]).concat();
    let ran = place.run([&args[..], &sets].concat()).succeeded();
    assert!(
        ran.stderr.contains("2 of 4 prompts") && ran.stderr.contains("; 2 more"),
        "{}",
        ran.stderr
    );
}

/// A text that two files hold, drawn to different splits, is in the first one's alone. Without one of five prompts the last of
/// the other four is drawn for training, so that at least one of the later files has a text that was drawn apart.
#[test]
fn a_text_of_two_files_is_in_one_split() {
    let place = Place::new();
    let row = |id: usize| {
        let label = if id.is_multiple_of(2) {
            "unsafe"
        } else {
            "safe"
        };
        serde_json::json!({"id": id.to_string(), "label": label, "prompt": format!("Number {id}, and what comes after it")})
            .to_string()
    };
    let write = |name: &str, but: Option<usize>| {
        let rows: Vec<String> = (0..5).filter(|id| Some(*id) != but).map(row).collect();
        fs::write(place.path(name), rows.join("\n")).unwrap();
    };
    write("all.jsonl", None);
    write("first.jsonl", Some(0));
    write("second.jsonl", Some(1));
    let train = |files: &str| {
        let args = ["gate", "train", "tiny.toml", "--runs", "runs"];
        let sets = [files, "gate.reads=[\"residual\"]", "gate.l2=[0.1]"];
        let sets = sets.map(|s| ["--set", s]).concat();
        place.run([&args[..], &sets].concat()).succeeded().stderr
    };
    let stderr = train("gate.files=[\"all.jsonl\", \"first.jsonl\", \"second.jsonl\"]");
    assert!(stderr.contains("5 of 5 prompts"), "{stderr}");
    assert!(stderr.contains("3 of 4 prompts"), "{stderr}");
}

#[test]
fn plans_are_compared_and_checked() {
    let place = Place::new();
    let plan = r#"
version = 1
name = "push"
[[interventions]]
site = "layers.9"
direction = { name = "d", vector = [1.0, 2.0], op = "add", value = 2.0 }
"#;
    fs::write(place.path("a.toml"), plan).unwrap();
    fs::write(
        place.path("b.toml"),
        plan.replace("value = 2.0", "value = 3.0"),
    )
    .unwrap();
    let same = place.run(["plan", "diff", "a.toml", "a.toml"]).succeeded();
    assert_eq!(same.stdout, "the plans do the same\n");
    let other = place.run(["plan", "diff", "a.toml", "b.toml"]).succeeded();
    assert_eq!(
        other.stdout,
        "interventions[0].direction.value\n  - 2.0\n  + 3.0\n"
    );
    let json = place
        .run(["plan", "diff", "a.toml", "b.toml", "--json"])
        .succeeded()
        .json();
    assert_eq!(
        (&json["before"], &json["after"]),
        (&2.0.into(), &3.0.into())
    );
    // Alone it is a plan; of this model it is none.
    place.run(["plan", "check", "a.toml"]).succeeded();
    let model = model();
    place
        .run([
            "plan",
            "check",
            "a.toml",
            "--model",
            model.to_str().unwrap(),
        ])
        .refused(1, &["a.toml", "blocks.9"]);
}
