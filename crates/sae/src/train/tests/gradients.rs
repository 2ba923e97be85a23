//! Gradients of every architecture against finite differences of its loss, written from the definition
//! in f64.

use super::*;

/// Parameters in f64, in the order of [`Params::all`].
type Wide = Vec<Vec<f64>>;

fn wide(p: &Params) -> Wide {
    let all = p.all();
    all.map(|p| p.w.iter().map(|v| f64::from(*v)).collect())
        .collect()
}

/// `(x - b_dec) w_j + b_j` of each latent.
fn pre(p: &Wide, x: &[f64], m: usize) -> Vec<f64> {
    let d = x.len();
    let product = |j: usize| -> f64 { (0..d).map(|i| (x[i] - p[3][i]) * p[0][j * d + i]).sum() };
    (0..m).map(|j| p[2][j] + product(j)).collect()
}

/// `sum |sum_j f_j W_dec[j] + offset|^2`, over the latents below `end`.
fn square(f: &[f64], w_dec: &[f64], end: usize, offset: impl Fn(usize) -> f64, d: usize) -> f64 {
    let at = |i: usize| (0..end).map(|j| f[j] * w_dec[j * d + i]).sum::<f64>() + offset(i);
    (0..d).map(|i| at(i).powi(2)).sum()
}

/// The loss at `p`. What gradients take as given (the variance, who is selected, the auxiliary target, the
/// frozen decoder, and both sides of a jump) is read at `given`.
///
/// The pseudo-derivatives of JumpReLU are the derivatives of this loss: next to a threshold `H` is replaced
/// by a ramp of the bandwidth's width, whose slope is the rectangle, from its value at `given` on.
fn loss(cfg: &TrainConfig, p: &Wide, given: &Wide, x: &[f32], dead: &[usize]) -> f64 {
    let (d, m, k) = (cfg.sae.d_model, cfg.sae.d_sae, cfg.sae.k);
    let rows: Vec<Vec<f64>> = x
        .chunks_exact(d)
        .map(|r| r.iter().map(|v| f64::from(*v)).collect())
        .collect();
    let n = rows.len();
    let variance = step::variance(x, d);
    let before: Vec<Vec<f64>> = rows.iter().map(|r| pre(given, r, m)).collect();
    let mut order: Vec<(usize, usize)> = (0..n).flat_map(|r| (0..m).map(move |j| (r, j))).collect();
    order.sort_by(|a, b| before[b.0][b.1].total_cmp(&before[a.0][a.1]));
    let selected: Vec<(usize, usize)> = match cfg.architecture {
        Architecture::TopK { .. } => {
            let of_row = |r: usize| order.iter().filter(move |e| e.0 == r).take(k);
            (0..n).flat_map(of_row).copied().collect()
        }
        _ => order[..k * n].to_vec(),
    };
    let (mut total, mut l0) = (0.0, 0.0);
    for (r, x) in rows.iter().enumerate() {
        let (now, was) = (pre(p, x, m), &before[r]);
        let e = |i: usize| p[3][i] - x[i];
        let w_dec = &p[1];
        let keep = |j: usize| match selected.contains(&(r, j)) {
            true => now[j].max(0.0),
            false => 0.0,
        };
        match &cfg.architecture {
            Architecture::TopK { .. }
            | Architecture::BatchTopK
            | Architecture::Matryoshka { .. } => {
                let f: Vec<f64> = (0..m).map(keep).collect();
                for end in cfg.architecture.levels(m) {
                    total += square(&f, w_dec, end as usize, e, d);
                }
                if cfg.architecture == (Architecture::TopK { multi: true }) {
                    let mut wide = vec![0.0; m];
                    for (_, j) in order.iter().filter(|e| e.0 == r).take(4 * k) {
                        wide[*j] = now[*j].max(0.0);
                    }
                    total += square(&wide, w_dec, m, e, d) / 8.0;
                }
                let k_aux = (d / 2).min(dead.len());
                let weight = cfg.auxk_alpha * (dead.len() as f64 / (d / 2) as f64).min(1.0);
                let mut best = dead.to_vec();
                best.sort_by(|a, b| was[*b].total_cmp(&was[*a]));
                let mut aux = vec![0.0; m];
                best[..k_aux].iter().for_each(|&j| aux[j] = now[j].max(0.0));
                let hat = |i: usize| -> f64 {
                    let of = |j: usize| match selected.contains(&(r, j)) {
                        true => was[j].max(0.0) * given[1][j * d + i],
                        false => 0.0,
                    };
                    (0..m).map(of).sum::<f64>() + given[3][i] - x[i]
                };
                if k_aux > 0 {
                    total += weight * square(&aux, w_dec, m, hat, d);
                }
            }
            Architecture::Relu { l1, .. } => {
                let f: Vec<f64> = now.iter().map(|v| v.max(0.0)).collect();
                total += square(&f, w_dec, m, e, d) + l1 * f.iter().sum::<f64>();
            }
            Architecture::JumpRelu { bandwidth, .. } => {
                let width = bandwidth * (d as f64).sqrt();
                let ramp =
                    |j: usize, t: &Wide| ((was[j] - t[4][j].exp()) / width + 0.5).clamp(0.0, 1.0);
                let mut f = vec![0.0; m];
                for j in 0..m {
                    let theta = given[4][j].exp();
                    let jump = f64::from(u8::from(was[j] > theta));
                    let moved = ramp(j, p) - ramp(j, given);
                    f[j] = jump * now[j] + theta * moved;
                    l0 += (jump + moved) / n as f64;
                }
                total += square(&f, w_dec, m, e, d);
            }
            Architecture::Gated { l1, .. } => {
                let gate: Vec<f64> = now.iter().map(|v| v.max(0.0)).collect();
                let mag = |j: usize| (now[j] - p[2][j]) * p[4][j].exp() + p[5][j];
                let f: Vec<f64> = (0..m)
                    .map(|j| if was[j] > 0.0 { mag(j).max(0.0) } else { 0.0 })
                    .collect();
                total += square(&f, w_dec, m, e, d) + l1 * gate.iter().sum::<f64>();
                total += square(&gate, &given[1], m, |i| given[3][i] - x[i], d);
            }
        }
    }
    let penalty = match cfg.architecture {
        Architecture::JumpRelu {
            l0: weight,
            target: Some(target),
            ..
        } => weight * (l0 / target - 1.0).powi(2),
        Architecture::JumpRelu { l0: weight, .. } => weight * l0,
        _ => 0.0,
    };
    total / variance + penalty
}

/// Compares every gradient of one step.
#[track_caller]
fn check(cfg: TrainConfig) {
    let (d, m, n) = (cfg.sae.d_model, cfg.sae.d_sae, cfg.batch);
    let (x, _) = planted(n, d, m, 2);
    let rows = Rows {
        data: &x,
        d_model: d,
    };
    let mut data = ScaledRows::new(rows, &Input::of(rows, 10.0), 5);
    let mut batch = Vec::new();
    data.batch(0, 0, n, &mut batch);
    let mut t = Trainer::new(cfg.clone(), &data).unwrap();
    // Parameters of general position: encoder rows that are not the decoder's, biases that are not 0.
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let mut shake = |p: &mut Param, by: f32| {
        p.w.iter_mut().for_each(|v| *v += by * gaussian(&mut rng));
    };
    shake(&mut t.params.w_enc, 0.2);
    shake(&mut t.params.b_enc, 0.2);
    t.params.extra.iter_mut().for_each(|p| shake(p, 0.2));
    let dead: Vec<usize> = match cfg.architecture.selects() {
        true => vec![1, 4, 7, 8],
        false => Vec::new(),
    };
    for &j in &dead {
        t.idle[j] = u64::MAX / 2;
        // so that a dead latent is not selected
        t.params.b_enc.w[j] = -1.5;
    }
    let before = wide(&t.params);
    let stats = t.step(&batch);
    let name = format!("{:?}", cfg.architecture);
    let exact = loss(&cfg, &before, &before, &batch, &dead);
    assert!(
        (stats.loss - exact).abs() < 1e-5 * exact,
        "{name}: loss {} against {exact}",
        stats.loss
    );
    let h = 1e-5;
    for (at, after) in t.params.all().enumerate() {
        let slope = |i: usize| {
            let of = |h: f64| {
                let mut p = before.clone();
                p[at][i] += h;
                loss(&cfg, &p, &before, &batch, &dead)
            };
            (of(h) - of(-h)) / (2.0 * h)
        };
        let mut expected: Vec<f64> = (0..after.w.len()).map(slope).collect();
        if at == 1 {
            // The decoder's gradient is projected.
            for (g, w) in expected.chunks_mut(d).zip(before[1].chunks(d)) {
                let along: f64 = g.iter().zip(w).map(|(g, w)| g * w).sum();
                g.iter_mut().zip(w).for_each(|(g, w)| *g -= along * w);
            }
        }
        let size = expected.iter().fold(0.0f64, |a, g| a.max(g.abs()));
        assert!(size > 1e-4, "{name}: parameter {at} has no gradient");
        for (i, expected) in expected.iter().enumerate() {
            // After one step from zero moments, m = (1 - beta1) g.
            let found = f64::from(after.m[i]) / f64::from(1.0 - Adam::BETA1);
            assert!(
                (found - expected).abs() <= 1e-4 * size,
                "{name}: parameter {at}[{i}]: {found} against {expected}"
            );
        }
    }
}

#[test]
fn gradients_match_finite_differences() {
    let cfg = TrainConfig {
        precision: Precision::F32,
        ..config(6, 10, 2, 16, 10)
    };
    for mut cfg in architectures(&cfg) {
        if let Architecture::JumpRelu { bandwidth, .. } = &mut cfg.architecture {
            *bandwidth = 0.3; // many rows near their thresholds
        }
        check(cfg);
    }
    // the plain L0 term, and a batch that is a tile less a row
    let architecture = Architecture::JumpRelu {
        l0: 0.02,
        target: None,
        bandwidth: 0.3,
        warmup: 0.0,
    };
    check(TrainConfig {
        architecture,
        auxk_alpha: 0.0,
        precision: Precision::F32,
        ..config(6, 10, 3, 63, 10)
    });
}
