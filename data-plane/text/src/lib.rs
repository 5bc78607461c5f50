//! penstock-text
