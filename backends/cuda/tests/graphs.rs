//! A list of operations gives the same bits whether it is run as it is, recorded, or started from
//! the recording; with changed inputs, after a buffer was given back and taken again, and after
//! scratch has moved. Says so and passes where there is no device.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

use std::sync::Arc;
use std::time::Duration;

use pontoon_cuda::{CudaBackend, Library};
use pontoon_ops::{Add, Backend, BufferId, DType, Op, Scale, SumSquares, View};

const COUNT: usize = 5000;

fn list(x: BufferId, y: BufferId, sum: BufferId) -> Vec<Op> {
    let view = |buffer| View::contiguous(buffer, DType::F32, [COUNT]);
    let (x, y, sum) = (view(x), view(y), View::contiguous(sum, DType::F32, [1]));
    let double = Scale { x, factor: 2.0, y };
    let more = Add { a: y, b: x, y };
    vec![double.into(), more.clone().into(), more.into(), SumSquares { x: y, y: sum }.into()]
}

fn run(backend: &mut CudaBackend, ops: &[Op], [x, sum]: [BufferId; 2], value: f32) -> f32 {
    backend.upload(x, 0, &value.to_le_bytes().repeat(COUNT)).unwrap();
    backend.launch_all(ops).unwrap();
    let mut bytes = [0; 4];
    backend.download(sum, 0, &mut bytes).unwrap();
    f32::from_le_bytes(bytes)
}

#[test]
fn a_recorded_list_does_what_the_list_does() {
    let opened =
        Library::open().and_then(|library| CudaBackend::open(&Arc::new(library), "cuda:0", 0));
    let mut backend = match opened {
        Ok(backend) => backend,
        Err(error) => return eprintln!("not run: {}", error.text),
    };
    let [mut x, y] = [0; 2].map(|_| backend.alloc(4 * COUNT).unwrap());
    let sum = backend.alloc(4).unwrap();
    for turn in 0..12 {
        let ops = list(x, y, sum);
        let value = (turn + 1) as f32;
        let want = 16.0 * value * value * COUNT as f32;
        assert_eq!(run(&mut backend, &ops, [x, sum], value), want, "turn {turn}");
        if turn == 4 {
            // The same number stands for other memory afterwards.
            backend.free(x).unwrap();
            let held = backend.alloc(1 << 20).unwrap();
            backend.free(held).unwrap();
            x = backend.alloc(4 * COUNT).unwrap();
        }
        if turn == 7 {
            // More scratch than so far.
            let large = backend.alloc(4 << 26).unwrap();
            let all = View::contiguous(large, DType::F32, [1 << 26]);
            let to = View::contiguous(sum, DType::F32, [1]);
            backend.launch(&SumSquares { x: all, y: to }.into()).unwrap();
            backend
                .launch_summed(&SumSquares { x: all, y: to }.into(), Default::default())
                .unwrap();
            backend.free(large).unwrap();
        }
    }
    backend.wait(Duration::from_secs(10)).unwrap();
}
