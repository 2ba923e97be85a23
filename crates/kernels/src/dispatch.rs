//! The one place where the instruction set is chosen.
//!
//! `DEMUR_ISA=portable` or `avx2` overrides what the processor offers, for tests and comparisons; a
//! set that the processor lacks is never chosen.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Isa {
    /// Plain Rust.
    Portable = 1,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2 = 2,
}

impl Isa {
    /// Name as in records and `DEMUR_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
        }
    }

    /// Whether this processor has it.
    pub fn available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 => false,
        }
    }
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The instruction set in use.
pub fn isa() -> Isa {
    match CHOSEN.load(Ordering::Relaxed) {
        1 => Isa::Portable,
        2 => Isa::Avx2,
        _ => {
            let asked = std::env::var("DEMUR_ISA").unwrap_or_default();
            let isa = if asked == Isa::Portable.name() || !Isa::Avx2.available() {
                Isa::Portable
            } else {
                Isa::Avx2
            };
            CHOSEN.store(isa as u8, Ordering::Relaxed);
            isa
        }
    }
}

/// Forces an instruction set for the whole process; returns false, and changes nothing, if the
/// processor lacks it. For tests and benchmarks.
pub fn force(isa: Isa) -> bool {
    let available = isa.available();
    if available {
        CHOSEN.store(isa as u8, Ordering::Relaxed);
    }
    available
}

/// Runs `test` on every instruction set of this processor, and ends on the best.
///
/// Forcing one is for the whole process, so tests that do it, or that compare bits of two calls, take
/// turns here.
#[cfg(test)]
pub(crate) fn on_every_isa(mut test: impl FnMut(Isa)) {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    for isa in [Isa::Portable, Isa::Avx2] {
        if force(isa) {
            test(isa);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_available_set_can_be_forced() {
        let mut seen = Vec::new();
        on_every_isa(|forced| {
            assert_eq!(isa(), forced);
            seen.push(forced.name());
        });
        assert_eq!(seen[0], "portable");
        assert_eq!(seen.contains(&"avx2"), Isa::Avx2.available());
    }
}
