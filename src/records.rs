//! Records of a search index (`laps.Index` of the Python package): read from files, held to their checksums, and widened to
//! `f32`, many at once.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

use half::f16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// Columns of the table that a checksum sums up, of 8 bytes each.
const WORDS: usize = 64;
const ROW: usize = 8 * WORDS;
/// EBADF on every Unix.
const BAD_DESCRIPTOR: i32 = 9;

/// A checksum at the speed of memory.
///
/// The bytes are a table of rows of 64 words of 8 bytes; the sums of its columns and of its rows, modulo 2^64, are what the
/// CRC-32 is taken of, after the bytes that fill no row. A change within one word or within one row alters the sums of
/// columns, rows that changed places those of rows; to hide, damage has to cancel in both directions, in four words at
/// least. A CRC of all bytes would take as long as scoring (0.3 ms for the 220 kB of an image of a ViT-B/16).
pub fn checksum(bytes: &[u8]) -> u32 {
    let (whole, rest) = bytes.split_at(bytes.len() / ROW * ROW);
    let mut crc = crc32fast::Hasher::new();
    crc.update(rest);
    if !whole.is_empty() {
        let mut columns = [0u64; WORDS];
        let mut rows = Vec::with_capacity(whole.len() / 8 / WORDS * 8);
        for row in whole.chunks_exact(ROW) {
            let mut sum = 0u64;
            for (column, word) in columns.iter_mut().zip(row.chunks_exact(8)) {
                let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
                *column = column.wrapping_add(word);
                sum = sum.wrapping_add(word);
            }
            rows.extend_from_slice(&sum.to_le_bytes());
        }
        crc.update(&columns.map(u64::to_le_bytes).concat());
        crc.update(&rows);
    }
    crc.finalize()
}

/// Where a record lies, and what it was when it was written.
#[derive(Clone, Copy)]
pub struct Place {
    pub file: RawFd,
    pub offset: u64,
    pub checksum: u32,
}

/// Why a record cannot be used.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Damage {
    /// The system refused to read it: its error number.
    Unreadable(i32),
    /// The file ends before it does.
    Short,
    /// It is not what was written.
    Altered,
}

/// Reads a record for each row of `out`, in parallel; the first that is damaged ends it, with its position.
pub fn read(places: &[Place], out: &mut [u8]) -> Result<(), (usize, Damage)> {
    let size = out.len() / places.len().max(1);
    if size == 0 {
        return Ok(());
    }
    let rows = places.par_iter().zip(out.par_chunks_exact_mut(size)).enumerate();
    let damaged = rows.filter_map(|(i, (place, row))| read_one(place, row).err().map(|damage| (i, damage)));
    damaged.min_by_key(|&(i, _)| i).map_or(Ok(()), Err)
}

fn read_one(place: &Place, out: &mut [u8]) -> Result<(), Damage> {
    if place.file < 0 {
        return Err(Damage::Unreadable(BAD_DESCRIPTOR));
    }
    // SAFETY: the caller keeps the descriptor open meanwhile; ManuallyDrop leaves it open afterwards.
    let file = ManuallyDrop::new(unsafe { File::from_raw_fd(place.file) });
    file.read_exact_at(out, place.offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => Damage::Short,
        _ => Damage::Unreadable(error.raw_os_error().unwrap_or(0)),
    })?;
    if checksum(out) == place.checksum { Ok(()) } else { Err(Damage::Altered) }
}

/// What the numbers of a field are stored as.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Stored {
    F16,
    F32,
    /// Integers of 8 bits; before them an `f32` for each vector of `width` of them, which they are multiplied with.
    I8 {
        width: usize,
    },
}

impl Stored {
    /// Bytes of `count` numbers.
    pub fn bytes(self, count: usize) -> usize {
        match self {
            Stored::F16 => 2 * count,
            Stored::F32 => 4 * count,
            Stored::I8 { width } => count + 4 * (count / width.max(1)),
        }
    }
}

/// Widens one field of every record: `from` are records of `size` bytes that have it at `start`, `to` its `count` numbers of
/// each. Exact, but for the one rounding of an integer times its scale.
pub fn widen(from: &[u8], size: usize, start: usize, stored: Stored, to: &mut [f32], count: usize) {
    if count == 0 {
        return;
    }
    let pairs = from.par_chunks_exact(size).zip(to.par_chunks_exact_mut(count));
    pairs.for_each(|(record, to)| {
        let field = &record[start..start + stored.bytes(count)];
        match stored {
            Stored::F16 => widen_halves(field, to),
            Stored::F32 => floats(field).zip(to).for_each(|(x, to)| *to = x),
            Stored::I8 { width } => {
                let (scales, numbers) = field.split_at(field.len() - count);
                let vectors = to.chunks_exact_mut(width).zip(numbers.chunks_exact(width));
                for (scale, (to, numbers)) in floats(scales).zip(vectors) {
                    to.iter_mut().zip(numbers).for_each(|(to, &x)| *to = f32::from(x as i8) * scale);
                }
            }
        }
    });
}

fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes.chunks_exact(4).map(|x| f32::from_le_bytes(x.try_into().expect("4 bytes")))
}

fn widen_halves(bytes: &[u8], to: &mut [f32]) {
    // SAFETY: all bits are an f16.
    match unsafe { bytes.align_to::<f16>() } {
        ([], halves, []) if cfg!(target_endian = "little") => halves.convert_to_f32_slice(to),
        _ => {
            let halves = bytes.chunks_exact(2).map(|x| f16::from_le_bytes(x.try_into().expect("2 bytes")));
            to.iter_mut().zip(halves).for_each(|(to, x)| *to = x.to_f32());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::fd::AsRawFd;

    /// The definition, byte by byte.
    fn slow(bytes: &[u8]) -> u32 {
        let (whole, rest) = bytes.split_at(bytes.len() / ROW * ROW);
        let word = |i: usize| u64::from_le_bytes(whole[8 * i..8 * i + 8].try_into().unwrap());
        let count = whole.len() / 8;
        let sum = |at: &dyn Fn(usize) -> bool| {
            (0..count).filter(|&i| at(i)).fold(0u64, |sum, i| sum.wrapping_add(word(i))).to_le_bytes()
        };
        let mut all = rest.to_vec();
        if count > 0 {
            (0..WORDS).for_each(|c| all.extend(sum(&|i| i % WORDS == c)));
            (0..count / WORDS).for_each(|r| all.extend(sum(&|i| i / WORDS == r)));
        }
        crc32fast::hash(&all)
    }

    fn bytes(count: usize) -> Vec<u8> {
        (0..count as u64).map(|i| (i.wrapping_mul(6364136223846793005) >> 56) as u8).collect()
    }

    #[test]
    fn a_checksum_is_its_definition() {
        for count in [0, 1, 8, 511, 512, 513, 1024, 4000, 11264] {
            assert_eq!(checksum(&bytes(count)), slow(&bytes(count)), "{count} bytes");
        }
    }

    #[test]
    fn swapped_words_and_rows_alter_a_checksum() {
        let whole = bytes(4096);
        for (i, j) in [(0, 8), (0, 512), (512, 3584)] {
            let mut swapped = whole.clone();
            (0..8).for_each(|b| swapped.swap(i + b, j + b));
            assert_ne!(checksum(&swapped), checksum(&whole));
        }
    }

    #[test]
    fn records_are_read_where_they_lie_and_the_first_damaged_one_is_told() {
        let (size, content) = (512, bytes(3 * 512 + 100));
        let path = std::env::temp_dir().join(format!("laps-records-{}", std::process::id()));
        File::create(&path).unwrap().write_all(&content).unwrap();
        let file = File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let place = |row: usize| Place {
            file: file.as_raw_fd(),
            offset: (row * size) as u64,
            checksum: checksum(&content[row * size..][..size.min(content.len() - row * size)]),
        };
        let mut out = vec![0; 2 * size];
        assert_eq!(read(&[place(2), place(0)], &mut out), Ok(()));
        assert_eq!(out[..size], content[2 * size..3 * size]);
        assert_eq!(out[size..], content[..size]);
        assert_eq!(read(&[place(0), place(3)], &mut out), Err((1, Damage::Short)));
        let altered = Place { checksum: 0, ..place(1) };
        assert_eq!(read(&[altered, place(3)], &mut out), Err((0, Damage::Altered)));
        let closed = Place { file: -1, ..place(1) };
        assert_eq!(read(&[closed], &mut out[..size]), Err((0, Damage::Unreadable(BAD_DESCRIPTOR))));
    }

    #[test]
    fn fields_are_widened_from_any_address() {
        let halves = [0.5, -3.0, 65504.0, 1e-7].map(f16::from_f64);
        for start in [1, 2] {
            let mut record = vec![0; start];
            halves.iter().for_each(|x| record.extend(x.to_le_bytes()));
            let mut to = [0.0; 4];
            widen(&record, record.len(), start, Stored::F16, &mut to, 4);
            assert_eq!(to, halves.map(f16::to_f32));
        }
        let mut record = Vec::new();
        [0.5f32, 2.0].iter().for_each(|x| record.extend(x.to_le_bytes()));
        record.extend([1, 255, 127, 128]);
        let mut to = [0.0; 4];
        widen(&record, 12, 0, Stored::I8 { width: 2 }, &mut to, 4);
        assert_eq!(to, [0.5, -0.5, 254.0, -256.0]);
    }
}
