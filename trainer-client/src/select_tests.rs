//! Properties of the selection, over inputs drawn by a seeded generator.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use super::{KeepRatio, Objective, excess_losses, random_k, top_k};
use crate::random::SplitMix64;

fn ratio(value: f64) -> KeepRatio {
    KeepRatio::try_from(value).unwrap()
}

/// Scores with many ties and about one NaN in four, of a random length up to 300.
fn random_scores(generator: &mut SplitMix64) -> Vec<f32> {
    let length = generator.below(300);
    (0..length)
        .map(|_| if generator.below(4) == 0 { f32::NAN } else { generator.below(40) as f32 / 4.0 - 5.0 })
        .collect()
}

fn eligible(scores: &[f32]) -> usize {
    scores.iter().filter(|score| !score.is_nan()).count()
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

#[test]
fn keeps_exactly_k_of_the_eligible_and_never_a_nan() {
    let mut generator = SplitMix64::keyed(1, 0);
    for case in 0..500 {
        let scores = random_scores(&mut generator);
        let keep = ratio((1 + generator.below(100)) as f64 / 100.0);
        for kept in [top_k(&scores, keep), random_k(&scores, keep, 7, case)] {
            assert_eq!(kept.len(), keep.count(eligible(&scores)));
            assert!(kept.windows(2).all(|pair| pair[0] < pair[1]), "ascending, without repeats");
            assert!(kept.iter().all(|&index| !scores[index as usize].is_nan()));
        }
    }
}

#[test]
fn agrees_with_a_stable_sort() {
    let mut generator = SplitMix64::keyed(2, 0);
    for _ in 0..300 {
        let scores = random_scores(&mut generator);
        let keep = ratio((1 + generator.below(100)) as f64 / 100.0);
        let mut order: Vec<u32> =
            (0..scores.len() as u32).filter(|&i| !scores[i as usize].is_nan()).collect();
        // A stable sort leaves equal scores in the order of their positions.
        order.sort_by(|&a, &b| scores[b as usize].partial_cmp(&scores[a as usize]).unwrap());
        order.truncate(keep.count(order.len()));
        order.sort_unstable();
        assert_eq!(top_k(&scores, keep), order);
    }
}

#[test]
fn permuting_the_scores_permutes_the_selection() {
    let mut generator = SplitMix64::keyed(3, 0);
    for _ in 0..200 {
        // Distinct scores: ties are broken by position, which a permutation changes.
        let mut scores: Vec<f32> = (0..100u8).map(f32::from).collect();
        generator.shuffle(&mut scores);
        let mut permutation: Vec<usize> = (0..scores.len()).collect();
        generator.shuffle(&mut permutation);
        let permuted: Vec<f32> = permutation.iter().map(|&from| scores[from]).collect();
        let mut moved: Vec<usize> =
            top_k(&permuted, ratio(0.3)).into_iter().map(|index| permutation[index as usize]).collect();
        moved.sort_unstable();
        let direct: Vec<usize> = top_k(&scores, ratio(0.3)).into_iter().map(|index| index as usize).collect();
        assert_eq!(moved, direct);
    }
}

#[test]
fn equal_scores_are_kept_from_the_front_whatever_the_sign_of_zero() {
    assert_eq!(top_k(&[0.0, -0.0, 0.0, -0.0], ratio(0.5)), [0, 1]);
    assert_eq!(top_k(&[-0.0, 0.0, -0.0, 0.0], ratio(0.5)), [0, 1]);
}

#[test]
fn the_highest_excess_is_kept() {
    let current = [5.0, 5.0, 1.0, f32::NAN, 2.0];
    let reference = [4.5, 1.0, 1.0, f32::NAN, f32::NAN];
    assert_eq!(excess_losses(&current, &reference)[..3], [0.5, 4.0, 0.0]);
    assert_eq!(Objective::Slm { keep: ratio(0.34) }.select(&current, &reference, 0, 0), [1]);
    assert_eq!(Objective::Slm { keep: ratio(0.6) }.select(&current, &reference, 0, 0), [0, 1]);
    assert_eq!(Objective::Clm.select(&current, &reference, 0, 0), [0, 1, 2, 4]);
    assert_eq!(Objective::Random { keep: ratio(1.0) }.select(&current, &reference, 0, 0), [0, 1, 2]);
}

#[test]
fn a_random_draw_is_named_by_seed_and_step() {
    let scores = [0.0; 200];
    let draw = |seed, step| random_k(&scores, ratio(0.5), seed, step);
    assert_eq!(draw(1, 5), draw(1, 5));
    assert_ne!(draw(1, 5), draw(1, 6));
    assert_ne!(draw(1, 5), draw(2, 5));
}

#[test]
fn a_random_draw_favours_no_position() {
    let scores = [0.0; 20];
    let mut counts = [0u32; 20];
    for step in 0..4000 {
        for index in random_k(&scores, ratio(0.25), 11, step) {
            counts[index as usize] += 1;
        }
    }
    // 1,000 expected, standard deviation 27: five of them either way.
    assert!(counts.iter().all(|&count| (863..=1137).contains(&count)), "{counts:?}");
}
