//! Talkers: other models, which attack or judge. One stands behind any address that speaks OpenAI's
//! chat completions, or is a checkpoint on this machine.
//!
//! A talker fails in a typed way and within its time; it is up to who asks to make that no pass.

use std::sync::Mutex;
use std::time::Duration;

use demur_model::ModelError;
use demur_model::chat::{ChatTemplate, Message};
use demur_model::decoder::Model;
use demur_model::generate::{Engine, EngineConfig, Request};
use demur_model::tokenizer::Tokenizer;
use serde_json::{Value, json};

/// Requests to an address before it is given up, where the fault may pass.
const TRIES: u32 = 3;
/// Wait before the second try; it doubles.
const WAIT: Duration = Duration::from_millis(200);
/// Longest reply that is shown in a message, characters.
const SHOWN: usize = 200;

/// Why a talker did not reply as it should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TalkError {
    /// Nobody answers at the address, or the connection broke.
    #[error("{address}: {reason}")]
    Connection {
        /// The address.
        address: String,
        /// What the network says.
        reason: String,
    },
    /// No answer came in time.
    #[error("{address}: no answer within {seconds} s")]
    Timeout {
        /// The address.
        address: String,
        /// The limit.
        seconds: u64,
    },
    /// The server refuses.
    #[error("{address}: status {status}: {body}")]
    Status {
        /// The address.
        address: String,
        /// HTTP's status.
        status: u16,
        /// The beginning of what it says.
        body: String,
    },
    /// The reply is not what was asked for.
    #[error("{name}: {reason}: {reply}")]
    Reply {
        /// The talker.
        name: String,
        /// What is wrong.
        reason: &'static str,
        /// The beginning of the reply.
        reply: String,
    },
    /// The local model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl TalkError {
    /// A reply that is not what was asked for.
    pub fn reply(name: &str, reason: &'static str, reply: &str) -> Self {
        Self::Reply {
            name: name.to_owned(),
            reason,
            reply: reply.chars().take(SHOWN).collect(),
        }
    }

    /// Whether a second try may help.
    fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 429 || *status >= 500,
            Self::Connection { .. } => true,
            _ => false,
        }
    }
}

/// A model that replies to a conversation.
pub trait Talker: Send + Sync {
    /// Its name in results.
    fn name(&self) -> &str;
    /// Its reply, at most a few hundred tokens, as deterministic as it can be.
    ///
    /// # Errors
    /// [`TalkError`].
    fn reply(&self, messages: &[Message]) -> Result<String, TalkError>;
}

/// A model behind an address that speaks OpenAI's chat completions.
pub struct Remote {
    name: String,
    address: String,
    model: String,
    key: Option<String>,
    max_tokens: usize,
    seconds: u64,
    agent: ureq::Agent,
}

impl Remote {
    /// `base` is the address up to `/chat/completions`, which is added; `key` is sent as a bearer
    /// token. A request takes at most `seconds`.
    pub fn new(
        base: &str,
        model: &str,
        key: Option<String>,
        max_tokens: usize,
        seconds: u64,
    ) -> Self {
        let base = base.trim_end_matches('/');
        Self {
            name: format!("{base}#{model}"),
            address: format!("{base}/chat/completions"),
            model: model.to_owned(),
            key,
            max_tokens,
            seconds,
            agent: ureq::Agent::config_builder()
                .timeout_global(Some(Duration::from_secs(seconds)))
                .http_status_as_error(false)
                .build()
                .into(),
        }
    }

    fn failed(&self, e: &ureq::Error) -> TalkError {
        let address = self.address.clone();
        match e {
            ureq::Error::Timeout(_) => TalkError::Timeout {
                address,
                seconds: self.seconds,
            },
            e => TalkError::Connection {
                address,
                reason: e.to_string(),
            },
        }
    }

    fn ask(&self, body: &str) -> Result<String, TalkError> {
        let mut request = self
            .agent
            .post(&self.address)
            .header("Content-Type", "application/json");
        if let Some(key) = &self.key {
            request = request.header("Authorization", &format!("Bearer {key}"));
        }
        let mut response = request.send(body).map_err(|e| self.failed(&e))?;
        let status = response.status().as_u16();
        let text = response.body_mut().read_to_string();
        let text = text.map_err(|e| self.failed(&e))?;
        if status != 200 {
            return Err(TalkError::Status {
                address: self.address.clone(),
                status,
                body: text.chars().take(SHOWN).collect(),
            });
        }
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        let content = value["choices"][0]["message"]["content"].as_str();
        content
            .map(str::to_owned)
            .ok_or_else(|| TalkError::reply(&self.name, "is no chat completion", &text))
    }
}

impl Talker for Remote {
    fn name(&self) -> &str {
        &self.name
    }

    fn reply(&self, messages: &[Message]) -> Result<String, TalkError> {
        let body = json!({
            "model": self.model, "messages": messages, "temperature": 0, "seed": 0,
            "max_tokens": self.max_tokens,
        })
        .to_string();
        let mut wait = WAIT;
        for _ in 1..TRIES {
            match self.ask(&body) {
                Err(e) if e.may_pass() => std::thread::sleep(wait),
                done => return done,
            }
            wait *= 2;
        }
        self.ask(&body)
    }
}

/// A checkpoint on this machine.
pub struct Local<'m> {
    /// Its name in results.
    pub name: String,
    /// The model.
    pub model: &'m Model,
    /// Its tokenizer.
    pub tokenizer: &'m Tokenizer,
    /// Its chat template.
    pub chat: &'m ChatTemplate,
    /// Longest reply, tokens.
    pub max_new_tokens: usize,
    /// One reply at a time: each uses all threads.
    pub turn: Mutex<()>,
}

impl Talker for Local<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn reply(&self, messages: &[Message]) -> Result<String, TalkError> {
        let _turn = self.turn.lock();
        let r = self.chat.encode(self.tokenizer, messages, true)?;
        let request = Request::new(r.ids, r.roles, self.max_new_tokens);
        let mut engine = Engine::new(self.model, self.tokenizer, EngineConfig::default());
        let mut replies = engine.run(vec![request], |_, _| {})?;
        Ok(replies.pop().map(|o| o.text).unwrap_or_default())
    }
}

/// The first JSON object in a reply, which may stand in a fence or between words.
pub(crate) fn object(reply: &str) -> Option<Value> {
    let start = reply.find('{')?;
    let end = reply.rfind('}')?;
    let found: Value = serde_json::from_str(reply.get(start..=end)?).ok()?;
    found.is_object().then_some(found)
}

/// A server for tests: answers each request with the next of `answers`, a status and a body, and
/// gives the bodies of the requests back.
#[cfg(test)]
pub(crate) mod fake {
    use std::io::{BufRead, BufReader, Read, Write};
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    use super::{Value, json};

    /// The status and the content of a completion.
    pub fn says(text: &str) -> (u16, String) {
        let body = json!({ "choices": [{ "message": { "role": "assistant", "content": text } }] });
        (200, body.to_string())
    }

    /// Its base address, and what it was asked.
    pub fn server(answers: Vec<(u16, String)>) -> (String, JoinHandle<Vec<Value>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}/v1", listener.local_addr().unwrap());
        let asked = std::thread::spawn(move || {
            let mut asked = Vec::new();
            for (status, answer) in answers {
                let (stream, _) = listener.accept().unwrap();
                let mut reader = BufReader::new(stream);
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    let line = line.trim().to_lowercase();
                    if let Some(n) = line.strip_prefix("content-length:") {
                        length = n.trim().parse().unwrap();
                    }
                    if line.is_empty() {
                        break;
                    }
                }
                let mut body = vec![0; length];
                reader.read_exact(&mut body).unwrap();
                asked.push(serde_json::from_slice(&body).unwrap());
                let head = format!(
                    "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{answer}",
                    answer.len()
                );
                reader.get_mut().write_all(head.as_bytes()).unwrap();
            }
            asked
        });
        (base, asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello() -> Vec<Message> {
        vec![Message {
            role: "user".to_owned(),
            content: "Hello".to_owned(),
        }]
    }

    #[test]
    fn a_completion_is_asked_for_and_read() {
        let (base, asked) = fake::server(vec![(503, "busy".to_owned()), fake::says("Hi")]);
        let remote = Remote::new(&format!("{base}/"), "m", Some("k".to_owned()), 7, 20);
        assert_eq!(remote.reply(&hello()).unwrap(), "Hi");
        let asked = asked.join().unwrap();
        assert_eq!(asked.len(), 2);
        assert_eq!(asked[1]["messages"][0]["content"], "Hello");
        assert_eq!(
            (&asked[1]["model"], &asked[1]["max_tokens"]),
            (&json!("m"), &json!(7))
        );
    }

    #[test]
    fn failures_are_typed() {
        let (base, _asked) = fake::server(vec![(401, "no key".to_owned())]);
        let e = Remote::new(&base, "m", None, 7, 20)
            .reply(&hello())
            .unwrap_err();
        assert!(matches!(e, TalkError::Status { status: 401, .. }), "{e}");
        let (base, _asked) = fake::server(vec![(200, "{\"choices\": []}".to_owned())]);
        let e = Remote::new(&base, "m", None, 7, 20)
            .reply(&hello())
            .unwrap_err();
        assert!(matches!(e, TalkError::Reply { .. }), "{e}");
        // Nobody is there: the listener is gone.
        let (base, asked) = fake::server(Vec::new());
        asked.join().unwrap();
        let e = Remote::new(&base, "m", None, 7, 20)
            .reply(&hello())
            .unwrap_err();
        assert!(matches!(e, TalkError::Connection { .. }), "{e}");
        // Somebody is there who says nothing.
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let base = format!("http://{}/v1", silent.local_addr().unwrap());
        let e = Remote::new(&base, "m", None, 7, 1)
            .reply(&hello())
            .unwrap_err();
        assert!(matches!(e, TalkError::Timeout { seconds: 1, .. }), "{e}");
    }

    #[test]
    fn objects_in_replies() {
        assert_eq!(object("Sure:\n```json\n{\"a\": 1}\n```").unwrap()["a"], 1);
        assert!(object("} {").is_none());
        assert!(object("none").is_none());
    }
}
