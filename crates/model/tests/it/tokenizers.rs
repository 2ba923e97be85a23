//! Difficult texts through tokenizers of every kind: the ids are those of the reference.
//!
//! `testdata/oracle/make_tokenizers.py` made the vocabularies and asked `transformers` and
//! `sentencepiece`; each is read from a GGUF file and from `tokenizer.json`.

use std::path::PathBuf;

use demur_model::checkpoint::Checkpoint;
use demur_model::tokenizer::{Special, Tokenizer};
use serde::Deserialize;

/// A text with its ids: control tokens as characters, and parsed.
#[derive(Deserialize)]
pub struct Difficult {
    text: String,
    as_text: Vec<u32>,
    parsed: Vec<u32>,
    /// The text of `as_text`, where it was asked for.
    decoded: Option<String>,
}

impl Difficult {
    #[track_caller]
    pub fn check(&self, what: &str, tokenizer: &Tokenizer) {
        let text = &self.text;
        for (special, expected) in [
            (Special::AsText, &self.as_text),
            (Special::Parse, &self.parsed),
        ] {
            let found = tokenizer.encode(text, special).unwrap();
            assert_eq!(&found, expected, "{what}, {special:?}: {text:?}");
        }
        if let Some(decoded) = &self.decoded {
            let found = tokenizer.decode(&self.as_text);
            assert_eq!(&found, decoded, "{what}, decoded: {text:?}");
        }
    }
}

fn check(kind: &str) {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/tokenizers")
        .join(kind);
    let golden = std::fs::read(folder.join("golden.json")).unwrap();
    let golden: Vec<Difficult> = serde_json::from_slice(&golden).unwrap();
    let checkpoint = Checkpoint::open(&folder.join("model.gguf")).unwrap();
    let from_gguf = Tokenizer::from_checkpoint(&checkpoint).unwrap();
    let from_json = Tokenizer::from_file(&folder.join("tokenizer.json")).unwrap();
    assert!(golden.len() >= 50, "{} texts", golden.len());
    let marked = golden.iter().filter(|d| d.as_text != d.parsed).count();
    assert!(marked >= 1, "no text holds a control token");
    for text in &golden {
        text.check(&format!("{kind} of a GGUF"), &from_gguf);
        text.check(&format!("{kind} of a tokenizer.json"), &from_json);
    }
}

#[test]
fn byte_level_qwen2() {
    check("qwen2");
}

#[test]
fn byte_level_gpt2() {
    check("gpt2");
}

#[test]
fn byte_level_smollm() {
    check("smollm");
}

#[test]
fn byte_level_llama3() {
    check("llama3");
}

#[test]
fn sentence_piece_with_a_dummy_prefix() {
    check("llama");
}

#[test]
fn sentence_piece_without() {
    check("gemma");
}
