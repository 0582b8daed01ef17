//! How far a transfer is.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on stderr over `total` bytes; nothing when stderr is no terminal or `quiet`.
pub(super) fn bar(total: u64, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let template = "{wide_bar} {percent:>3}%  {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta} left ";
    let style = ProgressStyle::with_template(template).expect("the template is right");
    ProgressBar::with_draw_target(Some(total), target).with_style(style)
}

/// A bar on stderr that counts `what`; its length is set later. Nothing when stderr is no terminal or `quiet`.
pub(in crate::cli) fn count_bar(what: &'static str, quiet: bool) -> ProgressBar {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let style = ProgressStyle::with_template("{msg} {wide_bar} {percent:>3}%  {human_pos}/{human_len}  {eta} left ");
    let style = style.expect("the template is right");
    ProgressBar::with_draw_target(Some(0), target).with_style(style).with_message(what)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_template_is_right() {
        super::bar(1, true).finish_and_clear();
        super::count_bar("things", true).finish_and_clear();
    }
}
