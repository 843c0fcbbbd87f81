//! The whole product on real VMs: QEMU, a Linux guest, the guest's tool, vmgmtd.
//!
//! Each test starts its own vmgmtd and VMs. Where QEMU cannot be had a test says so and is counted as skipped by `cargo xtask test`;
//! with CI set that is a failure.

#[path = "qemu_vms/drivers.rs"]
mod drivers;
#[path = "qemu_vms/held.rs"]
mod held;
#[path = "qemu_vms/lives.rs"]
mod lives;
#[path = "qemu_vms/memory.rs"]
mod memory;
#[path = "qemu_vms/site.rs"]
mod site;
#[path = "qemu_vms/snapshots.rs"]
mod snapshots;
#[path = "qemu_vms/together.rs"]
mod together;
