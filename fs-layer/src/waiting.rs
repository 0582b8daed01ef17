//! A word before a thread waits.
//!
//! An export that lets one thread do quick work itself, because handing it over would cost more, wants to know when the work turns out
//! not to be quick. Whoever is about to wait, for the disk, for a lock or for a commit, calls [`about_to_wait`]; what the export has asked for with
//! [`on_wait`] then happens, once for each [`arm`].

use std::cell::{Cell, RefCell};
use std::rc::Rc;

thread_local! {
    static HOOK: RefCell<Option<Rc<dyn Fn()>>> = const { RefCell::new(None) };
    static ARMED: Cell<bool> = const { Cell::new(false) };
}

/// What happens when this thread is about to wait.
pub fn on_wait(hook: impl Fn() + 'static) {
    HOOK.with_borrow_mut(|of| *of = Some(Rc::new(hook)));
}

/// Whether it happens the next time.
pub fn arm(on: bool) {
    ARMED.set(on);
}

/// This thread is about to wait for something.
#[inline]
pub fn about_to_wait() {
    if ARMED.get() {
        fire();
    }
}

#[cold]
fn fire() {
    ARMED.set(false);
    // Not borrowed while it runs.
    let hook = HOOK.with_borrow(Clone::clone);
    if let Some(hook) = hook {
        hook();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hook_runs_once_when_armed() {
        let runs = Rc::new(Cell::new(0));
        let counted = runs.clone();
        on_wait(move || counted.set(counted.get() + 1));
        about_to_wait();
        assert_eq!(runs.get(), 0);
        arm(true);
        about_to_wait();
        about_to_wait();
        assert_eq!(runs.get(), 1);
        arm(true);
        arm(false);
        about_to_wait();
        assert_eq!(runs.get(), 1);
    }
}
