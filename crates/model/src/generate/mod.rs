//! Generation with continuous batching: sequences join and leave at any step.
//!
//! Each step is one forward pass over the last token of every running sequence and the prompts (or
//! parts of long prompts) that fit in the token budget. Since a row's numbers do not depend on its
//! batch, neither do replies depend on what else runs.

mod sampling;
mod stop;

use std::collections::VecDeque;
use std::sync::Arc;

use demur_kernels::ops::{logsumexp, top_k_indices};
use serde_json::Value;

use crate::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use crate::error::ModelError;
use crate::hooks::{Intervention, InterventionState, Role};
use crate::tokenizer::{StreamDecoder, Tokenizer};
use sampling::Sampler;
pub use sampling::Sampling;
use stop::StopFilter;

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

/// Limits of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that run at once.
    pub max_batch: usize,
    /// Tokens in one forward pass; the prompt of a hooked sequence is never cut, and may exceed it.
    pub max_batch_tokens: usize,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_batch: 16,
            max_batch_tokens: 512,
        }
    }
}

/// Runs requests together.
pub struct Engine<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    config: EngineConfig,
    waiting: VecDeque<Running>,
    running: Vec<Running>,
    workspace: Workspace,
    next_id: RequestId,
}

struct Running {
    id: RequestId,
    request: Request,
    cache: KvCache,
    state: Option<Box<dyn InterventionState>>,
    sampler: Sampler,
    done: usize, // prompt tokens in the cache
    reply: Vec<u32>,
    stream: StreamDecoder,
    filter: StopFilter,
    text: String,
    logprobs: Vec<TokenLogprobs>,
    first_logits: Option<Vec<f32>>,
}

impl<'m> Engine<'m> {
    /// An engine without requests.
    pub fn new(model: &'m Model, tokenizer: &'m Tokenizer, config: EngineConfig) -> Self {
        Self {
            model,
            tokenizer,
            config: EngineConfig {
                max_batch: config.max_batch.max(1),
                max_batch_tokens: config.max_batch_tokens.max(1),
            },
            waiting: VecDeque::new(),
            running: Vec::new(),
            workspace: Workspace::default(),
            next_id: 0,
        }
    }

    /// Takes a request; it starts when there is room.
    ///
    /// # Errors
    /// [`ModelError::Request`], [`ModelError::TooLong`] or [`ModelError::TokenId`] if it can't run.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, ModelError> {
        let spec = self.model.spec();
        let refuse = |reason: &str| {
            Err(ModelError::Request {
                reason: reason.to_owned(),
            })
        };
        if request.tokens.is_empty() {
            return refuse("the prompt is empty");
        }
        if request.tokens.len() != request.roles.len() {
            return refuse("tokens and roles have different lengths");
        }
        if request.max_new_tokens == 0 {
            return refuse("max_new_tokens is 0");
        }
        if request.stop.iter().any(String::is_empty) {
            return refuse("a stop string is empty");
        }
        request.sampling.validate()?;
        if request.tokens.len() >= spec.context {
            return Err(ModelError::TooLong {
                tokens: request.tokens.len() + 1,
                context: spec.context,
            });
        }
        if let Some(&id) = request
            .tokens
            .iter()
            .find(|&&id| id as usize >= spec.d_vocab)
        {
            return Err(ModelError::TokenId {
                id,
                d_vocab: spec.d_vocab,
            });
        }
        for site in request.hook.iter().flat_map(|h| h.sites()) {
            site.check(spec.n_layers)?;
        }
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Running {
            id,
            cache: self.model.new_cache(),
            state: request
                .hook
                .as_ref()
                .filter(|h| !h.is_empty())
                .map(|h| h.start()),
            sampler: Sampler::new(request.sampling.clone()),
            done: 0,
            reply: Vec::new(),
            stream: self.tokenizer.stream(),
            filter: StopFilter::new(request.stop.clone()),
            text: String::new(),
            logprobs: Vec::new(),
            first_logits: None,
            request,
        });
        Ok(id)
    }

    /// Gives up a request; its reply so far is lost. Returns whether it was there.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let before = self.waiting.len() + self.running.len();
        self.waiting.retain(|r| r.id != id);
        self.running.retain(|r| r.id != id);
        before > self.waiting.len() + self.running.len()
    }

    /// Whether no request is left.
    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.running.is_empty()
    }

    /// One forward pass.
    ///
    /// # Errors
    /// What the model refuses; the engine is then unusable.
    pub fn step(&mut self) -> Result<Vec<Event>, ModelError> {
        while self.running.len() < self.config.max_batch
            && let Some(next) = self.waiting.pop_front()
        {
            self.running.push(next);
        }
        let assistant = [Role::Assistant];
        let mut budget = self.config.max_batch_tokens;
        budget -= budget.min(self.running.iter().filter(|r| !r.reply.is_empty()).count());
        let mut inputs = Vec::new();
        let mut active = Vec::new();
        for (at, r) in self.running.iter_mut().enumerate() {
            let Running {
                request,
                cache,
                state,
                reply,
                done,
                ..
            } = r;
            let prompt = request.tokens.len();
            let generated = !reply.is_empty();
            let (tokens, roles, last) = if generated {
                (&reply[reply.len() - 1..], &assistant[..], true)
            } else {
                let left = prompt - *done;
                let take = if left <= budget {
                    left
                } else if state.is_some() {
                    // A hook sees its prompt whole: wait for a pass with room, or for one alone.
                    if budget < self.config.max_batch_tokens {
                        0
                    } else {
                        left
                    }
                } else {
                    budget
                };
                budget -= take.min(budget);
                if take == 0 {
                    continue;
                }
                let range = *done..*done + take;
                *done += take;
                (
                    &request.tokens[range.clone()],
                    &request.roles[range],
                    *done == prompt,
                )
            };
            active.push((at, last));
            inputs.push(SeqInput {
                tokens,
                roles,
                generated,
                cache,
                hook: state.as_deref_mut(),
                hook_sites: request.hook.as_ref().map(|h| h.sites()).unwrap_or_default(),
                logits: if last { LogitsAt::Last } else { LogitsAt::None },
            });
        }
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.model.forward(&mut inputs, None, &mut self.workspace)?;
        let mut rows = logits.rows();
        let mut events = Vec::new();
        let mut finished = Vec::new();
        for (at, last) in active {
            if let (true, Some(row)) = (last, rows.next()) {
                let r = &mut self.running[at];
                let finish = r.take(row, self.tokenizer, self.model.spec().context);
                if let Some(text) = r.emit(finish.is_some()) {
                    events.push(Event::Text(r.id, text));
                }
                if let Some(finish) =
                    finish.or_else(|| r.filter.hit().then_some(Finish::StopString))
                {
                    finished.push((at, finish));
                }
            }
        }
        for (at, finish) in finished.into_iter().rev() {
            let r = self.running.remove(at);
            events.push(Event::Done(r.id, Box::new(r.into_output(finish))));
        }
        Ok(events)
    }

    /// Runs `requests` to the end and returns the replies in their order. `on_done` sees each reply
    /// as it ends.
    ///
    /// # Errors
    /// A request that can't run, before any has; or what [`Self::step`] returns.
    pub fn run(
        &mut self,
        requests: Vec<Request>,
        mut on_done: impl FnMut(usize, &Output),
    ) -> Result<Vec<Output>, ModelError> {
        let first = self.next_id;
        let n = requests.len();
        for request in requests {
            self.submit(request)?;
        }
        let mut outputs: Vec<Option<Output>> = (0..n).map(|_| None).collect();
        while !self.is_idle() {
            for event in self.step()? {
                if let Event::Done(id, output) = event
                    && let Some(at) = id.checked_sub(first)
                {
                    on_done(at, &output);
                    outputs[at] = Some(*output);
                }
            }
        }
        Ok(outputs.into_iter().flatten().collect())
    }
}

impl Running {
    /// Chooses a token from `row`; says so if that ends the reply.
    fn take(&mut self, row: &[f32], tokenizer: &Tokenizer, context: usize) -> Option<Finish> {
        if self.reply.is_empty() && self.request.first_logits {
            self.first_logits = Some(row.to_vec());
        }
        let mut logits = row.to_vec();
        let seen: Vec<u32> = if self.request.sampling.repetition_penalty == 1.0 {
            Vec::new()
        } else {
            self.request
                .tokens
                .iter()
                .chain(&self.reply)
                .copied()
                .collect()
        };
        let id = self.sampler.choose(&mut logits, &seen);
        if tokenizer.eos_ids().contains(&id) {
            return Some(Finish::Stop);
        }
        if let Some(n) = self.request.logprobs {
            let z = logsumexp(row);
            let mut top = Vec::new();
            top_k_indices(row, n, &mut top);
            top.iter_mut().for_each(|t| t.1 -= z);
            self.logprobs.push(TokenLogprobs {
                chosen: row[id as usize] - z,
                top,
            });
        }
        self.reply.push(id);
        let text = self.stream.push(id);
        self.filter.push(&text);
        let full = self.reply.len() >= self.request.max_new_tokens
            || self.request.tokens.len() + self.reply.len() >= context;
        (full && !self.filter.hit()).then_some(Finish::Length)
    }

    /// Text that is safe to show.
    fn emit(&mut self, ended: bool) -> Option<String> {
        if ended {
            let rest = self.stream.finish();
            self.filter.push(&rest);
        }
        let text = self.filter.take(ended);
        self.text.push_str(&text);
        (!text.is_empty()).then_some(text)
    }

    fn into_output(self, finish: Finish) -> Output {
        Output {
            tokens: self.reply,
            text: self.text,
            finish,
            logprobs: self.logprobs,
            first_logits: self.first_logits,
            audit: self.state.and_then(|s| s.audit()),
        }
    }
}
