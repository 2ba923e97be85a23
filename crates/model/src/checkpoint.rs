//! A checkpoint on disk: GGUF or safetensors, one table of tensors, memory-mapped.

use std::fs;
use std::path::{Path, PathBuf};

use demur_kernels::mmap::Mapped;
use demur_kernels::quant::GgmlType;
use sha2::{Digest, Sha256};

use crate::error::ModelError;
use crate::gguf::{self, GgufMetadata};
use crate::safetensors;

/// Largest JSON file that is read beside the weights.
const MAX_JSON: u64 = 64 << 20;

/// What is known of a tensor without reading it.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Name as in the file.
    pub name: String,
    /// Element type.
    pub ty: GgmlType,
    /// Shape, outermost dimension first: a linear layer is `[out, in]`.
    pub shape: Vec<usize>,
    pub(crate) file: usize,
    pub(crate) offset: usize,
    pub(crate) bytes: usize,
}

/// A tensor with its bytes.
#[derive(Debug, Clone, Copy)]
pub struct TensorView<'a> {
    /// What is known of it.
    pub info: &'a TensorInfo,
    /// Its bytes, in the layout of its type.
    pub bytes: &'a [u8],
}

/// A checkpoint, opened.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<Mapped>,
    paths: Vec<PathBuf>,
    tensors: Vec<TensorInfo>, // sorted by name
    metadata: Metadata,
}

/// The format of a checkpoint's weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// One `.gguf` file.
    Gguf,
    /// `.safetensors` files with `config.json`.
    Safetensors,
}

/// Where the architecture is described.
#[derive(Debug)]
pub enum Metadata {
    /// Keys and values of the GGUF file.
    Gguf(GgufMetadata),
    /// `config.json` beside the safetensors.
    Config(serde_json::Value),
}

impl Checkpoint {
    /// Opens a `.gguf` file, a `.safetensors` file (with `config.json` beside it), or a folder.
    ///
    /// # Errors
    /// [`ModelError::NotACheckpoint`], or what is wrong with the bytes.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let not = || ModelError::NotACheckpoint {
            path: path.display().to_string(),
        };
        let extension = path
            .extension()
            .and_then(|e| e.to_str())
            .unwrap_or_default();
        if path.is_dir() {
            return Self::open_safetensors(path, safetensors::shards(path)?);
        }
        match extension {
            "gguf" => {
                let file = Mapped::open(path)?;
                let (metadata, tensors) = gguf::parse(&path.display().to_string(), &file)?;
                Ok(Self::new(
                    path,
                    vec![file],
                    vec![path.to_owned()],
                    tensors,
                    Metadata::Gguf(metadata),
                ))
            }
            "safetensors" => {
                let folder = path.parent().ok_or_else(not)?;
                Self::open_safetensors(folder, vec![path.to_owned()])
            }
            _ if path.exists() => Err(not()),
            _ => Err(ModelError::Io {
                path: path.display().to_string(),
                source: std::io::ErrorKind::NotFound.into(),
            }),
        }
    }

    fn open_safetensors(folder: &Path, paths: Vec<PathBuf>) -> Result<Self, ModelError> {
        let config = read_json(&folder.join("config.json"))?;
        let mut files = Vec::new();
        let mut tensors = Vec::new();
        for (i, path) in paths.iter().enumerate() {
            let file = Mapped::open(path)?;
            safetensors::parse(&path.display().to_string(), &file, i, &mut tensors)?;
            files.push(file);
        }
        gguf::check_overlap(&tensors).map_err(|reason| ModelError::Format {
            path: folder.display().to_string(),
            format: "safetensors",
            reason,
        })?;
        Ok(Self::new(
            folder,
            files,
            paths,
            tensors,
            Metadata::Config(config),
        ))
    }

    fn new(
        path: &Path,
        files: Vec<Mapped>,
        paths: Vec<PathBuf>,
        mut tensors: Vec<TensorInfo>,
        metadata: Metadata,
    ) -> Self {
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Self {
            path: path.to_owned(),
            files,
            paths,
            tensors,
            metadata,
        }
    }

    /// The file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The folder in which files beside the weights are looked for.
    pub fn folder(&self) -> &Path {
        if self.path.is_dir() {
            &self.path
        } else {
            self.path.parent().unwrap_or(Path::new(""))
        }
    }

    /// All tensors, by name.
    pub fn tensors(&self) -> &[TensorInfo] {
        &self.tensors
    }

    /// Whether there is a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        self.tensors
            .binary_search_by(|t| t.name.as_str().cmp(name))
            .is_ok()
    }

    /// The tensor of this name.
    ///
    /// # Errors
    /// [`ModelError::MissingTensor`].
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, ModelError> {
        let at = self
            .tensors
            .binary_search_by(|t| t.name.as_str().cmp(name))
            .map_err(|_| ModelError::MissingTensor {
                tensor: name.to_owned(),
            })?;
        let info = &self.tensors[at];
        Ok(TensorView {
            info,
            bytes: &self.files[info.file][info.offset..info.offset + info.bytes],
        })
    }

    /// Gives the memory of the pages read so far back to the system: after weights are packed, their
    /// bytes in the file are not needed again.
    pub fn release(&self) {
        self.files.iter().for_each(Mapped::release);
    }

    /// The format of the weights.
    pub fn format(&self) -> Format {
        match self.metadata {
            Metadata::Gguf(_) => Format::Gguf,
            Metadata::Config(_) => Format::Safetensors,
        }
    }

    /// Metadata of the architecture.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The GGUF metadata, if it is a GGUF file.
    pub fn gguf(&self) -> Option<&GgufMetadata> {
        match &self.metadata {
            Metadata::Gguf(m) => Some(m),
            Metadata::Config(_) => None,
        }
    }

    /// Bytes of all weight files.
    pub fn bytes_on_disk(&self) -> u64 {
        self.files.iter().map(|f| f.len() as u64).sum()
    }

    /// sha256 of the weight files, as hex: of the file itself, or of the files' sums joined.
    pub fn sha256(&self) -> String {
        let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
        let sums: Vec<String> = self
            .files
            .iter()
            .map(|f| hex(&Sha256::digest(&f[..])))
            .collect();
        match sums.as_slice() {
            [one] => one.clone(),
            many => hex(&Sha256::digest(many.join("\n").as_bytes())),
        }
    }

    /// The weight files.
    pub fn files(&self) -> &[PathBuf] {
        &self.paths
    }
}

/// Reads a JSON file beside the weights.
pub(crate) fn read_json(path: &Path) -> Result<serde_json::Value, ModelError> {
    let io = |source| ModelError::Io {
        path: path.display().to_string(),
        source,
    };
    let length = fs::metadata(path).map_err(io)?.len();
    let format = |reason| ModelError::Format {
        path: path.display().to_string(),
        format: "JSON",
        reason,
    };
    if length > MAX_JSON {
        return Err(format(format!(
            "{length} bytes are beyond the limit of {MAX_JSON}"
        )));
    }
    let text = fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|e| format(e.to_string()))
}
