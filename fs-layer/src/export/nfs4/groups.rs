//! Groups of users as this host knows them, for users in more groups than a request can name (AUTH_SYS carries 16).

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{Uid, User, getgrouplist};

/// How long an answer counts.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Users whose groups are kept.
const KEPT_MAX: usize = 4096;

/// Finds the groups of a user; `None` if there is no such user.
type Lookup = dyn Fn(u32) -> io::Result<Option<Vec<u32>>> + Send + Sync;

/// What was found, and when.
type Found = (Instant, Arc<[u32]>);

/// Looks the groups of users up, and keeps them for a while.
pub struct Groups {
    lookup: Box<Lookup>,
    kept: Mutex<HashMap<u32, Found>>,
}

impl fmt::Debug for Groups {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Groups")
    }
}

impl Groups {
    /// Those of this host's user database, whatever it is made of.
    pub fn of_host() -> Groups {
        Groups::new(|uid| {
            let Some(user) = User::from_uid(Uid::from_raw(uid))? else { return Ok(None) };
            let name = std::ffi::CString::new(user.name).map_err(io::Error::other)?;
            Ok(Some(getgrouplist(&name, user.gid)?.into_iter().map(nix::unistd::Gid::as_raw).collect()))
        })
    }

    /// Those that `lookup` finds.
    pub fn new(lookup: impl Fn(u32) -> io::Result<Option<Vec<u32>>> + Send + Sync + 'static) -> Groups {
        Groups { lookup: Box::new(lookup), kept: Mutex::default() }
    }

    /// All groups of a user; none, if this host does not know it. While the database cannot be asked, what it said last.
    pub fn of(&self, uid: u32) -> Arc<[u32]> {
        self.of_at(uid, Instant::now())
    }

    fn of_at(&self, uid: u32, now: Instant) -> Arc<[u32]> {
        let before = self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(&uid).cloned();
        if let Some((asked, groups)) = &before
            && now.saturating_duration_since(*asked) < KEPT_FOR
        {
            return groups.clone();
        }
        // Asked without the lock: it may take long. Several may ask at once.
        let groups: Arc<[u32]> = match (self.lookup)(uid) {
            Ok(found) => found.unwrap_or_default().into(),
            Err(e) => {
                tracing::warn!(uid, "the groups of a user cannot be looked up: {e}");
                before.map(|(_, groups)| groups).unwrap_or_default()
            }
        };
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX && !kept.contains_key(&uid) {
            kept.clear();
        }
        kept.insert(uid, (now, groups.clone()));
        groups
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn answers_are_kept_for_a_while() {
        let asked = Arc::new(AtomicU32::new(0));
        let count = asked.clone();
        let groups = Groups::new(move |uid| match (uid, count.fetch_add(1, Ordering::Relaxed)) {
            (7, 0) => Ok(Some((0..40).collect())),
            (7, 1) => Err(io::Error::other("away")),
            (7, _) => Ok(Some(vec![5])),
            _ => Ok(None),
        });
        let begin = Instant::now();
        assert_eq!(groups.of_at(7, begin).len(), 40);
        assert_eq!(groups.of_at(7, begin + KEPT_FOR / 2).len(), 40);
        assert_eq!(asked.load(Ordering::Relaxed), 1);
        // The database is away: what it said last.
        assert_eq!(groups.of_at(7, begin + KEPT_FOR).len(), 40);
        assert_eq!(groups.of_at(7, begin + KEPT_FOR * 2)[..], [5]);
        assert!(groups.of_at(8, begin).is_empty());
        for uid in 100..100 + 2 * KEPT_MAX as u32 {
            groups.of_at(uid, begin);
        }
        assert!(groups.kept.lock().unwrap().len() <= KEPT_MAX);
    }

    #[test]
    fn the_host_knows_root() {
        assert!(Groups::of_host().of(0).contains(&0));
        assert!(Groups::of_host().of(4_000_000_000).is_empty());
    }
}
