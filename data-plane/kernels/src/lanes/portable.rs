//! Lanes as an array, which compilers turn into whatever vectors the target has.

use super::{LANES, Lanes};

#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, join: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| join(self.0[lane], other.0[lane])))
    }
}

impl Lanes for Portable {
    const MANY_REGISTERS: bool = false;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: valid for 16 floats by the trait's rule.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: valid for 16 floats by the trait's rule.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, to: *mut i8) {
        // SAFETY: valid for 16 bytes by the trait's rule.
        unsafe {
            to.cast::<[i8; LANES]>()
                .write_unaligned(self.0.map(|value| value as i8))
        }
    }

    #[inline(always)]
    unsafe fn load_bf16_pairs(from: *const u16) -> (Self, Self) {
        // SAFETY: valid for 32 bf16 by the trait's rule.
        let bits = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
        (
            Self(bits.map(|pair| widen(pair[0]))),
            Self(bits.map(|pair| widen(pair[1]))),
        )
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self {
        // Rounded twice: `f32::mul_add` would call a slow function where there is no such instruction.
        Self(std::array::from_fn(|lane| {
            self.0[lane] * factor.0[lane] + term.0[lane]
        }))
    }

    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding and taking away 1.5·2²³ rounds whatever is small against it, ties to even.
        const MAGIC: f32 = 12_582_912.0;
        Self(self.0.map(|lane| (lane + MAGIC) - MAGIC))
    }

    #[inline(always)]
    unsafe fn exp2_whole(self) -> Self {
        Self(
            self.0
                .map(|lane| f32::from_bits(((lane as i32 + 127) << 23) as u32)),
        )
    }

    #[inline(always)]
    unsafe fn select_below(self, limit: Self, value: Self, other: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            if self.0[lane] < limit.0[lane] {
                value.0[lane]
            } else {
                other.0[lane]
            }
        }))
    }
}
