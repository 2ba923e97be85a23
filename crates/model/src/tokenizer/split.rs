//! The pre-tokenizers of byte-level BPE, as data: how a text is cut into words before merging.
//!
//! GGUF files name the pre-tokenizer (`tokenizer.ggml.pre`) and leave out its expressions, so a
//! reader must know them. Each entry of [`KINDS`] gives the expressions that the published
//! `tokenizer.json` of that family holds, in order: every expression cuts what the one before has
//! left, and what matches no expression stays a piece of its own. A wrong expression gives
//! slightly wrong ids and a slightly worse model, which nobody notices; hence an unknown name is
//! an error and no default is guessed.

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use crate::error::{ModelError, Result};

/// One family of pre-tokenizers.
pub(crate) struct Kind {
    /// The values of `tokenizer.ggml.pre` that mean this kind.
    pub names: &'static [&'static str],
    /// Cut with each of these, in order.
    splits: &'static [&'static str],
    /// Compose Unicode (NFC) before cutting.
    nfc: bool,
    /// A word that is in the vocabulary is taken whole, without merging.
    pub ignore_merges: bool,
    /// Whether a text starts with the bos token when the file does not say.
    pub add_bos: bool,
}

/// GPT-2: contractions, then runs of letters, digits or other marks with one leading space.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";

/// Llama 3 (from cl100k): contractions in any case, digits in groups of up to three.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen 2: as Llama 3, each digit alone.
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral's Tekken: words are cut before a capital, each digit alone.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// o200k (Phi-4 mini): as Tekken with contractions, digits in groups of up to three.
const GPT4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Every pre-tokenizer that is known.
pub(crate) const KINDS: &[Kind] = &[
    Kind {
        names: &["qwen2"],
        splits: &[QWEN2],
        nfc: true,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["stablelm2", "deepseek-r1-qwen"],
        splits: &[QWEN2],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3"],
        splits: &[LLAMA3],
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    Kind {
        names: &["dbrx", "smaug-bpe", "chatglm-bpe"],
        splits: &[LLAMA3],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
        ],
        splits: &[r"\p{N}", GPT2],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"],
        splits: &[GPT2],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["tekken"],
        splits: &[TEKKEN],
        nfc: false,
        ignore_merges: true,
        add_bos: true,
    },
    Kind {
        names: &["gpt-4o"],
        splits: &[GPT4O],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    Kind {
        names: &["falcon"],
        splits: &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, r"[0-9][0-9][0-9]"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
    // What converters wrote before they named the kind.
    Kind {
        names: &["default"],
        splits: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
        nfc: false,
        ignore_merges: false,
        add_bos: false,
    },
];

impl Kind {
    /// The kind of this name.
    ///
    /// # Errors
    /// [`ModelError::UnknownPreTokenizer`], which lists the names that are known.
    pub fn named(name: &str) -> Result<&'static Kind> {
        KINDS
            .iter()
            .find(|kind| kind.names.contains(&name))
            .ok_or_else(|| ModelError::UnknownPreTokenizer {
                name: name.to_owned(),
                known: KINDS
                    .iter()
                    .flat_map(|kind| kind.names)
                    .copied()
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    /// The normalizer that goes before the cut.
    pub fn normalizer(&self) -> Option<NormalizerWrapper> {
        self.nfc.then(|| NFC.into())
    }

    /// The cut, followed by the byte alphabet of GPT-2.
    pub fn pre_tokenizer(&self) -> Result<PreTokenizerWrapper> {
        let mut steps: Vec<PreTokenizerWrapper> = Vec::with_capacity(self.splits.len() + 1);
        for expression in self.splits {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)
                .map_err(|e| ModelError::tokenizer("tokenizer.ggml.pre", e))?;
            steps.push(split.into());
        }
        steps.push(ByteLevel::new(false, false, false).into());
        Ok(Sequence::new(steps).into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

    #[track_caller]
    fn check(kind: &str, text: &str, expect: &[&str]) {
        let pre = Kind::named(kind).unwrap().pre_tokenizer().unwrap();
        let mut cut = PreTokenizedString::from(text);
        pre.pre_tokenize(&mut cut).unwrap();
        let got: Vec<&str> = cut
            .get_splits(OffsetReferential::Original, OffsetType::Byte)
            .into_iter()
            .map(|(_, (start, end), _)| &text[start..end])
            .collect();
        assert_eq!(got, expect, "{kind}");
    }

    #[test]
    fn words_digits_and_spaces() {
        let text = "I'LL pay  12345\r\n\n x";
        check(
            "qwen2",
            text,
            &[
                "I", "'LL", " pay", " ", " ", "1", "2", "3", "4", "5", "\r\n\n", " x",
            ],
        );
        check(
            "llama-bpe",
            text,
            &["I", "'LL", " pay", " ", " ", "123", "45", "\r\n\n", " x"],
        );
        check(
            "smollm",
            text,
            &[
                "I", "'", "LL", " pay", "  ", "1", "2", "3", "4", "5", "\r\n\n", " x",
            ],
        );
        check(
            "gpt-2",
            text,
            &["I", "'", "LL", " pay", " ", " 12345", "\r\n\n", " x"],
        );
        check(
            "tekken",
            "someWord HTTPServer",
            &["some", "Word", " HTTPServer"],
        );
    }

    #[test]
    fn every_kind_compiles_and_no_name_is_twice() {
        let mut seen = std::collections::HashSet::new();
        for kind in KINDS {
            kind.pre_tokenizer().unwrap();
            assert!(
                kind.names.iter().all(|name| seen.insert(name)),
                "{:?}",
                kind.names
            );
        }
    }

    #[test]
    fn an_unknown_name_is_an_error_that_lists_the_known() {
        let message = Kind::named("quill-9").err().unwrap().to_string();
        assert!(
            message.contains("quill-9") && message.contains("llama-bpe"),
            "{message}"
        );
    }
}
