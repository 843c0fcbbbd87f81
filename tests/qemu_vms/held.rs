//! What is done to a device behind the back of the program that holds it: the program goes on by itself, and nothing is lost.

use crate::site::{LONG, SHORT, Site, host_checksum, site};
use anyhow::{Context, Result, ensure};
use std::thread;
use vmgmt_testkit::process::wait_until;
use vmgmt_testkit::vm::{Driver, Iommu, Running, Vm};

/// From a second shell: what it is, and the commands.
const BEHIND_ITS_BACK: [(&str, &str); 2] = [
    (
        "the function is reset",
        "echo 1 > $(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device))/reset",
    ),
    (
        "bus mastering goes off",
        "d=$(dirname $(grep -l 0x10f0 /sys/bus/pci/devices/*/device)); printf '\\003' | dd of=$d/config bs=1 seek=4 conv=notrunc 2>/dev/null",
    ),
];
/// Each so often: it need not meet the same moment twice.
const ROUNDS: usize = 2;
/// Letters just before, and just after.
const LETTERS: usize = 3;

/// A loop of transfers: each is whole, or the loop ends with what was wrong.
fn transfers(expected: &str) -> String {
    format!(
        "while [ ! -e /tmp/enough ]; do vmgmt get --force data/big.bin /tmp/big.bin || exit 1; \
         [ \"$(sha256sum < /tmp/big.bin)\" = \"{expected}  -\" ] || {{ echo torn; exit 1; }}; echo moved; done"
    )
}

/// The object of this name, wherever it is.
fn find<'a>(tree: &'a serde_json::Value, name: &str) -> Option<&'a serde_json::Value> {
    match tree {
        serde_json::Value::Object(object) if object.get("name").is_some_and(|found| found == name) => {
            Some(tree)
        }
        serde_json::Value::Object(object) => object.values().find_map(|inner| find(inner, name)),
        serde_json::Value::Array(list) => list.iter().find_map(|inner| find(inner, name)),
        _ => None,
    }
}

/// One that receives all the time misses no letter, and gets none twice.
fn letters(site: &Site, vm: &Vm) -> Result<()> {
    let name = vm.name();
    let mut receiving = vm.spawn("exec vmgmt recv --follow")?;
    wait_until("it waits for letters", SHORT, || {
        let vms: serde_json::Value = serde_json::from_str(&site.operator(&["--json", "vms"])?)?;
        let mine = find(&vms, name).context("the VM is not told of")?;
        Ok((mine["listening"] == true).then_some(()))
    })?;
    let mut sent = 0;
    let mut send = |count: usize| -> Result<()> {
        for _ in 0..count {
            sent += 1;
            site.operator(&["send", name, &format!("letter {sent};")])?;
        }
        Ok(())
    };
    let mut last = 0;
    for _ in 0..ROUNDS {
        for (what, command) in BEHIND_ITS_BACK {
            send(LETTERS)?;
            vm.ok_for(command, LONG).context(what)?;
            send(LETTERS)?;
            last += 2 * LETTERS;
            receiving
                .wait_for(&format!("letter {last};"), LONG)
                .with_context(|| format!("{name}, {what}"))?;
        }
    }
    receiving.signal("INT")?;
    let output = receiving.wait(SHORT)?;
    let said = output.text();
    ensure!(output.status == 130, "recv ended with {}: {said}", output.status);
    let numbers: Vec<&str> = said
        .split("letter ")
        .skip(1)
        .filter_map(|rest| rest.split(';').next())
        .collect();
    let expected: Vec<String> = (1..=last).map(|number| number.to_string()).collect();
    ensure!(numbers == expected, "{name} got the letters {numbers:?}");
    Ok(())
}

fn moved(running: &mut Running, before: &mut usize) -> Result<()> {
    *before += 1;
    let wanted = *before;
    wait_until("one more transfer", LONG, || {
        let said = running.wait_for("moved", LONG)?;
        let count = said.matches("moved").count();
        if count >= wanted {
            *before = count;
        }
        Ok((count >= wanted).then_some(()))
    })
}

/// Transfers all the time are whole, each of them.
fn files(vm: &Vm, expected: &str) -> Result<()> {
    let mut running = vm.spawn(&transfers(expected))?;
    let mut count = 0;
    moved(&mut running, &mut count)?;
    for _ in 0..ROUNDS {
        for (what, command) in BEHIND_ITS_BACK {
            vm.ok_for(command, LONG).context(what)?;
            // The one that was under way, and one that began after it.
            moved(&mut running, &mut count)
                .and_then(|()| moved(&mut running, &mut count))
                .with_context(|| format!("{}, {what}", vm.name()))?;
        }
    }
    vm.ok("touch /tmp/enough")?;
    running.wait(LONG)?.ok().map(drop)
}

#[test]
fn a_function_is_reset_or_loses_the_bus_while_a_program_holds_it() -> Result<()> {
    let Some(site) = site(2)? else { return Ok(()) };
    let (uio, vfio) = thread::scope(|scope| {
        let vfio = || {
            site.builder("vm2")
                .iommu(Iommu::Intel)
                .driver(Driver::Vfio)
                .start()
        };
        let second = scope.spawn(vfio);
        let first = site.vm("vm1")?;
        anyhow::Ok((first, second.join().ok().context("a thread died")??))
    })?;
    site.check(&[&uio, &vfio], || {
        site.fill("big.bin", 3_000_001)?;
        let expected = host_checksum(&site.shared("big.bin"))?;
        let work = |vm: &Vm| letters(&site, vm).and_then(|()| files(vm, &expected));
        thread::scope(|scope| {
            let second = scope.spawn(|| work(&vfio));
            work(&uio)?;
            second.join().ok().context("a thread died")?
        })
    })
}
