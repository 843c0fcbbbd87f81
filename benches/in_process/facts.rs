//! What a figure means nothing without: the machine, the kernel, the build, the command.

use std::fs;

/// Names and values.
pub fn take() -> Vec<(&'static str, String)> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |text: &str, name: &str| {
        text.lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map_or_else(|| "unknown".to_owned(), |(_, value)| value.trim().to_owned())
    };
    let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let build = if cfg!(debug_assertions) {
        "with debug assertions: figures are no figures"
    } else {
        "optimised"
    };
    let command: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| word != "--bench")
        .collect();
    vec![
        ("processor", field(&cpuinfo, "model name")),
        ("processors usable", cores.to_string()),
        ("memory", field(&memory, "MemTotal")),
        ("kernel", kernel.trim().to_owned()),
        ("load before", load.trim().to_owned()),
        ("build", build.to_owned()),
        (
            "command",
            format!("cargo bench --bench in_process -- {}", command.join(" "))
                .trim_end_matches(" -- ")
                .to_owned(),
        ),
    ]
}
