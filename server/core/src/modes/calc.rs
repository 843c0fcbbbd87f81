//! WORKSHOP calculation. This version has the room and no work in it yet: every operation is answered NOT_SUPPORTED.

use super::Submitted;
use crate::refusal::Refusal;
use vmgmt_device::rings::Fetched;

/// # Errors
/// Always [`Refusal::ModeNotSupported`].
pub fn submit(_fetched: &Fetched) -> Submitted {
    Err(Refusal::ModeNotSupported)
}
