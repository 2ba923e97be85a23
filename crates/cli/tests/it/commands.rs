//! The other commands, as a newcomer or a script meets them.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::process::Stdio;

use crate::support::{Ended, Place, ended, model, testdata};

/// Runs with `text` on standard input.
fn piped(place: &Place, args: &[&str], text: &str) -> Ended {
    let model = model();
    let args = args.iter().map(AsRef::as_ref);
    let mut child = place
        .command(args.chain(["--model".as_ref(), model.as_os_str()]))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    // It may not want to read.
    let _ = child.stdin.take().unwrap().write_all(text.as_bytes());
    ended(child.wait_with_output().unwrap())
}

#[test]
fn help_teaches_every_argument() {
    let place = Place::new();
    let commands: [&[&str]; 30] = [
        &[],
        &["study"],
        &["report"],
        &["pull"],
        &["models"],
        &["inspect"],
        &["chat"],
        &["generate"],
        &["harvest"],
        &["sae"],
        &["sae", "train"],
        &["sae", "info"],
        &["sae", "fit"],
        &["sae", "eval"],
        &["sae", "diff"],
        &["sae", "convert"],
        &["features"],
        &["plan"],
        &["plan", "check"],
        &["plan", "diff"],
        &["gate", "train"],
        &["gate", "test"],
        &["eval"],
        &["eval", "list"],
        &["eval", "refusal"],
        &["eval", "merge"],
        &["eval", "judges"],
        &["bench", "lm"],
        &["bench", "sae"],
        &["completions"],
    ];
    for command in commands {
        let help = place
            .run([command, &["--help"]].concat())
            .succeeded()
            .stdout;
        let lines: Vec<&str> = help.lines().collect();
        for (i, line) in lines.iter().enumerate() {
            let name = line.trim_start();
            let is_argument = line.starts_with(' ')
                && (name.starts_with("--") || name.starts_with("-") || name.starts_with('['))
                && line.len() - name.len() <= 6;
            if !is_argument || name.starts_with("- ") {
                continue;
            }
            // Its words are behind it, or on the next line, further in.
            let behind = name
                .split_once("  ")
                .is_some_and(|(_, text)| !text.trim().is_empty());
            let below = lines.get(i + 1).is_some_and(|next| {
                let text = next.trim_start();
                !text.is_empty() && !text.starts_with('[') && next.len() - text.len() >= 8
            });
            assert!(behind || below, "demur {command:?}: {line:?} has no help");
        }
    }
}

#[test]
fn models_are_listed_for_people_and_programs() {
    let place = Place::new();
    let ended = place.run(["models"]).succeeded();
    assert!(ended.stdout.contains("qwen2.5-coder-0.5b-instruct"));
    let json = place.run(["models", "--json"]).succeeded().json();
    let models = json["models"].as_array().unwrap();
    assert!(
        models
            .iter()
            .any(|m| m["default"] == true && m["cached"] == false)
    );
}

#[test]
fn a_model_that_is_not_there() {
    let place = Place::new();
    for args in [
        &["inspect", "gpt-17"][..],
        &["pull", "gpt-17"],
        &["generate", "--model", "gpt-17", "hi"],
    ] {
        place
            .run(args)
            .refused(1, &["gpt-17", "hint", "smollm2-135m-instruct"]);
    }
    fs::write(place.path("notes.txt"), "hello").unwrap();
    place
        .run(["inspect", "notes.txt"])
        .refused(1, &["notes.txt", ".gguf"]);
}

#[test]
fn no_network_no_python_no_cache() {
    let place = Place::new();
    let fetch = |name: &str, value: &OsStr| {
        let mut command = place.command(["pull", "smollm2-135m-instruct"]);
        command.env("PATH", place.path("empty")).env(name, value);
        ended(command.output().unwrap())
    };
    // This model has wheels only; there is no Python to fetch them.
    let out = fetch("LANG", "C".as_ref());
    out.refused(1, &["smollm2-135m-instruct", "Python", "hint", "path"]);
    let left: Vec<_> = fs::read_dir(place.path("cache/models/smollm2-135m-instruct"))
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .filter(|n| n != ".lock")
        .collect();
    assert!(left.is_empty(), "{left:?}");
    // A cache that can't be: below a file.
    fs::write(place.path("file"), "").unwrap();
    let out = fetch("DEMUR_CACHE", place.path("file/cache").as_os_str());
    out.refused(1, &["cache", "DEMUR_CACHE"]);
}

#[test]
fn a_prompt_from_the_pipe() {
    let place = Place::new();
    let args = ["-q", "generate", "--max-new-tokens=3", "--json"];
    let json = piped(&place, &args, "hi there\n").succeeded().json();
    assert_eq!(json["tokens"].as_array().unwrap().len(), 3);
    piped(&place, &args, "").refused(1, &["prompt"]);
    piped(&place, &["-q", "generate", "--max-new-tokens=0"], "hi").refused(1, &["max_new_tokens"]);
    piped(&place, &["-q", "generate", "--top-p=7"], "hi").refused(1, &["top_p"]);
    piped(&place, &["-q", "generate", "--temperature=nan"], "hi").refused(1, &["temperature"]);
}

#[test]
fn a_chat_ends_with_its_input() {
    let place = Place::new();
    let out = piped(&place, &["-q", "chat", "--max-new-tokens=2"], "hi\nagain\n").succeeded();
    assert!(!out.stdout.trim().is_empty());
    assert!(out.stderr.is_empty(), "{out:?}");
    piped(&place, &["-q", "chat"], "").succeeded();
    piped(&place, &["chat", "--side-by-side"], "hi\n").refused(2, &["--plan"]);
}

#[test]
fn side_by_side_shows_both() {
    let place = Place::new();
    place
        .run(["-q", "sae", "train", "tiny.toml", "--runs", "runs"])
        .succeeded();
    let plan = r#"
version = 1
name = "push"
[saes]
main = ""
[[interventions]]
site = "layers.0"
sae = "main"
edits = [{ latent = 1, op = "set", value = 500.0 }]
"#;
    fs::write(place.path("plan.toml"), plan).unwrap();
    let args = [
        "-q",
        "chat",
        "--side-by-side",
        "--plan",
        "plan.toml",
        "--max-new-tokens=4",
    ];
    let with_sae = [&args[..], &["--sae", "runs/tiny"]].concat();
    let out = piped(&place, &with_sae, "hi\n").succeeded();
    let (base, steered) = out.stdout.split_once("[steered]").unwrap();
    assert!(base.contains("[base]"), "{out:?}");
    assert_ne!(
        base.replace("[base]", "").trim(),
        steered.trim(),
        "the plan does nothing"
    );
    // Without it the shipped SAE is meant, which is of another model.
    piped(&place, &args, "hi\n").refused(1, &["plan.toml", "--sae"]);
    let absent = [&args[..], &["--sae", "absent"]].concat();
    piped(&place, &absent, "hi\n").refused(1, &["absent"]);
}

#[test]
fn a_run_that_is_not_there() {
    let place = Place::new();
    for command in [&["features"][..], &["report"]] {
        place
            .run(command)
            .refused(1, &["runs/quickstart", "hint", "demur study"]);
    }
    place.study("runs");
    fs::remove_file(place.path("runs/tiny/record.json")).unwrap();
    place
        .run(["features", "--run", "runs/tiny"])
        .refused(1, &["runs/tiny", "goes on"]);
}

#[test]
fn features_of_a_run() {
    let place = Place::new();
    place.study("runs");
    let list = place
        .run(["features", "--run", "runs/tiny", "--json"])
        .succeeded()
        .json();
    let latent = list[0]["latent"].to_string();
    let one = place
        .run(["features", "--run", "runs/tiny", &latent])
        .succeeded();
    assert!(one.stdout.contains(&format!("latent {latent}")), "{one:?}");
    for shown in [
        "\"attribution\"",
        "\"prompts\": 4",
        "\"steps\": 2",
        "\"short_list\"",
        "\nactivations ",
        "\nlogits ",
    ] {
        assert!(one.stdout.contains(shown), "{one:?}");
    }
    for (sort, key) in [
        ("attribution", "/evidence/attribution/mean"),
        (
            "attribution-integrated",
            "/evidence/attribution/integrated/mean",
        ),
    ] {
        let list = place
            .run(["features", "--run", "runs/tiny", "--sort", sort, "--json"])
            .succeeded()
            .json();
        let features = list.as_array().unwrap().iter();
        let figures = features.map(|f| f.pointer(key).unwrap().as_f64().unwrap());
        let figures: Vec<f64> = figures.collect();
        assert!(figures.is_sorted_by(|a, b| a >= b), "{sort}: {figures:?}");
        assert!(figures[0] > 0.0, "{sort}: {figures:?}");
    }
    let table = place
        .run(["features", "--run", "runs/tiny"])
        .succeeded()
        .stdout;
    assert!(
        table.lines().next().unwrap().contains("integrated"),
        "{table}"
    );
    place
        .run(["features", "--run", "runs/tiny", "4000000"])
        .refused(1, &["4000000"]);
}

#[test]
fn sets_sites_and_an_export_of_a_run() {
    let place = Place::new();
    let study = ["study", "tiny.toml", "--runs", "runs"];
    place.run(study).succeeded();
    let features = |more: &[&str]| {
        let args = ["features", "--run", "runs/tiny"];
        place.run([&args[..], more].concat())
    };
    features(&["--show", "sets"]).refused(1, &["no sets", "discovery.sets.size"]);
    features(&["--show", "sites"]).refused(1, &["no sites", "discovery.compare_sites"]);
    let plain = place.record("runs");
    let more = [
        "--set",
        "discovery.sets={size=2, pool=3, value=2.0, max_kl=10.0}",
        "--set",
        "discovery.compare_sites=true",
    ];
    place.run([&study[..], &more].concat()).succeeded();
    // What is asked for besides changes nothing of what was there.
    let searched = place.record("runs");
    let evidence = |record: &serde_json::Value| -> Vec<serde_json::Value> {
        let features = record["discovery"]["features"].as_array().unwrap().iter();
        features.map(|f| f["evidence"].clone()).collect()
    };
    assert_eq!(evidence(&plain), evidence(&searched));
    assert_eq!(plain["discovery"]["stability"]["draws"], 200);
    let latents = |sets: &serde_json::Value| -> Vec<usize> {
        let sets = sets.as_array().unwrap().iter();
        sets.map(|s| s["latents"].as_array().unwrap().len())
            .collect()
    };
    let sets = features(&["--show", "sets", "--json"]).succeeded().json();
    assert_eq!(latents(&sets["singles"]), [1; 3]);
    assert_eq!(latents(&sets["pairs"]), [2; 3]);
    let best = latents(&sets["sets"]);
    assert!(best.len() <= 2 && best.iter().zip(1..).all(|(a, b)| *a == b));
    for pair in sets["pairs"].as_array().unwrap() {
        let rise = |latents: &serde_json::Value| {
            let all = ["singles", "pairs"].map(|k| sets[k].as_array().unwrap());
            let mut all = all.into_iter().flatten();
            let set = all.find(|s| s["latents"] == *latents).unwrap();
            set["refusal_logodds_delta_unsafe"]["value"]
                .as_f64()
                .unwrap()
        };
        let alone = pair["latents"].as_array().unwrap().iter();
        let alone: f64 = alone.map(|j| rise(&serde_json::json!([j]))).sum();
        let interaction = pair["interaction"]["value"].as_f64().unwrap();
        assert!((rise(&pair["latents"]) - alone - interaction).abs() < 1e-9);
    }
    let text = features(&["--show", "sets"]).succeeded().stdout;
    assert!(text.contains("interaction") && text.contains('+'), "{text}");
    let sites = features(&["--show", "sites", "--json"]).succeeded().json();
    let names: Vec<_> = sites
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["site"])
        .collect();
    assert_eq!(names[0], "blocks.0.hook_resid_post");
    assert_eq!(sites[0]["last"]["probe"]["n"], 8);
    // The model is random and refuses nothing: there is no direction to add.
    assert!(sites[0]["refusal"].is_null());
    let text = features(&["--show", "sites"]).succeeded().stdout;
    assert_eq!(text.lines().count(), names.len() + 1, "{text}");

    let written = features(&["--export", "neuronpedia", "--out", "np"]).succeeded();
    assert!(written.stdout.contains("4 features"), "{written:?}");
    let batch = fs::read(place.path("np/batch-0.json")).unwrap();
    let batch: serde_json::Value = serde_json::from_slice(&batch).unwrap();
    assert_eq!(batch["layer"], 0);
    let first = &batch["features"][0];
    let heights = first["logits_hist_data_bar_heights"].as_array().unwrap();
    assert_eq!(heights.len(), 50);
    let values = first["activations"][0]["values"].as_array().unwrap();
    let tokens = first["activations"][0]["tokens"].as_array().unwrap();
    assert_eq!(values.len(), tokens.len());
    features(&["--export", "neuronpedia"]).refused(2, &["--out"]);
    features(&["--export", "neuronpedia", "--out", "tiny.toml"]).refused(1, &["tiny.toml"]);
}

#[test]
fn a_harvest_is_a_safetensors_file() {
    let place = Place::new();
    let model = model();
    let args = [
        "-q",
        "harvest",
        "--prompts",
        "prompts.jsonl",
        "--site",
        "layers.1",
        "--out",
        "a.safetensors",
    ];
    let args = args
        .iter()
        .map(AsRef::as_ref)
        .chain(["--model".as_ref(), model.as_os_str()]);
    place.run(args).succeeded();
    let bytes = fs::read(place.path("a.safetensors")).unwrap();
    let n = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + n]).unwrap();
    let shape = header["activations"]["shape"].as_array().unwrap();
    assert_eq!(shape[1], 64);
    let rows = shape[0].as_u64().unwrap() as usize;
    assert_eq!(bytes.len(), 8 + n + rows * 64 * 4 + rows * 4);
    for (option, wrong, named) in [
        ("--site", "layers.99", "blocks.99"),
        ("--site", "layer.7", "layer.7"),
        ("--out", "absent/a", "absent/a"),
    ] {
        let args = ["harvest", option, wrong, "--model"].map(OsStr::new);
        let out = place.run(args.into_iter().chain([model.as_os_str()]));
        out.refused(1, &[named]);
    }
}

#[test]
fn quiet_is_quiet_and_verbose_says_why() {
    let place = Place::new();
    let model = model();
    let inspect = |flag: &str| {
        let args = [flag.as_ref(), "inspect".as_ref(), model.as_os_str()];
        place.run(args).succeeded()
    };
    assert!(inspect("-q").stderr.is_empty());
    assert!(inspect("-v").stderr.contains("threads"));
    let models = |flag: &str| place.run([flag, "models"]).succeeded().stdout;
    assert_eq!(models("-q"), models("-v"));
    let out = place.run(["-v", "report", "--out", "x", "runs"]);
    out.refused(1, &["error: "]);
    place.run(["-q", "-v", "models"]).refused(2, &["--verbose"]);
}

#[test]
fn a_reader_that_leaves_is_no_failure() {
    let place = Place::new();
    let gguf = testdata().join("models/chat/model.gguf");
    let commands: [&[&OsStr]; 4] = [
        &["models".as_ref()],
        &["completions".as_ref(), "bash".as_ref()],
        &["inspect".as_ref(), "--tensors".as_ref(), gguf.as_os_str()],
        &["study".as_ref(), "tiny.toml".as_ref(), "--dry-run".as_ref()],
    ];
    for command in commands {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let mut child = place.command(command).stdout(writer).spawn().unwrap();
        let status = child.wait().unwrap();
        let out = ended(child.wait_with_output().unwrap());
        assert!(status.success(), "{command:?}: {out:?}");
        assert!(
            out.stderr.is_empty() || !out.stderr.contains("panicked"),
            "{out:?}"
        );
    }
}

#[cfg(unix)]
#[test]
fn arguments_that_are_not_utf8() {
    use std::os::unix::ffi::OsStrExt;
    let place = Place::new();
    let odd = OsStr::from_bytes(b"caf\xe9.gguf");
    let commands: [&[&OsStr]; 4] = [
        &["inspect".as_ref(), odd],
        &["generate".as_ref(), odd],
        &["study".as_ref(), odd],
        &["pull".as_ref(), odd],
    ];
    for command in commands {
        place.run(command).refused(2, &[]);
    }
    // A path may be anything.
    place
        .run(["sae".as_ref(), "info".as_ref(), odd])
        .refused(1, &["caf"]);
}

#[test]
fn completions_for_every_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let out = place.run(["completions", shell]).succeeded();
        assert!(out.stdout.contains("demur"), "{shell}");
    }
    place
        .run(["completions", "cmd"])
        .refused(2, &["cmd", "zsh"]);
}

/// Every figure is there and positive; how large is for no test to say.
#[test]
fn bench_lm_measures_what_it_says() {
    let place = Place::new();
    let model = model();
    let text = place.path("text.txt");
    std::fs::write(
        &text,
        "The rain in Spain falls mainly on the plain. ".repeat(20),
    )
    .unwrap();
    let text = text.to_str().unwrap();
    let plan = "version = 1\nname = \"push\"\n[[interventions]]\nsite = \"layers.0\"\n";
    let direction = format!(
        "direction = {{ name = \"d\", vector = {:?}, op = \"add\", value = 1.0 }}\n",
        [1.0; 64]
    );
    fs::write(place.path("plan.toml"), plan.to_owned() + &direction).unwrap();
    let args = "bench lm --rounds 1 --soak 20 --plan plan.toml --json --text";
    let args = args.split(' ').chain([text, "--model"]).map(OsStr::new);
    let ended = place.run(args.chain([model.as_os_str()])).succeeded();
    let figures = ended.json();
    for key in [
        "prefill_tok_s",
        "decode_tok_s",
        "decode16_tok_s",
        "steered16_tok_s",
        "plan_prefill_tok_s",
        "plan16_tok_s",
        "harvest_tok_s",
        "read_gb_s",
        "decode_share_of_read",
        "soak_first_tok_s",
        "soak_last_tok_s",
        "text_tokens",
        "ppl_int8",
        "kl_int8",
        "kl_bf16",
    ] {
        assert!(figures[key].as_f64().is_some_and(|v| v > 0.0), "{key}");
    }
    assert!(figures["isa"].is_string() && figures["threads"].is_u64());
    // What is left of the f32 perplexity is rounding.
    let off = figures["ppl_int8_off"].as_f64().unwrap();
    assert!(off != 0.0 && off.abs() < 0.05, "{off}");
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let place = Place::new();
    let model = model();
    let rows = |threads: &str| {
        let file = format!("{threads}.safetensors");
        let args = ["harvest", "--limit", "20", "--site", "layers.1", "--quiet"];
        let args = args
            .into_iter()
            .chain(["--threads", threads, "--out", &file, "--model"]);
        place
            .run(args.map(OsStr::new).chain([model.as_os_str()]))
            .succeeded();
        fs::read(place.path(&file)).unwrap()
    };
    let one = rows("1");
    assert!(one.len() > 10_000);
    for threads in ["2", "3", "4", "5", "6", "7", "8"] {
        assert!(rows(threads) == one, "{threads} threads");
    }
}
