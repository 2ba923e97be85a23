//! Beginnings that prompts share, run once.
//!
//! The prompts of a study begin with the same template and system prompt. The first of them stops at the
//! end of what it shares; its cache, with the state of its intervention, is kept, and the others go on
//! from a copy. Keys and values of an edited residual belong to the plan that edited it, so a beginning is
//! shared only under the same [`Intervention::fingerprint`](crate::hooks::Intervention::fingerprint), and
//! only where an intervention treats each row by itself: a gate reads a prompt whole before its first
//! token is edited. As no row's numbers depend on how a prompt was cut, replies are as without sharing,
//! bit for bit.

use std::sync::Arc;

use super::Request;
use crate::decoder::KvCache;
use crate::hooks::{Intervention, InterventionState, Role};

/// Shorter beginnings are not worth a pass of their own.
const SHORTEST: usize = 8;
/// Beginnings that are kept.
const KEPT: usize = 8;

/// What is done to the rows of a sequence: nothing, or what a plan of this identity does.
pub(super) type Plan = Option<[u8; 32]>;

/// The plan of a sequence whose beginning may be shared; `None` if it must come whole.
pub(super) fn plan(hook: Option<&Arc<dyn Intervention>>) -> Option<Plan> {
    match hook.filter(|h| !h.is_empty()) {
        None => Some(None),
        Some(hook) => hook.row_wise().then(|| Some(hook.fingerprint())),
    }
}

/// How many tokens two prompts begin with in common, in the same roles; at least one of each is left over.
pub fn common(a: (&[u32], &[Role]), b: (&[u32], &[Role])) -> usize {
    let most = a.0.len().min(b.0.len()).saturating_sub(1);
    let same = |i: &usize| a.0[*i] == b.0[*i] && a.1.get(*i) == b.1.get(*i);
    (0..most).take_while(same).count()
}

/// Tokens that both begin with, under the same plan.
fn shared(a: &Request, b: &Request) -> usize {
    match (plan(a.hook.as_ref()), plan(b.hook.as_ref())) {
        (Some(p), Some(q)) if p == q => common((&a.tokens, &a.roles), (&b.tokens, &b.roles)),
        _ => 0,
    }
}

/// Where `request` should stop for the sake of `others`: where most tokens are saved in all.
pub(super) fn cut<'r>(
    request: &Request,
    others: impl Iterator<Item = &'r Request>,
) -> Option<usize> {
    let mut lengths: Vec<usize> = others.map(|o| shared(request, o)).collect();
    lengths.retain(|n| *n >= SHORTEST);
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    // The `i`-th longest is shared with `i + 1` others.
    let saved = |(i, n): (usize, &usize)| ((i + 1) * n, *n);
    lengths.iter().enumerate().map(saved).max().map(|(_, n)| n)
}

/// Whether `request` waits for the first `cut` tokens of `first`.
pub(super) fn waits(request: &Request, first: &Request, cut: usize) -> bool {
    shared(request, first) >= cut
}

struct Prefix {
    plan: Plan,
    tokens: Vec<u32>,
    roles: Vec<Role>,
    cache: KvCache,
    state: Option<Box<dyn InterventionState>>,
}

/// Beginnings that have been run, the last used at the end.
#[derive(Default)]
pub(super) struct Prefixes(Vec<Prefix>);

impl Prefixes {
    /// Keeps the first tokens of `request`: all that are in its cache.
    pub(super) fn keep(
        &mut self,
        request: &Request,
        cache: &KvCache,
        state: Option<&dyn InterventionState>,
    ) {
        let (Some(plan), n) = (plan(request.hook.as_ref()), cache.len()) else {
            return;
        };
        if self.0.len() == KEPT {
            self.0.remove(0);
        }
        self.0.push(Prefix {
            plan,
            tokens: request.tokens[..n].to_vec(),
            roles: request.roles[..n].to_vec(),
            cache: cache.clone(),
            state: state.map(|s| s.fork()),
        });
    }

    /// Cache and state of the longest beginning of `request` that is kept.
    pub(super) fn find(
        &mut self,
        request: &Request,
    ) -> Option<(KvCache, Option<Box<dyn InterventionState>>)> {
        let plan = plan(request.hook.as_ref())?;
        let fits = |p: &Prefix| {
            p.plan == plan
                && p.tokens.len() < request.tokens.len()
                && request.tokens.starts_with(&p.tokens)
                && request.roles.starts_with(&p.roles)
        };
        let all = self.0.iter().enumerate().filter(|(_, p)| fits(p));
        let (at, _) = all.max_by_key(|(_, p)| p.tokens.len())?;
        let prefix = self.0.remove(at);
        let found = (
            prefix.cache.clone(),
            prefix.state.as_ref().map(|s| s.fork()),
        );
        self.0.push(prefix);
        Some(found)
    }

    /// Bytes of the caches.
    pub(super) fn bytes(&self) -> usize {
        self.0.iter().map(|p| p.cache.bytes()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(tokens: &[u32]) -> Request {
        Request::new(tokens.to_vec(), vec![Role::User; tokens.len()], 1)
    }

    #[test]
    fn a_prompt_stops_where_most_is_saved() {
        let common: Vec<u32> = (0..20).collect();
        let with = |rest: &[u32]| request(&[&common, rest].concat());
        let first = with(&[90, 91, 92, 93]);
        // One other shares 23 tokens, four share 20: 4 x 20 and the one is more than 23.
        let mut others = vec![with(&[90, 91, 92, 95])];
        others.extend((0..4).map(|i| with(&[50 + i, 60])));
        others.push(request(&[7; 30]));
        assert_eq!(cut(&first, others.iter()), Some(20));
        assert_eq!(cut(&first, others[..1].iter()), Some(23));
        assert_eq!(cut(&first, others[5..].iter()), None);
        assert!(waits(&others[1], &first, 20) && !waits(&others[1], &first, 21));
        // Other roles are another beginning; a whole prompt is never shared.
        let mut other = with(&[90, 91, 92, 93]);
        assert_eq!(shared(&first, &other), 23);
        other.roles[10] = Role::System;
        assert_eq!(shared(&first, &other), 10);
    }
}
