//! penstock-model
