//! A whole program in f64: every operation's reference in turn, intermediates never rounded.
//!
//! It is the truth that devices are compared with, where the model is small enough: loops are
//! naive. Read next: `compare.rs`.

use pontoon_ops::{BufferId, View};
use pontoon_program::BufferKind;

use crate::memory::Memory;
use crate::reference::{Want, decided};
use crate::step::Step;

/// The most matrix work that is worth doing in naive loops: some ten seconds.
pub const FLOPS_MAX: f64 = 2.4e10;
/// The most bytes of parameters that are worth holding in f64.
pub const BYTES_MAX: usize = 1 << 30;

/// Whether a program is small enough.
pub fn feasible(step: &Step) -> bool {
    let bytes: usize = step.program.buffers.iter().map(|buffer| buffer.bytes).max().unwrap_or(0);
    step.program.matrix_flops() <= FLOPS_MAX && bytes <= BYTES_MAX
}

/// What every buffer holds after the program.
pub struct Evaluated {
    memory: Memory,
}

impl Evaluated {
    /// The numbers of a view of the program.
    pub fn read(&self, view: &View) -> Vec<f64> {
        self.memory.read(view)
    }
}

/// Evaluates a program. Nothing if it draws a token that is
/// too close to call.
///
/// The program should compute in f32: 16-bit programs round some intermediates by contract.
pub fn evaluate(step: &Step) -> Option<Evaluated> {
    let mut memory = Memory::default();
    for (index, buffer) in step.program.buffers.iter().enumerate() {
        let id = BufferId(index as u32);
        let given = step.contents.contains_key(&buffer.name);
        let computed = buffer.view.dtype.is_float() && buffer.kind != BufferKind::Input && !given;
        let placed = match () {
            () if !step.uses(id) => memory.add(Vec::new()),
            () if computed => memory.add_wide(buffer.view.dtype, buffer.view.elements()),
            () => memory.add(step.before(id)),
        };
        assert_eq!(placed, id, "buffers keep their numbers");
    }
    for op in &step.program.ops {
        for expected in decided(op, &memory) {
            let mut values = memory.read(&expected.view);
            for (value, want) in values.iter_mut().zip(&expected.wants) {
                match *want {
                    Want::Near { value: exact, .. } => *value = exact,
                    Want::Kept => {}
                    Want::Unjudged => return None,
                }
            }
            memory.write(&expected.view, &values);
        }
    }
    Some(Evaluated { memory })
}
