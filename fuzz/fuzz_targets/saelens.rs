//! The files of an SAE folder: `cfg.json`, a NUL, the weights. A manifest, being a checksum, would only
//! keep the fuzzer out.
#![no_main]

use demur_sae::saelens::{Files, parse};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some(at) = bytes.iter().position(|b| *b == 0) else {
        return;
    };
    let files = Files {
        config: &bytes[..at],
        weights: &bytes[at + 1..],
        manifest: None,
    };
    if let Ok(sae) = parse("fuzz", files) {
        let row = vec![0.5; sae.d_model()];
        let _ = sae.encode(&row, 1);
    }
});
