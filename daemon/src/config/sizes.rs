//! How large batches are, and how much waits for them: what the settings leave open follows from the device and from what
//! they say.

use std::time::Duration;

use sluice_schemas::record::ContextPolicy;

use super::Config;
use crate::batch::Ladder;
use crate::device::Device;

/// Batches to choose from, where nothing else is asked for: the more wait, the less is padded.
const BATCHES_AHEAD: usize = 16;
/// Tokens in flight for each that waits for the model, at least: they are published while others wait.
const IN_FLIGHT_TO_LOOKAHEAD: usize = 4;
/// Fewest tokens in flight, where nothing else is asked for.
const IN_FLIGHT_MIN: usize = 1 << 20;

/// The sizes of a daemon on its device, none of them left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Most tokens of one batch, padding included.
    pub tokens_max: usize,
    /// Tokens that are read ahead and cut into batches.
    pub lookahead_tokens: usize,
    /// Most tokens from reading to committing.
    pub in_flight_tokens: usize,
    /// Longest wait for more documents while the look-ahead is not full.
    pub delay_max: Duration,
    /// Row lengths from one power of two to the next.
    pub length_steps: usize,
    /// Whether batches have one of few numbers of rows too, as on a GPU, which runs each shape once beforehand.
    pub few_shapes: bool,
}

impl Sizes {
    /// The shapes that batches are padded to.
    pub fn ladder(&self, context: ContextPolicy) -> Ladder {
        let ladder = Ladder::new(context.window as usize, self.length_steps);
        if self.few_shapes { ladder.with_few_rows(self.tokens_max) } else { ladder }
    }
}

impl Config {
    /// The device, once it is known to be one (`problems`).
    fn device(&self) -> Device {
        self.model.device.parse().unwrap_or(Device::Cpu)
    }

    /// The sizes on the device that is asked for. A setting of 0 follows from the others and from the device.
    ///
    /// On a CPU a batch of 4,096 tokens keeps every core busy, and larger ones leave its caches. A GPU wants many more: at
    /// 4,096 tokens a small model is over before the next kernel has been started.
    pub fn sizes(&self) -> Sizes {
        let is_gpu = self.device() != Device::Cpu;
        let or = |asked: usize, else_: usize| if asked == 0 { else_ } else { asked };
        let (batch, asked_in_flight) = (&self.batch, self.limits.in_flight_tokens);
        let room = or(batch.lookahead_tokens, or(asked_in_flight, usize::MAX));
        let tokens_max = or(batch.tokens_max, if is_gpu { 65_536 } else { 4096 }.min(room));
        let lookahead = BATCHES_AHEAD.saturating_mul(tokens_max).min(or(asked_in_flight, usize::MAX));
        let lookahead_tokens = or(batch.lookahead_tokens, lookahead);
        let in_flight = IN_FLIGHT_TO_LOOKAHEAD.saturating_mul(lookahead_tokens).max(IN_FLIGHT_MIN);
        Sizes {
            tokens_max,
            lookahead_tokens,
            in_flight_tokens: or(asked_in_flight, in_flight),
            delay_max: Duration::from_millis(batch.delay_ms_max),
            length_steps: or(batch.length_steps, if is_gpu { 8 } else { 16 }),
            few_shapes: is_gpu,
        }
    }

    /// What can be said against the sizes, both numbers named.
    pub(super) fn size_problems(&self) -> Vec<String> {
        let Sizes { tokens_max, lookahead_tokens, in_flight_tokens, .. } = self.sizes();
        let mut problems = Vec::new();
        if lookahead_tokens < tokens_max {
            problems.push(format!(
                "batch.lookahead_tokens ({lookahead_tokens}) is less than batch.tokens_max ({tokens_max}): no batch would ever \
                 be full; give it several times as much, or leave it out"
            ));
        }
        if in_flight_tokens < lookahead_tokens {
            problems.push(format!(
                "limits.in_flight_tokens ({in_flight_tokens}) is less than batch.lookahead_tokens ({lookahead_tokens}): the \
                 look-ahead would never be full; lower the one, raise the other, or leave one out"
            ));
        }
        let window = self.score.window_tokens as usize;
        if window > tokens_max {
            problems.push(format!(
                "score.window_tokens ({window}) is more than batch.tokens_max ({tokens_max}): the longest window must fit a batch"
            ));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(device: &str, tokens_max: usize, lookahead: usize, in_flight: usize) -> [usize; 3] {
        let mut config = Config::default();
        device.clone_into(&mut config.model.device);
        config.batch.tokens_max = tokens_max;
        config.batch.lookahead_tokens = lookahead;
        config.limits.in_flight_tokens = in_flight;
        let Sizes { tokens_max, lookahead_tokens, in_flight_tokens, .. } = config.sizes();
        [tokens_max, lookahead_tokens, in_flight_tokens]
    }

    #[test]
    fn what_is_left_open_follows_from_the_device_and_from_what_is_said() {
        let gpu = "cuda:0";
        assert_eq!(sizes("cpu", 0, 0, 0), [4096, 65_536, 1 << 20]);
        assert_eq!(sizes(gpu, 0, 0, 0), [65_536, 1 << 20, 4 << 20]);
        assert_eq!(sizes(gpu, 16_384, 0, 0), [16_384, 262_144, 1 << 20]);
        assert_eq!(sizes(gpu, 0, 10_000, 0), [10_000, 10_000, 1 << 20]);
        assert_eq!(sizes("cpu", 0, 0, 1100), [1100, 1100, 1100]);
        assert_eq!(sizes("cpu", 64, 128, 256), [64, 128, 256]);
    }

    #[test]
    fn sizes_that_contradict_one_another_are_refused_with_both_numbers() {
        let problems = |tokens_max, lookahead, in_flight, window| {
            let mut config = Config::default();
            (config.batch.tokens_max, config.batch.lookahead_tokens) = (tokens_max, lookahead);
            (config.limits.in_flight_tokens, config.score.window_tokens) = (in_flight, window);
            config.size_problems()
        };
        assert!(problems(0, 0, 0, 4096).is_empty());
        for (problem, numbers) in [
            (problems(500, 400, 0, 0), ["(400)", "(500)"]),
            (problems(500, 600, 550, 0), ["(550)", "(600)"]),
            (problems(0, 0, 0, 4097), ["(4097)", "(4096)"]),
        ] {
            assert!(
                problem.len() == 1 && numbers.iter().all(|number| problem[0].contains(number)),
                "{problem:?}"
            );
        }
    }
}
