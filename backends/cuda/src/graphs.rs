//! Lists of operations that come again and again, recorded once as the driver's graphs: starting a
//! graph costs the host about as much as starting one kernel.
//!
//! A list is run as it is when it first comes, which compiles its kernels and makes scratch large
//! enough, and recorded when it comes again. A graph holds addresses: it is forgotten when one of
//! its buffers is given back, and recorded anew when scratch has moved.

use pontoon_ops::{BufferId, DeviceError, Op};

use crate::core::{Core, Done};
use crate::ffi::session::Graph;
use crate::ops;

/// Lists that are remembered: a run's programs, and a server's batch sizes.
const LISTS_MAX: usize = 64;
/// Shorter lists gain nothing.
const OPS_MIN: usize = 4;

/// A list that came at least once.
struct List {
    ops: Vec<Op>,
    /// The graph, and where scratch lay when it was recorded.
    graph: Option<(Graph, u64)>,
}

/// Every list that is remembered, the latest last.
#[derive(Default)]
pub struct Graphs {
    lists: Vec<List>,
    /// Whether the driver refused to record.
    refused: bool,
}

impl Graphs {
    /// Starts a list.
    pub fn launch(&mut self, core: &mut Core, ops: &[Op]) -> Done {
        if self.refused || ops.len() < OPS_MIN {
            return plainly(core, ops);
        }
        let Some(at) = self.lists.iter().rposition(|list| list.ops == ops) else {
            if self.lists.len() == LISTS_MAX {
                close(core, self.lists.remove(0));
            }
            self.lists.push(List { ops: ops.to_vec(), graph: None });
            return plainly(core, ops);
        };
        // What scratch still has to do is done before: a recording cannot wait.
        core.begin()?;
        let list = &mut self.lists[at];
        if let Some((graph, moved)) = &list.graph
            && *moved == core.scratch.moved()
        {
            return core.session.start(graph);
        }
        if let Some((old, _)) = list.graph.take() {
            core.session.drop_graph(old);
        }
        match record(core, ops)? {
            Some(graph) => {
                core.session.start(&graph)?;
                list.graph = Some((graph, core.scratch.moved()));
                Ok(())
            }
            None => {
                self.refused = true;
                plainly(core, ops)
            }
        }
    }

    /// Forgets what uses a buffer.
    pub fn forget(&mut self, core: &Core, buffer: BufferId) {
        let uses = |list: &List| {
            list.ops.iter().any(|op| op.operands().iter().any(|one| one.view.buffer == buffer))
        };
        while let Some(at) = self.lists.iter().position(uses) {
            close(core, self.lists.remove(at));
        }
    }

    /// Gives every graph back.
    pub fn close(&mut self, core: &Core) {
        self.lists.drain(..).for_each(|list| close(core, list));
    }
}

fn close(core: &Core, list: List) {
    if let Some((graph, _)) = list.graph {
        core.session.drop_graph(graph);
    }
}

fn plainly(core: &mut Core, ops: &[Op]) -> Done {
    ops.iter().try_for_each(|op| {
        core.begin()?;
        ops::run(core, op)
    })
}

/// Records a list, or gives nothing where that is not possible.
fn record(core: &mut Core, ops: &[Op]) -> Result<Option<Graph>, DeviceError> {
    if core.session.begin_recording().is_err() {
        return Ok(None);
    }
    let moved = core.scratch.moved();
    let done = plainly(core, ops);
    let graph = core.session.end_recording();
    match (done, graph) {
        (Ok(()), Ok(graph)) if moved == core.scratch.moved() => Ok(Some(graph)),
        (Ok(()), Ok(graph)) => {
            core.session.drop_graph(graph);
            Ok(None)
        }
        // Nothing has run yet; what is wrong with an operation shows when it is run plainly.
        _ => Ok(None),
    }
}
