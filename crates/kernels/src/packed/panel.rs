//! A panel of weights made ready for a tile of activations: integers a byte each, factors in f32.

#[cfg(target_arch = "x86_64")]
use bytemuck::Zeroable;

use super::{Kind, Line, PANEL, Packed, PanelFactors};
#[cfg(target_arch = "x86_64")]
use super::{bf16, vnni};
use crate::dispatch::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use crate::encoder::Tile as Bf16Tile;
use crate::linear::widen_f16;

/// One factor for each row of a panel.
pub(super) type Row = [f32; PANEL];

/// Buffers for some panels, kept by each thread.
#[derive(Default)]
pub(super) struct Scratch {
    weights: Vec<Line>,
    scales: Vec<Row>,
    mins: Vec<Row>,
    #[cfg(target_arch = "x86_64")]
    bf16: Vec<Bf16Tile>,
}

/// A panel as a kernel reads it.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// `[block][8]`: the integers of four columns each, with the offset [`TOP`] on AVX-512 if the type has
    /// no minima; or as they are packed.
    pub weights: &'a [Line],
    /// `[block][halves]`.
    pub scales: &'a [Row],
    /// As `scales`; empty if the type has no minima.
    pub mins: &'a [Row],
}

impl Scratch {
    /// Unpacks `panels` of `w`; with `weights` off their factors only.
    pub(super) fn unpack(&mut self, w: &Packed, panels: std::ops::Range<usize>, weights: bool) {
        let per_panel = w.blocks * w.halves;
        self.scales.resize(panels.len() * per_panel, [0.0; PANEL]);
        let with_mins = if w.has_mins() { per_panel } else { 0 };
        self.mins.resize(panels.len() * with_mins, [0.0; PANEL]);
        let bytes = if weights && w.kind != Kind::Bits8 {
            w.blocks * 8
        } else {
            0
        };
        self.weights.resize(panels.len() * bytes, Line::ZERO);
        for (at, panel) in panels.enumerate() {
            let scales = &mut self.scales[at * per_panel..(at + 1) * per_panel];
            let mins = &mut self.mins[at * with_mins..(at + 1) * with_mins];
            let lines = &mut self.weights[at * bytes..(at + 1) * bytes];
            #[cfg(target_arch = "x86_64")]
            if isa() >= Isa::Avx512 {
                // SAFETY: `isa` returns Avx512 only where the processor has these features.
                unsafe { unpack_avx512(w, panel, lines, scales, mins) };
                continue;
            } else if isa() >= Isa::Avx2 {
                // SAFETY: `isa` returns Avx2 or more only where the processor has these features.
                unsafe { unpack_avx2(w, panel, lines, scales, mins) };
                continue;
            }
            unpack(w, panel, lines, scales, mins);
        }
    }

    /// Dequantises `panels` of `w` to bf16.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn dequantise(&mut self, w: &Packed, panels: std::ops::Range<usize>) {
        self.unpack(w, panels.clone(), false);
        self.bf16
            .resize(panels.len() * w.blocks, Bf16Tile::zeroed());
        let each = w.blocks * w.halves;
        let tiles = self.bf16.chunks_exact_mut(w.blocks);
        for (at, (panel, tiles)) in panels.zip(tiles).enumerate() {
            let of = at * each..(at + 1) * each;
            let mins = self.mins.get(of.clone()).unwrap_or_default();
            bf16::unpack(w, panel, &self.scales[of], mins, tiles);
        }
    }

    /// Weights of the panel that was the `at`-th to be dequantised.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn tiles(&self, w: &Packed, at: usize) -> &[Bf16Tile] {
        &self.bf16[at * w.blocks..(at + 1) * w.blocks]
    }

    /// The panel that was the `at`-th to be unpacked, and is the `panel`-th of `w`.
    pub(super) fn panel<'a>(&'a self, w: &'a Packed, at: usize, panel: usize) -> Panel<'a> {
        let per_panel = w.blocks * w.halves;
        let with_mins = if w.has_mins() { per_panel } else { 0 };
        let weights = if self.weights.is_empty() {
            w.lines(panel)
        } else {
            &self.weights[at * w.blocks * 8..(at + 1) * w.blocks * 8]
        };
        Panel {
            weights,
            scales: &self.scales[at * per_panel..(at + 1) * per_panel],
            mins: &self.mins[at * with_mins..(at + 1) * with_mins],
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn unpack_avx2(w: &Packed, p: usize, lines: &mut [Line], scales: &mut [Row], mins: &mut [Row]) {
    unpack(w, p, lines, scales, mins);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn unpack_avx512(w: &Packed, p: usize, lines: &mut [Line], scales: &mut [Row], mins: &mut [Row]) {
    vnni::unpack(w, p, lines);
    let widen = |halves: &_, out: &mut _| widen_avx512(halves, out);
    let expand = |units: &_, integers: &_, sign, out: &mut _| {
        expand_avx512(units, integers, sign, out);
    };
    unpack_factors(w, p, scales, mins, widen, expand);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn widen_avx512(halves: &[[u16; PANEL]], out: &mut [Row]) {
    use std::arch::x86_64::*;
    for (halves, out) in halves.iter().zip(out) {
        // SAFETY: both have 16 values.
        unsafe {
            let wide = _mm512_cvtph_ps(_mm256_loadu_si256(halves.as_ptr().cast()));
            _mm512_storeu_ps(out.as_mut_ptr(), wide);
        }
    }
}

/// [`expand`] of one panel, the same bits.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn expand_avx512(units: &[[u16; PANEL]], integers: &[[i8; PANEL]], sign: f32, out: &mut [Row]) {
    use std::arch::x86_64::*;
    let each = (integers.len() / units.len().max(1)).max(1);
    let parts = integers.chunks_exact(each).zip(out.chunks_exact_mut(each));
    for (unit, (integers, out)) in units.iter().zip(parts) {
        // SAFETY: 16 values.
        let unit = unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(unit.as_ptr().cast())) };
        let unit = _mm512_mul_ps(_mm512_set1_ps(sign), unit);
        for (integers, out) in integers.iter().zip(out) {
            // SAFETY: both have 16 values.
            unsafe {
                let wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(integers.as_ptr().cast()));
                let factor = _mm512_mul_ps(unit, _mm512_cvtepi32_ps(wide));
                _mm512_storeu_ps(out.as_mut_ptr(), factor);
            }
        }
    }
}

#[inline(always)]
fn unpack(w: &Packed, panel: usize, lines: &mut [Line], scales: &mut [Row], mins: &mut [Row]) {
    unpack_integers(w.kind, w.lines(panel), lines);
    unpack_factors(w, panel, scales, mins, widen, expand);
}

/// The integers of some blocks, a byte each; none are asked for where `lines` is empty.
#[inline(always)]
pub(super) fn unpack_integers(kind: Kind, packed: &[Line], lines: &mut [Line]) {
    let blocks = lines.chunks_exact_mut(8);
    match kind {
        Kind::Bits4 => blocks
            .zip(packed.chunks_exact(4))
            .for_each(|(out, packed)| nibbles(packed, out)),
        Kind::Bits5 => blocks
            .zip(packed.chunks_exact(5))
            .for_each(|(out, packed)| {
                nibbles(packed, out);
                for (g, out) in out.iter_mut().enumerate() {
                    for (o, high) in out.0.iter_mut().zip(&packed[4].0) {
                        *o |= ((high >> g) & 1) << 4;
                    }
                }
            }),
        Kind::Bits6 => blocks
            .zip(packed.chunks_exact(6))
            .for_each(|(out, packed)| {
                nibbles(packed, out);
                for (g, out) in out.iter_mut().enumerate() {
                    for (o, high) in out.0.iter_mut().zip(&packed[4 + g / 4].0) {
                        *o |= ((high >> (2 * (g % 4))) & 3) << 4;
                    }
                }
            }),
        // Its integers are a byte each in the packed form too.
        Kind::Bits8 => {}
    }
}

/// The factors of a panel: f16 widened, or integers expanded by their units.
#[inline(always)]
fn unpack_factors(
    w: &Packed,
    panel: usize,
    scales: &mut [Row],
    mins: &mut [Row],
    widen: impl Fn(&[[u16; PANEL]], &mut [Row]),
    expand: impl Fn(&[[u16; PANEL]], &[[i8; PANEL]], f32, &mut [Row]),
) {
    match w.factors_of(panel) {
        PanelFactors::Blocks { scales: s, mins: m } => {
            widen(s, scales);
            widen(m, mins);
        }
        PanelFactors::Supers { units, scales: s } => expand(units, s, 1.0, scales),
        PanelFactors::SupersWithMins {
            units,
            scales: s,
            min_units,
            mins: m,
        } => {
            expand(units, s, 1.0, scales);
            expand(min_units, m, -1.0, mins);
        }
    }
}

/// Groups 0 to 3 are in the low nibbles of four vectors, 4 to 7 in the high ones.
#[inline(always)]
fn nibbles(packed: &[Line], out: &mut [Line]) {
    for g in 0..4 {
        for i in 0..64 {
            out[g].0[i] = packed[g].0[i] & 15;
            out[g + 4].0[i] = packed[g].0[i] >> 4;
        }
    }
}

#[inline(always)]
fn widen(halves: &[[u16; PANEL]], out: &mut [Row]) {
    for (halves, out) in halves.iter().zip(out) {
        for (h, o) in halves.iter().zip(out) {
            *o = widen_f16(*h);
        }
    }
}

/// `sign * unit * integer`, one unit for each 256 columns.
#[inline(always)]
fn expand(units: &[[u16; PANEL]], integers: &[[i8; PANEL]], sign: f32, out: &mut [Row]) {
    let each = (integers.len() / units.len().max(1)).max(1);
    let parts = integers.chunks_exact(each).zip(out.chunks_exact_mut(each));
    for (unit, (integers, out)) in units.iter().zip(parts) {
        let unit: Row = std::array::from_fn(|r| sign * widen_f16(unit[r]));
        for (integers, out) in integers.iter().zip(out) {
            for r in 0..PANEL {
                out[r] = unit[r] * f32::from(integers[r]);
            }
        }
    }
}
