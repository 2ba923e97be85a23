//! Chats to tokens: the checkpoint's own template, with a role for every token.
//!
//! The template is Jinja, rendered with the additions that Hugging Face's templates expect. The text
//! is then tokenised *in one go*, so that merges across the border of template and content are those
//! that the model knows; where a message's content lies in it is found by rendering once more with
//! every content between two private-use characters. Inside contents, control tokens are text: a
//! user who writes `<|im_end|>` ends nothing.

use std::ops::Range;

use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{Checkpoint, read_json};
use crate::error::ModelError;
use crate::hooks::Role;
use crate::tokenizer::Tokenizer;

/// Bounds the work of a template from an untrusted file.
const FUEL: u64 = 10_000_000;
/// Longest template, bytes.
const MAX_TEMPLATE: usize = 1 << 20;
/// Marks the beginning and the end of a content.
const MARKS: (char, char) = ('\u{f8f0}', '\u{f8f1}');

/// One message of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// The text.
    pub content: String,
}

/// A template to use where the checkpoint has none; only when asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// `<|im_start|>role\ncontent<|im_end|>\n`.
    ChatMl,
    /// `role: content\n`, for base models.
    Plain,
}

/// A chat as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Who wrote each.
    pub roles: Vec<Role>,
}

/// A chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    /// The checkpoint's own template.
    ///
    /// # Errors
    /// [`ModelError::NoChatTemplate`], or [`ModelError::ChatTemplate`] if it does not parse.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, ModelError> {
        if let Some(metadata) = checkpoint.gguf() {
            let token = |key: &str| -> Result<String, ModelError> {
                let id = metadata.int(key)?.and_then(|id| usize::try_from(id).ok());
                let tokens = metadata
                    .strings("tokenizer.ggml.tokens")?
                    .unwrap_or_default();
                Ok(id
                    .and_then(|id| tokens.get(id))
                    .cloned()
                    .unwrap_or_default())
            };
            let source = metadata
                .str("tokenizer.chat_template")?
                .ok_or(ModelError::NoChatTemplate)?;
            let (bos, eos) = (
                token("tokenizer.ggml.bos_token_id")?,
                token("tokenizer.ggml.eos_token_id")?,
            );
            return Self::new(source, bos, eos);
        }
        let folder = checkpoint.folder();
        let config = folder.join("tokenizer_config.json");
        let config = if config.is_file() {
            read_json(&config)?
        } else {
            serde_json::Value::Null
        };
        let token = |key: &str| match &config[key] {
            serde_json::Value::String(s) => s.clone(),
            other => other["content"].as_str().unwrap_or_default().to_owned(),
        };
        let file = folder.join("chat_template.jinja");
        let source = if file.is_file() {
            let io = |source| ModelError::Io {
                path: file.display().to_string(),
                source,
            };
            Some(std::fs::read_to_string(&file).map_err(io)?)
        } else {
            match &config["chat_template"] {
                serde_json::Value::String(s) => Some(s.clone()),
                // Several by name: the one for chats.
                serde_json::Value::Array(many) => many
                    .iter()
                    .find(|t| t["name"] == "default")
                    .and_then(|t| t["template"].as_str())
                    .map(str::to_owned),
                _ => None,
            }
        };
        let source = source.ok_or(ModelError::NoChatTemplate)?;
        Self::new(&source, token("bos_token"), token("eos_token"))
    }

    /// A template for checkpoints that have none.
    ///
    /// # Errors
    /// Never, but for a broken build.
    pub fn fallback(which: Fallback) -> Result<Self, ModelError> {
        let source = match which {
            Fallback::ChatMl => {
                "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
                 {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
            }
            Fallback::Plain => {
                "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}\
                 {% if add_generation_prompt %}assistant:{% endif %}"
            }
        };
        Self::new(source, String::new(), String::new())
    }

    /// Parses a template.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the parser's line.
    pub fn new(source: &str, bos: String, eos: String) -> Result<Self, ModelError> {
        if source.len() > MAX_TEMPLATE {
            return Err(ModelError::ChatTemplate {
                reason: format!(
                    "{} bytes are beyond the limit of {MAX_TEMPLATE}",
                    source.len()
                ),
            });
        }
        let mut env = Environment::new();
        env.set_trim_blocks(true);
        env.set_lstrip_blocks(true);
        env.set_fuel(Some(FUEL));
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function(
            "raise_exception",
            |text: String| -> Result<String, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
            },
        );
        // A fixed day: a prompt must not depend on when it is rendered.
        env.add_function("strftime_now", |_: String| "01 Jan 2025");
        env.add_template_owned("chat", source.to_owned())
            .map_err(error)?;
        Ok(Self { env, bos, eos })
    }

    /// The chat as text.
    ///
    /// # Errors
    /// [`ModelError::ChatTemplate`] with the template's own words, for instance that roles must
    /// alternate.
    pub fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ModelError> {
        let template = self.env.get_template("chat").map_err(error)?;
        let render = template.render(context! {
            messages => Value::from_serialize(messages),
            add_generation_prompt,
            bos_token => self.bos,
            eos_token => self.eos,
        });
        render.map_err(error)
    }

    /// The chat as tokens with roles. Control tokens are parsed in the template's text only.
    ///
    /// # Errors
    /// As [`Self::render`]; also if a message holds one of the two private-use characters that mark
    /// contents, or if the template hides where a content lies.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Rendered, ModelError> {
        let text = self.render(messages, add_generation_prompt)?;
        let contents = self.contents(messages, add_generation_prompt, &text)?;
        let literal: Vec<Range<usize>> = contents.iter().map(|c| c.0.clone()).collect();
        let spans = tokenizer.encode_spans(&text, &literal)?;
        let role_of = |bytes: &Range<usize>| {
            contents
                .iter()
                .find(|(range, _)| bytes.start < range.end && range.start < bytes.end)
                .map_or(Role::Template, |c| c.1)
        };
        Ok(Rendered {
            ids: spans.iter().map(|s| s.id).collect(),
            roles: spans.iter().map(|s| role_of(&s.bytes)).collect(),
        })
    }

    /// Where each message's content lies in `text`, the plain rendering.
    fn contents(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        text: &str,
    ) -> Result<Vec<(Range<usize>, Role)>, ModelError> {
        let refuse = |reason: &str| ModelError::ChatTemplate {
            reason: reason.to_owned(),
        };
        if messages
            .iter()
            .any(|m| m.content.contains([MARKS.0, MARKS.1]))
        {
            return Err(refuse(
                "a message holds U+F8F0 or U+F8F1, which are reserved",
            ));
        }
        // Templates may trim a content, so the marks go inside its white space.
        let marked: Vec<Message> = messages
            .iter()
            .map(|m| {
                let inner = m.content.trim();
                let at = m.content.find(inner).unwrap_or(0);
                let (before, after) = (&m.content[..at], &m.content[at + inner.len()..]);
                Message {
                    role: m.role.clone(),
                    content: format!("{before}{}{inner}{}{after}", MARKS.0, MARKS.1),
                }
            })
            .collect();
        let marked_text = self.render(&marked, add_generation_prompt)?;
        let mut found = Vec::new();
        let mut plain = String::with_capacity(text.len());
        let mut open = None;
        for c in marked_text.chars() {
            if c == MARKS.0 {
                open = Some(plain.len());
            } else if c == MARKS.1 {
                found.extend(open.take().map(|start| start..plain.len()));
            } else {
                plain.push(c);
            }
        }
        if plain != text {
            return Err(refuse(
                "it changes contents, so it can't be told where they lie",
            ));
        }
        // A template may leave messages out or repeat them; roles follow by the content's text.
        let mut rest = messages.iter();
        Ok(found
            .into_iter()
            .map(|range| {
                let content = &text[range.clone()];
                let role =
                    rest.by_ref()
                        .find(|m| m.content.trim() == content)
                        .map_or(Role::User, |m| match m.role.as_str() {
                            "system" | "developer" => Role::System,
                            "assistant" | "model" => Role::Assistant,
                            _ => Role::User,
                        });
                (range, role)
            })
            .collect())
    }
}

fn error(e: minijinja::Error) -> ModelError {
    let mut reason = e.to_string();
    if let Some(line) = e.line() {
        reason = format!("{reason} (line {line})");
    }
    ModelError::ChatTemplate { reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(turns: &[(&str, &str)]) -> Vec<Message> {
        turns
            .iter()
            .map(|(role, content)| Message {
                role: (*role).to_owned(),
                content: (*content).to_owned(),
            })
            .collect()
    }

    #[test]
    fn chatml_renders() {
        let template = ChatTemplate::fallback(Fallback::ChatMl).unwrap();
        let text = template.render(&chat(&[("user", "hi")]), true).unwrap();
        assert_eq!(
            text,
            "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn contents_are_found_even_if_trimmed() {
        let template = ChatTemplate::new(
            "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}",
            String::new(),
            String::new(),
        )
        .unwrap();
        let messages = chat(&[
            ("system", " be kind\n"),
            ("user", "hi"),
            ("assistant", "hi"),
        ]);
        let text = template.render(&messages, false).unwrap();
        let found = template.contents(&messages, false, &text).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(r, role)| (&text[r.clone()], *role))
            .collect();
        assert_eq!(
            found,
            [
                ("be kind", Role::System),
                ("hi", Role::User),
                ("hi", Role::Assistant)
            ]
        );
    }

    #[test]
    fn a_template_can_refuse_and_cannot_run_on() {
        let refuse = "{{ raise_exception('roles must alternate') }}";
        let template = ChatTemplate::new(refuse, String::new(), String::new()).unwrap();
        let e = template.render(&[], true).unwrap_err().to_string();
        assert!(e.contains("roles must alternate"), "{e}");
        let endless =
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        let template = ChatTemplate::new(endless, String::new(), String::new()).unwrap();
        assert!(template.render(&[], true).is_err());
        assert!(ChatTemplate::new("{% for", String::new(), String::new()).is_err());
    }
}
