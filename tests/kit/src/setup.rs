//! Setup: makes sure that this machine can boot the VMs that tests and the demo use.
//!
//! In: a Debian machine with cargo, perhaps freshly made. Out: [`Tools`]: a QEMU with the vfio-user client and guest images,
//! all below one cache folder. It must never know what is tested with them.
//!
//! Every step is skipped when its result is there, is built beside its place and renamed into it, and is done under a
//! lock, so that two runs at once wait for each other.

pub mod accel;
pub mod cache;
mod cpio;
pub mod image;
mod mirror;
mod packages;
mod qemu;

pub use accel::Accelerator;
pub use cache::{Cache, repository};
pub use image::{Image, Images};
pub use packages::{missing_packages, tail};
pub use qemu::Qemu;

use anyhow::Result;
use std::time::Instant;

/// What [`prepare`] may do and should make.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    /// Which image is needed.
    pub image: Image,
    /// Whether packages may be installed on the host through apt (as root). Tests leave that to `cargo xtask setup`.
    pub install: bool,
}

/// What is there after setup.
#[derive(Clone, Debug)]
pub struct Tools {
    /// The QEMU to start.
    pub qemu: Qemu,
    /// The kernel and initramfs of the image that was asked for.
    pub images: Images,
    /// Whether to use KVM or TCG.
    pub accelerator: Accelerator,
}

/// Brings everything up to date and says where it is.
pub fn prepare(wanted: Wanted) -> Result<Tools> {
    let cache = Cache::open()?;
    let lock = cache.lock()?;
    if wanted.install {
        packages::install_missing()?;
    }
    let qemu = qemu::ensure_qemu(&cache, &lock)?;
    let images = image::ensure_image(&cache, &lock, wanted.image)?;
    let accelerator = accel::choose(&cache, &lock, &qemu, &images)?;
    Ok(Tools {
        qemu,
        images,
        accelerator,
    })
}

/// Does one step and says on stderr what it was and how long it took.
pub fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("setup: {what} …");
    let start = Instant::now();
    let result = work();
    let outcome = if result.is_ok() { "done" } else { "FAILED" };
    eprintln!(
        "setup: {what}: {outcome} in {:.1} s",
        start.elapsed().as_secs_f64()
    );
    result
}
