//! Files that are not what they should be: cut, bit-flipped, of wrong types, nested without end. Each
//! is a failure with one clear line, never a panic, and nothing half-written is left. What the readers
//! themselves do with every broken byte is tested where they are; here is the way through the binary.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::support::{Ended, Place, model, testdata};

/// Numbers that look random and are the same in every run (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % n as u64) as usize
    }
}

/// Ends well, or with a failure that names the file or what is wrong in it, on few lines.
#[track_caller]
fn no_panic(ended: &Ended, what: &str) {
    assert!(!ended.stderr.contains("panicked"), "{what}: {ended:#?}");
    match ended.code {
        Some(0) => {}
        Some(1) => {
            let error = ended.stderr.lines().filter(|l| l.starts_with("error: "));
            assert_eq!(error.count(), 1, "{what}: {ended:#?}");
        }
        other => panic!("{what}: ended with {other:?}: {ended:#?}"),
    }
}

fn generate(place: &Place, model: &Path) -> Ended {
    let args = ["-q", "generate", "--max-new-tokens=2", "--model"];
    let args = args.iter().map(AsRef::as_ref);
    place.run(args.chain([model.as_os_str(), "hi there".as_ref()]))
}

#[test]
fn a_gguf_that_is_cut_or_flipped() {
    let place = Place::new();
    let file = place.path("model.gguf");
    let bytes = fs::read(model()).unwrap();
    let mut numbers = Numbers(1);
    for i in 0..24 {
        let n = if i < 12 {
            numbers.below(6000)
        } else {
            numbers.below(bytes.len())
        };
        fs::write(&file, &bytes[..n]).unwrap();
        generate(&place, &file).refused(1, &["model.gguf"]);
        place
            .run(["inspect", "model.gguf"])
            .refused(1, &["model.gguf"]);
    }
    // The first 5,000 bytes are metadata and the table of tensors: vocabulary, merges, template.
    for i in 0..120 {
        let mut broken = bytes.clone();
        let at = if i < 100 {
            numbers.below(5000)
        } else {
            numbers.below(bytes.len())
        };
        broken[at] ^= 1 << numbers.below(8);
        fs::write(&file, &broken).unwrap();
        no_panic(&generate(&place, &file), &format!("byte {at} flipped"));
        no_panic(
            &place.run(["inspect", "model.gguf"]),
            &format!("byte {at} flipped"),
        );
    }
    // A length of all ones, wherever a length may be.
    for at in (8..4900).step_by(61) {
        let mut broken = bytes.clone();
        broken[at..at + 8].fill(0xff);
        fs::write(&file, &broken).unwrap();
        no_panic(&generate(&place, &file), &format!("ones at byte {at}"));
    }
}

#[test]
fn a_safetensors_folder_that_is_broken() {
    let place = Place::new();
    let folder = place.path("model");
    let fresh = || {
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir(&folder).unwrap();
        for entry in fs::read_dir(testdata().join("models/llama-sharded")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
        }
    };
    let inspect = || place.run(["inspect", "model"]);
    fresh();
    inspect().succeeded();
    let deep = "[".repeat(200_000);
    let index = "model.safetensors.index.json";
    let shard = "model-00001-of-00002.safetensors";
    let cases: [(&str, &[u8], &str); 10] = [
        ("config.json", b"{\"model_type\": \"llama\"", "config.json"),
        ("config.json", deep.as_bytes(), "config.json"),
        ("config.json", b"{\"model_type\": 7}", "model_type"),
        ("config.json", b"{\"model_type\": \"lama\"}", "lama"),
        (
            index,
            b"{\"weight_map\": {\"a\": \"../../etc/passwd\"}}",
            "outside",
        ),
        (
            index,
            b"{\"weight_map\": {\"a\": \"absent.safetensors\"}}",
            "absent.safetensors",
        ),
        (index, b"[]", "weight_map"),
        (shard, b"\xff\xff\xff\xff\xff\xff\xff\xff{}", shard),
        (shard, b"\x02\0\0\0\0\0\0\0[]", shard),
        (shard, b"", shard),
    ];
    for (file, text, names) in cases {
        fresh();
        fs::write(folder.join(file), text).unwrap();
        inspect().refused(1, &[names]);
    }
    for (key, value) in [
        ("hidden_size", "1e300"),
        ("hidden_size", "-4"),
        ("num_hidden_layers", "4000000000"),
        ("num_attention_heads", "0"),
        ("num_key_value_heads", "3"),
        ("head_dim", "18446744073709551615"),
        ("rms_norm_eps", "\"small\""),
        ("max_position_embeddings", "0"),
    ] {
        fresh();
        let text = fs::read(folder.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&text).unwrap();
        config[key] = serde_json::from_str(value).unwrap();
        fs::write(folder.join("config.json"), config.to_string()).unwrap();
        let ended = inspect();
        assert_eq!(ended.code, Some(1), "{key} = {value}: {ended:#?}");
        no_panic(&ended, &format!("{key} = {value}"));
    }
    // A tokenizer beside it that is none.
    for text in [
        "",
        "{}",
        "[]",
        "{\"model\": {\"type\": \"BPE\"}}",
        &deep,
        "\u{0}",
    ] {
        fresh();
        fs::write(folder.join("tokenizer.json"), text).unwrap();
        generate(&place, &folder).refused(1, &["tokenizer.json"]);
    }
}

#[test]
fn an_sae_folder_that_is_broken() {
    let place = Place::new();
    place
        .run(["-q", "sae", "train", "tiny.toml", "--runs", "runs"])
        .succeeded();
    let folder = place.path("runs/tiny/train/sae");
    let info = |what: &str, expect: Option<&str>| {
        let args = ["sae".as_ref(), "info".as_ref(), folder.as_os_str()];
        let ended = place.run(args);
        match expect {
            Some(names) => ended.refused(1, &[names]),
            None => no_panic(&ended, what),
        }
    };
    let files = ["cfg.json", "sae_weights.safetensors", "manifest.json"];
    let whole: Vec<Vec<u8>> = files
        .iter()
        .map(|f| fs::read(folder.join(f)).unwrap())
        .collect();
    let mut numbers = Numbers(2);
    for (file, bytes) in files.iter().zip(&whole) {
        for _ in 0..6 {
            fs::write(folder.join(file), &bytes[..numbers.below(bytes.len() - 1)]).unwrap();
            info(file, Some(file));
        }
        for _ in 0..10 {
            let mut broken = bytes.clone();
            let at = numbers.below(bytes.len());
            broken[at] ^= 1 << numbers.below(8);
            fs::write(folder.join(file), &broken).unwrap();
            info(&format!("{file}, byte {at}"), None);
        }
        fs::write(folder.join(file), bytes).unwrap();
    }
    // Without the sums there is only the layout to go by.
    fs::remove_file(folder.join("manifest.json")).unwrap();
    info("no manifest", None);
    for _ in 0..40 {
        let mut broken = whole[1].clone();
        let at = numbers.below(400);
        broken[at] ^= 1 << numbers.below(8);
        fs::write(folder.join(files[1]), &broken).unwrap();
        info(&format!("weights, byte {at}"), None);
    }
    let mut not_finite = whole[1].clone();
    let n = not_finite.len();
    not_finite[n - 2..].copy_from_slice(&0x7e00u16.to_le_bytes()); // an f16 NaN
    fs::write(folder.join(files[1]), &not_finite).unwrap();
    info("NaN", Some("finite"));
}

#[test]
fn a_study_with_broken_files() {
    let place = Place::new();
    let toml = fs::read_to_string(place.path("tiny.toml")).unwrap();
    let study = |names: &[&str]| {
        place
            .run(["-q", "study", "tiny.toml", "--runs", "runs"])
            .refused(1, names);
        assert!(!place.path("runs/tiny/record.json").exists());
    };
    // The study itself.
    let deep = format!("x = {}", "[".repeat(100_000));
    for text in [
        "name = ",
        "\u{0}",
        "name = 7\n[sae]\nsite = \"layers.0\"",
        &deep,
        "nmae = \"x\"",
    ] {
        fs::write(place.path("tiny.toml"), text).unwrap();
        study(&["tiny.toml"]);
    }
    fs::write(place.path("tiny.toml"), b"name = \"\xff\"").unwrap();
    study(&["tiny.toml"]);
    for value in ["nan", "inf", "-1.0", "[]", "1e400"] {
        let text = toml.replace("epochs = 12.0", &format!("epochs = {value}"));
        fs::write(place.path("tiny.toml"), text).unwrap();
        study(&["epochs"]);
    }
    fs::write(place.path("tiny.toml"), &toml).unwrap();
    // Its prompts.
    let prompts = fs::read_to_string(place.path("prompts.jsonl")).unwrap();
    let first = prompts.lines().next().unwrap();
    let put = |text: &str| fs::write(place.path("prompts.jsonl"), text).unwrap();
    put(&format!("{prompts}{}", &first[..first.len() / 2]));
    study(&["prompts.jsonl:25"]);
    put(&format!("{prompts}{first}"));
    study(&["prompts.jsonl:25", "discovery-unsafe-0"]);
    put(&prompts.replacen("\"unsafe\"", "\"usnafe\"", 1));
    study(&["prompts.jsonl:1", "usnafe"]);
    put(&prompts.replace("a test bomb", "a discovery bomb"));
    study(&[
        "prompts.jsonl",
        "discovery-unsafe-0",
        "test-unsafe-0",
        "split",
    ]);
    put("");
    study(&["prompt"]);
    put(&prompts);
    // A corpus.
    let corpus = |bytes: &[u8], names: &[&str]| {
        let mut file = fs::File::create(place.path("corpus.jsonl")).unwrap();
        file.write_all(bytes).unwrap();
        let text = toml.replace("[corpus]", "[corpus]\nfiles = [\"corpus.jsonl\"]");
        fs::write(place.path("tiny.toml"), text).unwrap();
        study(names);
    };
    corpus(
        b"{\"text\": \"a\"}\n{\"txet\": \"b\"}\n",
        &["corpus.jsonl:2"],
    );
    corpus(b"{\"text\": 7}\n", &["corpus.jsonl:1"]);
    corpus(b"\n\xff\xfe\n", &["corpus.jsonl:2"]);
    corpus(&[b'['; 100_000], &["corpus.jsonl:1"]);
    fs::remove_file(place.path("corpus.jsonl")).unwrap();
    study(&["corpus.jsonl"]);
}

#[test]
fn a_plan_that_is_broken() {
    let place = Place::new();
    let plan = |name: &str, text: &str, names: &[&str]| {
        fs::write(place.path(name), text).unwrap();
        place.run(["plan", "check", name]).refused(1, names);
        let model = model();
        let args = ["-q", "generate", "--plan", name, "--model"];
        let args = args.iter().map(AsRef::as_ref);
        place
            .run(args.chain([model.as_os_str(), "hi".as_ref()]))
            .refused(1, names);
    };
    let good = "version = 1\nname = \"p\"\n[saes]\nmain = \"\"\n[[interventions]]\nsite = \"layers.0\"\nsae = \"main\"\n";
    let edit =
        |value: &str| format!("{good}edits = [{{ latent = 1, op = \"set\", value = {value} }}]\n");
    plan("p.toml", &edit("nan"), &["p.toml", "value"]);
    plan("p.toml", &edit("\"much\""), &["p.toml"]);
    plan(
        "p.toml",
        &edit("1.0").replace("latent", "latnet"),
        &["p.toml", "latnet"],
    );
    plan(
        "p.toml",
        &edit("1.0").replace("version = 1", "version = 99"),
        &["p.toml", "99"],
    );
    plan("p.toml", good, &["p.toml", "does nothing"]);
    plan("p.toml", "\u{0}", &["p.toml"]);
    plan("p.json", &"[".repeat(100_000), &["p.json"]);
    plan("p.json", "{\"version\": 1", &["p.json"]);
    place
        .run(["plan", "check", "absent.toml"])
        .refused(1, &["absent.toml"]);
    fs::write(place.path("p.toml"), b"\xff\xfe").unwrap();
    place
        .run(["plan", "check", "p.toml"])
        .refused(1, &["p.toml"]);
}

#[test]
fn a_record_that_is_broken() {
    let place = Place::new();
    place.study("runs");
    let run = place.path("runs/tiny");
    let file = run.join("record.json");
    let report = run.join("report.html");
    let (bytes, page) = (fs::read(&file).unwrap(), fs::read(&report).unwrap());
    let shown = |command: &[&str]| {
        let run: PathBuf = run.clone();
        place.run(command.iter().map(AsRef::as_ref).chain([run.as_os_str()]))
    };
    let mut numbers = Numbers(3);
    for _ in 0..6 {
        fs::write(&file, &bytes[..numbers.below(bytes.len() - 1)]).unwrap();
        shown(&["report"]).refused(1, &["record.json"]);
        shown(&["features", "--run"]).refused(1, &["record.json"]);
        assert_eq!(
            fs::read(&report).unwrap(),
            page,
            "a page of a broken record"
        );
    }
    for _ in 0..20 {
        let mut broken = bytes.clone();
        let at = numbers.below(bytes.len());
        broken[at] ^= 1 << numbers.below(8);
        fs::write(&file, &broken).unwrap();
        // It may still be a record.
        no_panic(&shown(&["report"]), &format!("byte {at} flipped"));
        no_panic(
            &shown(&["features", "--run"]),
            &format!("byte {at} flipped"),
        );
    }
    let text = String::from_utf8(bytes).unwrap();
    fs::write(&file, text.replacen("\"schema\": ", "\"schema\": 9", 1)).unwrap();
    shown(&["report"]).refused(1, &["record.json", "schema"]);
}
