//! Learning rates over the steps of a run.

use serde::{Deserialize, Serialize};

/// Share of the peak that a falling schedule ends at.
const FLOOR: f64 = 0.1;

/// How the learning rate moves after the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Shape {
    /// Falls along half a cosine to a tenth of the peak at the last step.
    Cosine,
    /// Stays at the peak.
    Constant,
    /// Stays at the peak, then falls in a straight line to a tenth of it over the last steps (warm-up, stable, decay:
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
    /// Steps of the whole run.
    pub steps: u64,
}

impl Schedule {
    /// Learning rate of a step, counted from 1.
    pub fn at(&self, step: u64) -> f64 {
        if step <= self.warmup_steps {
            return self.peak * step as f64 / self.warmup_steps as f64;
        }
        match self.shape {
            Shape::Constant => self.peak,
            Shape::Wsd => {
                let left = self.steps.saturating_sub(step) as f64 / self.decay_steps.max(1) as f64;
                self.peak * (FLOOR + (1.0 - FLOOR) * left.min(1.0))
            }
            Shape::Cosine => {
                let falling = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
                let progress = ((step - self.warmup_steps) as f64 / falling).min(1.0);
                let height = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
                self.peak * (FLOOR + (1.0 - FLOOR) * height)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Schedule, Shape};

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-12
    }

    #[test]
    fn rises_linearly_then_falls_to_a_tenth() {
        let schedule =
            Schedule { shape: Shape::Cosine, peak: 1.0, warmup_steps: 10, decay_steps: 0, steps: 110 };
        assert!(close(schedule.at(1), 0.1) && close(schedule.at(10), 1.0));
        assert!(close(schedule.at(60), 0.55), "half-way down: {}", schedule.at(60));
        assert!(close(schedule.at(110), 0.1) && close(schedule.at(500), 0.1));
        assert!((10..110).all(|step| schedule.at(step + 1) < schedule.at(step)));
    }

    #[test]
    fn a_constant_rate_stays() {
        let schedule =
            Schedule { shape: Shape::Constant, peak: 2.0, warmup_steps: 0, decay_steps: 0, steps: 10 };
        assert!((1..=20).all(|step| close(schedule.at(step), 2.0)));
    }

    #[test]
    fn warm_up_stable_decay_stays_and_then_falls_in_a_straight_line() {
        let schedule =
            Schedule { shape: Shape::Wsd, peak: 1.0, warmup_steps: 10, decay_steps: 20, steps: 110 };
        assert!(close(schedule.at(5), 0.5));
        assert!((10..=90).all(|step| close(schedule.at(step), 1.0)));
        assert!(close(schedule.at(91), 0.955) && close(schedule.at(100), 0.55), "half-way down");
        assert!(close(schedule.at(110), 0.1) && close(schedule.at(500), 0.1));
    }
}
