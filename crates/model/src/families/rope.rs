//! Rotary embeddings: base, partial rotation, and the scalings in use.
//!
//! | scaling | inverse frequency `f` becomes |
//! | --- | --- |
//! | linear | `f / factor` |
//! | llama3 | `f / factor` for wavelengths above `original / low`, `f` below `original / high`, between them interpolated (Llama 3.1) |
//! | longrope | `f / short[i]` or, for sequences beyond the original context, `f / long[i]`; cosines and sines times `sqrt(1 + ln(s) / ln(original))`, `s` the ratio of contexts (2402.13753) |

use serde_json::Value;

use super::Source;
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::spec::Rope;

/// The base of local layers where a model with two bases does not say.
const LOCAL_BASE: f64 = 10_000.0;

/// The model's rotary embeddings and each layer's index into them.
pub(super) fn read(
    source: &Source<'_>,
    d_head: usize,
    windows: &[Option<usize>],
    checkpoint: &Checkpoint,
) -> Result<(Vec<Rope>, Vec<usize>), ModelError> {
    let (ropes, two) = match source {
        Source::Gguf(_, arch) => (
            from_gguf(source, arch, d_head, checkpoint)?,
            arch == "gemma3",
        ),
        Source::Hf(config) => from_config(source, config, d_head)?,
    };
    let which = windows
        .iter()
        .map(|w| usize::from(two && w.is_some()))
        .collect();
    Ok((ropes, which))
}

fn from_gguf(
    source: &Source<'_>,
    arch: &str,
    d_head: usize,
    checkpoint: &Checkpoint,
) -> Result<Vec<Rope>, ModelError> {
    let base = source.float("rope.freq_base", "\0")?;
    let default = if arch == "gemma3" {
        1_000_000.0
    } else {
        10_000.0
    };
    let rot_dim = source.size("rope.dimension_count", "\0")?.unwrap_or(d_head);
    let mut rope = Rope::plain(base.unwrap_or(default), rot_dim.min(1 << 16));
    if let Source::Gguf(m, _) = source
        && m.str(&format!("{arch}.rope.scaling.type"))? == Some("linear")
        && let Some(factor) = source.float("rope.scaling.factor", "\0")?
    {
        divide_all(&mut rope.inv_freq, factor)?;
    }
    if checkpoint.has("rope_freqs.weight") {
        divide(
            &mut rope.inv_freq,
            &factors(checkpoint, "rope_freqs.weight")?,
        )?;
    }
    if checkpoint.has("rope_factors_long.weight") {
        let original = source
            .size("rope.scaling.original_context_length", "\0")?
            .ok_or_else(|| Source::wrong("rope.scaling.original_context_length", "is missing"))?;
        let mut long = rope.inv_freq.clone();
        divide(&mut long, &factors(checkpoint, "rope_factors_long.weight")?)?;
        divide(
            &mut rope.inv_freq,
            &factors(checkpoint, "rope_factors_short.weight")?,
        )?;
        let context = source.size("context_length", "\0")?.unwrap_or(original);
        rope.scale = match source.float("rope.scaling.attn_factor", "\0")? {
            Some(scale) => scale as f32,
            None => long_scale(context, original),
        };
        rope.long = Some((long, original));
    }
    let mut ropes = vec![rope];
    if arch == "gemma3" {
        let local = source
            .float("rope.freq_base_swa", "\0")?
            .unwrap_or(LOCAL_BASE);
        ropes.push(Rope::plain(local, rot_dim.min(1 << 16)));
    }
    Ok(ropes)
}

fn from_config(
    source: &Source<'_>,
    config: &Value,
    d_head: usize,
) -> Result<(Vec<Rope>, bool), ModelError> {
    // transformers 5 writes `rope_parameters`, one table or one for each layer type.
    let parameters = config.get("rope_parameters").filter(|p| p.is_object());
    let by_type = |kind: &str| {
        parameters
            .and_then(|p| p.get(kind))
            .filter(|p| p.is_object())
    };
    let full = by_type("full_attention").or(parameters);
    let scaling = full.or_else(|| config.get("rope_scaling").filter(|s| s.is_object()));
    let number = |table: Option<&Value>, key: &str| table?.get(key)?.as_f64();
    let base = number(full, "rope_theta").or(number(Some(config), "rope_theta"));
    let partial = number(full, "partial_rotary_factor")
        .or(number(Some(config), "partial_rotary_factor"))
        .unwrap_or(1.0);
    let rot_dim = (d_head as f64 * partial.clamp(0.0, 1.0)) as usize / 2 * 2;
    let two =
        config.get("rope_local_base_freq").is_some() || by_type("sliding_attention").is_some();
    let default = if two { 1_000_000.0 } else { 10_000.0 };
    let mut rope = Rope::plain(base.unwrap_or(default), rot_dim);
    if let Some(table) = scaling {
        scale(&mut rope, table, source, config)?;
    }
    let mut ropes = vec![rope];
    if two {
        let local = number(by_type("sliding_attention"), "rope_theta")
            .or(number(Some(config), "rope_local_base_freq"))
            .unwrap_or(LOCAL_BASE);
        ropes.push(Rope::plain(local, rot_dim));
    }
    Ok((ropes, two))
}

fn scale(
    rope: &mut Rope,
    table: &Value,
    source: &Source<'_>,
    config: &Value,
) -> Result<(), ModelError> {
    let kind = ["rope_type", "type"]
        .iter()
        .find_map(|k| table.get(*k).and_then(Value::as_str))
        .unwrap_or("default");
    let number = |key: &str| table.get(key).and_then(Value::as_f64);
    let need = |key: &str| {
        number(key).filter(|v| *v > 0.0).ok_or_else(|| {
            Source::wrong(
                &format!("rope scaling '{kind}', {key}"),
                "is missing or not positive",
            )
        })
    };
    match kind {
        "default" => Ok(()),
        "linear" => divide_all(&mut rope.inv_freq, need("factor")?),
        "llama3" => {
            let (factor, low, high) = (
                need("factor")?,
                need("low_freq_factor")?,
                need("high_freq_factor")?,
            );
            let original = need("original_max_position_embeddings")?;
            for f in &mut rope.inv_freq {
                let wavelength = 2.0 * std::f64::consts::PI / f64::from(*f);
                let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                let full = f64::from(*f);
                *f = ((1.0 - smooth) * full / factor + smooth * full) as f32;
            }
            Ok(())
        }
        "longrope" | "su" => {
            let list = |key: &str| -> Result<Vec<f32>, ModelError> {
                table
                    .get(key)
                    .and_then(Value::as_array)
                    .and_then(|v| v.iter().map(|x| x.as_f64().map(|x| x as f32)).collect())
                    .ok_or_else(|| Source::wrong(key, "is missing or not numbers"))
            };
            let context = source.need("\0", "max_position_embeddings")?;
            let original = config
                .get("original_max_position_embeddings")
                .or(table.get("original_max_position_embeddings"))
                .and_then(Value::as_u64)
                .map_or(context, |v| v as usize);
            let mut long = rope.inv_freq.clone();
            divide(&mut long, &list("long_factor")?)?;
            divide(&mut rope.inv_freq, &list("short_factor")?)?;
            rope.scale = number("attention_factor")
                .map_or_else(|| long_scale(context, original), |v| v as f32);
            rope.long = Some((long, original));
            Ok(())
        }
        other => Err(ModelError::Config {
            field: "rope scaling",
            value: other.to_owned(),
            rule: "is not supported; supported are default, linear, llama3 and longrope".to_owned(),
        }),
    }
}

/// LongRoPE's factor on cosines and sines.
fn long_scale(context: usize, original: usize) -> f32 {
    let ratio = context as f64 / original.max(1) as f64;
    if ratio <= 1.0 || original <= 1 {
        return 1.0;
    }
    (1.0 + ratio.ln() / (original as f64).ln()).sqrt() as f32
}

fn divide_all(inv_freq: &mut [f32], factor: f64) -> Result<(), ModelError> {
    if !(factor.is_finite() && factor > 0.0) {
        return Err(Source::wrong("rope scaling factor", "is not positive"));
    }
    inv_freq
        .iter_mut()
        .for_each(|f| *f = (f64::from(*f) / factor) as f32);
    Ok(())
}

fn divide(inv_freq: &mut [f32], by: &[f32]) -> Result<(), ModelError> {
    if by.len() != inv_freq.len() || by.iter().any(|v| !(v.is_finite() && *v > 0.0)) {
        return Err(Source::wrong(
            "rope factors",
            &format!("must be {} positive numbers", inv_freq.len()),
        ));
    }
    inv_freq.iter_mut().zip(by).for_each(|(f, by)| *f /= by);
    Ok(())
}

fn factors(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>, ModelError> {
    let t = checkpoint.tensor(name)?;
    let mut out = vec![0.0; t.info.shape.iter().product()];
    demur_kernels::quant::dequantize_row(t.info.ty, t.bytes, &mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn longrope_scale_of_phi3_mini_128k() {
        // 131072 / 4096 = 32: sqrt(1 + ln 32 / ln 4096) = sqrt(1 + 5/12)
        assert!((long_scale(131_072, 4096) - (17.0f32 / 12.0).sqrt()).abs() < 1e-6);
        assert_eq!(long_scale(4096, 4096), 1.0);
    }

    #[test]
    fn plain_frequencies_by_hand() {
        let rope = Rope::plain(10_000.0, 4);
        assert_eq!(rope.inv_freq, [1.0, 0.01]);
    }
}
