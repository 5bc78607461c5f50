//! Buffers on the device, and page-locked ones on the host.

use std::marker::PhantomData;

use cudarc::driver::{CudaSlice, CudaView, DevicePtr, PinnedHostSlice};
use half::bf16;

use super::{CudaError, Gpu, error::Doing};

/// An element of a buffer: plain numbers, for which any bytes will do.
///
/// # Safety
/// Every pattern of bits is a value, and there is no padding.
pub unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: numbers.
unsafe impl Plain for u8 {}
// SAFETY: numbers.
unsafe impl Plain for u32 {}
// SAFETY: numbers.
unsafe impl Plain for u64 {}
// SAFETY: numbers.
unsafe impl Plain for f32 {}
// SAFETY: numbers.
unsafe impl Plain for bf16 {}

/// Memory of one device, freed when dropped. Work on it is ordered by the device's one stream.
pub struct Buffer<T> {
    bytes: CudaSlice<u8>,
    len: usize,
    element: PhantomData<T>,
}

/// Page-locked memory of the host, which the device reads and writes without the driver's help.
pub struct Staging<T> {
    bytes: PinnedHostSlice<u8>,
    len: usize,
    element: PhantomData<T>,
}

// === impl Buffer ===

impl<T: Plain> Buffer<T> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Address of element `at`, which exists (or is the end).
    pub(super) fn address(&self, gpu: &Gpu, at: usize) -> u64 {
        assert!(at <= self.len, "an element lies in its buffer");
        // The guard would order streams; there is only one.
        let (start, _guard) = self.bytes.device_ptr(&gpu.stream);
        start + (at * size_of::<T>()) as u64
    }

    pub(super) fn view(&self, at: usize, len: usize) -> CudaView<'_, u8> {
        let size = size_of::<T>();
        self.bytes.slice(at * size..(at + len) * size)
    }
}

// === impl Staging ===

impl<T: Plain> Staging<T> {
    /// The elements, once the device is through with them.
    ///
    /// # Errors
    /// An earlier copy failed.
    pub fn values(&mut self) -> Result<&mut [T], CudaError> {
        let pointer = self.bytes.as_mut_ptr().to("wait for a copy")?;
        // SAFETY: the allocation has `len` elements, any bytes are one, and it is aligned to a page.
        Ok(unsafe { std::slice::from_raw_parts_mut(pointer.cast(), self.len) })
    }
}

// === impl Gpu ===

impl Gpu {
    /// Zeros.
    ///
    /// # Errors
    /// Memory cannot be had.
    pub fn zeros<T: Plain>(&self, len: usize) -> Result<Buffer<T>, CudaError> {
        let bytes = len.max(1) * size_of::<T>();
        let allocated = self.stream.alloc_zeros(bytes).to("allocate");
        Ok(Buffer {
            bytes: allocated.map_err(|error| with_size(error, bytes))?,
            len,
            element: PhantomData,
        })
    }

    /// A copy of `values`.
    ///
    /// # Errors
    /// Memory cannot be had, or the copy fails.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<Buffer<T>, CudaError> {
        let mut buffer = self.zeros(values.len())?;
        self.write(&mut buffer, 0, values)?;
        Ok(buffer)
    }

    /// Copies `values` to `buffer`, from element `at` on. They may change once this returns.
    ///
    /// # Errors
    /// The copy fails.
    ///
    /// # Panics
    /// They do not fit.
    pub fn write<T: Plain>(&self, buffer: &mut Buffer<T>, at: usize, values: &[T]) -> Result<(), CudaError> {
        assert!(
            at + values.len() <= buffer.len,
            "what is written lies in the buffer"
        );
        let size = size_of::<T>();
        let mut target = buffer.bytes.slice_mut(at * size..(at + values.len()) * size);
        self.stream
            .memcpy_htod(bytes_of(values), &mut target)
            .to("copy to the device")?;
        // A copy from ordinary memory may still read it after the call has returned.
        self.synchronize()
    }

    /// Copies the first `len` elements of `staging` to `buffer`, from element `at` on, without waiting.
    ///
    /// # Errors
    /// The copy fails.
    ///
    /// # Panics
    /// There are fewer, or they do not fit.
    pub fn write_staged<T: Plain>(
        &self,
        buffer: &mut Buffer<T>,
        at: usize,
        staging: &mut Staging<T>,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(
            len <= staging.len && at + len <= buffer.len,
            "what is copied lies in both"
        );
        let bytes = len * size_of::<T>();
        let to = buffer.address(self, at);
        self.context.bind_to_thread().to("take up its context")?;
        let from = staging.bytes.as_ptr().to("wait for a copy")?;
        // SAFETY: both ranges exist by the assertion. The staging memory outlives the copy: `Staging::values` and its
        // drop wait for the event that is recorded behind it, and the buffer's memory is freed in stream order.
        unsafe {
            let from = std::slice::from_raw_parts(from, bytes);
            cudarc::driver::result::memcpy_htod_async(to, from, self.stream.cu_stream())
                .to("copy to the device")?;
        }
        self.mark(staging)
    }

    /// Starts to copy elements of `buffer` from `at` on to the front of `staging`; [`Staging::values`] waits for them.
    ///
    /// # Errors
    /// The copy fails.
    ///
    /// # Panics
    /// There are fewer, or they do not fit.
    pub fn read_staged<T: Plain>(
        &self,
        staging: &mut Staging<T>,
        buffer: &Buffer<T>,
        at: usize,
        len: usize,
    ) -> Result<(), CudaError> {
        assert!(
            len <= staging.len && at + len <= buffer.len,
            "what is copied lies in both"
        );
        let bytes = len * size_of::<T>();
        let from = buffer.address(self, at);
        self.context.bind_to_thread().to("take up its context")?;
        let to = staging.bytes.as_mut_ptr().to("wait for a copy")?;
        // SAFETY: as in `write_staged`.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to, bytes);
            cudarc::driver::result::memcpy_dtoh_async(to, from, self.stream.cu_stream())
                .to("copy from the device")?;
        }
        self.mark(staging)
    }

    /// Copies `len` elements from `at` on back, and waits for them.
    ///
    /// # Errors
    /// The copy, or something before it, fails.
    ///
    /// # Panics
    /// There are fewer.
    pub fn read<T: Plain>(&self, buffer: &Buffer<T>, at: usize, len: usize) -> Result<Vec<T>, CudaError> {
        assert!(at + len <= buffer.len, "what is read lies in the buffer");
        let bytes = self
            .stream
            .clone_dtoh(&buffer.view(at, len))
            .to("copy from the device")?;
        self.synchronize()?;
        let values = bytes.chunks_exact(size_of::<T>());
        // SAFETY: each chunk has an element's size, and any bytes are one.
        Ok(values
            .map(|bytes| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
            .collect())
    }

    /// Page-locked zeros.
    ///
    /// # Errors
    /// Memory cannot be had.
    pub fn staging<T: Plain>(&self, len: usize) -> Result<Staging<T>, CudaError> {
        let bytes = len.max(1) * size_of::<T>();
        // Plain page-locked memory, not write-combined, because the host reads some of it.
        // SAFETY: every byte is written below before anyone reads it.
        let mut allocated = unsafe { self.context.alloc_pinned_with_flags::<u8>(bytes, 0) }
            .to("allocate page-locked memory")?;
        allocated
            .as_mut_slice()
            .to("allocate page-locked memory")?
            .fill(0);
        Ok(Staging {
            bytes: allocated,
            len,
            element: PhantomData,
        })
    }

    /// Has [`Staging::values`] wait for all work so far.
    fn mark<T>(&self, staging: &mut Staging<T>) -> Result<(), CudaError> {
        use cudarc::driver::HostSlice;
        // cudarc records the memory's event when this guard is dropped.
        // SAFETY: the slice is not used.
        let (_, guard) = unsafe { staging.bytes.stream_synced_slice(&self.stream) };
        drop(guard);
        self.context.check_err().to("mark a copy")
    }
}

fn with_size(error: CudaError, bytes: usize) -> CudaError {
    match error {
        CudaError::OutOfMemory { .. } => CudaError::OutOfMemory { bytes },
        other => other,
    }
}

fn bytes_of<T: Plain>(values: &[T]) -> &[u8] {
    // SAFETY: plain elements have no padding.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), size_of_val(values)) }
}
