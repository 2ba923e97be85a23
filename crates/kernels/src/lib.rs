//! Hot loops of demur: every one with a plain scalar reference, and all of the project's `unsafe`.
//!
//! The crate knows slices and shapes, no models. Matrices are row-major. Work is split over
//! *output* rows, each computed by one thread in a fixed order, so the number of threads never
//! changes a bit of the result. Instruction sets are chosen at run time in [`dispatch`].
//!
//! | module | job |
//! | --- | --- |
//! | [`quant`] | GGUF block types: layout, exact unpacking |
//! | [`linear`] | `y = x Wᵀ + b` with weights packed once |
//! | [`mlp`] | the gated MLP, its hidden activations never in memory |
//! | [`attention`] | causal attention over ragged caches |
//! | [`cache`] | keys and values, in f32 or rounded |
//! | [`ops`] | norms, rotary embedding, activations, softmax, top-k |
//! | [`backward`] | gradients of norms, activations and attention |
//! | [`encoder`] | product and top-k of an autoencoder's encoder in one pass, bf16 or f32 |
//! | [`element`] | rows of bf16 or f32, gathered and summed |
//! | [`adam`] | the optimiser's step |
//! | [`sparse`] | top-k codes and the sparse decoder of autoencoders |
//! | [`gemm`] | dense f32 products, over the `gemm` crate |
//! | [`pool`] | parallel loops of a few microseconds |
//! | [`limits`] | what the machine can do at most, for benchmarks |
//! | [`mmap`] | read-only memory maps |

pub mod adam;
pub mod attention;
pub mod backward;
pub mod cache;
pub mod dispatch;
pub mod element;
pub mod encoder;
mod error;
pub mod gemm;
pub mod limits;
pub mod linear;
pub mod mlp;
pub mod mmap;
pub mod ops;
mod packed;
pub mod pool;
pub mod quant;
pub mod sparse;
#[cfg(test)]
mod testing;

pub use error::KernelError;

/// Sets the number of worker threads for the process; 0 means all cores. Only the first call counts.
///
/// # Errors
/// [`KernelError::Threads`] if the pool was already built.
pub fn set_threads(threads: usize) -> Result<(), KernelError> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .thread_name(|i| format!("demur-{i}"))
        .build_global()
        .map_err(|e| KernelError::Threads {
            reason: e.to_string(),
        })
}

/// Number of worker threads.
pub fn threads() -> usize {
    rayon::current_num_threads()
}
