//! Checkpoints and tokenizers that are not what they should be. Whatever the bytes are, reading them
//! ends in a value or in an error: a panic would fail these tests.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_model::ModelError;
use demur_model::chat::{ChatTemplate, Message};
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Model;
use demur_model::generate::{Engine, EngineConfig, Request};
use demur_model::tokenizer::Tokenizer;
use proptest::collection::vec;
use proptest::prelude::*;

use crate::support::path;

/// Opens what is at `path` and uses all of it: weights, tokenizer, template, a few tokens.
fn use_up(path: &Path) -> Result<(), ModelError> {
    let checkpoint = Arc::new(Checkpoint::open(path)?);
    let tokenizer = Tokenizer::from_checkpoint(&checkpoint);
    let chat = ChatTemplate::from_checkpoint(&checkpoint);
    let model = Model::load(&checkpoint, Precision::Fast)?;
    let (tokenizer, chat) = (tokenizer?, chat?);
    let message = Message {
        role: "user".to_owned(),
        content: "the <|im_end|> ten 10 \u{e9}\u{1f600}\n".to_owned(),
    };
    let r = chat.encode(&tokenizer, &[message], true)?;
    let mut engine = Engine::new(&model, &tokenizer, EngineConfig::default());
    engine.run(vec![Request::new(r.ids, r.roles, 3)], |_, output| {
        assert!(output.tokens.len() <= 3);
    })?;
    Ok(())
}

/// Writes `bytes` as a file of that name and uses it up.
fn with_bytes(name: &str, bytes: &[u8]) -> Result<(), ModelError> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(name);
    fs::write(&file, bytes).unwrap();
    use_up(&file)
}

/// A copy of a folder of safetensors, with a change to one of its files.
fn with_changed(
    family: &str,
    file: &str,
    change: impl FnOnce(&mut Vec<u8>),
) -> Result<(), ModelError> {
    let folder = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(path(family)).unwrap() {
        let from = entry.unwrap().path();
        if from
            .extension()
            .is_some_and(|e| e == "json" || e == "safetensors")
        {
            fs::copy(&from, folder.path().join(from.file_name().unwrap())).unwrap();
        }
    }
    let target = folder.path().join(file);
    let mut bytes = fs::read(&target).unwrap();
    change(&mut bytes);
    fs::write(&target, bytes).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(folder.path())?);
    Model::load(&checkpoint, Precision::Fast).map(drop)
}

fn flip(bytes: &mut [u8], flips: &[(prop::sample::Index, u8)]) {
    for (at, bit) in flips {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << (bit % 8);
    }
}

fn flips(most: usize) -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
    vec((any::<prop::sample::Index>(), any::<u8>()), 1..most)
}

/// Metadata and the table of tensors of the chat model; the weights begin behind them.
const HEAD: usize = 5800;

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_gguf_cut_anywhere_is_an_error(part in 0.0..1.0f64) {
        let bytes = fs::read(path("chat/model.gguf")).unwrap();
        let n = (bytes.len() as f64 * part) as usize;
        prop_assert!(with_bytes("m.gguf", &bytes[..n]).is_err());
    }

    #[test]
    fn flips_in_a_gguf_head(flips in flips(4)) {
        let mut bytes = fs::read(path("chat/model.gguf")).unwrap();
        flip(&mut bytes[..HEAD], &flips);
        let _ = with_bytes("m.gguf", &bytes);
    }

    #[test]
    fn flips_in_gguf_weights(flips in flips(64)) {
        let mut bytes = fs::read(path("chat/model.gguf")).unwrap();
        flip(&mut bytes[HEAD..], &flips);
        let _ = with_bytes("m.gguf", &bytes);
    }

    #[test]
    fn lengths_and_counts_of_a_gguf(at in 0..HEAD - 8, value in prop_oneof![
        Just(u64::MAX), Just(i64::MAX as u64), Just(1 << 40), Just(1 << 32), Just(0), any::<u64>(),
    ]) {
        let mut bytes = fs::read(path("chat/model.gguf")).unwrap();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let _ = with_bytes("m.gguf", &bytes);
    }

    #[test]
    fn a_gguf_of_nothing(tail in vec(any::<u8>(), 0..200), version in 0u32..5) {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(version.to_le_bytes());
        bytes.extend(tail);
        prop_assert!(with_bytes("m.gguf", &bytes).is_err());
    }

    #[test]
    fn a_safetensors_file_cut_anywhere_is_an_error(part in 0.0..1.0f64) {
        let cut = |b: &mut Vec<u8>| b.truncate((b.len() as f64 * part) as usize);
        prop_assert!(with_changed("llama", "model.safetensors", cut).is_err());
    }

    #[test]
    fn flips_in_a_safetensors_header(flips in flips(4)) {
        let change = |b: &mut Vec<u8>| flip(&mut b[..2000], &flips);
        let _ = with_changed("llama", "model.safetensors", change);
    }

    #[test]
    fn flips_in_config_and_index(flips in flips(4), file in prop_oneof![
        Just("config.json"), Just("model.safetensors.index.json"),
    ]) {
        let _ = with_changed("llama-sharded", file, |b| flip(b, &flips));
    }

    #[test]
    fn numbers_of_a_config(
        family in prop_oneof![
            Just("llama"), Just("gemma2"), Just("gemma3"), Just("phi3-longrope"), Just("qwen3"),
        ],
        key in any::<prop::sample::Index>(),
        value in prop_oneof![
            Just("0"), Just("-1"), Just("18446744073709551615"), Just("1e308"), Just("-1e308"),
            Just("1e-320"), Just("null"), Just("true"), Just("\"\""), Just("[]"), Just("{}"),
            Just("[[[]]]"), Just("4294967296"), Just("3"),
        ],
    ) {
        let change = |b: &mut Vec<u8>| {
            let mut config: serde_json::Value = serde_json::from_slice(b).unwrap();
            let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
            config[key.get(&keys)] = serde_json::from_str(value).unwrap();
            *b = config.to_string().into_bytes();
        };
        let _ = with_changed(family, "config.json", change);
    }

    #[test]
    fn flips_in_a_tokenizer_json(flips in flips(6), cut in prop::option::of(0.0..1.0f64)) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tokenizer.json");
        let mut bytes = TOKENIZER.as_bytes().to_vec();
        flip(&mut bytes, &flips);
        bytes.truncate((bytes.len() as f64 * cut.unwrap_or(1.0)) as usize);
        fs::write(&file, bytes).unwrap();
        if let Ok(t) = Tokenizer::from_file(&file) {
            let ids = t.encode("abcab <s> c\u{e9}", demur_model::tokenizer::Special::AsText);
            t.decode(&ids.unwrap_or_default());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn values_of_a_tokenizer_json(
        at in any::<prop::sample::Index>(),
        value in prop_oneof![
            Just("null"), Just("0"), Just("-1"), Just("1e999"), Just("4294967296"), Just("true"),
            Just("\"\""), Just("\"Precompiled\""), Just("\"(\""), Just("[]"), Just("{}"),
            Just("{\"type\": \"Precompiled\", \"precompiled_charsmap\": \"AAAA\"}"),
            Just("{\"type\": \"Sequence\", \"decoders\": 7}"),
            Just("{\"type\": \"Replace\", \"pattern\": {\"Regex\": \"(\"}, \"content\": \"\"}"),
            Just("{\"type\": \"Split\", \"pattern\": {\"Regex\": \"(a\"}, \"behavior\": \"Removed\", \"invert\": false}"),
        ],
    ) {
        // The text of the value at a colon, up to the next comma.
        let colons: Vec<usize> = TOKENIZER.match_indices(": ").map(|m| m.0 + 2).collect();
        let from = *at.get(&colons);
        let to = from + TOKENIZER[from..].find([',', '}', '\n']).unwrap();
        for whole in [false, true] {
            // Objects and lists are replaced as a whole where they fit on the line.
            let to = if whole { TOKENIZER[from..].find(",\n").map_or(to, |n| from + n) } else { to };
            let text = format!("{}{value}{}", &TOKENIZER[..from], &TOKENIZER[to..]);
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("tokenizer.json");
            fs::write(&file, text).unwrap();
            if let Ok(t) = Tokenizer::from_file(&file) {
                let ids = t.encode("abcab <s> c\u{e9}", demur_model::tokenizer::Special::AsText);
                t.decode(&ids.unwrap_or_default());
            }
        }
    }
}

/// A byte-level tokenizer of three letters.
const TOKENIZER: &str = r#"{
  "version": "1.0", "truncation": null, "padding": null,
  "added_tokens": [{"id": 5, "content": "<s>", "single_word": false, "lstrip": false,
    "rstrip": false, "normalized": false, "special": true}],
  "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
    "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
    "vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}, "merges": [["a", "b"], ["ab", "c"]]}
}"#;

#[test]
fn the_tokenizer_of_these_tests_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tokenizer.json");
    fs::write(&file, TOKENIZER).unwrap();
    let t = Tokenizer::from_file(&file).unwrap();
    let ids = t
        .encode("abcab", demur_model::tokenizer::Special::AsText)
        .unwrap();
    assert_eq!(ids, [4, 3]);
}

#[test]
fn the_checkpoint_of_these_tests_is_one() {
    use_up(&path("chat/model.gguf")).unwrap();
}

#[test]
fn nested_without_end() {
    let deep = |text: &str| text.repeat(200_000).into_bytes();
    for text in ["[", "{\"a\":"] {
        let e = with_changed("llama", "config.json", |b| *b = deep(text)).unwrap_err();
        assert!(e.to_string().contains("config.json"), "{e}");
        let header = |b: &mut Vec<u8>| {
            let json = deep(text);
            *b = (json.len() as u64).to_le_bytes().to_vec();
            b.extend(json);
        };
        let e = with_changed("llama", "model.safetensors", header).unwrap_err();
        assert!(e.to_string().contains("model.safetensors"), "{e}");
    }
}

#[test]
fn a_head_of_any_width_is_an_error() {
    // It was asked for as many rotary frequencies.
    let e = with_changed("llama", "config.json", |b| {
        let mut config: serde_json::Value = serde_json::from_slice(b).unwrap();
        config["head_dim"] = serde_json::json!(u64::MAX);
        *b = config.to_string().into_bytes();
    });
    assert!(e.unwrap_err().to_string().contains("d_head"));
}
