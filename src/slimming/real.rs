//! The two element types, `f32` and `f64`, and the handful of vector operations that the kernels need of them.

use std::fmt::Debug;
use std::iter::Sum;
use std::ops::{AddAssign, MulAssign};

use num_traits::{Float, PrimInt};
use pulp::Simd;

/// An element type of the method: `f32` or `f64`.
pub trait Real: Float + AddAssign + MulAssign + Sum + Default + Debug + Send + Sync + 'static {
    /// Rows are padded to this many elements: 64 bytes, the widest vector that is dispatched to.
    const PAD: usize;
    /// Below this share of `(sum_i e_i |v_i|)^2`, `e^T G e` has lost too many digits to cancellation (laps.md, identity 3).
    const GRAM_FLOOR: f64;
    /// An unsigned integer of the same width, ordered as the numbers are.
    type Key: PrimInt + Default + Send + Sync;
    /// A vector register of instruction set `S`.
    type Vector<S: Simd>: Copy;

    fn of(x: f64) -> Self;
    fn wide(self) -> f64;
    /// The nearest number that is finite; NaN for NaN.
    fn saturating(x: f64) -> Self {
        let most = Self::max_value().wide();
        Self::of(x.clamp(-most, most))
    }
    /// A key that sorts as the number does; both zeros share one key.
    fn key(self) -> Self::Key;
    /// The magnitude as an integer: sorts as |x| does, with infinity and NaN above all numbers.
    fn magnitude(self) -> Self::Key;
    /// The number of this magnitude.
    fn of_magnitude(bits: Self::Key) -> Self;
    /// e^x of an x <= 0, to 2 units in the last place.
    fn exponential(self) -> Self;
    fn splat<S: Simd>(simd: S, x: Self) -> Self::Vector<S>;
    /// `a * b + c`, fused where the machine does that in hardware.
    fn fused<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>, c: Self::Vector<S>)
    -> Self::Vector<S>;
    fn max_of<S: Simd>(simd: S, a: Self::Vector<S>, b: Self::Vector<S>) -> Self::Vector<S>;
    fn sum_of<S: Simd>(simd: S, a: Self::Vector<S>) -> Self;
}

/// Elements of `T` in one vector of `S`.
#[inline(always)]
pub(crate) const fn lanes<S: Simd, T: Real>() -> usize {
    size_of::<T::Vector<S>>() / size_of::<T>()
}

/// `n` rounded up to whole padded rows.
pub(crate) fn padded<T: Real>(n: usize) -> usize {
    n.next_multiple_of(T::PAD)
}

macro_rules! real {
    ($t:ty, $key:ty, $pad:literal, $floor:literal, $vector:ident, $splat:ident, $mul_add:ident, $max:ident, $sum:ident, $exponential:expr) => {
        impl Real for $t {
            const PAD: usize = $pad;
            const GRAM_FLOOR: f64 = $floor;
            type Key = $key;
            type Vector<S: Simd> = S::$vector;

            #[inline(always)]
            fn of(x: f64) -> Self {
                x as $t
            }
            #[inline(always)]
            fn wide(self) -> f64 {
                self as f64
            }
            #[inline(always)]
            fn key(self) -> $key {
                let bits = (self + 0.0).to_bits();
                let sign = 1 << (<$key>::BITS - 1);
                if bits & sign == 0 { bits | sign } else { !bits }
            }
            #[inline(always)]
            fn magnitude(self) -> $key {
                self.abs().to_bits()
            }
            #[inline(always)]
            fn of_magnitude(bits: $key) -> Self {
                <$t>::from_bits(bits)
            }
            #[inline(always)]
            fn exponential(self) -> $t {
                $exponential(self)
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, x: Self) -> S::$vector {
                simd.$splat(x)
            }
            #[inline(always)]
            fn fused<S: Simd>(simd: S, a: S::$vector, b: S::$vector, c: S::$vector) -> S::$vector {
                simd.$mul_add(a, b, c)
            }
            #[inline(always)]
            fn max_of<S: Simd>(simd: S, a: S::$vector, b: S::$vector) -> S::$vector {
                simd.$max(a, b)
            }
            #[inline(always)]
            fn sum_of<S: Simd>(simd: S, a: S::$vector) -> Self {
                simd.$sum(a)
            }
        }
    };
}

real!(f32, u32, 16, 1e-2, f32s, splat_f32s, mul_add_e_f32s, max_f32s, reduce_sum_f32s, exponential);
real!(f64, u64, 8, 1e-6, f64s, splat_f64s, mul_add_e_f64s, max_f64s, reduce_sum_f64s, f64::exp);

/// e^x of an x <= 0: without branches and calls, so that a loop of it runs as vectors, unlike libm's.
///
/// `x = n ln 2 + r`, a polynomial of r (the minimax coefficients of the Cephes library), and 2^n in two steps, for the
/// subnormal results.
#[inline(always)]
fn exponential(x: f32) -> f32 {
    // ln 2 in two parts: n times the first, of nine bits, is exact.
    const HIGH: f32 = 0.693_359_4;
    const LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting it rounds to a whole number.
    const ROUND: f32 = 12_582_912.0;
    // Below, e^x is less than half of the least subnormal.
    let x = x.max(-104.0);
    let rounded = x * std::f32::consts::LOG2_E + ROUND;
    let n = rounded - ROUND;
    let r = x - n * HIGH - n * LOW;
    let p = 1.987_569_1e-4;
    let p = p * r + 1.398_199_9e-3;
    let p = p * r + 8.333_452e-3;
    let p = p * r + 4.166_579_6e-2;
    let p = p * r + 1.666_666_5e-1;
    let p = p * r + 0.5;
    let p = p * (r * r) + r + 1.0;
    // Whole numbers near ROUND lie one unit in the last place apart. (A cast would test for NaN.)
    let n = rounded.to_bits() as i32 - ROUND.to_bits() as i32;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    p * power(n / 2) * power(n - n / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponentials_are_libms_to_two_units_and_fade_into_zero() {
        let mut x = -110.0f32;
        while x <= 0.0 {
            let (found, expected) = (x.exponential(), f64::from(x).exp());
            let unit = f64::from(f32::EPSILON * (expected as f32)).max(2f64.powi(-149));
            assert!((f64::from(found) - expected).abs() <= 2.0 * unit, "{x}: {found}, not {expected}");
            x += 0.001_3;
        }
        assert_eq!(0f32.exponential(), 1.0);
        assert_eq!(f32::MIN.exponential(), 0.0);
    }

    #[test]
    fn keys_sort_as_the_numbers_do() {
        let sorted = [f32::NEG_INFINITY, -3.0, -1e-40, 0.0, 1e-40, 2.5, f32::INFINITY];
        assert!(sorted.windows(2).all(|w| w[0].key() < w[1].key()));
        assert_eq!((-0.0f32).key(), 0.0f32.key());
        assert_eq!((-0.0f64).key(), 0.0f64.key());
    }
}
