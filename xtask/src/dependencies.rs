//! What we build on.

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::Done;
use crate::shell::{Shell, cargo};

/// The release that is installed where none is.
const CARGO_DENY: &str = "cargo-deny@0.20.2";

/// Every package of the lock file, for every platform, builds with the Rust that we state. That our
/// own code does is clippy's `incompatible_msrv`.
pub fn msrv(sh: &Shell) -> Result<Done> {
    let metadata = sh.metadata(true)?;
    let packages = metadata["packages"]
        .as_array()
        .context("no packages in the metadata")?;
    let ours = packages
        .iter()
        .find(|p| p["name"] == "demur-cli")
        .and_then(|p| p["rust_version"].as_str())
        .context("demur-cli states no rust-version")?;
    let limit = version(ours).with_context(|| format!("rust-version '{ours}'"))?;
    let newer: Vec<String> = packages
        .iter()
        .filter_map(|p| needs_more(p, limit))
        .collect();
    if !newer.is_empty() {
        bail!(
            "we state Rust {ours}, but {}: take older releases, or raise rust-version in Cargo.toml",
            newer.join(", ")
        );
    }
    eprintln!("   {} packages build with Rust {ours}", packages.len());
    Ok(Done::Passed)
}

fn needs_more(package: &Value, limit: (u32, u32)) -> Option<String> {
    let needs = package["rust_version"].as_str()?;
    (version(needs)? > limit).then(|| {
        let text = |key: &str| package[key].as_str().unwrap_or("?").to_owned();
        format!("{} {} needs {needs}", text("name"), text("version"))
    })
}

/// Major and minor of `1.89` or `1.89.0`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.split('.').map(str::parse);
    match (parts.next()?, parts.next()?) {
        (Ok(major), Ok(minor)) => Some((major, minor)),
        _ => None,
    }
}

/// `deny.toml`, by cargo-deny, which is installed if it is missing.
pub fn deny(sh: &Shell) -> Result<Done> {
    let mut there = cargo(["deny", "--version"]);
    let there = there.output().is_ok_and(|o| o.status.success());
    if !there && let Err(e) = sh.run(cargo(["install", "--locked", CARGO_DENY])) {
        eprintln!("!! {CARGO_DENY} can't be installed ({e:#}); deny.toml is NOT checked");
        return Ok(Done::Skipped(format!("{CARGO_DENY} can't be installed")));
    }
    sh.run(cargo([
        "deny",
        "--locked",
        "--log-level",
        "warn",
        "check",
        "bans",
        "licenses",
        "sources",
    ]))?;
    Ok(Done::Passed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_package_that_needs_more_is_named() {
        let package = |v: &str| json!({"name": "p", "version": "1.0.0", "rust_version": v});
        assert_eq!(needs_more(&package("1.89.0"), (1, 89)), None);
        assert_eq!(needs_more(&package("1.9"), (1, 89)), None);
        assert_eq!(needs_more(&json!({"rust_version": null}), (1, 89)), None);
        let found = needs_more(&package("1.90"), (1, 89)).unwrap();
        assert_eq!(found, "p 1.0.0 needs 1.90");
    }
}
