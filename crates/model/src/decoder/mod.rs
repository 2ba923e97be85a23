//! One decoder for all families.
//!
//! With `x` the residual stream, block `i` is
//!
//! ```text
//! x += post_norm?( W_o attention(rope(norm_q? W_q h), rope(norm_k? W_k h), W_v h) ),  h = norm(x)
//! x += post_norm?( W_down (act(W_gate h) * W_up h) ),                                 h = norm(x)
//! ```
//!
//! where the [`ModelSpec`] says which of the optional parts a family has. A batch is ragged: the new
//! tokens of all sequences lie packed in one `[tokens, d_model]` buffer, linear layers run over all
//! rows at once, attention and hooks per sequence. The head is computed only for rows that ask for
//! logits. No kernel lets a row's numbers depend on the rows beside it: a sequence gives the same
//! bits alone, in a batch, and in pieces over a cache.
//!
//! | file | holds |
//! | --- | --- |
//! | `batch.rs` | what goes in and comes out: sequences, caches, captures, logits |
//! | `weights.rs` | from tensors to packed weights |
//! | `forward.rs` | the pass |
//! | `backward.rs` | the gradient of the last token's logits with respect to the residual at a site |

mod backward;
mod batch;
mod forward;
mod weights;

use std::sync::Arc;

use demur_kernels::cache::{CacheFormat, CacheRows};
use demur_kernels::linear::Precision;

pub use self::backward::Gradient;
pub use self::batch::{Capture, KvCache, Logits, LogitsAt, SeqInput, Workspace};
use self::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::spec::ModelSpec;

/// A model ready to run.
#[derive(Debug)]
pub struct Model {
    spec: ModelSpec,
    checkpoint: Arc<Checkpoint>,
    weights: Weights,
    cache: CacheFormat,
}

/// Memory of a loaded model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryReport {
    /// Bytes of the weight files.
    pub checkpoint: u64,
    /// Bytes of the packed weights.
    pub weights: usize,
    /// Bytes of keys and values for each token of each sequence.
    pub cache_per_token: usize,
    /// Bytes of activations for each token of a forward pass.
    pub workspace_per_token: usize,
    /// Bytes of the logits of one row.
    pub logits_per_row: usize,
}

impl Model {
    /// Packs the weights of `checkpoint`, which stays mapped for embedding look-ups.
    ///
    /// # Errors
    /// What [`ModelSpec::from_checkpoint`] finds; a tensor that is missing or has another shape than
    /// the spec asks for.
    pub fn load(checkpoint: &Arc<Checkpoint>, precision: Precision) -> Result<Self, ModelError> {
        let (spec, names) = ModelSpec::from_checkpoint(checkpoint)?;
        let weights = Weights::load(checkpoint, &spec, &names, precision)?;
        Ok(Self {
            spec,
            checkpoint: Arc::clone(checkpoint),
            weights,
            cache: CacheFormat::default(),
        })
    }

    /// The model's description.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// What [`Self::new_cache`] keeps keys and values as, from now on; f32 at first.
    pub fn set_cache_format(&mut self, format: CacheFormat) {
        self.cache = format;
    }

    /// An empty cache.
    pub fn new_cache(&self) -> KvCache {
        self.new_cache_as(self.cache)
    }

    /// An empty cache of a format of its own.
    pub fn new_cache_as(&self, format: CacheFormat) -> KvCache {
        let rows = || CacheRows::new(format, self.spec.d_head);
        KvCache {
            layers: (0..self.spec.n_layers).map(|_| (rows(), rows())).collect(),
            ..KvCache::default()
        }
    }

    /// What the model takes in memory.
    pub fn memory(&self) -> MemoryReport {
        let s = &self.spec;
        let (q, kv) = (s.n_heads * s.d_head, s.n_kv_heads * s.d_head);
        let float = size_of::<f32>();
        MemoryReport {
            checkpoint: self.checkpoint.bytes_on_disk(),
            weights: self.weights.bytes(),
            cache_per_token: s.n_layers * 2 * s.n_kv_heads * self.cache.bytes(s.d_head),
            workspace_per_token: (3 * s.d_model + 2 * q + 2 * kv + 2 * s.d_mlp) * float,
            logits_per_row: s.d_vocab * float,
        }
    }
}
