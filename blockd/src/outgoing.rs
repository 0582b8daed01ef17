//! Bytes on their way to a client: short ones together in one buffer, long ones where they are.

use bytes::Bytes;

/// Fewer bytes than this are copied: that costs less than to send them from where they are.
pub const SHARE_MIN: usize = 16 << 10;

/// Bytes in order, some of them shared with whoever keeps them. What was appended is not changed any more.
#[derive(Clone, Default)]
pub struct Outgoing {
    own: Vec<u8>,
    /// In order.
    shared: Vec<Shared>,
    /// Bytes in `shared`.
    shared_len: usize,
}

#[derive(Clone)]
struct Shared {
    /// So many of the own bytes stand before it.
    behind: usize,
    bytes: Bytes,
}

impl Outgoing {
    /// Nothing.
    pub const fn new() -> Self {
        Self { own: Vec::new(), shared: Vec::new(), shared_len: 0 }
    }

    /// How many bytes there are.
    pub fn len(&self) -> usize {
        self.own.len() + self.shared_len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Makes room for so many copied bytes.
    pub fn reserve(&mut self, bytes: usize) {
        self.own.reserve(bytes);
    }

    /// Appends a copy.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.own.extend_from_slice(bytes);
    }

    /// Appends zeroes.
    pub fn extend_zeroes(&mut self, len: usize) {
        self.own.resize(self.own.len() + len, 0);
    }

    /// Appends bytes, without copying them if they are many.
    pub fn push(&mut self, bytes: Bytes) {
        if bytes.len() < SHARE_MIN {
            return self.extend_from_slice(&bytes);
        }
        self.shared_len += bytes.len();
        self.shared.push(Shared { behind: self.own.len(), bytes });
    }

    /// Appends all of another.
    pub fn append(&mut self, other: Outgoing) {
        let own = self.own.len();
        self.own.extend_from_slice(&other.own);
        self.shared.extend(other.shared.into_iter().map(|shared| Shared { behind: own + shared.behind, ..shared }));
        self.shared_len += other.shared_len;
    }

    /// Forgets all from the first `len` bytes on, which must not end within shared ones.
    pub fn truncate(&mut self, len: usize) {
        if len >= self.len() {
            return;
        }
        let (own, shared) = self.place(len);
        self.own.truncate(own);
        self.shared.truncate(shared);
        self.shared_len = len - own;
    }

    /// Takes away all from the first `len` bytes on, which must not end within shared ones.
    pub fn split_off(&mut self, len: usize) -> Outgoing {
        let (own, shared) = self.place(len);
        let mut tail = Outgoing { own: self.own.split_off(own), shared: self.shared.split_off(shared), shared_len: 0 };
        tail.shared.iter_mut().for_each(|shared| shared.behind -= own);
        (tail.shared_len, self.shared_len) = (self.shared_len - (len - own), len - own);
        tail
    }

    /// How many own bytes, and pieces of others, are among the first `len` bytes.
    fn place(&self, len: usize) -> (usize, usize) {
        let (mut others, mut count) = (0, 0);
        for shared in &self.shared {
            if shared.behind + others >= len {
                break;
            }
            others += shared.bytes.len();
            count += 1;
        }
        assert!(others <= len && len - others <= self.own.len(), "it ends within shared bytes");
        (len - others, count)
    }

    /// Forgets everything, and most of the memory for own bytes if it is more than `keep`.
    pub fn clear(&mut self, keep: usize) {
        self.own.clear();
        self.own.shrink_to(keep);
        self.shared.clear();
        self.shared_len = 0;
    }

    /// The bytes from `skip` on, in pieces.
    pub fn pieces(&self, mut skip: usize) -> impl Iterator<Item = &[u8]> {
        let mut from = 0;
        let ends = self.shared.iter().map(|shared| (shared.behind, &shared.bytes[..]));
        ends.chain([(self.own.len(), &[][..])])
            .flat_map(move |(behind, shared)| [&self.own[std::mem::replace(&mut from, behind)..behind], shared])
            .filter_map(move |piece| {
                let skipped = skip.min(piece.len());
                skip -= skipped;
                (skipped < piece.len()).then(|| &piece[skipped..])
            })
    }

    /// A copy in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        self.pieces(0).for_each(|piece| all.extend_from_slice(piece));
        all
    }

    /// All in one piece, copied only if it is in more than one.
    pub fn into_bytes(mut self) -> Bytes {
        match self.shared.len() {
            0 => self.own.into(),
            1 if self.own.is_empty() => self.shared.remove(0).bytes,
            _ => self.to_vec().into(),
        }
    }
}

impl From<Bytes> for Outgoing {
    fn from(bytes: Bytes) -> Self {
        let mut outgoing = Self::new();
        outgoing.push(bytes);
        outgoing
    }
}

impl From<Vec<u8>> for Outgoing {
    fn from(own: Vec<u8>) -> Self {
        Self { own, ..Self::new() }
    }
}

impl PartialEq<[u8]> for Outgoing {
    fn eq(&self, other: &[u8]) -> bool {
        let mut rest = other;
        let begins = self.pieces(0).all(|piece| match rest.split_at_checked(piece.len()) {
            Some((part, tail)) => {
                rest = tail;
                part == piece
            }
            None => false,
        });
        begins && rest.is_empty()
    }
}

impl std::fmt::Debug for Outgoing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Outgoing({} bytes, {} of them shared)", self.len(), self.shared_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(byte: u8) -> Bytes {
        vec![byte; SHARE_MIN].into()
    }

    #[test]
    fn pieces_stay_in_order() {
        let mut out = Outgoing::new();
        assert!(out.is_empty() && out.pieces(0).next().is_none());
        out.push(long(1));
        out.extend_from_slice(&[2; 10]);
        out.push(Bytes::from_static(&[3; 5]));
        out.push(long(4));
        out.push(long(5));
        out.extend_zeroes(3);
        let n = SHARE_MIN;
        let expected = [vec![1; n], vec![2; 10], vec![3; 5], vec![4; n], vec![5; n], vec![0; 3]].concat();
        assert_eq!((out.len(), out.to_vec()), (expected.len(), expected.clone()));
        assert_eq!(out.pieces(0).map(<[u8]>::len).collect::<Vec<_>>(), [n, 15, n, n, 3]);
        for skip in [0, 1, n - 1, n, n + 1, n + 15, n + 16, 3 * n + 15, 3 * n + 17, 3 * n + 18] {
            assert_eq!(out.pieces(skip).collect::<Vec<_>>().concat(), expected[skip..], "{skip}");
        }
        assert!(out == expected[..] && out != expected[1..] && out != [&expected[..], &[0]].concat()[..]);
        let mut twice = out.clone();
        twice.append(out.clone());
        assert_eq!(twice.to_vec(), [&expected[..], &expected].concat());
        assert_eq!(out.into_bytes(), expected);
    }

    #[test]
    fn the_end_can_be_taken_back() {
        let mut out = Outgoing::new();
        out.extend_from_slice(&[1; 4]);
        out.push(long(2));
        out.extend_from_slice(&[3; 4]);
        let all = out.to_vec();
        for at in [0, 3, 4, SHARE_MIN + 4, SHARE_MIN + 6, SHARE_MIN + 8] {
            let mut head = out.clone();
            let tail = head.split_off(at);
            assert_eq!((head.len(), head.to_vec()), (at, all[..at].to_vec()));
            assert_eq!((tail.len(), tail.to_vec()), (all.len() - at, all[at..].to_vec()));
            let mut head = out.clone();
            head.truncate(at);
            assert_eq!((head.len(), head.to_vec()), (at, all[..at].to_vec()));
            head.extend_from_slice(&[9]);
            head.push(long(8));
            assert_eq!(head.to_vec(), [&all[..at], &[9], &long(8)].concat());
        }
        out.clear(0);
        assert!(out.is_empty());
    }

    #[test]
    fn what_is_in_one_piece_is_not_copied() {
        let bytes = long(7);
        let out = Outgoing::from(bytes.clone());
        assert_eq!(out.into_bytes().as_ptr(), bytes.as_ptr());
    }
}
