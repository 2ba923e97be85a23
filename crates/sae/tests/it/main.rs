//! SAE folders and training states that are not what they should be: an SAE or an error, never a
//! panic.

mod formats;

use std::sync::LazyLock;

use demur_sae::saelens::{self, Files, WeightType};
use demur_sae::train::{
    Architecture, Checkpoints, Input, Precision, Rows, ScaledRows, TrainConfig, Trainer,
};
use demur_sae::{Sae, SaeConfig};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};

const FILES: [&str; 3] = ["cfg.json", "sae_weights.safetensors", "manifest.json"];

/// The three files of a small SAE.
fn files() -> [Vec<u8>; 3] {
    static MADE: LazyLock<[Vec<u8>; 3]> = LazyLock::new(make_files);
    MADE.clone()
}

fn make_files() -> [Vec<u8>; 3] {
    let cfg = SaeConfig {
        d_model: 4,
        d_sae: 6,
        k: 2,
        hook_name: "blocks.1.hook_resid_post".to_owned(),
        model_name: "test".to_owned(),
    };
    let w: Vec<f32> = (0..24).map(|i| (i as f32 * 0.7).sin()).collect();
    let sae = Sae::new(cfg, w.clone(), vec![0.5; 6], w, vec![1.0; 4]).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sae");
    saelens::save(&sae, &path, WeightType::F16, &json!({})).unwrap();
    FILES.map(|f| std::fs::read(path.join(f)).unwrap())
}

fn parse(files: &[Vec<u8>; 3], with_manifest: bool) -> Result<Sae, String> {
    let files = Files {
        config: &files[0],
        weights: &files[1],
        manifest: with_manifest.then_some(&files[2]),
    };
    saelens::parse("place", files).map_err(|e| e.to_string())
}

fn flips() -> impl Strategy<Value = Vec<(Index, u8)>> {
    vec((any::<Index>(), any::<u8>()), 1..5)
}

fn flip(bytes: &mut [u8], flips: &[(Index, u8)]) {
    for (at, bit) in flips {
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << (bit % 8);
    }
}

/// The name of a state after one step.
const STATE: &str = "state-000000001.bin";

/// A training state after a step, and its settings.
fn state() -> (Vec<u8>, TrainConfig) {
    static MADE: LazyLock<(Vec<u8>, TrainConfig)> = LazyLock::new(make_state);
    MADE.clone()
}

fn make_state() -> (Vec<u8>, TrainConfig) {
    let data: Vec<f32> = (0..64).map(|i| (i as f32 * 1.3).cos()).collect();
    let rows = Rows {
        data: &data,
        d_model: 4,
    };
    let mut rows = ScaledRows::new(rows, &Input::of(rows, 10.0), 1);
    let cfg = TrainConfig {
        sae: SaeConfig {
            d_model: 4,
            d_sae: 6,
            k: 2,
            hook_name: String::new(),
            model_name: String::new(),
        },
        architecture: Architecture::default(),
        batch: 8,
        steps: 4,
        lr: None,
        warmup_steps: 1,
        decay: 0.25,
        auxk_alpha: 0.03,
        dead_after: 64,
        outlier: 10.0,
        seed: 1,
        precision: Precision::default(),
        clip: None,
    };
    let mut trainer = Trainer::new(cfg.clone(), &rows).unwrap();
    let mut x = Vec::new();
    rows.batch(0, 0, 8, &mut x);
    trainer.step(&x);
    let folder = tempfile::tempdir().unwrap();
    let states = Checkpoints::new(folder.path(), 1);
    states.save(std::slice::from_ref(&trainer)).unwrap();
    (std::fs::read(folder.path().join(STATE)).unwrap(), cfg)
}

fn resume(bytes: &[u8], cfg: &TrainConfig) -> bool {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(STATE), bytes).unwrap();
    let states = Checkpoints::new(folder.path(), 1);
    states
        .resume(std::slice::from_ref(cfg))
        .is_ok_and(|r| r.trainers.is_some())
}

#[test]
fn what_is_broken_here_was_whole() {
    let files = files();
    assert!(parse(&files, true).is_ok() && parse(&files, false).is_ok());
    let (bytes, cfg) = state();
    assert!(resume(&bytes, &cfg));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_file_cut_anywhere_is_an_error_that_names_it(
        which in 0..3usize, part in 0.0..1.0f64, manifest in any::<bool>(),
    ) {
        let mut files = files();
        let n = (files[which].len() as f64 * part) as usize;
        files[which].truncate(n);
        if which < 2 || manifest {
            let e = parse(&files, manifest).unwrap_err();
            prop_assert!(e.contains(FILES[which]), "{}", e);
        }
    }

    #[test]
    fn the_sums_find_every_flip(which in 0..2usize, flips in flips()) {
        let mut files = files();
        let whole = files[which].clone();
        flip(&mut files[which], &flips);
        prop_assume!(files[which] != whole);
        prop_assert!(parse(&files, true).unwrap_err().contains("sha256"));
    }

    #[test]
    fn flips_without_sums(which in 0..2usize, flips in flips()) {
        let mut files = files();
        flip(&mut files[which], &flips);
        if let Ok(sae) = parse(&files, false) {
            // What was taken for an SAE works as one.
            let codes = sae.encode(&vec![1.0; 2 * sae.d_model()], 2);
            sae.decode(&codes, &mut vec![0.0; 2 * sae.d_model()]);
        }
    }

    #[test]
    fn values_of_a_config(
        key in prop_oneof![
            Just("architecture"), Just("d_in"), Just("d_sae"), Just("k"), Just("dtype"),
            Just("normalize_activations"), Just("metadata"), Just("d_head"),
        ],
        value in prop_oneof![
            Just(json!(0)), Just(json!(-1)), Just(json!(u64::MAX)), Just(json!(1u64 << 24)),
            Just(json!(1e300)), Just(Value::Null), Just(json!("x")), Just(json!([])), Just(json!({})),
        ],
    ) {
        let mut files = files();
        let mut config: Value = serde_json::from_slice(&files[0]).unwrap();
        config[key] = value.clone();
        files[0] = config.to_string().into_bytes();
        // Only the metadata may be anything.
        prop_assert_eq!(parse(&files, false).is_ok(), key == "metadata", "{} = {}", key, value);
    }

    #[test]
    fn a_state_that_is_broken_is_not_resumed(flips in flips(), cut in prop::option::of(0.0..1.0f64)) {
        let (whole, cfg) = state();
        let mut bytes = whole.clone();
        flip(&mut bytes, &flips);
        bytes.truncate((bytes.len() as f64 * cut.unwrap_or(1.0)) as usize);
        prop_assume!(bytes != whole);
        prop_assert!(!resume(&bytes, &cfg));
    }
}
