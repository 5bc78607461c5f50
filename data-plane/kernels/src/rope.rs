//! Rotary embedding (Su et al. 2021, arXiv 2104.09864; half-split, as Hugging Face has it) of q and k, the optional
//! norm of their heads before it, and the write of k and v into the paged cache.

use half::bf16;

use crate::{Cpu, norm::norm_row, shared::SharedMut};

/// Widths of a row of q, k and v, laid side by side: `[(heads + 2 · kv_heads) · head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QkvShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// Shape of one layer's cache.
///
/// Keys lie first, `[pages][kv_heads][head_dim][page_size]`: transposed, so that the scores of 16 positions are one
/// vector. Values follow, `[pages][kv_heads][page_size][head_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Pages.
    pub num_pages: usize,
    /// Tokens a page.
    pub page_size: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

/// What [`rotate`] does to every row.
#[derive(Debug, Clone, Copy)]
pub struct Rotate<'a> {
    /// Widths of a row.
    pub qkv: QkvShape,
    /// `[positions][cos of head_dim / 2, then sin of head_dim / 2]`.
    pub angles: &'a [f32],
    /// Position of each row.
    pub positions: &'a [u32],
    /// Norm weights of the heads of q and of k, and eps.
    pub norms: Option<(&'a [f32], &'a [f32], f32)>,
}

/// Widest head that [`rotate`] takes.
pub const MAX_HEAD_DIM: usize = 1024;

/// An element of the cache.
pub(crate) trait CacheElement: Copy + Send + Sync + 'static {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// The elements, where they are bf16.
    fn as_bf16(elements: &[Self]) -> Option<&[bf16]>;
}

impl CacheElement for f32 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }
}

impl CacheElement for bf16 {
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }

    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn as_bf16(elements: &[Self]) -> Option<&[bf16]> {
        Some(elements)
    }
}

// === impl QkvShape ===

impl QkvShape {
    /// Elements of a row.
    pub fn width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

// === impl CacheShape ===

impl CacheShape {
    /// Elements of the whole, keys and values.
    pub fn elements(&self) -> usize {
        2 * self.half()
    }

    /// Elements of the keys, which is where the values start.
    pub(crate) fn half(&self) -> usize {
        self.num_pages * self.page_elements()
    }

    /// Elements of a page's keys.
    fn page_elements(&self) -> usize {
        self.kv_heads * self.head_elements()
    }

    /// Elements of a head's keys in a page.
    pub(crate) fn head_elements(&self) -> usize {
        self.page_size * self.head_dim
    }

    /// Where a head of a page starts among the keys.
    pub(crate) fn head_start(&self, page: usize, head: usize) -> usize {
        page * self.page_elements() + head * self.head_elements()
    }
}

/// Heads of this many elements in all are worth a task of their own.
const TASK_ELEMENTS: usize = 1 << 14;

/// Normalises (where there are norms) and rotates q and k of every row of `qkv` in place.
///
/// # Panics
/// A slice has another length than the shapes say, or a position lies outside of the table of angles.
pub fn rotate(cpu: Cpu, qkv: &mut [f32], call: &Rotate<'_>) {
    let QkvShape {
        heads,
        kv_heads,
        head_dim,
    } = call.qkv;
    let (rows, width) = (call.positions.len(), call.qkv.width());
    assert!(qkv.len() == rows * width, "a position for each row");
    assert!(
        call.norms
            .is_none_or(|(q, k, _)| q.len() == head_dim && k.len() == head_dim),
        "norms are a head wide"
    );
    assert!(head_dim <= MAX_HEAD_DIM, "a head fits the stack");
    let qkv = SharedMut::new(qkv);
    cpu.pool
        .run_ranges(heads + kv_heads, task_heads(head_dim, rows), &|range| {
            for row in 0..rows {
                for head in range.clone() {
                    // SAFETY: a head's columns belong to one task.
                    let values = unsafe { qkv.part(row * width + head * head_dim, head_dim) };
                    rotate_head(cpu, values, row, head < heads, call);
                }
            }
        });
}

/// Writes k and v of every row of `qkv` into `cache`, row i into slot `slots[i]`, which is
/// `page · page_size + offset`.
///
/// # Panics
/// A slice has another length than the shapes say, or a slot lies outside of the cache.
#[allow(
    private_bounds,
    reason = "the cache's elements are f32 and bf16, and no others"
)]
pub fn store<T: CacheElement>(
    cpu: Cpu,
    cache: &mut [T],
    shape: CacheShape,
    qkv: &[f32],
    qkv_shape: QkvShape,
    slots: &[usize],
) {
    let QkvShape {
        heads,
        kv_heads,
        head_dim,
    } = qkv_shape;
    let (rows, width) = (slots.len(), qkv_shape.width());
    assert!(qkv.len() == rows * width, "a slot for each row");
    assert!(cache.len() == shape.elements(), "the cache has its shape");
    assert!(
        shape.kv_heads == kv_heads && shape.head_dim == head_dim,
        "the cache is this model's"
    );
    let cache = SharedMut::new(cache);
    cpu.pool
        .run_ranges(2 * kv_heads, task_heads(head_dim, rows), &|range| {
            for (row, &slot) in slots.iter().enumerate() {
                for head in range.clone() {
                    let values = &qkv[row * width + (heads + head) * head_dim..][..head_dim];
                    // SAFETY: a head goes to places that no other head has, whatever the slots are, and belongs to
                    // one task.
                    unsafe { store_head(values, slot, head, &cache, &shape) };
                }
            }
        });
}

fn task_heads(head_dim: usize, rows: usize) -> usize {
    TASK_ELEMENTS.div_ceil(head_dim * rows.max(1))
}

fn rotate_head(cpu: Cpu, head: &mut [f32], row: usize, is_query: bool, call: &Rotate<'_>) {
    if let Some((query, key, eps)) = call.norms {
        let weight = if is_query { query } else { key };
        let mut normed = [0.0; MAX_HEAD_DIM];
        let normed = &mut normed[..head.len()];
        // SAFETY: the three are a head wide.
        unsafe { norm_row(cpu.isa, normed, head, weight, eps) };
        head.copy_from_slice(normed);
    }
    let angles = &call.angles[call.positions[row] as usize * head.len()..][..head.len()];
    let (cos, sin) = angles.split_at(head.len() / 2);
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// # Safety
/// No other thread writes this head (of k, then of v) of the cache.
unsafe fn store_head<T: CacheElement>(
    values: &[f32],
    slot: usize,
    head: usize,
    cache: &SharedMut<'_, T>,
    shape: &CacheShape,
) {
    let (page, offset) = (slot / shape.page_size, slot % shape.page_size);
    assert!(page < shape.num_pages, "the slot lies in the cache");
    if head < shape.kv_heads {
        // SAFETY: the caller's promise.
        let keys = unsafe { cache.part(shape.head_start(page, head), shape.head_elements()) };
        for (key, &value) in keys[offset..].iter_mut().step_by(shape.page_size).zip(values) {
            *key = T::from_f32(value);
        }
    } else {
        let start = shape.half() + shape.head_start(page, head - shape.kv_heads) + offset * shape.head_dim;
        // SAFETY: the caller's promise.
        let stored = unsafe { cache.part(start, shape.head_dim) };
        for (stored, &value) in stored.iter_mut().zip(values) {
            *stored = T::from_f32(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    #[test]
    fn rotation_agrees_with_the_reference_and_k_and_v_land_in_their_slots() {
        let qkv_shape = QkvShape {
            heads: 4,
            kv_heads: 2,
            head_dim: 6,
        };
        let (slots, positions) = ([7_usize, 0, 11], [3_u32, 0, 9]);
        for page_size in [1, 4] {
            let cache_shape = CacheShape {
                num_pages: 12 / page_size,
                page_size,
                kv_heads: 2,
                head_dim: 6,
            };
            let angles: Vec<f32> = (0..10)
                .flat_map(|position| {
                    let angle = move |i: usize| position as f32 / 10_f32.powi(i as i32);
                    (0..3)
                        .map(move |i| angle(i).cos())
                        .chain((0..3).map(move |i| angle(i).sin()))
                })
                .collect();
            let before = reference::noise(5, 3 * qkv_shape.width());
            let (mut qkv, mut cache) = (before.clone(), vec![0.0_f32; cache_shape.elements()]);
            let cpu = Cpu::detect();
            rotate(
                cpu,
                &mut qkv,
                &Rotate {
                    qkv: qkv_shape,
                    angles: &angles,
                    positions: &positions,
                    norms: None,
                },
            );
            store(cpu, &mut cache, cache_shape, &qkv, qkv_shape, &slots);
            for (row, (&slot, &position)) in slots.iter().zip(&positions).enumerate() {
                let (cos, sin) = angles[position as usize * 6..][..6].split_at(3);
                for head in 0..8 {
                    let at = row * qkv_shape.width() + head * 6;
                    let expected = if head < 6 {
                        reference::rotate(&before[at..at + 6], cos, sin)
                    } else {
                        before[at..at + 6].to_vec()
                    };
                    reference::assert_close(&qkv[at..at + 6], &expected, 1e-6);
                    let (page, offset) = (slot / page_size, slot % page_size);
                    for dim in 0..6 {
                        let stored = match head {
                            4 | 5 => cache[((page * 2 + head - 4) * 6 + dim) * page_size + offset],
                            6 | 7 => {
                                cache
                                    [cache.len() / 2 + ((page * 2 + head - 6) * page_size + offset) * 6 + dim]
                            }
                            _ => continue,
                        };
                        assert_eq!(stored, qkv[at + dim]);
                    }
                }
            }
        }
    }
}
