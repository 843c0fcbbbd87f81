//! The machine room's list of bad words: what a guest's kernel says when a driver, a device or memory is not as it should be.
//!
//! In: what a console said. Out: the lines that must not be in it. The guests' kernels say warnings on their consoles ([`super::VmBuilder`]), so nothing
//! has to be asked in time, and a VM that was killed has said it too. It must never know which test asks.

/// Parts of lines, each from the kernel's sources.
const BAD_WORDS: [&str; 27] = [
    "WARNING:",
    "BUG:",
    "Oops",
    "Call Trace",
    "Kernel panic",
    "general protection fault",
    "nable to handle",
    "Bad page",
    "page allocation failure",
    "oom-killer",
    "soft lockup",
    "hard LOCKUP",
    "detected stall",
    "self-detected stall",
    "starved for",
    "blocked for more than",
    // Interrupts, PCI and the IOMMUs.
    "nobody cared",
    "AER:",
    "can't reserve",
    "can't enable device",
    "no compatible bridge window",
    "handling fault status",
    "DMAR: [DMA",
    "page fault from EP",
    "unhandled fault",
    // Drivers.
    "vfio-pci: probe",
    "uio_pci_generic: probe",
];

/// The lines of a console that hold one of the bad words.
pub fn complaints(console: &str) -> Vec<String> {
    let bad = |line: &&str| BAD_WORDS.iter().any(|word| line.contains(word));
    let lines = console.lines().filter(bad);
    lines.map(|line| line.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_faults_and_stalls_are_found_and_ordinary_words_are_not() {
        let said = "\
[    1.0] pci 0000:01:00.0: BAR 2: can't reserve [io  size 0x0040]\r
[    2.0] WARNING: CPU: 0 PID: 1 at kernel/irq/manage.c:1 free_irq+0x1/0x2\r
[    3.0] watchdog: BUG: soft lockup - CPU#0 stuck for 23s! [vmgmt:77]\r
[    4.0] DMAR: DRHD: handling fault status reg 2\r
[    5.0] rcu: INFO: rcu_preempt self-detected stall on CPU\r
[    6.0] INFO: task vmgmt:77 blocked for more than 120 seconds.\r
[    7.0] DMAR: IOMMU enabled\r
init: ready\r
";
        let found = complaints(said);
        assert_eq!(found.len(), 6, "{found:#?}");
        assert!(
            found
                .iter()
                .all(|line| !line.ends_with('\r') && !line.contains("IOMMU enabled"))
        );
    }
}
