//! Packed weights back in f32, a block at a time, for products that round nothing.

use super::panel::{Row, unpack_integers};
use super::{BLOCK, Factors, Kind, Line, PANEL, Packed};
use crate::linear::widen_f16;
use crate::ops::dispatched;

impl Packed {
    /// Writes the weights of a panel's 16 rows and a block's 32 columns to `out`, `out[c * BLOCK + r]` for
    /// row `r` and column `c`. Rows beyond the matrix are 0.
    pub(crate) fn columns(&self, panel: usize, block: usize, out: &mut [f32]) {
        columns(self, panel, block, out);
    }

    /// The same, `out[r * BLOCK + c]`.
    pub(crate) fn rows(&self, panel: usize, block: usize, out: &mut [f32]) {
        rows(self, panel, block, out);
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

    /// Calls `f` with each column of a block: its 16 rows.
    #[inline(always)]
    fn each_column(&self, panel: usize, block: usize, mut f: impl FnMut(usize, Row)) {
        let each = self.kind.lines();
        let packed = &self.lines(panel)[block * each..(block + 1) * each];
        let mut unpacked = [Line::ZERO; 8];
        let lines = match self.kind {
            Kind::Bits8 => packed,
            kind => {
                unpack_integers(kind, packed, &mut unpacked);
                &unpacked
            }
        };
        let (groups, offset) = (8 / self.halves, self.offset as f32);
        for half in 0..self.halves {
            let (scales, mins) = self.factors(panel, block, half);
            for g in half * groups..(half + 1) * groups {
                // A word is a row's four columns.
                let mut words = [0; PANEL];
                for (word, bytes) in words.iter_mut().zip(lines[g].0.as_chunks::<4>().0) {
                    *word = u32::from_le_bytes(*bytes);
                }
                for c in 0..4 {
                    let mut column = [0.0; PANEL];
                    for r in 0..PANEL {
                        let integer = f32::from((words[r] >> (8 * c)) as u8) - offset;
                        column[r] = integer * scales[r] + mins[r];
                    }
                    f(4 * g + c, column);
                }
            }
        }
    }
}

dispatched! {
    fn columns / columns_body (w: &Packed, panel: usize, block: usize, out: &mut [f32])
}

#[inline(always)]
fn columns_body(w: &Packed, panel: usize, block: usize, out: &mut [f32]) {
    w.each_column(panel, block, |c, column| {
        out[c * BLOCK..c * BLOCK + PANEL].copy_from_slice(&column);
    });
}

dispatched! {
    fn rows / rows_body (w: &Packed, panel: usize, block: usize, out: &mut [f32])
}

#[inline(always)]
fn rows_body(w: &Packed, panel: usize, block: usize, out: &mut [f32]) {
    let out = &mut out[..PANEL * BLOCK];
    w.each_column(panel, block, |c, column| {
        for r in 0..PANEL {
            out[r * BLOCK + c] = column[r];
        }
    });
}
