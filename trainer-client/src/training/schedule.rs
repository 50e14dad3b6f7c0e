//! Learning rates over the steps of a run.

use serde::{Deserialize, Serialize};

/// Share of the peak that a falling schedule ends at, unless another is asked for.
pub const FLOOR: f64 = 0.1;

fn default_floor() -> f64 {
    FLOOR
}

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Falls along half a cosine to the floor at the last step.
    Cosine,
    /// Falls in a straight line to the floor at the last step.
    Linear,
    /// Stays at the peak.
    Constant,
    /// Stays at the peak, then falls in a straight line to the floor over the last steps (warm-up, stable, decay:
    /// arXiv 2404.06395).
    Wsd,
}

/// A learning rate for each step of a run of known length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schedule {
    /// What happens after the warm-up.
    pub shape: Shape,
    /// The highest learning rate.
    pub peak: f64,
    /// Steps over which the learning rate rises linearly from near zero to the peak.
    pub warmup_steps: u64,
    /// Last steps, over which [`Shape::Wsd`] falls; the other shapes do not look at it.
    #[serde(default)]
    pub decay_steps: u64,
    /// Share of the peak that a falling schedule ends at, from 0 to 1.
    #[serde(default = "default_floor")]
    pub floor: f64,
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// Learning rate of a step, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        let progress = || {
            let falling = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
            ((step - self.warmup_steps) as f64 / falling).min(1.0)
        };
        // How much of what is above the floor is left.
        let height = match self.shape {
            Shape::Constant => return self.peak,
            Shape::Wsd => (self.steps.saturating_sub(step) as f64 / self.decay_steps.max(1) as f64).min(1.0),
            Shape::Linear => 1.0 - progress(),
            Shape::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress()).cos()),
        };
        self.peak * (self.floor + (1.0 - self.floor) * height)
    }

    /// Whether both give every step up to this one the same rate, bit by bit: a run that has come so far can go on by the
    /// other.
    pub fn agrees_up_to(&self, other: &Self, step: u64) -> bool {
        (1..=step).all(|step| self.at(step).to_bits() == other.at(step).to_bits())
    }
}

#[cfg(test)]
mod tests {
    use super::{FLOOR, Schedule, Shape};

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-12
    }

    #[test]
    fn rises_linearly_then_falls_to_a_tenth() {
        let schedule = Schedule {
            shape: Shape::Cosine,
            peak: 1.0,
            warmup_steps: 10,
            decay_steps: 0,
            floor: FLOOR,
            steps: 110,
        };
        assert!(close(schedule.at(1), 0.1) && close(schedule.at(10), 1.0));
        assert!(close(schedule.at(60), 0.55), "half-way down: {}", schedule.at(60));
        assert!(close(schedule.at(110), 0.1) && close(schedule.at(500), 0.1));
        assert!((10..110).all(|step| schedule.at(step + 1) < schedule.at(step)));
    }

    #[test]
    fn a_straight_line_falls_to_the_floor_that_was_asked_for() {
        let schedule = Schedule {
            shape: Shape::Linear,
            peak: 2.0,
            warmup_steps: 10,
            decay_steps: 0,
            floor: 0.0,
            steps: 110,
        };
        assert!(close(schedule.at(5), 1.0) && close(schedule.at(10), 2.0) && close(schedule.at(35), 1.5));
        assert!(close(schedule.at(60), 1.0) && close(schedule.at(110), 0.0) && close(schedule.at(500), 0.0));
        let cosine = Schedule { shape: Shape::Cosine, floor: 0.5, ..schedule };
        assert!(close(cosine.at(60), 1.5) && close(cosine.at(110), 1.0));
    }

    #[test]
    fn a_schedule_whose_past_is_the_same_agrees() {
        let constant = Schedule {
            shape: Shape::Constant,
            peak: 1.0,
            warmup_steps: 10,
            decay_steps: 0,
            floor: FLOOR,
            steps: 100,
        };
        let longer = Schedule { steps: 1000, ..constant };
        assert!(constant.agrees_up_to(&longer, 100));
        let decaying = Schedule { shape: Shape::Wsd, decay_steps: 20, ..constant };
        assert!(constant.agrees_up_to(&decaying, 80) && !constant.agrees_up_to(&decaying, 81));
        let later = Schedule { steps: 200, ..decaying };
        assert!(decaying.agrees_up_to(&later, 80) && !decaying.agrees_up_to(&later, 81));
        let cosine = Schedule { shape: Shape::Cosine, ..constant };
        assert!(!cosine.agrees_up_to(&Schedule { steps: 200, ..cosine }, 50));
        assert!(cosine.agrees_up_to(&Schedule { steps: 200, ..cosine }, 10), "the warm-up is the same");
    }

    #[test]
    fn a_constant_rate_stays() {
        let schedule = Schedule {
            shape: Shape::Constant,
            peak: 2.0,
            warmup_steps: 0,
            decay_steps: 0,
            floor: FLOOR,
            steps: 10,
        };
        assert!((1..=20).all(|step| close(schedule.at(step), 2.0)));
    }

    #[test]
    fn warm_up_stable_decay_stays_and_then_falls_in_a_straight_line() {
        let schedule = Schedule {
            shape: Shape::Wsd,
            peak: 1.0,
            warmup_steps: 10,
            decay_steps: 20,
            floor: FLOOR,
            steps: 110,
        };
        assert!(close(schedule.at(5), 0.5));
        assert!((10..=90).all(|step| close(schedule.at(step), 1.0)));
        assert!(close(schedule.at(91), 0.955) && close(schedule.at(100), 0.55), "half-way down");
        assert!(close(schedule.at(110), 0.1) && close(schedule.at(500), 0.1));
    }
}
