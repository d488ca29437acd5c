//! The learning rate of a step: a pure function of the settings and the step.
//!
//! Read next: `optimizer.rs`, which hands it to the device.

use crate::config::{ScheduleName, TrainSection};

/// The learning rate with which `step` (the first is 1) is applied.
pub fn learning_rate(train: &TrainSection, step: u64) -> f64 {
    let (steps, warmup) = (train.steps as f64, train.warmup as f64);
    let step = step as f64;
    if step < warmup {
        return train.lr * step / warmup;
    }
    let floor = train.lr * train.lr_min;
    match train.schedule {
        ScheduleName::Constant => train.lr,
        ScheduleName::Cosine => {
            let done = ((step - warmup) / (steps - warmup).max(1.0)).min(1.0);
            floor + (train.lr - floor) * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
        }
        ScheduleName::Wsd => {
            let decay = (train.decay * steps).min(steps - warmup).max(0.0);
            let left = (steps - step).max(0.0);
            if left >= decay { train.lr } else { floor + (train.lr - floor) * left / decay }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn train(schedule: ScheduleName) -> TrainSection {
        TrainSection {
            steps: 100,
            warmup: 10,
            lr: 2.0,
            lr_min: 0.1,
            decay: 0.2,
            schedule,
            ..TrainSection::default()
        }
    }

    fn near(got: f64, want: f64) {
        assert!((got - want).abs() < 1e-12, "{got} should be {want}");
    }

    #[test]
    fn every_schedule_rises_linearly_to_the_full_rate() {
        for schedule in [ScheduleName::Cosine, ScheduleName::Wsd, ScheduleName::Constant] {
            near(learning_rate(&train(schedule), 1), 0.2);
            near(learning_rate(&train(schedule), 5), 1.0);
            near(learning_rate(&train(schedule), 10), 2.0);
        }
    }

    #[test]
    fn cosine_is_half_way_in_the_middle_and_at_the_floor_at_the_end() {
        near(learning_rate(&train(ScheduleName::Cosine), 55), 1.1);
        near(learning_rate(&train(ScheduleName::Cosine), 100), 0.2);
    }

    #[test]
    fn wsd_is_stable_then_falls_linearly_to_the_floor() {
        near(learning_rate(&train(ScheduleName::Wsd), 80), 2.0);
        near(learning_rate(&train(ScheduleName::Wsd), 90), 1.1);
        near(learning_rate(&train(ScheduleName::Wsd), 100), 0.2);
    }

    #[test]
    fn a_run_shorter_than_its_warmup_only_rises() {
        let train = TrainSection { steps: 5, warmup: 10, ..train(ScheduleName::Wsd) };
        near(learning_rate(&train, 5), 1.0);
    }
}
