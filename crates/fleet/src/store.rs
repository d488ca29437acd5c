//! A disk of which one folder lies in an S3-compatible store: the snapshots'.
//!
//! A store has no folders and cannot rename. A snapshot in the making is staged on the local disk;
//! giving it its name uploads it, `state.json` last, and without `state.json` it counts as not
//! there. So what `snapshot.rs` promises of a disk holds here too. Credentials and the endpoint
//! come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`,
//! `AWS_ENDPOINT`). Read next: `snapshot/write.rs`, whose order of renames this follows.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use object_store::aws::AmazonS3Builder;
use object_store::path::Path as Key;
use object_store::{
    ClientOptions, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig, WriteMultipart,
};
use tokio::runtime::Runtime;

use crate::error::FleetError;
use crate::snapshot::STATE_FILE;
use crate::world::{Disk, DiskFile, Entry, EntryKind, Locking};

/// A larger file is uploaded in parts of this size: S3 wants at least 5 MiB a part.
const PART_BYTES: usize = 8 << 20;
/// Parts on their way at a time: enough to fill a link, 32 MiB of memory.
const PARTS_AT_ONCE: usize = 4;
/// A request is sent again this often before it has failed; a whole snapshot is tried again by
/// the supervisor.
const RETRIES: usize = 4;
/// And not after this long.
const RETRY_TIMEOUT: Duration = Duration::from_secs(30);
/// A store that does not take a connection within this is not reachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// A request that takes longer has failed: a part of 8 MiB passes on a link of 1 Mbit/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(90);

/// What the folder of a snapshot that is being replaced begins with.
const ASIDE: &str = "old-";

/// The disk.
pub struct StoreDisk<'d> {
    inner: &'d dyn Disk,
    store: Arc<dyn ObjectStore>,
    runtime: Arc<Runtime>,
    /// As in the settings, without a slash at its end.
    url: String,
    /// What keys begin with.
    prefix: Key,
    /// Where snapshots in the making lie.
    staging: PathBuf,
}

/// Where something is.
enum Place {
    /// On the local disk.
    Local(PathBuf),
    /// The folder in the store.
    Root,
    /// Below it, under its key.
    Object(Key),
}

fn failed(error: object_store::Error) -> io::Error {
    let kind = match &error {
        object_store::Error::NotFound { .. } => io::ErrorKind::NotFound,
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        // Whatever the store says: the objects themselves are not known to be bad.
        _ => io::ErrorKind::NetworkDown,
    };
    // The chain of causes on one line.
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(of) = cause {
        let more = of.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = of.source();
    }
    // Of a page of XML only its code is worth reading.
    if let Some((head, page)) = text.split_once('<') {
        let code = page.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
        text = format!("{head}{}", code.map_or("", |(code, _)| code));
    }
    io::Error::new(kind, text.replace('\n', " "))
}

fn unsupported(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, format!("a store cannot {what}"))
}

impl<'d> StoreDisk<'d> {
    /// The store that `s3://BUCKET/PREFIX` names; `staging` is a folder for snapshots in the
    /// making. Reaches nothing yet.
    pub fn open(url: &Path, staging: &Path, inner: &'d dyn Disk) -> Result<Self, FleetError> {
        let url = url.to_string_lossy().trim_end_matches('/').to_owned();
        let wrong =
            |problem: &str| FleetError::Store { url: url.clone(), problem: problem.to_owned() };
        let Some(rest) = url.strip_prefix("s3://") else {
            return Err(wrong("only s3:// is known"));
        };
        let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.is_empty() {
            return Err(wrong("it names no bucket"));
        }
        let key = Key::parse(prefix).map_err(|error| wrong(&error.to_string()))?;
        // Fails only where one is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = ClientOptions::new()
            .with_allow_http(true)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_timeout(REQUEST_TIMEOUT);
        let retry = RetryConfig {
            max_retries: RETRIES,
            retry_timeout: RETRY_TIMEOUT,
            ..RetryConfig::default()
        };
        let store = AmazonS3Builder::from_env()
            .with_bucket_name(bucket)
            .with_client_options(options)
            .with_retry(retry)
            .build()
            .map_err(|error| wrong(&failed(error).to_string()))?;
        StoreDisk::with_store(Arc::new(store), &url, key, staging, inner)
    }

    /// Any store.
    fn with_store(
        store: Arc<dyn ObjectStore>,
        url: &str,
        prefix: Key,
        staging: &Path,
        inner: &'d dyn Disk,
    ) -> Result<Self, FleetError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("snapshot-store")
            .enable_all()
            .build()
            .map_err(FleetError::io("start a thread for", Path::new(url)))?;
        let (url, staging) = (url.to_owned(), staging.to_owned());
        Ok(StoreDisk { inner, store, runtime: Arc::new(runtime), url, prefix, staging })
    }

    fn place(&self, path: &Path) -> Place {
        let Some(rest) = path.to_str().and_then(|text| text.strip_prefix(self.url.as_str())) else {
            return Place::Local(path.to_owned());
        };
        let rest = rest.trim_matches('/');
        if rest.is_empty() {
            Place::Root
        } else if rest.starts_with('.') {
            Place::Local(self.staging.join(rest))
        } else {
            Place::Object(self.key(rest))
        }
    }

    /// The key of a name with slashes below the root.
    fn key(&self, rest: &str) -> Key {
        rest.split('/').fold(self.prefix.clone(), |key, part| key.join(part))
    }

    /// All objects below a key.
    fn objects(&self, below: &Key) -> io::Result<Vec<Key>> {
        self.runtime.block_on(async {
            let list = self.store.list(Some(below)).map_ok(|meta| meta.location);
            list.try_collect().await.map_err(failed)
        })
    }

    fn delete(&self, keys: Vec<Key>) -> io::Result<()> {
        let keys = futures_util::stream::iter(keys.into_iter().map(Ok)).boxed();
        self.runtime.block_on(async {
            let deleted: Result<Vec<Key>, object_store::Error> =
                self.store.delete_stream(keys).try_collect().await;
            match deleted {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(failed(error)),
            }
        })
    }

    /// Deletes a snapshot; from the first moment on it counts as not there.
    fn delete_folder(&self, folder: &Key) -> io::Result<()> {
        self.delete(vec![folder.clone().join(STATE_FILE)])?;
        self.delete(self.objects(folder)?)
    }

    /// Uploads a staged folder under its name.
    fn upload(&self, staged: &Path, folder: &Key) -> io::Result<()> {
        let mut names: Vec<String> =
            self.inner.list(staged)?.into_iter().map(|entry| entry.name).collect();
        // What makes it count comes last.
        names.sort_by_key(|name| (name == STATE_FILE, name.clone()));
        for name in names {
            let mut file = self.inner.open_file(&staged.join(&name))?;
            self.runtime.block_on(put(&*self.store, &folder.clone().join(name), &mut *file))?;
        }
        Ok(())
    }

    /// Takes a snapshot out of sight: to be removed, or aside while it is being replaced.
    fn retire(&self, folder: &Key, aside: Option<&Key>) -> io::Result<()> {
        match aside {
            None => self.delete(vec![folder.clone().join(STATE_FILE)]),
            Some(aside) => {
                self.copy_folder(folder, aside)?;
                self.delete_folder(folder)
            }
        }
    }

    /// Copies a snapshot within the store, what makes it count last.
    fn copy_folder(&self, from: &Key, to: &Key) -> io::Result<()> {
        let mut keys = self.objects(from)?;
        keys.sort_by_key(|key| (key.filename() == Some(STATE_FILE), key.clone()));
        for key in keys {
            let copied = to.clone().join(key.filename().unwrap_or_default());
            self.runtime.block_on(self.store.copy(&key, &copied)).map_err(failed)?;
        }
        Ok(())
    }

    /// Where a snapshot stands aside that is renamed to `.old-...` or back.
    fn aside(&self, path: &Path) -> Option<Key> {
        let name = path.file_name()?.to_str()?.strip_prefix(".old-")?;
        Some(self.key(&format!("{ASIDE}{name}")))
    }

    fn reader(&self, key: &Key) -> io::Result<StoreRead> {
        let got = self.runtime.block_on(self.store.get(key)).map_err(failed)?;
        let stream = got.into_stream().map_ok(|bytes| bytes.to_vec()).map_err(failed).boxed();
        let runtime = Arc::clone(&self.runtime);
        Ok(StoreRead { runtime, stream, chunk: Vec::new(), at: 0 })
    }

    /// What is removed under a staged name: the staged files, and what a dead or failed upload, or
    /// a snapshot that was retired, has left in the store.
    fn remove_staged(&self, path: &Path, staged: &Path) -> io::Result<()> {
        if let Some(aside) = self.aside(path) {
            return self.delete_folder(&aside);
        }
        if let Some((_, name)) = path.to_str().and_then(|text| text.rsplit_once("step-")) {
            let folder = self.key(&format!("step-{name}"));
            let objects = self.objects(&folder)?;
            if !objects.contains(&folder.clone().join(STATE_FILE)) {
                self.delete(objects)?;
            }
        }
        match self.inner.remove(staged) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// The snapshots in the store; those without `state.json` under the name of one in the making.
    fn list_root(&self) -> io::Result<Vec<Entry>> {
        let mut folders: BTreeMap<String, bool> = BTreeMap::new();
        for key in self.objects(&self.prefix)? {
            let Some(mut parts) = key.prefix_match(&self.prefix) else { continue };
            let (Some(folder), Some(file)) = (parts.next(), parts.next()) else { continue };
            let is_whole = folders.entry(folder.as_ref().to_owned()).or_default();
            *is_whole |= file.as_ref() == STATE_FILE;
        }
        let mut names: BTreeSet<String> = folders
            .into_iter()
            .map(|(name, is_whole)| match name.strip_prefix(ASIDE) {
                // It counts where the one that replaces it does not.
                Some(replaced) => format!(".old-{replaced}"),
                None if is_whole => name,
                None => format!(".tmp-{name}"),
            })
            .collect();
        match self.inner.list(&self.staging) {
            Ok(staged) => names.extend(staged.into_iter().map(|entry| entry.name)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        Ok(names.into_iter().map(|name| Entry { name, kind: EntryKind::Folder }).collect())
    }
}

/// Uploads a file, in parts if it is large.
async fn put(store: &dyn ObjectStore, key: &Key, file: &mut dyn Read) -> io::Result<()> {
    let mut part = Vec::new();
    file.take(PART_BYTES as u64).read_to_end(&mut part)?;
    if part.len() < PART_BYTES {
        return store.put(key, PutPayload::from(part)).await.map(drop).map_err(failed);
    }
    let parts = store.put_multipart(key).await.map_err(failed)?;
    let mut upload = WriteMultipart::new_with_chunk_size(parts, PART_BYTES);
    while !part.is_empty() {
        upload.write(&part);
        if let Err(error) = upload.wait_for_capacity(PARTS_AT_ONCE).await {
            // Whatever cannot be given up now expires in the store by its own rules.
            let _ = upload.abort().await;
            return Err(failed(error));
        }
        part.clear();
        file.take(PART_BYTES as u64).read_to_end(&mut part)?;
    }
    upload.finish().await.map(drop).map_err(failed)
}

/// An object being read.
struct StoreRead {
    runtime: Arc<Runtime>,
    stream: BoxStream<'static, io::Result<Vec<u8>>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for StoreRead {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        while self.at == self.chunk.len() {
            match self.runtime.block_on(self.stream.next()) {
                None => return Ok(0),
                Some(chunk) => (self.chunk, self.at) = (chunk?, 0),
            }
        }
        let count = bytes.len().min(self.chunk.len() - self.at);
        bytes[..count].copy_from_slice(&self.chunk[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

impl Disk for StoreDisk<'_> {
    fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        match self.place(path) {
            Place::Local(path) => self.inner.create_dir_all(&path),
            Place::Root => self.inner.create_dir_all(&self.staging),
            Place::Object(_) => Ok(()),
        }
    }

    fn create_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        match self.place(path) {
            Place::Local(path) => self.inner.create_file(&path),
            _ => Err(unsupported("write a file in place")),
        }
    }

    fn append_file(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        match self.place(path) {
            Place::Local(path) => self.inner.append_file(&path),
            _ => Err(unsupported("append to a file")),
        }
    }

    fn open_file(&self, path: &Path) -> io::Result<Box<dyn Read + Send>> {
        match self.place(path) {
            Place::Local(path) => self.inner.open_file(&path),
            Place::Root => Err(unsupported("read a folder")),
            Place::Object(key) => Ok(Box::new(self.reader(&key)?)),
        }
    }

    fn truncate(&self, path: &Path, length: u64) -> io::Result<()> {
        match self.place(path) {
            Place::Local(path) => self.inner.truncate(&path, length),
            _ => Err(unsupported("cut a file")),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match (self.place(from), self.place(to)) {
            (Place::Local(from), Place::Local(to)) => self.inner.rename(&from, &to),
            (Place::Local(staged), Place::Object(folder)) => match self.aside(from) {
                None => {
                    self.upload(&staged, &folder)?;
                    self.inner.remove(&staged)
                }
                Some(aside) => {
                    self.copy_folder(&aside, &folder)?;
                    self.delete_folder(&aside)
                }
            },
            (Place::Object(folder), Place::Local(_)) => {
                self.retire(&folder, self.aside(to).as_ref())
            }
            _ => Err(unsupported("rename within itself")),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match self.place(path) {
            Place::Local(local) if local.starts_with(&self.staging) => {
                self.remove_staged(path, &local)
            }
            Place::Local(path) => self.inner.remove(&path),
            Place::Root => Err(unsupported("remove all of itself")),
            Place::Object(key) => self.delete_folder(&key),
        }
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        match self.place(path) {
            Place::Local(path) => self.inner.list(&path),
            Place::Root => self.list_root(),
            Place::Object(_) => Err(unsupported("list a snapshot")),
        }
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        match self.place(path) {
            Place::Local(path) => self.inner.free_bytes(&path),
            // That is where a snapshot is made.
            _ => self.inner.free_bytes(&self.staging),
        }
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match self.place(path) {
            Place::Local(path) => self.inner.sync_dir(&path),
            _ => Ok(()),
        }
    }

    fn try_lock(&self, path: &Path, holder: &str) -> io::Result<Locking> {
        match self.place(path) {
            Place::Local(path) => self.inner.try_lock(&path, holder),
            _ => Err(unsupported("lock")),
        }
    }
}

#[cfg(test)]
mod tests;
