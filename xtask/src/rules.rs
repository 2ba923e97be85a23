//! Rules that no compiler knows: the arrows between crates, where `unsafe` may be, what the tree holds.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::Done;
use crate::shell::Shell;

/// Largest file in the repository.
const MAX_FILE: u64 = 16 << 20;
/// The two commands of the README.
const README: [&str; 2] = ["cargo run --release -- study", "cargo test --workspace"];
/// The only crate with `unsafe`.
const MAY_BE_UNSAFE: &str = "demur-kernels";

/// Checks every rule and reports all that is broken, not the first only.
pub fn check(sh: &Shell) -> Result<Done> {
    let metadata = sh.metadata(false)?;
    let mut broken = arrows(&sh.file("ARCHITECTURE.md")?, &metadata)?;
    broken.extend(unsafe_code(&metadata)?);
    broken.extend(tree(sh)?);
    let readme = sh.file("README.md")?;
    for command in README.iter().filter(|c| !readme.contains(**c)) {
        broken.push(format!("README.md does not have the command `{command}`"));
    }
    if !broken.is_empty() {
        bail!(
            "{} rules are broken:\n  {}",
            broken.len(),
            broken.join("\n  ")
        );
    }
    Ok(Done::Passed)
}

/// Compares dependencies between our crates with the table in ARCHITECTURE.md.
fn arrows(architecture: &str, metadata: &Value) -> Result<Vec<String>> {
    let allowed = table(architecture)?;
    let mut broken = Vec::new();
    let mut seen = Vec::new();
    for package in packages(metadata)? {
        let manifest = text(package, "manifest_path").replace('\\', "/");
        if !manifest.contains("/crates/") {
            continue;
        }
        let name = text(package, "name");
        let name = name.strip_prefix("demur-").unwrap_or(name);
        let Some(may) = allowed.get(name) else {
            broken.push(format!(
                "crate `{name}` is not in the table of ARCHITECTURE.md"
            ));
            continue;
        };
        seen.push(name);
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            if dependency["path"].is_null() {
                continue;
            }
            let to = text(dependency, "name");
            let to = to.strip_prefix("demur-").unwrap_or(to);
            if !may.iter().any(|m| m == to) {
                broken.push(format!(
                    "crate `{name}` uses `{to}`, which ARCHITECTURE.md does not allow"
                ));
            }
        }
    }
    for name in allowed.keys().filter(|n| !seen.contains(&n.as_str())) {
        broken.push(format!(
            "ARCHITECTURE.md has a crate `{name}` that does not exist"
        ));
    }
    Ok(broken)
}

/// Crates and what each may use, from the rows `| crate | job | may use |`.
fn table(architecture: &str) -> Result<BTreeMap<String, Vec<String>>> {
    let rows = architecture
        .lines()
        .skip_while(|l| !l.starts_with("| crate | job | may use |"))
        .skip(2)
        .take_while(|l| l.starts_with('|'));
    let mut table = BTreeMap::new();
    let mut above: Vec<String> = Vec::new();
    for row in rows {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, .., may] = cells[..] else {
            bail!("ARCHITECTURE.md: the row '{row}' is not | crate | job | may use |");
        };
        let name = name.trim_matches('`').to_owned();
        let may = match may {
            "nothing of ours" => Vec::new(),
            "all" | "all above" => above.clone(),
            names => names
                .split(',')
                .map(|n| {
                    let n = n.trim().trim_matches('`').to_owned();
                    // An arrow down the table would be half of a circle.
                    if above.contains(&n) {
                        Ok(n)
                    } else {
                        bail!(
                            "ARCHITECTURE.md: `{name}` may use '{n}', which is not a crate above it"
                        )
                    }
                })
                .collect::<Result<_>>()?,
        };
        above.push(name.clone());
        table.insert(name, may);
    }
    if table.is_empty() {
        bail!("ARCHITECTURE.md has no table | crate | job | may use |");
    }
    Ok(table)
}

/// Roots of libraries and binaries that do not forbid `unsafe`.
fn unsafe_code(metadata: &Value) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for package in packages(metadata)? {
        let name = text(package, "name");
        for target in package["targets"].as_array().into_iter().flatten() {
            let is_root = target["kind"]
                .as_array()
                .is_some_and(|k| k.iter().any(|k| k == "lib" || k == "bin"));
            let path = text(target, "src_path");
            if is_root && name != MAY_BE_UNSAFE {
                let source =
                    std::fs::read_to_string(path).with_context(|| format!("read {path}"))?;
                if !source.lines().any(|l| l == "#![forbid(unsafe_code)]") {
                    broken.push(format!("{path} does not say #![forbid(unsafe_code)]"));
                }
            }
        }
    }
    Ok(broken)
}

/// What the repository holds: nothing large, no test that is switched off without a word.
fn tree(sh: &Shell) -> Result<Vec<String>> {
    let mut git = std::process::Command::new("git");
    git.args(["ls-files", "-z"]);
    let mut broken = Vec::new();
    for path in sh.read(git)?.split_terminator('\0') {
        // A file that is deleted but not yet so in git.
        let Ok(file) = std::fs::metadata(sh.root.join(path)) else {
            continue;
        };
        if file.len() > MAX_FILE {
            broken.push(format!(
                "{path} has {} MiB; the limit is {}",
                file.len() >> 20,
                MAX_FILE >> 20
            ));
        }
        if path.ends_with(".rs") {
            let lines = ignored_without_reason(&sh.file(path)?);
            broken.extend(
                lines
                    .iter()
                    .map(|n| format!("{path}:{n}: say why the test is ignored")),
            );
        }
    }
    Ok(broken)
}

/// Lines, counted from 1, that switch a test off without a word.
fn ignored_without_reason(source: &str) -> Vec<usize> {
    let lines = source.lines().enumerate();
    lines
        .filter(|(_, l)| l.trim() == "#[ignore]")
        .map(|(i, _)| i + 1)
        .collect()
}

fn packages(metadata: &Value) -> Result<&Vec<Value>> {
    metadata["packages"]
        .as_array()
        .context("no packages in the metadata")
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const TABLE: &str = "\
# Title
| crate | job | may use |
| --- | --- | --- |
| `kernels` | loops | nothing of ours |
| `model` | runs, `main.rs` | `kernels` |
| `eval` | judges | all above |

| to change | open |
";

    fn metadata(model_uses: &[&str]) -> Value {
        let package = |name: &str, uses: &[&str]| {
            let dependencies: Vec<Value> = uses
                .iter()
                .map(|u| json!({"name": format!("demur-{u}"), "path": format!("/r/crates/{u}")}))
                .chain([json!({"name": "serde", "path": null})])
                .collect();
            json!({
                "name": format!("demur-{name}"),
                "manifest_path": format!("/r/crates/{name}/Cargo.toml"),
                "dependencies": dependencies,
            })
        };
        json!({"packages": [
            package("kernels", &[]),
            package("model", model_uses),
            package("eval", &["model", "kernels"]),
        ]})
    }

    #[test]
    fn arrows_that_are_in_the_table_pass() {
        assert_eq!(arrows(TABLE, &metadata(&["kernels"])).unwrap(), [""; 0]);
    }

    #[test]
    fn an_arrow_that_is_not_is_named() {
        let broken = arrows(TABLE, &metadata(&["eval"])).unwrap();
        assert_eq!(
            broken,
            ["crate `model` uses `eval`, which ARCHITECTURE.md does not allow"]
        );
    }

    #[test]
    fn table_and_crates_must_be_the_same() {
        let more = TABLE.replace("| `eval`", "| `serve` | serves | `model` |\n| `eval`");
        let broken = arrows(&more, &metadata(&[])).unwrap();
        assert_eq!(
            broken,
            ["ARCHITECTURE.md has a crate `serve` that does not exist"]
        );
        let less = TABLE.replace("| `model` | runs, `main.rs` | `kernels` |\n", "");
        let broken = arrows(&less, &metadata(&[])).unwrap();
        assert_eq!(
            broken[0],
            "crate `model` is not in the table of ARCHITECTURE.md"
        );
        let circle = TABLE.replace("nothing of ours", "`eval`");
        assert!(
            table(&circle)
                .unwrap_err()
                .to_string()
                .contains("not a crate above")
        );
        assert!(table("no table").is_err());
    }

    #[test]
    fn a_reason_is_asked_for() {
        let source = "#[test]\n    #[ignore]\nfn a() {}\n#[ignore = \"slow\"]\nfn b() {}\n";
        assert_eq!(ignored_without_reason(source), [2]);
    }
}
