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
    ($t:ty, $key:ty, $pad:literal, $floor:literal, $vector:ident, $splat:ident, $mul_add:ident, $max:ident, $sum:ident) => {
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

real!(f32, u32, 16, 1e-2, f32s, splat_f32s, mul_add_e_f32s, max_f32s, reduce_sum_f32s);
real!(f64, u64, 8, 1e-6, f64s, splat_f64s, mul_add_e_f64s, max_f64s, reduce_sum_f64s);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_sort_as_the_numbers_do() {
        let sorted = [f32::NEG_INFINITY, -3.0, -1e-40, 0.0, 1e-40, 2.5, f32::INFINITY];
        assert!(sorted.windows(2).all(|w| w[0].key() < w[1].key()));
        assert_eq!((-0.0f32).key(), 0.0f32.key());
        assert_eq!((-0.0f64).key(), 0.0f64.key());
    }
}
