//! The report of a few small runs: every section has its numbers, and nothing from outside is read as markup.
#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::collections::BTreeMap;

use sluice_feed::select::{KeepRatio, Objective, Score, Side};
use sluice_schemas::fingerprint::Fingerprint;
use sluice_trainer::model::cost::Cost;
use sluice_trainer::model::{Backward, ModelConfig};
use sluice_trainer::report;
use sluice_trainer::run::histogram::ScoreHistogram;
use sluice_trainer::run::metrics::{EvalMetric, Metric, ScoresMetric, SourceCount, StepMetric};
use sluice_trainer::run::picture::{PictureDocument, PictureToken, TokenPicture};
use sluice_trainer::run::record::RunRecord;
use sluice_trainer::run::recorded::RecordedRun;
use sluice_trainer::run::token_losses::TokenLosses;
use sluice_trainer::training::schedule::{Schedule, Shape};

const STEPS: u64 = 40;
const TOKENS: u64 = 1000;

fn step(number: u64, kept: u64) -> Metric {
    let loss = 3.0 + 5.0 / number as f64;
    Metric::Step(StepMetric {
        step: number,
        tokens: number * TOKENS,
        tokens_kept: number * kept,
        loss: Some(loss as f32),
        loss_all: loss + 0.5,
        loss_selected: Some(loss),
        loss_unselected: (kept < TOKENS).then_some(loss + 1.0),
        threshold: Some(0.25),
        kept,
        scored: TOKENS,
        learning_rate: 1e-3,
        gradient_norm: 1.0,
        seconds: 1.5,
        data_wait_seconds: 0.0,
        cpu_seconds: 1.0,
        sources: BTreeMap::from([
            ("math <i>".to_owned(), SourceCount { kept: kept / 4 * 3, scored: TOKENS / 2 }),
            ("rest".to_owned(), SourceCount { kept: kept - kept / 4 * 3, scored: TOKENS - TOKENS / 2 }),
        ]),
        data: String::new(),
        digest: String::new(),
    })
}

/// A run whose loss on the target falls on a straight line from 8 to `final_loss`.
fn run(name: &str, objective: Objective, final_loss: f64, picture: Option<TokenPicture>) -> RecordedRun {
    let keep = objective.selection().and_then(|selection| selection.keep_at(1, STEPS));
    let kept = (keep.map_or(1.0, KeepRatio::get) * TOKENS as f64) as u64;
    let mut metrics = Vec::new();
    for number in 0..=STEPS {
        if number > 0 {
            metrics.push(step(number, kept));
        }
        if number.is_multiple_of(10) {
            let share = number as f64 / STEPS as f64;
            for (set, last) in [("math & co", final_loss), ("rest", 6.0)] {
                metrics.push(Metric::Eval(EvalMetric {
                    step: number,
                    tokens: number * TOKENS,
                    set: set.to_owned(),
                    loss: 8.0 + share * (last - 8.0),
                    predictions: 99,
                    sure: None,
                }));
            }
        }
    }
    let record = RunRecord {
        command: "run".to_owned(),
        objective,
        seed: 1,
        batch_size: 4,
        accumulate: 1,
        sequence_length: 256,
        schedule: Schedule {
            shape: Shape::Cosine,
            peak: 1e-3,
            warmup_steps: 2,
            decay_steps: 0,
            floor: 0.1,
            steps: STEPS,
        },
        tokenizer: Fingerprint::of_bytes(b"t"),
        reference_model: Some(Fingerprint::of_bytes(b"r")),
        initial_weights: Fingerprint::of_bytes(b"w"),
        settings: BTreeMap::new(),
        versions: BTreeMap::new(),
    };
    RecordedRun { name: name.to_owned(), record, metrics, picture, token_losses: vec![] }
}

fn picture() -> TokenPicture {
    let token = |text: &str, losses: Option<(f32, f32)>, kept| PictureToken {
        text: text.to_owned(),
        reference: losses.map(|(reference, _)| reference),
        current: losses.map(|(_, current)| current),
        excess: losses.map(|(reference, current)| current - reference),
        kept,
    };
    let tokens = vec![
        token("<script>alert(1)</script>", None, false),
        token(" \"q\"\n", Some((0.5, 3.25)), true),
        token("", Some((7.0, 6.0)), false),
    ];
    let document = PictureDocument { id: "d<1>".to_owned(), source: "a&b".to_owned(), tokens };
    TokenPicture { step: STEPS, threshold: Some(0.25), documents: vec![document] }
}

fn keep(ratio: f64) -> KeepRatio {
    KeepRatio::try_from(ratio).unwrap()
}

fn three_runs() -> Vec<RecordedRun> {
    vec![
        run("plain<b>", Objective::Clm, 4.0, None),
        run("slm", Objective::slm(Score::Excess, keep(0.6)), 3.0, Some(picture())),
        run("random", Objective::slm(Score::Random, keep(0.6)), 4.5, None),
    ]
}

#[test]
fn nothing_from_outside_is_read_as_markup() {
    let mut runs = three_runs();
    let mut histogram = ScoreHistogram::default();
    histogram.add(1.0, true);
    runs[1].metrics.push(Metric::Scores(ScoresMetric { step: 1, histogram }));
    runs[1].name = "slm & clm <1>".to_owned();
    runs[1].record.objective = Objective::slm(Score::Excess, keep(0.6));
    let page = report::page("<title> & \"more\"", &runs, None);
    assert!(page.contains("aria-label=\"Scores of slm &amp; clm &lt;1&gt;, step 1\""));
    for raw in ["<script", "plain<b>", "math <i>", "d<1>", "a&b<", "math & co", "<title> &"] {
        assert!(!page.contains(raw), "{raw:?} stands in the page as it came");
    }
    for escaped in
        ["&lt;script&gt;alert(1)", "plain&lt;b&gt;", "math &lt;i&gt;", "d&lt;1&gt;", "math &amp; co"]
    {
        assert!(page.contains(escaped), "{escaped:?} is missing");
    }
    assert!(!page.contains("http"), "no resource from elsewhere");
    for twice in ["&amp;lt;", "&amp;gt;", "&amp;amp;", "&amp;quot;", "&amp;#39;"] {
        assert!(!page.contains(twice), "{twice:?} is escaped twice, and read out as it stands");
    }
}

#[test]
fn every_section_has_its_numbers() {
    let page = report::page("runs", &three_runs(), None);
    // Headline: final losses, tokens, kept tokens, wall time. slm falls from 8 by 5 where clm falls by 4: 0.8.
    for number in ["<b>3.000</b>", ">4.000<", ">4.500<", ">40k<", ">24k<", ">1 min 00 s<", "0.80 of clm"] {
        assert!(page.contains(number), "{number} is missing");
    }
    assert!(page.contains("not reached"), "a run that loses is said to lose");
    assert!(page.contains("slm ended 1.000 nats below plain&lt;b&gt; (3.000 against 4.000)"));
    assert!(page.contains("random ended 0.500 nats above"));
    assert!(page.contains("All runs began with the same weights"));
    // Held-out: two sets, whole and closer, three lines each. Two charts of three lines, and one of two for k.
    assert_eq!(page.matches("<svg").count(), 7);
    assert_eq!(page.matches("<polyline").count(), 4 * 3 + 2 * 3 + 2);
    assert!(page.contains("k over time") && page.contains(">tokens kept, %<"));
    // Settings that differ stand first and in bold; those that do not stand there as well.
    let differing = page.find("<b>random</b>").unwrap();
    assert!(differing < page.find(">sequence_length<").unwrap() && page.contains("<td>256</td>"));
    // Half of the stream, 450 of 500 tokens kept, three quarters of what was kept.
    assert!(["50 %", "90 %", "75 %"].iter().all(|share| page.contains(share)));
    assert!(page.contains("reference 0.50, current 3.25, excess 2.75 nats: kept"));
    assert!(page.contains("reference 7.00, current 6.00, excess -1.00 nats: left out"));
    assert!(page.contains("class=\"n2\"") && page.contains("class=\"p6\"") && page.contains("class=\"r7\""));
}

#[test]
fn the_beginning_of_a_held_out_curve_is_in_its_whole_chart() {
    let page = report::page("runs", &[run("slm", Objective::Clm, 3.0, None)], None);
    // Ten steps between evaluations from 8 down to 3: the first point is the highest, so it lies near the top of the frame,
    // which begins at 14, and not above it.
    let heights = |id: &str| -> Vec<f64> {
        let chart = &page[page.find(&format!("clip-path=\"url(#{id})\"")).unwrap()..];
        let points = chart.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        points.split(' ').map(|point| point.split(',').nth(1).unwrap().parse().unwrap()).collect()
    };
    let whole = heights("eval-0");
    assert!(whole.len() == 5 && whole[0] > 14.0 && whole[0] < 40.0, "{whole:?}");
    assert!(heights("eval-0-closer")[0] < 14.0, "the other chart is closer");
}

#[test]
fn scores_and_categories_have_their_pictures_and_shares() {
    let mut slm = run("slm", Objective::slm(Score::Excess, keep(0.6)), 3.0, None);
    let mut histogram = ScoreHistogram::default();
    for (score, is_kept) in [(1.0, true), (1.1, true), (-0.5, false)] {
        histogram.add(score, is_kept);
    }
    slm.metrics.push(Metric::Scores(ScoresMetric { step: 1, histogram: histogram.clone() }));
    slm.metrics.push(Metric::Scores(ScoresMetric { step: STEPS, histogram }));
    // Before the first step all are high, which must not count. Then one of four tokens falls, one rises, one stays low and one
    // high.
    let at =
        |step, losses: [f32; 4]| TokenLosses { step, set: "math & co".to_owned(), losses: losses.to_vec() };
    slm.token_losses = vec![at(0, [9.0; 4]), at(20, [3.0, 1.0, 0.5, 4.0]), at(40, [2.0, 2.0, 0.5, 4.0])];
    let mut classified =
        run("classified", Objective::slm(Score::Attribute { keep: Side::Below }, keep(0.6)), 3.0, None);
    classified
        .metrics
        .extend(slm.metrics.iter().filter(|metric| matches!(metric, Metric::Scores(_))).cloned());
    let page = report::page("runs", &[slm, classified], None);
    assert!(page.contains("slm, step 1<") && page.contains(&format!("slm, step {STEPS}<")));
    // Probabilities all lie in a few of the bins.
    assert!(page.contains("classified chose by an attribute") && !page.contains("classified, step 1<"));
    assert_eq!(page.matches("<td>25 %</td>").count(), 4, "a quarter of each kind");
    for (kind, last) in [("H→H", "4.00"), ("L→H", "2.00"), ("H→L", "2.00"), ("L→L", "0.50")] {
        let label = format!("{kind} <tspan class=\"value\">{last}</tspan>");
        assert!(page.contains(&label), "{label} is missing");
    }
}

#[test]
fn runs_that_differ_in_their_start_are_said_to_differ() {
    let mut runs = three_runs();
    runs[1].record.initial_weights = Fingerprint::of_bytes(b"other");
    let text = report::text_table(&runs, None);
    assert!(text.contains("Compare with care: the runs differ in their initial weights."), "{text}");
}

#[test]
fn the_table_for_a_terminal_is_aligned() {
    let text = report::text_table(&three_runs(), None);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("run       objective"));
    assert!(
        lines[2].starts_with("slm       slm")
            && lines[2].contains("3.000*")
            && lines[2].contains("0.80 of clm")
    );
}

/// Scoring is counted where its losses are looked at, and the random control pays for none.
#[test]
fn compute_to_the_plain_end_stands_beside_its_tokens() {
    let config = r#"{"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": false}"#;
    let config = ModelConfig::from_hugging_face(config.as_bytes()).unwrap();
    let mut runs = three_runs();
    runs[2] = run("random", Objective::slm(Score::Random, keep(0.6)), 3.0, None);
    for run in &mut runs {
        run.record.settings.insert("model".to_owned(), serde_json::to_value(&config).unwrap());
    }
    let text = report::text_table(&runs, Some(&config));
    let cost = Cost::of(&config, 256);
    let (positions, tokens) = (STEPS * 4 * 256, STEPS * TOKENS);
    let plain = cost.training(positions, tokens, tokens, Backward::Exact);
    let chosen = cost.training(positions, tokens, tokens / 10 * 6, Backward::Exact);
    // Both come down to the plain run's end after 0.8 of its tokens.
    let (random, slm) = (0.8 * chosen / plain, 0.8 * (chosen + cost.scoring(positions)) / plain);
    assert!(random < 0.8 && slm > random);
    for ratio in
        [format!("{random:.2} of clm's"), format!("{slm:.2} of the compute, that of scoring included")]
    {
        assert!(text.contains(&ratio), "{ratio}: {text}");
    }
    assert!(!report::text_table(&runs[..1], Some(&config)).contains("compute to it"));
}

#[test]
fn a_run_that_was_just_begun_has_a_page_too() {
    let mut begun = run("begun", Objective::slm(Score::Excess, keep(0.5)), 3.0, None);
    begun.metrics.clear();
    let page = report::page("runs", &[begun], None);
    assert!(page.contains("begun") && page.contains("No run was evaluated"));
    assert!(report::page("none", &[], None).contains("No run left tokens out."));
}
