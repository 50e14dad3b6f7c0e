#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use sluice_feed::sources::SourceNames;

use super::super::map::{Cell, Map, Noise, RuleRatio};
use super::super::page::page;
use super::super::sample::{Compared, DocumentSums, Ending, Sample};
use super::{About, Forecast, Verdict};

/// A sample of documents, each with its source and the losses of its tokens: the base model's and the reference's.
fn sample(documents: &[(&str, &[(f32, f32)])]) -> Sample {
    let mut names = SourceNames::default();
    let mut compared = Compared::default();
    let sums = documents.iter().map(|(source, tokens)| {
        let source = names.index(source);
        let mut sums = DocumentSums { source, ..DocumentSums::default() };
        for &(base, reference) in *tokens {
            sums.tokens += 1;
            sums.compared += 1;
            sums.base += f64::from(base);
            sums.reference += f64::from(reference);
            compared.base.push(base);
            compared.reference.push(reference);
            compared.sources.push(source);
        }
        sums
    });
    let documents = sums.collect();
    Sample { names, documents, compared, has_base: true, reference_model: None, ending: Ending::StreamEnded }
}

fn about(targets: &[&str]) -> About {
    About {
        documents_of: "topic scored".to_owned(),
        base_model: Some("base".to_owned()),
        sequence_length: Some(8),
        target_sources: targets.iter().map(|&target| target.to_owned()).collect(),
        with_base: "sluice-train forecast --init BASE_FOLDER".to_owned(),
    }
}

fn no_map() -> Map {
    Map { command: String::new(), model: String::new(), cells: vec![] }
}

/// A map of two rows, whose ratio is the row's rarity.
fn two_rows() -> Map {
    let cell = |rarity_percent: u8, noise| {
        let tokens = Some(f64::from(rarity_percent) / 100.0);
        let rule = RuleRatio { rule: "adaptive".to_owned(), tokens, low: tokens, high: tokens };
        let never = RuleRatio { rule: "slm-30".to_owned(), tokens: None, low: Some(0.8), high: None };
        Cell { rarity_percent, noise, rules: vec![rule, never], null: [Some(0.9), None] }
    };
    let cells = [5, 20].into_iter().flat_map(|rarity| Noise::ALL.map(|noise| cell(rarity, noise)));
    Map { command: "experiment map".to_owned(), model: "2M".to_owned(), cells: cells.collect() }
}

/// Five documents of mathematics, on which the reference is better by 1 nat a token but for one token in each, and fifteen of
/// prose, on which it is worse by 1.
fn stream() -> Sample {
    let math: &[(f32, f32)] = &[(3.0, 1.0), (3.0, 1.0), (1.0, 2.0)];
    let prose: &[(f32, f32)] = &[(2.0, 3.0); 3];
    let mut documents = vec![("math", math); 5];
    documents.extend([("prose", prose); 15]);
    sample(&documents)
}

#[test]
fn what_is_kept_and_where_it_falls_is_counted_by_source() {
    let found = Forecast::of(&stream(), about(&[]), &no_map()).unwrap();
    let names: Vec<&str> = found.sources.iter().map(|source| source.source.as_str()).collect();
    assert_eq!(names, ["math", "prose"], "the highest mean excess first");
    let [math, prose] = [0, 1].map(|index| found.sources[index].against_base.as_ref().unwrap());
    assert_eq!((math.base_loss, math.excess.mean), (7.0 / 3.0, 1.0));
    assert_eq!((prose.excess.mean, prose.share_below_zero), (-1.0, 1.0));
    assert!((math.share_below_zero - 1.0 / 3.0).abs() < 1e-12);
    // Ten tokens of sixty have an excess of at least 0, all of them mathematics.
    let all = found.all.against_base.as_ref().unwrap();
    assert_eq!((all.kept["adaptive"].tokens, math.kept["adaptive"].tokens), (10, 10));
    assert_eq!((all.excess_of_kept, all.excess_of_rest), (Some(2.0), Some(-1.0)));
    // Three tokens in ten are eighteen: those ten, and of the others, which are equal, the first eight: five of mathematics.
    assert_eq!((all.kept["0.3"].tokens, math.kept["0.3"].tokens), (18, 15));
    assert_eq!((all.kept["0.6"].tokens, math.kept["0.6"].tokens), (36, 15));
    assert_eq!(found.verdict, Verdict::MayHelp);
    assert!(found.headline.contains("math (25.0 % of the tokens)"), "{}", found.headline);
    let said = "`--keep adaptive` would begin with 16.7 % of all tokens, and 100.0 % of those lie there";
    assert!(found.headline.contains(said), "{}", found.headline);
}

#[test]
fn the_adaptive_rule_keeps_its_least_share_where_nothing_is_above_0() {
    let worse: &[(f32, f32)] = &[(1.0, 2.0); 4];
    let found = Forecast::of(&sample(&[("a", worse); 10]), about(&[]), &no_map()).unwrap();
    let all = found.all.against_base.as_ref().unwrap();
    assert_eq!(all.kept["adaptive"].tokens, 2, "5 % of 40");
    assert_eq!(found.verdict, Verdict::NotExpectedToHelp);
}

#[test]
fn a_reference_that_is_no_better_is_said_in_the_first_line() {
    let first = |found: &Forecast| page(found).lines().next().unwrap().to_owned();
    let not_on = Forecast::of(&stream(), about(&["prose"]), &two_rows()).unwrap();
    assert_eq!(not_on.verdict, Verdict::NotExpectedToHelp);
    let said = first(&not_on);
    for part in ["cannot be expected to help on prose", "it is worse", "-1.000 nats", "95 %"] {
        assert!(said.contains(part), "{part} is not in: {said}");
    }
    // On one of two is not enough.
    let one_of_two = Forecast::of(&stream(), about(&["math", "prose"]), &two_rows()).unwrap();
    assert_eq!(one_of_two.verdict, Verdict::NotExpectedToHelp);
    assert!(first(&one_of_two).contains("help on prose:"), "{}", first(&one_of_two));
    let on_math = Forecast::of(&stream(), about(&["math"]), &two_rows()).unwrap();
    assert_eq!(on_math.verdict, Verdict::MayHelp);

    // Four documents are too few for an interval, however much better the reference is.
    let better: &[(f32, f32)] = &[(9.0, 1.0); 3];
    let few = Forecast::of(&sample(&[("a", better); 4]), about(&[]), &two_rows()).unwrap();
    assert_eq!((few.verdict, few.target.is_none()), (Verdict::NotExpectedToHelp, true));
    assert!(first(&few).starts_with("Selection cannot be expected to help: on no source"), "{}", first(&few));
    let few = Forecast::of(&sample(&[("a", better); 4]), about(&["a"]), &two_rows()).unwrap();
    assert!(first(&few).contains("too few documents to tell"), "{}", first(&few));
}

#[test]
fn small_sources_that_are_named_together_are_judged_together() {
    let better: &[(f32, f32)] = &[(9.0, 1.0); 3];
    let worse: &[(f32, f32)] = &[(1.0, 9.0); 3];
    let mut documents = vec![("a", better), ("b", better), ("a", better), ("b", better), ("a", better)];
    let both = Forecast::of(&sample(&documents), about(&["a", "b"]), &no_map()).unwrap();
    assert_eq!(both.verdict, Verdict::MayHelp);
    let one = Forecast::of(&sample(&documents), about(&["a"]), &no_map()).unwrap();
    assert_eq!(one.verdict, Verdict::NotExpectedToHelp);
    documents.extend([("b", worse); 5]);
    let both = Forecast::of(&sample(&documents), about(&["a", "b"]), &no_map()).unwrap();
    assert_eq!(both.verdict, Verdict::NotExpectedToHelp);
}

#[test]
fn a_reference_that_is_better_on_most_of_the_stream_leaves_little_out() {
    let better: &[(f32, f32)] = &[(9.0, 1.0); 3];
    let said = |targets: &[&str]| {
        Forecast::of(&sample(&[("a", better); 9]), about(targets), &no_map()).unwrap().headline
    };
    assert!(said(&[]).contains("That is most of the stream"), "{}", said(&[]));
    assert!(!said(&["a"]).contains("most of the stream"), "{}", said(&["a"]));
    let on_math = Forecast::of(&stream(), about(&[]), &no_map()).unwrap().headline;
    assert!(!on_math.contains("most of the stream"), "{on_math}");
}

#[test]
fn a_target_that_is_not_in_the_sample_is_named_with_what_is() {
    let found = Forecast::of(&stream(), about(&["math", "maths"]), &two_rows()).unwrap();
    assert_eq!(found.verdict, Verdict::TargetNotSeen);
    for part in ["None of the 20 documents is of maths", "math, prose", "--target-source"] {
        assert!(found.headline.contains(part), "{part} is not in: {}", found.headline);
    }
}

#[test]
fn the_stream_is_placed_by_the_share_of_its_target() {
    // A quarter of the tokens: nearer to 20 % than to 5 %, and beyond it.
    let found = Forecast::of(&stream(), about(&[]), &two_rows()).unwrap();
    let target = found.target.as_ref().unwrap();
    assert_eq!((target.sources.as_slice(), target.share_of_tokens), (&["math".to_owned()][..], 0.25));
    let row = found.map.as_ref().unwrap();
    assert_eq!((row.rarity_percent, row.is_outside, row.cells.len()), (20, true, 4));
    let says_nothing: Vec<bool> = row.cells[0].rules.iter().map(|rule| rule.says_nothing).collect();
    assert_eq!(says_nothing, [false, true]);
    let text = page(&found);
    for part in [
        "the nearest row of the map is 20 %, beyond which this stream lies",
        "33.3 % of the tokens there have an excess below 0",
        "0.20   0.20 to 0.20  0.90 to never  fewer tokens",
        "never  0.80 to never  0.90 to never  says nothing",
        "30 % of words wrong",
        "overlaps the null says nothing",
    ] {
        assert!(text.contains(part), "{part} is not in:\n{text}");
    }
    // A target that was named is placed even where the reference is no better on it.
    let prose = Forecast::of(&stream(), about(&["prose"]), &two_rows()).unwrap();
    let target = prose.target.unwrap();
    assert_eq!((target.share_of_tokens, target.share_below_zero), (0.75, 1.0));
}

#[test]
fn a_map_that_was_not_measured_gives_no_number() {
    let found = Forecast::of(&stream(), about(&[]), &no_map()).unwrap();
    assert!(!found.is_map_measured && found.map.is_none());
    let text = page(&found);
    assert!(text.contains("has not been measured in this build"), "{text}");
    for absent in ["null", "plain training", "small model"] {
        assert!(!text.contains(absent), "{absent} is in:\n{text}");
    }
}

#[test]
fn without_a_base_model_nothing_is_said_of_what_is_kept() {
    let sample = Sample { has_base: false, compared: Compared::default(), ..stream() };
    let found = Forecast::of(&sample, about(&[]), &two_rows()).unwrap();
    assert_eq!(found.verdict, Verdict::NoBaseModel);
    let text = page(&found);
    assert!(text.starts_with("Without the model that will be trained nobody can say"), "{text}");
    assert!(text.contains("sluice-train forecast --init BASE_FOLDER"), "{text}");
    assert!(!text.contains("adaptive") && !text.contains("In the map"), "{text}");
    let names: Vec<&str> = found.sources.iter().map(|source| source.source.as_str()).collect();
    assert_eq!(names, ["prose", "math"], "the largest first");
    assert_eq!(found.all.reference_loss, Some((5.0 * 4.0 + 15.0 * 9.0) / 60.0));
}

#[test]
fn a_sample_of_which_nothing_can_be_compared_is_an_error() {
    let error = Forecast::of(&sample(&[("a", &[])]), about(&[]), &no_map()).unwrap_err();
    assert!(error.to_string().contains("no token that can be compared"), "{error}");
}
