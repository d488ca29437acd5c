//! What this backend cannot do, and why: `waivers.toml`, as `supports` gives it.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use pontoon_ops::Op;
use pontoon_ops::waivers::{Waiver, published};

/// The waivers as they are published.
const PUBLISHED: &str = include_str!("../waivers.toml");
/// The condition of a device that was opened alone.
const ALONE: &str = "alone";
/// The condition of heads wider than a thread's registers hold.
const WIDE_HEADS: &str = "wide-heads";
/// Widest keys or values that the attention kernels are compiled for.
const WIDTH_MAX: usize = 576;

/// Every published waiver, by its condition.
pub fn waivers() -> &'static BTreeMap<String, Waiver> {
    static WAIVERS: OnceLock<BTreeMap<String, Waiver>> = OnceLock::new();
    WAIVERS.get_or_init(|| published(PUBLISHED).expect("the file is part of the crate"))
}

/// Why an operation cannot run here, if it cannot.
pub fn refused(op: &Op) -> Option<&'static str> {
    let widest = match op {
        Op::AllReduce(_) | Op::AllGather(_) | Op::ReduceScatter(_) => {
            return Some(reason(ALONE));
        }
        Op::Attention(op) => op.q.dim(2).max(op.v.dim(2)),
        Op::AttentionBwd(op) => op.q.dim(2).max(op.v.dim(2)),
        Op::PagedAttention(op) => op.q.dim(2).max(op.v_cache.dim(3)),
        _ => return None,
    };
    (widest > WIDTH_MAX).then(|| reason(WIDE_HEADS))
}

fn reason(when: &str) -> &'static str {
    waivers().get(when).map(|waiver| waiver.reason.as_str()).expect("a test looks them up")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pontoon_ops::OpName;

    #[test]
    fn every_condition_has_its_published_waiver_and_names_operations_of_the_waist() {
        for when in [ALONE, WIDE_HEADS] {
            let known = |name: &String| OpName::ALL.iter().any(|op| op.name() == *name);
            assert!(waivers()[when].ops.iter().all(known), "{when}");
            assert!(!reason(when).is_empty());
        }
        assert_eq!(waivers().len(), 2);
    }
}
