//! MEM, orders: in which order our accesses to shared memory become visible, by name, so that a model checker runs the ring's code with these very
//! ones (tests/fuzz-bodies/tests/ordering).

use std::sync::atomic::Ordering;

/// Of a word's load: what is read after it is as new as the word.
pub const LOAD: Ordering = Ordering::Acquire;
/// Of a word's store: whoever sees it sees what was written before it.
pub const STORE: Ordering = Ordering::Release;
/// Of each word of a copy: not torn, and no more.
pub const COPY: Ordering = Ordering::Relaxed;
/// Of the fence after a copy out.
pub const AFTER_READ: Ordering = Ordering::Acquire;
/// Of the fence before a copy in.
pub const BEFORE_WRITE: Ordering = Ordering::Release;
/// Of the fence between what was stored before and what is loaded after.
pub const FENCE: Ordering = Ordering::SeqCst;
