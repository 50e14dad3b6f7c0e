//! What every Kafka client of the daemon shares: settings, callbacks, and the first questions to the brokers.

mod cluster;
mod context;
mod limits;
mod mark;
mod settings;

pub use cluster::{check_delivery, check_topics, is_mock, partitions, reach, shape};
pub use context::{Context, DocumentsConsumer, GroupHooks, Hooks, PlainContext};
pub use limits::check_limits;
pub use mark::Mark;
pub use settings::{
    check_properties, client_config, consumer_config, producer_config, request_timeout, setting_error,
    sink_config, transaction_timeout, transactional_id,
};
