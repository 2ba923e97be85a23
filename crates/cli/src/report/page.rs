//! The page's shell: head, contents, sections in order, foot.

use anyhow::Result;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use sha2::{Digest, Sha256};

use super::{View, arms, categories, features, gate, hero, method, replies, sae, strengths, sweep};

const STYLE: &str = include_str!("style.css");
const SCRIPT: &str = include_str!("script.js");

const CONTENTS: [(&str, &str); 9] = [
    ("arms", "Arms"),
    ("sweep", "Choice"),
    ("gate", "Gate"),
    ("features", "Features"),
    ("replies", "Replies"),
    ("categories", "Categories"),
    ("sae", "SAE"),
    ("plan", "Plan"),
    ("method", "Method"),
];

/// The head of a page with this title, made by this version.
pub fn head(title: &str, version: &str) -> Markup {
    html! {
        head {
            meta charset="utf-8";
            meta http-equiv="Content-Security-Policy" content=(policy());
            meta name="viewport" content="width=device-width, initial-scale=1";
            meta name="color-scheme" content="light dark";
            meta name="generator" content=(format!("demur {version}"));
            title { (title) " · demur" }
            style { (PreEscaped(STYLE)) }
        }
    }
}

pub fn page(view: &View<'_>) -> Result<Markup> {
    let r = view.record;
    Ok(html! {
        (DOCTYPE)
        html lang="en" {
            (head(&r.study, &r.versions.demur))
            body {
                nav aria-label="Contents" {
                    a class="brand" href="#verdict" { "demur" }
                    span class="nav-links" {
                        @for (id, name) in CONTENTS.iter().filter(|c| c.0 != "gate" || r.gate.is_some()) {
                            a href=(format!("#{id}")) { (name) }
                        }
                    }
                }
                main {
                    (hero::section(view))
                    (arms::section(view))
                    (strengths::section(view))
                    (sweep::section(view))
                    (gate::section(view))
                    (features::section(view))
                    (replies::section(view))
                    (categories::section(view))
                    (sae::section(view))
                    (method::plan(view))
                    (method::method(view))
                }
                footer {
                    p {
                        @if !r.description.is_empty() { (r.description) ". " }
                        "A view of " span class="mono" { "record.json" } ", which is the truth; nothing was computed for this page."
                    }
                }
                script { (PreEscaped(SCRIPT)) }
            }
        }
    })
}

/// The page fetches nothing and runs one script, known by its hash.
fn policy() -> String {
    format!(
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{}'; base-uri 'none'; form-action 'none'",
        base64(&Sha256::digest(SCRIPT.as_bytes()))
    )
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = String::new();
    for chunk in bytes.chunks(3) {
        let mut word = [0u8; 4];
        word[1..=chunk.len()].copy_from_slice(chunk);
        let word = u32::from_be_bytes(word);
        for i in 0..4 {
            if i <= chunk.len() {
                out.push(ALPHABET[(word >> (18 - 6 * i)) as usize & 63] as char);
            } else {
                out.push('=');
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_of_rfc_4648() {
        for (plain, coded) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("foobar", "Zm9vYmFy"),
        ] {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
    }

    #[test]
    fn style_and_script_need_no_network_and_can_not_end_early() {
        for text in [STYLE, SCRIPT] {
            for never in [
                "http:",
                "https:",
                "@import",
                "url(",
                "</",
                "fetch(",
                "innerHTML",
            ] {
                assert!(!text.contains(never), "{never}");
            }
        }
    }
}
