//! Which request the calls of this thread belong to, see [`Vfs::noting`](crate::vfs::Vfs::noting).

use std::cell::Cell;

thread_local! {
    static REQUEST: Cell<u64> = const { Cell::new(0) };
}

/// Runs `change`, whose calls belong to a request.
pub fn during(request: u64, change: &mut dyn FnMut()) {
    /// Takes the request back also when `change` panics.
    struct Ends(u64);
    impl Drop for Ends {
        fn drop(&mut self) {
            REQUEST.set(self.0);
        }
    }
    let _ends = Ends(REQUEST.replace(request));
    change();
}

/// The request that the call belongs to; 0 if to none.
pub fn request() -> u64 {
    REQUEST.get()
}
