//! Which device gets a request: the one that is likely to be done with it first.
//!
//! Pure: counts in, a slot out. Read next: `mod.rs`.

/// A device that serves, as placement sees it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its place in the pool.
    pub slot: usize,
    /// Requests it has already.
    pub queued: u64,
    /// Tokens of the prompt that its cache does not have.
    pub prompt_tokens_left: usize,
    /// What it has been measured at; `None` before its first step.
    pub tokens_per_s: Option<f64>,
}

/// Tokens that a request already there stands for: a typical answer's, as its own is not known.
const TOKENS_PER_QUEUED: f64 = 128.0;

/// The slot with the least work ahead in time; the first of equals.
///
/// A device without a measurement is taken to be as fast as the fastest, so that it gets one.
pub fn place(candidates: &[Candidate]) -> Option<usize> {
    let fastest = candidates.iter().filter_map(|one| one.tokens_per_s).fold(0.0, f64::max);
    let assumed = if fastest > 0.0 { fastest } else { 1.0 };
    let wait = |one: &Candidate| {
        let tokens = one.queued as f64 * TOKENS_PER_QUEUED + one.prompt_tokens_left as f64;
        tokens / one.tokens_per_s.filter(|&speed| speed > 0.0).unwrap_or(assumed)
    };
    let best = candidates.iter().min_by(|a, b| wait(a).total_cmp(&wait(b)));
    best.map(|one| one.slot)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn candidate(slot: usize, queued: u64, left: usize, speed: Option<f64>) -> Candidate {
        Candidate { slot, queued, prompt_tokens_left: left, tokens_per_s: speed }
    }

    #[test]
    fn the_idle_the_fast_and_the_one_with_the_prefix_are_preferred() {
        let speed = Some(100.0);
        assert_eq!(place(&[]), None);
        let load = [candidate(0, 3, 50, speed), candidate(1, 0, 50, speed)];
        assert_eq!(place(&load), Some(1));
        let speeds = [candidate(0, 1, 50, Some(10.0)), candidate(1, 1, 50, speed)];
        assert_eq!(place(&speeds), Some(1));
        let prefix = [candidate(0, 1, 500, speed), candidate(1, 1, 20, speed)];
        assert_eq!(place(&prefix), Some(1));
        let fresh = [candidate(0, 1, 50, speed), candidate(1, 0, 50, None)];
        assert_eq!(place(&fresh), Some(1));
    }
}
