//! Packed weights back in f32, some rows and columns at a time, for products that round nothing.

use std::ops::Range;

use super::panel::{Row, unpack_integers};
use super::{BLOCK, Factors, Kind, Line, PANEL, Packed};
use crate::linear::widen_f16;
use crate::ops::dispatched;

impl Packed {
    /// Writes the weights of `rows` and `blocks` of columns to `out`.
    ///
    /// # Shapes
    /// `out` is `[rows.len(), 32 * blocks.len()]`; `rows` begins with a panel.
    pub(crate) fn dequantise(&self, rows: Range<usize>, blocks: Range<usize>, out: &mut [f32]) {
        assert!(rows.start.is_multiple_of(PANEL) && rows.end <= self.rows);
        assert_eq!(out.len(), rows.len() * blocks.len() * BLOCK);
        let width = blocks.len() * BLOCK;
        for (at, out) in out.chunks_mut(PANEL * width).enumerate() {
            for (b, block) in blocks.clone().enumerate() {
                let panel = rows.start / PANEL + at;
                dequantise_block(self, panel, block, b * BLOCK, width, out);
            }
        }
    }

    /// Scales and minima of a panel's rows in one group of columns; 0 where a type has no minima.
    #[inline(always)]
    fn factors(&self, panel: usize, block: usize, half: usize) -> (Row, Row) {
        let group = (panel * self.blocks + block) * self.halves + half;
        let unit = (panel * self.blocks + block) * BLOCK / 256;
        let expand = |units: &[[u16; PANEL]], integers: &[[i8; PANEL]]| -> Row {
            std::array::from_fn(|r| widen_f16(units[unit][r]) * f32::from(integers[group][r]))
        };
        match &self.factors {
            Factors::Blocks { scales, mins } => (
                scales[group].map(widen_f16),
                mins.get(group).map_or([0.0; PANEL], |m| m.map(widen_f16)),
            ),
            Factors::Supers { units, scales } => (expand(units, scales), [0.0; PANEL]),
            Factors::SupersWithMins {
                units,
                scales,
                min_units,
                mins,
            } => (expand(units, scales), expand(min_units, mins).map(|m| -m)),
        }
    }
}

dispatched! {
    fn dequantise_block / body (w: &Packed, panel: usize, block: usize, column: usize, width: usize, out: &mut [f32])
}

/// One block into the columns from `column` on of the panel's rows, which are `width` wide.
#[inline(always)]
fn body(w: &Packed, panel: usize, block: usize, column: usize, width: usize, out: &mut [f32]) {
    let each = w.kind.lines();
    let packed = &w.lines(panel)[block * each..(block + 1) * each];
    let mut unpacked = [Line::ZERO; 8];
    let lines = match w.kind {
        Kind::Bits8 => packed,
        kind => {
            unpack_integers(kind, packed, &mut unpacked);
            &unpacked
        }
    };
    for half in 0..w.halves {
        let (scales, mins) = w.factors(panel, block, half);
        let groups = 8 / w.halves;
        for g in half * groups..(half + 1) * groups {
            let integers = lines[g].0.as_chunks::<4>().0;
            let rows = out.chunks_exact_mut(width).zip(integers);
            for ((out, integers), (scale, min)) in rows.zip(scales.iter().zip(&mins)) {
                let out = &mut out[column + 4 * g..column + 4 * g + 4];
                for (o, u) in out.iter_mut().zip(integers) {
                    *o = (i32::from(*u) - w.offset) as f32 * scale + min;
                }
            }
        }
    }
}
