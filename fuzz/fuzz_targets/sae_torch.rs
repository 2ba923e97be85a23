//! A file of `torch.save`: the archive, the restricted pickle reader, the tensors.
#![no_main]

use demur_sae::formats::{dictionary_learning, openai};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = openai::parse("fuzz", bytes);
    let config = br#"{"trainer":{"dict_class":"BatchTopKSAE"}}"#;
    if let Ok(sae) = dictionary_learning::parse("fuzz", config, bytes) {
        let _ = sae.encode(&vec![0.5; sae.d_model()], 1);
    }
});
