//! The kernel ladder; see `benches/`.
#![forbid(unsafe_code)]
