//! The experiments (`target/release/experiment N`): selective language modeling against plain training and random selection,
//! from text to table and plot, through the real programs. Every part has a folder of its own and a mark once it is done, so
//! that an experiment that was interrupted goes on, and one that comes later finds what it shares with those before it.

mod arms;
mod bootstrap;
mod budget;
mod cells;
mod designs;
mod further;
mod group;
mod gsm8k;
mod kind;
mod map;
mod options;
mod parts;
mod plan;
mod plot;
mod preparation;
mod programs;
mod reference;
mod results;
mod rows;
mod setting;
mod stages;
mod table;
mod templates;
mod texts;
mod tokens;
mod tried;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, anyhow};
use serde_json::Value;
use sluice_trainer::failure::Classify;
use sluice_trainer::report;
use sluice_trainer::run::files::{read_json, write_json, write_whole};
use sluice_trainer::run::recorded::RecordedRun;

use budget::Budget;
pub use designs::Experiment;
pub use options::Options;
use plan::{Plan, Student};
pub use programs::Interrupted;
use programs::Programs;
use results::Results;
use stages::Stages;

/// Runs whatever of the experiment is not done yet, and writes its results. Returns the table.
pub fn run(options: &Options, stop: &Arc<AtomicBool>) -> anyhow::Result<String> {
    let programs = Programs::find(options, Arc::clone(stop))?;
    let with_base;
    let options = if options.experiment == Experiment::Pretrained && options.base.is_none() {
        let base = programs.script("ops/smollm2", &["--checkpoint"])?;
        with_base = Options { base: Some(base.into()), ..options.clone() };
        &with_base
    } else {
        options
    };
    let plan = Plan::of(options).or_usage()?;
    if let Some(folder) = &options.gsm8k {
        gsm8k::check(folder)?;
    }
    begin(options, &plan)?;
    let mut stages = Stages::new(&programs, &plan, (&options.out, options.base.as_deref()));
    stages.prepare(options.gsm8k.as_deref())?;
    let mut todo = Vec::new();
    for student in plan.students() {
        if !stages.is_student_done(&student)? {
            todo.push(student);
        }
    }
    let mut budget = Budget::measure(&plan, stages.predictions_of_evaluation()?)?;
    let left: Vec<&Student> = todo.iter().collect();
    budget.say_start(&plan, &left);
    for size in plan.bases() {
        stages.base(size)?;
    }
    for stream in plan.streams() {
        stages.reference(stream)?;
        stages.texts(stream)?;
    }
    for (done, student) in todo.iter().enumerate() {
        stages.say(&format!(
            "{} [{} of {}], {}",
            student.folder().display(),
            done + 1,
            todo.len(),
            budget.left(&left[done..])
        ));
        let started = std::time::Instant::now();
        stages.student(student)?;
        budget.took(student, started.elapsed().as_secs_f64());
    }
    let results = Results {
        has_findings: options.results.join("findings.md").is_file(),
        ..Results::read(&plan, &options.out, &options.command)?
    };
    write(options, &plan, &results)
}

/// Makes the folder of new experiments, or sees that those that are there have the same basis.
fn begin(options: &Options, plan: &Plan) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot create {}", options.out.display()))
        .or_usage()?;
    let mut asked = serde_json::to_value(&plan.basis).context("cannot encode the plan")?;
    asked["gsm8k"] = options.gsm8k.is_some().into();
    asked["base"] = options
        .base
        .as_deref()
        .map(std::path::absolute)
        .transpose()?
        .map(|base| base.display().to_string())
        .into();
    let path = options.out.join("plan.json");
    if path.exists() {
        let before: Value = read_json(&path).or_data()?;
        if before != asked {
            let error = anyhow!(
                "{} holds experiments on another basis (plan.json); remove it or give another --out",
                options.out.display()
            );
            return Err(error).or_usage();
        }
        return Ok(());
    }
    let is_empty = std::fs::read_dir(&options.out)
        .with_context(|| format!("cannot list {}", options.out.display()))?
        .next()
        .is_none();
    if !is_empty {
        let error =
            anyhow!("{} is not empty and holds no experiment; give another --out", options.out.display());
        return Err(error).or_usage();
    }
    write_json(&path, &asked)
}

/// Writes data, table and plots, and a report of the first seed's runs of each group beside the runs.
fn write(options: &Options, plan: &Plan, results: &Results) -> anyhow::Result<String> {
    std::fs::create_dir_all(&options.results)
        .with_context(|| format!("cannot create {}", options.results.display()))?;
    write_json(&options.results.join("results.json"), results)?;
    if plan.experiment == Experiment::Map {
        write_json(&options.results.join("map.json"), &map::of(results))?;
    }
    let table = table::markdown(results);
    write_whole(&options.results.join("README.md"), table.as_bytes())?;
    for (name, svg) in plot::all(results) {
        write_whole(&options.results.join(name), svg.as_bytes())?;
    }
    for group in &plan.groups {
        let reference = plan.config(plan.reference_size(group.stream));
        let runs: Vec<RecordedRun> = group
            .kinds
            .iter()
            .flat_map(|&kind| plan.rates().into_iter().map(move |rate| (kind, rate)))
            .map(|(kind, learning_rate)| {
                let student = Student { group: group.clone(), kind, learning_rate, seed: group.seeds[0] };
                let run = RecordedRun::read(&options.out.join(student.folder()))?;
                // All of one seed, which the title names.
                let rate = learning_rate.map_or(String::new(), |rate| format!(", rate {rate}"));
                Ok(RecordedRun { name: kind.name() + &rate, ..run })
            })
            .collect::<anyhow::Result<_>>()?;
        let (experiment, name) = (plan.experiment.name(), group.name());
        let title = format!("Experiment {experiment}: {name}, seed {}", group.seeds[0]);
        let page = report::page(&title, &runs, Some(&reference));
        write_whole(&options.out.join(format!("report-{experiment}-{name}.html")), page.as_bytes())?;
    }
    Ok(table)
}
