//! The version that every record carries.

/// The only version of the records' meaning so far.
pub const SCHEMA_VERSION: u32 = 1;
