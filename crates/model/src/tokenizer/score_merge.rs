//! SentencePiece's BPE: merging by the score of the merged piece.
//!
//! A SentencePiece vocabulary holds no list of merges. Instead each piece has a score, and the
//! text (with spaces written `▁`) is merged greedily: of all neighbouring pairs whose joined text
//! is a piece, the one with the highest score is joined first, the leftmost of equals. With a
//! heap of candidate pairs and symbols in a linked list a text of `n` characters costs
//! `O(n log n)`.
//!
//! The usual conversion writes the scores out as a list of merges (every way to cut every piece
//! in two). For Gemma that is more than half a million entries, built at every load, and it is
//! not quite the same: it cannot join a pair whose halves are no pieces themselves. Merging by
//! score needs only the vocabulary.

use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

use tokenizers::Token;

/// A vocabulary that is merged by score.
#[derive(Debug)]
pub(crate) struct ScoreMerge {
    /// Pieces that merging may produce: no control, user-defined, byte or unused ones.
    pieces: HashMap<Box<str>, (u32, f32)>,
    /// Token of each byte, for characters that are no piece.
    bytes: Box<[Option<u32>; 256]>,
    /// What stands for a character that has no bytes either.
    unknown: Option<u32>,
}

/// A stretch of the text, in a doubly linked list; an empty one was merged into its left
/// neighbour.
struct Symbol {
    start: usize,
    end: usize,
    prev: usize,
    next: usize,
}

/// No neighbour.
const NONE: usize = usize::MAX;

/// A pair that could be joined. It is stale when either side has changed since.
struct Candidate {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of the joined text, to notice a stale pair.
    len: usize,
}

impl Ord for Candidate {
    /// Highest score first, then leftmost.
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then_with(|| other.left.cmp(&self.left))
    }
}

impl PartialOrd for Candidate {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Candidate {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Candidate {}

impl ScoreMerge {
    /// `pieces` are (text, id, score); of two pieces with one text the first stays.
    pub fn new<'a>(
        pieces: impl Iterator<Item = (&'a str, u32, f32)>,
        bytes: Box<[Option<u32>; 256]>,
        unknown: Option<u32>,
    ) -> Self {
        let mut map = HashMap::with_capacity(pieces.size_hint().1.unwrap_or(0));
        for (text, id, score) in pieces {
            map.entry(Box::from(text)).or_insert((id, score));
        }
        Self {
            pieces: map,
            bytes,
            unknown,
        }
    }

    /// The id of a piece.
    pub fn id_of(&self, piece: &str) -> Option<u32> {
        self.pieces.get(piece).map(|&(id, _)| id)
    }

    /// Merges `text` (spaces already written `▁`). Token offsets are bytes of `text`.
    pub fn tokenize(&self, text: &str) -> Vec<Token> {
        let mut symbols: Vec<Symbol> = text
            .char_indices()
            .enumerate()
            .map(|(i, (start, c))| Symbol {
                start,
                end: start + c.len_utf8(),
                prev: i.checked_sub(1).unwrap_or(NONE),
                next: i + 1,
            })
            .collect();
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }

        let mut heap = BinaryHeap::new();
        for left in 1..symbols.len() {
            self.offer(text, &symbols, left - 1, left, &mut heap);
        }
        while let Some(Candidate {
            left, right, len, ..
        }) = heap.pop()
        {
            let (l, r) = (&symbols[left], &symbols[right]);
            let stale = l.start == l.end || r.start == r.end || r.end - l.start != len;
            if stale || l.next != right {
                continue;
            }
            let (end, next) = (r.end, r.next);
            symbols[right].end = symbols[right].start;
            symbols[left].end = end;
            symbols[left].next = next;
            if next != NONE {
                symbols[next].prev = left;
                self.offer(text, &symbols, left, next, &mut heap);
            }
            let prev = symbols[left].prev;
            if prev != NONE {
                self.offer(text, &symbols, prev, left, &mut heap);
            }
        }

        let mut tokens: Vec<Token> = Vec::new();
        for symbol in symbols.iter().filter(|s| s.start < s.end) {
            self.emit(text, symbol.start, symbol.end, &mut tokens);
        }
        tokens
    }

    /// Puts the pair on the heap if its joined text is a piece.
    fn offer(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: usize,
        right: usize,
        heap: &mut BinaryHeap<Candidate>,
    ) {
        let (start, end) = (symbols[left].start, symbols[right].end);
        if let Some(&(_, score)) = self.pieces.get(&text[start..end]) {
            heap.push(Candidate {
                score,
                left,
                right,
                len: end - start,
            });
        }
    }

    /// The tokens of one final symbol: its piece, else its bytes, else the unknown token (one for
    /// a run of them).
    fn emit(&self, text: &str, start: usize, end: usize, tokens: &mut Vec<Token>) {
        let piece = &text[start..end];
        if let Some(id) = self.id_of(piece) {
            tokens.push(Token::new(id, String::new(), (start, end)));
            return;
        }
        let bytes: Option<Vec<u32>> = piece
            .bytes()
            .map(|byte| self.bytes[usize::from(byte)])
            .collect();
        if let Some(bytes) = bytes {
            let at = |i: usize| (start + i, start + i + 1);
            tokens.extend(
                bytes
                    .into_iter()
                    .enumerate()
                    .map(|(i, id)| Token::new(id, String::new(), at(i))),
            );
        } else if let Some(unknown) = self.unknown {
            match tokens.last_mut() {
                Some(last) if last.id == unknown && last.offsets.1 == start => {
                    last.offsets.1 = end;
                }
                _ => tokens.push(Token::new(unknown, String::new(), (start, end))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(pieces: &[(&str, f32)], with_bytes: bool) -> ScoreMerge {
        let mut bytes = Box::new([None; 256]);
        if with_bytes {
            for (byte, id) in bytes.iter_mut().enumerate() {
                *id = Some(1000 + byte as u32);
            }
        }
        let entries = pieces
            .iter()
            .enumerate()
            .map(|(i, (text, score))| (*text, i as u32, *score));
        ScoreMerge::new(entries, bytes, Some(99))
    }

    #[track_caller]
    fn check(model: &ScoreMerge, text: &str, expect: &[u32]) {
        let ids: Vec<u32> = model.tokenize(text).iter().map(|t| t.id).collect();
        assert_eq!(ids, expect, "{text:?}");
    }

    #[test]
    fn highest_score_first_then_leftmost() {
        let pieces = [
            ("a", -9.0),
            ("b", -9.0),
            ("ab", -2.0),
            ("ba", -1.0),
            ("aa", -3.0),
        ];
        let m = model(&pieces, false);
        check(&m, "aba", &[0, 3]); // "ba" beats "ab"
        check(&m, "aaa", &[4, 0]); // equal scores: the left pair
        check(&m, "aaaa", &[4, 4]);
        check(&m, "", &[]);
    }

    #[test]
    fn merges_reach_over_several_levels() {
        let pieces = [("x", 0.0), ("xx", -1.0), ("xxxx", -2.0), ("xxx", -3.0)];
        check(&model(&pieces, false), "xxxxxxx", &[2, 3]);
    }

    #[test]
    fn unknown_characters_become_bytes_or_one_unknown() {
        let pieces = [("a", 0.0)];
        check(&model(&pieces, true), "aé", &[0, 1000 + 0xC3, 1000 + 0xA9]);
        check(&model(&pieces, false), "éüa", &[99, 0]);
    }
}
