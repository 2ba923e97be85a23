//! Checkpoints, tokenizers and one decoder with hooks on the residual stream.
//!
//! | module | job |
//! | --- | --- |
//! | [`checkpoint`] | a file or folder as a table of tensors, memory-mapped ([`gguf`], safetensors) |
//! | [`spec`] | what a decoder is, as data; `families` fills it in |
//! | [`tokenizer`], [`chat`] | text to tokens with roles, and back |
//! | [`hooks`] | sites on the residual stream and what may happen there |
//! | [`decoder`] | one forward pass for all families, over ragged batches |
//! | [`generate`] | continuous batching, sampling, streaming |
#![forbid(unsafe_code)]

pub mod chat;
pub mod checkpoint;
pub mod decoder;
mod error;
mod families;
pub mod generate;
pub mod gguf;
pub mod hooks;
mod safetensors;
pub mod spec;
pub mod tokenizer;

pub use error::ModelError;
