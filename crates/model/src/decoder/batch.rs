//! What goes into a forward pass and what comes out.

use demur_kernels::cache::CacheRows;
use demur_kernels::linear::Products;
use demur_kernels::mlp::Hidden;

use crate::hooks::{InterventionState, Role, Site};

/// Keys and values of one sequence, one pair a layer.
///
/// # LongRoPE
/// Where a model has two sets of rotary frequencies, one for sequences within its original context
/// and one for longer ones, all keys of a sequence must be turned by the same set. A cache can't
/// know how long its sequence will become, so [`KvCache::expect`] tells it before the first token;
/// what it has been told, or its length if that is more, chooses the set. A sequence that outgrows
/// the original context unannounced mixes both, and its output differs from that of one pass over
/// the whole; [`crate::generate`] starts such a sequence over instead, as the reference
/// implementation does.
#[derive(Debug, Clone, Default)]
pub struct KvCache {
    pub(super) layers: Vec<(CacheRows, CacheRows)>, // [len, n_kv_heads, d_head] each
    pub(super) len: usize,
    /// Layers that saw all the tokens: fewer after a pass that stopped early.
    pub(super) depth: usize,
    pub(super) expected: usize,
}

impl KvCache {
    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says that the sequence will have at least `tokens` tokens.
    pub fn expect(&mut self, tokens: usize) {
        self.expected = self.expected.max(tokens);
    }

    /// The length that chooses the rotary frequencies: what was expected, or what is there.
    pub(crate) fn expected(&self) -> usize {
        self.len.max(self.expected)
    }

    /// Forgets all tokens but keeps the memory.
    pub fn clear(&mut self) {
        self.len = 0;
        self.expected = 0;
    }

    /// Forgets all tokens from number `len` on.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Becomes a copy of `other`, in the memory that it has: a sequence that goes on from the same
    /// tokens under the same intervention.
    pub fn copy_from(&mut self, other: &Self) {
        self.layers.truncate(other.layers.len());
        for ((k, v), (from_k, from_v)) in self.layers.iter_mut().zip(&other.layers) {
            k.clone_from(from_k);
            v.clone_from(from_v);
        }
        self.layers
            .extend_from_slice(&other.layers[self.layers.len()..]);
        (self.len, self.depth, self.expected) = (other.len, other.depth, other.expected);
    }

    /// Bytes that it holds, room for growth included.
    pub fn bytes(&self) -> usize {
        let layers = self.layers.iter();
        layers.map(|(k, v)| k.bytes() + v.bytes()).sum()
    }
}

/// Which of a sequence's new tokens get logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsAt {
    /// None: the head is not computed.
    None,
    /// The last one.
    Last,
    /// All.
    All,
}

/// One sequence of a batch: its new tokens, its cache, its hook.
pub struct SeqInput<'a> {
    /// New tokens; at least one.
    pub tokens: &'a [u32],
    /// Their roles, as many.
    pub roles: &'a [Role],
    /// Whether the model wrote them.
    pub generated: bool,
    /// The sequence's cache; the new tokens are added.
    pub cache: &'a mut KvCache,
    /// What edits this sequence's residuals.
    pub hook: Option<&'a mut (dyn InterventionState + 'static)>,
    /// The hook's sites, canonical.
    pub hook_sites: &'a [Site],
    /// Which tokens get logits.
    pub logits: LogitsAt,
}

/// What to keep of the residual stream, as later layers see it (after any edit).
#[derive(Debug, Clone, Default)]
pub struct Capture {
    /// The sites.
    pub sites: Vec<Site>,
    /// Stop after the last of them: later layers and the head are not computed, and there are no
    /// logits. From the caches only a pass goes on that stops no later.
    pub stop_after_last: bool,
    /// How packed weights are multiplied in this pass. The caches it leaves are of the same arithmetic.
    pub products: Products,
    /// Filled in: for each site, `[tokens, d_model]` in the order of the batch.
    pub rows: Vec<Vec<f32>>,
}

/// Logits of the rows that asked for them, in the order of the batch. They live in the workspace
/// until the next pass.
#[derive(Debug, Clone, Copy, Default)]
pub struct Logits<'w> {
    pub(super) data: &'w [f32],
    pub(super) d_vocab: usize,
}

impl<'w> Logits<'w> {
    /// The rows, `[d_vocab]` each.
    pub fn rows(&self) -> std::slice::ChunksExact<'w, f32> {
        self.data.chunks_exact(self.d_vocab.max(1))
    }
}

/// Buffers that are kept from one forward pass to the next, so that a step of generation allocates
/// next to nothing.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) x: Vec<f32>,
    pub(super) h: Vec<f32>,
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) hidden: Hidden,
    pub(super) out: Vec<f32>,
    pub(super) logits: Vec<f32>,
    pub(super) products: Products,
}

impl Workspace {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        let buffers = [
            &self.x,
            &self.h,
            &self.q,
            &self.k,
            &self.v,
            &self.attended,
            &self.out,
            &self.logits,
        ];
        let floats = buffers.iter().map(|b| b.capacity()).sum::<usize>();
        floats * size_of::<f32>() + self.hidden.bytes()
    }
}
