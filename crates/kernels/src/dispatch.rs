//! The one place where the instruction set is chosen.
//!
//! Sets are ordered, and each includes those before it: a kernel asks `isa() >= Isa::Avx2`.
//! `DEMUR_ISA=portable`, `avx2`, `avx512` or `amx` overrides what the processor offers, for tests and
//! comparisons; a set that the processor lacks is never chosen.

use std::sync::atomic::{AtomicU8, Ordering};

/// An instruction set that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Isa {
    /// Plain Rust.
    Portable = 1,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2 = 2,
    /// AVX-512 (F, BW, DQ, VL) with the integer and bf16 dot products (VNNI, BF16), and AVX2.
    Avx512 = 3,
    /// AMX tiles with bf16 products, on a system that lets the process use them, and AVX-512.
    Amx = 4,
}

impl Isa {
    /// All sets, ascending.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// Name as in records and `DEMUR_ISA`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
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
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.available() && amx_permitted(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Amx => false,
        }
    }
}

/// Whether the processor has AMX with bf16 products and the system gives this process its tiles.
///
/// Linux saves the 8 KiB of tile data only for processes that ask, by `arch_prctl(ARCH_REQ_XCOMP_PERM,
/// XTILEDATA)`; the answer holds for all threads.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_permitted() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    use std::sync::OnceLock;
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| {
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        const ARCH_PRCTL: usize = 158;
        const REQ_XCOMP_PERM: usize = 0x1023;
        const XTILEDATA: usize = 18;
        if __cpuid(0).eax < 7 || !__cpuid_count(7, 0).edx & (AMX_BF16 | AMX_TILE) != 0 {
            return false;
        }
        let result: isize;
        // SAFETY: the call takes two integers and touches no memory of ours; `syscall` overwrites rcx
        // and r11.
        unsafe {
            std::arch::asm!(
                "syscall",
                inlateout("rax") ARCH_PRCTL => result,
                in("rdi") REQ_XCOMP_PERM,
                in("rsi") XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    })
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_permitted() -> bool {
    false
}

static CHOSEN: AtomicU8 = AtomicU8::new(0);

/// The instruction set in use.
pub fn isa() -> Isa {
    let chosen = CHOSEN.load(Ordering::Relaxed);
    if let Some(isa) = Isa::ALL.into_iter().find(|i| *i as u8 == chosen) {
        return isa;
    }
    let asked = std::env::var("DEMUR_ISA").unwrap_or_default();
    let named = Isa::ALL.into_iter().find(|i| i.name() == asked);
    let most = named.unwrap_or(Isa::Amx);
    let usable = |i: &Isa| *i <= most && i.available();
    let isa = Isa::ALL.into_iter().rfind(usable).unwrap_or(Isa::Portable);
    CHOSEN.store(isa as u8, Ordering::Relaxed);
    isa
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
    for isa in Isa::ALL {
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
        assert_eq!(seen.contains(&"avx512"), Isa::Avx512.available());
        assert_eq!(seen.contains(&"amx"), Isa::Amx.available());
    }
}
