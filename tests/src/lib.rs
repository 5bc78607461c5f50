//! penstock-tests
