//! Sparse autoencoders: equations, training, metrics, file formats.
#![forbid(unsafe_code)]
