//! `fsd serve`.
