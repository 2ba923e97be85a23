//! How much memory this process has taken.

/// The most bytes that were ever resident, pages of mapped files included (`VmHWM` of proc(5));
/// unknown on systems other than Linux.
pub fn peak() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    peak_of(&status)
}

fn peak_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_read() {
        let status = "Name:\tx\nVmPeak:\t  900 kB\nVmHWM:\t   512 kB\nVmRSS:\t 100 kB\n";
        assert_eq!(peak_of(status), Some(512 * 1024));
        assert_eq!(peak_of("Name:\tx\n"), None);
    }
}
