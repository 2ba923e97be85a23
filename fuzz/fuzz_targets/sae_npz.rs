//! Gemma Scope's `params.npz`.
#![no_main]

use demur_sae::formats::gemma_scope;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(sae) = gemma_scope::parse_npz("fuzz", bytes) {
        let _ = sae.encode(&vec![0.5; sae.d_model()], 1);
    }
});
