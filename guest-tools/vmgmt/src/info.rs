//! `vmgmt info`: what the device, the host and the kernel say of themselves.

use anyhow::Result;
use serde_json::json;
use vmgmt_driver::abi::feature;
use vmgmt_driver::operations::common::Identity;
use vmgmt_driver::{Client, Mode};

use crate::files::show_shares;
use crate::local::printable;
use crate::output::say;
use crate::session::Session;

/// Modes and their feature bits.
const MODES: [(Mode, u64, &str); 4] = [
    (Mode::FILE, feature::MODE_FILE, "file"),
    (Mode::CHAT, feature::MODE_CHAT, "chat"),
    (Mode::STATISTICS, feature::MODE_STATISTICS, "statistics"),
    (Mode::CALCULATION, feature::MODE_CALCULATION, "calculation"),
];

/// Prints everything.
pub fn info(session: &Session) -> Result<()> {
    let mut client: Client = session.client(Mode::FILE)?;
    let Identity { number, name } = client.identity()?;
    let shared = client.channel().is_shared();
    let shares = client.shares()?;
    drop(client);
    let facts = session
        .device
        .as_ref()
        .map(|device| (device.facts(), device.interrupts()));
    let modes = |features: u64| -> Vec<&str> {
        MODES
            .iter()
            .filter(|(_, bit, _)| features & bit != 0)
            .map(|(_, _, name)| *name)
            .collect()
    };
    if session.general.json {
        let device = facts.map(|(facts, interrupts)| {
            json!({
                "abi": format!("{}.{}", facts.abi_version >> 16, facts.abi_version & 0xffff),
                "modes": modes(facts.features), "features": facts.features, "rings": facts.ring_count,
                "ring_entries_max": facts.ring_entries_max, "vectors": facts.vectors,
                "interrupts": format!("{:?}", interrupts.kind), "vectors_granted": interrupts.vectors,
                "transfer_bytes_max": facts.transfer_bytes_max, "list_entries_max": facts.list_entries_max,
                "session": facts.session, "generation": facts.generation, "core_life": facts.core_life,
                "memory_shared": shared,
            })
        });
        say!(
            "{}",
            json!({"address": session.function.address(), "backing": session.backing.name(), "name": name,
                   "number": number, "device": device, "shares": shares.len()})
        );
        show_shares(&shares, true)?;
        return Ok(());
    }
    say!(
        "device   {} through {}",
        session.function.address(),
        session.backing.name()
    );
    say!("this VM  {} (number {number})", printable(&name));
    if let Some((facts, interrupts)) = facts {
        say!(
            "contract {}.{}, modes: {}",
            facts.abi_version >> 16,
            facts.abi_version & 0xffff,
            modes(facts.features).join(", ")
        );
        say!(
            "rings    {} of at most {} entries; {:?} with {} of {} vectors",
            facts.ring_count,
            facts.ring_entries_max,
            interrupts.kind,
            interrupts.vectors,
            facts.vectors
        );
        say!(
            "memory   {}",
            if shared {
                "shared with the host"
            } else {
                "not shared: every byte goes by messages (slow; start QEMU with a memory-backend-memfd,share=on)"
            }
        );
        say!(
            "session  {} generation {} core life {}",
            facts.session,
            facts.generation,
            facts.core_life
        );
    }
    say!("shares:");
    show_shares(&shares, false)?;
    Ok(())
}
