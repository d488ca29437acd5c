//! Snapshots in a store: complete or absent wherever an upload breaks off.

use std::fmt;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicI64, Ordering};

use futures_util::FutureExt;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    PutMultipartOptions, PutOptions, PutResult, Result as StoreResult,
};

use super::*;
use crate::snapshot::{
    Contents, ElementType, ExtraFile, Parts, SnapshotReader, SnapshotWriter, State, TensorRef,
};
use crate::world::RealDisk;

const URL: &str = "s3://bucket/some/run";

/// A store whose network is gone after so many requests.
#[derive(Debug)]
struct Flaky {
    inner: Arc<InMemory>,
    left: Arc<AtomicI64>,
}

impl fmt::Display for Flaky {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("flaky")
    }
}

impl Flaky {
    fn request(&self) -> StoreResult<()> {
        if self.left.fetch_sub(1, Ordering::Relaxed) > 0 {
            return Ok(());
        }
        let source = "the network is gone".into();
        Err(object_store::Error::Generic { store: "flaky", source })
    }
}

#[async_trait::async_trait]
impl ObjectStore for Flaky {
    async fn put_opts(&self, at: &Key, of: PutPayload, how: PutOptions) -> StoreResult<PutResult> {
        self.request()?;
        self.inner.put_opts(at, of, how).await
    }

    async fn put_multipart_opts(
        &self,
        at: &Key,
        how: PutMultipartOptions,
    ) -> StoreResult<Box<dyn MultipartUpload>> {
        self.request()?;
        self.inner.put_multipart_opts(at, how).await
    }

    async fn get_opts(&self, at: &Key, how: GetOptions) -> StoreResult<GetResult> {
        self.request()?;
        self.inner.get_opts(at, how).await
    }

    fn delete_stream(
        &self,
        keys: BoxStream<'static, StoreResult<Key>>,
    ) -> BoxStream<'static, StoreResult<Key>> {
        match self.request() {
            Ok(()) => self.inner.delete_stream(keys),
            Err(error) => async { Err(error) }.into_stream().boxed(),
        }
    }

    fn list(&self, below: Option<&Key>) -> BoxStream<'static, StoreResult<ObjectMeta>> {
        match self.request() {
            Ok(()) => self.inner.list(below),
            Err(error) => async { Err(error) }.into_stream().boxed(),
        }
    }

    async fn list_with_delimiter(&self, below: Option<&Key>) -> StoreResult<ListResult> {
        self.request()?;
        self.inner.list_with_delimiter(below).await
    }

    async fn copy_opts(&self, from: &Key, to: &Key, how: CopyOptions) -> StoreResult<()> {
        self.request()?;
        self.inner.copy_opts(from, to, how).await
    }
}

struct World {
    objects: Arc<InMemory>,
    left: Arc<AtomicI64>,
    staging: tempfile::TempDir,
}

impl World {
    fn new() -> World {
        let (objects, left) = (Arc::new(InMemory::new()), Arc::new(AtomicI64::new(i64::MAX)));
        World { objects, left, staging: tempfile::tempdir().unwrap() }
    }

    fn disk(&self) -> StoreDisk<'static> {
        let store = Flaky { inner: Arc::clone(&self.objects), left: Arc::clone(&self.left) };
        let prefix = Key::from("some/run");
        StoreDisk::with_store(Arc::new(store), URL, prefix, self.staging.path(), &RealDisk).unwrap()
    }

    fn allow(&self, requests: i64) {
        self.left.store(requests, Ordering::Relaxed);
    }
}

/// Writes a snapshot whose weights tell its step.
fn write(writer: &SnapshotWriter<'_>, step: u64, size: usize) -> Result<(), FleetError> {
    let bytes = vec![step as u8; size];
    let shape = [size / 4];
    let tensor = TensorRef {
        name: "w",
        dtype: ElementType::F32,
        shape: &shape[..],
        bytes: bytes[..].into(),
    };
    let state = State {
        step,
        seed: 1,
        position: step,
        backend: "test".into(),
        version: "0".into(),
        extra: serde_json::Value::Null,
    };
    let files = [ExtraFile { name: "config.json", bytes: b"{}" }];
    let (model, optimizer) = (&[tensor][..], &[][..]);
    writer.write(&Contents { state: &state, model, optimizer, files: &files }).map(drop)
}

fn steps(disk: &StoreDisk<'_>) -> Vec<u64> {
    SnapshotReader::new(disk, Path::new(URL)).list().unwrap()
}

#[test]
fn snapshots_go_to_a_store_and_come_back_and_old_ones_go() {
    let world = World::new();
    let disk = world.disk();
    let writer = SnapshotWriter::open(&disk, Path::new(URL)).unwrap();
    // Two parts and a bit: sent in parts.
    for (step, size) in [(1, 64), (2, 2 * PART_BYTES + 16), (3, 64), (4, 64)] {
        write(&writer, step, size).unwrap();
    }
    assert_eq!(steps(&disk), [4, 3, 2, 1]);
    assert_eq!(writer.retain(NonZeroUsize::new(3).unwrap()).unwrap(), [1]);
    assert_eq!(steps(&disk), [4, 3, 2]);
    assert!(disk.objects(&disk.key("step-00000001")).unwrap().is_empty());
    let other = world.disk();
    let read = SnapshotReader::new(&other, Path::new(URL)).read(2, Parts::All).unwrap();
    assert!(read.model[0].bytes.iter().all(|byte| *byte == 2));
    assert_eq!(read.model[0].bytes.len(), 2 * PART_BYTES + 16);
    assert_eq!(world.staging.path().read_dir().unwrap().count(), 0, "nothing stays staged");
}

#[test]
fn wherever_the_network_goes_a_snapshot_is_there_or_not_and_older_ones_stay() {
    for replaced in [false, true] {
        for requests in 0..40 {
            let world = World::new();
            let disk = world.disk();
            let writer = SnapshotWriter::open(&disk, Path::new(URL)).unwrap();
            write(&writer, 1, 64).unwrap();
            if replaced {
                write(&writer, 2, 64).unwrap();
            }
            world.allow(requests);
            let done = write(&writer, 2, 128);
            let retained = done.is_ok() && writer.retain(NonZeroUsize::MIN).is_ok();
            world.allow(i64::MAX);
            // Another process looks, before and after it has cleared away what was left.
            let next = world.disk();
            let newest =
                SnapshotReader::new(&next, Path::new(URL)).read_newest(Parts::All).unwrap();
            assert!(newest.rejected.is_empty(), "{requests}: {:?}", newest.rejected);
            let writer = SnapshotWriter::open(&next, Path::new(URL)).unwrap();
            let newest =
                SnapshotReader::new(&next, Path::new(URL)).read_newest(Parts::All).unwrap();
            assert!(newest.rejected.is_empty(), "{requests}: {:?}", newest.rejected);
            let found = newest.snapshot.unwrap().state.step;
            assert!(
                found == 2 || (!retained && found == 1 && done.is_err()),
                "{requests}: {found}"
            );
            if done.is_ok() || replaced {
                assert_eq!(found, 2, "{requests}");
            }
            write(&writer, 3, 64).unwrap();
            assert_eq!(steps(&next)[0], 3);
        }
    }
}

#[test]
fn a_gone_network_is_one_line_that_says_what_to_look_at() {
    let world = World::new();
    let disk = world.disk();
    world.allow(0);
    let error = SnapshotWriter::open(&disk, Path::new(URL)).err().unwrap().to_string();
    assert!(error.contains("the network is gone") && error.contains("AWS_ENDPOINT"), "{error}");
    assert_eq!(error.lines().count(), 1);
}

#[test]
fn a_damaged_snapshot_in_a_store_is_named_and_the_older_one_taken() {
    let world = World::new();
    let disk = world.disk();
    let writer = SnapshotWriter::open(&disk, Path::new(URL)).unwrap();
    write(&writer, 1, 64).unwrap();
    write(&writer, 2, 64).unwrap();
    let key = disk.key("step-00000002/model.safetensors");
    let damaged = PutPayload::from_static(b"nonsense");
    disk.runtime.block_on(disk.store.put(&key, damaged)).unwrap();
    let newest = SnapshotReader::new(&disk, Path::new(URL)).read_newest(Parts::All).unwrap();
    assert_eq!(newest.snapshot.unwrap().state.step, 1);
    let reason = newest.rejected[0].reason.to_string();
    assert!(reason.contains("step-00000002") && reason.contains("model.safetensors"), "{reason}");
}

#[test]
fn other_paths_are_the_local_disks_and_other_urls_are_refused() {
    let world = World::new();
    let disk = world.disk();
    let path = world.staging.path().join("a");
    disk.create_file(&path).unwrap().write_all(b"x").unwrap();
    assert!(path.is_file());
    for (url, want) in [("gs://b/p", "only s3://"), ("s3:///p", "no bucket")] {
        let error = StoreDisk::open(Path::new(url), &path, &RealDisk).err().unwrap().to_string();
        assert!(error.contains(want) && error.contains(url), "{error}");
    }
}
