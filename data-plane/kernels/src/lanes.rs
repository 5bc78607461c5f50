//! Sixteen floats at a time, in three instruction sets.
//!
//! Kernel bodies are generic over [`Lanes`] and `#[inline(always)]`; [`multiversion!`] compiles each body once per
//! instruction set inside of a function that enables it, and chooses at run time.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use portable::Portable;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::{Avx2, Avx512};

/// Floats in a vector.
pub(crate) const LANES: usize = 16;

/// A vector of [`LANES`] floats.
///
/// # Safety
/// Every function may be called only where the implementation's instruction set is enabled, and pointers must be
/// valid for as many elements as a function reads or writes. No alignment is needed.
#[allow(clippy::missing_safety_doc, reason = "one rule for all, stated above")]
pub(crate) trait Lanes: Copy {
    /// Whether there are 32 registers, so that larger tiles pay.
    const MANY_REGISTERS: bool;

    unsafe fn splat(value: f32) -> Self;
    /// Reads 16 floats.
    unsafe fn load(from: *const f32) -> Self;
    /// Writes 16 floats.
    unsafe fn store(self, to: *mut f32);
    /// Writes 16 whole numbers between -127 and 127 as bytes.
    unsafe fn store_bytes(self, to: *mut i8);
    /// Reads 16 pairs of bf16: the first and the second of each.
    unsafe fn load_bf16_pairs(from: *const u16) -> (Self, Self);
    unsafe fn add(self, other: Self) -> Self;
    unsafe fn sub(self, other: Self) -> Self;
    unsafe fn mul(self, other: Self) -> Self;
    unsafe fn div(self, other: Self) -> Self;
    unsafe fn max(self, other: Self) -> Self;
    unsafe fn min(self, other: Self) -> Self;
    /// `self * factor + term`, rounded once where the machine can.
    unsafe fn mul_add(self, factor: Self, term: Self) -> Self;
    /// To the nearest whole number, ties to even.
    unsafe fn round(self) -> Self;
    /// 2 to the power of a whole number between -126 and 127.
    unsafe fn exp2_whole(self) -> Self;
    /// Lane by lane, `value` where `self` is below `limit`, else `other`.
    unsafe fn select_below(self, limit: Self, value: Self, other: Self) -> Self;

    /// Adds all lanes: halves onto each other, so the order is the same in every instruction set.
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: as this function's.
        unsafe { self.fold(|a, b| a + b) }
    }

    /// The largest lane.
    #[inline(always)]
    unsafe fn largest(self) -> f32 {
        // SAFETY: as this function's.
        unsafe { self.fold(|a, b| if b > a { b } else { a }) }
    }

    #[inline(always)]
    unsafe fn fold(self, join: impl Fn(f32, f32) -> f32) -> f32 {
        let mut lanes = [0.0; LANES];
        // SAFETY: as this function's; the array holds 16.
        unsafe { self.store(lanes.as_mut_ptr()) };
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] = join(lanes[lane], lanes[lane + half]);
            }
            half /= 2;
        }
        lanes[0]
    }

    /// e to the power of each lane, to 2 units in the last place; exactly 1 at 0 and exactly 0 below -87.
    /// Argument reduction by ln 2 in two parts and the polynomial are those of the Cephes library's `expf`.
    #[inline(always)]
    unsafe fn exp(self) -> Self {
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const POLYNOMIAL: [f32; 6] = [
            1.987_569_1e-4,
            1.398_199_9e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            5e-1,
        ];
        const LOWEST: f32 = -87.0;
        const HIGHEST: f32 = 88.0;
        // SAFETY: as this function's.
        unsafe {
            let x = self.max(Self::splat(LOWEST)).min(Self::splat(HIGHEST));
            let n = x.mul(Self::splat(std::f32::consts::LOG2_E)).round();
            let r = n.mul_add(Self::splat(-LN2_HIGH), x);
            let r = n.mul_add(Self::splat(-LN2_LOW), r);
            let mut p = Self::splat(POLYNOMIAL[0]);
            for coefficient in &POLYNOMIAL[1..] {
                p = p.mul_add(r, Self::splat(*coefficient));
            }
            let one = Self::splat(1.0);
            let p = p.mul_add(r.mul(r), r.add(one)).mul(n.exp2_whole());
            self.select_below(Self::splat(LOWEST), Self::splat(0.0), p)
        }
    }
}

/// Compiles a generic body for every instruction set and chooses by an [`Isa`](crate::Isa):
/// `multiversion! { fn name = body(argument: Type, …); }` makes `unsafe fn name(isa, argument, …)`, whose caller
/// answers for whatever the body asks of its arguments.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident = $body:ident ($($arg:ident: $type:ty),* $(,)?);) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments, reason = "the body's arguments and the instruction set")]
        $vis unsafe fn $name(isa: $crate::isa::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "the body's arguments")]
            unsafe fn avx512($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $body::<$crate::lanes::Avx512>($($arg),*) }
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            #[allow(clippy::too_many_arguments, reason = "the body's arguments")]
            unsafe fn avx2($($arg: $type),*) {
                // SAFETY: the features are enabled here; the rest is the caller's.
                unsafe { $body::<$crate::lanes::Avx2>($($arg),*) }
            }
            match isa.level() {
                // SAFETY: an Isa of this level exists only where the machine has its features.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Level::Avx512 | $crate::isa::Level::Amx => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                $crate::isa::Level::Avx2 => unsafe { avx2($($arg),*) },
                // SAFETY: it needs no features; the rest is the caller's.
                _ => unsafe { $body::<$crate::lanes::Portable>($($arg),*) },
            }
        }
    };
}
pub(crate) use multiversion;

#[cfg(test)]
mod tests;
