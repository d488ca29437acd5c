//! Operators that the backend's compositions do not use, against plain arithmetic. Those it does
//! use are held against f64 by the suites in `backends/ascend/tests`.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

mod common;

use common::{F32, I32, I64, Rig, at, call, good, recent, scalar, tensor};

fn close(got: &[f32], want: &[f32]) {
    assert_eq!(got.len(), want.len());
    for (got, want) in got.iter().zip(want) {
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0), "{got} should be {want}");
    }
}

#[test]
fn stacks_of_matrices_and_products_added_to_something() {
    let rig = Rig::open(3);
    let a: Vec<f32> = (0..12).map(|i| i as f32).collect();
    let b: Vec<f32> = (0..12).map(|i| (i % 5) as f32 - 1.0).collect();
    let (a_at, b_at, y) = (rig.put(&a), rig.put(&b), rig.memory(32));
    let tensors = [tensor(a_at, F32, &[2, 2, 3]), tensor(b_at, F32, &[2, 3, 2])];
    rig.done("aclnnBatchMatMul", &[tensors[0], tensors[1], tensor(y, F32, &[2, 2, 2]), 0]);
    let want = |s: usize, i: usize, j: usize| -> f32 {
        (0..3).map(|k| a[s * 6 + i * 3 + k] * b[s * 6 + k * 2 + j]).sum()
    };
    let wants: Vec<f32> = (0..8).map(|at| want(at / 4, at / 2 % 2, at % 2)).collect();
    close(&rig.get::<f32>(y, 8), &wants);
    let (m, n) = (tensor(a_at, F32, &[2, 3]), tensor(b_at, F32, &[3, 2]));
    let out = tensor(y, F32, &[2, 2]);
    rig.done("aclnnMm", &[m, n, out, 0]);
    close(&rig.get::<f32>(y, 4), &wants[..4]);
    rig.done("aclnnInplaceAddmm", &[out, m, n, scalar(2.0), scalar(-1.0), 0]);
    close(&rig.get::<f32>(y, 4), &wants[..4]);
    let bias = tensor(rig.put(&[1.0_f32, 2.0]), F32, &[2]);
    rig.done("aclnnAddmm", &[bias, m, n, scalar(1.0), scalar(1.0), out, 0]);
    let with_bias: Vec<f32> = (0..4).map(|at| wants[at] + [1.0, 2.0][at % 2]).collect();
    close(&rig.get::<f32>(y, 4), &with_bias);
}

#[test]
fn logarithms_of_probabilities_and_the_loss_with_its_gradient() {
    let rig = Rig::open(3);
    let logits = [1.0_f32, 2.0, 3.0, 0.5, 0.5, 0.5];
    let log = |row: usize, column: usize| -> f32 {
        let row = &logits[row * 3..][..3];
        row[column] - row.iter().map(|x| x.exp()).sum::<f32>().ln()
    };
    let x = tensor(rig.put(&logits), F32, &[2, 3]);
    let (y, loss, grads) = (rig.memory(24), rig.memory(4), rig.memory(24));
    let wants: Vec<f32> = (0..6).map(|at| log(at / 3, at % 3)).collect();
    let (y_tensor, loss_tensor) = (tensor(y, F32, &[2, 3]), tensor(loss, F32, &[1]));
    rig.done("aclnnLogSoftmax", &[x, 1, y_tensor]);
    close(&rig.get::<f32>(y, 6), &wants);
    let target = tensor(rig.put(&[2_i64, -100]), I64, &[2]);
    let mut mean = *b"mean\0";
    // The doubles of the prototype travel in registers of their own and are zero.
    let arguments = [x, target, 0, at(&mut mean), -100_i64 as u64];
    let tail = [0, loss_tensor, y_tensor, 0, 0];
    let (mut bytes, mut executor) = (0_u64, 0_u64);
    let code = loss_plan(&arguments, &tail, (at(&mut bytes), at(&mut executor)));
    assert_eq!(code, 0, "{}", recent());
    let workspace = rig.memory(bytes as usize);
    good("aclnnCrossEntropyLoss", &[workspace, bytes, executor, rig.stream]);
    close(&rig.get::<f32>(loss, 1), &[-log(0, 2)]);
    close(&rig.get::<f32>(y, 6), &wants);
    let one = tensor(rig.put(&[1.0_f32]), F32, &[1]);
    let arguments = [one, y_tensor, target, 0, 0, 0, at(&mut mean), -100_i64 as u64];
    let out = tensor(grads, F32, &[2, 3]);
    let code = grad_plan(&arguments, out, (at(&mut bytes), at(&mut executor)));
    assert_eq!(code, 0, "{}", recent());
    good("aclnnCrossEntropyLossGrad", &[0, 0, executor, rig.stream]);
    let mut want: Vec<f32> = (0..3).map(|column| log(0, column).exp()).collect();
    want[2] -= 1.0;
    want.extend([0.0; 3]);
    close(&rig.get::<f32>(grads, 6), &want);
}

/// Plans the loss: the prototype has two doubles after the fifth parameter.
fn loss_plan(head: &[u64; 5], tail: &[u64; 5], out: (u64, u64)) -> i32 {
    type Call =
        extern "C" fn(u64, u64, u64, u64, u64, f64, f64, u64, u64, u64, u64, u64, u64, u64) -> i32;
    let code = pontoon_emu_ascend::symbol("aclnnCrossEntropyLossGetWorkspaceSize").unwrap();
    // SAFETY: the prototype of the function, integers and pointers as 64-bit numbers.
    let call: Call = unsafe { std::mem::transmute(code) };
    let ([a, b, c, d, e], [f, g, h, i, j]) = (*head, *tail);
    call(a, b, c, d, e, 0.0, 0.0, f, g, h, i, j, out.0, out.1)
}

/// Plans the loss's gradient: two doubles after the eighth parameter.
fn grad_plan(head: &[u64; 8], out: u64, planned: (u64, u64)) -> i32 {
    type Call =
        extern "C" fn(u64, u64, u64, u64, u64, u64, u64, u64, f64, f64, u64, u64, u64) -> i32;
    let code = pontoon_emu_ascend::symbol("aclnnCrossEntropyLossGradGetWorkspaceSize").unwrap();
    // SAFETY: as above.
    let call: Call = unsafe { std::mem::transmute(code) };
    let [a, b, c, d, e, f, g, h] = *head;
    call(a, b, c, d, e, f, g, h, 0.0, 0.0, out, planned.0, planned.1)
}

#[test]
fn embeddings_and_their_gradient() {
    let rig = Rig::open(3);
    let table = tensor(rig.put(&[1.0_f32, 2.0, 3.0, 4.0]), F32, &[2, 2]);
    let index = tensor(rig.put(&[1_i32, 0, 1]), I32, &[3]);
    let y = rig.memory(24);
    rig.done("aclnnEmbedding", &[table, index, tensor(y, F32, &[3, 2])]);
    assert_eq!(rig.get::<f32>(y, 6), [3.0, 4.0, 1.0, 2.0, 3.0, 4.0]);
    let grad = tensor(y, F32, &[3, 2]);
    let out = rig.memory(16);
    let tensor_out = tensor(out, F32, &[2, 2]);
    rig.done("aclnnEmbeddingDenseBackward", &[grad, index, 2, 0, 0, tensor_out]);
    assert_eq!(rig.get::<f32>(out, 4), [0.0, 0.0, 6.0, 8.0]);
}

#[test]
fn the_largest_and_a_sort_of_integers() {
    let rig = Rig::open(3);
    let x = tensor(rig.put(&[3.0_f32, f32::NAN, 1.0, 3.0]), F32, &[1, 4]);
    let (values, places) = (rig.memory(12), rig.memory(24));
    let results = [tensor(values, F32, &[1, 3]), tensor(places, I64, &[1, 3])];
    rig.done("aclnnTopk", &[x, 3, 1, 1, 1, results[0], results[1]]);
    assert_eq!(rig.get::<i64>(places, 3), [1, 0, 3]);
    let big = 1_i64 << 40;
    let x = tensor(rig.put(&[big + 1, big, big + 1]), I64, &[3]);
    let (values, places) = (rig.memory(24), rig.memory(24));
    let results = [tensor(values, I64, &[3]), tensor(places, I64, &[3])];
    rig.done("aclnnSort", &[x, 1, 0, 1, results[0], results[1]]);
    assert_eq!(rig.get::<i64>(values, 3), [big + 1, big + 1, big]);
    assert_eq!(rig.get::<i64>(places, 3), [0, 2, 1]);
}

#[test]
fn experts_are_chosen_and_rows_go_to_them_and_come_back() {
    let rig = Rig::open(3);
    let logits = tensor(rig.put(&[1.0_f32, 1.0, 0.0, 0.0, 2.0, 2.0]), F32, &[2, 3]);
    let (weights, experts, rows) = (rig.memory(16), rig.memory(16), rig.memory(16));
    let chosen =
        [tensor(weights, F32, &[2, 2]), tensor(experts, I32, &[2, 2]), tensor(rows, I32, &[2, 2])];
    rig.done("aclnnMoeGatingTopKSoftmax", &[logits, 0, 2, chosen[0], chosen[1], chosen[2]]);
    assert_eq!(rig.get::<i32>(experts, 4), [0, 1, 1, 2]);
    let e = 1_f32.exp();
    close(&rig.get::<f32>(weights, 4)[..1], &[e / (2.0 * e + 1.0)]);
    let tokens = tensor(rig.put(&[1.0_f32, 2.0]), F32, &[2, 1]);
    let (permuted, sorted, back) = (rig.memory(16), rig.memory(16), rig.memory(8));
    let moved = [tensor(permuted, F32, &[4, 1]), tensor(sorted, I32, &[4])];
    rig.done("aclnnMoeTokenPermute", &[tokens, chosen[1], 4, 0, moved[0], moved[1]]);
    assert_eq!(rig.get::<f32>(permuted, 4), [1.0, 1.0, 2.0, 2.0]);
    assert_eq!(rig.get::<i32>(sorted, 4), [0, 1, 2, 3]);
    let probabilities = tensor(rig.put(&[0.5_f32, 0.25, 1.0, 1.0]), F32, &[2, 2]);
    let back_tensor = tensor(back, F32, &[2, 1]);
    let arguments = [moved[0], moved[1], probabilities, 0, 0, back_tensor];
    rig.done("aclnnMoeTokenUnpermute", &arguments);
    assert_eq!(rig.get::<f32>(back, 2), [0.75, 4.0]);
    let (drows, dweights) = (rig.memory(16), rig.memory(16));
    let outputs = [tensor(drows, F32, &[4, 1]), tensor(dweights, F32, &[2, 2])];
    let arguments = [moved[0], tokens, moved[1], probabilities, 0, 0, outputs[0], outputs[1]];
    rig.done("aclnnMoeTokenUnpermuteGrad", &arguments);
    assert_eq!(rig.get::<f32>(drows, 4), [0.5, 0.25, 2.0, 2.0]);
    assert_eq!(rig.get::<f32>(dweights, 4), [1.0, 1.0, 4.0, 4.0]);
    rig.done("aclnnMoeTokenPermuteGrad", &[moved[0], moved[1], 2, 0, back_tensor]);
    assert_eq!(rig.get::<f32>(back, 2), [2.0, 4.0]);
}

#[test]
fn two_ranks_reduce_in_the_order_of_ranks_whoever_comes_first() {
    let _rig = Rig::open(3);
    let (mut devices, mut comms) = ([3_i32, 4], [0_u64; 2]);
    good("HcclCommInitAll", &[2, at(&mut devices), at(&mut comms)]);
    let rank = |rank: usize| {
        let device = 3 + rank as u64;
        good("aclrtSetDevice", &[device]);
        let mut stream = 0_u64;
        good("aclrtCreateStream", &[at(&mut stream)]);
        let (mut x, mut y) = (0_u64, 0_u64);
        good("aclrtMalloc", &[at(&mut x), 16, 0]);
        good("aclrtMalloc", &[at(&mut y), 16, 0]);
        let mut own = [1e8_f32, -1e8, 1.0, rank as f32];
        own[rank] = -own[rank];
        good("aclrtMemcpy", &[x, 16, at(&mut own), 16, 1]);
        good("HcclAllReduce", &[x, y, 4, 4, 0, comms[rank], stream]);
        good("aclrtSynchronizeStreamWithTimeout", &[stream, 10_000]);
        let mut sum = [0_f32; 4];
        good("aclrtMemcpy", &[at(&mut sum), 16, y, 16, 2]);
        good("HcclReduceScatter", &[x, y, 2, 4, 0, comms[rank], stream]);
        good("aclrtSynchronizeStreamWithTimeout", &[stream, 10_000]);
        let mut part = [0_f32; 2];
        good("aclrtMemcpy", &[at(&mut part), 8, y, 8, 2]);
        assert_eq!(part, sum[2 * rank..][..2]);
        sum
    };
    let results = std::thread::scope(|scope| {
        [1, 0].map(|index| scope.spawn(move || rank(index))).map(|task| task.join().unwrap())
    });
    assert_eq!(results, [[0.0, 0.0, 2.0, 1.0]; 2]);
    good("aclrtResetDeviceForce", &[4]);
    assert_eq!(call("HcclCommDestroy", &[comms[0]]), 0);
}
