//! Listing a directory tree in the order of the keys its files stand for.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use super::{LIST_MAX, ListEntry};

/// Up to [`LIST_MAX`] files below `root` whose keys start with `prefix`, after `start_after`, in byte order of the keys.
///
/// Reads only directories that can hold such keys, each of them whole, so a page costs in the order of the entries of
/// the directories it touches. Files that vanish meanwhile are left out.
pub(super) fn list_page(root: &Path, prefix: &str, start_after: Option<&str>) -> io::Result<Vec<ListEntry>> {
    let mut page = Page { prefix, start_after, entries: Vec::new() };
    page.walk(root, "")?;
    Ok(page.entries)
}

struct Page<'a> {
    prefix: &'a str,
    start_after: Option<&'a str>,
    entries: Vec<ListEntry>,
}

impl Page<'_> {
    /// Visits the directory `dir`, whose keys start with `below` (empty, or ending in a slash).
    fn walk(&mut self, dir: &Path, below: &str) -> io::Result<()> {
        for name in self.candidates(dir, below)? {
            if self.entries.len() == LIST_MAX {
                break;
            }
            let path = dir.join(&name);
            if name.ends_with('/') {
                self.walk(&path, &format!("{below}{name}"))?;
                continue;
            }
            match fs::metadata(&path) {
                Ok(meta) => self.entries.push(ListEntry { key: format!("{below}{name}"), size: meta.len() }),
                Err(e) if e.kind() == ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The names in `dir` that matter, in key order. Directories carry a slash, as they do in keys: `a-b` < `a/b` < `ab`.
    fn candidates(&self, dir: &Path, below: &str) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(names),
            other => other?,
        };
        for entry in entries {
            let entry = entry?;
            // Keys are UTF-8; anything else did not come from here. Names with a dot are the store's own.
            let Ok(mut name) = entry.file_name().into_string() else {
                continue;
            };
            if name.starts_with('.') {
                continue;
            }
            let is_dir = entry.file_type()?.is_dir();
            if is_dir {
                name.push('/');
            }
            let key = format!("{below}{name}");
            let wanted = if is_dir {
                (key.starts_with(self.prefix) || self.prefix.starts_with(&key))
                    && self.start_after.is_none_or(|after| key.as_str() > after || after.starts_with(&key))
            } else {
                key.starts_with(self.prefix) && self.start_after.is_none_or(|after| key.as_str() > after)
            };
            if wanted {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_is_that_of_keys_and_not_of_paths() {
        let root = tempfile::tempdir().unwrap();
        for key in ["a/b", "a-b", "ab", "a/a/z", "b", "a.b"] {
            let path = root.path().join(key);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, key).unwrap();
        }
        fs::write(root.path().join(".blockd-bucket"), "").unwrap();
        let keys = |prefix: &str, after: Option<&str>| -> Vec<String> {
            let page = list_page(root.path(), prefix, after).unwrap();
            page.into_iter().map(|e| e.key).collect()
        };
        assert_eq!(keys("", None), ["a-b", "a.b", "a/a/z", "a/b", "ab", "b"]);
        assert_eq!(keys("a", Some("a/a/z")), ["a/b", "ab"]);
        assert_eq!(keys("a/", None), ["a/a/z", "a/b"]);
        assert_eq!(keys("a/a", None), ["a/a/z"]);
        assert_eq!(keys("", Some("a/")), ["a/a/z", "a/b", "ab", "b"]);
        assert_eq!(keys("zzz", None), Vec::<String>::new());
    }
}
