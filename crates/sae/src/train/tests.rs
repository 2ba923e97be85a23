use demur_kernels::adam::Adam;
use demur_kernels::ops::axpy;

use super::*;

fn config(d: usize, m: usize, k: usize, batch: usize, steps: usize) -> TrainConfig {
    TrainConfig {
        sae: SaeConfig {
            d_model: d,
            d_sae: m,
            k,
            hook_name: "blocks.0.hook_resid_post".to_owned(),
            model_name: "planted".to_owned(),
        },
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
    let mut data = ScaledRows::new(rows, cfg.outlier, cfg.seed);
    let mut t = trainer
        .take()
        .unwrap_or_else(|| Trainer::new(cfg.clone(), &data).unwrap());
    let mut batch = Vec::new();
    let mut fvu = 1.0;
    while t.steps_done() < steps {
        data.batch(t.steps_done(), cfg.batch, &mut batch);
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

#[test]
fn a_resumed_run_has_the_same_bits() {
    let (d, m) = (12, 20);
    let (x, _) = planted(1024, d, m, 2);
    let cfg = TrainConfig {
        dead_after: 300,
        ..config(d, m, 2, 64, 60)
    };
    let (whole, _) = train(&cfg, &x, 60, None);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let (half, _) = train(&cfg, &x, 23, None);
    half.save(&path).unwrap();
    let resumed = Trainer::resume(&path, &cfg).unwrap();
    let (resumed, _) = train(&cfg, &x, 60, Some(resumed));
    assert_eq!(resumed.finish().unwrap(), whole.finish().unwrap());
    // another config, a flipped bit and a cut file are refused
    let other = TrainConfig {
        seed: 6,
        ..cfg.clone()
    };
    assert!(Trainer::resume(&path, &other).is_err());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[500] ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(
        Trainer::resume(&path, &cfg),
        Err(SaeError::Checksum { .. })
    ));
    std::fs::write(&path, &bytes[..20]).unwrap();
    assert!(Trainer::resume(&path, &cfg).is_err());
}

/// The loss of the module's documentation, in f64, from the definition; `V` and the auxiliary
/// target are those of the unperturbed parameters, as the gradient takes them as given.
fn loss(
    cfg: &TrainConfig,
    t: &Params,
    x: &[f32],
    dead: &[u32],
    at: Option<(&str, usize, f64)>,
) -> f64 {
    let (d, m, k) = (cfg.sae.d_model, cfg.sae.d_sae, cfg.sae.k);
    let read = |p: &Param, name: &str| -> Vec<f64> {
        let mut v: Vec<f64> = p.w.iter().map(|x| f64::from(*x)).collect();
        if let Some((which, i, h)) = at
            && which == name
        {
            v[i] += h;
        }
        v
    };
    let forward = |we: &[f64], wd: &[f64], be: &[f64], bd: &[f64], x: &[f32]| {
        let pre: Vec<f64> = (0..m)
            .map(|j| {
                be[j]
                    + (0..d)
                        .map(|i| (f64::from(x[i]) - bd[i]) * we[j * d + i])
                        .sum::<f64>()
            })
            .collect();
        let mut order: Vec<usize> = (0..m).collect();
        order.sort_by(|a, b| pre[*b].total_cmp(&pre[*a]));
        let mut hat = bd.to_vec();
        for &j in &order[..k] {
            for i in 0..d {
                hat[i] += pre[j].max(0.0) * wd[j * d + i];
            }
        }
        (pre, hat)
    };
    let raw = |p: &Param| -> Vec<f64> { p.w.iter().map(|x| f64::from(*x)).collect() };
    let (we, wd, be, bd) = (
        read(&t.w_enc, "w_enc"),
        read(&t.w_dec, "w_dec"),
        read(&t.b_enc, "b_enc"),
        read(&t.b_dec, "b_dec"),
    );
    let v = step::variance(x, d);
    let k_aux = (d / 2).min(dead.len());
    let weight = cfg.auxk_alpha * (dead.len() as f64 / (d / 2) as f64).min(1.0);
    let mut total = 0.0;
    for row in x.chunks_exact(d) {
        let (pre, hat) = forward(&we, &wd, &be, &bd, row);
        total += (0..d)
            .map(|i| (hat[i] - f64::from(row[i])).powi(2))
            .sum::<f64>();
        let (_, given) = forward(
            &raw(&t.w_enc),
            &raw(&t.w_dec),
            &raw(&t.b_enc),
            &raw(&t.b_dec),
            row,
        );
        let mut aux: Vec<u32> = dead.to_vec();
        aux.sort_by(|a, b| pre[*b as usize].total_cmp(&pre[*a as usize]));
        let mut e: Vec<f64> = (0..d).map(|i| given[i] - f64::from(row[i])).collect();
        for &j in &aux[..k_aux] {
            for i in 0..d {
                e[i] += pre[j as usize].max(0.0) * wd[j as usize * d + i];
            }
        }
        if k_aux > 0 {
            total += weight * e.iter().map(|v| v * v).sum::<f64>();
        }
    }
    total / v
}

#[test]
fn gradients_match_finite_differences() {
    let (d, m) = (6, 10);
    let (x, _) = planted(16, d, m, 2);
    let cfg = TrainConfig {
        precision: Precision::F32,
        ..config(d, m, 3, 16, 10)
    };
    let mut data = ScaledRows::new(
        Rows {
            data: &x,
            d_model: d,
        },
        10.0,
        5,
    );
    let mut batch = Vec::new();
    data.batch(0, 16, &mut batch);
    let mut t = Trainer::new(cfg.clone(), &data).unwrap();
    let dead: Vec<u32> = vec![1, 4, 7, 8];
    for &j in &dead {
        t.idle[j as usize] = u64::MAX / 2;
        // so that a dead latent is not among the top k
        t.params.b_enc.w[j as usize] = -0.6;
    }
    // Encoder and decoder rows that differ, for a gradient of general shape.
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let w_enc = &mut t.params.w_enc.w;
    w_enc
        .iter_mut()
        .for_each(|v| *v += 0.1 * gaussian(&mut rng));
    let before = t.params.clone();
    let stats = t.step(&batch);
    assert!((stats.loss - loss(&cfg, &before, &batch, &dead, None)).abs() < 1e-4 * stats.loss);
    // After one step from zero moments, m = (1 - beta1) g.
    let g_of = |p: &Param, i: usize| f64::from(p.m[i]) / f64::from(1.0 - Adam::BETA1);
    let h = 1e-4;
    let slope = |name: &str, i: usize| {
        (loss(&cfg, &before, &batch, &dead, Some((name, i, h)))
            - loss(&cfg, &before, &batch, &dead, Some((name, i, -h))))
            / (2.0 * h)
    };
    let mut checked = 0;
    for (name, after) in [
        ("w_enc", &t.params.w_enc),
        ("b_enc", &t.params.b_enc),
        ("b_dec", &t.params.b_dec),
    ] {
        for i in 0..after.w.len() {
            let (found, expected) = (g_of(after, i), slope(name, i));
            // A kink (a latent entering or leaving the top k) within h spoils the difference.
            let near = (found - expected).abs() <= 2e-3 * (1e-2 + expected.abs());
            checked += usize::from(near);
            assert!(
                near || name != "b_enc" || (found - expected).abs() < 0.05,
                "{name}[{i}]: {found} against {expected}"
            );
        }
    }
    let total = m * d + m + d;
    assert!(
        checked * 100 >= total * 95,
        "{checked} of {total} gradients agree"
    );
    // The decoder's gradient is projected: compare after the same projection.
    for j in 0..m {
        let w = &before.w_dec.w[j * d..(j + 1) * d];
        let raw: Vec<f64> = (0..d).map(|i| slope("w_dec", j * d + i)).collect();
        let along: f64 = raw.iter().zip(w).map(|(g, w)| g * f64::from(*w)).sum();
        for i in 0..d {
            let expected = raw[i] - along * f64::from(w[i]);
            let found = g_of(&t.params.w_dec, j * d + i);
            let near = (found - expected).abs() <= 2e-3 * (1e-2 + expected.abs());
            assert!(near, "w_dec[{j}, {i}]: {found} against {expected}");
        }
    }
}

/// A run of some steps on several numbers of threads, with dead latents and clipping.
#[test]
fn the_same_bits_for_any_number_of_threads() {
    let (d, m) = (40, 300);
    let (x, _) = planted(700, d, 64, 3);
    for precision in [Precision::Bf16, Precision::F32] {
        let cfg = TrainConfig {
            dead_after: 700,
            precision,
            clip: Some(0.01),
            ..config(d, m, 4, 350, 20)
        };
        let mut first = None;
        for threads in 1..=8 {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let (t, _) = pool.build().unwrap().install(|| train(&cfg, &x, 6, None));
            assert!(!t.dead().is_empty(), "the auxiliary term must have work");
            let first = first.get_or_insert_with(|| t.params.clone());
            assert_eq!(*first, t.params, "{precision:?}, {threads} threads");
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
    let norm = |clip: Option<f64>| {
        let cfg = TrainConfig {
            clip,
            dead_after: u64::MAX,
            precision: Precision::F32,
            ..config(d, m, 2, 64, 60)
        };
        let (t, _) = train(&cfg, &x, 1, None);
        let p = &t.params;
        // After one step from zero moments, m = (1 - beta1) g.
        let moments = [&p.w_enc, &p.w_dec, &p.b_enc, &p.b_dec].map(|p| &p.m);
        let square: f64 = moments
            .iter()
            .copied()
            .flatten()
            .map(|m| f64::from(*m).powi(2))
            .sum();
        square.sqrt() / f64::from(1.0 - Adam::BETA1)
    };
    let whole = norm(None);
    assert!((norm(Some(whole / 3.0)) / whole * 3.0 - 1.0).abs() < 1e-4);
    assert_eq!(norm(Some(2.0 * whole)), whole);
}

#[test]
fn latents_that_never_fired_stay() {
    let (d, m) = (12, 20);
    let (x, _) = planted(256, d, m, 2);
    let cfg = TrainConfig {
        auxk_alpha: 0.0,
        ..config(d, m, 2, 64, 60)
    };
    let rows = ScaledRows::new(
        Rows {
            data: &x,
            d_model: d,
        },
        10.0,
        5,
    );
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
