//! `fsd check`.
