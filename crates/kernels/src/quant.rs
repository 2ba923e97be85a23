//! GGUF block types: their layout, and exact unpacking.
//!
//! Every quantised type is unpacked to the same form: integers `q` with one scale and one minimum
//! for each group of 16 or 32 values, `w = scale * q + min`. Dequantisation and the packed formats
//! of [`crate::linear`] both start from it, so a layout is written down once.
//!
//! The layouts are those of `ggml-quants.c` (ggml, MIT licence); the tests compare bit for bit with
//! values that the reference Python package computed (`testdata/oracle/quant_blocks.py`).

use half::{bf16, f16};

use crate::error::KernelError;

/// A tensor element type that demur computes with.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[allow(missing_docs)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// `(type, id in files, name, values in a block, bytes in a block)`.
const TYPES: [(GgmlType, u32, &str, usize, usize); 13] = [
    (GgmlType::F32, 0, "F32", 1, 4),
    (GgmlType::F16, 1, "F16", 1, 2),
    (GgmlType::Q4_0, 2, "Q4_0", 32, 18),
    (GgmlType::Q4_1, 3, "Q4_1", 32, 20),
    (GgmlType::Q5_0, 6, "Q5_0", 32, 22),
    (GgmlType::Q5_1, 7, "Q5_1", 32, 24),
    (GgmlType::Q8_0, 8, "Q8_0", 32, 34),
    (GgmlType::Q2K, 10, "Q2_K", 256, 84),
    (GgmlType::Q3K, 11, "Q3_K", 256, 110),
    (GgmlType::Q4K, 12, "Q4_K", 256, 144),
    (GgmlType::Q5K, 13, "Q5_K", 256, 176),
    (GgmlType::Q6K, 14, "Q6_K", 256, 210),
    (GgmlType::BF16, 30, "BF16", 1, 2),
];

/// Types that a file may name but that demur does not compute with.
const OTHER_TYPES: [(u32, &str); 24] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (29, "IQ1_M"),
    (31, "Q4_0_4_4"),
    (32, "Q4_0_4_8"),
    (33, "Q4_0_8_8"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (39, "MXFP4"),
    (40, "NVFP4"),
    (41, "Q1_0"),
];

impl GgmlType {
    fn row(self) -> &'static (GgmlType, u32, &'static str, usize, usize) {
        TYPES.iter().find(|t| t.0 == self).unwrap_or(&TYPES[0])
    }

    /// The type with this id in GGUF files, if demur computes with it.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|t| t.1 == id).map(|t| t.0)
    }

    /// Its id in GGUF files.
    pub fn id(self) -> u32 {
        self.row().1
    }

    /// Its name in ggml's spelling.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Values in a block.
    pub fn block_len(self) -> usize {
        self.row().3
    }

    /// Bytes in a block.
    pub fn block_bytes(self) -> usize {
        self.row().4
    }

    /// Bytes of a row of `n` values; `None` if that is not whole blocks, or overflows.
    pub fn row_bytes(self, n: usize) -> Option<usize> {
        n.is_multiple_of(self.block_len())
            .then(|| (n / self.block_len()).checked_mul(self.block_bytes()))?
    }

    /// Whether it is stored in blocks of integers with scales.
    pub fn is_quantised(self) -> bool {
        self.block_len() > 1
    }
}

/// The name of a type id, supported or not; for error messages.
pub fn type_name_of_id(id: u32) -> &'static str {
    GgmlType::from_id(id)
        .map(GgmlType::name)
        .or_else(|| OTHER_TYPES.iter().find(|t| t.0 == id).map(|t| t.1))
        .unwrap_or("unknown")
}

/// The integers of one block with their scales: `w[i] = scale[i / group] * q[i] + min[i / group]`.
#[derive(Debug, Clone)]
pub struct Unpacked {
    /// Integers; the first `block_len` are valid.
    pub q: [i8; 256],
    /// One scale a group.
    pub scale: [f32; 16],
    /// One minimum a group; zero for symmetric types.
    pub min: [f32; 16],
    /// The block's f16 scale: `scale[g] = unit * scale_q[g]` for K-quants, `scale[0]` for others.
    pub unit: f32,
    /// As `unit`: `min[g] = -(min_unit * min_q[g])` for K-quants, `min[0]` for others.
    pub min_unit: f32,
    /// Integer scales of K-quants.
    pub scale_q: [i8; 16],
    /// Integer minima of K-quants.
    pub min_q: [i8; 16],
}

impl Unpacked {
    /// The factors of a block of 32.
    fn block_factors(&mut self, scale: f32, min: f32) {
        (self.scale[0], self.min[0]) = (scale, min);
        (self.unit, self.min_unit) = (scale, min);
    }

    /// The factors of group `g` of a K-quant.
    fn group_factors(&mut self, g: usize, scale: i8, min: i8) {
        (self.scale_q[g], self.min_q[g]) = (scale, min);
        self.scale[g] = self.unit * f32::from(scale);
        self.min[g] = -(self.min_unit * f32::from(min));
    }
}

impl Default for Unpacked {
    fn default() -> Self {
        Self {
            q: [0; 256],
            scale: [0.0; 16],
            min: [0.0; 16],
            unit: 0.0,
            min_unit: 0.0,
            scale_q: [0; 16],
            min_q: [0; 16],
        }
    }
}

/// Values that share a scale: 16 or 32.
pub fn group_len(ty: GgmlType) -> usize {
    match ty {
        GgmlType::Q2K | GgmlType::Q3K | GgmlType::Q6K => 16,
        _ => 32,
    }
}

fn half_at(b: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Unpacks one block of a quantised type.
///
/// # Panics
/// If `b` is shorter than a block, or `ty` is not quantised; both are checked by the callers here.
pub(crate) fn unpack_block(ty: GgmlType, b: &[u8], out: &mut Unpacked) {
    match ty {
        GgmlType::Q4_0 | GgmlType::Q4_1 => {
            let (head, offset) = if ty == GgmlType::Q4_0 { (2, 8) } else { (4, 0) };
            let with_min = ty == GgmlType::Q4_1;
            out.block_factors(half_at(b, 0), if with_min { half_at(b, 2) } else { 0.0 });
            for (j, &v) in b[head..head + 16].iter().enumerate() {
                out.q[j] = (v & 15) as i8 - offset;
                out.q[j + 16] = (v >> 4) as i8 - offset;
            }
        }
        GgmlType::Q5_0 | GgmlType::Q5_1 => {
            let (head, offset) = if ty == GgmlType::Q5_0 {
                (2, 16)
            } else {
                (4, 0)
            };
            let with_min = ty == GgmlType::Q5_1;
            out.block_factors(half_at(b, 0), if with_min { half_at(b, 2) } else { 0.0 });
            let high = u32::from_le_bytes([b[head], b[head + 1], b[head + 2], b[head + 3]]);
            for (j, &v) in b[head + 4..head + 20].iter().enumerate() {
                out.q[j] = ((v & 15) | (((high >> j) & 1) << 4) as u8) as i8 - offset;
                out.q[j + 16] = ((v >> 4) | (((high >> (j + 16)) & 1) << 4) as u8) as i8 - offset;
            }
        }
        GgmlType::Q8_0 => {
            out.block_factors(half_at(b, 0), 0.0);
            for (q, &v) in out.q.iter_mut().zip(&b[2..34]) {
                *q = v as i8;
            }
        }
        GgmlType::Q2K => {
            (out.unit, out.min_unit) = (half_at(b, 80), half_at(b, 82));
            for g in 0..16 {
                out.group_factors(g, (b[g] & 15) as i8, (b[g] >> 4) as i8);
            }
            for i in 0..256 {
                // 128 values take 32 bytes, two bits a value, 32 values a bit pair
                let byte = b[16 + (i / 128) * 32 + i % 32];
                out.q[i] = ((byte >> (2 * (i % 128 / 32))) & 3) as i8;
            }
        }
        GgmlType::Q3K => {
            (out.unit, out.min_unit) = (half_at(b, 108), 0.0);
            let packed = &b[96..108];
            for g in 0..16 {
                let low = (packed[g % 8] >> (4 * (g / 8))) & 15;
                let high = (packed[8 + g % 4] >> (2 * (g / 4))) & 3;
                out.group_factors(g, (low | (high << 4)) as i8 - 32, 0);
            }
            for i in 0..256 {
                let low = (b[32 + (i / 128) * 32 + i % 32] >> (2 * (i % 128 / 32))) & 3;
                let high = (b[i % 32] >> (i / 32)) & 1;
                out.q[i] = low as i8 - if high == 1 { 0 } else { 4 };
            }
        }
        GgmlType::Q4K | GgmlType::Q5K => {
            (out.unit, out.min_unit) = (half_at(b, 0), half_at(b, 2));
            let s = &b[4..16];
            for g in 0..8 {
                let (scale, min) = if g < 4 {
                    (s[g] & 63, s[g + 4] & 63)
                } else {
                    (
                        (s[g + 4] & 15) | ((s[g - 4] >> 6) << 4),
                        (s[g + 4] >> 4) | ((s[g] >> 6) << 4),
                    )
                };
                out.group_factors(g, scale as i8, min as i8);
            }
            let low = if ty == GgmlType::Q4K {
                &b[16..144]
            } else {
                &b[48..176]
            };
            for i in 0..256 {
                let (g, l) = (i / 32, i % 32);
                let nibble = (low[(g / 2) * 32 + l] >> (4 * (g % 2))) & 15;
                let fifth = match ty {
                    GgmlType::Q5K => ((b[16 + l] >> g) & 1) << 4,
                    _ => 0,
                };
                out.q[i] = (nibble | fifth) as i8;
            }
        }
        GgmlType::Q6K => {
            (out.unit, out.min_unit) = (half_at(b, 208), 0.0);
            for g in 0..16 {
                out.group_factors(g, b[192 + g] as i8, 0);
            }
            for i in 0..256 {
                let (half, quarter, l) = (i / 128, i % 128 / 32, i % 32);
                let low = (b[half * 64 + (quarter % 2) * 32 + l] >> (4 * (quarter / 2))) & 15;
                let high = (b[128 + half * 32 + l] >> (2 * quarter)) & 3;
                out.q[i] = (low | (high << 4)) as i8 - 32;
            }
        }
        GgmlType::F32 | GgmlType::F16 | GgmlType::BF16 => unreachable!("not a block type"),
    }
}

/// Dequantises values of type `ty` into `out`.
///
/// # Errors
/// [`KernelError::Block`] if `out` is not whole blocks, [`KernelError::Length`] if `bytes` has
/// another length than `out` needs.
pub fn dequantize_row(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), KernelError> {
    let expected = ty.row_bytes(out.len()).ok_or(KernelError::Block {
        type_name: ty.name(),
        columns: out.len(),
        block: ty.block_len(),
    })?;
    if bytes.len() != expected {
        return Err(KernelError::Length {
            what: "bytes",
            found: bytes.len(),
            expected,
        });
    }
    match ty {
        GgmlType::F32 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
        GgmlType::F16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        GgmlType::BF16 => {
            for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
            }
        }
        _ => {
            let mut block = Unpacked::default();
            let group = group_len(ty);
            let blocks = bytes.chunks_exact(ty.block_bytes());
            for (o, b) in out.chunks_exact_mut(ty.block_len()).zip(blocks) {
                unpack_block(ty, b, &mut block);
                for (i, o) in o.iter_mut().enumerate() {
                    let g = i / group;
                    *o = block.scale[g] * f32::from(block.q[i]) + block.min[g];
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_agree() {
        for t in TYPES {
            assert_eq!(GgmlType::from_id(t.1), Some(t.0));
            assert_eq!(type_name_of_id(t.1), t.2);
        }
        assert_eq!(type_name_of_id(16), "IQ2_XXS");
        assert_eq!(type_name_of_id(1000), "unknown");
    }

    /// Every type, bit for bit as `gguf.quants.dequantize` has it.
    #[test]
    fn blocks_as_the_reference_package_reads_them() {
        let mut file = include_bytes!("../testdata/quant_blocks.bin").as_slice();
        let mut take = |n: usize| {
            let (head, rest) = file.split_at(n);
            file = rest;
            head
        };
        let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        for _ in 0..TYPES.len() {
            let ty = GgmlType::from_id(word(take(4))).unwrap();
            let n = word(take(4)) as usize;
            let bytes = take(ty.row_bytes(n).unwrap());
            let expected: Vec<f32> = take(4 * n)
                .chunks_exact(4)
                .map(|b| f32::from_bits(word(b)))
                .collect();
            let mut found = vec![f32::NAN; n];
            dequantize_row(ty, bytes, &mut found).unwrap();
            for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                assert!(f == e, "{} at {i}: {f} against {e}", ty.name());
            }
        }
        assert!(file.is_empty(), "one record a type");
    }

    #[test]
    fn a_block_by_hand() {
        // Q4_0: scale 0.5; first byte 0x9A: value 0 is 10 - 8 = 2, value 16 is 9 - 8 = 1.
        let mut bytes = vec![0x88u8; 18];
        bytes[..2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
        bytes[2] = 0x9A;
        let mut out = [9.0; 32];
        dequantize_row(GgmlType::Q4_0, &bytes, &mut out).unwrap();
        assert_eq!((out[0], out[1], out[16], out[17]), (1.0, 0.0, 0.5, 0.0));
    }

    #[test]
    fn wrong_lengths_are_errors() {
        let mut out = [0.0; 33];
        assert!(dequantize_row(GgmlType::Q8_0, &[0; 34], &mut out).is_err());
        assert!(dequantize_row(GgmlType::Q8_0, &[0; 33], &mut out[..32]).is_err());
        assert_eq!(GgmlType::Q4K.row_bytes(255), None);
        assert_eq!(GgmlType::Q4K.row_bytes(512), Some(288));
    }
}
