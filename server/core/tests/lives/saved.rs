//! What another version saved.

use crate::A;
use crate::house::{Ask, House};
use ciborium::Value;
use vmgmt_abi::Opcode;
use vmgmt_core::{Hub, Saved};

fn as_version_1(saved: &[u8]) -> Vec<u8> {
    type Map = Vec<(Value, Value)>;
    fn entry<'a>(map: &'a mut Map, key: &str) -> &'a mut Value {
        let found = map.iter_mut().find(|(name, _)| name.as_text() == Some(key));
        &mut found.unwrap_or_else(|| panic!("no {key}")).1
    }
    let mut saved: Value = ciborium::from_reader(saved).unwrap();
    let saved_map = saved.as_map_mut().unwrap();
    *entry(saved_map, "version") = 1.into();
    saved_map.retain(|(name, _)| name.as_text() != Some("reopening"));
    let ledger = entry(saved_map, "ledger").as_map_mut().unwrap();
    // A send whose answer is not known to be published is where version 1 had it.
    let origins = entry(ledger, "origins").as_array().unwrap();
    assert_eq!(origins.len(), 1);
    ledger.retain(|(name, _)| name.as_text() != Some("kept"));
    let mut bytes = Vec::new();
    ciborium::into_writer(&saved, &mut bytes).unwrap();
    bytes
}

#[test]
fn what_version_1_saved_is_read_and_a_later_version_is_refused() {
    let mut house = House::new();
    house.manual = true;
    let send = Ask::new(Opcode::SEND).handle(2).argument(7).data("message");
    let token = house.ask(A, send);
    let saved = house.hub.save().to_bytes();
    let old = Saved::from_bytes(&as_version_1(&saved)).unwrap();
    let hub = Hub::replay(2, Some(old), []).unwrap();
    assert_eq!(hub.unresolved(), [token]);
    assert_eq!(hub.surviving(), house.hub.surviving());

    let mut later: Value = ciborium::from_reader(saved.as_slice()).unwrap();
    let version = &mut later.as_map_mut().unwrap()[0];
    assert_eq!(version.0.as_text(), Some("version"));
    version.1 = 99.into();
    let mut bytes = Vec::new();
    ciborium::into_writer(&later, &mut bytes).unwrap();
    let error = Saved::from_bytes(&bytes).unwrap_err().to_string();
    assert!(error.contains("has version 99"), "{error}");
}
