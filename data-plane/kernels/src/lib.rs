//! penstock-kernels
