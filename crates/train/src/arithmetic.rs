//! A task that makes its own problems: additions with every step written out.
//!
//! Numbers are added digit by digit from the right, so each step needs only two digits and a
//! carry, which a model of a million parameters learns in a minute. Problems to train on and to
//! ask are told apart by a hash of the problem itself, so none is ever in both.

use pontoon_ops::philox::{Stream, philox4x32};

use crate::eval::Problem;

/// The name of the task in `pontoon eval --task`.
pub const TASK: &str = "arithmetic";
/// Sets these draws apart from others of the same seed.
const DOMAIN: u64 = 0x6164_6469;
/// One problem in this many is for asking only.
const ASKED_OF: u32 = 8;

/// What problems are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// To train on.
    Train,
    /// To ask; never trained on.
    Ask,
}

/// A sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addition {
    /// First summand.
    pub a: u32,
    /// Second summand.
    pub b: u32,
}

/// Draws `count` sums of numbers with up to three digits.
pub fn additions(seed: u64, purpose: Purpose, count: usize) -> Vec<Addition> {
    let stream = Stream::new(seed, DOMAIN);
    let draw = |index: u64| {
        let bound = [100, 1000][(stream.block(index)[2] % 2) as usize];
        let [a, b] = [3 * index + (1 << 40), 3 * index + (2 << 40)];
        Addition { a: stream.below(a, bound) as u32, b: stream.below(b, bound) as u32 }
    };
    (0..).map(draw).filter(|sum| sum.purpose() == purpose).take(count).collect()
}

impl Addition {
    fn purpose(self) -> Purpose {
        let drawn = philox4x32([self.a, self.b], [0; 4])[0];
        if drawn.is_multiple_of(ASKED_OF) { Purpose::Ask } else { Purpose::Train }
    }

    /// As a problem to ask.
    pub fn problem(self) -> Problem {
        let Addition { a, b } = self;
        Problem { prompt: format!("{a}+{b}=?"), answer: (a + b).to_string() }
    }

    /// The reply to learn: the steps, then the answer.
    pub fn reply(self) -> String {
        let (mut a, mut b, mut carry) = (self.a, self.b, 0);
        let mut steps = String::new();
        loop {
            let sum = a % 10 + b % 10 + carry;
            steps += &format!("{}+{}+{carry}={sum} ", a % 10, b % 10);
            (a, b, carry) = (a / 10, b / 10, sum / 10);
            if a == 0 && b == 0 {
                break;
            }
        }
        format!("<think>{}</think>{}", steps.trim_end(), self.a + self.b)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_write_out_every_step_and_end_with_the_sum() {
        let sum = Addition { a: 57, b: 968 };
        assert_eq!(sum.reply(), "<think>7+8+0=15 5+6+1=12 0+9+1=10</think>1025");
        assert_eq!(Addition { a: 0, b: 0 }.reply(), "<think>0+0+0=0</think>0");
        for sum in additions(3, Purpose::Ask, 100) {
            assert_eq!(crate::eval::answer_of(&sum.reply()), sum.problem().answer);
        }
    }

    #[test]
    fn no_problem_is_both_trained_on_and_asked() {
        let trained = additions(1, Purpose::Train, 5000);
        let asked = additions(2, Purpose::Ask, 500);
        assert!(asked.iter().all(|sum| !trained.contains(sum)));
    }
}
