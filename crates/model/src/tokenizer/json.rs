//! The tokenizer beside a safetensors checkpoint: `tokenizer.json` and the small files around it.
//!
//! `tokenizer.json` holds the whole pipeline. Which tokens begin and end a text is spread over
//! four more files whose contents overlap; all of them are asked, in the order of how much they
//! are to be believed.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use serde_json::Value;
use tokenizers::{AddedToken, Model, ModelWrapper, NormalizedString, Normalizer};

use super::detokenize::{Spelling, TokenBytes, TokenKind};
use super::markers::{Marker, Markers, looks_like_control};
use super::{Pieces, Tokenizer};
use crate::error::{ModelError, Result};

/// No published `tokenizer.json` is near: Gemma's has 33 MB.
const MAX_BYTES: u64 = 512 << 20;
/// As for GGUF: an id beyond this is no id.
const MAX_TOKENS: u32 = 1 << 22;

/// What is looked at before the file is read as a whole.
#[derive(serde::Deserialize)]
struct Parts {
    normalizer: Option<Value>,
    #[serde(rename = "decoder")]
    _decoder: Option<Value>,
    model: PartsOfModel,
}

#[derive(serde::Deserialize)]
struct PartsOfModel {
    continuing_subword_prefix: Option<String>,
}

/// See [`Tokenizer::from_file`].
pub(super) fn load(path: &Path) -> Result<Tokenizer> {
    let name = path.display().to_string();
    let broken = |problem: String| ModelError::tokenizer(&name, problem);
    let size = fs::metadata(path).map_err(|e| broken(e.to_string()))?.len();
    if size > MAX_BYTES {
        return Err(broken(format!("{size} bytes; the limit is {MAX_BYTES}")));
    }
    let bytes = fs::read(path).map_err(|e| broken(e.to_string()))?;
    // The crate that reads the file panics on a decoder that is not JSON, on a broken charsmap, and
    // on a merge that is shorter than the prefix.
    let parts: Parts = serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()))?;
    if parts.normalizer.is_some_and(|n| has_precompiled(&n)) {
        return Err(broken(
            "the normalizer is Precompiled, which goes with Unigram models only".into(),
        ));
    }
    let prefix = parts.model.continuing_subword_prefix.as_deref();
    if prefix.is_some_and(|p| !p.is_empty()) {
        return Err(broken(
            "continuing_subword_prefix is set, which goes with WordPiece models only".into(),
        ));
    }
    let file = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|e| broken(e.to_string()))?;
    let ModelWrapper::BPE(bpe) = file.get_model() else {
        return Err(broken(
            "the model is not BPE, the only one that is supported".into(),
        ));
    };
    let mut bpe = bpe.clone();
    // Dropout is for training: it makes ids random.
    bpe.dropout = None;

    let decoder = type_names(&file.get_decoder());
    let spelling = if decoder.contains("ByteLevel") {
        Spelling::ByteLevel
    } else if decoder.contains("ByteFallback") || decoder.contains("Metaspace") {
        Spelling::SentencePiece
    } else {
        let problem = "the decoder is neither ByteLevel nor ByteFallback or Metaspace";
        return Err(broken(problem.into()));
    };
    let strip_leading_space = decoder.contains("Strip") || decoder.contains("Metaspace");

    let added: Vec<(u32, AddedToken)> = file.get_added_tokens_decoder().into_iter().collect();
    let vocab = Model::get_vocab(&bpe);
    let last = vocab
        .values()
        .chain(added.iter().map(|(id, _)| id))
        .max()
        .copied();
    let Some(last) = last.filter(|&id| id < MAX_TOKENS) else {
        return Err(broken(format!(
            "ids must be at least one and below {MAX_TOKENS}"
        )));
    };
    let mut texts = vec![("", TokenKind::Spelled); last as usize + 1];
    for (text, id) in &vocab {
        texts[*id as usize].0 = text;
    }
    for (id, token) in &added {
        let kind = if is_control(token) {
            TokenKind::Control
        } else if spelling == Spelling::SentencePiece {
            // Gemma's runs of spaces are spelled as its other pieces are.
            TokenKind::Spelled
        } else {
            TokenKind::Verbatim
        };
        texts[*id as usize] = (&token.content, kind);
    }
    let token_bytes = TokenBytes::new(texts.into_iter(), spelling, strip_leading_space);

    let normalizer = file.get_normalizer().cloned();
    let (late, early): (Vec<_>, Vec<_>) = added.iter().partition(|(_, token)| token.normalized);
    let late = late.into_iter().map(|(id, token)| {
        let mut text = NormalizedString::from(token.content.as_str());
        if let Some(normalizer) = &normalizer {
            normalizer
                .normalize(&mut text)
                .map_err(|e| broken(e.to_string()))?;
        }
        Ok(marker(*id, token, text.get()))
    });
    let late = late.collect::<Result<Vec<_>>>()?;

    let template_bos = leading_special(&file.get_post_processor());
    let tokenizer = Tokenizer {
        markers: Markers::new(
            early
                .into_iter()
                .map(|(id, token)| marker(*id, token, &token.content)),
        ),
        normalized_markers: Markers::new(late),
        normalizer,
        pre_tokenizer: file.get_pre_tokenizer().cloned(),
        pieces: Pieces::Bpe(Box::new(bpe)),
        bytes: token_bytes.into(),
        bos: None,
        add_bos: false,
        eos: Vec::new(),
    };
    with_sidecars(tokenizer, path, template_bos)
}

/// Whether a normaliser, or one in a sequence of them, is `Precompiled`: by its type, or without one by
/// its key. The crate follows its table without looking, out of it if need be.
fn has_precompiled(value: &Value) -> bool {
    match value {
        Value::Object(map) => {
            map.get("type").is_some_and(|t| t == "Precompiled")
                || map.contains_key("precompiled_charsmap")
                || map.values().any(has_precompiled)
        }
        Value::Array(list) => list.iter().any(has_precompiled),
        _ => false,
    }
}

fn is_control(token: &AddedToken) -> bool {
    token.special || looks_like_control(&token.content)
}

fn marker(id: u32, token: &AddedToken, text: &str) -> Marker {
    Marker {
        id,
        text: text.to_owned(),
        control: is_control(token),
        single_word: token.single_word,
        lstrip: token.lstrip,
        rstrip: token.rstrip,
    }
}

/// Sets bos and eos from the files beside `tokenizer.json`.
fn with_sidecars(
    mut tokenizer: Tokenizer,
    path: &Path,
    template_bos: Option<String>,
) -> Result<Tokenizer> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let config = Sidecar::read(folder, "tokenizer_config.json")?;
    let map = Sidecar::read(folder, "special_tokens_map.json")?;
    let generation = Sidecar::read(folder, "generation_config.json")?;
    let model = Sidecar::read(folder, "config.json")?;

    let id_by_name = |key: &str| {
        let name = config.token(key).or_else(|| map.token(key));
        name.and_then(|name| tokenizer.id_of(&name))
    };
    let by_id = || {
        generation
            .ids("bos_token_id")
            .into_iter()
            .chain(model.ids("bos_token_id"))
    };
    let bos = id_by_name("bos_token").or_else(|| by_id().next());
    let mut ends: Vec<u32> = id_by_name("eos_token").into_iter().collect();
    ends.extend(generation.ids("eos_token_id"));
    ends.extend(model.ids("eos_token_id"));

    let size = tokenizer.vocab_size();
    tokenizer.bos = bos.filter(|&id| (id as usize) < size);
    let template_bos = template_bos.and_then(|name| tokenizer.id_of(&name));
    tokenizer.add_bos = match config.0.get("add_bos_token").and_then(Value::as_bool) {
        Some(add) => add,
        None => template_bos.is_some() && template_bos == tokenizer.bos,
    };
    Ok(tokenizer.with_ends(ends))
}

/// A small JSON file that may be absent.
pub(crate) struct Sidecar(pub Value);

impl Sidecar {
    /// Reads `folder/name`; an absent file is an empty one.
    pub fn read(folder: &Path, name: &str) -> Result<Self> {
        let path = folder.join(name);
        let broken = |problem: String| ModelError::tokenizer(&path.display().to_string(), problem);
        match fs::read(&path) {
            Ok(bytes) => {
                let value = serde_json::from_slice(&bytes).map_err(|e| broken(e.to_string()))?;
                Ok(Self(value))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Self(Value::Null)),
            Err(e) => Err(broken(e.to_string())),
        }
    }

    /// A token by name: `"<s>"` or `{"content": "<s>"}`.
    pub fn token(&self, key: &str) -> Option<String> {
        let value = self.0.get(key)?;
        let name = value.as_str().or_else(|| value.get("content")?.as_str());
        name.map(str::to_owned)
    }

    /// One id or a list of ids.
    fn ids(&self, key: &str) -> Vec<u32> {
        let value = self.0.get(key);
        let list = match value {
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
            None => &[],
        };
        list.iter()
            .filter_map(|id| u32::try_from(id.as_u64()?).ok())
            .collect()
    }
}

/// The `type` names anywhere in a part of the pipeline.
fn type_names(part: &impl serde::Serialize) -> HashSet<String> {
    fn collect(value: &Value, names: &mut HashSet<String>) {
        match value {
            Value::Object(map) => {
                names.extend(map.get("type").and_then(Value::as_str).map(str::to_owned));
                map.values().for_each(|v| collect(v, names));
            }
            Value::Array(list) => list.iter().for_each(|v| collect(v, names)),
            _ => {}
        }
    }
    let mut names = HashSet::new();
    collect(&serde_json::to_value(part).unwrap_or_default(), &mut names);
    names
}

/// The token that a post-processing template puts in front of a single text.
fn leading_special(post_processor: &impl serde::Serialize) -> Option<String> {
    fn find(value: &Value) -> Option<String> {
        match value {
            Value::Object(map)
                if map.get("type").and_then(Value::as_str) == Some("TemplateProcessing") =>
            {
                let first = map.get("single")?.as_array()?.first()?;
                Some(first.get("SpecialToken")?.get("id")?.as_str()?.to_owned())
            }
            Value::Object(map) => map.values().find_map(find),
            Value::Array(list) => list.iter().find_map(find),
            _ => None,
        }
    }
    find(&serde_json::to_value(post_processor).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
        "normalizer": {"type": "NFC"}, "decoder": {"type": "ByteLevel", "add_prefix_space": false,
        "trim_offsets": true, "use_regex": true}}"#;

    #[track_caller]
    fn refused(from: &str, to: &str, expect: &str) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        fs::write(&path, GOOD).unwrap();
        Tokenizer::from_file(&path).unwrap();
        assert!(GOOD.contains(from), "the case changes nothing");
        fs::write(&path, GOOD.replace(from, to)).unwrap();
        let message = Tokenizer::from_file(&path).unwrap_err().to_string();
        assert!(message.contains(expect), "{message}");
    }

    /// Found by the fuzzer, and what lies beside it.
    #[test]
    fn what_makes_the_tokenizers_crate_panic_is_an_error() {
        refused(r#""ByteLevel""#, "teB", "expected ident");
        refused(r#""NFC""#, r#""Precompiled""#, "Precompiled");
        refused(
            r#"{"type": "NFC"}"#,
            r#"{"type": "Sequence", "normalizers": [{"precompiled_charsmap": "AAAA"}]}"#,
            "Precompiled",
        );
    }
}
