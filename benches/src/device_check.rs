//! Does a device train as the CPU does?

use serde_json::{Value, json};
use sluice_trainer::model::{DeviceName, Precision};

use crate::step::{Setup, Size, step};

const VOCABULARY: usize = 512;
const STEPS: usize = 20;

/// Trains a tiny run on a device and on the CPU, and compares the losses of every step.
pub fn check(device: DeviceName, precision: Precision) -> anyhow::Result<Value> {
    let setup = Setup { device, precision, size: Size::Tiny, rows: 4, len: 64, document: None };
    let on_device = losses(&setup)?;
    let on_cpu = losses(&Setup { device: DeviceName::Cpu, precision: Precision::F32, ..setup })?;
    let squares: f64 = on_device.iter().zip(&on_cpu).map(|(a, b)| (a - b).powi(2)).sum();
    let rms = (squares / STEPS as f64).sqrt();
    // By which losses of other engines have been seen to differ, in 32 bits and in 16.
    let allowed = if precision == Precision::F32 { 0.002 } else { 0.03 };
    Ok(json!({
        "device": device.to_string(),
        "precision": precision,
        "losses": on_device,
        "losses_on_cpu": on_cpu,
        "rms_difference_nats": rms,
        "allowed_rms_nats": allowed,
        // Not of a NaN.
        "agrees": rms <= allowed,
    }))
}

fn losses(setup: &Setup) -> anyhow::Result<Vec<f64>> {
    let mut learner = setup.learner(setup.model(VOCABULARY))?;
    let batch = setup.batch(VOCABULARY);
    (0..STEPS)
        .map(|_| Ok(step(&mut learner, &batch, "slm".parse()?)?["loss"].as_f64().unwrap_or(f64::NAN)))
        .collect()
}
