//! The tokenizer in a GGUF file: vocabulary, token types, merges or scores, and flags.
//!
//! Keys are those of the format's specification (`tokenizer.ggml.*`). Two models are read:
//! `gpt2`, byte-level BPE with a list of merges, whose pre-tokenizer is named by
//! `tokenizer.ggml.pre`; and `llama`, SentencePiece's BPE with a score a piece.

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence;

use super::detokenize::{Spelling, TokenBytes, TokenKind, byte_piece};
use super::markers::{Marker, Markers, looks_like_control};
use super::score_merge::ScoreMerge;
use super::split::Kind;
use super::{Pieces, Tokenizer};
use crate::error::{ModelError, Result};
use crate::gguf::GgufMetadata;

/// No published vocabulary is near: the largest have some 260 thousand tokens.
const MAX_TOKENS: usize = 1 << 22;

/// What a file says about its tokenizer, before it is checked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Vocabulary {
    /// `tokenizer.ggml.model`.
    pub model: String,
    /// `tokenizer.ggml.pre`.
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.token_type`: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused,
    /// 6 byte. Empty: all normal.
    pub types: Vec<i32>,
    /// `tokenizer.ggml.scores` (`llama` only).
    pub scores: Vec<f32>,
    /// `tokenizer.ggml.merges` (`gpt2` only): two tokens with a space between.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.{eos,eot,eom}_token_id`, those that are there.
    pub ends: Vec<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unknown: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `general.architecture`.
    pub architecture: String,
}

const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const BYTE: i32 = 6;

impl Vocabulary {
    /// Takes what the metadata says.
    pub fn read(metadata: &GgufMetadata) -> Result<Self> {
        let id = |name: &str| -> Result<Option<u32>> {
            let key = format!("tokenizer.ggml.{name}_token_id");
            // -1 means that there is none
            Ok(metadata.int(&key)?.and_then(|id| u32::try_from(id).ok()))
        };
        let text = |key: &str| metadata.str(key).map(|s| s.map(str::to_owned));
        let mut ends = Vec::new();
        for name in ["eos", "eot", "eom"] {
            ends.extend(id(name)?);
        }
        let numbers = metadata
            .ints("tokenizer.ggml.token_type")?
            .unwrap_or_default();
        let scores = metadata
            .floats("tokenizer.ggml.scores")?
            .unwrap_or_default();
        Ok(Self {
            model: text("tokenizer.ggml.model")?.unwrap_or_default(),
            pre: text("tokenizer.ggml.pre")?,
            tokens: metadata
                .strings("tokenizer.ggml.tokens")?
                .unwrap_or_default()
                .to_vec(),
            types: numbers.iter().map(|&t| t as i32).collect(),
            scores: scores.iter().map(|&s| s as f32).collect(),
            merges: metadata
                .strings("tokenizer.ggml.merges")?
                .unwrap_or_default()
                .to_vec(),
            bos: id("bos")?,
            ends,
            unknown: id("unknown")?,
            add_bos: metadata.bool("tokenizer.ggml.add_bos_token")?,
            add_space_prefix: metadata.bool("tokenizer.ggml.add_space_prefix")?,
            architecture: text("general.architecture")?.unwrap_or_default(),
        })
    }

    /// Builds the tokenizer.
    pub fn build(mut self) -> Result<Tokenizer> {
        self.check()?;
        match self.model.as_str() {
            "gpt2" => self.byte_level(),
            "llama" => self.sentence_piece(),
            _ => Err(ModelError::UnknownTokenizerModel { name: self.model }),
        }
    }

    fn check(&mut self) -> Result<()> {
        let count = self.tokens.len();
        if count == 0 || count > MAX_TOKENS {
            let problem = format!("{count} tokens; a vocabulary has 1 to {MAX_TOKENS}");
            return Err(ModelError::tokenizer("tokenizer.ggml.tokens", problem));
        }
        if self.tokens.iter().map(String::len).sum::<usize>() > u32::MAX as usize {
            let problem = "more than 4 GiB of token texts";
            return Err(ModelError::tokenizer("tokenizer.ggml.tokens", problem));
        }
        if self.types.is_empty() {
            self.types = vec![NORMAL; count];
        }
        if self.types.len() != count {
            let problem = format!("{} types for {count} tokens", self.types.len());
            return Err(ModelError::tokenizer("tokenizer.ggml.token_type", problem));
        }
        let named = [("bos", self.bos), ("unknown", self.unknown)];
        let ends = self.ends.iter().map(|&id| ("eos, eot or eom", Some(id)));
        for (name, id) in named.into_iter().chain(ends) {
            if let Some(id) = id.filter(|&id| id as usize >= count) {
                let problem = format!("the {name} token is {id}, but there are {count} tokens");
                return Err(ModelError::tokenizer("tokenizer.ggml.*_token_id", problem));
            }
        }
        Ok(())
    }

    /// Byte-level BPE.
    fn byte_level(mut self) -> Result<Tokenizer> {
        let kind = Kind::named(self.pre.as_deref().unwrap_or("default"))?;
        let mut merges = Vec::with_capacity(self.merges.len());
        for (rank, merge) in std::mem::take(&mut self.merges).into_iter().enumerate() {
            let Some((left, right)) = merge.split_once(' ').filter(|(_, r)| !r.contains(' '))
            else {
                let problem = format!("merge {rank} is {merge:?}, not two tokens with a space");
                return Err(ModelError::tokenizer("tokenizer.ggml.merges", problem));
            };
            merges.push((left.to_owned(), right.to_owned()));
        }
        let vocab: Vocab = self.tokens.iter().cloned().zip(0..).collect();
        let bpe = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .ignore_merges(kind.ignore_merges)
            .build()
            .map_err(|e| ModelError::tokenizer("tokenizer.ggml.merges", e))?;
        let (normalizer, pre_tokenizer) = (kind.normalizer(), kind.pre_tokenizer()?);
        let add_bos = self.add_bos.unwrap_or(kind.add_bos);
        let tokenizer = Tokenizer {
            normalizer,
            pre_tokenizer: Some(pre_tokenizer),
            add_bos,
            ..self.assemble(Pieces::Bpe(Box::new(bpe)), Spelling::ByteLevel, false)
        };
        Ok(tokenizer.with_ends(self.ends))
    }

    /// SentencePiece's BPE.
    fn sentence_piece(self) -> Result<Tokenizer> {
        let (scores, count) = (&self.scores, self.tokens.len());
        if scores.len() != count {
            let problem = format!("{} scores for {count} tokens", scores.len());
            return Err(ModelError::tokenizer("tokenizer.ggml.scores", problem));
        }
        if let Some(id) = scores.iter().position(|s| s.is_nan()) {
            let problem = format!("the score of token {id} is not a number");
            return Err(ModelError::tokenizer("tokenizer.ggml.scores", problem));
        }
        let mut bytes = Box::new([None; 256]);
        for (id, text) in self.of_type(|t| t == BYTE) {
            let Some(byte) = byte_piece(text) else {
                let problem = format!("byte token {id} is {text:?}, not like <0x0A>");
                return Err(ModelError::tokenizer("tokenizer.ggml.tokens", problem));
            };
            bytes[usize::from(byte)] = Some(id);
        }
        let unknown = self
            .unknown
            .or_else(|| self.of_type(|t| t == UNKNOWN).next().map(|t| t.0));
        let pieces = self.of_type(|t| t == NORMAL);
        let pieces = pieces.map(|(id, text)| (text, id, self.scores[id as usize]));
        let scores = ScoreMerge::new(pieces, bytes, unknown);

        let add_space = self.add_space_prefix.unwrap_or(true);
        let underscore = Replace::new(" ", "▁").map_err(|e| ModelError::tokenizer("spaces", e))?;
        let normalizer = if add_space {
            Sequence::new(vec![Prepend::new("▁".to_owned()).into(), underscore.into()]).into()
        } else {
            underscore.into()
        };
        let tokenizer = Tokenizer {
            normalizer: Some(normalizer),
            add_bos: self.add_bos.unwrap_or(true),
            ..self.assemble(Pieces::Scores(scores), Spelling::SentencePiece, add_space)
        };
        Ok(tokenizer.with_ends(self.ends))
    }

    /// Ids and texts of the tokens whose type is wanted.
    fn of_type(&self, wanted: impl Fn(i32) -> bool) -> impl Iterator<Item = (u32, &str)> {
        let typed = self.tokens.iter().zip(&self.types).zip(0..);
        typed.filter_map(move |((text, &t), id)| wanted(t).then_some((id, text.as_str())))
    }

    /// What both models have in common.
    fn assemble(&self, pieces: Pieces, spelling: Spelling, strip_leading_space: bool) -> Tokenizer {
        let is_control = |id: u32, text: &str, t: i32| match t {
            CONTROL | UNKNOWN => true,
            USER_DEFINED => {
                looks_like_control(text) || self.bos == Some(id) || self.ends.contains(&id)
            }
            _ => false,
        };
        let typed = || {
            let typed = self.tokens.iter().zip(self.types.iter().copied());
            typed.zip(0..).map(|((text, t), id)| (id, text.as_str(), t))
        };
        let markers = typed().filter(|(.., t)| matches!(*t, UNKNOWN | CONTROL | USER_DEFINED));
        let markers = markers.map(|(id, text, t)| {
            let mut marker = Marker::new(id, text, is_control(id, text, t));
            marker.rstrip = self.swallows_space(text) && marker.control;
            marker
        });
        // SentencePiece looks for its own pieces in the text as it has spelled it.
        let (normalized, markers): (Vec<_>, Vec<_>) = markers.partition(|m| {
            spelling == Spelling::SentencePiece && !strip_leading_space && !m.control
        });
        let normalized = normalized.into_iter().map(|mut marker| {
            marker.text = marker.text.replace(' ', "▁");
            marker
        });
        let texts = typed().map(|(id, text, t)| {
            let kind = match t {
                _ if is_control(id, text, t) => TokenKind::Control,
                USER_DEFINED => TokenKind::Verbatim,
                _ => TokenKind::Spelled,
            };
            (text, kind)
        });
        Tokenizer {
            markers: Markers::new(markers),
            normalized_markers: Markers::new(normalized),
            normalizer: None,
            pre_tokenizer: None,
            bytes: TokenBytes::new(texts, spelling, strip_leading_space).into(),
            pieces,
            bos: self.bos,
            add_bos: false,
            eos: Vec::new(),
        }
    }

    /// Phi-3's markers swallow the white space behind them. Its `tokenizer.json` says so; the
    /// GGUF format cannot.
    fn swallows_space(&self, marker: &str) -> bool {
        self.architecture == "phi3"
            && self.model == "llama"
            && !matches!(marker, "<unk>" | "<s>" | "<|endoftext|>")
    }
}
