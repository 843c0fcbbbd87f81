//! MEM, copies: between memory that another process owns and private memory, or from one such memory to another.
//!
//! In: addresses that the caller guarantees to be mapped. Out: bytes, each copied once; not atomic as a whole (words of
//! 8 bytes that are aligned on both sides are never torn by short copies).
//!
//! Why not `ptr::copy`: the other side may write at the same time, which for a plain access is a data race, that is, undefined
//! behaviour. Short copies are relaxed atomic accesses (on other processors than x86-64: all copies); long ones are one string instruction in inline assembly, which the
//! compiler must treat as an outside observer and which is as fast as memcpy on processors with fast string moves.

use crate::order;
use std::sync::atomic::{AtomicU8, AtomicU64};

/// Up to here a loop of atomic accesses beats the start-up cost of a string instruction (about 30 cycles).
#[cfg(target_arch = "x86_64")]
const SHORT_BYTES_MAX: usize = 128;

/// Copies `bytes` bytes from `source` to `target`; at most one of both may be private memory.
///
/// # Safety
/// Both ranges are mapped with the needed rights for the whole call, they do not overlap, and no Rust reference exists
/// to what is not private.
#[inline]
pub unsafe fn copy(target: *mut u8, source: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    if bytes > SHORT_BYTES_MAX {
        // SAFETY: as the caller promised.
        return unsafe { copy_long(target, source, bytes) };
    }
    // SAFETY: as the caller promised.
    unsafe { copy_short(target, source, bytes) };
}

/// # Safety
/// As [`copy`].
#[inline]
unsafe fn copy_short(target: *mut u8, source: *const u8, bytes: usize) {
    let mut done = 0;
    if (target as usize | source as usize) & 7 == 0 {
        while bytes - done >= 8 {
            // SAFETY: within both ranges, aligned to 8 (checked above, and `done` is a multiple of 8); atomic accesses may race.
            unsafe {
                let word = (*source.add(done).cast::<AtomicU64>()).load(order::COPY);
                (*target.add(done).cast::<AtomicU64>()).store(word, order::COPY);
            }
            done += 8;
        }
    }
    while done < bytes {
        // SAFETY: within both ranges; a byte is always aligned; atomic accesses may race.
        unsafe {
            let byte = (*source.add(done).cast::<AtomicU8>()).load(order::COPY);
            (*target.add(done).cast::<AtomicU8>()).store(byte, order::COPY);
        }
        done += 1;
    }
}

/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[inline]
unsafe fn copy_long(target: *mut u8, source: *const u8, bytes: usize) {
    // Eight bytes at a time: as fast as `movsb` where the processor has fast string moves, and 8 times as fast where it has not.
    // SAFETY: the caller promised both ranges; the direction flag is clear at every function boundary (System V ABI). To the
    // compiler this is foreign code that touches any memory (no `nomem`), so it assumes nothing about either range.
    unsafe {
        std::arch::asm!(
            "rep movsq",
            inout("rcx") bytes / 8 => _,
            inout("rdi") target => _,
            inout("rsi") source => _,
            options(nostack, preserves_flags)
        );
        copy_short(target.add(bytes & !7), source.add(bytes & !7), bytes & 7);
    }
}
