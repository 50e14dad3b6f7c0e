//! How both programs reach Kafka: secrets that are kept in files, tokens for OAUTHBEARER, whether there is TLS, and which
//! topic a name stands for.
//!
//! Everything is a property of librdkafka, under its own name. Two things go beyond it: `NAME.from_file = PATH` gives
//! the property `NAME` what is in the file, and `sasl.oauthbearer.config = file=PATH` names a file with a JSON Web Token.

mod oauth;
mod properties;
mod topic_ids;

pub use oauth::{TokenError, oauth_token};
pub use properties::{PropertyError, resolve};
pub use topic_ids::{DEBUG_METADATA, MadeAnew, TopicIds, listen};

/// Whether this build can speak TLS and SASL.
pub const TLS: bool = cfg!(feature = "tls");

/// What to add to a complaint about the property `key`, where a build with TLS would have taken it.
pub fn hint(key: &str) -> &'static str {
    let secure = key == "security.protocol" || ["ssl.", "sasl."].iter().any(|prefix| key.starts_with(prefix));
    if secure && !TLS {
        "; this build has no TLS and SASL, which `cargo build --features tls` adds"
    } else {
        ""
    }
}
