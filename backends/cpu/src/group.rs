//! Where the devices of one process meet to exchange tensors.
//!
//! Members run in threads of their own; each brings its bytes and leaves with everyone's. A member
//! that does not come is a `Hang` for the others, after a bounded wait.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use pontoon_ops::{DeviceError, DeviceErrorKind};

/// How long a member waits for the others: far longer than any step, far shorter than a job.
const WAIT_MAX: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Meeting {
    number: u64,
    parts: Vec<Option<Vec<u8>>>,
    arrived: usize,
    result: Arc<Vec<Vec<u8>>>,
}

/// The meeting point of one group.
pub struct Rendezvous {
    members: u16,
    meeting: Mutex<Meeting>,
    changed: Condvar,
}

impl Rendezvous {
    /// For `members` devices.
    pub fn new(members: u16) -> Self {
        let parts = vec![None; usize::from(members)];
        let meeting = Mutex::new(Meeting { parts, ..Meeting::default() });
        Rendezvous { members, meeting, changed: Condvar::new() }
    }

    /// Devices in the group.
    pub fn members(&self) -> u16 {
        self.members
    }

    /// Brings `bytes` as member `rank` and returns every member's bytes by rank.
    pub fn exchange(&self, rank: u16, bytes: &[u8]) -> Result<Arc<Vec<Vec<u8>>>, DeviceError> {
        let bad = |text: &str| DeviceError::new(DeviceErrorKind::BadArgument, text);
        let mut meeting = self.meeting.lock().unwrap_or_else(PoisonError::into_inner);
        let number = meeting.number;
        let Some(place) = meeting.parts.get_mut(usize::from(rank)) else {
            return Err(bad("the rank is not in the group"));
        };
        if place.replace(bytes.to_vec()).is_some() {
            return Err(bad("a rank came twice to one exchange"));
        }
        meeting.arrived += 1;
        if meeting.arrived == usize::from(self.members) {
            let parts = meeting.parts.iter_mut().map(|part| part.take().unwrap_or_default());
            meeting.result = Arc::new(parts.collect());
            meeting.arrived = 0;
            meeting.number += 1;
            self.changed.notify_all();
            return Ok(Arc::clone(&meeting.result));
        }
        let waiting = |meeting: &mut Meeting| meeting.number == number;
        let (mut meeting, timeout) = self
            .changed
            .wait_timeout_while(meeting, WAIT_MAX, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            meeting.parts[usize::from(rank)] = None;
            meeting.arrived -= 1;
            let text = format!("rank {rank} waited {WAIT_MAX:?} for the rest of its group");
            return Err(DeviceError::new(DeviceErrorKind::Hang, text));
        }
        Ok(Arc::clone(&meeting.result))
    }
}
