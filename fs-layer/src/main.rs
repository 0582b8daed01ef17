//! The `fsd` program. All of it is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    fs_layer::cli::run(std::env::args_os())
}
