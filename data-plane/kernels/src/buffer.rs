//! Memory aligned for vectors and tiles.

use std::{
    alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error},
    ops::{Deref, DerefMut},
    ptr::NonNull,
};

/// Buffers of this size and more are aligned to huge pages and ask for them.
const HUGE_PAGE: usize = 2 << 20;
/// A cache line, which is a vector of AVX-512 and a row of a tile as well.
const LINE: usize = 64;

/// Numbers for which all bytes zero means zero.
pub(crate) trait Zeroable: Copy + Send + Sync + 'static {}
impl Zeroable for f32 {}
impl Zeroable for i32 {}
impl Zeroable for u16 {}
impl Zeroable for i8 {}
impl Zeroable for u8 {}

/// A zeroed slice on the heap, aligned to 64 bytes, or to 2 MiB where it is that large.
pub(crate) struct Buffer<T: Zeroable> {
    pointer: NonNull<T>,
    len: usize,
}

// SAFETY: a Buffer owns its memory as a Vec does, and its elements are plain numbers.
unsafe impl<T: Zeroable> Send for Buffer<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Zeroable> Sync for Buffer<T> {}

impl<T: Zeroable> Buffer<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self {
                pointer: NonNull::dangling(),
                len,
            };
        }
        let layout = Self::layout(len);
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) }.cast::<T>();
        let Some(pointer) = NonNull::new(pointer) else {
            handle_alloc_error(layout)
        };
        advise_huge(pointer.as_ptr().cast(), layout);
        Self { pointer, len }
    }

    /// Makes it at least `len` long. The content is lost where it has to grow.
    pub(crate) fn at_least(&mut self, len: usize) -> &mut [T] {
        if self.len < len {
            *self = Self::zeroed(len.next_power_of_two());
        }
        &mut self[..len]
    }

    fn layout(len: usize) -> Layout {
        let bytes = len * size_of::<T>();
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        Layout::from_size_align(bytes, align).expect("a slice's size fits an isize")
    }
}

/// Asks for huge pages under memory that was allocated but not touched yet: rows of large activations lie on pages of
/// their own, and a kernel that writes a few columns of many rows would spend its time looking pages up. Advice only:
/// what it is given does not change, and a refusal costs only speed.
pub fn prefer_huge_pages<T>(values: &[T]) {
    let start = (values.as_ptr() as usize).next_multiple_of(HUGE_PAGE);
    let end = (values.as_ptr_range().end as usize) / HUGE_PAGE * HUGE_PAGE;
    if let Some(bytes) = end.checked_sub(start).filter(|&bytes| bytes > 0) {
        let layout = Layout::from_size_align(bytes, LINE).expect("a part of a slice fits an isize");
        advise_huge(start as *mut _, layout);
    }
}

#[cfg(target_os = "linux")]
fn advise_huge(pointer: *mut libc::c_void, layout: Layout) {
    if layout.size() >= HUGE_PAGE {
        // SAFETY: the range is allocated, and advice does not change its content. A refusal costs only speed.
        unsafe { libc::madvise(pointer, layout.size(), libc::MADV_HUGEPAGE) };
    }
}

#[cfg(not(target_os = "linux"))]
fn advise_huge(_: *mut libc::c_void, _: Layout) {}

impl<T: Zeroable> Drop for Buffer<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated by `zeroed` with this very layout.
            unsafe { dealloc(self.pointer.as_ptr().cast(), Self::layout(self.len)) };
        }
    }
}

impl<T: Zeroable> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised elements belong to this buffer (none where it dangles).
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len) }
    }
}

impl<T: Zeroable> std::fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffer").field("len", &self.len).finish()
    }
}
