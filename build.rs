//! Proof, not build: with the feature `uapi-check` this runs bindgen over the system's headers, for
//! `tests/uapi_check.rs` to hold the hand-written numbers of `server/wire` against them.
//!
//! In: `linux/vfio.h`, `linux/pci_regs.h`, `errno.h`. Out: `OUT_DIR/uapi.rs`: the bindings, and a table of
//! all their constants. Without the feature nothing happens, and no libclang is needed.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "uapi-check")]
    uapi::generate();
}

#[cfg(feature = "uapi-check")]
mod uapi {
    use std::fmt::Write as _;

    const HEADERS: &str = "#include <linux/vfio.h>\n#include <linux/pci_regs.h>\n#include <errno.h>\n";

    #[allow(clippy::expect_used)] // a build script has nobody to return an error to
    pub fn generate() {
        let bindings = bindgen::Builder::default()
            .header_contents("uapi.h", HEADERS)
            .allowlist_item("(vfio|VFIO|PCI)_.*")
            .allowlist_var("E[A-Z0-9]+")
            .prepend_enum_name(false)
            .layout_tests(false)
            .generate()
            .expect("bindgen over linux/vfio.h and linux/pci_regs.h (needs libclang-dev and linux-libc-dev)")
            .to_string();
        let mut text = bindings.clone();
        text.push_str("\n/// Name and value of every integer constant of the headers.\npub const CONSTANTS: &[(&str, u64)] = &[\n");
        for name in bindings.lines().filter_map(integer_constant) {
            let _ = writeln!(text, "    (\"{name}\", {name} as u64),");
        }
        text.push_str("];\n");
        let target =
            std::path::Path::new(&std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("uapi.rs");
        std::fs::write(target, text).expect("OUT_DIR can be written");
    }

    /// `pub const NAME: TYPE = 123;`, and not an array or a string.
    fn integer_constant(line: &str) -> Option<&str> {
        let (name, rest) = line.trim().strip_prefix("pub const ")?.split_once(':')?;
        let (_, value) = rest.split_once('=')?;
        let value = value.trim().trim_end_matches(';');
        value
            .trim_start_matches('-')
            .parse::<u128>()
            .is_ok()
            .then_some(name)
    }
}
