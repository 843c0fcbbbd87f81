//! CBOR (RFC 8949) of what a core leaves for the next: snapshots and records.
//!
//! In: values and bytes. Out: bytes and values. It is read before a core serves, and written while it serves: hence the quick library. The form
//! is that of `ciborium`, with which the front and the keeper write: structures and variants by name. (But for a unit, `()`, which it
//! writes otherwise, and which nothing that is kept has.)

use cbor4ii::serde::{from_slice, to_writer};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Appends a value.
pub(crate) fn write(value: &impl Serialize, bytes: &mut Vec<u8>) {
    // Writing into a Vec through `Write` does not fail (where there is no memory the process ends), and no type in here refuses to be
    // serialized. Should one ever: half a record must not come into force. A core may end at any moment, and the next goes on from what is.
    if to_writer(bytes, value).is_err() {
        std::process::abort();
    }
}

/// A value; bytes behind it do not matter.
///
/// # Errors
/// What is wrong with the bytes.
pub(crate) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    from_slice(bytes).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde::Deserialize;
    use std::os::unix::process::ExitStatusExt;

    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
    enum Variant {
        Unit,
        Value(u64),
        Pair(i64, String),
        Named { flag: bool, list: Vec<u8> },
    }

    #[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
    struct Everything {
        number: u64,
        small: u16,
        text: String,
        perhaps: Option<Box<Everything>>,
        pairs: Vec<(u64, Variant)>,
    }

    fn variant() -> impl Strategy<Value = Variant> {
        prop_oneof![
            Just(Variant::Unit),
            any::<u64>().prop_map(Variant::Value),
            any::<(i64, String)>().prop_map(|(number, text)| Variant::Pair(number, text)),
            any::<(bool, Vec<u8>)>().prop_map(|(flag, list)| Variant::Named { flag, list }),
        ]
    }

    fn everything() -> impl Strategy<Value = Everything> {
        let parts = (
            any::<(u64, u16, String)>(),
            prop::collection::vec((any::<u64>(), variant()), 0..30),
        );
        parts.prop_map(|((number, small, text), pairs)| Everything {
            number,
            small,
            text: text.clone(),
            perhaps: (small % 2 == 0).then(|| {
                let perhaps = None;
                Box::new(Everything {
                    number,
                    small,
                    text,
                    perhaps,
                    pairs: Vec::new(),
                })
            }),
            pairs,
        })
    }

    /// Where there is no memory for all of it, the process ends, rather than that nothing comes into force as if it were all.
    #[test]
    fn no_memory_is_the_end_and_no_empty_record() {
        const CHILD: &str = "VMGMT_TEST_WITHOUT_MEMORY";
        if std::env::var_os(CHILD).is_some() {
            let value = String::from_utf8(vec![0; 300 << 20]).unwrap();
            let mut bytes = Vec::new();
            println!("writes");
            write(&value, &mut bytes);
            println!("wrote {} bytes", bytes.len());
            return;
        }
        let output = std::process::Command::new("sh")
            .args(["-c", "ulimit -c 0; ulimit -v 600000 && exec \"$0\" \"$@\""])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "cbor::tests::no_memory_is_the_end_and_no_empty_record"])
            .args(["--test-threads", "1", "--nocapture"])
            .env(CHILD, "")
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&output.stdout);
        assert!(told.contains("writes") && !told.contains("wrote"), "{told}");
        assert_eq!(output.status.signal(), Some(6), "{told}");
    }

    proptest! {
        #[test]
        fn two_libraries_write_the_same_and_read_each_other(value in everything()) {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            write(&value, &mut ours);
            ciborium::into_writer(&value, &mut theirs).unwrap();
            prop_assert_eq!(&ours, &theirs);
            prop_assert_eq!(read::<Everything>(&theirs).unwrap(), value);
        }
    }
}
