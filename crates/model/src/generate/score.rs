//! Log-likelihoods of continuations: many questions, each with several answers.
//!
//! The log-likelihood of a continuation `c` after a context `x` is `sum_i ln p(c_i | x, c_<i)`.
//! Contexts of several requests go through the model in one pass, and a context is read once for all
//! of its continuations: the cache is cut back to it before the next one. Where neighbouring requests
//! begin alike (the examples before a question), that beginning is read once for all of them and
//! copied. Neither changes a bit of the result: no row's numbers depend on its batch, nor on how a
//! prompt was cut into passes.
//!
//! Under an intervention the context is the prompt and a continuation is what the model wrote. One
//! that is not [row-wise](Intervention::row_wise) gets the context whole and a continuation token by
//! token, as in generation, and shares no beginning with others.

use std::sync::Arc;

use demur_kernels::ops::logsumexp;
use serde_json::Value;

use super::{EngineConfig, prefix};
use crate::decoder::{KvCache, LogitsAt, Model, SeqInput, Workspace};
use crate::error::ModelError;
use crate::hooks::{Intervention, InterventionState, Role};

/// Shortest common beginning that is worth a copy, tokens.
const MIN_SHARED: usize = 32;
/// Rows of logits in one pass over continuations: at a large vocabulary they are most of the memory.
const MAX_LOGITS: usize = 128;

/// A context and the continuations to score after it.
#[derive(Debug, Clone)]
pub struct ScoreRequest {
    /// The context's tokens; at least one.
    pub context: Vec<u32>,
    /// Their roles, as many.
    pub roles: Vec<Role>,
    /// The continuations, each at least one token.
    pub continuations: Vec<Vec<u32>>,
    /// What edits the residual stream.
    pub hook: Option<Arc<dyn Intervention>>,
}

/// A continuation's score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ContinuationScore {
    /// `sum ln p`, nats.
    pub logprob: f64,
    /// Whether every token is the most probable one at its place.
    pub greedy: bool,
}

/// The scores of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct Scored {
    /// One a continuation, in their order.
    pub scores: Vec<ContinuationScore>,
    /// What the intervention says that it did on the context.
    pub audit: Option<Value>,
}

/// Scores `requests`; `on_done` gets each one's number and scores, in their order.
///
/// # Errors
/// [`ModelError::Request`], [`ModelError::TooLong`], [`ModelError::TokenId`] or
/// [`ModelError::SiteLayer`] for a request that can't run, before any has.
pub fn score(
    model: &Model,
    requests: &[ScoreRequest],
    config: EngineConfig,
    mut on_done: impl FnMut(usize, &Scored),
) -> Result<(), ModelError> {
    requests.iter().try_for_each(|r| check(model, r))?;
    let mut ws = Workspace::default();
    let mut pool: Vec<KvCache> = Vec::new();
    let mut shared = model.new_cache();
    let mut at = 0;
    while at < requests.len() {
        let (mut end, prefix) = alike(model, requests, at);
        // Those that share nothing go through the model together.
        while prefix == 0 && end < requests.len() && end - at < config.max_batch {
            match alike(model, requests, end) {
                (next, 0) => end = next,
                _ => break,
            }
        }
        let state = read_shared(
            model,
            &requests[at],
            prefix,
            config.max_batch_tokens.max(1),
            &mut shared,
            &mut ws,
        )?;
        while at < end {
            let some = &requests[at..end.min(at + config.max_batch.max(1))];
            let mut open: Vec<Open<'_>> = some
                .iter()
                .map(|request| {
                    let mut cache = pool.pop().unwrap_or_else(|| model.new_cache());
                    if prefix > 0 {
                        cache.copy_from(&shared);
                    } else {
                        cache.clear();
                    }
                    cache.expect(longest(request));
                    let state = match &state {
                        Some(state) => Some(state.fork()),
                        None => start(request),
                    };
                    Open::new(request, cache, state, prefix)
                })
                .collect();
            contexts(model, &mut open, config.max_batch_tokens.max(1), &mut ws)?;
            continuations(model, &mut open, &mut ws)?;
            for o in open {
                let audit = o.state.as_ref().and_then(|s| s.audit());
                let scores = o.scores;
                on_done(at, &Scored { scores, audit });
                at += 1;
                pool.push(o.cache);
            }
        }
    }
    Ok(())
}

fn check(model: &Model, r: &ScoreRequest) -> Result<(), ModelError> {
    let spec = model.spec();
    let faults = [
        (r.context.is_empty(), "the context is empty"),
        (
            r.context.len() != r.roles.len(),
            "tokens and roles have different lengths",
        ),
        (r.continuations.is_empty(), "there is no continuation"),
        (
            r.continuations.iter().any(Vec::is_empty),
            "a continuation is empty",
        ),
    ];
    if let Some((_, reason)) = faults.iter().find(|(bad, _)| *bad) {
        return Err(ModelError::Request {
            reason: (*reason).to_owned(),
        });
    }
    if longest(r) > spec.context {
        return Err(ModelError::TooLong {
            tokens: longest(r),
            context: spec.context,
        });
    }
    let mut tokens = r.context.iter().chain(r.continuations.iter().flatten());
    if let Some(&id) = tokens.find(|&&id| id as usize >= spec.d_vocab) {
        return Err(ModelError::TokenId {
            id,
            d_vocab: spec.d_vocab,
        });
    }
    for site in r.hook.iter().flat_map(|h| h.sites()) {
        site.check(spec.n_layers)?;
    }
    Ok(())
}

/// Tokens of the context with its longest continuation.
fn longest(r: &ScoreRequest) -> usize {
    r.context.len() + r.continuations.iter().map(Vec::len).max().unwrap_or(0)
}

fn start(r: &ScoreRequest) -> Option<Box<dyn InterventionState>> {
    let hook = r.hook.as_ref().filter(|h| !h.is_empty());
    hook.map(|h| h.start())
}

/// Whether rows may come in any pieces.
fn row_wise(r: &ScoreRequest) -> bool {
    prefix::plan(r.hook.as_ref()).is_some()
}

/// The requests from `at` on that share a beginning, up to the end returned, and its length.
fn alike(model: &Model, requests: &[ScoreRequest], at: usize) -> (usize, usize) {
    let first = &requests[at];
    let Some(plan) = prefix::plan(first.hook.as_ref()) else {
        return (at + 1, 0);
    };
    let same_plan = |r: &ScoreRequest| prefix::plan(r.hook.as_ref()) == Some(plan);
    // Which rotary frequencies a long sequence has depends on its length.
    let one_rope = |r: &ScoreRequest| {
        let original = model.spec().original_context();
        original.is_none_or(|original| longest(r) <= original)
    };
    let (mut end, mut length) = (at + 1, first.context.len() - 1);
    for r in &requests[at + 1..] {
        if !(same_plan(r) && one_rope(r) && one_rope(first)) {
            break;
        }
        let both = [first, r].map(|r| (&r.context[..], &r.roles[..]));
        let common = prefix::common(both[0], both[1]).min(length);
        // The second sets the length; after it a beginning that shrinks much is another one.
        if common < MIN_SHARED || (end > at + 1 && common * 4 < length * 3) {
            break;
        }
        length = common;
        end += 1;
    }
    (end, if end == at + 1 { 0 } else { length })
}

/// Reads the first `prefix` tokens of `r` into `shared`.
fn read_shared(
    model: &Model,
    r: &ScoreRequest,
    prefix: usize,
    most: usize,
    shared: &mut KvCache,
    ws: &mut Workspace,
) -> Result<Option<Box<dyn InterventionState>>, ModelError> {
    shared.clear();
    let mut state = start(r).filter(|_| prefix > 0);
    let pieces = r.context[..prefix].chunks(most);
    for (tokens, roles) in pieces.zip(r.roles[..prefix].chunks(most)) {
        let mut input = [SeqInput {
            tokens,
            roles,
            generated: false,
            cache: &mut *shared,
            hook: state.as_deref_mut(),
            hook_sites: r.hook.as_ref().map_or(&[], |h| h.sites()),
            logits: LogitsAt::None,
        }];
        model.forward(&mut input, None, ws)?;
    }
    Ok(state)
}

/// A request at work.
struct Open<'r> {
    request: &'r ScoreRequest,
    cache: KvCache,
    /// After the context.
    state: Option<Box<dyn InterventionState>>,
    /// In the continuation at hand.
    forked: Option<Box<dyn InterventionState>>,
    /// Tokens of the context in the cache.
    read: usize,
    /// The continuation at hand, and how many of its tokens are in the cache.
    continuation: usize,
    done: usize,
    scores: Vec<ContinuationScore>,
}

impl<'r> Open<'r> {
    fn new(
        request: &'r ScoreRequest,
        cache: KvCache,
        state: Option<Box<dyn InterventionState>>,
        read: usize,
    ) -> Self {
        Self {
            request,
            cache,
            state,
            forked: None,
            read,
            continuation: 0,
            done: 0,
            scores: Vec::new(),
        }
    }

    /// Scores the first token of every continuation from the logits after the context.
    fn first(&mut self, row: &[f32]) {
        let (z, best) = (logsumexp(row), argmax(row));
        let score = |c: &Vec<u32>| ContinuationScore {
            logprob: f64::from(row[c[0] as usize]) - f64::from(z),
            greedy: c[0] as usize == best,
        };
        self.scores = self.request.continuations.iter().map(score).collect();
        self.settle();
    }

    /// Goes on to a continuation that has tokens left to read: its last is never read.
    fn settle(&mut self) {
        let all = &self.request.continuations;
        while let Some(c) = all.get(self.continuation) {
            if self.done + 1 < c.len() {
                break;
            }
            self.continuation += 1;
            self.done = 0;
        }
    }

    /// How many tokens of the continuation at hand go into the next pass.
    fn take(&self) -> usize {
        let c = self.request.continuations.get(self.continuation);
        let left = c.map_or(0, |c| c.len() - 1 - self.done);
        if row_wise(self.request) {
            left.min(MAX_LOGITS)
        } else {
            left.min(1)
        }
    }
}

/// The most probable token; of equals the first.
fn argmax(row: &[f32]) -> usize {
    let best = |b: (usize, f32), (i, &l): (usize, &f32)| if l > b.1 { (i, l) } else { b };
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), best).0
}

/// Reads what is left of the contexts, and scores first tokens.
fn contexts(
    model: &Model,
    open: &mut [Open<'_>],
    most: usize,
    ws: &mut Workspace,
) -> Result<(), ModelError> {
    let mut at = 0;
    while at < open.len() {
        let (mut end, mut tokens) = (at, 0);
        while end < open.len() {
            let n = open[end].request.context.len() - open[end].read;
            if end > at && tokens + n > most {
                break;
            }
            tokens += n;
            end += 1;
        }
        let some = &mut open[at..end];
        let mut inputs: Vec<SeqInput<'_>> = some
            .iter_mut()
            .map(|o| SeqInput {
                tokens: &o.request.context[o.read..],
                roles: &o.request.roles[o.read..],
                generated: false,
                cache: &mut o.cache,
                hook: o.state.as_deref_mut(),
                hook_sites: o.request.hook.as_ref().map_or(&[], |h| h.sites()),
                logits: LogitsAt::Last,
            })
            .collect();
        let logits = model.forward(&mut inputs, None, ws)?;
        drop(inputs);
        for (o, row) in some.iter_mut().zip(logits.rows()) {
            o.read = o.request.context.len();
            o.first(row);
        }
        at = end;
    }
    Ok(())
}

/// Reads the continuations, one a request at a time, and adds up the scores of later tokens.
fn continuations(
    model: &Model,
    open: &mut [Open<'_>],
    ws: &mut Workspace,
) -> Result<(), ModelError> {
    let assistant = [Role::Assistant; MAX_LOGITS];
    loop {
        let (mut inputs, mut taken, mut rows) = (Vec::new(), Vec::new(), 0);
        for (at, o) in open.iter_mut().enumerate() {
            let n = o.take();
            if n == 0 || rows + n > MAX_LOGITS {
                continue;
            }
            if o.done == 0 {
                o.cache.truncate(o.request.context.len());
                o.forked = o.state.as_ref().map(|s| s.fork());
            }
            rows += n;
            taken.push((at, n));
            inputs.push(SeqInput {
                tokens: &o.request.continuations[o.continuation][o.done..o.done + n],
                roles: &assistant[..n],
                generated: true,
                cache: &mut o.cache,
                hook: o.forked.as_deref_mut(),
                hook_sites: o.request.hook.as_ref().map_or(&[], |h| h.sites()),
                logits: LogitsAt::All,
            });
        }
        if inputs.is_empty() {
            return Ok(());
        }
        let logits = model.forward(&mut inputs, None, ws)?;
        drop(inputs);
        let mut rows = logits.rows();
        for (at, n) in taken {
            let o = &mut open[at];
            let c = &o.request.continuations[o.continuation];
            for (&next, row) in c[o.done + 1..].iter().zip(rows.by_ref().take(n)) {
                let s = &mut o.scores[o.continuation];
                s.logprob += f64::from(row[next as usize]) - f64::from(logsumexp(row));
                s.greedy &= next as usize == argmax(row);
            }
            o.done += n;
            o.settle();
        }
    }
}
