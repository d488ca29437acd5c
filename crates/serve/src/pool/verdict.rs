//! Who is wrong when two devices score one text differently.
//!
//! Pure: readings in, a verdict out. Read next: `audit.rs`, which takes the readings.

use super::agreement::{first_beyond, first_difference};

/// How near two devices' log-probabilities must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Nearness {
    /// Of one numeric class: the same bits.
    Same,
    /// Of two classes: this far apart at most.
    Within(f64),
}

impl Nearness {
    /// Where two lists first are not near.
    pub fn first_apart(self, one: &[f32], other: &[f32]) -> Option<usize> {
        match self {
            Nearness::Same => first_difference(one, other),
            Nearness::Within(limit) => first_beyond(one, other, limit),
        }
    }
}

/// Log-probabilities of the same tokens.
pub struct Readings<'a> {
    /// As told when they were drawn.
    pub drawn: &'a [f32],
    /// As another device scored them afterwards.
    pub judged: &'a [f32],
    /// As the first device scores them now.
    pub drawer_again: &'a [f32],
    /// As the other device scores them now.
    pub judge_again: &'a [f32],
    /// As a third device scores them, and how near it must be to the first and to the second.
    pub third: Option<(&'a [f32], Nearness, Nearness)>,
}

/// Which of the two is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The one that drew the tokens, for this reason.
    Drawer(String),
    /// The one that scored them, for this reason.
    Judge(String),
    /// These readings do not tell.
    Open,
}

/// Decides. A device that does not repeat its own bits is wrong; of two that do, the one that a
/// third contradicts.
pub fn decide(readings: &Readings<'_>) -> Verdict {
    let unsteady = |before: &[f32], now: &[f32]| {
        let at = first_difference(before, now)?;
        let shown = |list: &[f32]| list.get(at).map_or("nothing".to_owned(), f32::to_string);
        Some(format!("token {at} scored {} before and {} now", shown(before), shown(now)))
    };
    let drawer = unsteady(readings.drawn, readings.drawer_again);
    let judge = unsteady(readings.judged, readings.judge_again);
    match (drawer, judge) {
        (Some(why), None) => return Verdict::Drawer(why),
        (None, Some(why)) => return Verdict::Judge(why),
        (Some(_), Some(_)) => return Verdict::Open,
        (None, None) => {}
    }
    let Some((third, to_drawer, to_judge)) = readings.third else { return Verdict::Open };
    let apart_from_drawer = to_drawer.first_apart(readings.drawn, third);
    let apart_from_judge = to_judge.first_apart(readings.judged, third);
    let against = |at: usize| format!("a third device contradicts it at token {at}");
    match (apart_from_drawer, apart_from_judge) {
        (Some(at), None) => Verdict::Drawer(against(at)),
        (None, Some(at)) => Verdict::Judge(against(at)),
        _ => Verdict::Open,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUTH: &[f32] = &[-1.0, -2.0];
    const LIE: &[f32] = &[-1.0, -2.5];
    const OTHER_LIE: &[f32] = &[-1.0, -7.0];

    fn readings<'a>(drawn: &'a [f32], judged: &'a [f32]) -> Readings<'a> {
        Readings { drawn, judged, drawer_again: drawn, judge_again: judged, third: None }
    }

    #[test]
    fn one_that_does_not_repeat_itself_is_wrong() {
        let once = Readings { drawer_again: TRUTH, ..readings(LIE, TRUTH) };
        assert!(matches!(decide(&once), Verdict::Drawer(_)));
        let judge = Readings { judge_again: OTHER_LIE, ..readings(TRUTH, LIE) };
        assert!(matches!(decide(&judge), Verdict::Judge(_)));
        let both =
            Readings { drawer_again: OTHER_LIE, judge_again: OTHER_LIE, ..readings(LIE, TRUTH) };
        assert_eq!(decide(&both), Verdict::Open);
    }

    #[test]
    fn a_third_device_decides_between_two_steady_ones() {
        assert_eq!(decide(&readings(LIE, TRUTH)), Verdict::Open);
        let third = Some((TRUTH, Nearness::Same, Nearness::Same));
        let drawer = Readings { third, ..readings(LIE, TRUTH) };
        assert!(matches!(decide(&drawer), Verdict::Drawer(_)));
        let near: &[f32] = &[-1.0, -2.001];
        let third = Some((near, Nearness::Within(0.1), Nearness::Within(0.1)));
        let judge = Readings { third, ..readings(TRUTH, LIE) };
        assert!(matches!(decide(&judge), Verdict::Judge(_)));
        let third = Some((OTHER_LIE, Nearness::Same, Nearness::Same));
        assert_eq!(decide(&Readings { third, ..readings(LIE, TRUTH) }), Verdict::Open);
    }
}
