//! Sets of attribute numbers (bitmap4, RFC 8881 section 3.3.7).

use super::status::Status;
use super::xdr::{Reader, Writer};

/// Most words that are read of a client's bitmap. What stands in words past the third is unknown here and left out.
const WORDS_MAX: usize = 16;

/// A set of attribute numbers below 96.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap(pub [u32; 3]);

impl Bitmap {
    /// The set of these.
    pub const fn of(numbers: &[u32]) -> Bitmap {
        let mut words = [0; 3];
        let mut at = 0;
        while at < numbers.len() {
            words[(numbers[at] / 32) as usize] |= 1 << (numbers[at] % 32);
            at += 1;
        }
        Bitmap(words)
    }

    /// Whether the number is in it.
    pub fn has(&self, number: u32) -> bool {
        self.0.get((number / 32) as usize).is_some_and(|word| word & (1 << (number % 32)) != 0)
    }

    /// Puts a number in.
    pub fn insert(&mut self, number: u32) {
        self.0[(number / 32) as usize] |= 1 << (number % 32);
    }

    /// What is in both.
    pub fn and(self, other: Bitmap) -> Bitmap {
        Bitmap(std::array::from_fn(|at| self.0[at] & other.0[at]))
    }

    /// What is in this one only.
    pub fn without(self, other: Bitmap) -> Bitmap {
        Bitmap(std::array::from_fn(|at| self.0[at] & !other.0[at]))
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0 == [0; 3]
    }

    /// Its numbers, ascending: the order in which attributes stand on the wire.
    pub fn numbers(self) -> impl Iterator<Item = u32> {
        (0..96).filter(move |number| self.has(*number))
    }

    /// Reads one.
    pub fn read(r: &mut Reader<'_>) -> Status<Bitmap> {
        let mut bitmap = Bitmap::default();
        for at in 0..r.count(WORDS_MAX)? {
            let word = r.u32()?;
            if let Some(mine) = bitmap.0.get_mut(at) {
                *mine = word;
            }
        }
        Ok(bitmap)
    }

    /// Writes it without trailing empty words.
    pub fn write(&self, w: &mut Writer) {
        let words = 3 - self.0.iter().rev().take_while(|word| **word == 0).count();
        w.u32(words as u32);
        self.0[..words].iter().for_each(|word| w.u32(*word));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_in_order() {
        let set = Bitmap::of(&[1, 33, 82]);
        let mut w = Writer::default();
        set.write(&mut w);
        assert_eq!(w.as_bytes(), [0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 4, 0, 0]);
        assert_eq!(Bitmap::read(&mut Reader::new(w.as_bytes())), Ok(set));
        assert_eq!(set.numbers().collect::<Vec<_>>(), [1, 33, 82]);
    }
}
