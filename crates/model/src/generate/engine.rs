//! The engine: who runs in the next pass, and what becomes of its logits.
//!
//! A sequence is its prompt and its reply so far; `done` counts how many of these tokens are in its
//! cache. A pass takes the next tokens of each sequence, and the one that has none left gets logits
//! and another token. Decoding is the case of one token left, prefill that of many, and a sequence
//! that has to start over (see [`KvCache`] on LongRoPE) sets `done` to 0.

use std::collections::VecDeque;

use demur_kernels::ops::{logsumexp, top_k_indices};

use super::prefix::{self, Prefixes};
use super::sampling::Sampler;
use super::stop::StopFilter;
use super::{Event, Finish, Output, Request, RequestId, TokenLogprobs};
use crate::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use crate::error::ModelError;
use crate::hooks::{InterventionState, Role};
use crate::tokenizer::{StreamDecoder, Tokenizer};

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

/// Requests that a prompt is compared with for a common beginning.
const LOOK_AHEAD: usize = 64;

/// Runs requests together.
pub struct Engine<'m> {
    model: &'m Model,
    tokenizer: &'m Tokenizer,
    config: EngineConfig,
    waiting: VecDeque<Running>,
    running: Vec<Running>,
    workspace: Workspace,
    prefixes: Prefixes,
    shared: u64,
    next_id: RequestId,
}

struct Running {
    id: RequestId,
    request: Request,
    cache: KvCache,
    state: Option<Box<dyn InterventionState>>,
    sampler: Sampler,
    done: usize, // tokens of prompt and reply in the cache
    /// The prompt stops here once, to be kept for others.
    cut: Option<usize>,
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
            prefixes: Prefixes::default(),
            shared: 0,
            next_id: 0,
        }
    }

    /// Takes a request; it starts when there is room.
    ///
    /// # Errors
    /// [`ModelError::Request`], [`ModelError::TooLong`], [`ModelError::TokenId`] or
    /// [`ModelError::SiteLayer`] if it can't run.
    pub fn submit(&mut self, request: Request) -> Result<RequestId, ModelError> {
        self.check(&request)?;
        let id = self.next_id;
        self.next_id += 1;
        self.waiting.push_back(Running {
            id,
            cache: self.model.new_cache(),
            state: fresh_state(&request),
            sampler: Sampler::new(request.sampling.clone()),
            done: 0,
            cut: None,
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

    fn check(&self, request: &Request) -> Result<(), ModelError> {
        let spec = self.model.spec();
        let faults = [
            (request.tokens.is_empty(), "the prompt is empty"),
            (
                request.tokens.len() != request.roles.len(),
                "tokens and roles have different lengths",
            ),
            (request.max_new_tokens == 0, "max_new_tokens is 0"),
            (
                request.stop.iter().any(String::is_empty),
                "a stop string is empty",
            ),
        ];
        if let Some((_, reason)) = faults.iter().find(|(bad, _)| *bad) {
            return Err(ModelError::Request {
                reason: (*reason).to_owned(),
            });
        }
        request.sampling.validate()?;
        if request.tokens.len() >= spec.context {
            return Err(ModelError::TooLong {
                tokens: request.tokens.len() + 1,
                context: spec.context,
            });
        }
        let mut tokens = request.tokens.iter();
        if let Some(&id) = tokens.find(|&&id| id as usize >= spec.d_vocab) {
            return Err(ModelError::TokenId {
                id,
                d_vocab: spec.d_vocab,
            });
        }
        for site in request.hook.iter().flat_map(|h| h.sites()) {
            site.check(spec.n_layers)?;
        }
        Ok(())
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

    /// Bytes of the caches, shared beginnings included, and of the workspace.
    pub fn memory(&self) -> usize {
        let caches: usize = self.running.iter().map(|r| r.cache.bytes()).sum();
        caches + self.prefixes.bytes() + self.workspace.bytes()
    }

    /// Tokens of prompts that were not run, as their beginning was shared.
    pub fn shared_tokens(&self) -> u64 {
        self.shared
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
        if let Some(original) = self.model.spec().original_context() {
            for r in &mut self.running {
                if r.cache.expected() <= original && r.total() > original {
                    r.start_over();
                }
            }
        }
        self.share();
        let takes = self.schedule();
        let longest = takes.iter().copied().max().unwrap_or(0);
        let assistant = vec![Role::Assistant; longest];
        let mut inputs = Vec::new();
        let mut choosing = Vec::new();
        for (at, (r, take)) in self.running.iter_mut().zip(takes).enumerate() {
            if take == 0 {
                continue;
            }
            let prompt = r.request.tokens.len();
            let from = r.done;
            r.done += take;
            let (tokens, roles) = if from < prompt {
                let range = from..from + take;
                (&r.request.tokens[range.clone()], &r.request.roles[range])
            } else {
                (&r.reply[from - prompt..][..take], &assistant[..take])
            };
            let whole = r.done == prompt + r.reply.len();
            if whole {
                choosing.push(at);
            }
            inputs.push(SeqInput {
                tokens,
                roles,
                generated: from >= prompt,
                cache: &mut r.cache,
                hook: r.state.as_deref_mut(),
                hook_sites: r.request.hook.as_ref().map_or(&[], |h| h.sites()),
                logits: if whole {
                    LogitsAt::Last
                } else {
                    LogitsAt::None
                },
            });
        }
        if inputs.is_empty() {
            return Ok(Vec::new());
        }
        let logits = self.model.forward(&mut inputs, None, &mut self.workspace)?;
        for r in &mut self.running {
            if r.cut == Some(r.done) {
                r.cut = None;
                self.prefixes.keep(&r.request, &r.cache, r.state.as_deref());
            }
        }
        let mut events = Vec::new();
        let mut finished = Vec::new();
        for (at, row) in choosing.into_iter().zip(logits.rows()) {
            let r = &mut self.running[at];
            let finish = r.take(row, self.tokenizer, self.model.spec().context);
            if let Some(text) = r.emit(finish.is_some()) {
                events.push(Event::Text(r.id, text));
            }
            if let Some(finish) = finish {
                finished.push((at, finish));
            }
        }
        for (at, finish) in finished.into_iter().rev() {
            let r = self.running.remove(at);
            events.push(Event::Done(r.id, Box::new(r.into_output(finish))));
        }
        Ok(events)
    }

    /// Lets sequences that have not begun go on from a beginning that has been run, and decides which of
    /// the others will be kept for those behind them.
    fn share(&mut self) {
        // The cache of a sequence with two sets of frequencies depends on how long it becomes.
        if self.model.spec().original_context().is_some() {
            return;
        }
        for at in 0..self.running.len() {
            let r = &self.running[at];
            if r.done > 0 || r.cut.is_some() {
                continue;
            }
            if let Some((cache, state)) = self.prefixes.find(&r.request) {
                let r = &mut self.running[at];
                r.done = cache.len();
                self.shared += r.done as u64;
                (r.cache, r.state) = (cache, state);
                continue;
            }
            if self.waits(at) {
                continue;
            }
            let behind = self.running[at + 1..].iter().filter(|o| o.done == 0);
            let others = behind.chain(&self.waiting).take(LOOK_AHEAD);
            let cut = prefix::cut(&r.request, others.map(|o| &o.request));
            self.running[at].cut = cut;
        }
    }

    /// Whether a sequence is about to get its beginning from one before it.
    fn waits(&self, at: usize) -> bool {
        let r = &self.running[at];
        let mut before = self.running[..at].iter();
        r.done == 0
            && before.any(|f| {
                f.cut
                    .is_some_and(|c| prefix::waits(&r.request, &f.request, c))
            })
    }

    /// How many tokens of each running sequence go into the next pass.
    fn schedule(&self) -> Vec<usize> {
        // Sequences that decode always go on; what is left is for prompts, first come first served.
        let decoding = self.running.iter().filter(|r| r.left() == 1).count();
        let mut budget = self.config.max_batch_tokens.saturating_sub(decoding);
        let mut idle = true; // no prompt has been taken yet
        let take = |(at, r): (usize, &Running)| {
            let left = r.left();
            if self.waits(at) {
                return 0;
            }
            if left == 1 {
                return 1;
            }
            let take = match r.state {
                _ if left <= budget => left,
                // A hook sees its prompt whole, at the latest when its turn comes.
                Some(_) if idle => left,
                Some(_) => 0,
                None => budget,
            };
            idle &= take == 0;
            budget -= take.min(budget);
            take
        };
        let takes: Vec<usize> = self.running.iter().enumerate().map(take).collect();
        takes
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
        requests.iter().try_for_each(|r| self.check(r))?;
        let first = self.next_id;
        let mut outputs: Vec<Option<Output>> = requests.iter().map(|_| None).collect();
        for request in requests {
            self.submit(request)?;
        }
        while !self.is_idle() {
            for event in self.step()? {
                if let Event::Done(id, output) = event
                    && let Some(slot) = id.checked_sub(first).and_then(|at| outputs.get_mut(at))
                {
                    on_done(id - first, &output);
                    *slot = Some(*output);
                }
            }
        }
        Ok(outputs.into_iter().flatten().collect())
    }
}

fn fresh_state(request: &Request) -> Option<Box<dyn InterventionState>> {
    let hook = request.hook.as_ref().filter(|h| !h.is_empty());
    hook.map(|h| h.start())
}

impl Running {
    fn total(&self) -> usize {
        self.request.tokens.len() + self.reply.len()
    }

    /// Tokens of the part at hand (a shared beginning, the prompt, the reply) that are not in the cache.
    fn left(&self) -> usize {
        let prompt = self.request.tokens.len();
        let end = if self.done < prompt {
            self.cut.unwrap_or(prompt)
        } else {
            self.total()
        };
        end - self.done
    }

    /// Prompt and reply go through the model again, as those of a sequence of this length.
    fn start_over(&mut self) {
        self.done = 0;
        self.cache.clear();
        self.cache.expect(self.total());
        self.state = fresh_state(&self.request);
    }

    /// Chooses a token from `row`; says so if the reply ends here.
    fn take(&mut self, row: &[f32], tokenizer: &Tokenizer, context: usize) -> Option<Finish> {
        if self.reply.is_empty() && self.request.first_logits {
            self.first_logits = Some(row.to_vec());
        }
        let id = self
            .sampler
            .choose(row, [&self.request.tokens, &self.reply]);
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
        if self.filter.hit() {
            return Some(Finish::StopString);
        }
        let full = self.reply.len() >= self.request.max_new_tokens || self.total() >= context;
        full.then_some(Finish::Length)
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
