//! The two inner kernels of the method, and the choice of the instruction set that they run on.
//!
//! Products of rows with rows (patches x words, patches x patches, patches x directions) are [`row_products`]. All others
//! (weights x products, weights x Gram matrix, gradients) are a [`combine`]: output rows that are weighted sums of input
//! rows.

// Register blocks are indexed like the matrices that they are.
#![allow(clippy::needless_range_loop)]

use std::sync::OnceLock;

use aligned_vec::{AVec, ConstAlign};
use pulp::{Scalar128b, Simd, WithSimd};

use super::real::{Real, lanes};
use crate::error::LapsError;

/// A buffer whose rows of a padded stride start on cache lines.
pub(crate) type Buffer<T> = AVec<T, ConstAlign<64>>;

pub(crate) fn zeros<T: Real>(len: usize) -> Buffer<T> {
    AVec::__from_elem(64, T::zero(), len)
}

/// Gives `buffer` at least `len` elements; what they hold is not defined.
pub(crate) fn reserve<T: Real>(buffer: &mut Buffer<T>, len: usize) {
    if buffer.len() < len {
        buffer.resize(len, T::zero());
    }
}

/// An instruction set that the kernels are compiled for.
#[derive(Clone, Copy, Debug)]
pub enum Level {
    /// 128-bit vectors of the baseline target.
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(pulp::x86::V3),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
    #[cfg(target_arch = "aarch64")]
    Neon(pulp::aarch64::Neon),
}

impl Level {
    /// Those that this processor runs, widest first.
    pub fn available() -> Vec<Level> {
        let mut all = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            all.extend(pulp::x86::V4::try_new().map(Level::Avx512));
            all.extend(pulp::x86::V3::try_new().map(Level::Avx2));
        }
        #[cfg(target_arch = "aarch64")]
        all.extend(pulp::aarch64::Neon::try_new().map(Level::Neon));
        all.push(Level::Scalar);
        all
    }

    /// The one in use: the widest, or the one that the environment variable `LAPS_SIMD` names when the process first
    /// asks.
    ///
    /// # Errors
    ///
    /// [`LapsError::Value`] if the variable names none of [`Level::available`].
    pub fn current() -> Result<Level, LapsError> {
        static CURRENT: OnceLock<Result<Level, LapsError>> = OnceLock::new();
        let choice = CURRENT.get_or_init(|| {
            let all = Level::available();
            let Some(wanted) = std::env::var_os("LAPS_SIMD").filter(|wanted| !wanted.is_empty()) else {
                return Ok(all[0]);
            };
            all.iter().find(|level| wanted == level.name()).copied().ok_or_else(|| {
                let names: Vec<_> = all.iter().map(|level| level.name()).collect();
                let expected = format!("one of {}", names.join(", "));
                LapsError::value("choice of instruction set", "LAPS_SIMD", expected, format!("{wanted:?}"))
            })
        });
        choice.clone()
    }

    pub fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(_) => "avx512",
            #[cfg(target_arch = "aarch64")]
            Level::Neon(_) => "neon",
        }
    }

    /// Runs `op` compiled for this instruction set.
    pub(crate) fn dispatch<Op: WithSimd>(self, op: Op) -> Op::Output {
        match self {
            Level::Scalar => op.with_simd(Scalar128b),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512(simd) => Simd::vectorize(simd, op),
            #[cfg(target_arch = "aarch64")]
            Level::Neon(simd) => Simd::vectorize(simd, op),
        }
    }
}

/// Where step `s` of a sum finds its coefficient (from the row's start) and its input row (from `x`).
pub(crate) trait Steps: Copy {
    fn count(&self) -> usize;
    fn coefficient(&self, s: usize) -> usize;
    fn row(&self, s: usize) -> usize;
}

/// Coefficients and rows at even distances.
#[derive(Clone, Copy)]
pub(crate) struct Strided {
    pub count: usize,
    pub coefficient: usize,
    pub row: usize,
}

impl Steps for Strided {
    #[inline(always)]
    fn count(&self) -> usize {
        self.count
    }
    #[inline(always)]
    fn coefficient(&self, s: usize) -> usize {
        s * self.coefficient
    }
    #[inline(always)]
    fn row(&self, s: usize) -> usize {
        s * self.row
    }
}

/// Coefficient `s` at column `index[s]`; row `s` at an even distance.
#[derive(Clone, Copy)]
pub(crate) struct GatherCoefficients<'a> {
    pub index: &'a [u32],
    pub row: usize,
}

impl Steps for GatherCoefficients<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.index.len()
    }
    #[inline(always)]
    fn coefficient(&self, s: usize) -> usize {
        // SAFETY: `combine` asks for s < count() = index.len() only.
        unsafe { *self.index.get_unchecked(s) as usize }
    }
    #[inline(always)]
    fn row(&self, s: usize) -> usize {
        s * self.row
    }
}

/// Coefficients at an even distance; row `s` is row `index[s]` of a matrix of the given stride.
#[derive(Clone, Copy)]
pub(crate) struct GatherRows<'a> {
    pub index: &'a [u32],
    pub coefficient: usize,
    pub stride: usize,
}

impl Steps for GatherRows<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.index.len()
    }
    #[inline(always)]
    fn coefficient(&self, s: usize) -> usize {
        s * self.coefficient
    }
    #[inline(always)]
    fn row(&self, s: usize) -> usize {
        // SAFETY: `combine` asks for s < count() = index.len() only.
        unsafe { *self.index.get_unchecked(s) as usize * self.stride }
    }
}

/// Output rows as weighted sums of input rows:
/// `out[r][0..width] = (accumulate ? out[r] : 0) + sum_s coefficients[r][coefficient(s)] * x[row(s)..][0..width]`.
///
/// The sum runs in the order of `s`, whatever the blocking: results do not depend on which rows share a call.
/// Cost: `2 * out.len() * steps.count() * width` FLOPs. `width` is a multiple of the lanes of `S`.
///
/// # Safety
/// For every r and s, `coefficients[r]` is readable at `coefficient(s)`, `x` at `row(s)..row(s) + width`, and `out[r]`
/// is writable for `width` elements that overlap no input and no other output row.
#[inline(always)]
pub(crate) unsafe fn combine<S: Simd, T: Real, P: Steps>(
    simd: S,
    coefficients: &[*const T],
    x: *const T,
    steps: P,
    out: &[*mut T],
    width: usize,
    accumulate: bool,
) {
    debug_assert_eq!(coefficients.len(), out.len());
    debug_assert_eq!(width % lanes::<S, T>(), 0);
    let vectors = width / lanes::<S, T>();
    let mut done = 0;
    while done < vectors {
        // Five as 3 + 2: a lone vector reuses each coefficient only once.
        let v = match vectors - done {
            5 => 3,
            rest => rest.min(4),
        };
        let column = done * lanes::<S, T>();
        // Register budget: v * rows accumulators, v inputs and one coefficient.
        // SAFETY: the caller's promise, for the columns column..column + v * lanes of it.
        unsafe {
            if S::REGISTER_COUNT >= 32 {
                match v {
                    1 => columns::<S, T, P, 12, 4, 1>(simd, coefficients, x, steps, out, column, accumulate),
                    2 => columns::<S, T, P, 12, 4, 2>(simd, coefficients, x, steps, out, column, accumulate),
                    3 => columns::<S, T, P, 8, 2, 3>(simd, coefficients, x, steps, out, column, accumulate),
                    _ => columns::<S, T, P, 6, 2, 4>(simd, coefficients, x, steps, out, column, accumulate),
                }
            } else {
                match v {
                    1 => columns::<S, T, P, 12, 4, 1>(simd, coefficients, x, steps, out, column, accumulate),
                    2 => columns::<S, T, P, 6, 2, 2>(simd, coefficients, x, steps, out, column, accumulate),
                    3 => columns::<S, T, P, 4, 1, 3>(simd, coefficients, x, steps, out, column, accumulate),
                    _ => columns::<S, T, P, 3, 1, 4>(simd, coefficients, x, steps, out, column, accumulate),
                }
            }
        }
        done += v;
    }
}

/// All rows of `V` vectors' columns: blocks of `R` rows, then of `R_TAIL`.
#[inline(always)]
unsafe fn columns<S: Simd, T: Real, P: Steps, const R: usize, const R_TAIL: usize, const V: usize>(
    simd: S,
    coefficients: &[*const T],
    x: *const T,
    steps: P,
    out: &[*mut T],
    column: usize,
    accumulate: bool,
) {
    let rows = out.len();
    // SAFETY (all blocks): rows r < out.len() and columns inside the width, as the caller promised. A short block repeats
    // its last row: each copy loads before any stores, and all store the same sums.
    unsafe {
        let x = x.add(column);
        let mut r = 0;
        while r < rows {
            if rows - r > R - R_TAIL {
                let at = |i: usize| (r + i).min(rows - 1);
                let c: [*const T; R] = std::array::from_fn(|i| coefficients[at(i)]);
                let o: [*mut T; R] = std::array::from_fn(|i| out[at(i)].add(column));
                block::<S, T, P, R, V>(simd, c, x, steps, o, accumulate);
                r += R;
            } else {
                let at = |i: usize| (r + i).min(rows - 1);
                let c: [*const T; R_TAIL] = std::array::from_fn(|i| coefficients[at(i)]);
                let o: [*mut T; R_TAIL] = std::array::from_fn(|i| out[at(i)].add(column));
                block::<S, T, P, R_TAIL, V>(simd, c, x, steps, o, accumulate);
                r += R_TAIL;
            }
        }
    }
}

/// `R` rows of `V` vectors, held in registers over the whole sum.
#[inline(always)]
unsafe fn block<S: Simd, T: Real, P: Steps, const R: usize, const V: usize>(
    simd: S,
    coefficients: [*const T; R],
    x: *const T,
    steps: P,
    out: [*mut T; R],
    accumulate: bool,
) {
    let lanes = lanes::<S, T>();
    let mut sums = [[T::splat(simd, T::zero()); V]; R];
    // SAFETY: `columns` hands on its caller's promise; vectors are plain data, read and written unaligned.
    unsafe {
        if accumulate {
            for r in 0..R {
                for v in 0..V {
                    sums[r][v] = out[r].add(v * lanes).cast::<T::Vector<S>>().read_unaligned();
                }
            }
        }
        let sums = add_products(simd, coefficients, x, steps, sums);
        for r in 0..R {
            for v in 0..V {
                out[r].add(v * lanes).cast::<T::Vector<S>>().write_unaligned(sums[r][v]);
            }
        }
    }
}

/// The sums of a block: `sums[r] + sum_s coefficients[r][coefficient(s)] * x[row(s)..]`.
///
/// # Safety
/// As for [`combine`], for `R` rows and `V` vectors.
#[inline(always)]
unsafe fn add_products<S: Simd, T: Real, P: Steps, const R: usize, const V: usize>(
    simd: S,
    coefficients: [*const T; R],
    x: *const T,
    steps: P,
    mut sums: [[T::Vector<S>; V]; R],
) -> [[T::Vector<S>; V]; R] {
    let lanes = lanes::<S, T>();
    for s in 0..steps.count() {
        // SAFETY: the caller's promise for step s.
        unsafe {
            let row = x.add(steps.row(s));
            let mut inputs = [T::splat(simd, T::zero()); V];
            for v in 0..V {
                inputs[v] = row.add(v * lanes).cast::<T::Vector<S>>().read_unaligned();
            }
            let at = steps.coefficient(s);
            for r in 0..R {
                let c = T::splat(simd, *coefficients[r].add(at));
                for v in 0..V {
                    sums[r][v] = T::fused(simd, c, inputs[v], sums[r][v]);
                }
            }
        }
    }
    sums
}

/// Products of two sets of rows: `out[r][j] = sum_c rows[r][c] * columns[j * stride + c]`, j < `count`.
///
/// Where [`combine`] has output columns side by side in a vector, here one sum is spread over it: no transposed copy of
/// either side, and no lanes are lost to a number of columns that fills no vectors. Each sum is taken in the same order,
/// whatever its neighbours: equal rows have equal products. Cost: `2 * rows.len() * count * stride` FLOPs.
///
/// # Safety
/// Every row is readable for `stride` elements, a multiple of the lanes of `S`, `columns` for `count` such rows; `out[r]` is
/// writable for `count` elements that overlap no input and no other output row.
#[inline(always)]
pub(crate) unsafe fn row_products<S: Simd, T: Real>(
    simd: S,
    rows: &[*const T],
    columns: *const T,
    count: usize,
    stride: usize,
    out: &[*mut T],
) {
    debug_assert_eq!(rows.len(), out.len());
    debug_assert_eq!(stride % lanes::<S, T>(), 0);
    // Blocks of equal width, as nearly as may be: a lone column would load each row for one product.
    let blocks = count.div_ceil(COLUMNS);
    for b in 0..blocks {
        let (first, end) = (b * count / blocks, (b + 1) * count / blocks);
        // SAFETY: columns first..end of `count`; the rest is the caller's promise.
        unsafe {
            let columns = columns.add(first * stride);
            match end - first {
                1 => products_with::<S, T, 1>(simd, rows, columns, stride, out, first),
                2 => products_with::<S, T, 2>(simd, rows, columns, stride, out, first),
                3 => products_with::<S, T, 3>(simd, rows, columns, stride, out, first),
                4 => products_with::<S, T, 4>(simd, rows, columns, stride, out, first),
                _ => products_with::<S, T, COLUMNS>(simd, rows, columns, stride, out, first),
            }
        }
    }
}

/// Columns of a block of [`row_products`] at most.
const COLUMNS: usize = 5;

/// All rows with `J` columns.
#[inline(always)]
unsafe fn products_with<S: Simd, T: Real, const J: usize>(
    simd: S,
    rows: &[*const T],
    columns: *const T,
    stride: usize,
    out: &[*mut T],
    first: usize,
) {
    // SAFETY: the caller's promise, for columns first..first + J.
    unsafe {
        if S::REGISTER_COUNT >= 32 {
            products_by::<S, T, 4, J>(simd, rows, columns, stride, out, first);
        } else {
            products_by::<S, T, 2, J>(simd, rows, columns, stride, out, first);
        }
    }
}

/// `R` rows at a time.
#[inline(always)]
unsafe fn products_by<S: Simd, T: Real, const R: usize, const J: usize>(
    simd: S,
    rows: &[*const T],
    columns: *const T,
    stride: usize,
    out: &[*mut T],
    first: usize,
) {
    let lanes = lanes::<S, T>();
    for start in (0..rows.len()).step_by(R) {
        let at = |r: usize| (start + r).min(rows.len() - 1);
        let from: [*const T; R] = std::array::from_fn(|r| rows[at(r)]);
        let mut sums = [[T::splat(simd, T::zero()); J]; R];
        // SAFETY: R rows and J columns of `stride` elements; a short block repeats its last row, and its products.
        unsafe {
            for c in (0..stride).step_by(lanes) {
                let mut inputs = [T::splat(simd, T::zero()); J];
                for j in 0..J {
                    inputs[j] = columns.add(j * stride + c).cast::<T::Vector<S>>().read_unaligned();
                }
                for r in 0..R {
                    let row = from[r].add(c).cast::<T::Vector<S>>().read_unaligned();
                    for j in 0..J {
                        sums[r][j] = T::fused(simd, row, inputs[j], sums[r][j]);
                    }
                }
            }
            for r in 0..R {
                for j in 0..J {
                    out[at(r)].add(first + j).write(T::sum_of(simd, sums[r][j]));
                }
            }
        }
    }
}

/// `best[0..width] = max over r of sum_s rows[r][s] * x[s * stride..][0..width]`: the products of [`combine`], of which only
/// the highest of each column leaves the registers. Finite input only.
///
/// # Safety
/// Every row is readable for `count` elements, `x` for `count` rows of `width` elements at distance `stride`; `best` is
/// writable for `width` elements, a multiple of the lanes of `S`. There is at least one row.
#[inline(always)]
pub(crate) unsafe fn highest_products<S: Simd, T: Real>(
    simd: S,
    rows: &[*const T],
    x: *const T,
    count: usize,
    stride: usize,
    best: *mut T,
    width: usize,
) {
    let lanes = lanes::<S, T>();
    let steps = Strided { count, coefficient: 1, row: stride };
    let mut column = 0;
    while column < width {
        // SAFETY: column + two (or one) vectors <= width; the rest is the caller's promise.
        unsafe {
            let two = width - column >= 2 * lanes;
            let (x, best) = (x.add(column), best.add(column));
            match (two, S::REGISTER_COUNT >= 32) {
                (true, true) => highest_of_columns::<S, T, 12, 2>(simd, rows, x, steps, best),
                (true, false) => highest_of_columns::<S, T, 6, 2>(simd, rows, x, steps, best),
                (false, _) => highest_of_columns::<S, T, 12, 1>(simd, rows, x, steps, best),
            }
            column += if two { 2 * lanes } else { lanes };
        }
    }
}

#[inline(always)]
unsafe fn highest_of_columns<S: Simd, T: Real, const R: usize, const V: usize>(
    simd: S,
    rows: &[*const T],
    x: *const T,
    steps: Strided,
    out: *mut T,
) {
    let lanes = lanes::<S, T>();
    let zeros = [[T::splat(simd, T::zero()); V]; R];
    let mut best = [T::splat(simd, T::neg_infinity()); V];
    for start in (0..rows.len()).step_by(R) {
        let from: [*const T; R] = std::array::from_fn(|r| rows[(start + r).min(rows.len() - 1)]);
        // SAFETY: the caller's promise; a short block repeats its last row, which changes no maximum.
        let sums = unsafe { add_products(simd, from, x, steps, zeros) };
        for row in sums {
            for v in 0..V {
                best[v] = T::max_of(simd, best[v], row[v]);
            }
        }
    }
    for (v, best) in best.into_iter().enumerate() {
        // SAFETY: out holds V vectors.
        unsafe { out.add(v * lanes).cast::<T::Vector<S>>().write_unaligned(best) };
    }
}

/// `sum_i a[i] * b[i]` of two rows of one length, a multiple of the padding.
#[inline(always)]
pub(crate) fn dot<S: Simd, T: Real>(simd: S, a: &[T], b: &[T]) -> T {
    assert_eq!(a.len(), b.len());
    let lanes = lanes::<S, T>();
    let whole = a.len() / (4 * lanes) * (4 * lanes);
    let mut sums = [T::splat(simd, T::zero()); 4];
    for at in (0..whole).step_by(4 * lanes) {
        for (v, sum) in sums.iter_mut().enumerate() {
            // SAFETY: at + 4 * lanes <= whole <= a.len() = b.len().
            let (x, y) = unsafe {
                let x = a.as_ptr().add(at + v * lanes).cast::<T::Vector<S>>();
                let y = b.as_ptr().add(at + v * lanes).cast::<T::Vector<S>>();
                (x.read_unaligned(), y.read_unaligned())
            };
            *sum = T::fused(simd, x, y, *sum);
        }
    }
    let mut total = T::zero();
    for sum in sums {
        total += T::sum_of(simd, sum);
    }
    for i in whole..a.len() {
        total += a[i] * b[i];
    }
    total
}
