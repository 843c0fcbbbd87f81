//! Tests of the front: its loop in a thread, a keeper and a core played by the test, real clients over real sockets.

mod bench;
mod clients;
mod core_lives;
mod dma;
mod hand_over;
mod interrupts;
mod queues;

use bench::Bench;
use vmgmt_testkit::client::{Client, ClientError, GuestRam, Mapping, Seal, eventfd, irq};

const BAR0: u32 = 0;
const CONFIG: u32 = 7;

/// Makes the device a bus master.
fn bus_master(client: &mut Client) {
    client.region_write(CONFIG, 4, &[6, 0]).unwrap();
}

fn map(client: &mut Client, iova: u64, bytes: u64, ram: &GuestRam) -> Result<(), ClientError> {
    client.dma_map(Mapping {
        iova,
        bytes,
        flags: 3,
        memory: Some((ram.fd(), 0)),
    })
}
