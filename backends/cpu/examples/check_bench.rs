//! What checks cost a product: plain and checked in turns, on the shapes of a small model's step.
//!
//! Arguments: rows of activations (2048), threads (2), width of the model (512).

use std::time::Instant;

use half::bf16;
use pontoon_cpu::gemm::{
    Asked, Data, DataMut, GemmArgs, Layout, Matrix, MatrixMut, Store, gemm, gemm_checked,
};
use pontoon_cpu::pool::Pool;
use pontoon_cpu::scratch::Scratch;
use pontoon_cpu::simd::Isa;

/// Products of a shape of a model of [`WIDTH`], every second one checked.
const ROUNDS: usize = 400;
const WIDTH: usize = 512;

fn main() {
    let mut sizes = std::env::args().skip(1).map(|word| word.parse().expect("a number"));
    let (rows, threads) = (sizes.next().unwrap_or(2048), sizes.next().unwrap_or(2));
    let width = sizes.next().unwrap_or(WIDTH);
    let (wide, rounds) = (43 * width / 16, (ROUNDS * WIDTH / width).max(20));
    let isa = Isa::detect().expect("a known set");
    let pool = Pool::new(threads);
    let mut scratch = Scratch::new();
    let shapes = [
        (Layout::Nt, rows, width, width),
        (Layout::Nt, rows, wide, width),
        (Layout::Nt, rows, width, wide),
        (Layout::Nn, rows, width, width),
        (Layout::Nn, rows, width, wide),
        (Layout::Nn, rows, wide, width),
        (Layout::Tn, width, width, rows),
        (Layout::Tn, wide, width, rows),
        (Layout::Tn, width, wide, rows),
    ];
    for (layout, m, n, k) in shapes {
        let a: Vec<bf16> =
            (0..m * k).map(|i| bf16::from_f32((i % 97) as f32 / 50.0 - 1.0)).collect();
        let b: Vec<bf16> =
            (0..n * k).map(|i| bf16::from_f32((i % 89) as f32 / 50.0 - 1.0)).collect();
        let mut c16 = vec![bf16::ZERO; m * n];
        let mut c32 = vec![0.0_f32; m * n];
        let (a_stride, b_stride) = match layout {
            Layout::Nt | Layout::Panels => (k, k),
            Layout::Nn => (k, n),
            Layout::Tn => (m, n),
        };
        let mut times = [Vec::new(), Vec::new()];
        for round in 0..rounds {
            let args = GemmArgs {
                layout,
                m,
                n,
                k,
                a: Matrix { data: Data::Bf16(&a), row_stride: a_stride },
                b: Matrix { data: Data::Bf16(&b), row_stride: b_stride },
                bias: None,
                c: MatrixMut {
                    data: if layout == Layout::Tn {
                        DataMut::F32(&mut c32)
                    } else {
                        DataMut::Bf16(&mut c16)
                    },
                    row_stride: n,
                },
                // Gradients of weights are added up.
                store: if layout == Layout::Tn { Store::Accumulate } else { Store::Overwrite },
            };
            let begun = Instant::now();
            match round % 2 {
                0 => gemm(&pool, isa, &mut scratch, args),
                _ => drop(gemm_checked(&pool, isa, &mut scratch, args, Asked::default())),
            }
            times[round % 2].push(begun.elapsed().as_secs_f64() * 1e3);
        }
        // Neighbours compare: a shared machine has slow minutes.
        let mut ratios: Vec<f64> = times[0].iter().zip(&times[1]).map(|(a, b)| b / a).collect();
        let median = |values: &mut Vec<f64>| {
            values.sort_by(f64::total_cmp);
            values[values.len() / 2]
        };
        let (plain, ratio) = (median(&mut times[0]), median(&mut ratios));
        println!("{layout:?} {m}x{n}x{k}: {plain:.3} ms, checked {:+.2}%", 100.0 * (ratio - 1.0));
    }
}
