//! Where suites find their files, and the layouts that the Hub has.

use std::path::Path;

use super::*;

/// A folder with files of `testdata/parquet` under other names.
fn place(files: &[(&str, &str)]) -> tempfile::TempDir {
    let place = tempfile::tempdir().unwrap();
    let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata/parquet");
    for (name, target) in files {
        put(&place, target, &std::fs::read(from.join(name)).unwrap());
    }
    place
}

fn put(place: &tempfile::TempDir, name: &str, bytes: &[u8]) {
    let target = place.path().join(name);
    std::fs::create_dir_all(target.parent().unwrap()).unwrap();
    std::fs::write(target, bytes).unwrap();
}

fn load(place: &tempfile::TempDir, name: &str) -> Result<Vec<Item>, EvalError> {
    suite(name).unwrap().load(&[place.path().to_owned()])
}

#[test]
fn mmlu_as_the_hub_has_it() {
    let dev = (
        "mmlu-dev.parquet",
        "cais/mmlu/all/dev-00000-of-00001.parquet",
    );
    let first = (
        "mmlu-test-0.parquet",
        "cais/mmlu/all/test-00000-of-00002.parquet",
    );
    let second = (
        "mmlu-test-1.parquet",
        "cais/mmlu/all/test-00001-of-00002.parquet",
    );
    let items = load(&place(&[dev, first, second]), "mmlu").unwrap();
    assert_eq!(items.len(), 6);
    // Parts are read one after the other, and subjects go over their borders.
    assert_eq!(items[5].parts, ["mmlu_humanities", "mmlu_world_religions"]);
    let Ask::Choose { context, gold, .. } = &items[5].ask else {
        panic!()
    };
    let end = "Answer: A\n\nIn test 2, what is it?\nA. one\nB. two\nC. 2\nD. é\nAnswer:";
    assert!(context.ends_with(end), "{context}");
    assert!(matches!(gold, Gold::One { index: 2, .. }));
    // The same in the repository's own folder, as `--data` may name it.
    let own = place(&[
        (dev.0, "all/dev-00000-of-00001.parquet"),
        (first.0, "all/test-00000-of-00001.parquet"),
    ]);
    assert_eq!(load(&own, "mmlu").unwrap()[..3], items[..3]);
    // And as JSON Lines of one's own, which has another id.
    let row = r#"{"id": "x", "prompt": "In test 2, what is it?", "category": "world_religions",
        "choices": ["one", "two", "2", "é"], "answer_index": 2}"#;
    let mine = place(&[(dev.0, "mmlu_dev.parquet")]);
    put(&mine, "mmlu_test.jsonl", row.replace('\n', " ").as_bytes());
    assert_eq!(load(&mine, "mmlu").unwrap()[0].ask, items[5].ask);
    // A part is missing.
    let e = load(&place(&[dev, second]), "mmlu").unwrap_err();
    assert!(
        matches!(
            e,
            EvalError::Parts {
                have: 1,
                need: 2,
                ..
            }
        ),
        "{e}"
    );
}

#[test]
fn the_other_sets_as_the_hub_has_them() {
    let place = place(&[
        (
            "arc.parquet",
            "ai2_arc/ARC-Easy/test-00000-of-00001.parquet",
        ),
        (
            "truthfulqa.parquet",
            "truthful_qa/multiple_choice/validation-00000-of-00001.parquet",
        ),
        (
            "gsm8k.parquet",
            "openai/gsm8k/main/test-00000-of-00001.parquet",
        ),
        (
            "gsm8k.parquet",
            "openai/gsm8k/main/train-00000-of-00001.parquet",
        ),
        (
            "wildguardtest.parquet",
            "wildguardmix/test/wildguard_test.parquet",
        ),
    ]);
    let items = load(&place, "arc_easy").unwrap();
    let of = |item: &Item| match &item.ask {
        Ask::Choose { choices, gold, .. } => (choices.clone(), gold.clone()),
        _ => panic!(),
    };
    let (choices, gold) = of(&items[0]);
    assert_eq!(
        (items[0].id.as_str(), choices),
        ("A_1", ["this", "that", "both"].map(str::to_owned).to_vec())
    );
    assert!(matches!(
        gold,
        Gold::One {
            index: 1,
            norm: true,
            ..
        }
    ));
    assert!(matches!(of(&items[1]).1, Gold::One { index: 0, .. }));

    let e = load(&place, "truthfulqa_mc2").unwrap_err();
    assert!(matches!(e, EvalError::Primer { .. }), "{e}");
    let pairs: Vec<String> = (0..6).map(|i| format!("Q: {i}?\nA: {i}.\n")).collect();
    put(&place, PRIMER, pairs.join("\n").as_bytes());
    assert_eq!(
        of(&load(&place, "truthfulqa_mc2").unwrap()[0]).1,
        Gold::True(vec![true, true, false])
    );
    assert_eq!(
        of(&load(&place, "truthfulqa_mc1").unwrap()[0]).0,
        ["Yes.", "No."]
    );

    assert_eq!(load(&place, "gsm8k").unwrap().len(), 9);
    let asked = |suite: &str| match load(&place, suite).unwrap().remove(8).ask {
        Ask::Write { prompt, .. } => prompt,
        _ => panic!(),
    };
    let prompt = asked("gsm8k_cot_train");
    let begin = "Q: What are 0 and 1?\nA: 0 + 1 = 1 The answer is 1.\n\nQ: What are 1 and 1?\n";
    assert!(prompt.starts_with(begin), "{prompt}");
    let e = load(&place, "gsm8k_cot").unwrap_err().to_string();
    assert!(
        e.contains("gsm8k_cot_examples.jsonl") && !e.contains("fetch"),
        "{e}"
    );
    let examples = |n: usize| -> String {
        (0..n)
            .map(|i| format!("{{\"question\": \"{i}?\", \"target\": \"The answer is {i}.\"}}\n"))
            .collect()
    };
    put(&place, "gsm8k_cot_examples.jsonl", examples(7).as_bytes());
    let e = load(&place, "gsm8k_cot").unwrap_err();
    assert!(
        matches!(
            e,
            EvalError::Shots {
                have: 7,
                need: 8,
                ..
            }
        ),
        "{e}"
    );
    put(&place, "gsm8k_cot_examples.jsonl", examples(9).as_bytes());
    let prompt = asked("gsm8k_cot");
    assert!(
        prompt.starts_with("Q: 0?\nA: The answer is 0.\n\nQ: 1?\n"),
        "{prompt}"
    );
    let end = "Q: 7?\nA: The answer is 7.\n\nQ: What are 8 and 1?\nA:";
    assert!(prompt.ends_with(end), "{prompt}");

    let items = load(&place, "wildguardtest").unwrap();
    let labels: Vec<Option<Label>> = items
        .iter()
        .map(|i| match i.ask {
            Ask::Chat { label, .. } => label,
            _ => panic!(),
        })
        .collect();
    let (safe, harmful) = (Some(Label::Safe), Some(Label::Unsafe));
    assert_eq!(labels, [safe, harmful, harmful, None]);
    let parts = ["wildguardtest/theft", "wildguardtest/adversarial"];
    assert_eq!(items[1].parts, parts);
    assert_eq!(items[2].parts[1], "wildguardtest/vanilla");
}

#[test]
fn an_item_is_asked_the_same_whatever_the_limit_takes() {
    let place = place(&[
        ("gsm8k.parquet", "gsm8k_test.parquet"),
        ("gsm8k.parquet", "gsm8k_train.parquet"),
    ]);
    let all = load(&place, "gsm8k").unwrap();
    let some = Pick::Spread { seed: 3 }.take(all.clone(), 4);
    assert_eq!(some.len(), 4);
    assert!(some.iter().all(|s| all.iter().any(|a| a == s)));
    assert_ne!(some[..], all[..4]);
}

#[test]
fn files_are_found_by_name_in_any_format_or_folder() {
    let place = place(&[("wildguardtest.parquet", "a/wildguardtest.parquet")]);
    let (a, b) = (place.path().join("a"), place.path().join("b"));
    let known = suite("wildguardtest").unwrap();
    let path = |data: &[PathBuf]| known.paths(data).map(|p| p[0].clone());
    assert_eq!(
        path(&[b.clone(), a.clone()]).unwrap(),
        a.join("wildguardtest.parquet")
    );
    // A folder of files counts as one; the first of the folders that are named has the word.
    put(&place, "b/wildguardtest/1.jsonl", br#"{"prompt": "one"}"#);
    put(&place, "b/wildguardtest/2.csv", b"prompt\ntwo\n");
    put(&place, "b/wildguardtest/README.md", b"not a row");
    assert_eq!(
        path(&[b.clone(), a.clone()]).unwrap(),
        b.join("wildguardtest")
    );
    let items = known.load(&[b, a.clone()]).unwrap();
    let ids: Vec<&str> = items.iter().map(|i| i.id.as_str()).collect();
    assert_eq!(ids, ["wildguardtest-0", "wildguardtest-1"]);
    assert_eq!(
        find::spelled(&["a", "b", "c.csv"]),
        "a, b (.jsonl .jsonl.gz .csv .csv.gz .json .json.gz .parquet), c.csv"
    );
    // An empty folder is none.
    std::fs::create_dir(a.join("xstest")).unwrap();
    let xstest = suite("xstest").unwrap();
    assert_eq!(
        xstest.absent(std::slice::from_ref(&a)),
        Some(xstest.files[0])
    );
    let e = suite("mmlu").unwrap().paths(&[a]).unwrap_err().to_string();
    let words = [
        "mmlu_test (.jsonl",
        ".parquet",
        "demur eval fetch mmlu",
        "cais/mmlu",
    ];
    assert!(words.iter().all(|w| e.contains(w)), "{e}");
}

#[test]
fn a_damaged_file_is_named() {
    let place = place(&[("arc.parquet", "arc_easy.parquet")]);
    let path = place.path().join("arc_easy.parquet");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&path, &bytes).unwrap();
    let e = load(&place, "arc_easy").unwrap_err().to_string();
    assert!(
        e.contains("arc_easy.parquet") && e.contains("cut off"),
        "{e}"
    );
}
