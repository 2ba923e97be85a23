use demur_kernels::adam::Adam;
use demur_kernels::ops::axpy;

use super::*;

mod checkpoints;
mod gradients;

fn config(d: usize, m: usize, k: usize, batch: usize, steps: usize) -> TrainConfig {
    TrainConfig {
        sae: SaeConfig {
            d_model: d,
            d_sae: m,
            k,
            hook_name: "blocks.0.hook_resid_post".to_owned(),
            model_name: "planted".to_owned(),
        },
        architecture: Architecture::default(),
        batch,
        steps,
        lr: Some(3e-3),
        warmup_steps: 10,
        decay: 0.2,
        auxk_alpha: 1.0 / 32.0,
        dead_after: 2000,
        outlier: 10.0,
        seed: 5,
        precision: Precision::Bf16,
        clip: None,
    }
}

/// Every architecture, with `config`'s other settings.
fn architectures(cfg: &TrainConfig) -> Vec<TrainConfig> {
    let m = cfg.sae.d_sae;
    let l1 = 1.0;
    [
        Architecture::TopK { multi: false },
        Architecture::TopK { multi: true },
        Architecture::BatchTopK,
        Architecture::Matryoshka {
            group_sizes: vec![m / 4, m / 4, m - m / 4 * 2],
        },
        Architecture::Relu { l1, warmup: 0.1 },
        Architecture::JumpRelu {
            l0: 1.0,
            target: Some(3.0),
            bandwidth: 0.1,
            warmup: 0.1,
        },
        Architecture::Gated { l1, warmup: 0.1 },
    ]
    .map(|architecture| TrainConfig {
        auxk_alpha: match architecture.selects() {
            true => cfg.auxk_alpha,
            false => 0.0,
        },
        architecture,
        ..cfg.clone()
    })
    .to_vec()
}

fn gaussian(rng: &mut ChaCha8Rng) -> f32 {
    (0..12).map(|_| rng.random::<f32>()).sum::<f32>() - 6.0
}

/// Rows that are sums of a few of `m` unit directions, and the directions.
fn planted(n: usize, d: usize, m: usize, active: usize) -> (Vec<f32>, Vec<f32>) {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut atoms: Vec<f32> = (0..m * d).map(|_| gaussian(&mut rng)).collect();
    atoms.chunks_exact_mut(d).for_each(normalise);
    let mut x = vec![0.0; n * d];
    for row in x.chunks_exact_mut(d) {
        for _ in 0..active {
            let j = rng.random_range(0..m);
            axpy(0.5 + rng.random::<f32>(), &atoms[j * d..(j + 1) * d], row);
        }
    }
    (x, atoms)
}

fn train(
    cfg: &TrainConfig,
    x: &[f32],
    steps: usize,
    mut trainer: Option<Trainer>,
) -> (Trainer, f64) {
    let rows = Rows {
        data: x,
        d_model: cfg.sae.d_model,
    };
    let input = Input::of(rows, cfg.outlier);
    let mut data = ScaledRows::new(rows, &input, cfg.seed);
    let epoch = data.len() / cfg.batch;
    let mut t = trainer
        .take()
        .unwrap_or_else(|| Trainer::new(cfg.clone(), &data).unwrap());
    let mut batch = Vec::new();
    let mut fvu = 1.0;
    while t.steps_done() < steps {
        let step = t.steps_done();
        data.batch(step / epoch, step % epoch, cfg.batch, &mut batch);
        fvu = t.step(&batch).fvu;
    }
    (t, fvu)
}

#[test]
fn a_planted_dictionary_is_recovered() {
    let (d, m) = (24, 32);
    let (x, atoms) = planted(8192, d, m, 2);
    let cfg = config(d, m, 3, 512, 600);
    let (t, fvu) = train(&cfg, &x, 600, None);
    assert!(fvu < 0.1, "fvu {fvu}");
    let sae = t.finish().unwrap();
    let found = atoms
        .chunks_exact(d)
        .filter(|a| (0..m).any(|j| dot(a, sae.decoder_row(j)) > 0.9))
        .count();
    assert!(found >= 28, "{found} of {m} atoms");
}

#[test]
fn the_input_scale_folds_out() {
    let (d, m) = (16, 24);
    let (mut x, _) = planted(2048, d, m, 2);
    x.iter_mut().for_each(|v| *v = *v * 37.0 + 5.0);
    let cfg = config(d, m, 3, 256, 200);
    let (t, _) = train(&cfg, &x, 200, None);
    let sae = t.finish().unwrap();
    let mut meter = crate::metrics::QualityMeter::new(d, m);
    meter.add_rows(&sae, &x);
    assert!(meter.quality().fvu < 0.3, "{:?}", meter.quality());
    for j in 0..m {
        let norm = dot(sae.decoder_row(j), sae.decoder_row(j));
        assert!((norm - 1.0).abs() < 1e-4, "row {j} has squared norm {norm}");
    }
}

/// Trained to the end, each architecture explains what two active atoms of a row leave to explain, has
/// about the L0 that it was asked for, and is the same SAE when it is written and read.
#[test]
fn every_architecture_trains_and_is_read_back() {
    let (d, m) = (24, 32);
    let (x, _) = planted(4096, d, m, 2);
    let base = TrainConfig {
        dead_after: 4096,
        ..config(d, m, 3, 256, 500)
    };
    for cfg in architectures(&base) {
        let name = format!("{:?}", cfg.architecture);
        let (t, _) = train(&cfg, &x, cfg.steps, None);
        let sae = t.finish().unwrap();
        let mut meter = crate::metrics::QualityMeter::new(d, m);
        meter.add_rows(&sae, &x);
        let q = meter.quality();
        // Atoms explain all but their interference; the mean alone, or wrong directions, far less.
        assert!(q.fvu < 0.15, "{name}: {q:?}");
        match cfg.architecture {
            Architecture::TopK { .. } => assert!(q.l0 <= 3.0, "{name}: {q:?}"),
            Architecture::Relu { .. } | Architecture::Gated { .. } => {
                // half of all at first
                assert!(q.l0 < 10.0, "{name}: {q:?}");
            }
            // One threshold in place of the batch: about the same L0.
            _ => assert!((q.l0 - 3.0).abs() < 0.6, "{name}: {q:?}"),
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sae");
        let none = serde_json::Value::Null;
        crate::saelens::save(&sae, &path, crate::saelens::WeightType::F32, &none).unwrap();
        let read = crate::saelens::load(&path).unwrap();
        let written = match sae.architecture().as_str() {
            "batchtopk" | "matryoshka_batchtopk" => "jumprelu".to_owned(),
            other => other.to_owned(),
        };
        assert_eq!(read.architecture(), written);
        let (a, b) = (sae.encode(&x, 4096), read.encode(&x, 4096));
        assert_eq!(a.idx, b.idx, "{name}");
        // r_mag is written as a logarithm
        let near = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * a.abs();
        assert!(a.val.iter().zip(&b.val).all(near), "{name}");
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let (x, _) = planted(64, 6, 10, 2);
    let rows = Rows {
        data: &x,
        d_model: 6,
    };
    let rows = ScaledRows::new(rows, &Input::of(rows, 10.0), 5);
    let jump = |l0: f64, target: f64, bandwidth: f64| Architecture::JumpRelu {
        l0,
        target: Some(target),
        bandwidth,
        warmup: 0.1,
    };
    for (architecture, auxk_alpha, field) in [
        (
            Architecture::Relu {
                l1: -1.0,
                warmup: 0.0,
            },
            0.0,
            "l1",
        ),
        (
            Architecture::Gated {
                l1: 1.0,
                warmup: 1.5,
            },
            0.0,
            "warmup",
        ),
        (
            Architecture::Relu {
                l1: 1.0,
                warmup: 0.0,
            },
            0.1,
            "auxk_alpha",
        ),
        (jump(f64::NAN, 3.0, 0.1), 0.0, "l0"),
        (jump(1.0, 0.0, 0.1), 0.0, "target"),
        (jump(1.0, 3.0, 0.0), 0.0, "bandwidth"),
        (
            Architecture::Matryoshka {
                group_sizes: vec![4, 4],
            },
            0.1,
            "group_sizes",
        ),
    ] {
        let cfg = TrainConfig {
            architecture,
            auxk_alpha,
            ..config(6, 10, 2, 16, 10)
        };
        let e = Trainer::new(cfg, &rows).unwrap_err().to_string();
        assert!(e.starts_with(field), "{e}");
    }
}

/// A run of some steps on several numbers of threads, with dead latents and clipping.
#[test]
fn the_same_bits_for_any_number_of_threads() {
    let (d, m) = (40, 300);
    let (x, _) = planted(700, d, 64, 3);
    for precision in [Precision::Bf16, Precision::F32] {
        let base = TrainConfig {
            dead_after: 700,
            precision,
            clip: Some(0.01),
            ..config(d, m, 4, 350, 20)
        };
        for cfg in architectures(&base) {
            let mut first = None;
            for threads in [1, 2, 3, 8] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
                let (t, _) = pool.build().unwrap().install(|| train(&cfg, &x, 4, None));
                if cfg.architecture.selects() {
                    assert!(!t.dead().is_empty(), "the auxiliary term must have work");
                }
                let first = first.get_or_insert_with(|| t.params.clone());
                let name = &cfg.architecture;
                assert_eq!(
                    *first, t.params,
                    "{name:?}, {precision:?}, {threads} threads"
                );
            }
        }
    }
}

#[test]
fn bf16_trains_as_f32_does() {
    let (d, m) = (24, 32);
    let (x, _) = planted(4096, d, m, 2);
    let [full, half] = [Precision::F32, Precision::Bf16].map(|precision| {
        let cfg = TrainConfig {
            precision,
            ..config(d, m, 3, 512, 300)
        };
        let (t, _) = train(&cfg, &x, 300, None);
        let mut meter = crate::metrics::QualityMeter::new(d, m);
        meter.add_rows(&t.finish().unwrap(), &x);
        meter.quality().fvu
    });
    assert!(
        (half / full - 1.0).abs() < 0.05,
        "fvu {half} against {full}"
    );
}

#[test]
fn clipping_scales_the_norm_of_all_gradients() {
    let (d, m) = (12, 20);
    let (x, _) = planted(64, d, m, 2);
    let base = TrainConfig {
        dead_after: u64::MAX,
        precision: Precision::F32,
        ..config(d, m, 2, 64, 60)
    };
    for cfg in architectures(&base) {
        let norm = |clip: Option<f64>| {
            let cfg = TrainConfig {
                clip,
                ..cfg.clone()
            };
            let (t, _) = train(&cfg, &x, 1, None);
            // After one step from zero moments, m = (1 - beta1) g.
            let moments = t.params.all().flat_map(|p| &p.m);
            let square: f64 = moments.map(|m| f64::from(*m).powi(2)).sum();
            square.sqrt() / f64::from(1.0 - Adam::BETA1)
        };
        let whole = norm(None);
        let third = norm(Some(whole / 3.0)) / whole * 3.0;
        assert!(
            (third - 1.0).abs() < 1e-4,
            "{:?}: {third}",
            cfg.architecture
        );
        assert_eq!(norm(Some(2.0 * whole)), whole);
    }
}

#[test]
fn latents_that_never_fired_stay() {
    let (d, m) = (12, 20);
    let (x, _) = planted(256, d, m, 2);
    let cfg = TrainConfig {
        auxk_alpha: 0.0,
        ..config(d, m, 2, 64, 60)
    };
    let rows = Rows {
        data: &x,
        d_model: d,
    };
    let rows = ScaledRows::new(rows, &Input::of(rows, 10.0), 5);
    let mut t = Trainer::new(cfg.clone(), &rows).unwrap();
    t.params.b_enc.w[7] = -1e6;
    let before = t.params.clone();
    let (t, _) = train(&cfg, &x, 5, Some(t));
    for j in 0..m {
        let row = j * d..(j + 1) * d;
        let same = t.params.w_enc.w[row.clone()] == before.w_enc.w[row.clone()]
            && t.params.w_dec.w[row.clone()] == before.w_dec.w[row];
        assert_eq!(same, j == 7, "latent {j}");
    }
}
