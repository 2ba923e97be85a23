//! `demur reference`, hidden: the generated pages of docs/reference/, from the code that they describe.

use std::fmt::Write as _;

use anyhow::{Context, Result};
use clap::{Arg, ArgAction, Command};
use serde_json::{Map, Value};

use crate::study::config::Study;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The page.
    page: Page,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Page {
    /// Commands and their options.
    Cli,
    /// Keys of a study.
    Study,
}

pub fn run(args: Args, root: &mut Command) -> Result<()> {
    let page = match args.page {
        Page::Cli => cli(root),
        Page::Study => study(&schemars::schema_for!(Study).to_value())?,
    };
    print!("{page}");
    Ok(())
}

const GENERATED: &str = "<!-- Written by `cargo xtask generate`. Change the code instead. -->\n\n";

// ---------------------------------------------------------------------------------------- commands

fn cli(root: &mut Command) -> String {
    root.build();
    let mut out = format!("{GENERATED}# Commands\n\n");
    for line in help_of(root).lines() {
        let _ = writeln!(out, "{line}");
    }
    out.push_str(
        "\nExit codes: 0 success, 1 failure, 2 wrong usage.\n\n## Options of every command\n\n",
    );
    options(&mut out, root.get_arguments().filter(|a| a.is_global_set()));
    for command in root.get_subcommands() {
        section(&mut out, "demur", command, 2);
    }
    out
}

fn section(out: &mut String, above: &str, command: &Command, level: usize) {
    if command.is_hide_set() || command.get_name() == "help" {
        return;
    }
    let path = format!("{above} {}", command.get_name());
    let _ = writeln!(
        out,
        "\n{} {path}\n\n{}",
        "#".repeat(level),
        help_of(command)
    );
    let mut command = command.clone();
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").trim();
    let _ = writeln!(out, "\n```text\n{usage}\n```\n");
    let own = |a: &&Arg| !a.is_global_set() && !a.is_hide_set() && a.get_id() != "help";
    options(out, command.get_arguments().filter(own));
    for sub in command.get_subcommands() {
        section(out, &path, sub, level + 1);
    }
}

fn help_of(command: &Command) -> String {
    let text = command.get_long_about().or(command.get_about());
    sentence(&text.map(ToString::to_string).unwrap_or_default())
}

/// Clap takes the last full stop from one-line help; on a page it belongs there.
fn sentence(text: &str) -> String {
    let text = text.trim();
    if text.is_empty() || text.ends_with(['.', '?', '!', ':', '`']) {
        text.to_owned()
    } else {
        format!("{text}.")
    }
}

fn options<'a>(out: &mut String, args: impl Iterator<Item = &'a Arg>) {
    let mut rows = args.peekable();
    if rows.peek().is_none() {
        return;
    }
    out.push_str("| argument | meaning | default |\n| --- | --- | --- |\n");
    for arg in rows {
        let value = arg.get_value_names().unwrap_or_default().join(" ");
        let mut name = match (arg.get_short(), arg.get_long()) {
            (Some(s), Some(l)) => format!("-{s}, --{l}"),
            (Some(s), None) => format!("-{s}"),
            (None, Some(l)) => format!("--{l}"),
            (None, None) => String::new(),
        };
        let takes_value = matches!(arg.get_action(), ArgAction::Set | ArgAction::Append);
        if takes_value {
            let space = if name.is_empty() { "" } else { " " };
            let _ = write!(name, "{space}<{value}>");
        }
        let help = arg.get_long_help().or(arg.get_help());
        let mut help = sentence(&help.map(ToString::to_string).unwrap_or_default());
        let possible: Vec<String> = arg
            .get_possible_values()
            .iter()
            .filter(|_| takes_value)
            .map(|p| format!("`{}`", p.get_name()))
            .collect();
        if !possible.is_empty() {
            let _ = write!(help, " One of {}.", possible.join(", "));
        }
        if let Some(env) = arg.get_env() {
            let _ = write!(help, " Also from `{}`.", env.to_string_lossy());
        }
        let default: Vec<String> = arg
            .get_default_values()
            .iter()
            .filter(|_| takes_value)
            .map(|v| format!("`{}`", v.to_string_lossy()))
            .collect();
        let _ = writeln!(
            out,
            "| `{name}` | {} | {} |",
            cell(&help),
            default.join(" ")
        );
    }
}

fn cell(text: &str) -> String {
    text.split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
        .replace('|', "\\|")
}

// ------------------------------------------------------------------------------------------- study

/// A page from the schema that is derived from the study's types: their comments, types, defaults.
fn study(schema: &Value) -> Result<String> {
    let mut out = format!(
        "{GENERATED}# Keys of a study\n\nA study is a TOML file; [the guide](../studies.md) tells what \
         it does. Every key with a default can be left out; an unknown key is an error. On the command \
         line: `--set section.key=value`.\n"
    );
    let page = Types {
        types: schema["$defs"]
            .as_object()
            .context("the schema has no types")?,
    };
    let fields = schema["properties"]
        .as_object()
        .context("the schema has no keys")?;
    out.push_str("\n## At the top\n\n");
    page.table(&mut out, schema);
    page.sections(&mut out, fields, "");
    out.push_str("\n## Choices\n");
    for (name, ty) in page.types {
        let Some(variants) = ty["oneOf"].as_array() else {
            continue;
        };
        let _ = writeln!(out, "\n### {}\n\n{}\n", words(name), description(ty));
        out.push_str("| value | meaning |\n| --- | --- |\n");
        for v in variants {
            let _ = writeln!(out, "| `{}` | {} |", v["const"], cell(description(v)));
        }
    }
    Ok(out)
}

struct Types<'a> {
    types: &'a Map<String, Value>,
}

impl Types<'_> {
    /// The named type that a field refers to.
    fn named(&self, field: &Value) -> Option<(&str, &Value)> {
        let name = field["$ref"].as_str()?.strip_prefix("#/$defs/")?;
        self.types.get_key_value(name).map(|(k, v)| (k.as_str(), v))
    }

    /// The type of a field that is a section of its own, or a list of them.
    fn section(&self, field: &Value) -> Option<&Value> {
        let (_, ty) = self.named(field).or_else(|| self.named(&field["items"]))?;
        ty["properties"].is_object().then_some(ty)
    }

    /// The sections among `fields`, each with those within it.
    fn sections(&self, out: &mut String, fields: &Map<String, Value>, above: &str) {
        for (name, field) in fields {
            let Some(ty) = self.section(field) else {
                continue;
            };
            let name = format!("{above}{name}");
            let (open, close) = match field["type"] == "array" {
                true => ("[[", "]]"),
                false => ("[", "]"),
            };
            let meaning = description(field);
            let _ = writeln!(out, "\n## {open}{name}{close}\n\n{meaning}\n");
            self.table(out, ty);
            if let Some(fields) = ty["properties"].as_object() {
                self.sections(out, fields, &format!("{name}."));
            }
        }
    }

    /// The fields that are no sections.
    fn table(&self, out: &mut String, of: &Value) {
        let required = of["required"].as_array().cloned().unwrap_or_default();
        out.push_str("| key | type | default | meaning |\n| --- | --- | --- | --- |\n");
        for (key, field) in of["properties"].as_object().into_iter().flatten() {
            if self.section(field).is_some() {
                continue;
            }
            let default = if required.iter().any(|r| r == key) {
                "required".to_owned()
            } else {
                match &field["default"] {
                    Value::Null => "none".to_owned(),
                    value => format!("`{}`", toml_like(value, field)),
                }
            };
            let meaning = cell(description(field));
            let ty = self.type_of(field);
            let _ = writeln!(out, "| `{key}` | {ty} | {default} | {meaning} |");
        }
    }

    fn type_of(&self, field: &Value) -> String {
        if let Some((name, _)) = self.named(field) {
            let words = words(name);
            return format!("[{words}](#{})", words.replace(' ', "-"));
        }
        // one that may be left out
        if let Some(of) = field["anyOf"].get(0) {
            return match self.section(of) {
                Some(_) => "table".to_owned(),
                None => self.type_of(of),
            };
        }
        let ty = match &field["type"] {
            Value::Array(either) => either
                .iter()
                .find(|t| *t != "null")
                .cloned()
                .unwrap_or_default(),
            ty => ty.clone(),
        };
        match ty.as_str() {
            Some("array") => format!("list of {}", self.type_of(&field["items"])),
            Some(name) => name.to_owned(),
            None => "any".to_owned(),
        }
    }
}

fn description(value: &Value) -> &str {
    value["description"].as_str().unwrap_or_default()
}

/// `SaeSource` as `sae source`.
fn words(name: &str) -> String {
    let mut out = String::new();
    for c in name.chars() {
        if c.is_ascii_uppercase() && !out.is_empty() {
            out.push(' ');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}

/// JSON is TOML for the values that a study has; an f32 is shown as it was written.
fn toml_like(value: &Value, field: &Value) -> String {
    match value.as_f64() {
        Some(v) if field["format"] == "float" => format!("{:?}", v as f32),
        _ => value.to_string().replace(',', ", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_argument_says_what_it_does() {
        fn check(path: &str, command: &Command) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path}");
            for arg in command.get_arguments() {
                // Choices explain themselves.
                let choices = !arg.get_possible_values().is_empty();
                assert!(
                    arg.get_help().is_some() || choices,
                    "{path} {}",
                    arg.get_id()
                );
            }
            command.get_subcommands().for_each(|c| check(&path, c));
        }
        check("", &crate::Cli::command());
    }

    #[test]
    fn every_key_of_a_study_says_what_it_is() {
        let schema = schemars::schema_for!(Study).to_value();
        let types = schema["$defs"].as_object().unwrap();
        for (name, ty) in types.iter().chain([(&"Study".to_owned(), &schema)]) {
            let keys = ty["properties"].as_object().into_iter().flatten();
            for (key, field) in keys {
                assert!(!description(field).is_empty(), "{name}.{key}");
            }
            let choices = ty["oneOf"].as_array().into_iter().flatten();
            for choice in choices {
                assert!(!description(choice).is_empty(), "{name}: {choice}");
            }
            // A choice without a comment would end up here, and not on the page.
            assert!(ty["enum"].is_null(), "{name}: {ty}");
        }
        let page = study(&schema).unwrap();
        assert!(
            page.contains("| `temperature` | number | `0.8` |"),
            "{page}"
        );
        assert!(page.contains("| `site` | string | required |"), "{page}");
        assert!(page.contains("| `\"refused_vs_complied\"` |"), "{page}");
    }
}
