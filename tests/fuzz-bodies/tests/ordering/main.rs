//! No wake-up is lost, and nothing half-written is taken for whole: the code of both sides of a ring, and of front and core, under a model checker
//! that tries every interleaving and every order that the memory model allows; and the same on two real processors, a great many times
//! (`VMGMT_ROUNDS` says how many).
//!
//! What runs is the product's own code (`vmgmt_driver::order`, `vmgmt_device::rings`, `vmgmt_device::page`) with the product's own orders
//! (`vmgmt_driver::order`, `vmgmt_mem::order`); only the memory below it is the checker's. That the checker would find a weaker order is tested too.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test's own helper may fail the test

mod processors;
mod rings;
mod sleeps;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;

fn checked_fence(order: Ordering, weak: bool) {
    loom::sync::atomic::fence(if weak { Ordering::AcqRel } else { order });
}

/// The product's order, or none.
fn unless(weak: bool, order: Ordering) -> Ordering {
    if weak { Ordering::Relaxed } else { order }
}

/// The checker must find what is lost, or torn.
fn caught(what: &str, model: impl FnOnce()) {
    let failure = catch_unwind(AssertUnwindSafe(model)).expect_err(what);
    let text = failure
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| failure.downcast_ref::<&str>().map(|text| (*text).to_owned()))
        .unwrap_or_default();
    // An assertion of two values says first that they are not equal.
    assert!(
        text.contains("lost: ") || text.contains("torn: "),
        "{what}: {text}"
    );
}
