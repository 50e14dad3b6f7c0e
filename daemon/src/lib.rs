//! The daemon: reads tokenized documents from Kafka, scores every token with a reference model, and publishes the
//! losses. See ARCHITECTURE.md for the way a record takes through these modules.

pub mod assemble;
pub mod batch;
pub mod cli;
pub mod config;
pub mod dead_letters;
pub mod dev_broker;
pub mod device;
pub mod device_memory;
pub mod dispatch;
pub mod exit;
pub mod health;
pub mod http;
pub mod ingest;
pub mod job;
pub mod kafka;
mod last_answer;
pub mod ledger;
pub mod logging;
pub mod metrics;
pub mod model_tools;
pub mod notice;
pub mod outcome;
pub mod pipeline;
pub mod reference;
pub mod reload;
pub mod score;
pub mod serve;
pub mod sink;
pub mod source;
pub mod systemd;
pub mod tokenizer;
pub mod topics;
