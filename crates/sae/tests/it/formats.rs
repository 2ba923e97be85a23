//! Files of other libraries: codes and reconstructions are theirs, and what is broken is refused.

use std::path::{Path, PathBuf};

use demur_sae::Sae;
use demur_sae::formats::{self, Format, gemma_scope, llama_scope, openai, phi3, sparsify};
use demur_sae::saelens::{self, WeightType};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::SafeTensors;
use serde_json::json;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../testdata/saes")
        .join(name)
}

/// A golden tensor as f32.
fn golden(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let t = file.tensor(name).unwrap();
    t.data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}

#[track_caller]
fn close(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        let tolerance = 1e-5 + 1e-5 * b.abs();
        // A NaN fails.
        assert!((a - b).abs() <= tolerance, "{what}[{i}]: {a}, not {b}");
    }
}

/// Codes and reconstructions of `sae` are the golden ones of `name`, in a batch and row by row.
#[track_caller]
fn agrees(name: &str, sae: &Sae) {
    let bytes = std::fs::read(folder(name).join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (x, acts, x_hat) = (
        golden(&file, "x"),
        golden(&file, "acts"),
        golden(&file, "x_hat"),
    );
    let (d, m) = (sae.d_model(), sae.d_sae());
    let n = x.len() / d;
    let dense = |x: &[f32], n: usize| {
        let codes = sae.encode(x, n);
        let mut acts = vec![0.0; n * m];
        let rows = codes.idx.chunks(codes.k).zip(codes.val.chunks(codes.k));
        for ((idx, val), row) in rows.zip(acts.chunks_mut(m)) {
            for (&j, &v) in idx.iter().zip(val).filter(|e| *e.1 > 0.0) {
                row[j as usize] = v;
            }
        }
        let mut x_hat = vec![0.0; n * sae.d_out()];
        sae.reconstruct(x, &codes, &mut x_hat);
        (acts, x_hat)
    };
    let (found, reconstructed) = dense(&x, n);
    close(&format!("{name}: acts"), &found, &acts);
    close(&format!("{name}: x_hat"), &reconstructed, &x_hat);
    for (t, row) in x.chunks(d).enumerate() {
        let (found, _) = dense(row, 1);
        close(
            &format!("{name}: row {t}"),
            &found,
            &acts[t * m..(t + 1) * m],
        );
    }
}

/// Name of the fixture, its format, its architecture.
const FIXTURES: [(&str, Format, &str); 26] = [
    ("saelens-topk", Format::Saelens, "topk"),
    ("saelens-topk-rescaled", Format::Saelens, "topk"),
    ("saelens-topk-layer-norm", Format::Saelens, "topk"),
    ("saelens-standard", Format::Saelens, "standard"),
    (
        "saelens-standard-rescaled-input",
        Format::Saelens,
        "standard",
    ),
    ("saelens-standard-uncentred", Format::Saelens, "standard"),
    ("saelens-jumprelu", Format::Saelens, "jumprelu"),
    ("saelens-gated", Format::Saelens, "gated"),
    ("saelens-transcoder", Format::Saelens, "transcoder"),
    (
        "saelens-skip-transcoder",
        Format::Saelens,
        "skip_transcoder",
    ),
    (
        "saelens-jumprelu-transcoder",
        Format::Saelens,
        "jumprelu_transcoder",
    ),
    ("saelens-flat-topk", Format::Saelens, "topk"),
    ("sparsify-topk", Format::Sparsify, "topk"),
    (
        "sparsify-skip-transcoder",
        Format::Sparsify,
        "topk_skip_transcoder",
    ),
    (
        "dictionary-learning-standard",
        Format::DictionaryLearning,
        "standard",
    ),
    (
        "dictionary-learning-new",
        Format::DictionaryLearning,
        "standard",
    ),
    (
        "dictionary-learning-gated",
        Format::DictionaryLearning,
        "gated",
    ),
    (
        "dictionary-learning-topk",
        Format::DictionaryLearning,
        "topk",
    ),
    (
        "dictionary-learning-batch-topk",
        Format::DictionaryLearning,
        "batchtopk",
    ),
    (
        "dictionary-learning-matryoshka",
        Format::DictionaryLearning,
        "matryoshka_batchtopk",
    ),
    (
        "dictionary-learning-jumprelu",
        Format::DictionaryLearning,
        "jumprelu",
    ),
    ("gemma-scope", Format::GemmaScope, "jumprelu"),
    (
        "gemma-scope-2-transcoder",
        Format::GemmaScope,
        "jumprelu_skip_transcoder",
    ),
    ("llama-scope", Format::LlamaScope, "jumprelu"),
    ("phi3", Format::Phi3, "gated"),
    ("openai-topk/sae.pt", Format::Openai, "topk"),
];

#[test]
fn codes_and_reconstructions_are_those_of_the_library() {
    for (name, format, architecture) in FIXTURES {
        let (sae, found) = formats::load(&folder(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            (found, &*sae.architecture()),
            (format, architecture),
            "{name}"
        );
        agrees(name.trim_end_matches("/sae.pt"), &sae);
    }
}

#[test]
fn what_is_converted_computes_the_same() {
    for (name, _, architecture) in FIXTURES {
        let (sae, _) = formats::load(&folder(name)).unwrap();
        let golden = name.trim_end_matches("/sae.pt");
        let scratch = tempfile::tempdir().unwrap();
        let out = scratch.path().join("out");
        let saved = saelens::save(&sae, &out, WeightType::F32, &json!({}));
        if architecture == "topk_skip_transcoder" {
            assert!(
                saved.unwrap_err().to_string().contains("sparsify"),
                "{name}"
            );
        } else {
            saved.unwrap_or_else(|e| panic!("{name}: {e}"));
            agrees(golden, &saelens::load(&out).unwrap());
        }
        match sparsify::to_bytes(&sae) {
            Ok([(_, config), (_, weights)]) => {
                let again = sparsify::parse("out", &config, &weights, "", "").unwrap();
                agrees(golden, &again);
            }
            Err(e) => assert!(
                !architecture.starts_with("topk")
                    || name == "saelens-topk-layer-norm"
                    || name.starts_with("openai"),
                "{name}: {e}"
            ),
        }
    }
}

/// One reader over bytes in memory.
type Reader = fn(&[u8], &[u8]) -> Result<Sae, demur_sae::SaeError>;

/// Fixture file, config beside it, reader.
const READERS: [(&str, &str, Reader); 7] = [
    (
        "dictionary-learning-topk/ae.pt",
        "dictionary-learning-topk/config.json",
        |c, b| formats::dictionary_learning::parse("ae.pt", c, b),
    ),
    (
        "dictionary-learning-matryoshka/ae.pt",
        "dictionary-learning-matryoshka/config.json",
        |c, b| formats::dictionary_learning::parse("ae.pt", c, b),
    ),
    ("openai-topk/sae.pt", "", |_, b| openai::parse("sae.pt", b)),
    ("gemma-scope/params.npz", "", |_, b| {
        gemma_scope::parse_npz("params.npz", b)
    }),
    (
        "llama-scope/checkpoints/final.safetensors",
        "llama-scope/hyperparams.json",
        |c, b| llama_scope::parse("llama", c, b),
    ),
    (
        "sparsify-topk/sae.safetensors",
        "sparsify-topk/cfg.json",
        |c, b| sparsify::parse("sparsify", c, b, "", ""),
    ),
    ("phi3/sae_weights.safetensors", "", |_, b| {
        phi3::parse("phi3", b"", b)
    }),
];

fn files(which: usize) -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str| match name {
        "" => Vec::new(),
        name => std::fs::read(folder(name)).unwrap(),
    };
    (read(READERS[which].1), read(READERS[which].0))
}

/// What is taken for an SAE works as one.
fn use_it(sae: &Sae) {
    let codes = sae.encode(&vec![0.5; 2 * sae.d_model()], 2);
    let mut out = vec![0.0; 2 * sae.d_out()];
    sae.reconstruct(&vec![0.5; 2 * sae.d_model()], &codes, &mut out);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_cut_anywhere_is_an_error(which in 0..READERS.len(), part in 0.0..1.0f64) {
        let (config, mut bytes) = files(which);
        bytes.truncate((bytes.len() as f64 * part) as usize);
        prop_assert!(READERS[which].2(&config, &bytes).is_err());
    }

    #[test]
    fn flips(
        which in 0..READERS.len(), flips in vec((any::<Index>(), any::<u8>()), 1..6), of_config in any::<bool>(),
    ) {
        let (mut config, mut bytes) = files(which);
        for (at, bit) in flips {
            let target = if of_config && !config.is_empty() { &mut config } else { &mut bytes };
            // Mostly in the front, where structure is.
            let n = target.len().min(if bit & 8 == 0 { 1200 } else { usize::MAX });
            target[at.index(n)] ^= 1 << (bit % 8);
        }
        if let Ok(sae) = READERS[which].2(&config, &bytes) {
            use_it(&sae);
        }
    }
}

/// A file of `torch.save` with the given program, and a storage `0` of 16 bytes.
fn torch_file(program: &[u8]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    let entries: [(&str, &[u8]); 2] = [("a/data.pkl", program), ("a/data/0", &[0; 16])];
    for (name, data) in entries {
        let at = out.len() as u32;
        let (n, size) = (
            (name.len() as u16).to_le_bytes(),
            (data.len() as u32).to_le_bytes(),
        );
        out.extend(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        out.extend([&size[..], &size, &n, &[0, 0], name.as_bytes(), data].concat());
        directory.extend(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend(
            [
                &size[..],
                &size,
                &n,
                &[0; 12],
                &at.to_le_bytes(),
                name.as_bytes(),
            ]
            .concat(),
        );
    }
    let start = (out.len() as u32).to_le_bytes();
    let size = (directory.len() as u32).to_le_bytes();
    out.extend(directory);
    out.extend(b"PK\x05\x06\0\0\0\0\x02\0\x02\0");
    out.extend([&size[..], &start, &[0, 0]].concat());
    out
}

#[track_caller]
fn refused(program: &[u8], expect: &str) {
    let e = openai::parse("x.pt", &torch_file(program))
        .unwrap_err()
        .to_string();
    assert!(e.contains(expect), "{e}");
}

#[test]
fn pickles_execute_nothing() {
    refused(b"\x80\x02}.", "encoder.weight");
    refused(b"\x80\x02cos\nsystem\n(X\x02\0\0\0idtR.", "os.system");
    refused(b"\x80\x02cbuiltins\neval\n.", "builtins.eval");
    refused(b"\x80\x02c__builtin__\ngetattr\n.", "getattr");
    // REDUCE, NEWOBJ, INST, OBJ, EXT1, STACK_GLOBAL and protocol 5's buffers
    refused(b"\x80\x02}}R.", "not a function");
    for op in [0x81, b'i', b'o', 0x82, 0x93, 0x97] {
        refused(&[0x80, 2, b'}', op, b'.'], "opcode");
    }
    refused(b"\x80\x05}.", "protocol");
    refused(b"\x80\x02]q\0h\0a.", "dictionary"); // a list that holds itself
    refused(b"\x80\x02}q\0X\x01\0\0\0ah\0s.", "encoder.weight"); // a dictionary that holds itself
    refused(b"\x80\x02(u.", "stack is empty");
    refused(b"\x80\x02u.", "mark");
    refused(b"\x80\x02}X\xff\xff\xff\xffa", "cut short");
    // a tensor of 2^40 elements with strides of 0 over a storage of 4
    let tensor = |shape: &[u8], stride: &[u8]| {
        let mut p = b"\x80\x02}X\x01\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storage"
            .to_vec();
        p.extend(b"ctorch\nFloatStorage\nX\x01\0\0\0");
        p.extend(b"0X\x03\0\0\0cpuK\x04tQK\0");
        p.extend([shape, stride, b"tRs."].concat());
        p
    };
    let (wide, zero) = (b"J\0\0\x10\0J\0\0\x10\0\x86", b"K\0K\0\x86");
    refused(&tensor(wide, zero), "beyond its storage");
    refused(&tensor(b"K\x02\x85", b"K\x09\x85"), "beyond its storage");
    refused(&tensor(b"K\x02\x85", b"K\x01K\x01\x86"), "shape");
}
