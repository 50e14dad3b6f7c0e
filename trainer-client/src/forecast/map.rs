//! The map of an experiment (`experiment map`): in which streams selection has paid, by how rare the target is in them and by
//! what else stands inside its documents; and where a stream of one's own lies in it.

use anyhow::Context;
use serde::{Deserialize, Serialize};

/// As the experiment has written it.
const EMBEDDED: &str = include_str!("map.json");

/// The whole map; without cells until the experiment has run.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Map {
    /// The command that made it.
    pub command: String,
    /// What was trained.
    pub model: String,
    /// A cell for each stream.
    pub cells: Vec<Cell>,
}

/// One stream.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cell {
    /// Tokens of a hundred in documents of the target.
    pub rarity_percent: u8,
    /// What else stands inside them.
    pub noise: Noise,
    /// What each rule takes.
    pub rules: Vec<RuleRatio>,
    /// Plain training against itself with other seeds: the interval of what is chance. An end that is absent is "never".
    pub null: [Option<f64>; 2],
}

/// What stands inside documents of the target beside the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Noise {
    /// Nothing.
    #[serde(rename = "none")]
    None,
    /// The beginning of an unrelated document.
    #[serde(rename = "unrelated")]
    Unrelated,
    /// One word in ten wrong: other digits in a number, a mistyped word.
    #[serde(rename = "corrupted-10")]
    Corrupted10,
    /// Three words in ten.
    #[serde(rename = "corrupted-30")]
    Corrupted30,
}

impl Noise {
    /// Every level, the cleanest first.
    pub const ALL: [Self; 4] = [Self::None, Self::Unrelated, Self::Corrupted10, Self::Corrupted30];

    /// In words.
    pub fn words(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Unrelated => "unrelated text",
            Self::Corrupted10 => "10 % of words wrong",
            Self::Corrupted30 => "30 % of words wrong",
        }
    }
}

/// Tokens until a rule has reached plain training's final loss on the target, over those of plain training, with a 95 %
/// interval. An absent number is "never".
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RuleRatio {
    /// Name of the rule.
    pub rule: String,
    /// The ratio.
    pub tokens: Option<f64>,
    /// Lower end.
    pub low: Option<f64>,
    /// Upper end.
    pub high: Option<f64>,
}

impl RuleRatio {
    /// Whether its interval and that of chance alone overlap, so that it says nothing.
    pub fn overlaps(&self, null: [Option<f64>; 2]) -> bool {
        let [null_low, null_high] = null.map(number);
        number(self.low) <= null_high && null_low <= number(self.high)
    }
}

/// What never happened is above all numbers.
fn number(end: Option<f64>) -> f64 {
    end.unwrap_or(f64::INFINITY)
}

/// The cells that a stream is nearest to: a row of the map, from the cleanest on.
#[derive(Clone, Debug, PartialEq)]
pub struct Near<'a> {
    /// The row's rarity, in tokens of a hundred.
    pub rarity_percent: u8,
    /// Whether the stream's target is rarer or more frequent than in any row.
    pub is_outside: bool,
    /// Its cells.
    pub cells: Vec<&'a Cell>,
}

impl Map {
    /// The map that this program was built with.
    pub fn embedded() -> anyhow::Result<Self> {
        serde_json::from_str(EMBEDDED).context("the map that this program was built with cannot be read")
    }

    /// The row whose rarity is nearest to a share of the tokens above 0, on a logarithmic scale: twice as rare is as far as
    /// twice as frequent. `None` where the map is empty, or the share 0.
    ///
    /// How much noise is inside the target's documents cannot be told from the losses: a token may have an excess below 0
    /// because it is noise, or because the reference is no better on it. So no level is guessed, and all are given.
    pub fn near(&self, share: f64) -> Option<Near<'_>> {
        if share <= 0.0 {
            return None;
        }
        let percent = 100.0 * share;
        let rarities = || self.cells.iter().map(|cell| cell.rarity_percent);
        let distance = |rarity: u8| (f64::from(rarity) / percent).ln().abs();
        let nearest = rarities().min_by(|one, other| distance(*one).total_cmp(&distance(*other)))?;
        let is_rarer = rarities().all(|rarity| percent < f64::from(rarity));
        let is_more_frequent = rarities().all(|rarity| percent > f64::from(rarity));
        let is_outside = is_rarer || is_more_frequent;
        let mut cells: Vec<&Cell> = self.cells.iter().filter(|cell| cell.rarity_percent == nearest).collect();
        cells.sort_by_key(|cell| cell.noise);
        Some(Near { rarity_percent: nearest, is_outside, cells })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

    use std::collections::BTreeSet;

    use super::{Map, Noise, RuleRatio};

    /// Rows of the experiment.
    const RARITIES: [u8; 4] = [1, 5, 20, 50];

    fn map() -> Map {
        let cell = |rarity: u8, noise: &str| {
            format!(
                r#"{{"rarity_percent":{rarity},"noise":"{noise}","rules":[{{"rule":"adaptive","tokens":0.3,"low":0.2,
                "high":null}}],"null":[0.9,null]}}"#
            )
        };
        // In no order.
        let cells: Vec<String> = RARITIES
            .into_iter()
            .flat_map(|rarity| {
                ["unrelated", "corrupted-30", "none", "corrupted-10"].map(|noise| cell(rarity, noise))
            })
            .collect();
        let text = format!(r#"{{"command":"c","model":"m","cells":[{}]}}"#, cells.join(","));
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn the_embedded_map_is_empty_or_whole() {
        let map = Map::embedded().unwrap();
        if map.cells.is_empty() {
            return;
        }
        assert!(!map.command.is_empty() && !map.model.is_empty());
        let places: BTreeSet<(u8, Noise)> =
            map.cells.iter().map(|cell| (cell.rarity_percent, cell.noise)).collect();
        let expected = RARITIES.into_iter().flat_map(|rarity| Noise::ALL.map(|noise| (rarity, noise)));
        assert_eq!(places, expected.collect());
        assert_eq!(map.cells.len(), places.len(), "no cell stands there twice");
        for cell in &map.cells {
            let rules: Vec<&str> = cell.rules.iter().map(|rule| rule.rule.as_str()).collect();
            assert!(["adaptive", "slm-60", "slm-30"].iter().all(|rule| rules.contains(rule)), "{rules:?}");
            for rule in &cell.rules {
                let mut numbers = [rule.low, rule.tokens, rule.high].into_iter().flatten();
                assert!(numbers.all(|number| number > 0.0), "{rule:?}");
            }
        }
    }

    #[test]
    fn a_stream_lies_in_the_row_of_the_nearest_rarity_on_a_logarithmic_scale() {
        let map = map();
        // Half-way between 1 and 5 is their geometric mean, 2.236.
        for (share, row, is_outside) in [
            (0.0001, 1, true),
            (0.01, 1, false),
            (0.022, 1, false),
            (0.023, 5, false),
            (0.09, 5, false),
            (0.11, 20, false),
            (0.31, 20, false),
            (0.32, 50, false),
            (0.9, 50, true),
        ] {
            let near = map.near(share).unwrap();
            assert_eq!((near.rarity_percent, near.is_outside), (row, is_outside), "{share}");
            let noises: Vec<Noise> = near.cells.iter().map(|cell| cell.noise).collect();
            assert_eq!(noises, Noise::ALL, "all levels, the cleanest first");
        }
        assert_eq!(map.near(0.0), None);
        assert_eq!(Map { cells: vec![], ..map }.near(0.1), None);
    }

    #[test]
    fn what_overlaps_the_null_says_nothing() {
        let ratio = |low, high| RuleRatio { rule: "adaptive".to_owned(), tokens: low, low, high };
        let null = [Some(0.9), Some(1.2)];
        for (low, high, expected) in [
            (Some(0.2), Some(0.8), false),
            (Some(0.2), Some(0.9), true),
            (Some(1.0), Some(1.1), true),
            (Some(1.3), Some(1.4), false),
            // In some draws it never got there.
            (Some(0.5), None, true),
            (None, None, false),
        ] {
            assert_eq!(ratio(low, high).overlaps(null), expected, "{low:?} to {high:?}");
        }
        assert!(ratio(None, None).overlaps([Some(0.9), None]), "as little as plain training does");
    }

    #[test]
    fn what_the_map_does_not_know_is_an_error() {
        for wrong in [r#"{"command":"","model":"","cells":[],"more":1}"#, r#"{"cells":[]}"#] {
            assert!(serde_json::from_str::<Map>(wrong).is_err(), "{wrong}");
        }
        assert!(serde_json::from_str::<Noise>(r#""corrupted-20""#).is_err());
    }
}
