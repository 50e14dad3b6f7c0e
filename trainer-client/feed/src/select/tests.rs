//! Selections against numpy's (`tests/golden/selection.py`), and properties over inputs drawn by a seeded generator.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use serde::Deserialize;

use super::rank::{Keys, Share};
use super::*;
use crate::random::SplitMix64;

const TURN: Turn = Turn { seed: 7, step: 50, steps: 100, micro_batch: 0 };

fn ratio(value: f64) -> KeepRatio {
    KeepRatio::try_from(value).unwrap()
}

fn selection(score: Score, keep: f64, scope: Scope) -> Objective {
    let rule = Rule::Keep(KeepSchedule::constant(ratio(keep)));
    Objective::Slm(Selection { score, rule, scope, warmup_steps: 0 })
}

/// Lists of one micro-batch, owned.
#[derive(Clone, Deserialize)]
struct Lists {
    loss: Vec<Option<f32>>,
    entropy: Vec<Option<f32>>,
    history_loss: Vec<Option<f32>>,
    reference_loss: Vec<Option<f32>>,
    reference_entropy: Vec<Option<f32>>,
}

#[derive(Deserialize)]
struct Golden {
    row_len: usize,
    steps: u64,
    warmup_steps: u64,
    batch: Vec<Lists>,
    cases: Vec<Case>,
    schedules: BTreeMap<String, Vec<f64>>,
}

#[derive(Deserialize)]
struct Case {
    score: Score,
    keep: Option<KeepRatio>,
    threshold: Option<f32>,
    adaptive: Option<Adaptive>,
    scope: Option<Scope>,
    kept: Vec<Vec<u32>>,
}

fn golden() -> Golden {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/selection.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn with_nan(list: &[Option<f32>]) -> Vec<f32> {
    list.iter().map(|value| value.unwrap_or(f32::NAN)).collect()
}

/// The five lists of a micro-batch in the order of [`Signals`]' fields.
fn numbers(lists: &Lists) -> [Vec<f32>; 5] {
    [&lists.loss, &lists.entropy, &lists.history_loss, &lists.reference_loss, &lists.reference_entropy]
        .map(|list| with_nan(list))
}

fn signals(numbers: &[Vec<f32>; 5]) -> Signals<'_> {
    let [loss, entropy, history_loss, reference_loss, reference_entropy] = numbers;
    Signals { loss, entropy, history_loss, reference_loss, reference_entropy, attribute: &[] }
}

fn kept(choices: Vec<Choice>) -> Vec<Vec<u32>> {
    choices.into_iter().map(|choice| choice.kept).collect()
}

#[test]
fn every_score_and_scope_agrees_with_numpy() {
    let golden = golden();
    let batch: Vec<_> = golden.batch.iter().map(numbers).collect();
    let batch: Vec<_> = batch.iter().map(signals).collect();
    let mut seen = std::collections::BTreeSet::new();
    for case in &golden.cases {
        let rule = match (case.keep, case.threshold, case.adaptive) {
            (Some(keep), None, None) => Rule::Keep(KeepSchedule::constant(keep)),
            (None, Some(threshold), None) => Rule::Threshold(threshold),
            (None, None, Some(rule)) => Rule::Adaptive(rule),
            _ => panic!("a case has one rule"),
        };
        let scope = case.scope.unwrap_or_default();
        let objective = Objective::Slm(Selection { score: case.score, rule, scope, warmup_steps: 0 });
        let mut thresholds = Thresholds::default();
        let found = if scope == Scope::RunningQuantile {
            // Two steps of half the micro-batches each.
            let halves = batch.chunks(batch.len() / 2);
            let steps = halves.flat_map(|half| {
                let choices = objective.select(half, golden.row_len, TURN, &thresholds);
                thresholds.end_step(&choices.iter().map(|choice| choice.lowest).collect::<Vec<_>>());
                kept(choices)
            });
            steps.collect()
        } else {
            kept(objective.select(&batch, golden.row_len, TURN, &thresholds))
        };
        assert_eq!(found, case.kept, "{objective:?}");
        seen.insert(format!("{:?} {scope:?}", std::mem::discriminant(&case.score)));
    }
    assert_eq!(seen.len(), 8 * 4, "every score but random, in every scope");
}

#[test]
fn micro_batches_one_by_one_are_chosen_from_as_together_unless_they_compete() {
    let golden = golden();
    let batch: Vec<_> = golden.batch.iter().map(numbers).collect();
    let batch: Vec<_> = batch.iter().map(signals).collect();
    for scope in [Scope::Sequence, Scope::MicroBatch, Scope::RunningQuantile] {
        for score in [Score::Excess, Score::Union { entropy_keep: None }, Score::Random] {
            if score == Score::Random && scope == Scope::RunningQuantile {
                continue;
            }
            let objective = selection(score, 0.4, scope);
            let mut thresholds = Thresholds::default();
            for step in [TURN, Turn { step: TURN.step + 1, ..TURN }] {
                let together = objective.select(&batch, golden.row_len, step, &thresholds);
                let one_by_one = (0..).zip(&batch).flat_map(|(micro_batch, signals)| {
                    let turn = Turn { micro_batch, ..step };
                    objective.select(&[*signals], golden.row_len, turn, &thresholds)
                });
                let lowest_of =
                    |choices: &[Choice]| choices.iter().map(|choice| choice.lowest).collect::<Vec<_>>();
                let one_by_one: Vec<Choice> = one_by_one.collect();
                let lowest = lowest_of(&together);
                assert_eq!(lowest_of(&one_by_one), lowest);
                assert_eq!(kept(one_by_one), kept(together));
                let reversed: Vec<_> = lowest.iter().rev().copied().collect();
                let mut other = thresholds;
                other.end_step(&reversed);
                thresholds.end_step(&lowest);
                assert_eq!(thresholds, other, "the order of micro-batches decides nothing");
            }
        }
    }
}

#[test]
fn what_the_model_has_no_say_in_is_chosen_the_same_before_it_has_run() {
    let Golden { row_len, batch, .. } = golden();
    let measured: Vec<_> = batch.iter().map(numbers).collect();
    let mut unmeasured = measured.clone();
    for [loss, entropy, history_loss, ..] in &mut unmeasured {
        loss.iter_mut().filter(|loss| !loss.is_nan()).for_each(|loss| *loss = 0.0);
        entropy.clear();
        history_loss.clear();
    }
    let chosen = |objective: &Objective, lists: &[[Vec<f32>; 5]]| {
        let lists: Vec<_> = lists.iter().map(signals).collect();
        kept(objective.select(&lists, row_len, TURN, &Thresholds::default()))
    };
    let entropy_keep = None;
    for score in [
        Score::ReferenceLoss,
        Score::ReferenceEntropy,
        Score::Intersection { entropy_keep },
        Score::Union { entropy_keep },
        Score::Random,
    ] {
        for scope in [Scope::Sequence, Scope::MicroBatch, Scope::Batch] {
            let objective = selection(score, 0.4, scope);
            assert!(objective.chooses_beforehand());
            assert_eq!(chosen(&objective, &unmeasured), chosen(&objective, &measured), "{score:?} {scope:?}");
        }
    }
    for score in [Score::Excess, Score::Loss, Score::Entropy, Score::Improvement] {
        assert!(!selection(score, 0.4, Scope::Batch).chooses_beforehand(), "{score:?}");
    }
    assert!(!Objective::Clm.chooses_beforehand());
}

#[test]
fn an_attribute_is_ranked_on_either_side_and_before_the_forward_pass() {
    let golden = golden();
    let numbers: Vec<_> = golden.batch.iter().map(numbers).collect();
    let negated = |values: &Vec<f32>| values.iter().map(|value| -value).collect::<Vec<f32>>();
    let negated: Vec<_> = numbers.iter().map(|lists| negated(&lists[3])).collect();
    let chosen = |score: Score, rule: Rule, scope: Scope, attribute: &dyn Fn(usize) -> Vec<f32>| {
        let attributes: Vec<Vec<f32>> = (0..numbers.len()).map(attribute).collect();
        let batch: Vec<Signals<'_>> = numbers
            .iter()
            .zip(&attributes)
            .map(|(lists, attribute)| Signals { attribute, ..signals(lists) })
            .collect();
        let objective = Objective::Slm(Selection { score, rule, scope, warmup_steps: 0 });
        assert!(objective.chooses_beforehand() && objective.has_threshold());
        kept(objective.select(&batch, golden.row_len, TURN, &Thresholds::default()))
    };
    let (below, above) = (Score::Attribute { keep: Side::Below }, Score::Attribute { keep: Side::Above });
    // The scores of the reference's losses, which numpy agrees with, are their negatives.
    for (rule, of_value) in [
        (Rule::Keep(KeepSchedule::constant(KeepRatio::try_from(0.4).unwrap())), None),
        (Rule::Threshold(-1.5), Some(Rule::Threshold(1.5))),
    ] {
        for scope in [Scope::Sequence, Scope::MicroBatch, Scope::Batch, Scope::RunningQuantile] {
            let wanted = chosen(Score::ReferenceLoss, rule.clone(), scope, &|_| vec![]);
            assert!(wanted.iter().any(|kept| !kept.is_empty()));
            let on_value = of_value.clone().unwrap_or(rule.clone());
            assert_eq!(chosen(below, on_value, scope, &|index| numbers[index][3].clone()), wanted);
            assert_eq!(chosen(above, rule.clone(), scope, &|index| negated[index].clone()), wanted);
        }
    }
    assert!(!Rule::Adaptive("adaptive".parse().unwrap()).goes_with(above));
}

#[test]
fn a_draw_is_among_the_tokens_with_losses_of_the_reference_or_attributes() {
    let nan = f32::NAN;
    let (loss, reference, attribute) = ([1.0, 2.0, nan, 4.0], [nan, nan, nan, 3.0], [0.5, nan, 0.5, nan]);
    let signals =
        Signals { loss: &loss, reference_loss: &reference, attribute: &attribute, ..Signals::default() };
    let eligible: Vec<bool> = Score::Random.values(&signals).iter().map(|score| !score.is_nan()).collect();
    assert_eq!(eligible, [true, false, false, true]);
}

#[test]
fn every_schedule_agrees_with_numpy() {
    let golden = golden();
    for (text, expected) in &golden.schedules {
        let schedule: KeepSchedule = text.parse().unwrap();
        assert_eq!(schedule.to_string(), *text);
        let rule = Rule::Keep(schedule);
        let (score, scope, warmup_steps) = (Score::Excess, Scope::Batch, golden.warmup_steps);
        let selection = Selection { score, rule, scope, warmup_steps };
        for (step, expected) in (1..).zip(expected) {
            let found = selection.keep_at(step, golden.steps).unwrap().get();
            assert!((found - expected).abs() < 1e-12, "{text} at step {step}: {found} against {expected}");
        }
    }
}

#[test]
fn schedules_that_mean_nothing_are_refused() {
    for (text, expected) in [
        ("1.5", "at most 1"),
        ("linear:0.8", "linear:FROM:TO"),
        ("cosine:0.8:0", "above 0"),
        ("steps:0.8", "ascending steps"),
        ("steps:0.8,50=0.7,50=0.6", "ascending steps"),
        ("steps:0.8,1=0.7", "STEP=KEEP"),
        ("square:0.8:0.6", "is none of"),
        ("", "not a number"),
    ] {
        let error = text.parse::<KeepSchedule>().unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
    }
}

#[test]
fn counts_round_half_up_and_keep_at_least_one() {
    assert_eq!(ratio(0.6).count(0), 0);
    assert_eq!(ratio(0.6).count(5), 3);
    assert_eq!(ratio(0.5).count(5), 3);
    assert_eq!(ratio(0.01).count(5), 1);
    assert_eq!(ratio(1.0).count(5), 5);
    for refused in [0.0, -0.1, 1.01, f64::NAN, f64::INFINITY] {
        assert!(KeepRatio::try_from(refused).is_err(), "{refused}");
    }
}

/// Lists with many ties and about one NaN in four, of up to four micro-batches of one shape.
fn random_batch(generator: &mut SplitMix64) -> (Vec<[Vec<f32>; 5]>, usize) {
    let (rows, row_len) = (1 + generator.below(4), 1 + generator.below(40));
    let mut list = || -> Vec<f32> {
        let value = |generator: &mut SplitMix64| match generator.below(4) {
            0 => f32::NAN,
            _ => generator.below(40) as f32 / 4.0 - 5.0,
        };
        (0..rows * row_len).map(|_| value(generator)).collect()
    };
    let batch = (0..=rows).map(|_| std::array::from_fn(|_| list())).collect();
    (batch, row_len)
}

fn eligible(choice: &Choice) -> usize {
    choice.scores.iter().filter(|score| !score.is_nan()).count()
}

#[test]
fn exactly_k_are_kept_within_the_scope_and_never_one_without_a_score() {
    let mut generator = SplitMix64::keyed(1, 0);
    for _ in 0..300 {
        let (batch, row_len) = random_batch(&mut generator);
        let batch: Vec<_> = batch.iter().map(signals).collect();
        let keep = (1 + generator.below(100)) as f64 / 100.0;
        for score in [Score::Excess, Score::ReferenceLoss, Score::Loss, Score::Entropy, Score::Random] {
            for scope in [Scope::Sequence, Scope::MicroBatch, Scope::Batch] {
                let choices =
                    selection(score, keep, scope).select(&batch, row_len, TURN, &Thresholds::default());
                assert_eq!(choices.len(), batch.len());
                for choice in &choices {
                    assert!(choice.kept.is_sorted_by(|a, b| a < b), "ascending, without repeats");
                    assert!(choice.kept.iter().all(|&index| !choice.scores[index as usize].is_nan()));
                }
                let count = |choice: &Choice| ratio(keep).count(eligible(choice));
                match scope {
                    Scope::Batch => {
                        let all: usize = choices.iter().map(eligible).sum();
                        let kept: usize = choices.iter().map(|choice| choice.kept.len()).sum();
                        assert_eq!(kept, ratio(keep).count(all));
                    }
                    Scope::Sequence => {
                        for choice in choices {
                            for (row, scores) in choice.scores.chunks(row_len).enumerate() {
                                let own =
                                    choice.kept.iter().filter(|&&i| i as usize / row_len == row).count();
                                let scored = scores.iter().filter(|score| !score.is_nan()).count();
                                assert_eq!(own, ratio(keep).count(scored));
                            }
                        }
                    }
                    _ => choices.iter().for_each(|choice| assert_eq!(choice.kept.len(), count(choice))),
                }
            }
        }
    }
}

#[test]
fn permuting_documents_permutes_the_selection() {
    let mut generator = SplitMix64::keyed(3, 0);
    for _ in 0..100 {
        // Distinct scores: ties are broken by position, which a permutation changes.
        let mut values: Vec<f32> = (0..96u8).map(f32::from).collect();
        generator.shuffle(&mut values);
        // Twelve documents of eight tokens in two micro-batches of sequences of two documents.
        let mut order: Vec<usize> = (0..12).collect();
        generator.shuffle(&mut order);
        let permuted: Vec<f32> = order.iter().flat_map(|&from| values[from * 8..][..8].to_vec()).collect();
        let choose = |values: &[f32]| -> Vec<usize> {
            let zeros = [0.0; 48];
            let batch: Vec<_> = values
                .chunks(48)
                .map(|loss| Signals { loss, reference_loss: &zeros, ..Signals::default() })
                .collect();
            let choices =
                selection(Score::Excess, 0.3, Scope::Batch).select(&batch, 16, TURN, &Thresholds::default());
            let flat = choices.iter().enumerate();
            flat.flat_map(|(micro, choice)| choice.kept.iter().map(move |&i| micro * 48 + i as usize))
                .collect()
        };
        let mut moved: Vec<usize> =
            choose(&permuted).into_iter().map(|index| order[index / 8] * 8 + index % 8).collect();
        moved.sort_unstable();
        assert_eq!(moved, choose(&values));
    }
}

#[test]
fn equal_scores_are_kept_from_the_front_whatever_the_sign_of_zero() {
    let top_k = |scores: &[f32]| Keys::of_scores(scores).highest(Share::Ratio(ratio(0.5)));
    assert_eq!(top_k(&[0.0, -0.0, 0.0, -0.0]), [0, 1]);
    assert_eq!(top_k(&[-0.0, 0.0, -0.0, 0.0]), [0, 1]);
    let infinite = [f32::NEG_INFINITY, 1.0, f32::INFINITY, -1.0, f32::NAN];
    assert_eq!(top_k(&infinite), [1, 2]);
}

#[test]
fn warming_up_keeps_every_token_that_could_be_chosen_and_clm_every_prediction() {
    let golden = golden();
    let lists = numbers(&golden.batch[0]);
    let batch = [signals(&lists)];
    let rule = Rule::Keep(KeepSchedule::constant(ratio(0.1)));
    for (score, scope) in [
        (Score::Excess, Scope::Batch),
        (Score::Intersection { entropy_keep: Some(ratio(0.1)) }, Scope::Sequence),
        (Score::Loss, Scope::RunningQuantile),
    ] {
        let objective =
            Objective::Slm(Selection { score, rule: rule.clone(), scope, warmup_steps: TURN.step });
        let choice = &objective.select(&batch, golden.row_len, TURN, &Thresholds::default())[0];
        assert_eq!(choice.kept.len(), eligible(choice));
        assert!(!objective.needs_whole_batch(TURN.step));
        assert_eq!(choice.lowest, Lowest::default(), "what warming up keeps teaches nothing");
    }
    let clm = &Objective::Clm.select(&batch, golden.row_len, TURN, &Thresholds::default())[0];
    assert_eq!(clm.kept.len(), lists[0].iter().filter(|loss| !loss.is_nan()).count());
}

#[test]
fn a_running_threshold_is_a_mean_that_comes_back_from_json_bit_by_bit() {
    let mut running = RunningThreshold::default();
    assert_eq!(running.get(), None);
    for step in [&[1.0, f32::NAN][..], &[1.5, 2.5], &[f32::INFINITY], &[], &[3.0]] {
        running.end_step(step.iter().copied());
    }
    assert_eq!(running.get(), Some(2.0), "the first steps weigh alike, and what is not finite is left out");
    let mut generator = SplitMix64::keyed(5, 0);
    for _ in 0..200 {
        running.end_step([generator.below(1000) as f32 / 7.0].into_iter());
        let text = serde_json::to_string(&running).unwrap();
        let back: RunningThreshold = serde_json::from_str(&text).unwrap();
        assert_eq!(back.get().map(f32::to_bits), running.get().map(f32::to_bits));
    }
}

#[test]
fn a_running_quantile_keeps_the_share_on_average() {
    let mut generator = SplitMix64::keyed(6, 0);
    let objective = selection(Score::Loss, 0.6, Scope::RunningQuantile);
    let mut thresholds = Thresholds::default();
    let (mut kept, mut all) = (0, 0);
    for _ in 0..300 {
        let loss: Vec<f32> = (0..200).map(|_| generator.below(1 << 20) as f32).collect();
        let signals = Signals { loss: &loss, ..Signals::default() };
        let choice = &objective.select(&[signals], 200, TURN, &thresholds)[0];
        thresholds.end_step(&[choice.lowest]);
        kept += choice.kept.len();
        all += loss.len();
    }
    let share = kept as f64 / all as f64;
    // 60,000 uniform draws: the share's standard deviation is about 0.003 with the threshold's own noise.
    assert!((share - 0.6).abs() < 0.015, "{share}");
}

#[test]
fn a_random_draw_is_named_by_seed_step_and_micro_batch_and_favours_no_position() {
    let losses = [0.0; 20];
    let signals = Signals { loss: &losses, reference_loss: &losses, ..Signals::default() };
    let draw = |turn| {
        let objective = selection(Score::Random, 0.25, Scope::MicroBatch);
        kept(objective.select(&[signals], 20, turn, &Thresholds::default()))
    };
    assert_eq!(draw(TURN), draw(TURN));
    let others = [Turn { seed: 8, ..TURN }, Turn { step: 51, ..TURN }, Turn { micro_batch: 1, ..TURN }];
    assert!(others.iter().all(|&other| draw(other) != draw(TURN)));
    let mut counts = [0u32; 20];
    for step in 0..4000 {
        for &index in &draw(Turn { step, ..TURN })[0] {
            counts[index as usize] += 1;
        }
    }
    // 1,000 expected, standard deviation 27: five of them either way.
    assert!(counts.iter().all(|&count| (863..=1137).contains(&count)), "{counts:?}");
}

#[test]
fn an_objective_comes_back_from_json() {
    let objectives = [
        Objective::Clm,
        selection(Score::Union { entropy_keep: Some(ratio(0.3)) }, 0.7, Scope::RunningQuantile),
        Objective::Slm(Selection {
            score: Score::Excess,
            rule: Rule::Threshold(-0.5),
            scope: Scope::Batch,
            warmup_steps: 3,
        }),
    ];
    for objective in objectives {
        let text = serde_json::to_string(&objective).unwrap();
        assert_eq!(serde_json::from_str::<Objective>(&text).unwrap(), objective, "{text}");
    }
}
