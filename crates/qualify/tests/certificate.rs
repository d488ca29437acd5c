//! Certificates: good devices of other arithmetic agree well within the limits, planted defects do
//! not.

#![expect(clippy::unwrap_used, reason = "a test's helpers may fail loudly too")]

mod common;

use common::{Defect, LASTING, Liar, model, step};
use pontoon_cpu::simd::Isa;
use pontoon_models::BatchShape;
use pontoon_ops::DType;
use pontoon_program::{Class, Recompute};
use pontoon_qualify::compare::{
    Certificate, Comparison, Experts, Measured, Sizes, Tensor, certify,
};
use pontoon_train::data::Batch;
use pontoon_train::{RunConfig, TrainingState};

const ROWS: usize = 24;
const STEPS: u64 = 8;

fn wide(bytes: &[u8]) -> Vec<f64> {
    bytemuck::pod_collect_to_vec::<u8, f32>(bytes).into_iter().map(f64::from).collect()
}

fn measured(name: &str, backend: &mut Liar, preset: &str, dtype: DType) -> Measured {
    let (model, weights) = model(preset, 2);
    let shape = BatchShape { rows: ROWS, documents: 3, positions_max: ROWS };
    let logits = model.logits_program(shape, dtype).unwrap();
    let logits = step(&model, &weights, logits, dtype).run(backend, &["logits"]).unwrap();
    let training = model.training_program(shape, dtype, Recompute::Nothing).unwrap();
    let training = step(&model, &weights, training, dtype);
    let gradients = training.run(backend, &["gradients"]).unwrap();
    let settings = format!(
        "[data]\nsequence = {ROWS}\n[train]\nmicro_batch = 2\nmicro_batches = 1\ndtype = \
         \"{dtype}\"\nlr = 1e-3\nwarmup = 0\nschedule = \"constant\"\n"
    );
    let config = RunConfig::parse(&settings, &[], "the test").unwrap();
    let mut state = TrainingState::load(backend, &model, &config, &weights).unwrap();
    let token = |row: usize| ((row * 7 + row * row) % 300) as i32;
    let batch = Batch {
        ids: (0..2 * ROWS).map(token).collect(),
        targets: (0..2 * ROWS).map(|row| token(row + 1)).collect(),
        positions: (0..2 * ROWS).map(|row| (row % ROWS) as i32).collect(),
        documents: (0..=2 * ROWS).map(|at| (at.min(2) * ROWS) as i32).collect(),
        valid: 2 * ROWS,
    };
    // A device so wrong that training diverges has no more losses to compare.
    let losses = (1..=STEPS)
        .map_while(|at| state.step(backend, at, std::slice::from_ref(&batch)).ok())
        .map(|done| done.loss)
        .collect();
    Measured {
        device: name.to_owned(),
        logits: wide(&logits["logits"]),
        gradient: wide(&gradients["gradients"]),
        losses,
    }
}

fn certificate(devices: &[Measured], preset: &str, dtype: DType) -> Certificate {
    let (model, _) = model(preset, 2);
    let slices = model.table.tensors().into_iter().filter(|slice| slice.class != Class::Frozen);
    let tensors: Vec<Tensor> = slices
        .map(|slice| {
            let range = slice.element_offset..slice.element_offset + slice.elements();
            Tensor { name: slice.name, range }
        })
        .collect();
    let experts = if model.config.experts_per_token() > 0 { Experts::Some } else { Experts::None };
    let generated: Vec<usize> = (0..ROWS).collect();
    certify(&Comparison {
        sizes: Sizes { dtype, layers: 2, width: model.config.mlp_width, steps: 8, experts },
        vocabulary: 300,
        generated: &generated,
        tensors: &tensors,
        exact: None,
        devices,
    })
}

#[test]
fn good_devices_of_other_arithmetic_agree_with_room_to_spare() {
    for dtype in [DType::F32, DType::Bf16] {
        let devices: Vec<Measured> = Isa::available()
            .into_iter()
            .map(|isa| measured(isa.name(), &mut Liar::on(isa, Defect::None), "qwen3-1m", dtype))
            .collect();
        if devices.len() < 2 {
            return;
        }
        let certificate = certificate(&devices, "qwen3-1m", dtype);
        for pair in &certificate.pairs {
            let limits = &certificate.limits;
            println!(
                "{dtype} {} {}: logits {:.2} {:.2} gradient {:.2} drift {:.1e} of {:.1e}",
                pair.device,
                pair.with,
                pair.worst_logit_error / limits.worst_logit_error,
                pair.typical_logit_error / limits.typical_logit_error,
                pair.worst_gradient_error / limits.gradient_error,
                pair.loss_drift,
                limits.loss_drift,
            );
        }
        assert!(certificate.agree, "{dtype}: {:?}", certificate.reasons);
    }
}

#[test]
fn no_device_with_a_defect_that_changes_results_gets_a_certificate() {
    for (defect, _) in LASTING {
        // Rounding the wrong way and a sum's last bit are found by `bisect` and `qualify`; what
        // they do to a model can be as small as rounding itself.
        let (preset, dtype) = match defect {
            Defect::NonDeterministic | Defect::WrongRounding => continue,
            Defect::WrongExpertOnTies => ("qwen3-moe-8m", DType::F32),
            _ => ("qwen3-1m", DType::F32),
        };
        let devices = [
            measured("good", &mut Liar::new(Defect::None), preset, dtype),
            measured("bad", &mut Liar::new(defect), preset, dtype),
        ];
        let certificate = certificate(&devices, preset, dtype);
        assert!(!certificate.agree, "{defect:?} was certified: {:?}", certificate.pairs);
    }
}
