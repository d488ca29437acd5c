//! A device that fails as a plan says: any backend, wrapped.
//!
//! It knows the step from the replica around it (`replica.rs`). Every injection is reported just
//! before it happens, by its number in the plan.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use pontoon_fleet::protocol::Report;
use pontoon_fleet::worker::Reports;
use pontoon_fleet::world::Clock;
use pontoon_ops::sums::{Ask, Sums};
use pontoon_ops::{Backend, DType, DeviceError, DeviceErrorKind, Op, View};

use super::draw;
use super::plan::{Fault, FaultKind, Numbered};
use super::replica::Place;

/// A fault strikes this many operations into its step at most.
const OPERATIONS: u64 = 64;
/// A slow device makes up for its speed in naps of this length.
const NAP: Duration = Duration::from_millis(1);
/// How long a slow device is waited for, to know how long an operation takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an injected fault needs of the world.
pub struct Injector<'a> {
    /// What strikes, by number.
    pub faults: Vec<Numbered>,
    /// Where the run is.
    pub place: Arc<Place>,
    /// Who is told.
    pub reports: Reports,
    /// The clock.
    pub clock: &'a dyn Clock,
}

/// A backend with faults.
pub struct ChaosDevice<'a> {
    inner: &'a mut dyn Backend,
    injector: Injector<'a>,
    /// The step of the last operation, and operations in it so far.
    place: (u64, u64),
    /// Where an optimiser found them.
    weights: Vec<View>,
    moments: Vec<View>,
    slow: Option<Slow>,
}

/// A time of slowness.
struct Slow {
    factor: f64,
    last_step: u64,
    owed: Duration,
}

impl<'a> ChaosDevice<'a> {
    /// Wraps a device.
    pub fn new(inner: &'a mut dyn Backend, injector: Injector<'a>) -> ChaosDevice<'a> {
        let (weights, moments) = (Vec::new(), Vec::new());
        ChaosDevice { inner, injector, place: (0, 0), weights, moments, slow: None }
    }

    /// Takes the fault that is to strike now, for which `fits` holds.
    fn due(&mut self, fits: impl Fn(&Self, &Fault) -> bool) -> Option<Numbered> {
        let (step, operation) = self.place;
        let loaded = self.injector.place.loaded.load(Ordering::Relaxed);
        let strikes = |(index, fault): &Numbered| {
            let delay = draw(*index as u64, fault.step) % OPERATIONS;
            let late = step > fault.step || operation >= delay;
            step >= fault.step && fault.step > loaded && late && fits(self, fault)
        };
        let place = self.injector.faults.iter().position(strikes)?;
        Some(self.injector.faults.remove(place))
    }

    fn tell(&self, (index, fault): &Numbered) {
        let kind = fault.kind.name().to_owned();
        // Without a supervisor the worker's end is near anyway.
        let _ = self.injector.reports.say(&Report::Injected { kind, fault: *index });
    }

    /// Remembers where the state lies.
    fn learn(&mut self, op: &Op) {
        if !matches!(op, Op::AdamW(_) | Op::Muon(_)) {
            return;
        }
        for operand in op.operands() {
            let list = match operand.name {
                "weight" => &mut self.weights,
                "m" | "v" | "momentum" => &mut self.moments,
                _ => continue,
            };
            if !list.contains(&operand.view) {
                list.push(operand.view);
            }
        }
    }

    fn before(&mut self, op: &Op) -> Result<(), DeviceError> {
        let failing = |_: &Self, fault: &Fault| fault.kind != FaultKind::Bitflip;
        if let Some(numbered) = self.due(failing) {
            self.tell(&numbered);
            self.fail(&numbered.1)?;
        }
        let stateful = |this: &Self, fault: &Fault| match fault.tensor.as_str() {
            _ if fault.kind != FaultKind::Bitflip => false,
            "weights" => !this.weights.is_empty(),
            "moments" => !this.moments.is_empty(),
            "gradients" => matches!(op, Op::AdamW(_) | Op::Muon(_)),
            _ => false,
        };
        if let Some(numbered) = self.due(stateful) {
            self.tell(&numbered);
            let (index, fault) = numbered;
            let gradients: Vec<View> = op
                .operands()
                .iter()
                .filter(|operand| operand.name == "grad")
                .map(|operand| operand.view)
                .collect();
            let views = match fault.tensor.as_str() {
                "weights" => self.weights.clone(),
                "moments" => self.moments.clone(),
                _ => gradients,
            };
            self.flip(index, &fault, &views)?;
        }
        Ok(())
    }

    fn after(&mut self, op: &Op) -> Result<(), DeviceError> {
        let name = op.name().name();
        let result =
            |_: &Self, fault: &Fault| fault.kind == FaultKind::Bitflip && fault.tensor == name;
        if let Some(numbered) = self.due(result) {
            self.tell(&numbered);
            let (index, fault) = numbered;
            let written = op.operands().into_iter().filter(|operand| operand.access.writes());
            let views: Vec<View> = written.map(|operand| operand.view).collect();
            self.flip(index, &fault, &views)?;
        }
        Ok(())
    }

    fn fail(&mut self, fault: &Fault) -> Result<(), DeviceError> {
        let error = |kind, text: &str| Err(DeviceError::new(kind, format!("injected: {text}")));
        match fault.kind {
            FaultKind::Crash => {
                let this = rustix::process::getpid();
                // Nothing returns from this signal.
                let _ = rustix::process::kill_process(this, rustix::process::Signal::KILL);
                error(DeviceErrorKind::Lost, "the process should be gone")
            }
            FaultKind::Hang => loop {
                std::thread::park();
            },
            FaultKind::Slow => {
                let last_step = self.place.0 + fault.for_steps - 1;
                let owed = Duration::ZERO;
                self.slow = Some(Slow { factor: fault.factor, last_step, owed });
                Ok(())
            }
            FaultKind::OutOfMemory => error(DeviceErrorKind::OutOfMemory, "an allocation failed"),
            FaultKind::MemoryFault => error(DeviceErrorKind::MemoryFault, "an uncorrectable error"),
            FaultKind::LinkDown => error(DeviceErrorKind::LinkDown, "the link is gone"),
            FaultKind::Bitflip | FaultKind::DiskFull | FaultKind::DamagedSnapshot => Ok(()),
        }
    }

    /// Changes one bit of one element of one of the views.
    fn flip(&mut self, index: usize, fault: &Fault, views: &[View]) -> Result<(), DeviceError> {
        let number = |of: u64| draw(index as u64 ^ (fault.step << 20), of) as usize;
        let views: Vec<&View> = views.iter().filter(|view| view.elements() > 0).collect();
        let Some(view) = views.get(number(0) % views.len().max(1)) else { return Ok(()) };
        let mut rest = number(1) % view.elements();
        let mut element = 0;
        for axis in (0..view.dims().len()).rev() {
            element += rest % view.dim(axis) * view.stride(axis);
            rest /= view.dim(axis);
        }
        let size = view.dtype.bytes(1);
        let bit = match view.dtype {
            DType::Bf16 | DType::F16 => fault.bit % 16,
            _ => fault.bit % (8 * size as u32),
        };
        let at = view.byte_offset + element * size;
        let mut bytes = vec![0; size];
        self.inner.download(view.buffer, at, &mut bytes)?;
        bytes[bit as usize / 8] ^= 1 << (bit % 8);
        self.inner.upload(view.buffer, at, &bytes)
    }

    fn launch_with<T>(
        &mut self,
        op: &Op,
        launch: impl FnOnce(&mut dyn Backend) -> Result<T, DeviceError>,
    ) -> Result<T, DeviceError> {
        let step = self.injector.place.step.load(Ordering::Relaxed);
        self.place = if self.place.0 == step { (step, self.place.1 + 1) } else { (step, 0) };
        if self.slow.as_ref().is_some_and(|slow| step > slow.last_step) {
            self.slow = None;
        }
        self.before(op)?;
        let begun = self.injector.clock.now();
        let result = launch(&mut *self.inner)?;
        if self.slow.is_some() {
            self.inner.wait(PATIENCE)?;
            self.dawdle(self.injector.clock.now().duration_since(begun));
        }
        self.learn(op);
        self.after(op)?;
        Ok(result)
    }

    /// Makes what took so long take longer, in naps.
    fn dawdle(&mut self, took: Duration) {
        if let Some(slow) = &mut self.slow {
            slow.owed += took.mul_f64(slow.factor - 1.0);
            if slow.owed >= NAP {
                std::thread::sleep(std::mem::take(&mut slow.owed));
            }
        }
    }
}

impl Backend for ChaosDevice<'_> {
    pontoon_ops::delegate!(inner: info alloc free upload download mapped digest supports);
    pontoon_ops::delegate!(inner: sums_in_place sums wait memory_used);

    fn launch_summed(&mut self, op: &Op, ask: Ask) -> Result<Sums, DeviceError> {
        self.launch_with(op, |inner| inner.launch_summed(op, ask))
    }

    fn launch(&mut self, op: &Op) -> Result<(), DeviceError> {
        self.launch_with(op, |inner| inner.launch(op))
    }
}
