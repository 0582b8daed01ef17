//! Errors as sentences for people.

/// The error and its causes, each said once: many errors name their cause themselves and hand it on as well.
pub fn explain(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !text.contains(&cause) {
            if !text.is_empty() {
                text += ": ";
            }
            text += &cause;
        }
    }
    text
}

#[cfg(all(test, feature = "engine"))]
mod tests {
    use super::*;
    use crate::store::{StoreError, StoreErrorKind};
    use anyhow::{Context, anyhow};

    #[test]
    fn nothing_is_said_twice() {
        let store = StoreError::new(StoreErrorKind::Timeout, "put", "a", anyhow!("inner").context("outer"));
        let text = explain(&Err::<(), _>(store).context("cannot open").unwrap_err());
        assert_eq!(text, "cannot open: store put a: Timeout: outer: inner");
    }
}
