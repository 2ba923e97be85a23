//! What the model runtime refuses, each naming the thing and the way out.

/// The result of a fallible operation of this crate.
pub type Result<T, E = ModelError> = std::result::Result<T, E>;

/// An error while reading, loading or running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file can't be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A kernel refused its input.
    #[error(transparent)]
    Kernel(#[from] demur_kernels::KernelError),
    /// Bytes that are not the format they should be.
    #[error("{path}: not a valid {format} file: {reason}")]
    Format {
        /// The file.
        path: String,
        /// The format expected.
        format: &'static str,
        /// What is wrong, with its place.
        reason: String,
    },
    /// A path that is no checkpoint.
    #[error(
        "{path} is no checkpoint; give a .gguf file, a .safetensors file, or a folder with config.json and *.safetensors"
    )]
    NotACheckpoint {
        /// The path.
        path: String,
    },
    /// A tensor's element type is not one that demur computes with.
    #[error(
        "tensor '{tensor}' has type {type_name} (id {id}), which is not supported; use a file with F32, F16, BF16, Q4_0 ... Q8_0 or Q2_K ... Q6_K"
    )]
    TensorType {
        /// The tensor.
        tensor: String,
        /// The type's name.
        type_name: String,
        /// Its id in the file.
        id: u32,
    },
    /// A tensor is missing.
    #[error("the checkpoint has no tensor '{tensor}'")]
    MissingTensor {
        /// The tensor, or the names tried.
        tensor: String,
    },
    /// A tensor's shape is not what the config asks for.
    #[error("tensor '{tensor}' has shape {found:?}, the config asks for {expected:?}")]
    TensorShape {
        /// The tensor.
        tensor: String,
        /// Its shape, outermost first.
        found: Vec<usize>,
        /// The shape expected.
        expected: Vec<usize>,
    },
    /// A key of the metadata is missing or has the wrong type.
    #[error("metadata key '{key}': {reason}")]
    Metadata {
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A model family that is not supported.
    #[error("architecture '{name}' is not supported; supported are: {supported}")]
    Architecture {
        /// The name found.
        name: String,
        /// The names that are supported.
        supported: String,
    },
    /// The config contradicts itself or is beyond a limit.
    #[error("config: {field} = {value}: {rule}")]
    Config {
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is asked of it.
        rule: String,
    },
    /// The tokenizer can't be built, or can't encode.
    #[error("tokenizer: {what}: {reason}")]
    Tokenizer {
        /// The file, key or text.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tokenizer model that is not supported.
    #[error(
        "tokenizer model '{name}' is not supported; supported are gpt2 and llama (GGUF), BPE (tokenizer.json)"
    )]
    UnknownTokenizerModel {
        /// The name found.
        name: String,
    },
    /// A pre-tokenizer that is not known.
    #[error("pre-tokenizer '{name}' is not known; known are: {known}")]
    UnknownPreTokenizer {
        /// The name found.
        name: String,
        /// The names that are known.
        known: String,
    },
    /// The checkpoint has no chat template.
    #[error(
        "the checkpoint has no chat template: it is a base model; ask for a fallback (--chat-template chatml) or give plain text"
    )]
    NoChatTemplate,
    /// The chat template failed.
    #[error("chat template: {reason}")]
    ChatTemplate {
        /// The template's own words.
        reason: String,
    },
    /// A hook site that is not one.
    #[error(
        "'{name}' is no hook site; write blocks.6.hook_resid_pre, _mid or _post, or the aliases layers.6 and model.layers.6"
    )]
    Site {
        /// What was given.
        name: String,
    },
    /// A hook site beyond the model's last layer.
    #[error("hook site {site} is beyond the model's last layer, {last}")]
    SiteLayer {
        /// The site.
        site: String,
        /// The last layer's index.
        last: usize,
    },
    /// A request that can't be run.
    #[error("request: {reason}")]
    Request {
        /// What is wrong with it.
        reason: String,
    },
    /// A prompt longer than the model's context.
    #[error("the prompt has {tokens} tokens, the context is {context}: shorten it")]
    TooLong {
        /// Tokens asked for.
        tokens: usize,
        /// Tokens that fit.
        context: usize,
    },
    /// A token id beyond the vocabulary.
    #[error("token id {id} is beyond the vocabulary of {d_vocab}")]
    TokenId {
        /// The id.
        id: u32,
        /// Size of the vocabulary.
        d_vocab: usize,
    },
}

impl ModelError {
    /// Something wrong in a tokenizer: `what` is the file, key or text.
    pub(crate) fn tokenizer(what: &str, reason: impl ToString) -> Self {
        Self::Tokenizer {
            what: what.to_owned(),
            reason: reason.to_string(),
        }
    }
}
