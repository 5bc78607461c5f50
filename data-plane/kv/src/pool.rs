//! The pool of pages.

/// Number of a page, below the pool's size.
pub type PageId = u32;

/// Which pages are free.
#[derive(Debug, Clone)]
pub struct PagePool {
    free: Vec<PageId>,
    total: usize,
}

// === impl PagePool ===

impl PagePool {
    /// A pool of `total` free pages.
    ///
    /// # Panics
    /// More than `u32::MAX` pages.
    pub fn new(total: usize) -> Self {
        let count = u32::try_from(total).expect("a pool has fewer than 2^32 pages");
        // The last one is handed out first: low numbers come first.
        Self {
            free: (0..count).rev().collect(),
            total,
        }
    }

    /// Takes `count` pages and adds them to `pages`; all or none.
    pub fn take(&mut self, count: usize, pages: &mut Vec<PageId>) -> bool {
        let Some(left) = self.free.len().checked_sub(count) else {
            return false;
        };
        pages.extend(self.free.drain(left..).rev());
        true
    }

    /// Gives pages back.
    pub fn give(&mut self, pages: &[PageId]) {
        self.free.extend_from_slice(pages);
        debug_assert!(self.free.len() <= self.total, "a page was freed twice");
    }

    /// Free pages.
    pub fn available(&self) -> usize {
        self.free.len()
    }

    /// All pages.
    pub fn total(&self) -> usize {
        self.total
    }

    pub(crate) fn free_pages(&self) -> &[PageId] {
        &self.free
    }
}
