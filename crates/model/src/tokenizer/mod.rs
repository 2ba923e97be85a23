//! Text to token ids and back, equal to the tokenizer that the model was trained with.
//!
//! ```text
//! text -> markers cut out -> normalizer -> words -> merges -> ids (with byte ranges of the text)
//! ```
//!
//! The steps are those of the `tokenizers` crate. Two are our own, because a chat system needs
//! more of them. *Markers* (see `markers.rs`) are looked for by us, so that a caller can name the
//! byte ranges in which `<|im_end|>` is nothing but ten characters: a template and a user's words
//! are tokenised in one go, with the merges across their border that the model knows, and the
//! words still cannot forge structure. And SentencePiece vocabularies are merged by score (see
//! `score_merge.rs`), which is exact and loads fast.
//!
//! Sources: a GGUF file holds vocabulary and merges and names its pre-tokenizer; a safetensors
//! folder has `tokenizer.json` and small files beside it that say which tokens begin and end a
//! text. Both are untrusted: what is broken is a [`ModelError`], never a panic.

mod detokenize;
mod gguf;
mod json;
mod markers;
mod score_merge;
mod split;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use tokenizers::models::bpe::BPE;
use tokenizers::normalizer::Range as Referential;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetType, PreTokenizedString,
    PreTokenizer, PreTokenizerWrapper, Token,
};

use crate::checkpoint::{Checkpoint, Format};
use crate::error::{ModelError, Result};

pub use detokenize::StreamDecoder;
use detokenize::TokenBytes;
use markers::Markers;
use score_merge::ScoreMerge;

/// What to do with control tokens (`<|im_start|>`) that are written in a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// They are control tokens: for templates, which we trust.
    Parse,
    /// They are characters: for what a user wrote.
    AsText,
}

/// A token and the bytes of the text that it covers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// The token.
    pub id: u32,
    /// Bytes of the text. Tokens of one character that was split into bytes share its range.
    pub bytes: Range<usize>,
}

/// The merging step.
#[derive(Debug)]
enum Pieces {
    Bpe(Box<BPE>),
    Scores(ScoreMerge),
}

/// A tokenizer; see the [module](self).
#[derive(Debug)]
pub struct Tokenizer {
    markers: Markers,
    /// Markers that are looked for after the normalizer.
    normalized_markers: Markers,
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    pieces: Pieces,
    bytes: Arc<TokenBytes>,
    bos: Option<u32>,
    add_bos: bool,
    eos: Vec<u32>,
}

/// Names of the tokens that end a reply, in any of the supported families. A checkpoint names
/// one or two of them as its end; a model in a chat may write another.
const END_OF_REPLY: &[&str] = &[
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|eot|>",
    "<|return|>",
    "<eos>",
    "</s>",
];

impl Tokenizer {
    /// The tokenizer of a checkpoint: from the metadata of a GGUF file, or from `tokenizer.json`
    /// beside a safetensors one.
    ///
    /// # Errors
    /// When it is missing, broken, or of a kind that is not supported.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        match (checkpoint.format(), checkpoint.gguf()) {
            (Format::Gguf, Some(metadata)) => gguf::Vocabulary::read(metadata)?.build(),
            _ => Self::from_file(&checkpoint.folder().join("tokenizer.json")),
        }
    }

    /// Reads a `tokenizer.json`, and beside it, where they exist, `tokenizer_config.json`,
    /// `special_tokens_map.json`, `generation_config.json` and `config.json` for the tokens that
    /// begin and end a text.
    ///
    /// # Errors
    /// When a file cannot be read or the model in it is not BPE.
    pub fn from_file(path: &Path) -> Result<Self> {
        json::load(path)
    }

    /// The ids of a text. No bos token is put in front.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] when the tokenizer's own rules fail on this text.
    pub fn encode(&self, text: &str, special: Special) -> Result<Vec<u32>> {
        let whole = 0..text.len();
        let literal = if special == Special::AsText {
            std::slice::from_ref(&whole)
        } else {
            &[]
        };
        let encoding = self
            .run(text, literal)
            .and_then(|cut| cut.into_encoding(None, 0, OffsetType::None))
            .map_err(|e| ModelError::tokenizer("text", e))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The tokens of a text and the bytes that each covers. Control tokens are parsed except
    /// where they touch one of the `literal` byte ranges (sorted, not overlapping).
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_spans(&self, text: &str, literal: &[Range<usize>]) -> Result<Vec<Span>> {
        let encoding = self
            .run(text, literal)
            .and_then(|cut| cut.into_encoding(None, 0, OffsetType::Byte))
            .map_err(|e| ModelError::tokenizer("text", e))?;
        let offsets = encoding.get_offsets().iter();
        let spans = encoding.get_ids().iter().zip(offsets);
        Ok(spans
            .map(|(&id, &(start, end))| Span {
                id,
                bytes: start..end,
            })
            .collect())
    }

    /// The pipeline up to the tokens.
    fn run(&self, text: &str, literal: &[Range<usize>]) -> tokenizers::Result<PreTokenizedString> {
        let mut cut = PreTokenizedString::from(text);
        cut.split(|_, part| cut_at_markers(&self.markers, part, literal))?;
        if let Some(normalizer) = &self.normalizer {
            cut.normalize(|part| normalizer.normalize(part))?;
        }
        if !self.normalized_markers.is_empty() {
            cut.split(|_, part| cut_at_markers(&self.normalized_markers, part, literal))?;
        }
        if let Some(pre_tokenizer) = &self.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut cut)?;
        }
        cut.tokenize(|part| match &self.pieces {
            Pieces::Bpe(bpe) => bpe.tokenize(part.get()),
            Pieces::Scores(scores) => Ok(scores.tokenize(part.get())),
        })?;
        Ok(cut)
    }

    /// The text of a whole sequence. Control tokens have none; bytes that are no UTF-8 come out
    /// as U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut stream = self.stream();
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// The text of one token as it stands in the middle of a sequence, control tokens by their
    /// names: for tables and highlights, where each token is shown alone.
    pub fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(self.bytes.get(id)).into_owned()
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self) -> StreamDecoder {
        StreamDecoder::new(Arc::clone(&self.bytes))
    }

    /// The token that begins a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Whether a plain text (no chat template) is to begin with [`bos`](Self::bos).
    pub fn add_bos(&self) -> bool {
        self.add_bos && self.bos.is_some()
    }

    /// The tokens that end a reply, the checkpoint's own choice first.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// Whether the token is structure and no text.
    pub fn is_control(&self, id: u32) -> bool {
        self.bytes.is_control(id)
    }

    /// The id of a token as the vocabulary writes it (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn id_of(&self, token: &str) -> Option<u32> {
        let marker = self
            .markers
            .get(token)
            .or_else(|| self.normalized_markers.get(token));
        marker.map(|m| m.id).or_else(|| match &self.pieces {
            Pieces::Bpe(bpe) => bpe.token_to_id(token),
            Pieces::Scores(scores) => scores.id_of(token),
        })
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.bytes.len()
    }

    /// Completes the list of tokens that end a reply: the checkpoint's own, then the known names.
    fn with_ends(mut self, own: impl IntoIterator<Item = u32>) -> Self {
        let named = END_OF_REPLY.iter().filter_map(|name| self.id_of(name));
        let named = named.filter(|&id| self.is_control(id)).collect::<Vec<_>>();
        for id in own.into_iter().chain(named) {
            if (id as usize) < self.vocab_size() && !self.eos.contains(&id) {
                self.eos.push(id);
            }
        }
        self
    }
}

/// Cuts one part of the text at its markers, which become finished tokens.
fn cut_at_markers(
    markers: &Markers,
    part: NormalizedString,
    literal: &[Range<usize>],
) -> tokenizers::Result<Vec<(NormalizedString, Option<Vec<Token>>)>> {
    let origin = part.offsets_original().0;
    let is_literal = |range: Range<usize>| {
        let range = part
            .convert_offsets(Referential::Normalized(range))
            .unwrap_or_default();
        let (start, end) = (origin + range.start, origin + range.end);
        literal
            .iter()
            .any(|text| start < text.end && text.start < end)
    };
    let pieces = markers.find(part.get(), is_literal);
    let cut = pieces.into_iter().map(|(id, range)| {
        let length = range.len();
        let piece = part
            .slice(Referential::Normalized(range))
            .ok_or("a marker cuts a character")?;
        Ok((
            piece,
            id.map(|id| vec![Token::new(id, String::new(), (0, length))]),
        ))
    });
    cut.collect()
}
