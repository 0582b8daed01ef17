//! The `blockd` program. All of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    blockd::cli::run(std::env::args_os())
}
