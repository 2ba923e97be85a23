//! A safetensors checkpoint: its tensor table, then the model that `config.json` says it is. The input
//! is the config, a NUL, the tensors.
#![no_main]

mod folder;

use std::sync::Arc;

use demur_kernels::linear::Precision;
use demur_model::checkpoint::Checkpoint;
use demur_model::decoder::Model;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some(at) = bytes.iter().position(|b| *b == 0) else {
        return;
    };
    folder::file("config.json", &bytes[..at]);
    let path = folder::file("model.safetensors", &bytes[at + 1..]);
    if let Ok(checkpoint) = Checkpoint::open(&path) {
        let _ = Model::load(&Arc::new(checkpoint), Precision::F32);
    }
});
