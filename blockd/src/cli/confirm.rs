//! Asking before something is lost.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::bail;

/// Asks the user to type `expected`.
///
/// # Errors
/// Nobody is there to answer, or the answer is another.
pub(super) fn confirm(question: &str, expected: &str) -> anyhow::Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        bail!("not confirmed: there is no terminal to ask at; say --yes");
    }
    eprint!("{question}\nType {expected} to go on: ");
    io::stderr().flush()?;
    check(&mut stdin.lock(), expected)
}

fn check(input: &mut impl BufRead, expected: &str) -> anyhow::Result<()> {
    let mut answer = String::new();
    input.read_line(&mut answer)?;
    if answer.trim() != expected {
        bail!("not confirmed; nothing was done");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_exact_answer_counts() {
        assert!(check(&mut &b"disk\n"[..], "disk").is_ok());
        for answer in [&b""[..], b"\n", b"y\n", b"disk2\n"] {
            assert!(check(&mut &*answer, "disk").is_err());
        }
    }
}
