//! penstock-plan
