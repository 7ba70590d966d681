//! Notification bodies as anybody with the token can send them, and what comes off the queue.
#![no_main]

use countersign::{event::PushEvent, intake::distribution};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = distribution::parse(data);
    if let Ok(event) = PushEvent::from_cloud_event(data) {
        let again = PushEvent::from_cloud_event(&event.to_cloud_event()).expect("what we write, we read");
        assert_eq!(event, again);
    }
});
