//! `manifest.json` beside an SAE whose other files are whole.
#![no_main]

use demur_sae::saelens::{Files, parse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let files = Files {
        config: include_bytes!("../../testdata/saes/saelens-topk/cfg.json"),
        weights: include_bytes!("../../testdata/saes/saelens-topk/sae_weights.safetensors"),
        manifest: Some(bytes),
    };
    let _ = parse("fuzz", files);
});
