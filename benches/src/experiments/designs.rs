//! The experiments: which students each trains. What two of them share is trained once.

use serde::{Serialize, Serializer};
use sluice_trainer::model::Backward;

use super::group::{Group, PRETRAINED, Size};
use super::kind::{Kind, OwnScore};
use super::reference::{Reference, Stream};
use super::setting::{Noise, Setting};

use Backward::{Exact, Kept};
use Kind::{Adaptive, Curated, Documents, Oracle, Own, Plain, Random, Scheduled, Slm, StreamAndCurated};

/// Share that the paper keeps, and the control draws at random.
pub const KEEP: f64 = 0.6;
/// Share that the paper's self-reference keeps by one score.
const OWN_KEEP: f64 = 0.7;
/// The other share that most experiments try.
const FEWER: f64 = 0.3;
/// Tokens of a hundred in documents of mathematics, of the map's cells.
const RARITIES: [u8; 4] = [1, 5, 20, 50];
/// What stands inside these documents, of the map's cells.
const NOISES: [Noise; 4] = [Noise::None, Noise::Unrelated, Noise::Corrupted(10), Noise::Corrupted(30)];

/// Model sizes, over a factor of 36; the second is that of the references and of most students.
const SIZES: [Size; 4] = [
    Size { name: "0.5M", hidden: 48, layers: 3, heads: 3 },
    Size { name: "2M", hidden: 128, layers: 4, heads: 4 },
    Size { name: "7M", hidden: 256, layers: 6, heads: 8 },
    Size { name: "17M", hidden: 384, layers: 8, heads: 12 },
];
const SIZES_QUICK: [Size; 4] = [
    Size { name: "least", hidden: 16, layers: 1, heads: 2 },
    Size { name: "tiny", hidden: 32, layers: 2, heads: 2 },
    Size { name: "small", hidden: 48, layers: 2, heads: 2 },
    Size { name: "more", hidden: 64, layers: 2, heads: 2 },
];

/// One of the experiments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experiment {
    /// Selected tokens against all tokens and random ones, with controls.
    Rules,
    /// How many tokens to keep.
    Shares,
    /// References of another domain than the target.
    References,
    /// Shares that change over the run.
    Schedules,
    /// Sizes of the student.
    Sizes,
    /// The stream as its own reference, and a reference smaller than the student.
    SelfReference,
    /// How single tokens fare.
    Tokens,
    /// Gradients through the kept tokens alone.
    Gradients,
    /// Where it pays: how rare the target is, and how much noise is inside it.
    Map,
    /// A real pretrained model, in the paper's setting.
    Pretrained,
}

impl Experiment {
    /// As the command line and folders name it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Rules => "1",
            Self::Shares => "2",
            Self::References => "3",
            Self::Schedules => "4",
            Self::Sizes => "5",
            Self::SelfReference => "6",
            Self::Tokens => "7",
            Self::Gradients => "8",
            Self::Map => "map",
            Self::Pretrained => "pretrained",
        }
    }

    /// The headline of its results.
    pub fn title(self) -> &'static str {
        match self {
            Self::Rules => "Experiment 1: selected tokens against all tokens and random ones",
            Self::Shares => "Experiment 2: how many tokens to keep",
            Self::References => "Experiment 3: references that do not fit",
            Self::Schedules => "Experiment 4: shares that change over the run",
            Self::Sizes => "Experiment 5: sizes of the student",
            Self::SelfReference => "Experiment 6: the stream as its own reference, and a smaller reference",
            Self::Tokens => "Experiment 7: how single tokens fare",
            Self::Gradients => "Experiment 8: gradients through kept tokens alone",
            Self::Map => "The map: where selection pays",
            Self::Pretrained => "A pretrained model goes on with the noisy stream",
        }
    }

    /// Sizes of its models, the smallest first.
    pub fn sizes(is_quick: bool) -> [Size; 4] {
        if is_quick { SIZES_QUICK } else { SIZES }
    }

    /// Its students.
    pub fn groups(self, is_quick: bool) -> Vec<Group> {
        let design = Design { is_quick, sizes: Self::sizes(is_quick) };
        match self {
            Self::Rules => design.rules(),
            Self::Shares => vec![design.paper(Reference::Curated, &design.shares(), 3)],
            Self::References => {
                let references = [Reference::Curated, Reference::Mismatched, Reference::General];
                let kinds = [Plain, Random(KEEP), Slm(KEEP, Exact), Adaptive(Exact)];
                references.map(|reference| design.paper(reference, &kinds, 3)).into()
            }
            Self::Schedules => vec![design.paper(Reference::Curated, &design.schedules(), 3)],
            Self::Sizes => {
                let kinds = [Plain, Random(KEEP), Slm(KEEP, Exact), Slm(FEWER, Exact), Adaptive(Exact)];
                let sizes = design.sizes;
                sizes.map(|size| Group { size, ..design.paper(Reference::Curated, &kinds, 2) }).into()
            }
            Self::SelfReference => {
                let own = [OwnScore::Loss, OwnScore::Entropy, OwnScore::Intersection, OwnScore::Union];
                let own: Vec<Kind> = [Plain, Random(OWN_KEEP)]
                    .into_iter()
                    .chain(own.map(|score| Own(score, OWN_KEEP)))
                    .collect();
                let kinds = [Plain, Slm(KEEP, Exact), Adaptive(Exact)];
                vec![
                    design.paper(Reference::OwnStream, &own, 3),
                    design.paper(Reference::CuratedSmall, &kinds, 3),
                    design.paper(Reference::Curated, &kinds, 3),
                ]
            }
            Self::Tokens => {
                let kinds = [Plain, Random(KEEP), Slm(KEEP, Exact), Adaptive(Exact)];
                vec![design.paper(Reference::Curated, &kinds, 3)]
            }
            Self::Gradients => {
                let rules: [fn(Backward) -> Kind; 3] =
                    [|backward| Slm(KEEP, backward), |backward| Slm(FEWER, backward), Adaptive];
                let kinds: Vec<Kind> = std::iter::once(Plain)
                    .chain(rules.into_iter().flat_map(|rule| [Exact, Kept].map(rule)))
                    .collect();
                vec![design.paper(Reference::Curated, &kinds, 3)]
            }
            Self::Map => design.map(),
            Self::Pretrained => {
                let kinds = [Plain, Adaptive(Kept), Random(KEEP)];
                let group = design.paper(Reference::Curated, &kinds, 1);
                let (steps, eval_every) = if is_quick { (6, 2) } else { (60, 6) };
                vec![Group { size: PRETRAINED, steps, eval_every, ..group }]
            }
        }
    }
}

impl Serialize for Experiment {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What all designs have in common.
struct Design {
    is_quick: bool,
    sizes: [Size; 4],
}

impl Design {
    /// A group of the usual size, with so many seeds of each kind; the steps are those of the setting.
    fn group(&self, setting: Setting, reference: Reference, kinds: &[Kind], seeds: u64) -> Group {
        let (steps, eval_every) = match (self.is_quick, setting) {
            (true, _) => (12, 4),
            (false, Setting::Scratch) => (320, 16),
            (false, _) => (200, 10),
        };
        Group {
            stream: Stream { setting, reference },
            size: self.sizes[1],
            kinds: kinds.to_vec(),
            steps,
            eval_every,
            seeds: (1..=if self.is_quick { 2 } else { seeds }).collect(),
        }
    }

    /// A group in the paper's setting.
    fn paper(&self, reference: Reference, kinds: &[Kind], seeds: u64) -> Group {
        self.group(Setting::Continual, reference, kinds, seeds)
    }

    fn rules(&self) -> Vec<Group> {
        let common = [Plain, Random(KEEP), Slm(KEEP, Exact), Adaptive(Exact)];
        let controls = [Adaptive(Kept), Slm(FEWER, Kept), Curated, StreamAndCurated, Documents(KEEP), Oracle];
        let (few, fewest): (&[Kind], &[Kind]) =
            if self.is_quick { (&[], &[]) } else { (&[Slm(FEWER, Exact)], &[Slm(0.1, Exact)]) };
        vec![
            self.paper(Reference::Curated, &[&common, few, fewest, &controls].concat(), 5),
            self.group(Setting::ContinualMixed, Reference::Curated, &[&common, few].concat(), 5),
            self.group(Setting::Scratch, Reference::Curated, &[&common, few].concat(), 5),
        ]
    }

    fn shares(&self) -> Vec<Kind> {
        let shares: &[f64] =
            if self.is_quick { &[KEEP, FEWER] } else { &[0.9, 0.8, 0.7, KEEP, 0.5, 0.4, FEWER, 0.2, 0.1] };
        let shares = shares.iter().map(|&keep| Slm(keep, Exact));
        [Plain, Random(KEEP)].into_iter().chain(shares).chain([Adaptive(Exact)]).collect()
    }

    fn schedules(&self) -> Vec<Kind> {
        // Half-way through the run.
        let stairs = if self.is_quick { "steps:0.8,6=0.4" } else { "steps:0.8,100=0.4" };
        let falling = ["linear:0.8:0.4", "linear:0.8:0.2", "cosine:0.8:0.2", stairs, "linear:0.6:0.1"];
        let rising = ["linear:0.2:0.8"];
        let changing = falling.into_iter().chain(rising).map(Scheduled);
        let changing = changing.take(if self.is_quick { 4 } else { usize::MAX });
        [Plain, Slm(KEEP, Exact)].into_iter().chain(changing).chain([Adaptive(Exact)]).collect()
    }

    fn map(&self) -> Vec<Group> {
        let kinds = [Plain, Slm(KEEP, Exact), Slm(FEWER, Exact), Adaptive(Exact)];
        let cells = RARITIES.into_iter().flat_map(|rarity| NOISES.map(|noise| Setting::Map(rarity, noise)));
        // A cell of each rarity and each noise shows that it works.
        let every = if self.is_quick { NOISES.len() + 1 } else { 1 };
        cells.step_by(every).map(|cell| self.group(cell, Reference::Curated, &kinds, 2)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{Experiment, Kind, Noise, Setting};

    const ALL: [Experiment; 10] = [
        Experiment::Rules,
        Experiment::Shares,
        Experiment::References,
        Experiment::Schedules,
        Experiment::Sizes,
        Experiment::SelfReference,
        Experiment::Tokens,
        Experiment::Gradients,
        Experiment::Map,
        Experiment::Pretrained,
    ];

    #[test]
    fn every_group_has_plain_training_and_a_name_of_its_own() {
        for experiment in ALL {
            for is_quick in [false, true] {
                let groups = experiment.groups(is_quick);
                let names: BTreeSet<String> = groups.iter().map(super::Group::name).collect();
                assert_eq!(names.len(), groups.len(), "{experiment:?}");
                for group in &groups {
                    assert_eq!(group.kinds[0], Kind::Plain, "{experiment:?}");
                    let kinds: BTreeSet<String> = group.kinds.iter().map(|kind| kind.name()).collect();
                    assert_eq!(kinds.len(), group.kinds.len(), "{experiment:?}");
                }
            }
        }
    }

    #[test]
    fn the_map_has_every_cell_and_its_smoke_run_every_rarity_and_noise() {
        let cells = |is_quick| -> Vec<Setting> {
            Experiment::Map.groups(is_quick).iter().map(|group| group.stream.setting).collect()
        };
        assert_eq!(cells(false).len(), 16);
        assert_eq!(
            cells(true),
            [
                Setting::Map(1, Noise::None),
                Setting::Map(5, Noise::Unrelated),
                Setting::Map(20, Noise::Corrupted(10)),
                Setting::Map(50, Noise::Corrupted(30)),
            ]
        );
    }

    #[test]
    fn sizes_span_a_factor_of_thirty() {
        let parameters = Experiment::sizes(false).map(|size| size.config(4096).parameters());
        assert!(parameters.is_sorted() && parameters[3] / parameters[0] >= 30, "{parameters:?}");
    }
}
