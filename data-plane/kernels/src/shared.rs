//! A slice of which several tasks write different parts.

use std::marker::PhantomData;

/// A mutable slice that tasks of one parallel region share.
pub(crate) struct SharedMut<'a, T> {
    pointer: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable slice whose parts are handed out by `part`, whose callers promise not to overlap.
unsafe impl<T: Send> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMut<'_, T> {}

impl<'a, T> SharedMut<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            pointer: slice.as_mut_ptr(),
            len: slice.len(),
            owner: PhantomData,
        }
    }

    /// `len` elements from `start` on.
    ///
    /// # Safety
    /// No other part that lives at the same time overlaps this one.
    #[allow(
        clippy::mut_from_ref,
        reason = "that is what it is for; the caller keeps the parts apart"
    )]
    #[inline]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        assert!(
            start <= self.len && len <= self.len - start,
            "a part lies inside of its slice"
        );
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.add(start), len) }
    }
}
