//! Experiment 1 (`target/release/experiment 1`): selective language modeling against plain training and random selection,
//! from text to table and plot, through the real programs. Every part has a folder of its own and a mark once it is done, so
//! that an experiment that was interrupted goes on.

mod arms;
mod bootstrap;
mod budget;
mod gsm8k;
mod kind;
mod options;
mod parts;
mod plan;
mod plot;
mod preparation;
mod programs;
mod results;
mod rows;
mod stages;
mod table;
mod templates;
mod texts;
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
pub use options::Options;
use plan::{Plan, Student};
pub use programs::Interrupted;
use programs::Programs;
use results::Results;
use stages::Stages;

/// Runs whatever of the experiment is not done yet, and writes its results. Returns the table.
pub fn run(options: &Options, stop: &Arc<AtomicBool>) -> anyhow::Result<String> {
    let plan = Plan::of(options).or_usage()?;
    let programs = Programs::find(options, Arc::clone(stop))?;
    if let Some(folder) = &options.gsm8k {
        gsm8k::check(folder)?;
    }
    begin(options, &plan)?;
    let mut stages = Stages::new(&programs, &plan, &options.out);
    stages.prepare(options.gsm8k.as_deref())?;
    let students = plan.students();
    let mut budget = Budget::measure(&plan, stages.predictions_of_evaluation()?)?;
    let todo: Vec<&Student> = students.iter().filter(|student| !stages.is_done(&student.folder())).collect();
    budget.say_start(&plan, &todo);
    for setting in plan.settings() {
        stages.reference(setting)?;
        stages.texts(setting)?;
    }
    for (done, student) in todo.iter().enumerate() {
        stages.say(&format!(
            "{} [{} of {}], {}",
            student.folder().display(),
            done + 1,
            todo.len(),
            budget.left(&todo[done..])
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

/// What of a plan decides its runs, but for how many there are of each kind.
fn without_seeds(mut plan: Value) -> Value {
    for group in plan["groups"].as_array_mut().into_iter().flatten() {
        group["seeds"] = Value::Null;
    }
    plan
}

/// Makes the folder of a new experiment, or sees that what is there is this one.
fn begin(options: &Options, plan: &Plan) -> anyhow::Result<()> {
    std::fs::create_dir_all(&options.out)
        .with_context(|| format!("cannot create {}", options.out.display()))
        .or_usage()?;
    let mut asked = serde_json::to_value(plan).context("cannot encode the plan")?;
    asked["gsm8k"] = options.gsm8k.is_some().into();
    let path = options.out.join("plan.json");
    if path.exists() {
        let before: Value = read_json(&path).or_data()?;
        if without_seeds(before.clone()) != without_seeds(asked.clone()) {
            let error = anyhow!(
                "{} holds an experiment with another plan (plan.json); remove it or give another --out",
                options.out.display()
            );
            return Err(error).or_usage();
        }
        // Seeds can be added, and left out; the runs that are there stay as they are.
        if before != asked {
            write_json(&path, &asked)?;
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
    let table = table::markdown(results);
    write_whole(&options.results.join("README.md"), table.as_bytes())?;
    for (name, svg) in plot::all(results) {
        write_whole(&options.results.join(name), svg.as_bytes())?;
    }
    let reference = plan.reference.config(plan.vocabulary);
    for group in &plan.groups {
        let students = plan.students().into_iter().filter(|student| student.group == *group);
        let runs: Vec<RecordedRun> = students
            .filter(|student| student.seed == group.seeds[0])
            .map(|student| {
                let run = RecordedRun::read(&options.out.join(student.folder()))?;
                // All of one seed, which the title names.
                let rate = student.learning_rate.map_or(String::new(), |rate| format!(", rate {rate}"));
                Ok(RecordedRun { name: student.kind.name() + &rate, ..run })
            })
            .collect::<anyhow::Result<_>>()?;
        let name = format!("{}-{}", group.setting.name(), group.size.name);
        let page =
            report::page(&format!("Experiment 1: {name}, seed {}", group.seeds[0]), &runs, Some(&reference));
        write_whole(&options.out.join(format!("report-{name}.html")), page.as_bytes())?;
    }
    Ok(table)
}
