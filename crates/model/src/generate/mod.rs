//! Generation with continuous batching: sequences join and leave at any step.
//!
//! Each step is one forward pass over the last token of every running sequence and the prompts (or
//! parts of long prompts) that fit in the token budget. Since a row's numbers do not depend on its
//! batch, neither do replies depend on what else runs.

mod engine;
mod prefix;
mod sampling;
mod score;
mod stop;

use std::sync::Arc;

use serde_json::Value;

use crate::hooks::{Intervention, Role};
pub use engine::{Engine, EngineConfig};
pub use prefix::common as common_beginning;
pub use sampling::Sampling;
pub use score::{ContinuationScore, ScoreRequest, Scored, score};

/// What to generate.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt's tokens.
    pub tokens: Vec<u32>,
    /// Their roles, as many.
    pub roles: Vec<Role>,
    /// At most this many new tokens.
    pub max_new_tokens: usize,
    /// How they are chosen.
    pub sampling: Sampling,
    /// Texts that end the reply; they are not part of it.
    pub stop: Vec<String>,
    /// What edits the residual stream.
    pub hook: Option<Arc<dyn Intervention>>,
    /// Keep the log-probabilities of this many most probable tokens at each step; 0 keeps that of
    /// the chosen token only.
    pub logprobs: Option<usize>,
    /// Keep the logits of the first reply token.
    pub first_logits: bool,
}

impl Request {
    /// A greedy request without extras.
    pub fn new(tokens: Vec<u32>, roles: Vec<Role>, max_new_tokens: usize) -> Self {
        Self {
            tokens,
            roles,
            max_new_tokens,
            sampling: Sampling::greedy(),
            stop: Vec::new(),
            hook: None,
            logprobs: None,
            first_logits: false,
        }
    }
}

/// Why a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model ended it.
    Stop,
    /// A stop string came.
    StopString,
    /// The limit of new tokens, or of the context, was reached.
    Length,
}

/// Log-probabilities of one reply token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// The chosen token's.
    pub chosen: f32,
    /// The most probable tokens and theirs, most probable first.
    pub top: Vec<(u32, f32)>,
}

/// A finished reply.
#[derive(Debug, Clone)]
pub struct Output {
    /// The reply's tokens, without the token that ended it.
    pub tokens: Vec<u32>,
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
    /// One entry a reply token, if asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// `[d_vocab]`, if asked for.
    pub first_logits: Option<Vec<f32>>,
    /// What the intervention says that it did.
    pub audit: Option<Value>,
}

/// A request's number, in order of submission.
pub type RequestId = usize;

/// What a step brought.
#[derive(Debug)]
pub enum Event {
    /// More text of a reply; whole characters only, and never part of a stop string.
    Text(RequestId, String),
    /// A reply is finished.
    Done(RequestId, Box<Output>),
}
