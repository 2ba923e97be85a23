//! The engine: who runs in the next pass, and what becomes of its logits.
//!
//! A sequence is its prompt and its reply so far; `done` counts how many of these tokens are in its
//! cache. A pass takes the next tokens of each sequence, and the one that has none left gets logits
//! and another token. Decoding is the case of one token left, prefill that of many, and a sequence
//! that has to start over (see [`KvCache`] on LongRoPE) sets `done` to 0.

use std::collections::VecDeque;

use demur_kernels::ops::{logsumexp, top_k_indices};

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
    done: usize, // tokens of prompt and reply in the cache
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

    /// Bytes of the caches of running sequences and of the workspace.
    pub fn memory(&self) -> usize {
        let caches: usize = self.running.iter().map(|r| r.cache.bytes()).sum();
        caches + self.workspace.bytes()
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

    /// How many tokens of each running sequence go into the next pass.
    fn schedule(&self) -> Vec<usize> {
        // Sequences that decode always go on; what is left is for prompts, first come first served.
        let decoding = self.running.iter().filter(|r| r.left() == 1).count();
        let mut budget = self.config.max_batch_tokens.saturating_sub(decoding);
        let mut idle = true; // no prompt has been taken yet
        let take = |r: &Running| {
            let left = r.left();
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
        let takes: Vec<usize> = self.running.iter().map(take).collect();
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

    /// Tokens of the part at hand, prompt or reply, that are not in the cache.
    fn left(&self) -> usize {
        let prompt = self.request.tokens.len();
        let end = if self.done < prompt {
            prompt
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
