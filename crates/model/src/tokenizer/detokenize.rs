//! From ids back to text: the bytes of every token, and a decoder that streams them.
//!
//! A token is a string of bytes, not of characters: an emoji may span four tokens. The bytes of
//! the whole vocabulary are laid out once, so decoding is concatenation, and the only care left
//! is to hand out whole characters. Control tokens are structure and have no text.

use std::sync::Arc;

/// How token texts are written in the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Spelling {
    /// GPT-2's alphabet: each byte as one printable character.
    ByteLevel,
    /// SentencePiece: a space as `▁`, single bytes as `<0x0A>`.
    SentencePiece,
}

/// The bytes of each token.
#[derive(Debug)]
pub(crate) struct TokenBytes {
    blob: Vec<u8>,
    /// `ends[i]` is where token `i` stops in `blob`.
    ends: Vec<u32>,
    control: Vec<bool>,
    /// Drop one space in front of a whole text: the tokenizer had put it there.
    strip_leading_space: bool,
}

/// How a token's text is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TokenKind {
    /// Written in the vocabulary's spelling.
    Spelled,
    /// Written as it is.
    Verbatim,
    /// Structure: written as it is, and no part of a decoded text.
    Control,
}

impl TokenBytes {
    /// Lays out the texts, in the order of their ids.
    pub fn new<'a>(
        texts: impl Iterator<Item = (&'a str, TokenKind)>,
        spelling: Spelling,
        strip_leading_space: bool,
    ) -> Self {
        let alphabet = ByteAlphabet::new();
        let (mut blob, mut ends, mut control) = (Vec::new(), Vec::new(), Vec::new());
        for (text, kind) in texts {
            match (kind, spelling) {
                (TokenKind::Spelled, Spelling::ByteLevel) => alphabet.read(text, &mut blob),
                (TokenKind::Spelled, Spelling::SentencePiece) => match byte_piece(text) {
                    Some(byte) => blob.push(byte),
                    None => blob.extend(text.replace('▁', " ").as_bytes()),
                },
                _ => blob.extend(text.as_bytes()),
            }
            ends.push(blob.len() as u32);
            control.push(kind == TokenKind::Control);
        }
        Self {
            blob,
            ends,
            control,
            strip_leading_space,
        }
    }

    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// The bytes of a token; none for an id beyond the vocabulary.
    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id
            .checked_sub(1)
            .and_then(|before| self.ends.get(before))
            .copied();
        &self.blob[start.unwrap_or(0) as usize..end as usize]
    }

    pub fn is_control(&self, id: u32) -> bool {
        self.control.get(id as usize).copied().unwrap_or(false)
    }
}

/// The byte that a piece such as `<0x0A>` stands for.
pub(crate) fn byte_piece(text: &str) -> Option<u8> {
    let hex = text.strip_prefix("<0x")?.strip_suffix('>')?;
    (hex.len() == 2).then(|| u8::from_str_radix(hex, 16).ok())?
}

/// GPT-2's byte alphabet: printable Latin-1 characters stand for themselves, the other 68 bytes
/// for U+0100 and on, in order.
struct ByteAlphabet {
    byte_of: [Option<u8>; 324],
}

impl ByteAlphabet {
    fn new() -> Self {
        let mut byte_of = [None; 324];
        let mut next = 256;
        for byte in 0..=255_u8 {
            if matches!(byte, 33..=126 | 161..=172 | 174..=255) {
                byte_of[usize::from(byte)] = Some(byte);
            } else {
                byte_of[next] = Some(byte);
                next += 1;
            }
        }
        Self { byte_of }
    }

    /// Appends the bytes of `text`; a text with a character outside of the alphabet is taken as
    /// it is written.
    fn read(&self, text: &str, out: &mut Vec<u8>) {
        let start = out.len();
        for c in text.chars() {
            match self.byte_of.get(c as usize).copied().flatten() {
                Some(byte) => out.push(byte),
                None => {
                    out.truncate(start);
                    out.extend(text.as_bytes());
                    return;
                }
            }
        }
    }
}

/// Turns a stream of ids into text, whole characters at a time.
///
/// What [`push`](Self::push) returns, joined in order and followed by
/// [`finish`](Self::finish), equals [`Tokenizer::decode`](super::Tokenizer::decode) of all ids.
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    tokens: Arc<TokenBytes>,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    at_start: bool,
}

impl StreamDecoder {
    pub(crate) fn new(tokens: Arc<TokenBytes>) -> Self {
        Self {
            at_start: tokens.strip_leading_space,
            tokens,
            pending: Vec::new(),
        }
    }

    /// The text that this token completes: empty while a character is still open, and for control
    /// tokens. Bytes that are no UTF-8 come out as U+FFFD.
    pub fn push(&mut self, id: u32) -> String {
        if self.tokens.is_control(id) {
            return String::new();
        }
        let mut bytes = self.tokens.get(id);
        if self.at_start && !bytes.is_empty() {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            self.at_start = false;
        }
        self.pending.extend_from_slice(bytes);
        self.take_whole()
    }

    /// Ends the stream: an open character comes out as U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    /// Takes everything up to a character that is not complete.
    fn take_whole(&mut self) -> String {
        let mut text = String::new();
        let mut open = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let bad = chunk.invalid();
            let could_go_on = std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none());
            if chunks.peek().is_none() && could_go_on {
                open = bad.len();
            } else if !bad.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - open);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream(texts: &[&str], spelling: Spelling, strip: bool) -> StreamDecoder {
        let texts = texts.iter().map(|t| {
            let control = t.starts_with("<|");
            (
                *t,
                if control {
                    TokenKind::Control
                } else {
                    TokenKind::Spelled
                },
            )
        });
        StreamDecoder::new(Arc::new(TokenBytes::new(texts, spelling, strip)))
    }

    #[track_caller]
    fn check(mut decoder: StreamDecoder, expect: &[&str], rest: &str) {
        let n = decoder.tokens.len() as u32;
        let got: Vec<String> = (0..n).map(|id| decoder.push(id)).collect();
        assert_eq!(got, expect);
        assert_eq!(decoder.finish(), rest);
    }

    #[test]
    fn bytes_wait_for_their_character() {
        let snowman = ["<0xE2>", "<0x98>", "<0x83>", "▁x", "<0xF0>"];
        let decoder = stream(&snowman, Spelling::SentencePiece, false);
        check(decoder, &["", "", "☃", " x", ""], "\u{FFFD}");
        // 0xE2 0x98 0x83 and 0x20 in the byte alphabet, cut inside of the character.
        let decoder = stream(&["âĺ", "ĥĠ"], Spelling::ByteLevel, false);
        check(decoder, &["", "☃ "], "");
    }

    #[test]
    fn broken_bytes_do_not_hold_the_stream_up() {
        let decoder = stream(
            &["<0xE2>", "a", "<0xFF>", "b"],
            Spelling::SentencePiece,
            false,
        );
        check(decoder, &["", "\u{FFFD}a", "\u{FFFD}", "b"], "");
    }

    #[test]
    fn only_the_first_space_is_dropped_and_control_is_silent() {
        let decoder = stream(&["<|s|>", "▁▁a", "▁b"], Spelling::SentencePiece, true);
        check(decoder, &["", " a", " b"], "");
    }

    #[test]
    fn unknown_ids_are_silent() {
        let mut decoder = stream(&["a"], Spelling::ByteLevel, false);
        assert_eq!(decoder.push(u32::MAX), "");
    }

    #[test]
    fn text_outside_of_the_byte_alphabet_is_verbatim() {
        check(stream(&["日本"], Spelling::ByteLevel, false), &["日本"], "");
    }
}
