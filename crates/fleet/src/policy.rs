//! Decisions about workers, as pure functions: who computes what, who is too slow, who is silent,
//! who lies, and what is audited.
//!
//! Knows no clock, no process and no message. Read next: `supervisor.rs`, which asks.

use std::cmp::{Ordering, Reverse};
use std::collections::{BTreeSet, BinaryHeap};
use std::time::Duration;

use crate::protocol::Node;

/// A worker counts as hung after this many times its own longest pause.
const HANG_FACTOR: u32 = 8;
/// But never before this.
const HANG_FLOOR: Duration = Duration::from_millis(1500);
/// One for which all others wait may be silent for this long while its process is seen to run: to
/// be wrong then costs a new process, which starts beside the run.
const STUCK_FLOOR: Duration = Duration::from_millis(400);
/// It is seen to run by so many beats since the last operation: they come every 50 ms, and later
/// where the machine is too busy for them.
const STUCK_BEATS: u32 = 6;
/// A worker that loads its model may be silent for this long while nobody knows how long it takes,
/// and never longer.
const LOAD_CEILING: Duration = Duration::from_secs(300);
/// Once others have loaded, it may take this many times longer than the slowest of them did:
/// disks and memories are shared by all that start at once.
const LOAD_FACTOR: u32 = 10;
/// But always this long.
const LOAD_FLOOR: Duration = Duration::from_secs(30);
/// A worker is called slow at this many times the others' median time for a micro-batch.
const SLOW_FACTOR: f64 = 2.0;
/// A worker that takes this many times longer than it should while all others wait is given up.
const OVERDUE_FACTOR: f64 = 4.0;

/// When a worker without progress counts as hung.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum HangAfter {
    /// Learnt from the worker's own pauses.
    Auto,
    /// Given.
    Fixed(Duration),
}

impl HangAfter {
    /// The deadline of a worker whose longest pause so far is known.
    pub fn deadline(self, longest_pause: Duration) -> Duration {
        match self {
            HangAfter::Auto => (longest_pause * HANG_FACTOR).max(HANG_FLOOR),
            HangAfter::Fixed(given) => given,
        }
    }

    /// Whether a worker for which all others wait stands still, though it beats.
    pub fn is_stuck(self, silent: Duration, longest_pause: Duration, beats: u32) -> bool {
        let most = (longest_pause * HANG_FACTOR).max(STUCK_FLOOR);
        self == HangAfter::Auto && beats >= STUCK_BEATS && silent > most
    }
}

/// How long a worker may load, given the longest that one took so far, if any did.
pub fn load_deadline(longest: Option<Duration>) -> Duration {
    longest.map_or(LOAD_CEILING, |of| (of * LOAD_FACTOR).clamp(LOAD_FLOOR, LOAD_CEILING))
}

/// How many of equal pieces of work each worker takes so that the last one is done soonest, given
/// each one's time for a piece. Ties go to the first.
pub fn shares(pieces: u32, seconds: &[f64]) -> Vec<u32> {
    let mut counts = vec![0_u32; seconds.len()];
    // What all have done by a time at which the pieces do not yet suffice is shared out at once.
    let rate: f64 = seconds.iter().map(|seconds| seconds.recip()).sum();
    let early = f64::from(pieces) / rate * (1.0 - 1e-9);
    let mut left = pieces;
    if early.is_finite() {
        for (count, seconds) in counts.iter_mut().zip(seconds) {
            *count = ((early / seconds) as u32).min(left);
            left -= *count;
        }
    }
    let done_at = |index: usize, counts: &[u32]| {
        let at = f64::from(counts[index] + 1) * seconds[index];
        Reverse((Time(at), index))
    };
    let mut next: BinaryHeap<_> = (0..seconds.len()).map(|of| done_at(of, &counts)).collect();
    for _ in 0..left {
        let Some(Reverse((_, best))) = next.pop() else { break };
        counts[best] += 1;
        next.push(done_at(best, &counts));
    }
    counts
}

/// Seconds in their order.
#[derive(Clone, Copy, PartialEq)]
struct Time(f64);

impl Eq for Time {}

impl PartialOrd for Time {
    fn partial_cmp(&self, other: &Time) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Time {
    fn cmp(&self, other: &Time) -> Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Cuts leaves `first..end` into the fewest aligned subtrees, in order.
pub fn nodes(first: u32, end: u32) -> Vec<Node> {
    let mut nodes = Vec::new();
    let mut at = first;
    while at < end {
        let aligned = if at == 0 { u32::MAX } else { 1 << at.trailing_zeros() };
        let mut count = 1;
        while count * 2 <= aligned && at + count * 2 <= end {
            count *= 2;
        }
        nodes.push(Node { first: at, count });
        at += count;
    }
    nodes
}

/// Cuts a subtree so that the named leaves in it are subtrees of their own; the tree stays.
pub fn apart(node: Node, single: &BTreeSet<u32>) -> Vec<Node> {
    let Node { first, count } = node;
    if count == 1 || single.range(first..first + count).next().is_none() {
        return vec![node];
    }
    let count = count / 2;
    let halves = [first, first + count].map(|first| apart(Node { first, count }, single));
    halves.concat()
}

/// Gives leaves to workers by their speeds, each a run of neighbours; returns subtrees by worker.
pub fn assign(leaves: &[u32], seconds: &[f64]) -> Vec<Vec<Node>> {
    let counts = shares(leaves.len() as u32, seconds);
    let mut rest = leaves;
    let mut assigned = Vec::new();
    for count in counts {
        let (mine, others) = rest.split_at(count as usize);
        rest = others;
        let mut subtrees = Vec::new();
        let mut index = 0;
        while index < mine.len() {
            let run = (index..mine.len())
                .take_while(|&i| mine[i] as usize == mine[index] as usize + i - index);
            let length = run.count();
            subtrees.extend(nodes(mine[index], mine[index] + length as u32));
            index += length;
        }
        assigned.push(subtrees);
    }
    assigned
}

/// Who takes much longer than the median of the others.
pub fn slow(seconds: &[f64]) -> Vec<bool> {
    let mut sorted = seconds.to_vec();
    sorted.sort_by(f64::total_cmp);
    let is_slow = |of: &f64| {
        let Some(others) = sorted.len().checked_sub(1).filter(|others| *others > 0) else {
            return false;
        };
        // The others are all but one of its value: from its place on they move up by one.
        let (middle, place) =
            ((others - 1) / 2, sorted.partition_point(|other| other.total_cmp(of).is_lt()));
        let median = sorted[middle + usize::from(place <= middle)];
        *of > SLOW_FACTOR * median
    };
    seconds.iter().map(is_slow).collect()
}

/// Whether the others, who wait, are better off without a worker that should have taken
/// `expected` and has taken `taken`.
pub fn is_overdue(taken: Duration, expected: Duration) -> bool {
    taken > HANG_FLOOR && taken.as_secs_f64() > OVERDUE_FACTOR * expected.as_secs_f64()
}

/// What is audited in one step: so many of every run of so many neighbouring leaves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditPlan {
    /// Of each run.
    audited: u32,
    /// The length of a run: what a worker computes.
    each: u32,
    /// Where in the run they lie.
    offset: u32,
}

impl AuditPlan {
    /// Draws a step's audits from (seed, step), given the leaves of a worker: over many steps
    /// `share` of all leaves, every leaf as often as any other, and in one step the same number of
    /// each worker, give or take one where workers have not equally many.
    pub fn draw(share: f64, each: u32, seed: u64, step: u64) -> AuditPlan {
        let mut z = seed ^ step.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        for factor in [0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB] {
            z = (z ^ (z >> 30)).wrapping_mul(factor);
        }
        let z = z ^ (z >> 31);
        // The upper half decides how many, the lower one which.
        let uniform = (z >> 32) as f64 / (1_u64 << 32) as f64;
        let audited = (share * f64::from(each) + uniform) as u32;
        let offset = (z as u32) % each.max(1);
        AuditPlan { audited: audited.min(each), each: each.max(1), offset }
    }

    /// Whether a leaf is audited.
    pub fn takes(&self, leaf: u32) -> bool {
        let before = |leaf: u32| {
            u64::from(self.audited) * (u64::from(leaf) + u64::from(self.offset))
                / u64::from(self.each.max(1))
        };
        before(leaf + 1) > before(leaf)
    }
}

/// What votes about a value come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All say the same.
    Agreed,
    /// More say one value than any other, and at least two; these voters said another.
    Outvoted(Vec<usize>),
    /// No value has more votes than another.
    Tied,
}

/// Counts votes of (worker, value).
pub fn verdict(votes: &[(usize, u64)]) -> Verdict {
    if votes.iter().all(|(_, value)| *value == votes[0].1) {
        return Verdict::Agreed;
    }
    let count = |value: u64| votes.iter().filter(|(_, other)| *other == value).count();
    let Some(&(_, best)) = votes.iter().max_by_key(|(_, value)| count(*value)) else {
        return Verdict::Agreed;
    };
    let rivals = votes.iter().filter(|(_, value)| *value != best && count(*value) == count(best));
    if rivals.count() > 0 || count(best) < 2 {
        return Verdict::Tied;
    }
    let mut liars: Vec<usize> =
        votes.iter().filter(|(_, value)| *value != best).map(|(worker, _)| *worker).collect();
    liars.sort_unstable();
    liars.dedup();
    Verdict::Outvoted(liars)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_follow_speed_and_take_the_least_time_that_any_sharing_takes() {
        assert_eq!(shares(8, &[1.0, 1.0]), [4, 4]);
        assert_eq!(shares(8, &[1.0, 3.0]), [6, 2]);
        assert_eq!(shares(4, &[1.0, 100.0]), [4, 0]);
        let seconds = [1.0, 1.7, 2.9];
        let worst = |counts: &[u32]| {
            counts.iter().zip(seconds).map(|(c, s)| f64::from(*c) * s).fold(0.0, f64::max)
        };
        let best = (0..=16)
            .flat_map(|a| (0..=16 - a).map(move |b| [a, b, 16 - a - b]))
            .map(|counts| worst(&counts))
            .fold(f64::INFINITY, f64::min);
        assert_eq!(worst(&shares(16, &seconds)), best);
    }

    #[test]
    fn loading_may_take_ten_times_what_it_took_others_within_limits() {
        assert_eq!(load_deadline(None), Duration::from_secs(300));
        assert_eq!(load_deadline(Some(Duration::from_secs(1))), Duration::from_secs(30));
        assert_eq!(load_deadline(Some(Duration::from_secs(7))), Duration::from_secs(70));
        assert_eq!(load_deadline(Some(Duration::from_secs(90))), Duration::from_secs(300));
    }

    #[test]
    fn one_that_holds_up_all_others_is_stuck_after_a_shorter_silence_if_it_beats() {
        let ms = Duration::from_millis;
        let is_stuck =
            |silent, pause, beats| HangAfter::Auto.is_stuck(ms(silent), ms(pause), beats);
        assert!(is_stuck(401, 10, 6) && is_stuck(801, 100, 20));
        assert!(!is_stuck(400, 10, 8) && !is_stuck(800, 100, 16), "it may take that long");
        assert!(!is_stuck(1400, 10, 5), "the machine is too busy for its beats");
        assert!(!HangAfter::Fixed(ms(5000)).is_stuck(ms(4000), ms(1), 80));
    }

    #[test]
    fn subtrees_are_aligned_and_cover_the_leaves_once() {
        for first in 0..16 {
            for end in first..=16 {
                let mut at = first;
                for node in nodes(first, end) {
                    assert_eq!(node.first, at);
                    assert!(node.count.is_power_of_two() && node.first % node.count == 0);
                    at += node.count;
                }
                assert_eq!(at, end);
            }
        }
        assert_eq!(nodes(0, 8), [Node { first: 0, count: 8 }]);
        let cut = apart(Node { first: 0, count: 8 }, &BTreeSet::from([2]));
        let pairs: Vec<_> = cut.iter().map(|node| (node.first, node.count)).collect();
        assert_eq!(pairs, [(0, 2), (2, 1), (3, 1), (4, 4)]);
        let scattered = assign(&[0, 1, 5, 6, 7], &[1.0]);
        let pairs: Vec<_> = scattered[0].iter().map(|node| (node.first, node.count)).collect();
        assert_eq!(pairs, [(0, 2), (5, 1), (6, 2)]);
    }

    #[test]
    fn audits_are_the_share_asked_for_and_alike_for_all_workers_of_a_step() {
        for (share, each, workers) in [(0.01, 4, 512), (0.1, 4, 2), (0.3, 3, 5), (0.7, 8, 3)] {
            let (steps, leaves) = (20_000, each * workers);
            let mut of_leaf = vec![0_u32; leaves as usize];
            for step in 0..steps {
                let plan = AuditPlan::draw(share, each, 7, step);
                let runs = of_leaf.chunks_mut(each as usize).zip((0..).step_by(each as usize));
                let counts: BTreeSet<usize> = runs
                    .map(|(counts, first)| {
                        let drawn = (first..).zip(counts).filter(|(leaf, _)| plan.takes(*leaf));
                        drawn.map(|(_, count)| *count += 1).count()
                    })
                    .collect();
                assert_eq!(counts.len(), 1, "{plan:?}: {counts:?}");
            }
            for count in of_leaf {
                let found = f64::from(count) / steps as f64;
                assert!((found / share - 1.0).abs() < 0.2, "{found} of {share}");
            }
        }
        let takes = |share: f64, leaf| AuditPlan::draw(share, 3, 7, 5).takes(leaf);
        assert!((0..8).all(|leaf| takes(1.0, leaf)));
        assert!(!(0..8).any(|leaf| takes(0.0, leaf) || AuditPlan::default().takes(leaf)));
    }

    #[test]
    fn a_liar_is_outvoted_and_two_alone_are_tied() {
        assert_eq!(verdict(&[(0, 5), (1, 5)]), Verdict::Agreed);
        assert_eq!(verdict(&[(0, 5), (1, 6)]), Verdict::Tied);
        assert_eq!(verdict(&[(0, 5), (1, 6), (2, 6)]), Verdict::Outvoted(vec![0]));
        assert_eq!(verdict(&[(0, 5), (1, 6), (0, 6), (1, 6)]), Verdict::Outvoted(vec![0]));
        assert_eq!(verdict(&[(0, 5), (1, 6), (0, 5), (1, 6)]), Verdict::Tied);
        assert_eq!(verdict(&[(0, 5), (1, 6), (2, 7)]), Verdict::Tied);
    }

    #[test]
    fn slow_is_meant_against_the_others_median() {
        assert_eq!(slow(&[1.0, 1.1, 2.5]), [false, false, true]);
        assert_eq!(slow(&[1.0, 1.1, 1.9]), [false; 3]);
        assert_eq!(slow(&[9.0]), [false]);
        assert_eq!(slow(&[9.0, 1.0]), [true, false]);
        assert_eq!(slow(&[2.5, 1.0, 2.5, 1.0, 1.0]), [true, false, true, false, false]);
        assert_eq!(slow(&[]), [false; 0]);
    }
}
