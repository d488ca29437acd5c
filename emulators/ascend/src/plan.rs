//! From a planned operator to a task: executors, what is checked when one is launched, and where
//! armed faults strike.
//!
//! Dtypes and shapes are checked when an operator is planned, in `ops/`; addresses when it is
//! launched, here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::code;
use crate::device::hazards::Access as Touch;
use crate::device::memory::Place;
use crate::device::stream::{Stream, Work};
use crate::device::{Device, Engine};
use crate::driver::{DRIVER, Named};
use crate::failure::{Done, Failure};
use crate::fault::{self, Fault, Kind};
use crate::ops::{Bound, Run};
use crate::strict::{self, Breach};
use crate::tensor::Tensor;

/// How an operator touches an operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is read.
    Read,
    /// It is overwritten.
    Write,
    /// It is read and written.
    Both,
}

/// An operand's number in its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(pub usize);

/// A tensor as an operator's argument.
#[derive(Clone)]
pub struct Argument {
    /// Its handle.
    pub handle: u64,
    /// Its descriptor.
    pub tensor: Arc<Tensor>,
    /// Its place in a list, if it came in one.
    pub relative: Option<usize>,
    /// Its number among the tensors and lists of the call.
    pub ir: usize,
}

struct Operand {
    name: &'static str,
    argument: Argument,
    access: Access,
}

type Compute = Arc<dyn Fn(&mut Run<'_>) -> Done + Send + Sync>;

/// An operator being planned.
pub struct Plan {
    op: &'static str,
    operands: Vec<Operand>,
    workspace: u64,
    compute: Option<Compute>,
    order: Option<Vec<usize>>,
}

impl Plan {
    /// Begins a plan.
    pub fn new(op: &'static str) -> Plan {
        Plan { op, operands: Vec::new(), workspace: 0, compute: None, order: None }
    }

    /// Adds an operand.
    pub fn operand(&mut self, name: &'static str, argument: &Argument, access: Access) -> Slot {
        self.operands.push(Operand { name, argument: argument.clone(), access });
        Slot(self.operands.len() - 1)
    }

    /// Adds an operand that is read.
    pub fn read(&mut self, name: &'static str, argument: &Argument) -> Slot {
        self.operand(name, argument, Access::Read)
    }

    /// Adds an operand that is written.
    pub fn write(&mut self, name: &'static str, argument: &Argument) -> Slot {
        self.operand(name, argument, Access::Write)
    }

    /// Adds an operand that may be absent.
    pub fn read_if(&mut self, name: &'static str, argument: Option<&Argument>) -> Option<Slot> {
        argument.map(|argument| self.read(name, argument))
    }

    /// Asks for device memory to work in.
    pub fn workspace(&mut self, bytes: usize) {
        self.workspace = (bytes as u64).next_multiple_of(512);
    }

    /// Says in which order the call passes the operands, where they were added in another.
    pub fn order(&mut self, slots: impl IntoIterator<Item = usize>) {
        self.order = Some(slots.into_iter().collect());
    }

    /// Says what the operator does.
    pub fn run(&mut self, compute: impl Fn(&mut Run<'_>) -> Done + Send + Sync + 'static) -> Done {
        self.compute = Some(Arc::new(compute));
        Ok(())
    }

    /// A failure that the vendor's documents announce for what was passed.
    pub fn forbid<T>(&self, text: impl AsRef<str>) -> Done<T> {
        let text = format!("{}: {}", self.op, text.as_ref());
        Err(strict::breach(-1, Breach::Forbidden, Failure::operator(text)))
    }

    /// Fails with a text unless something holds.
    pub fn demand(&self, holds: bool, text: impl FnOnce() -> String) -> Done {
        if holds { Ok(()) } else { self.forbid(text()) }
    }

    /// The planned operator.
    pub fn finish(self) -> Done<Executor> {
        // Only the thread's device matters for faults of planning.
        if let Ok((_, device)) = DRIVER.current() {
            let struck = device.faults.strike(fault::Place::Plan, self.op);
            if let Some(failure) = struck.iter().find_map(|fault| fault.kind.failure(self.op)) {
                return Err(failure);
            }
        }
        for operand in &self.operands {
            operand.argument.tensor.check(&format!("{}: {}", self.op, operand.name))?;
        }
        let none = || Failure::new(code::INTERNAL, format!("{} computes nothing", self.op));
        let bases = self.operands.iter().map(|operand| operand.argument.tensor.base()).collect();
        Ok(Executor {
            op: self.op,
            workspace: self.workspace,
            compute: self.compute.ok_or_else(none)?,
            addresses: Mutex::new(bases),
            order: self.order.unwrap_or_else(|| (0..self.operands.len()).collect()),
            operands: self.operands,
            repeatable: AtomicBool::new(false),
            launches: AtomicU64::new(0),
        })
    }
}

/// A planned operator.
pub struct Executor {
    op: &'static str,
    operands: Vec<Operand>,
    /// The operands in the order in which the call passes them.
    order: Vec<usize>,
    /// The storage address of each operand.
    addresses: Mutex<Vec<u64>>,
    /// Bytes of workspace.
    pub workspace: u64,
    compute: Compute,
    repeatable: AtomicBool,
    launches: AtomicU64,
}

impl Executor {
    /// Lets it be launched more than once.
    pub fn make_repeatable(&self) -> Done {
        if self.launches.load(Ordering::Relaxed) > 0 {
            let text = format!("{}: the executor was launched before", self.op);
            return Err(Failure::new(code::OP_EXECUTOR, text));
        }
        self.repeatable.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The number among all tensors of the `index`-th one that is written.
    pub fn output(&self, index: usize) -> Done<usize> {
        let singles = self.order.iter().map(|&slot| &self.operands[slot]);
        let singles = singles.filter(|operand| operand.argument.relative.is_none());
        let mut written = singles.enumerate().filter(|(_, operand)| operand.access != Access::Read);
        written
            .nth(index)
            .map(|(number, _)| number)
            .ok_or_else(|| Failure::operator(format!("{} has no output {index}", self.op)))
    }

    /// Gives the `index`-th tensor of the call another address.
    pub fn set_address(&self, index: usize, handle: u64, address: u64) -> Done {
        self.check_repeatable()?;
        let is_single = |slot: &&usize| self.operands[**slot].argument.relative.is_none();
        let found = self.order.iter().filter(is_single).nth(index).copied();
        self.put_address(found, handle, address, index)
    }

    /// Gives a tensor of a list another address.
    pub fn set_list_address(&self, ir: usize, relative: usize, address: u64) -> Done {
        self.check_repeatable()?;
        let of_it = |operand: &Operand| {
            operand.argument.ir == ir && operand.argument.relative == Some(relative)
        };
        let slot = self.operands.iter().position(of_it);
        let handle = slot.map_or(0, |slot| self.operands[slot].argument.handle);
        self.put_address(slot, handle, address, ir)
    }

    fn put_address(&self, slot: Option<usize>, handle: u64, address: u64, index: usize) -> Done {
        let slot = slot.filter(|&slot| self.operands[slot].argument.handle == handle);
        let Some(slot) = slot else {
            let text = format!("{}: operand {index} is not that tensor", self.op);
            return Err(Failure::operator(text));
        };
        self.addresses.lock().unwrap_or_else(PoisonError::into_inner)[slot] = address;
        Ok(())
    }

    fn check_repeatable(&self) -> Done {
        if self.repeatable.load(Ordering::Relaxed) {
            return Ok(());
        }
        let text = format!("{}: addresses change only in a repeatable executor", self.op);
        Err(Failure::new(code::OP_EXECUTOR, text))
    }

    /// Where each operand lies, all checks passed.
    fn bind(&self, device: &Device) -> Done<Vec<Bound>> {
        let addresses = self.addresses.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut bound = Vec::with_capacity(self.operands.len());
        for (operand, base) in self.operands.iter().zip(addresses) {
            let (tensor, name) = (&operand.argument.tensor, operand.name);
            if !DRIVER.exists(operand.argument.handle) {
                let text = format!("{}: tensor `{name}` was destroyed before launch", self.op);
                let failure = Failure::new(code::OP_EXECUTOR, text);
                return Err(strict::breach(device.id, Breach::UseAfterFree, failure));
            }
            let what = format!("{}: `{name}`", self.op);
            let address = base + tensor.dtype.bytes(tensor.offset) as u64;
            if !address.is_multiple_of(tensor.dtype.alignment()) {
                let text = format!("{what}: address {address:#x} is not aligned to its elements");
                let failure = Failure::operator(text);
                return Err(strict::breach(device.id, Breach::Misaligned, failure));
            }
            let bytes = tensor.dtype.bytes(tensor.span());
            let (owner, place) = DRIVER.place(address, bytes as u64, &what).map_err(in_operator)?;
            if owner.id != device.id {
                let text = format!("{what}: memory of device {} on {}", owner.id, device.id);
                let failure = Failure::operator(text);
                return Err(strict::breach(device.id, Breach::WrongMemory, failure));
            }
            bound.push(Bound {
                name,
                access: operand.access,
                address,
                place,
                bytes,
                tensor: Arc::clone(tensor),
            });
        }
        Ok(bound)
    }

    fn bind_workspace(
        &self,
        device: &Device,
        (address, bytes): (u64, u64),
        bound: &[Bound],
    ) -> Done<Option<(Place, usize)>> {
        if self.workspace == 0 {
            return Ok(None);
        }
        let bad = |text: String| {
            let failure = Failure::operator(format!("{}: {text}", self.op));
            strict::breach(device.id, Breach::Workspace, failure)
        };
        if address == 0 || bytes < self.workspace {
            let wanted = self.workspace;
            return Err(bad(format!("a workspace of {bytes} bytes came, {wanted} were asked for")));
        }
        if !address.is_multiple_of(32) {
            return Err(bad(format!("workspace {address:#x} is not aligned to 32 bytes")));
        }
        let found = DRIVER.place(address, self.workspace, &format!("{}: workspace", self.op));
        let (owner, place) = found.map_err(|failure| bad(failure.text))?;
        if owner.id != device.id {
            return Err(bad(format!("the workspace lies on device {}", owner.id)));
        }
        let end = address + self.workspace;
        let meets = |bound: &&Bound| bound.address < end && address < bound.end();
        if let Some(bound) = bound.iter().find(meets) {
            return Err(bad(format!("the workspace overlaps operand `{}`", bound.name)));
        }
        Ok(Some((place, self.workspace as usize)))
    }
}

/// A failure of the runtime as an operator returns it.
fn in_operator(failure: Failure) -> Failure {
    match failure.code {
        code::PARAMETER => Failure::operator(failure.text),
        _ => failure,
    }
}

/// What the second phase of an operator passes.
pub struct Launch {
    /// The operator.
    pub op: &'static str,
    /// Address of the workspace.
    pub workspace: u64,
    /// Its bytes.
    pub workspace_bytes: u64,
    /// Handle of the executor.
    pub executor: u64,
    /// Handle of the stream.
    pub stream: u64,
}

/// Launches an operator.
pub fn launch(launch: &Launch) -> Done {
    let stream = DRIVER.stream(launch.stream)?;
    let device = &stream.device;
    device.check_alive()?;
    let executor: Arc<Executor> = match DRIVER.get(launch.executor, "executor") {
        Ok(executor) => executor,
        Err(failure) => {
            let text = format!("{}: {}: launched before?", launch.op, failure.text);
            let failure = Failure::new(code::OP_EXECUTOR, text);
            return Err(strict::breach(device.id, Breach::Executor, failure));
        }
    };
    if executor.op != launch.op {
        let text = format!("{} was given an executor of {}", launch.op, executor.op);
        let failure = Failure::new(code::OP_EXECUTOR, text);
        return Err(strict::breach(device.id, Breach::Executor, failure));
    }
    if !executor.repeatable.load(Ordering::Relaxed) {
        DRIVER.drop_object::<Arc<Executor>>(launch.executor, "executor")?;
    }
    executor.launches.fetch_add(1, Ordering::Relaxed);
    let bound = executor.bind(device)?;
    let given = (launch.workspace, launch.workspace_bytes);
    let workspace = executor.bind_workspace(device, given, &bound)?;
    order(&stream, launch.op, &bound, workspace.as_ref().map(|_| given))?;
    let faults = device.faults.strike(fault::Place::Task, launch.op);
    let defects = device.faults.strike(fault::Place::Arithmetic, launch.op);
    if faults.iter().any(|fault| fault.kind == Kind::Hang) {
        stream.push(Work::Hang);
        return Ok(());
    }
    let (owner, compute, op) = (Arc::clone(device), Arc::clone(&executor.compute), launch.op);
    stream.push(Work::Run(Box::new(move |engine| {
        engine.deterministic = owner.deterministic.load(Ordering::Relaxed) != 0;
        if let Some(failure) = fail(&owner, &faults, op, &bound) {
            return Err(failure);
        }
        perform(engine, op, (&bound, workspace), &defects, &*compute)?;
        spoil(engine, &faults, &bound);
        Ok(())
    })));
    Ok(())
}

/// Notes who touches what, and fails if nothing orders it.
fn order(stream: &Stream, op: &str, bound: &[Bound], workspace: Option<(u64, u64)>) -> Done {
    let touch = |bound: &Bound| Touch {
        start: bound.address,
        end: bound.end(),
        writes: bound.access != Access::Read,
    };
    let mut touches: Vec<Touch> = bound.iter().map(touch).collect();
    touches.extend(workspace.map(|(start, bytes)| Touch {
        start,
        end: start + bytes,
        writes: true,
    }));
    touch_in_order(stream, op, &touches)
}

/// Notes what a task touches, and fails if it races with another stream's.
pub fn touch_in_order(stream: &Stream, what: &str, touches: &[Touch]) -> Done {
    let (_, race) = stream.device.hazards().task(stream.id, touches);
    let Some(race) = race else { return Ok(()) };
    // The task was counted, so the queue counts one as well.
    stream.push(Work::Run(Box::new(|_| Ok(()))));
    let text = format!(
        "{what}: memory at {:#x} is still used by stream {} and no event orders the two",
        race.access.start, race.stream
    );
    let failure = Failure::new(code::OP_RUNTIME, text);
    Err(strict::breach(stream.device.id, Breach::Unsynchronised, failure))
}

/// The failure that a task's faults bring, and what it does to the device.
pub fn fail(device: &Device, faults: &[Fault], op: &str, bound: &[Bound]) -> Option<Failure> {
    let fault = faults.iter().find(|fault| fault.kind.failure(op).is_some())?;
    let failure = fault.kind.failure(op)?;
    let place = bound.first().map(|bound| (bound.address, bound.bytes as u64));
    device.suffer(fault.kind, &failure, place);
    Some(failure)
}

fn perform(
    engine: &mut Engine,
    op: &'static str,
    (bound, workspace): (&[Bound], Option<(Place, usize)>),
    defects: &[Fault],
    compute: &dyn Fn(&mut Run<'_>) -> Done,
) -> Done {
    engine.tasks += 1;
    let mut run = Run::new(engine, op, bound, workspace, defects);
    let result = catch_unwind(AssertUnwindSafe(|| compute(&mut run)));
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic");
        Err(Failure::new(code::INTERNAL, format!("{op}: the emulator failed: {text}")))
    })
}

/// What faults do to a task that seems to have succeeded.
fn spoil(engine: &mut Engine, faults: &[Fault], bound: &[Bound]) {
    for fault in faults {
        let written = || bound.iter().find(|bound| bound.access != Access::Read);
        match fault.kind {
            Kind::Slow => engine.slowness = engine.slowness.max(fault.factor),
            Kind::Bitflip => {
                if let Some(bound) = written() {
                    bound.flip(fault.bit);
                }
            }
            Kind::NanGradient => {
                if let Some(bound) = written() {
                    bound.poison();
                }
            }
            _ => {}
        }
    }
}

/// The tensors of a list.
pub fn list_of(handle: u64, name: &'static str, ir: usize) -> Done<Vec<Argument>> {
    let handles: Arc<Vec<u64>> = DRIVER.get(handle, name)?;
    let argument = |(relative, &handle): (usize, &u64)| {
        let tensor = DRIVER.get(handle, name)?;
        Ok(Argument { handle, tensor, relative: Some(relative), ir })
    };
    handles.iter().enumerate().map(argument).collect()
}

/// Looks an optional object up: null is absent.
pub fn optional<T: Named>(handle: u64, name: &str) -> Done<Option<T>> {
    if handle == 0 { Ok(None) } else { DRIVER.get(handle, name).map(Some) }
}
