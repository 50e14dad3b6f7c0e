//! Measurements of Sluice; see `README.md` beside this crate.
