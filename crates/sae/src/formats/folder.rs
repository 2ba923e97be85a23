//! Folders that are written whole or not at all.

use std::fs;
use std::path::Path;

use crate::error::SaeError;

/// Writes `files` beside `folder`, syncs and renames. `folder` must not exist or hold the first of the
/// files; then it is replaced.
pub(crate) fn write_folder(folder: &Path, files: &[(&str, Vec<u8>)]) -> Result<(), SaeError> {
    let io = |path: &Path| {
        let path = path.display().to_string();
        move |source| SaeError::Io { path, source }
    };
    let parent = folder
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent))?;
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(0o777)); // less the umask, as any folder
    }
    let scratch = builder
        .prefix(".sae-")
        .tempdir_in(parent)
        .map_err(io(parent))?;
    for (name, bytes) in files {
        let path = scratch.path().join(name);
        fs::write(&path, bytes).map_err(io(&path))?;
        fs::File::open(&path)
            .and_then(|f| f.sync_all())
            .map_err(io(&path))?;
    }
    let fresh = scratch.keep();
    if files.iter().take(1).any(|f| folder.join(f.0).is_file()) {
        let old = parent.join(format!(".sae-old-{}", std::process::id()));
        fs::rename(folder, &old).map_err(io(folder))?;
        fs::rename(&fresh, folder).map_err(io(folder))?;
        fs::remove_dir_all(&old).map_err(io(&old))?;
    } else {
        fs::rename(&fresh, folder).map_err(io(folder))?;
    }
    Ok(())
}
