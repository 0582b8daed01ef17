//! Which requests the calls of this thread belong to, see [`Vfs::noting`](crate::vfs::Vfs::noting).

use std::cell::Cell;

thread_local! {
    static REQUESTS: Cell<[u64; 2]> = const { Cell::new([0; 2]) };
}

/// Runs `change`, whose calls belong to a request, and to the one that this runs in, if any.
pub fn during(request: u64, change: &mut dyn FnMut()) {
    /// Takes the request back also when `change` panics.
    struct Ends([u64; 2]);
    impl Drop for Ends {
        fn drop(&mut self) {
            REQUESTS.set(self.0);
        }
    }
    let _ends = Ends(REQUESTS.get());
    let [outer, _] = REQUESTS.get();
    REQUESTS.set([request, outer]);
    change();
}

/// The requests that the call belongs to; 0 for none.
pub fn requests() -> [u64; 2] {
    REQUESTS.get()
}
